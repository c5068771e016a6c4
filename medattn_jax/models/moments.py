"""The arithmetic of a batch normalisation over groups, and its gradient in closed form.

Arrays are [G, g, n, p·C]: groups, images of a group, pixels, channels. p pixels of a block (see
`blocks`) lie side by side, and p is 1 where nothing is in blocks; `inside`, bool [n, p·C] or None,
says which of them there are, and `count` how many numbers of a channel a group has.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from medattn_jax import platforms
from medattn_jax.models.remat import dear

Array = jax.Array
Inside = Bool[Array, "n pC"] | None
Moments = tuple[Float[Array, "G 1 1 C"], Float[Array, "G 1 1 C"]]  # mean and variance, float32


def tile(a: Float[Array, "*s c"], x: Float[Array, "*t pc"]) -> Float[Array, "*s pc"]:
  """[…, C] as often side by side as `x` has pixels to a block."""
  pixels = x.shape[-1] // a.shape[-1]
  return a if pixels == 1 else jnp.concatenate([a] * pixels, -1)


def _total(x, inside, channels):
  """x [G, g, n, p·C] → [G, 1, 1, C], the sum of what is inside."""
  return _of_channels(_sum(x, inside), channels)


def _sum(x, inside):
  return (x if inside is None else jnp.where(inside, x, 0)).sum((1, 2), keepdims=True)


def _of_channels(total, channels):
  if total.shape[-1] == channels:
    return total
  return total.reshape(*total.shape[:3], -1, channels).sum(3)


def _squared(x):
  wide = x.astype(jnp.float32)
  return wide, jnp.square(wide)


def _sums_at_once(parts, inside):
  """`_sum` of each, as one reduction: for two, a GPU reads a product's x twice."""
  parts = [one if inside is None else jnp.where(inside, one, 0) for one in parts]
  zeros = [jnp.zeros((), jnp.float32)] * len(parts)
  add = lambda a, b: tuple(one + other for one, other in zip(a, b, strict=True))
  shape = parts[0].shape
  pieces = _pieces(math.prod(shape[1:3]), shape[0] * -(-shape[3] // _WIDTH))
  if pieces > 1:
    first = jax.lax.reduce([one.reshape(shape[0], pieces, -1, shape[3]) for one in parts],
                           zeros, add, (2,))
    parts = [one[:, :, None] for one in jax.lax.optimization_barrier(first)]
  return tuple(one[:, None, None] for one in jax.lax.reduce(parts, zeros, add, (1, 2)))


_BUSY = 200  # blocks of threads: a GPU has up to 132 multiprocessors, each room for two
_WIDTH = 128  # columns of a block
_WHOLE = 4096  # rows; up to so many XLA sums in one piece
_FEW = 8  # rows; no piece has fewer


@functools.cache
def _pieces(rows, blocks):
  """In how many pieces the rows are summed first, for a GPU to be busy; 1 leaves it to XLA.

  `blocks` sum side by side as it is. (Where few do, XLA also writes what it sums, in float32.)
  """
  fitting = lambda numbers: (n for n in numbers if rows % n == 0)
  if rows > _WHOLE:
    root = math.isqrt(rows)  # XLA's pieces: a power of two below it, or else a divisor
    own = next(fitting([1 << root.bit_length() - 1, *range(root, 0, -1)]))
    if own * blocks >= _BUSY:
      return 1
  most = rows // _FEW
  enough = fitting(range(-(-_BUSY // blocks), most + 1))
  return next(enough, None) or next(fitting(range(most, 0, -1)), 1)


# The gradient in closed form: it keeps only `x` and [G, C] numbers for the backward pass, and
# its two column sums are one pass (XLA's CPU needs ten times as long for autodiff's).
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalised(
  x: Float[Array, "G g n pC"], scale: Float[Array, " C"], bias: Float[Array, " C"], inside: Inside,
  epsilon: float, count: int, relu: bool,
) -> tuple[Float[Array, "G g n pC"], Float[Array, "G 1 1 C"], Float[Array, "G 1 1 C"]]:
  """(y of x's dtype, and the groups' mean and variance, float32, without gradient)."""
  return _forward(x, scale, bias, inside, epsilon, count, relu)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def moments(
  x: Float[Array, "G g n pC"], inside: Inside, count: int, channels: int,
) -> Moments:
  """The mean and the variance of each channel, float32."""
  sums = platforms.dependent(
    x, cuda=lambda x: _sums_at_once(_squared(x), inside),
    default=lambda x: tuple(_sum(one, inside) for one in _squared(x)))
  mean, square = (_of_channels(one, channels) / count for one in sums)
  return mean, jnp.maximum(square - jnp.square(mean), 0)


def _moments_forward(x, inside, count, channels):
  mean, var = dear(moments(x, inside, count, channels))
  return (mean, var), (x, mean, inside)


def _moments_backward(count, channels, saved, cotangents):
  """By the centred numbers: of the squares alone, large and nearly equal ones would be left."""
  x, mean, inside = saved
  of_mean, of_var = (tile(one / count, x) for one in cotangents)
  dx = of_mean + 2 * of_var * (x.astype(jnp.float32) - tile(mean, x))
  if inside is not None:
    dx = jnp.where(inside, dx, 0)
  return dx.astype(x.dtype), None


moments.defvjp(_moments_forward, _moments_backward)


def _forward(x, scale, bias, inside, epsilon, count, relu):
  wide = x.astype(jnp.float32)
  mean, var = dear(moments(x, inside, count, len(scale)))
  inverse = jax.lax.rsqrt(var + epsilon)
  gain = scale * inverse
  offset = bias - mean * gain
  y = (wide * tile(gain, x) + tile(offset, x)).astype(x.dtype)
  return (nn.relu(y) if relu else y, mean, var), (x, scale, mean, inverse, offset, inside)


def _backward(epsilon, count, relu, saved, cotangents):
  x, scale, mean, inverse, shift, inside = saved

  def read(x, gradient):
    """What flows back into the normalisation, and the centred numbers, float32."""
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    if relu:
      gradient = _of_relu(gradient, wide * tile(scale * inverse, x) + tile(shift, x))
    return gradient, wide - tile(mean, x)

  gradient, centred = read(x, cotangents[0])
  along_one, along_unit = _both_sums(gradient, x, centred, mean, inside, len(scale))
  along_unit = inverse * along_unit
  if relu:
    gradient, centred = read(_held_apart(x), cotangents[0])
  # All that is of a channel first: of each pixel two products are left.
  gain = scale * inverse
  slope, offset = gain * inverse * along_unit / count, gain * along_one / count
  dx = tile(gain, x) * gradient - tile(slope, x) * centred - tile(offset, x)
  if inside is not None:
    dx = jnp.where(inside, dx, 0)
  return dx.astype(x.dtype), along_unit.sum((0, 1, 2)), along_one.sum((0, 1, 2)), None


def _both_sums(gradient, x, centred, mean, inside, channels):
  """([G, 1, 1, C] of the gradient, of its product with the centred x)."""
  def sums(gradient, x, centred):
    return (_total(gradient, inside, channels), _total(gradient * centred, inside, channels))

  def on_cpu(gradient, x, centred):  # whose compiler would write the centred numbers
    along_one = _total(gradient, inside, channels)
    return along_one, _total(gradient * x.astype(jnp.float32), inside, channels) - mean * along_one

  def on_cuda(gradient, x, centred):
    both = _sums_at_once((gradient, gradient * centred), inside)
    return tuple(_of_channels(one, channels) for one in both)

  return platforms.dependent(gradient, x, centred, cpu=on_cpu, cuda=on_cuda, default=sums)


def _of_relu(gradient, before):
  return platforms.dependent(
    gradient, before, cuda=_let_through, default=lambda g, x: jnp.where(x > 0, g, 0))


def _held_apart(x):
  """x, to be read anew: a GPU's compiler would write what ReLU lets through, to read it twice."""
  return platforms.dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)


# As of `normalised`: x alone is kept, and both sums are one pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def shifted(
  x: Float[Array, "G g n C"], gain: Float[Array, "G 1 1 C"], mean: Float[Array, "G 1 1 C"],
  bias: Float[Array, " C"], relu: bool,
) -> Float[Array, "G g n C"]:
  """gain · (x - mean) + bias, of x's dtype; with the gradients of all four."""
  return _shifted_forward(x, gain, mean, bias, relu)[0]


def _shifted_forward(x, gain, mean, bias, relu):
  offset = bias - mean * gain
  y = (x.astype(jnp.float32) * gain + offset).astype(x.dtype)
  return nn.relu(y) if relu else y, (x, gain, mean, offset)


def _shifted_backward(relu, saved, cotangent):
  x, gain, mean, offset = saved
  channels = x.shape[-1]

  def read(x, gradient):
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    return wide, _of_relu(gradient, wide * gain + offset) if relu else gradient

  wide, gradient = read(x, cotangent)
  along_one, along_centred = _both_sums(gradient, wide, wide - mean, mean, None, channels)
  _, gradient = read(_held_apart(x) if relu else x, cotangent)
  return ((gain * gradient).astype(x.dtype), along_centred, -gain * along_one,
          along_one.sum((0, 1, 2)))


shifted.defvjp(_shifted_forward, _shifted_backward)


def _let_through(gradient, before):
  """ReLU's gradient. (Comparisons a GPU's compiler writes by themselves, to read them twice.)"""
  return gradient * jnp.maximum(jnp.sign(before), 0)


normalised.defvjp(_forward, _backward)
