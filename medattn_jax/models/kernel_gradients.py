"""Convolutions whose kernel's gradient a CPU computes in parts that its cache holds.

XLA's CPU computes a kernel's gradient as a convolution whose kernel is the gradient of the
features, and reads all of that once for every few rows of its result. As long as it lies in a
core's own cache that goes as fast as the convolution itself; beyond, at a third of it. The sum over
a few images at a time is the same gradient. Other devices have programs as if this was not here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

Array = jax.Array | np.ndarray

# Bytes of the features' gradient to a part: of a core's own cache, 1 to 2 MiB nowadays, some is
# left to the rest. Parts cost time to compile, so there are not many.
_PART = 2**20
_MOST = 8


def convolve(
  x: Float[Array, "b h w c"], kernel: Float[Array, "k l c d"], stride: int,
  padding: tuple[int, int],
) -> Float[Array, "b h2 w2 d"]:
  """The convolution, with as many rows and columns of `padding` on each side."""
  if x.dtype != jnp.float32:  # a sum of rounded parts would be another gradient
    return _convolve(x, kernel, stride, padding)
  sides = [(side + 2 * around - size) // stride + 1
           for side, size, around in zip(x.shape[1:3], kernel.shape, padding, strict=False)]
  count = parts(x.shape[0], 4 * sides[0] * sides[1] * kernel.shape[-1])
  if count == 1:
    return _convolve(x, kernel, stride, padding)
  return _in_parts(x, kernel, stride, padding, count)


def parts(images: int, each: int) -> int:
  """Into how many equal parts to sum over `images` whose gradients have so many bytes each."""
  if not isinstance(images, int):  # exported for any number of images: nothing is trained there
    return 1
  counts = [count for count in range(1, min(images, _MOST) + 1) if images % count == 0]
  return next((count for count in counts if images // count * each <= _PART), counts[-1])


def _convolve(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), [(around, around) for around in padding],
    dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _in_parts(x, kernel, stride, padding, count):
  del count
  return _convolve(x, kernel, stride, padding)


def _forward(x, kernel, stride, padding, count):
  del count
  return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, count, saved, dy):
  x, kernel = saved
  # As autodiff has it: the features' channels are its images, and their images its channels.
  around = [
    (before, stride * (wide - 1) + size - side - before)
    for before, wide, size, side in zip(
      padding, dy.shape[1:3], kernel.shape, x.shape[1:3], strict=False)]
  whole = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1), padding=around,
    rhs_dilation=(stride, stride), dimension_numbers=("CHWN", "IHWO", "HWNC"))

  def summed(x, dy):
    pieces = zip(jnp.split(x, count), jnp.split(dy, count), strict=True)
    return functools.reduce(jnp.add, (whole(*piece) for piece in pieces))

  dk = jax.lax.platform_dependent(x, dy, cpu=summed, default=whole)
  (dx,) = jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)(dy)
  return dx, dk


_in_parts.defvjp(_forward, _backward)
