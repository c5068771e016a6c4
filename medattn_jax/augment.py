"""Augmentation inside the compiled step: chance is a function of (seed, step, example)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8


class Draw(NamedTuple):
  """What chance decides for each image: N images."""

  flips: Bool[Array, "n 3"]  # rows, columns, transpose: the eight of the dihedral group
  gain: Float[Array, "n 3"]  # photometric: value = image / 255 * gain + bias, per channel
  bias: Float[Array, "n 3"]


def draw(
    key: Key[Array, ""],
    examples: Int[Array, " n"],
    *,
    dihedral: bool,
    brightness: float,
    contrast: float,
    colour: float,
) -> Draw:
  """Draws for each image from (key, its number in the global batch): any device count agrees.

  Rotations by 0/90/180/270 and flips [papers.md §1, data path]; brightness, contrast and colour
  are uniform within ± their value [choice].
  """

  def one(example):
    bits, shade, spread, tint = jax.random.split(jax.random.fold_in(key, example), 4)
    flips = jax.random.bernoulli(bits, 0.5, (3,)) & dihedral
    gain = 1 + contrast * jax.random.uniform(spread, (1,), minval=-1.0)
    gain = gain * (1 + colour * jax.random.uniform(tint, (3,), minval=-1.0))
    shift = brightness * jax.random.uniform(shade, (1,), minval=-1.0)
    # Contrast turns about the middle of the range; brightness shifts it.
    return Draw(flips, gain, 0.5 * (1 - gain.mean()) + shift + jnp.zeros(3))

  return jax.vmap(one)(examples)


def dihedral(images: UInt8[Array, "n s s c"], flips: Bool[Array, "n 3"]) -> UInt8[Array, "n s s c"]:
  """Flips rows, then columns, then transposes, each where its bit is set. Squares only."""
  rows, columns, transpose = (flips[:, i, None, None, None] for i in range(3))
  images = jnp.where(rows, images[:, ::-1], images)
  images = jnp.where(columns, images[:, :, ::-1], images)
  return jnp.where(transpose, images.swapaxes(1, 2), images)
