"""The poolings of PyTorch that linen does not have."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medattn_jax.models import blocks
from medattn_jax.models.blocks import Blocks
from medattn_jax.models.norm import Array


def max_pool(x: Float[Array, "b h w c"] | Blocks) -> Float[Array, "b h2 w2 c"]:
  """Maximum of 3×3 windows at stride 2, without padding."""
  return blocks.max_pool(x) if isinstance(x, Blocks) else nn.max_pool(x, (3, 3), (2, 2))


def ceil_max_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
  """Maximum of size×size windows at stride 2; a ragged last row or column has a window too."""
  ragged = [(0, (size - side) % 2) for side in x.shape[1:3]]
  return nn.max_pool(x, (size, size), (2, 2), ragged)


def adaptive_average(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b s s c"]:
  """Means of side×side windows that cover `x` evenly, whatever its size: they may overlap."""
  if x.shape[1:3] == (side, side):
    return x
  rows, columns = (_windows(n, side) for n in x.shape[1:3])
  y = jnp.einsum("ih,bhwc,jw->bijc", rows, x.astype(jnp.float32), columns, precision="highest")
  return y.astype(x.dtype)


def _windows(length: int, count: int) -> np.ndarray:
  """float32 [count, length]: each row holds the weights of one window's mean."""
  weights = np.zeros((count, length), np.float32)
  for i in range(count):
    first, end = i * length // count, -(-(i + 1) * length // count)
    weights[i, first:end] = 1 / (end - first)
  return weights
