"""The reader of compiled programs: bytes as XLA counts them, and loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from medattn_jax.programs import traffic


def compiled(function, *shapes):
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
  return jax.jit(function).lower(*arrays).compile()


def layers(x, w):
  for _ in range(3):
    x = jax.nn.relu(x @ w) + 1
  return x


def test_without_a_loop_it_agrees_with_xla():
  program = compiled(
    jax.grad(lambda w, x: layers(x, w).sum()), ((256, 256), jnp.float32), ((64, 256), jnp.float32))
  found = sum(traffic.moved(program.as_text()).values())
  assert found == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.1)


def test_a_loop_counts_as_often_as_it_runs():
  """A hundred products of 256 kB each way; XLA's own count sees one of them."""

  def loop(x, w):
    return jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ w), x)

  program = compiled(loop, ((256, 256), jnp.float32), ((256, 256), jnp.float32))
  product = 3 * 256 * 256 * 4
  found = traffic.moved(program.as_text())["f32"]
  assert 100 * product <= found <= 100 * 2.4 * product
  assert program.cost_analysis()["bytes accessed"] < 10 * product


def test_of_what_is_sliced_only_the_slice_counts():
  def product(w, x):
    take = lambda i: jax.lax.dynamic_slice_in_dim(x, i * 64, 64).astype(jnp.float32)
    return jax.lax.fori_loop(0, 32, lambda i, total: total + w @ take(i), jnp.zeros((8, 512)))

  program = compiled(product, ((8, 64), jnp.float32), ((2048, 512), jnp.uint8))
  assert traffic.moved(program.as_text())["u8"] == 2048 * 512


def test_a_loop_of_unknown_length_is_refused():
  def loop(x):
    return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x * 2, x)

  with pytest.raises(traffic.UnknownLoop):
    traffic.moved(compiled(loop, ((16,), jnp.float32)).as_text())


def test_floats_are_found_in_memory_and_not_within_fusions():
  inside = compiled(lambda x: (x.astype(jnp.float32) * 2).sum(), ((512, 512), jnp.uint8))
  copied = compiled(
    lambda x, w: jax.lax.optimization_barrier(x.astype(jnp.float32)) @ w,
    ((512, 512), jnp.uint8), ((512, 8), jnp.float32))
  assert traffic.floats(inside.as_text(), 512 * 512) == []
  assert traffic.floats(copied.as_text(), 512 * 512) == ["f32[512,512]"]
