"""Pictures in blocks of pixels, a block's pixels side by side as channels (space to depth).

A TPU moves and multiplies 128 channels at a time, be they there or not: of a picture's 3 and a
stem's 32 or 64 most are padding. In blocks of 2×2 pixels they are four times as many. A published
kernel is rearranged when the step is traced and gives the same numbers: the parameters know nothing
of it. A GPU works on eight channels at a time: there the first convolution alone is computed so,
and gives no blocks (`convolution.py`).
"""

from __future__ import annotations

import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Blocks:
  """N pictures of `rows` × `columns` pixels in blocks.

  Attributes:
    array: [N, blocks down, blocks across, side · side · C]; a block's pixels column by column, and
      each pixel's C channels together. Finite, and of no meaning, beyond the picture's edges.
    side: pixels of a block.
    before: rows, and columns, that the first block begins before the picture.
  """

  array: Float[Array, "n h w d"]
  rows: int = flax.struct.field(pytree_node=False)
  columns: int = flax.struct.field(pytree_node=False)
  side: int = flax.struct.field(pytree_node=False)
  before: int = flax.struct.field(pytree_node=False)

  @property
  def channels(self) -> int:
    return self.array.shape[-1] // self.side**2

  @property
  def inside(self) -> Bool[np.ndarray, "h w pixels"] | None:
    """Which pixels of the blocks are the picture's; None where all are."""
    down, across = (
      _inside(blocks, length, self)
      for blocks, length in zip(self.array.shape[1:3], (self.rows, self.columns), strict=True))
    inside = down[:, None, None, :] & across[None, :, :, None]
    return None if inside.all() else inside.reshape(*inside.shape[:2], -1)

  def zeroed(self) -> Array:
    """The array, zero beyond the edges."""
    if self.inside is None:
      return self.array
    return jnp.where(spread(self.inside, self.channels), self.array, 0)

  def pixels(self) -> Float[Array, "n rows columns c"]:
    """The pictures, no longer in blocks."""
    n, h, w, _ = self.array.shape
    x = self.array.reshape(n, h, w, self.side, self.side, self.channels)
    x = x.transpose(0, 1, 4, 2, 3, 5).reshape(n, h * self.side, w * self.side, self.channels)
    first = self.before
    return x[:, first:first + self.rows, first:first + self.columns]


def _inside(blocks, length, layout):
  place = np.arange(blocks * layout.side) - layout.before
  return ((place >= 0) & (place < length)).reshape(blocks, layout.side)


def spread(inside: Bool[np.ndarray, "h w pixels"], channels: int) -> Bool[np.ndarray, "h w d"]:
  """For each of a block's channels what is said of each of its pixels."""
  return np.repeat(inside, channels, axis=-1)


def split(x: Float[Array, "n rows columns c"], side: int) -> Blocks:
  """Pictures in blocks of side × side pixels, zeros beyond their lower and right edges."""
  n, rows, columns, channels = x.shape
  x = jnp.pad(x, ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0)))
  h, w = x.shape[1] // side, x.shape[2] // side
  # Plane by plane, columns apart first: a TPU needs ten times as long for the plain transpose.
  planes = x.transpose(0, 3, 1, 2)
  apart = jnp.stack([planes[..., column::side] for column in range(side)], 1)
  apart = apart.reshape(n, side, channels, h, side, w)
  return Blocks(apart.transpose(0, 3, 5, 1, 4, 2).reshape(n, h, w, -1), rows, columns, side, 0)


