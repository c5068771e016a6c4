"""From one full uint8 image on the device: the small view, the suspicious regions, their crops.

Everything here is traced into the compiled step, so that a region is found and cut without a
round trip to the host (papers.md §1, "Selecting suspicious regions").
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32, UInt8

from medattn_jax import apart, platforms
from medattn_jax.errors import UserError

Array = jax.Array | np.ndarray

MASK_SCOPES = ("level", "all")
COORDS = ("resize", "receptive_field")
# Cell i of Inception-ResNet-v2's last grid looks at pixel 37 + 32 i: its receptive field's centre.
_FIELD_START, _FIELD_STRIDE = 37, 32
# Outputs to a block of the banded product: a matrix unit's width, and most zeros left out.
_BLOCK = 128


class Responses(NamedTuple):
  """The strongest responses of gated attention maps: of B images `num` each, strongest first."""

  centres: Int32[Array, "b num 2"]  # row, column in the image_size frame
  levels: Int32[Array, "b num"]  # whose map responded
  strengths: Float[Array, "b num"]  # float32; -inf where the masks of the stronger left nothing


@functools.lru_cache(maxsize=32)
def _resize_weights(size: int, out: int) -> np.ndarray:
  """Antialiased linear resize as a matrix [out, size], rows summing to one (half-pixel centres)."""
  step = size / out
  reach = max(step, 1.0)  # a downscale widens the triangle to the pixels it covers
  centres = (np.arange(out) + 0.5) * step - 0.5
  weights = np.maximum(0, 1 - np.abs(np.arange(size)[None] - centres[:, None]) / reach)
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _resize_by_taps(weights: np.ndarray, x: Array) -> Array:
  """weights [out, size] @ x [n, size, m] → [n, out, m] float32, as a sum of the few taps of a row.

  One fused pass over the input where a matrix product would first need it as floats.
  """
  count = int((weights > 0).sum(1).max())
  first = np.minimum((weights > 0).argmax(1), weights.shape[1] - count)
  values = np.take_along_axis(weights, first[:, None] + np.arange(count), 1)[..., None]
  return sum(
    jnp.take(x, first + k, axis=1).astype(jnp.float32) * values[:, k] for k in range(count))


def _resize_by_matrix(weights: np.ndarray, x: Array, dtype: Any) -> Array:
  """The same as products of `dtype` operands, block by block along the band of non-zeros."""
  blocks = []
  for start in range(0, len(weights), _BLOCK):
    rows = weights[start:start + _BLOCK]
    used = np.flatnonzero(rows.any(0))
    low, high = used[0], used[-1] + 1
    blocks.append(jnp.einsum(
      "oh,nhm->nom", jnp.asarray(rows[:, low:high], dtype), x[:, low:high].astype(dtype),
      precision="highest" if dtype == jnp.float32 else "default",
      preferred_element_type=jnp.float32))
  return jnp.concatenate(blocks, 1)


def small_view(
  images: UInt8[Array, "n full full 3"], size: int, dtype: Any = jnp.float32,
) -> Float[Array, "n s s 3"]:
  """Resizes with antialiasing to size², values in 0 to 1: rows first, then columns.

  Equal to a triangle-filtered resize (Pillow's BILINEAR). Two matrix products on a TPU (operands
  of `dtype`; a uint8 is exact in bfloat16), two sums of a few taps elsewhere; no float copy of the
  full image.
  """
  def by_matrix(images):
    # Columns as rows of (column, channel): a plain product, no transposes.
    rows = _resize_by_matrix(down, images.reshape(count, height, -1), dtype)
    wide = np.kron(across, np.eye(channels, dtype=np.float32))
    return _resize_by_matrix(wide, rows.reshape(count * size, -1, 1), dtype).reshape(shape)

  def rows_by_taps(images):
    return _resize_by_taps(down, images.reshape(-1, height, width * channels)).astype(dtype)

  def columns_by_taps(rows):
    return _resize_by_taps(across, rows.reshape(-1, width, channels)).reshape(-1, *shape[1:])

  def by_taps(images):
    return columns_by_taps(rows_by_taps(images))

  def in_two(images):
    # XLA's CPU would else compute the rows anew for each tap of a column, and all for each use.
    return apart.call(columns_by_taps, apart.call(rows_by_taps, images))

  count, height, width, channels = images.shape
  if height == width == size:
    return (images.astype(jnp.float32) / 255).astype(dtype)
  shape = (count, size, size, channels)
  down, across = _resize_weights(height, size), _resize_weights(width, size) / np.float32(255)
  return platforms.dependent(
    images, tpu=by_matrix, cpu=in_two, default=by_taps).astype(dtype)


def _bilinear(x: Float[Array, "b cells m"], size: int) -> Float[Array, "b size m"]:
  """Linear half-pixel resize of the middle axis.

  Written as nearest + (other - nearest) · distance, with distances from whole numbers: plateaus
  stay exactly level, and mirrored pixels exactly equal but for those midway between two cells,
  which round each from its own: so ties fall as the rule says.
  """
  cells = x.shape[1]
  # Position of pixel i in cells, in units of 1 / (2 size).
  position = np.clip((2 * np.arange(size) + 1) * cells - size, 0, 2 * size * (cells - 1))
  nearest = (position + size) // (2 * size)
  offset = position - 2 * size * nearest
  other = np.clip(nearest + np.sign(offset), 0, cells - 1)
  distance = (np.abs(offset) / (2 * size)).astype(np.float32)[:, None]
  near = jnp.take(x, nearest, axis=1)
  return near + (jnp.take(x, other, axis=1) - near) * distance


def select_regions(
  gated: Float[Array, "b h w levels"], image_size: int, mask_size: int, num: int,
  mask_scope: str = "level", coords: str = "resize",
) -> Int32[Array, "b num 2"]:
  """The `num` strongest responses of the gated attention maps, greedily (papers.md §1).

  Level 0 carries nothing and is left out. The maps are resized bilinearly (half-pixel) to
  image_size²; the strongest value is taken; the mask_size² window centred on it (rows r-s//2 …
  r-s//2+s-1, clipped to the image) is masked in its level or in all levels; and again. Ties go to
  the lowest level, then row, then column. Where everything is masked, the answer is the first
  candidate: (0, 0), of "receptive_field" (37, 37).

  Args:
    gated: any float dtype; compared in float32.
    coords: "resize"; or "receptive_field" [choice]: no resize, only the cells' own centres are
      candidates, cell i at pixel 37+32i, and a mask takes the cells whose centres it covers.

  Returns:
    (row, column) in the image_size frame, strongest first.

  Raises:
    UserError: an unknown mask_scope or coords; fewer than two levels; cells outside the image.
  """
  return responses(gated, image_size, mask_size, num, mask_scope, coords).centres


def responses(
  gated: Float[Array, "b h w levels"], image_size: int, mask_size: int, num: int,
  mask_scope: str = "level", coords: str = "resize",
) -> Responses:
  """What `select_regions` takes, and why: each centre's level and strength."""
  if mask_scope not in MASK_SCOPES:
    raise UserError(f"model.mask_scope={mask_scope!r}: one of {', '.join(MASK_SCOPES)}")
  if coords not in COORDS:
    raise UserError(f"model.coords={coords!r}: one of {', '.join(COORDS)}")
  batch, height, width, levels = gated.shape
  if levels < 2:
    raise UserError(f"gated maps of {levels} level: level 0 is ignored, at least 2 are needed")
  maps = jnp.moveaxis(gated[..., 1:].astype(jnp.float32), -1, 1)
  if coords == "resize":
    row_at = column_at = np.arange(image_size)
    maps = jnp.swapaxes(maps.reshape(-1, height, width), 1, 2)  # columns while the map is small
    maps = _bilinear(jnp.swapaxes(_bilinear(maps, image_size), 1, 2), image_size)
    maps = maps.reshape(batch, levels - 1, image_size, image_size)
  else:
    row_at = _FIELD_START + _FIELD_STRIDE * np.arange(height)
    column_at = _FIELD_START + _FIELD_STRIDE * np.arange(width)
    if max(row_at[-1], column_at[-1]) >= image_size:
      raise UserError(
        f"model.coords=receptive_field: {height}×{width} cells reach pixel "
        f"{max(row_at[-1], column_at[-1])} of {image_size}; use coords=resize")
  row_at, column_at = jnp.asarray(row_at, jnp.int32), jnp.asarray(column_at, jnp.int32)
  return Responses(*jax.vmap(
    lambda one: _greedy(one, row_at, column_at, mask_size, num, mask_scope == "all"))(maps))


def _greedy(maps, row_at, column_at, mask_size, num, mask_all):
  """maps [levels, rows, columns] → centres, levels, strengths of one image's `num` strongest."""
  levels, rows, columns = maps.shape

  # What is masked is told by its rows and its columns, a bit for each window: so the maps, far the
  # largest here, are read once a round and never written.
  def masked(maps, by_rows, by_columns):
    return jnp.where((by_rows[..., None] & by_columns) != 0, -jnp.inf, maps)

  def take(maps, hidden, bit):
    by_rows, by_columns = hidden
    # Rows' maxima first: the large reduction is a plain maximum, the searches are short.
    best = jnp.argmax(masked(maps, by_rows, by_columns).max(2).reshape(-1)).astype(jnp.int32)
    level, row = best // rows, best % rows
    line = masked(maps[level, row], by_rows[level, row], by_columns)
    column = jnp.argmax(line).astype(jnp.int32)
    centre = jnp.stack([row_at[row], column_at[column]])
    first = centre - mask_size // 2
    in_rows = (row_at >= first[0]) & (row_at < first[0] + mask_size)
    in_columns = (column_at >= first[1]) & (column_at < first[1] + mask_size)
    in_levels = mask_all | (jnp.arange(levels) == level)
    more = in_levels[:, None] & in_rows
    hidden = jnp.where(more, by_rows | bit, by_rows), jnp.where(
      in_columns, by_columns | bit, by_columns)
    return hidden, (centre, level + 1, line[column])

  found = []
  for done in range(0, num, 32):
    bits = jnp.uint32(1) << jnp.arange(min(32, num - done), dtype=jnp.uint32)
    none = jnp.zeros((levels, rows), jnp.uint32), jnp.zeros(columns, jnp.uint32)
    hidden, some = jax.lax.scan(functools.partial(take, maps), none, bits)
    found.append(some)
    if num > done + 32:
      maps = masked(maps, *hidden)
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def cell_edges(cells: int, image_size: int, full_size: int, coords: str) -> np.ndarray:
  """Where the cells of a map begin and end along an axis of the full image: float64 [cells + 1].

  By plain resize they share the image out; a cell of coords="receptive_field" reaches half way to
  its neighbours' centres.
  """
  place = np.arange(cells + 1)
  if coords == "resize":
    return place * full_size / cells
  first = _FIELD_START + 0.5 - _FIELD_STRIDE / 2  # the middle of pixel 37, less half a stride
  return (first + _FIELD_STRIDE * place) * full_size / image_size


def cells_of(
  centres: Int32[Array, "*batch 2"], cells: tuple[int, int], image_size: int, coords: str,
) -> Int32[Array, "*batch 2"]:
  """The cells (row, column), of a grid of `cells`, in which the centres of regions lie."""
  if coords == "resize":
    return centres * np.asarray(cells, np.int32) // image_size
  return (centres - _FIELD_START) // _FIELD_STRIDE


def corners(
  centres: Int32[Array, "*batch n 2"], image_size: int, full_size: int, crop_size: int,
) -> Int32[Array, "*batch n 2"]:
  """Top left corners (row, column), in the full image, of the crops centred on `centres`.

  A centre is a pixel of the image_size frame; its middle is scaled to the full image, and the
  crop is shifted to lie inside.

  Raises:
    UserError: a crop larger than the full image.
  """
  if crop_size > full_size:
    raise UserError(
      f"model.crop_size={crop_size}: at most the full image, data.full_size={full_size}")
  # (r + ½) · full / image - crop / 2, in whole numbers.
  first = ((2 * centres + 1) * full_size - crop_size * image_size) // (2 * image_size)
  return jnp.clip(first, 0, full_size - crop_size).astype(jnp.int32)


def cut(
  images: UInt8[Array, "b full full 3"], corners: Int32[Array, "b n 2"], size: int,
) -> UInt8[Array, "b n size size 3"]:
  """Cuts size² windows at `corners` (row, column), which have to lie inside (see `corners`)."""
  def at_once(images, corners):
    def one(image, corner):
      return jax.lax.dynamic_slice(image, (*corner, 0), (size, size, image.shape[-1]))

    return jax.vmap(jax.vmap(one, (None, 0)))(images, corners)

  # A TPU's compiler makes a loop of the other too, and in it turns each window by itself.
  def one_by_one(images, corners):
    def one(numbered):
      number, corner = numbered
      return jax.lax.dynamic_slice(
        images, (number, *corner, 0), (1, size, size, images.shape[-1]))[0]

    count, each, _ = corners.shape
    numbers = jnp.repeat(jnp.arange(count), each)
    found = jax.lax.map(one, (numbers, corners.reshape(-1, 2)))
    return found.reshape(count, each, *found.shape[1:])

  return platforms.dependent(images, corners, tpu=one_by_one, default=at_once)
