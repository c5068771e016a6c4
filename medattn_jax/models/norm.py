"""Convolution and batch normalisation: the units every network here is made of.

Normalisation is over *groups* of the batch, never over all devices: a net of hundreds of
layers then needs no collective of its own, and its result does not depend on the number
of devices as long as each holds whole groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

Array = jax.Array | np.ndarray

# The standard deviation of a standard normal distribution cut off at ±2.
_TRUNCATED = 0.87962566103423978


def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
  """He's initialisation, bit-equal to linen's variance_scaling(2, "fan_in", "truncated_normal").

  Drawn flat, in a length of a power of four of which the kernel is the beginning: kernels of many
  shapes need few programs (see `initial`). jax_threefry_partitionable, JAX's default, makes a
  draw's numbers independent of its length.
  """
  count, fan_in = math.prod(shape), math.prod(shape[:-1])
  bits = (count - 1).bit_length()
  drawn = jax.random.truncated_normal(key, -2, 2, (1 << bits + bits % 2,), dtype)
  deviation = jnp.sqrt(jnp.array(2 / fan_in, dtype)) / jnp.array(_TRUNCATED, dtype)
  return jax.lax.slice(drawn, (0,), (count,)).reshape(shape) * deviation


class GroupBatchNorm(nn.Module):
  """Batch normalisation over contiguous groups of `group_size` elements of the batch axis.

  [B, …, C] is seen as [B/g, g, …, C]; each group is normalised by its own mean and variance.
  Statistics are float32 whatever the input; the result has the input's dtype.

  The running statistics (`batch_stats`: mean, var) move towards the average over the groups
  of what the normalisation itself used: the mean, and the *biased* variance within a group
  (PyTorch keeps the unbiased one: 1/(n-1) relative apart, n = elements of a group). A batch
  split over devices therefore has to average `batch_stats` over them, and nothing else.

  Attributes:
    group_size: elements of the batch to a group; None makes the whole batch one group.
    momentum: share of the running statistics kept by an update.
    epsilon: added to the variance.
    scale_init: of gamma; zeros make a residual branch start as nothing.
  """

  group_size: int | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  scale_init: Callable = nn.initializers.ones

  @nn.compact
  def __call__(self, x: Float[Array, "b *space c"], train: bool) -> Float[Array, "b *space c"]:
    """Normalises `x`.

    Args:
      x: any float dtype; the batch first, channels last.
      train: by the groups' own statistics, which update the running ones; else by those.

    Raises:
      ValueError: in training, when the batch is not a whole number of groups.
    """
    channels = x.shape[-1]
    scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    if not train:
      gain = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
      offset = bias - running_mean.value * gain
      return (x.astype(jnp.float32) * gain + offset).astype(x.dtype)

    size = x.shape[0] if self.group_size is None else self.group_size
    if x.shape[0] % size or not x.shape[0]:
      raise ValueError(
        f"norm.group_size={size}: a batch of {x.shape[0]} on one device is not a whole number "
        "of groups")
    groups = x.reshape(x.shape[0] // size, size, -1, channels)
    y, mean, var = _normalise(groups, scale, bias, self.epsilon)
    if not self.is_initializing():
      keep = self.momentum
      running_mean.value = keep * running_mean.value + (1 - keep) * mean.mean((0, 1, 2))
      running_var.value = keep * running_var.value + (1 - keep) * var.mean((0, 1, 2))
    return y.reshape(x.shape)


# The gradient in closed form: it keeps only `x` and [G, C] numbers for the backward pass, and
# its two column sums are one pass (XLA's CPU needs ten times as long for autodiff's).
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x, scale, bias, epsilon):
  """x [G, g, n, C] → (y of its dtype, mean, var [G, 1, 1, C] float32, without gradient)."""
  return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
  wide = x.astype(jnp.float32)
  mean = wide.mean((1, 2), keepdims=True)
  var = jnp.maximum(jnp.square(wide).mean((1, 2), keepdims=True) - jnp.square(mean), 0)
  inverse = jax.lax.rsqrt(var + epsilon)
  gain = scale * inverse
  y = (wide * gain + (bias - mean * gain)).astype(x.dtype)
  return (y, mean, var), (x, scale, mean, inverse)


def _backward(epsilon, saved, cotangents):
  x, scale, mean, inverse = saved
  gradient = cotangents[0].astype(jnp.float32)
  unit = (x.astype(jnp.float32) - mean) * inverse
  along_one = gradient.sum((1, 2), keepdims=True)
  along_unit = (gradient * unit).sum((1, 2), keepdims=True)
  size = x.shape[1] * x.shape[2]
  dx = scale * inverse * (gradient - along_one / size - unit * (along_unit / size))
  return dx.astype(x.dtype), along_unit.sum((0, 1, 2)), along_one.sum((0, 1, 2))


_normalise.defvjp(_forward, _backward)


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


class Conv(nn.Module):
  """A 2-d convolution with PyTorch's symmetric padding; 1×1 is a matrix product.

  (XLA's CPU convolution is three times slower than the dot at 1×1; elsewhere both are one.)
  The kernel is float32 [height, width, in, out]; the arithmetic is in `dtype`.

  Attributes:
    padding: rows and columns added on each side; None keeps the size at stride 1.
  """

  features: int
  kernel_size: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: tuple[int, int] | None = None
  use_bias: bool = False
  dtype: Any = jnp.float32
  kernel_init: Callable = kernel_init

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
    x = x.astype(self.dtype)
    rows, columns = self.padding or tuple((size - 1) // 2 for size in self.kernel_size)
    if self.kernel_size == (1, 1) and not rows and not columns:
      x = x[:, ::self.stride, ::self.stride]
      # As a matrix: the kernel's gradient then contracts one axis, 20× faster on a CPU than three.
      y = (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], self.features)
    elif math.prod(x.shape[1:3]) <= 4 and max(x.shape[1:3]) < max(self.kernel_size):
      y = _convolve_tiny(x, kernel, self.stride, (rows, columns))
    else:
      y = jax.lax.conv_general_dilated(
        x, kernel, (self.stride, self.stride), ((rows, rows), (columns, columns)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
      y = y + bias.astype(self.dtype)
    return y


class ConvBN(nn.Module):
  """Convolution (`conv`), GroupBatchNorm (`bn`), ReLU: the unit of the networks here.

  Attributes as in `Conv` and `GroupBatchNorm`; `relu=False` leaves the activation out.
  """

  features: int
  kernel_size: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: tuple[int, int] | None = None
  relu: bool = True
  group_size: int | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  scale_init: Callable = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
    x = Conv(
      self.features, self.kernel_size, self.stride, self.padding, dtype=self.dtype,
      name="conv")(x)
    x = GroupBatchNorm(
      self.group_size, self.momentum, self.epsilon, self.scale_init, name="bn")(x, train)
    return nn.relu(x) if self.relu else x
