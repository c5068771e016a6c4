"""What a compiled program tells: read from small programs of the compilers there are."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from medattn_jax import sharding
from medattn_jax.programs import apart, chips, places, report, traffic


def step(*how, **more):
  return lowered(*how, **more).compile()


def lowered(devices, rounds=1, lost=False):
  """A layer trained by descent: its parameters, a count, and a leaf that nobody reads."""
  mesh = sharding.mesh(devices)

  def local(state, batch):
    with jax.named_scope("layer"):
      loss = lambda w: ((batch @ w["matrix"] + w["bias"]) ** 2).sum()
    slope = jax.grad(loss)(state["w"])

    def again(_, slope):
      return jax.tree.map(lambda s: jax.lax.psum(jnp.tanh(s), sharding.AXIS), slope)

    flat, unravel = ravel_pytree(slope)
    slope = unravel(jax.lax.psum(flat, sharding.AXIS))
    if rounds > 1:
      slope = jax.lax.fori_loop(0, rounds, again, slope)
    new = jax.tree.map(lambda w, s: w - 0.1 * s, state["w"], slope)
    if lost:
      new["bias"] = new["bias"].astype(jnp.bfloat16)
    return {"w": new, "count": state["count"] + 1, "unread": jnp.zeros((3,))}

  whole = NamedSharding(mesh, P())
  shaped = lambda shape, dtype=jnp.float32, where=whole: jax.ShapeDtypeStruct(
    shape, dtype, sharding=where)
  state = {"w": {"matrix": shaped((256, 512)), "bias": shaped((512,))},
           "count": shaped((), jnp.int32), "unread": shaped((3,))}
  batch = shaped((16 * mesh.size, 256), where=sharding.batched(mesh))
  mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(sharding.AXIS)), out_specs=P(),
                         check_vma=False)
  return jax.jit(mapped, donate_argnums=0).lower(state, batch)


def test_one_reduction_with_its_bytes_and_what_is_donated():
  told = report.read(step(jax.devices()[:4]))
  (one,) = told.collectives
  assert (one.kind, one.size, one.inside) == ("all-reduce", {"f32": 4 * 257 * 512}, False)
  assert told.counts == {"all-reduce": 1} and told.wire == {"f32": 4 * 257 * 512}
  assert one.elements == 257 * 512
  assert told.donated == 3
  assert told.peak >= told.arguments + told.outputs - told.aliased + told.temporaries
  assert told.flops == pytest.approx(3 * 2 * 16 * 256 * 512, rel=0.4)
  assert told.cycles is None and told.seconds is None
  assert told.row()["inside"] == 0 and told.row()["wire_bytes"] == told.wire


def test_collectives_in_a_loop_are_seen():
  told = report.read(step(jax.devices()[:2], rounds=3))
  inside = [one for one in told.collectives if one.inside]
  assert len(inside) >= 1 and len(told.collectives) > len(inside)
  assert {one.kind for one in inside} == {"all-reduce"}


def test_a_donation_that_is_lost_is_seen():
  """A leaf that changes its dtype: JAX says nothing."""
  assert report.donated(step(jax.devices()[:2], lost=True).as_text()) == 2


def test_what_is_never_read_is_no_input():
  found = report.inputs(lowered(jax.devices()[:2]))
  assert sorted(found) == ["batch", "state['count']", "state['w']['bias']", "state['w']['matrix']"]


@pytest.mark.parametrize(("scope", "direction", "path"), [
  ("jit(local)/shard_map/jvp(MNet)/m_net/backbone/stage2/conv/slice", "forward", "m_net/backbone"),
  ("jit(f)/shard_map/transpose(jvp(MNet))/m_net/head/dot_general", "backward", "m_net/head"),
  ("jit(f)/shard_map/jvp(MNet)/m_net/repeat_1-14/branch1-2/bn/mul", "forward", "m_net/repeat_1"),
  ("transpose(jvp(MNet))/m_net/backbone/bn/reduce_sum", "backward", "m_net/backbone"),
  ("jit(local)/while/body/closed_call/jvp(MNet)/m_net/jit(_pad)/pad", "forward", "m_net"),
  ("jit(local)/shard_map/jvp(MNet)/gs,nstc->ngtc/dot_general", "forward", "–"),
  ("jit(f)/reshape;transpose(jvp(MNet))/m_net/neck/bn/div", "backward", "m_net/neck"),
  ("jit(local)/shard_map/square", "rest", "–"), ("psum", "rest", "–"),
  ("state.params['m_net']['neck']", "rest", "–"), ("", "rest", "–")])
def test_a_place_in_the_model_is_read_off_a_name(scope, direction, path):
  assert places.place(scope, 2) == (direction, path)


def test_the_bytes_of_all_places_are_those_of_the_program():
  text = step(jax.devices()[:2], rounds=5).as_text()
  found = places.of(text, 3, 4)
  assert found.unit == "bytes"
  assert found.total == sum(traffic.moved(text).values()) == sum(one.cost for one in found.shares)
  assert [one.cost for one in found.singles] == sorted(
    (one.cost for one in found.singles), reverse=True)
  assert len(found.singles) == 4
  assert any(one.kind.startswith("5 × ") for one in places.of(text, 3, 1000).singles)


def far(target, rounds=1):
  found = lowered(chips.devices(target), rounds)
  compiled = found.compile()
  of = places.of(compiled.as_text(), 3, 5)
  return report.read(compiled), of, report.inputs(found)


def of_target(text, *arguments):
  target = chips.target(text)
  if reason := chips.missing(target):
    pytest.skip(reason)
  return apart.run(far, target, *arguments, target=target)


def test_a_gpus_program():
  told, found, inputs = of_target("h200:4")
  assert told.counts == {"all-reduce": 1} and told.wire == {"f32": 4 * 257 * 512}
  assert told.donated == 3 and len(inputs) == 4
  assert told.flops is None and told.cycles is None
  assert found.unit == "bytes"
  # Each parameter and its gradient are moved at least thrice.
  assert found.total > 6 * 4 * 256 * 512


@pytest.mark.slow  # libtpu may be at work elsewhere
def test_a_tpus_program(monkeypatch):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", os.getenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"))
  told, found, inputs = of_target("v5e:2x4")
  assert told.counts == {"all-reduce": 1} and told.wire == {"f32": 4 * 257 * 512}
  assert told.donated == 3 and len(inputs) == 4
  assert found.unit == "cycles" and found.total == told.cycles > 1000
  assert 0 < told.seconds < 1e-3
  again, *_ = of_target("v5e:2x4", 50)
  assert again.cycles > 5 * told.cycles  # a loop counts as often as it runs
  assert again.seconds > 5 * told.seconds


def test_seconds_that_the_tpus_compiler_takes_off_are_put_back():
  """libtpu counts minus one second for every call of a kind that it cannot estimate."""
  call = 'x = f32[8] custom-call(y), custom_call_target="ConcatBitcast", backend_config={}'

  class Compiled:
    """A program's text with what its compiler said of it: no program of a CPU has such calls."""

    def as_text(self):
      cycles = '%z = f32[8] add(%y, %y), backend_config={"estimated_cycles":"70"}'
      return f"HloModule m\n\nENTRY %main (y: f32[8]) -> f32[8] {{\n  {cycles}\n  {call}\n}}\n"

    def memory_analysis(self):
      return jax.jit(lambda x: x).lower(1.0).compile().memory_analysis()

    def cost_analysis(self):
      return {"optimal_seconds": -0.99}

  assert report.read(Compiled()).seconds == pytest.approx(0.01)
