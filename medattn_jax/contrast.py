"""Local contrast: what a photograph shows beyond its own light and tint.

Subtracting the local average colour is the field's usual preparation of retinal photographs
(Graham's, of the winning entry on EyePACS). Here it is part of the compiled step, and small view
and crops share one field of local means: both show a lesion with the same contrast. [choice]
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from medattn_jax import onednn

_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def cells(width: float) -> int:
  """Side of the grid that carries local means of standard deviation `width` (share of a side)."""
  return max(2, round(1 / width))


def local_means(view: Float[Array, "n s s c"], width: float) -> Float[Array, "n g g c"]:
  """Gaussian means of `view` on a grid of `cells(width)`² places; beyond the edge counts nothing.

  Args:
    view: the whole photograph, any size.
    width: standard deviation of the Gaussian, a share of the side: 0.03 is 37 of 1230 pixels.
  """
  weights = _gaussian(view.shape[1], width)
  return _both_sides(weights, view, weights)


def subtract(
    image: Float[Array, "n s s c"], means: Float[Array, "n g g c"], gain: float
) -> Float[Array, "n s s c"]:
  """0.5 + gain · (image - local mean), within 0 … 1, for an image of the whole photograph."""
  rows = _bilinear(means.shape[1], image.shape[1])
  return _stretch(image, _both_sides(rows, means, rows), gain)


def subtract_crops(
    crops: Float[Array, "n k s s c"],
    means: Float[Array, "n g g c"],
    corners: Int[Array, "n k 2"],
    full_size: int,
    gain: float,
) -> Float[Array, "n k s s c"]:
  """The same for k crops of each photograph, whose (row, column) corners are in `full_size`."""
  weights = jnp.asarray(_bilinear(means.shape[1], full_size))
  side = crops.shape[2]
  cut = jax.vmap(jax.vmap(lambda first: jax.lax.dynamic_slice_in_dim(weights, first, side)))
  rows, columns = cut(corners[..., 0]), cut(corners[..., 1])
  half = _exact("nkgs,nstc->nkgtc", rows, means)
  *_, places, channels = half.shape
  if onednn.takes(half.size * side, half.dtype):
    count = half.shape[:2]
    wide = half.swapaxes(3, 4).reshape(*count, side * channels, places)
    own = onednn.multiply(wide, columns, (False, True))
    own = own.reshape(*count, side, channels, side).swapaxes(3, 4)
  else:
    own = _exact("nkht,nkgtc->nkghc", columns, half)
  return _stretch(crops, own, gain)


def _stretch(image, means, gain):
  return jnp.clip(0.5 + gain * (image.astype(jnp.float32) - means), 0, 1)


def _both_sides(rows, image, columns):
  """rows · image · columnsᵀ for each image and channel, float32."""
  half = _exact("gs,nstc->ngtc", jnp.asarray(rows), image.astype(jnp.float32))
  return _exact("ht,ngtc->nghc", jnp.asarray(columns), half)


@functools.cache
def _gaussian(size: int, width: float) -> np.ndarray:
  """float32 [cells, size]: each row the normalised Gaussian weights about a cell's centre."""
  number = cells(width)
  centres = (np.arange(number) + 0.5) / number
  places = (np.arange(size) + 0.5) / size
  weights = np.exp(-0.5 * ((places - centres[:, None]) / width) ** 2)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def _bilinear(cells: int, size: int) -> np.ndarray:
  """float32 [size, cells]: linear interpolation between the cells' centres, level beyond them."""
  places = np.clip((np.arange(size) + 0.5) / size * cells - 0.5, 0, cells - 1)
  low = np.minimum(places.astype(int), cells - 2)
  weights = np.zeros((size, cells), np.float32)
  weights[np.arange(size), low] = 1 - (places - low)
  weights[np.arange(size), low + 1] = places - low
  return weights
