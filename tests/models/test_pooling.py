"""Pools of ragged and of odd grids are what PyTorch says they are."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models import pooling
from medattn_jax.models.pooling import adaptive_average, ceil_max_pool


@pytest.mark.parametrize("size, sides", [
  (3, (7, 8)), (3, (112, 3)), (3, (2, 6)), (2, (7, 8)), (2, (1, 2))])
def test_ceil_max_pool(size, sides):
  """Each window's maximum, of negative numbers too: what is beyond the edge has no say."""
  x = np.random.default_rng(0).normal(-5, 1, (2, *sides, 3)).astype(np.float32)
  y = ceil_max_pool(x, size)
  rows, columns = (math.ceil((side - size) / 2) + 1 for side in sides)
  assert y.shape == (2, rows, columns, 3)
  for i, j in np.ndindex(rows, columns):
    window = x[:, 2 * i:2 * i + size, 2 * j:2 * j + size]
    np.testing.assert_array_equal(y[:, i, j], window.max((1, 2)))


@pytest.mark.parametrize(("sides", "size", "stride", "around"), [
  ((9, 11), 3, 2, ((0, 0), (0, 0))), ((8, 8), 3, 2, ((0, 0), (0, 0))),
  ((7, 8), 3, 2, ((1, 1), (1, 1))), ((8, 9), 2, 2, ((0, 0), (0, 0))),
  ((8, 7), 3, 2, ((0, 1), (0, 0))), ((3, 3), 2, 2, ((0, 1), (0, 1))),
  ((6, 5), 3, 1, ((1, 1), (1, 1))), ((7, 9), 2, 3, ((0, 0), (1, 0)))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gathered_maxima(sides, size, stride, around, dtype):
  """They, and whither their gradient goes, are linen's: of equal pixels to the first."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.integers(-3, 1, (2, *sides, 5)), dtype)
  windows = ((size, size), (stride, stride), around)
  wanted, wanted_pull = jax.vjp(lambda x: nn.max_pool(x, *windows), x)
  found, pull = jax.vjp(lambda x: pooling._gathered(x, size, stride, around, x.shape[1:3]), x)
  np.testing.assert_array_equal(found, wanted)
  slope = jnp.asarray(rng.integers(-9, 9, found.shape), dtype)  # whose sums are exact
  np.testing.assert_array_equal(pull(slope)[0], wanted_pull(slope)[0])


def test_a_cpu_looks_for_no_winner_twice():
  """XLA's own gradient reduces each window again, to scatter: many times a step's other passes."""
  slope = jax.jit(jax.grad(lambda x: jnp.square(pooling.maximum(x, 3)).sum()))
  text = slope.lower(jnp.zeros((2, 9, 9, 4))).compile().as_text()
  assert "scatter" not in text and "reduce-window" not in text


@pytest.mark.parametrize("sides", [(14, 7), (9, 5), (4, 4), (1, 3)])
def test_adaptive_average(sides):
  x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
  y = adaptive_average(x, 4)
  assert y.shape == (2, 4, 4, 3)
  span = lambda i, side: slice(math.floor(i * side / 4), math.ceil((i + 1) * side / 4))
  for i, j in np.ndindex(4, 4):
    window = x[:, span(i, sides[0]), span(j, sides[1])]
    np.testing.assert_allclose(y[:, i, j], window.mean((1, 2)), rtol=1e-5, atol=1e-6)
