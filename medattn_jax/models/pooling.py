"""The poolings of PyTorch that linen does not have."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medattn_jax import platforms
from medattn_jax.models import blocks
from medattn_jax.models.blocks import Blocks
from medattn_jax.models.norm import Array


def max_pool(x: Float[Array, "b h w c"] | Blocks) -> Float[Array, "b h2 w2 c"]:
  """Maximum of 3×3 windows at stride 2, without padding."""
  return blocks.max_pool(x) if isinstance(x, Blocks) else maximum(x, 3)


def ceil_max_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b h2 w2 c"]:
  """Maximum of size×size windows at stride 2; a ragged last row or column has a window too."""
  return maximum(x, size, around=[(0, (size - side) % 2) for side in x.shape[1:3]])


def maximum(
  x: Float[Array, "b h w c"], size: int, stride: int = 2,
  around: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
) -> Float[Array, "b h2 w2 c"]:
  """Maxima of size×size windows; the gradient goes to the first of equal pixels.

  Args:
    around: rows, and columns, without value before and after the picture.
  """
  around = tuple(around)
  gathered = lambda x: _gathered(x, size, stride, around, x.shape[1:3])
  return platforms.dependent(
    x, cpu=gathered, cuda=gathered,
    default=lambda x: nn.max_pool(x, (size, size), (stride, stride), around))


_NONE = 255  # in the place of the tap that won, where there is no window


# XLA scatters a maximum's gradient, on a GPU at a fourth of what its memory gives, and a CPU needs
# ten to thirty times as long to look for the winners: here each pixel gathers from the windows that
# it is in, and the forward pass keeps which tap won.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(x, size, stride, around, sides):
  return _gathered_forward(x, size, stride, around, sides)[0]


def _gathered_forward(x, size, stride, around, sides):
  del sides
  padded = jnp.pad(x, ((0, 0), *around, (0, 0)), constant_values=-jnp.inf)
  ends = [(side - size) // stride * stride + 1 for side in padded.shape[1:3]]
  best = which = None
  # From the last: of equals the first wins, and a GPU, whose addresses begin at the pixel that is
  # read last here, reads four numbers at a time.
  for number, (row, column) in reversed([*enumerate(np.ndindex(size, size))]):
    one = padded[:, row:row + ends[0]:stride, column:column + ends[1]:stride]
    if best is None:
      best, which = one, jnp.full(one.shape, number, jnp.uint8)
    else:
      which = jnp.where(one >= best, jnp.uint8(number), which)
      best = jnp.maximum(best, one)
  # One pass makes both: free, the compiler makes one for each.
  return jax.lax.optimization_barrier((best, which))


def _gathered_backward(size, stride, around, sides, which, gradient):
  dtype = gradient.dtype
  windows = -(-size // stride)  # along an axis, that a pixel may be in
  grid = [-(-(side + sum(own)) // stride) for side, own in zip(sides, around, strict=True)]
  wide = [(0, 0), *((windows - 1, max(0, count - side))
                    for count, side in zip(grid, which.shape[1:3], strict=True)), (0, 0)]
  if windows > 1 and dtype == jnp.bfloat16:
    # A winner in one word with its gradient, in memory: a GPU reckons longer than it reads here.
    word = jax.lax.bitcast_convert_type(gradient, jnp.uint16).astype(jnp.uint32)
    word = jnp.pad(which.astype(jnp.uint32) << 16 | word, wide, constant_values=_NONE << 16)
    word = jax.lax.optimization_barrier(word)
    which, gradient = word >> 16, jax.lax.bitcast_convert_type(word << 16, jnp.float32)
  else:
    which, gradient = jnp.pad(which, wide, constant_values=_NONE), jnp.pad(gradient, wide)
  place = np.arange(stride)
  total = 0
  for down, across in np.ndindex(windows, windows):  # [b, grid, stride, grid, stride, c]
    row, column = place[:, None] + down * stride, place + across * stride
    tap = np.where(np.maximum(row, column) < size, row * size + column, _NONE - 1)
    first = (windows - 1 - down, windows - 1 - across)
    seen = (slice(None), *(slice(a, a + b) for a, b in zip(first, grid, strict=True)))
    mine = which[seen][:, :, None, :, None] == tap.astype(which.dtype)[:, None, :, None]
    total += jnp.where(mine, gradient[seen][:, :, None, :, None], 0)
  pixels = total.astype(dtype).reshape(len(total), grid[0] * stride, grid[1] * stride, -1)
  (top, _), (left, _) = around
  return (pixels[:, top:top + sides[0], left:left + sides[1]],)


_gathered.defvjp(_gathered_forward, _gathered_backward)


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