def _taps(size: int, stride: int, padding: int, x: Blocks) -> tuple[np.ndarray, int, int]:
  """How a kernel's `size` taps along one axis lie in blocks.

  Returns (float32 [block taps, pixels of a block in, pixels of a block out, taps] of zeros and
  ones, the first block that output block 0 sees, rows that the first output block begins before).
  """
  out = x.side // stride

  def seen(before):
    # The place, counted from the input's first block, of each output pixel's taps.
    pixel = np.arange(out)[:, None] - before
    return stride * pixel - padding + np.arange(size) + x.before

  before = min(range(out), key=lambda q: np.ptp(seen(q) // x.side))
  places = seen(before)
  first = places.min() // x.side
  one_hot = np.zeros((places.max() // x.side - first + 1, x.side, out, size), np.float32)
  for (pixel, tap), place in np.ndenumerate(places):
    one_hot[place // x.side - first, place % x.side, pixel, tap] = 1
  return one_hot, int(first), before


def convolve(
    x: Blocks, kernel: Float[Array, "k k c d"], stride: int, padding: int,
) -> Blocks:
  """The convolution of pictures in blocks; its result is in blocks of side / stride pixels.

  The kernel is rearranged as it is given, and then takes the pictures' dtype.

  Raises:
    ValueError: the stride does not divide the block's side.
  """
  if x.side % stride:
    raise ValueError(f"stride {stride} in blocks of {x.side} pixels: accepted: a divisor")
  taps, first, before = _taps(len(kernel), stride, padding, x)
  side = x.side // stride
  wide = jnp.einsum("eaps,fbqt,stcd->efbacqpd", taps, taps, kernel, precision="highest")
  wide = wide.reshape(len(taps), len(taps), x.side**2 * x.channels, -1).astype(x.array.dtype)
  rows, columns = (
    (length + 2 * padding - len(kernel)) // stride + 1 for length in (x.rows, x.columns))
  wanted = [math.ceil((length + before) / side) for length in (rows, columns)]
  around = [
    (-first, first + blocks - 1 + len(taps) - given)
    for blocks, given in zip(wanted, x.array.shape[1:3], strict=True)]
  array = jax.lax.conv_general_dilated(
    x.zeroed() if padding else x.array, wide, (1, 1), around,
    dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return Blocks(array, rows, columns, side, before)


def max_pool(x: Blocks) -> Float[Array, "n h w c"]:
  """The 3×3 maximum at stride 2 of pictures in blocks of 2×2, without padding; not in blocks.

  The gradient goes to the first of equal pixels, as that of linen's max_pool.

  Raises:
    ValueError: blocks of another side.
  """
  if x.side != 2:
    raise ValueError(f"blocks of {x.side} pixels: accepted: 2")
  sides = tuple((length - 3) // 2 + 1 for length in (x.rows, x.columns))
  return _pool(x.array, x.before, sides, x.array.shape[2])


def _seen(before):
  """The three pixels that window 0 sees along an axis: (block, pixel of it)."""
  return [divmod(place + before, 2) for place in range(3)]


def _strongest(x, axis, before, length):
  """The maxima of three pixels along an axis and, uint8, which was the first of the largest."""
  best = which = None
  half = x.shape[-1] // 2
  for number, (block, pixel) in enumerate(_seen(before)):
    one = jax.lax.slice_in_dim(x, block, block + length, axis=axis)
    one = one[..., pixel * half:(pixel + 1) * half]
    if best is None:
      best, which = one, jnp.zeros(one.shape, jnp.uint8)
    else:
      which = jnp.where(one > best, jnp.uint8(number), which)
      best = jnp.maximum(best, one)
  return best, which


def _give_back(which, gradient, axis, before, blocks):
  """The gradient of `_strongest`'s maxima: to the pixel that was it, of so many blocks."""
  around = [(0, 0)] * 4
  around[axis] = (1, blocks - gradient.shape[axis])
  # Widened before anything is chosen: on a TPU all choices are then one pass.
  gradient, which = jnp.pad(gradient, around), jnp.pad(which, around, constant_values=3)
  parts = [0, 0]
  for number, (block, pixel) in enumerate(_seen(before)):
    seen = functools.partial(
      jax.lax.slice_in_dim, start_index=1 - block, limit_index=1 - block + blocks, axis=axis)
    parts[pixel] += jnp.where(seen(which) == number, seen(gradient), 0)
  return jnp.concatenate(parts, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _pool(x, before, sides, across):
  return _pool_forward(x, before, sides, across)[0]


def _pool_forward(x, before, sides, across):
  del across
  rows, of_column = _strongest(x, 2, before, sides[1])
  best, of_row = _strongest(rows, 1, before, sides[0])
  return best, (of_column, of_row)


def _pool_backward(before, sides, across, saved, gradient):
  del sides
  of_column, of_row = saved
  rows = _give_back(of_row, gradient, 1, before, of_column.shape[1])
  return (_give_back(of_column, rows, 2, before, across),)


_pool.defvjp(_pool_forward, _pool_backward)
