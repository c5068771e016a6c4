"""Sums over devices: parts in the order in which a backward pass makes them, and nothing lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from medattn_jax import joining, sharding

MB = 2**20


@pytest.mark.parametrize(("sizes", "order", "expected"), [
  ((5 * MB, 5 * MB, 5 * MB), (2, 0, 1), [[1, 2, 0]]),  # too little to be parted
  ((8 * MB, 10 * MB, 20 * MB), (9, 6, 4), [[2, 1], [0]]),
  ((10 * MB,) * 9, (9, 8, 7, 6, 5, 4, 3, 2, 1), [[8, 7, 6, 5, 4, 3, 2], [1], [0]]),
  ((30 * MB,) * 10, range(10), [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9]]),
  ((400 * MB, 4 * MB), (0, 1), [[0], [1]]),  # one kernel that is nearly all: no part is empty
])
def test_parts_are_in_the_order_of_the_backward_pass(sizes, order, expected):
  assert joining.parts(sizes, order) == expected


def test_parts_are_few_and_hold_everything_once():
  rng = np.random.default_rng(0)
  for _ in range(50):
    sizes = rng.integers(1, 20 * MB, rng.integers(1, 60)).tolist()
    order = rng.permutation(len(sizes)).tolist()
    found = joining.parts(sizes, order)
    held = [i for part in found for i in part]
    assert sorted(held) == list(range(len(sizes))) and len(found) <= 3 and all(found)
    if len(found) > 1:
      assert [order[i] for i in held] == sorted(order)


def test_a_backward_pass_makes_the_last_layers_gradients_first():
  def loss(params, x):
    for name in ("c", "a", "b"):  # neither by the alphabet nor against it
      x = jnp.tanh(x @ params[name])
    return x.sum(), x

  params = {name: jnp.eye(3) for name in "abc"} | {"unused": jnp.eye(3)}
  x = jnp.ones((2, 3))
  gradient = jax.grad(loss, has_aux=True)
  (found, after), order = joining.observed(gradient, params, x)
  expected, same = gradient(params, x)
  jax.tree.map(np.testing.assert_array_equal, (found, after), (expected, same))
  when = dict(zip(sorted(params), order, strict=False))
  assert when["b"] < when["a"] < when["c"]
  assert len(order) == len(params) + 1 and order[-1] < when["b"]  # what the forward pass gave


def test_every_way_gives_the_same_sums(monkeypatch, summed):
  monkeypatch.setattr(joining, "_LEAST", 300)
  mesh = sharding.mesh()
  rng = np.random.default_rng(0)
  shapes = {"a": (8, 3, 40), "b": (8, 500), "c": (8, 20, 20), "d": (8, 4), "e": (8, 3, 2, 10, 6)}
  gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  rest = {"sums": rng.normal(size=8).astype(np.float32), "of": rng.normal(size=(8, 7))}
  rest["of"] = rest["of"].astype(np.float32)
  order = [4, 2, 0, 9, 1]

  def joined(way, order):
    def local(tree):
      return joining.total(*jax.tree.map(lambda x: x[0], tree), sharding.AXIS, way, order)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(sharding.AXIS), out_specs=P(),
                                 check_vma=False)).lower((gradients, rest))

  for way, given, shapes in (
      ("vector", None, ["1392"]),
      ("kernels", None, ["20x20", "3x2x10x6", "3x40", "512"]),
      ("parts", None, ["1392"]),  # as where a loop gives all at once
      ("parts", order, ["1268", "124"])):
    lowered = joined(way, given)
    assert sorted(summed(lowered)) == sorted(shapes), way
    found = lowered.compile()((gradients, rest))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y.sum(0), rtol=1e-5, atol=1e-5),
                 found, (gradients, rest))


def test_a_platforms_way():
  assert [joining.way(name) for name in ("cpu", "tpu", "gpu")] == ["vector", "kernels", "parts"]
