"""Convolution and batch normalisation: the units every network here is made of.

Normalisation is over *groups* of the batch, never over all devices: a net of hundreds of
layers then needs no collective of its own, and its result does not depend on the number
of devices as long as each holds whole groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medattn_jax import platforms
from medattn_jax.models import blocks, convolution, moments
from medattn_jax.models.blocks import Blocks
from medattn_jax.models.remat import dear

Array = jax.Array | np.ndarray

WIDE = 128  # features that a TPU works on at a time

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
  def values(self, channels: int) -> Values:
    """Gamma, beta and the running statistics, of so many channels each."""
    return Values(
      self.param("scale", self.scale_init, (channels,), jnp.float32),
      self.param("bias", nn.initializers.zeros, (channels,), jnp.float32),
      self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32),
      self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32))

  def __call__(
    self, x: Float[Array, "b *space c"] | Blocks, train: bool, relu: bool = False,
    known: moments.Moments | None = None,
  ):
    """Normalises `x`.

    Args:
      x: any float dtype; the batch first, channels last; or in blocks, and so is the result.
      train: by the groups' own statistics, which update the running ones; else by those.
      relu: of the result, ReLU.
      known: the groups' statistics, if they are (see `statistics`), of x that is not in blocks.

    Raises:
      ValueError: in training, when the batch is not a whole number of groups.
    """
    channels = x.channels if isinstance(x, Blocks) else x.shape[-1]
    return normalise(self, [self.values(channels)], x, train, relu, known)


class Values(NamedTuple):
  """What a normalisation holds: float32 [C] each."""

  scale: Array
  bias: Array
  mean: nn.Variable
  var: nn.Variable


def normalise(
  norm: GroupBatchNorm, held: Sequence[Values], x: Any, train: bool, relu: bool,
  known: moments.Moments | None = None,
) -> Any:
  """`x` normalised as `norm` does, by what several hold whose channels lie side by side."""
  given, layout = x, x if isinstance(x, Blocks) else None
  x = layout.array if layout else x
  join = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts)
  scale, bias = join([one.scale for one in held]), join([one.bias for one in held])
  if not train:
    gain = scale * jax.lax.rsqrt(join([one.var.value for one in held]) + norm.epsilon)
    offset = bias - join([one.mean.value for one in held]) * gain
    y = (x.astype(jnp.float32) * moments.tile(gain, x) + moments.tile(offset, x)).astype(x.dtype)
    y = nn.relu(y) if relu else y
    return layout.replace(array=y) if layout else y

  groups, inside, count = _grouped(norm.group_size, given)
  if known is None:
    y, mean, var = moments.normalised(groups, scale, bias, inside, norm.epsilon, count, relu)
  else:
    mean, var = known
    y = moments.shifted(groups, scale * jax.lax.rsqrt(var + norm.epsilon), mean, bias, relu)
  _keep(norm, held, mean, var)
  y = y.reshape(x.shape)
  return layout.replace(array=y) if layout else y


def statistics(x: Float[Array, "b *space c"], group_size: int | None) -> moments.Moments:
  """What a GroupBatchNorm of such groups would find of x, for whoever normalises it more than once.

  Raises:
    ValueError: when the batch is not a whole number of groups.
  """
  groups, _, count = _grouped(group_size, x)
  return moments.moments(groups, None, count, x.shape[-1])


def _grouped(group_size, x):
  """x as [G, g, n, p·C], what of it is inside (or None), and how many numbers a group has.

  (Of a channel, p pixels of a block lie side by side; p is 1 where nothing is in blocks.)
  """
  layout = x if isinstance(x, Blocks) else None
  x = layout.array if layout else x
  size = x.shape[0] if group_size is None else group_size
  if x.shape[0] % size or not x.shape[0]:
    raise ValueError(
      f"norm.group_size={size}: a batch of {x.shape[0]} on one device is not a whole number "
      "of groups")
  groups = x.reshape(x.shape[0] // size, size, -1, x.shape[-1])
  if not layout:
    return groups, None, size * math.prod(x.shape[1:-1])
  inside = layout.inside
  if inside is not None:
    inside = blocks.spread(inside, layout.channels).reshape(groups.shape[2:])
  return groups, inside, size * layout.rows * layout.columns


def _keep(norm, held, mean, var):
  """Moves the running statistics of all that are held towards [G, 1, 1, C]."""
  if norm.is_initializing():
    return
  keep, ends = norm.momentum, np.cumsum([len(one.scale) for one in held])[:-1]
  mean, var = (jnp.split(value.mean((0, 1, 2)), ends) for value in (mean, var))
  for one, new_mean, new_var in zip(held, mean, var, strict=True):
    one.mean.value = keep * one.mean.value + (1 - keep) * new_mean
    one.var.value = keep * one.var.value + (1 - keep) * new_var


class Conv(nn.Module):
  """A 2-d convolution with PyTorch's symmetric padding; 1×1 is a matrix product.

  Of pictures in blocks (see `blocks`) the kernel is a square without bias.

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
  def weights(self, channels: int) -> tuple[Array, Array | None]:
    """The kernel for so many channels, and the bias or None; float32."""
    shape = (*self.kernel_size, channels, self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    if not self.use_bias:
      return kernel, None
    return kernel, self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)

  def __call__(self, x: Float[Array, "b h w c"] | Blocks) -> Float[Array, "b h2 w2 d"] | Blocks:
    kernel, bias = self.weights(x.channels if isinstance(x, Blocks) else x.shape[-1])
    y = self.convolve(x, kernel)
    return y if bias is None else add_bias(y, bias)

  def onto(
    self, x: Float[Array, "b h w d"], y: Float[Array, "b h w c"], scale: float,
  ) -> Float[Array, "b h w d"]:
    """x + scale · (the 1×1 convolution of y, with its bias).

    What is scaled is the kernel and the bias, which are small. On a GPU all is one product: pixels
    are rows there, as XLA adds nothing to one that lies otherwise without a copy.
    """
    kernel, bias = self.weights(y.shape[-1])
    kernel, bias = kernel * scale, bias * scale

    def plain(x, y, kernel, bias):
      return add_bias(x + _convolve(self, y, kernel), bias)

    def on_cuda(x, y, kernel, bias):
      rows = lambda array: array.reshape(-1, array.shape[-1])
      return convolution.add_product(
        rows(x), rows(y.astype(self.dtype)), kernel[0, 0], bias).reshape(x.shape)

    return platforms.dependent(x, y, kernel, bias, cuda=on_cuda, default=plain)

  def convolve(self, x: Any, kernel: Float[Array, "k l c d"]) -> Any:
    """The convolution with any kernel of this one's size."""
    return dear(_convolve(self, x, kernel))


