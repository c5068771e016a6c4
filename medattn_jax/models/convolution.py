"""How a convolution is computed, and where: the same numbers, by what a platform is good at."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medattn_jax import apart, onednn, platforms
from medattn_jax.models import blocks


def convolve(
  x: Float[jax.Array | np.ndarray, "b h w c"], kernel: Float[jax.Array | np.ndarray, "k l c d"],
  stride: int, padding: tuple[int, int],
) -> Float[jax.Array, "b h2 w2 d"]:
  """The convolution of x, `padding` rows and columns of zeros on each side; of one dtype."""
  if kernel.shape[:2] == (1, 1) and padding == (0, 0):
    if stride > 1:
      # Held apart: a GPU's compiler fails where it fuses this and what is computed twice (see
      # `remat`) to the product.
      x = jax.lax.optimization_barrier(x[:, ::stride, ::stride])
    return platforms.dependent(
      x, kernel[0, 0], tpu=_convolve_point, cpu=_multiply_on_cpu, cuda=_multiply_on_cuda,
      default=_multiply)
  if math.prod(x.shape[1:3]) <= 4 and max(x.shape[1:3]) < max(kernel.shape[:2]):
    return _convolve_tiny(x, kernel, stride, padding)
  where = {"stride": stride, "padding": padding}
  plain = on_cuda = functools.partial(_convolve_plain, **where)
  if stride == 2 and x.shape[-1] <= 4 and kernel.shape[0] == kernel.shape[1] and (
      padding[0] == padding[1]):
    on_cuda = functools.partial(_convolve_picture, padding=padding[0])
  return platforms.dependent(
    x, kernel, cpu=functools.partial(_convolve_on_cpu, **where), cuda=on_cuda, default=plain)


def _convolve_tiny(x, kernel, stride, padding):
  """The convolution of features smaller than its kernel: a matrix product for each tap that counts.

  (XLA's CPU convolution is twenty times slower where the kernel is the larger one.)
  """
  sides = [max(0, (side + 2 * around - size) // stride + 1)
           for side, size, around in zip(x.shape[1:3], kernel.shape, padding, strict=False)]

  def within(axis, tap):
    """The outputs that see the features through a tap: first, end; and the positions they see."""
    behind = padding[axis] - tap
    first = max(0, -(-behind // stride))
    end = min(sides[axis], (x.shape[1 + axis] - 1 + behind) // stride + 1)
    return first, end, slice(first * stride - behind, (end - 1) * stride - behind + 1, stride)

  y = jnp.zeros((len(x), *sides, kernel.shape[-1]), x.dtype)
  for row, column in np.ndindex(kernel.shape[:2]):
    (top, bottom, rows), (left, right, columns) = within(0, row), within(1, column)
    if top < bottom and left < right:
      around = ((0, 0), (top, sides[0] - bottom), (left, sides[1] - right), (0, 0))
      y += jnp.pad(x[:, rows, columns] @ kernel[row, column], around)
  return y


def _convolve_plain(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), [(around, around) for around in padding],
    dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _convolve_picture(x, kernel, padding):
  """At stride 2, of few channels: a GPU's tensor cores work on eight at a time, and blocks of 2×2
  pixels have four times as many."""
  return blocks.convolve(blocks.split(x, 2), kernel, 2, padding).array


_FEW_TAPS = 9  # of a kernel, 3×3; more would be too many shifted sums


# In a loop (microbatches) XLA's CPU computes a convolution number by number, 45 times slower, where
# its axes lie otherwise than in a forward pass, as JAX's own gradients have them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_on_cpu(x, kernel, stride, padding):
  y = onednn.convolve(x[:, None], kernel, stride, [(around, around) for around in padding])
  return _convolve_plain(x, kernel, stride, padding) if y is None else y[:, 0]


def _convolve_on_cpu_forward(x, kernel, stride, padding):
  return _convolve_on_cpu(x, kernel, stride, padding), (x, kernel)


def _convolve_on_cpu_backward(stride, padding, saved, gradient):
  x, kernel = saved
  if not gradient.size:
    return jnp.zeros_like(x), jnp.zeros_like(kernel)
  rests = [side + 2 * around - taps - stride * (out - 1)  # rows, columns that no window reaches
           for side, around, taps, out in zip(
             x.shape[1:3], padding, kernel.shape, gradient.shape[1:3], strict=False)]
  around_x = [(taps - 1 - around, taps - 1 - around + rest)
              for taps, around, rest in zip(kernel.shape, padding, rests, strict=False)]
  around_kernel = [(around, around - rest) for around, rest in zip(padding, rests, strict=True)]
  convolve = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1, 1),
    dimension_numbers=("NHWC", "HWIO", "NHWC"))
  fast = onednn.takes(math.prod(gradient.shape[:3]) * kernel.size, x.dtype)
  same = gradient[:, None]  # the same for both: in two shapes XLA would compute it twice
  flipped = kernel[::-1, ::-1]
  of_x = onednn.convolve(same, flipped, 1, around_x, turned=True) if stride == 1 else None
  if of_x is not None:
    of_x = of_x[:, 0]
  elif fast and math.prod(kernel.shape[:2]) <= _FEW_TAPS:
    of_x = _tap_by_tap(kernel, gradient, stride, padding, x.shape)
  else:
    of_x = convolve(gradient, flipped.swapaxes(2, 3), lhs_dilation=(stride, stride),
                    padding=around_x)
  if fast:
    within = [slice(side + min(0, behind))
              for side, (_, behind) in zip(x.shape[1:3], around_kernel, strict=True)]
    return of_x, onednn.kernel_gradient(
      _turned(x[:, *within], (1, 2, 3, 0)), same, stride,
      [(before, max(0, behind)) for before, behind in around_kernel])
  of_kernel = convolve(
    _turned(x, (3, 1, 2, 0)), _turned(gradient, (1, 2, 0, 3)),
    rhs_dilation=(stride, stride), padding=around_kernel)
  return of_x, of_kernel.transpose(1, 2, 0, 3)


_convolve_on_cpu.defvjp(_convolve_on_cpu_forward, _convolve_on_cpu_backward)


def _tap_by_tap(kernel, gradient, stride, padding, shape):
  """The gradient of features of that shape: one product for all taps, each's shifted and added.

  As a convolution it would have a kernel turned first, of small maps longer than all else, and at a
  stride also zeros between.
  """
  rows = lambda array: array.reshape(-1, kernel.shape[-1])
  y = onednn.multiply(rows(gradient), rows(kernel), (False, True))
  y = y.reshape(*gradient.shape[:3], *kernel.shape[:3])

  def placed(axis, tap):
    before = tap - padding[axis]
    length = stride * (gradient.shape[1 + axis] - 1) + 1
    return before, shape[1 + axis] - before - length, stride - 1

  zero = jnp.zeros((), y.dtype)
  return sum(
    jax.lax.pad(y[..., row, column, :], zero,
                [(0, 0, 0), placed(0, row), placed(1, column), (0, 0, 0)])
    for row, column in np.ndindex(kernel.shape[:2]))


def _turned(x, axes):
  return apart.call(functools.partial(jnp.transpose, axes=axes), x)


def _multiply(x, kernel, product=jnp.matmul):
  """1×1 as a matrix: the kernel's gradient then contracts one axis, 20× faster on a CPU."""
  return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _gradient_apart(x):
  """x. What its gradient is added to is not part of the product that makes it: XLA copies it."""
  return x


_gradient_apart.defvjp(
  lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


def _multiply_on_cuda(x, kernel):
  return _multiply(_gradient_apart(x), kernel)


def _multiply_on_cpu(x, kernel):
  fast = onednn.takes(x.size * kernel.shape[1], x.dtype)
  return _multiply(x, kernel, _product if fast else jnp.matmul)


@jax.custom_vjp
def _product(x, kernel):
  return onednn.multiply(x, kernel)


def _product_forward(x, kernel):
  return onednn.multiply(x, kernel), (x, kernel)


def _product_backward(saved, gradient):
  x, kernel = saved
  return (onednn.multiply(gradient, kernel, (False, True)),
          onednn.multiply(x, gradient, (True, False)))


_product.defvjp(_product_forward, _product_backward)


_EIGHT = 8  # in a GPU's memory 16 bytes of bfloat16, of which its products read whole ones


def add_product(
  x: Float[jax.Array, "n d"], y: Float[jax.Array, "n c"], kernel: Float[jax.Array, "c d"],
  bias: Float[jax.Array, " d"],
) -> Float[jax.Array, "n d"]:
  """x + y·kernel + bias as one product, and as one its gradients of the float32 kernel and bias.

  The bias is a row of the kernel, for a column of ones in y: its gradient by itself would be one
  more pass over all that x has.
  """
  ones = jnp.pad(jnp.ones((len(y), 1), y.dtype), ((0, 0), (0, _EIGHT - 1)))
  row = jnp.pad(bias[None], ((0, _EIGHT - 1), (0, 0)))
  return _add_product(x, jnp.concatenate([y, ones], 1), jnp.concatenate([kernel, row]))


@jax.custom_vjp
def _add_product(x, y, kernel):
  return x + y @ kernel.astype(y.dtype)


def _add_product_backward(saved, gradient):
  y, kernel = saved
  of_y = gradient @ kernel[:-_EIGHT].astype(y.dtype).T  # what is of the ones is left out
  of_kernel = jnp.matmul(y.T, gradient, preferred_element_type=kernel.dtype)
  return gradient, jnp.pad(of_y, ((0, 0), (0, _EIGHT))), of_kernel


_add_product.defvjp(
  lambda x, y, kernel: (_add_product(x, y, kernel), (y, kernel)), _add_product_backward)


def _convolve_point(x, kernel):
  """1×1 as a convolution: its gradients keep a TPU's layout of their neighbours."""
  return jax.lax.conv_general_dilated(
    x, kernel[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
