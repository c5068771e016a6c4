"""Augmentation inside the compiled step: chance is a function of (seed, step, example).

A model says where in its data flow an image is turned and shaded: Zoom-in-Net turns the full
image before all else, an attention map lives in image coordinates and is applied before it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from medattn_jax import apart, platforms

# Whether rows are flipped, columns are, and then both are exchanged. The first changes nothing.
VIEWS = np.array([(rows, columns, transpose) for transpose in (False, True)
                  for rows in (False, True) for columns in (False, True)])

class Draw(NamedTuple):
  """What chance decides for each image: N images. None: nothing of this kind is asked for."""

  flips: Bool[Array, "n 3"] | None  # rows, columns, transpose: the eight of the dihedral group
  offset: Int[Array, "n 2"] | None  # rows and columns by which it is moved
  gain: Float[Array, "n 3"]  # photometric: value = image / 255 * gain + bias, per channel
  bias: Float[Array, "n 3"]
  chance: Key[Array, " n"] | None  # of what else a model draws for the image (dropout)


def draw(
    key: Key[Array, ""],
    examples: Int[Array, " n"],
    size: int,
    *,
    dihedral: bool,
    mirror: bool,
    shift: float,
    brightness: float,
    contrast: float,
    colour: float,
) -> Draw:
  """Draws for each image from (key, its number in the global batch): any device count agrees.

  Rotations by 0/90/180/270 and flips [papers.md §1, data path]; brightness, contrast and colour
  are uniform within ± their value, and so is the shift, whole pixels of a share of the side
  [choice]. `mirror` alone flips left and right.

  Args:
    size: pixels a side.
  """
  flipped = jnp.array([dihedral, dihedral or mirror, dihedral])
  most = int(shift * size)

  def one(example):
    own = jax.random.fold_in(key, example)
    bits, shade, spread, tint = jax.random.split(own, 4)
    flips = jax.random.bernoulli(bits, 0.5, (3,)) & flipped if dihedral or mirror else None
    gain = 1 + contrast * jax.random.uniform(spread, (1,), minval=-1.0)
    gain = gain * (1 + colour * jax.random.uniform(tint, (3,), minval=-1.0))
    level = brightness * jax.random.uniform(shade, (1,), minval=-1.0)
    place, chance = jax.random.fold_in(own, 1), jax.random.fold_in(own, 2)
    offset = jax.random.randint(place, (2,), -most, most + 1) if most else None
    # Contrast turns about the middle of the range; brightness moves it.
    return Draw(flips, offset, gain, 0.5 * (1 - gain.mean()) + level + jnp.zeros(3), chance)

  return jax.vmap(one)(examples)


def turned(flips: Bool[Array, "n 3"]) -> Draw:
  """What turns N images as said (see VIEWS) and shades none."""
  return Draw(flips, None, jnp.ones((len(flips), 3)), jnp.zeros((len(flips), 3)), None)


def move(images: Num[Array, "n s s c"], drawn: Draw | None) -> Num[Array, "n s s c"]:
  """Turns and shifts images as drawn; what comes in at an edge is zero. Squares only."""
  if drawn is None:
    return images
  if drawn.flips is not None:
    images = dihedral(images, drawn.flips)
  if drawn.offset is not None:
    images = shifted(images, drawn.offset)
  return images


def dihedral(images: Num[Array, "n s s c"], flips: Bool[Array, "n 3"]) -> Num[Array, "n s s c"]:
  """Flips rows, then columns, then transposes, each where its bit is set. Squares only."""
  # XLA's CPU would else make the choice anew for each use of a pixel.
  return platforms.dependent(
    images, flips, cpu=functools.partial(apart.call, _at_once), default=_at_once)


def _at_once(images, flips):
  rows, columns, transpose = (flips[:, i, None, None, None] for i in range(3))
  images = jnp.where(rows, images[:, ::-1], images)
  images = jnp.where(columns, images[:, :, ::-1], images)
  return jnp.where(transpose, images.swapaxes(1, 2), images)


@jax.custom_vjp
def shifted(
    images: Num[Array, "n s s c"], offset: Int[Array, "n 2"]
) -> Num[Array, "n s s c"]:
  """Each image with its pixel (0, 0) at its offset, zero where no pixel comes to lie."""
  whole = not jnp.issubdtype(images.dtype, jnp.floating)
  return platforms.dependent(
    images, offset, tpu=_rolled if whole else _multiplied, default=_rolled)


# JAX's own gradient would be scattered, pixel by pixel.
shifted.defvjp(lambda images, offset: (shifted(images, offset), offset),
               lambda offset, gradient: (shifted(gradient, -offset), None))


def _rolled(images, offset):
  def one(image, offset):
    for axis, by in enumerate(offset):
      place = jnp.arange(image.shape[axis])
      there = (place >= by) & (place < image.shape[axis] + by)
      there = there.reshape([-1 if a == axis else 1 for a in range(image.ndim)])
      image = jnp.where(there, jnp.roll(image, by, axis), 0)
    return image

  return jax.vmap(one)(images, offset)


def _multiplied(images, offset):
  """The same numbers by products with ones and zeros: a TPU would roll image by image, in loops."""
  place = jnp.arange(images.shape[1])
  down, across = (
    (place[:, None] - by[:, None, None] == place).astype(images.dtype) for by in offset.T)
  images = jnp.einsum("nir,nrsc->nisc", down, images, precision="highest")
  return jnp.einsum("njs,nisc->nijc", across, images, precision="highest")


def normalise(
    x: Num[Array, "*images_and_space c"],
    drawn: Draw | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: jnp.dtype,
) -> Float[Array, "*images_and_space d"]:
  """((x · gain + bias) - mean) / std as one multiply-add, shaded as drawn.

  Gray images come out with three channels where the mean or std of three are not the same.

  Args:
    x: uint8 counts as 255ths; its leading axes together hold the N images.
    mean, std: a number for each of at least c channels.
  """
  channels = x.shape[-1]
  unit = 1 / 255 if x.dtype == jnp.uint8 else 1.0
  width = channels if len(set(mean)) == len(set(std)) == 1 else len(mean)
  mean, std = (jnp.asarray(values[:width], jnp.float32) for values in (mean, std))
  gain, offset = unit / std, -mean / std
  if drawn is not None:
    leading = _leading(x.shape, len(drawn.gain))
    spread = lambda a: a[:, :channels].reshape(*leading, *(1,) * (x.ndim - len(leading) - 1), -1)
    gain, offset = spread(drawn.gain) * gain, (spread(drawn.bias) - mean) / std
  return (x.astype(jnp.float32) * gain + offset).astype(dtype)


def _leading(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
  """The axes from the first on that hold `count` images."""
  for axes in range(1, len(shape)):
    if math.prod(shape[:axes]) == count:
      return shape[:axes]
  raise ValueError(f"{count} images were drawn for, none of the leading axes of {shape} hold them")