@jax.custom_vjp
def add_bias(y: Float[Array, "*b c"], bias: Float[Array, " c"]) -> Float[Array, "*b c"]:
  """y + bias in y's dtype; the bias's gradient is summed in float32 (JAX's own in y's dtype)."""
  return y + bias.astype(y.dtype)


def _add_bias_backward(_, gradient):
  return gradient, gradient.astype(jnp.float32).sum(range(gradient.ndim - 1))


add_bias.defvjp(lambda y, bias: (add_bias(y, bias), None), _add_bias_backward)


def _convolve(conv, x, kernel):
  x = jax.tree.map(lambda array: array.astype(conv.dtype), x)
  rows, columns = conv.padding or tuple((size - 1) // 2 for size in conv.kernel_size)
  if isinstance(x, Blocks):
    return blocks.convolve(x, kernel, conv.stride, rows)
  kernel = kernel.astype(conv.dtype)
  return convolution.convolve(x, kernel, conv.stride, (rows, columns))


def conv_bn(
  conv: Conv, norm: GroupBatchNorm, x: Float[Array, "b h w c"] | Blocks, train: bool,
  pool: Callable | None = None, relu: bool = False,
) -> Float[Array, "b h2 w2 d"] | Blocks:
  """pool(norm(conv(x), train, relu)), the maxima taken before the normalisation: they are fewer.

  A maximum commutes with a normalisation that does not turn its channel over, and so with any once
  the kernels of those with a negative gamma have changed their sign.

  Args:
    pool: a maximum of windows, that gives no blocks; or None.
  """
  if pool is None:
    return norm(conv(x), train, relu)
  kernel, bias = conv.weights(x.channels if isinstance(x, Blocks) else x.shape[-1])
  held = norm.values(conv.features)
  sign = jnp.where(held.scale < 0, -1.0, 1.0)
  scale = held.scale * sign  # and not abs: at zero that has no slope
  x = conv.convolve(x, kernel * sign)
  x = x if bias is None else add_bias(x, bias * sign)
  y = pool(x)
  if not train:
    gain = scale * jax.lax.rsqrt(held.var.value + norm.epsilon)
    offset = held.bias - sign * held.mean.value * gain
    y = (y.astype(jnp.float32) * gain + offset).astype(y.dtype)
    return nn.relu(y) if relu else y
  groups, inside, count = _grouped(norm.group_size, x)
  mean, var = moments.moments(groups, inside, count, conv.features)
  _keep(norm, [held], sign * mean, var)
  gain = scale * jax.lax.rsqrt(var + norm.epsilon)
  maxima = y.reshape(*groups.shape[:2], -1, conv.features)
  return moments.shifted(maxima, gain, mean, held.bias, relu).reshape(y.shape)


class ConvBN(nn.Module):
  """Convolution (`conv`), GroupBatchNorm (`bn`), ReLU: the unit of the networks here.

  Attributes as in `Conv` and `GroupBatchNorm`; `relu=False` leaves the activation out.
  `mean`: weighted means of neighbours, of the input: taken of what a 1×1 convolution makes of it,
  as they commute and its features are fewer.
  `apart`: `together` joins neither units of WIDE features nor those with `mean`. (A TPU would only
  cut them apart again: compiled for a v5e, 5 and 3 % more cycles.)
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
  mean: Callable | None = None
  apart: bool = False

  def setup(self):
    self.conv = Conv(
      self.features, self.kernel_size, self.stride, self.padding, dtype=self.dtype)
    self.bn = GroupBatchNorm(self.group_size, self.momentum, self.epsilon, self.scale_init)

  def __call__(
    self, x: Float[Array, "b h w c"] | Blocks, train: bool, pool: Callable | None = None,
  ) -> Float[Array, "b h2 w2 d"] | Blocks:
    """The unit's answer; `pool` as in `conv_bn`, of a unit without `mean`."""
    if self.mean is None:
      return conv_bn(self.conv, self.bn, x, train, pool, self.relu)
    return self.averaged(self.conv(x), train)

  def averaged(self, y: Float[Array, "b h w d"], train: bool) -> Float[Array, "b h w d"]:
    """The answer of a unit with `mean`, from what its convolution made."""
    return self.bn(self.mean(y).astype(y.dtype), train, self.relu)


def together(
  units: Sequence[ConvBN], x: Float[Array, "b h w c"], train: bool,
) -> list[Float[Array, "b h2 w2 d"]]:
  """[unit(x, train) for each], of units that differ in their features and their means alone.

  They are computed as one: a TPU works on 128 channels at a time, be they there or not, and a
  GPU's product of all writes its input's gradient once. Those with means come last.
  """
  plain = sum(unit.mean is None for unit in units)
  if units[0].apart:
    if max(unit.features for unit in units[:plain]) >= WIDE:
      return [unit(x, train) for unit in units]
    if plain < len(units):
      return together(units[:plain], x, train) + [unit(x, train) for unit in units[plain:]]
  y = _convolved(units, x, [slice(0, x.shape[-1])] * len(units))
  ends = np.cumsum([unit.features for unit in units])
  parts = _normalised(units[:plain], y[..., :ends[plain - 1]], train)
  averaged = zip(units[plain:], jnp.split(y, ends[:-1], axis=-1)[plain:], strict=True)
  return [*jnp.split(parts, ends[:plain - 1], axis=-1),
          *(unit.averaged(of, train) for unit, of in averaged)]


def joined(
  units: Sequence[ConvBN], x: Float[Array, "b h w c"], train: bool, reads: Sequence[slice],
) -> Float[Array, "b h2 w2 d"]:
  """Side by side what each unit makes of its channels of `x`, all computed as one.

  Args:
    units: differ in their features alone.
    reads: which channels are whose. The others meet zeros in its kernel.
  """
  return _normalised(units, _convolved(units, x, reads), train)


def _convolved(units, x, reads):
  kernels = []
  for unit, read in zip(units, reads, strict=True):
    kernel, _ = unit.conv.weights(read.stop - read.start)
    around = (read.start, x.shape[-1] - read.stop)
    kernels.append(jnp.pad(kernel, ((0, 0), (0, 0), around, (0, 0))) if any(around) else kernel)
  return units[0].conv.convolve(x, jnp.concatenate(kernels, -1))


def _normalised(units, y, train):
  held = [unit.bn.values(unit.features) for unit in units]
  return normalise(units[0].bn, held, y, train, units[0].relu)
