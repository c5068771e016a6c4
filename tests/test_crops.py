"""Regions are found, cut and resized as plain NumPy would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medattn_jax import crops, platforms
from medattn_jax.errors import UserError


def whole_number_resize(cells, size):
  """Bilinear half-pixel resize of integer maps [h, w], exact: values are times (2·size)²."""
  def matrix(count):
    out = np.zeros((size, count), np.int64)
    for i in range(size):
      place = min(max((2 * i + 1) * count - size, 0), 2 * size * (count - 1))
      low, rest = divmod(place, 2 * size)
      out[i, low] += 2 * size - rest
      out[i, min(low + 1, count - 1)] += rest
    return out

  return matrix(cells.shape[0]) @ cells @ matrix(cells.shape[1]).T


def reference(gated, size, mask, num, scope, resize):
  """The paper's greedy selection for one image, written out."""
  score = np.stack([resize(gated[..., level], size) for level in range(1, gated.shape[-1])])
  score = score.astype(np.float64)
  centres = []
  for _ in range(num):
    best = None
    for level in range(len(score)):
      row, column = np.unravel_index(np.argmax(score[level]), (size, size))
      if best is None or score[level, row, column] > score[best]:
        best = (level, row, column)
    level, row, column = best
    centres.append((row, column))
    top, left = max(row - mask // 2, 0), max(column - mask // 2, 0)
    bottom, right = row - mask // 2 + mask, column - mask // 2 + mask
    levels = slice(None) if scope == "all" else level
    score[levels, top:max(bottom, 0), left:max(right, 0)] = -np.inf
  return np.array(centres)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def select(gated, size, mask, num, scope):
  return crops.select_regions(gated, size, mask, num, scope)


def maps_with_ties(rng, count, height, width):
  """Whole numbers 0 to 3; a third have their maxima on the border only, a few are level."""
  maps = rng.integers(0, 4, (count, height, width, 5))
  inside = maps[: count // 3, 1:-1, 1:-1]
  np.minimum(inside, 1, out=inside)
  corner = maps[count // 3: count // 2]
  np.minimum(corner, 2, out=corner)
  corner[:, 0, -1, 2] = corner[:, -1, 0, 4] = 3
  maps[-4:, ..., 1:] = 1
  maps[-2:, ..., 3] = 2
  return maps


@pytest.mark.parametrize("scope", ["level", "all"])
@pytest.mark.parametrize("height, width, size, mask, count", [
  (4, 4, 32, 13, 120), (8, 8, 64, 26, 120), (10, 10, 160, 65, 60), (4, 8, 32, 7, 120),
  (14, 14, 492, 200, 16)])
def test_ties_fall_by_the_rule(height, width, size, mask, count, scope):
  """The reference is exact: it resizes in whole numbers."""
  maps = maps_with_ties(np.random.default_rng(size), count, height, width)
  found = np.asarray(select(maps.astype(np.float32), size, mask, 4, scope))
  for one, centres in zip(maps, found, strict=True):
    wanted = reference(one, size, mask, 4, scope, whole_number_resize)
    np.testing.assert_array_equal(centres, wanted)


@pytest.mark.parametrize(("scope", "number"), [("level", 40), ("all", 70)])
def test_more_windows_than_a_word_has_bits(scope, number):
  maps = maps_with_ties(np.random.default_rng(0), 12, 8, 8)
  found = np.asarray(select(maps.astype(np.float32), 32, 4, number, scope))
  for one, centres in zip(maps, found, strict=True):
    np.testing.assert_array_equal(
      centres, reference(one, 32, 4, number, scope, whole_number_resize))


@pytest.mark.parametrize("scope", ["level", "all"])
def test_any_maps_at_the_papers_sizes(scope):
  maps = np.random.default_rng(0).normal(size=(30, 14, 14, 5)).astype(np.float32)
  found = np.asarray(select(maps, 492, 200, 4, scope))
  for one, centres in zip(maps, found, strict=True):
    wanted = reference(one.astype(np.float64), 492, 200, 4, scope, float_matrix_resize)
    np.testing.assert_array_equal(centres, wanted)


def float_matrix_resize(cells, size):
  """As `whole_number_resize`, for floats."""
  position = np.clip((np.arange(size) + 0.5) * len(cells) / size - 0.5, 0, len(cells) - 1)
  rows = np.stack([np.interp(position, np.arange(len(cells)), column) for column in cells.T], 1)
  return np.stack([np.interp(position, np.arange(len(cells)), row) for row in rows])


def test_level_zero_is_ignored():
  maps = np.random.default_rng(1).normal(size=(3, 5, 5, 5)).astype(np.float32)
  loud = maps.copy()
  loud[..., 0] = 100
  np.testing.assert_array_equal(select(maps, 40, 9, 3, "level"), select(loud, 40, 9, 3, "level"))


def test_two_levels_may_share_a_place_only_under_level_scope():
  maps = np.zeros((1, 8, 8, 5), np.float32)
  maps[0, 4, 4, 2], maps[0, 4, 4, 3], maps[0, 1, 1, 1] = 5, 4, 1
  level, whole = (select(maps, 64, 16, 2, scope)[0] for scope in ("level", "all"))
  np.testing.assert_array_equal(level[0], level[1])
  assert np.abs(np.asarray(whole[0] - whole[1])).max() >= 8


def test_receptive_field_maps_cells_to_their_centres():
  maps = np.zeros((1, 14, 14, 5), np.float32)
  strongest = [(0, 13, 1), (13, 2, 4), (6, 6, 2)]
  for strength, (row, column, level) in zip((3, 2, 1), strongest, strict=True):
    maps[0, row, column, level] = strength
  found = crops.select_regions(maps, 492, 200, 3, "all", "receptive_field")
  np.testing.assert_array_equal(found[0], [(37 + 32 * r, 37 + 32 * c) for r, c, _ in strongest])


def test_receptive_field_masks_the_cells_whose_centres_it_covers():
  """A mask of 65 at a cell's centre covers ±32 pixels: the cell and its eight neighbours."""
  maps = np.ones((1, 14, 14, 5), np.float32)
  maps[0, 5, 5] = 9
  maps[0, 4:7, 4:7] += 1
  found = crops.select_regions(maps, 492, 65, 2, "all", "receptive_field")[0]
  np.testing.assert_array_equal(found, [(37 + 32 * 5, 37 + 32 * 5), (37, 37)])


def test_responses_say_whose_map_and_how_strong():
  maps = np.zeros((1, 14, 14, 5), np.float32)
  maps[0, 3, 3, 2], maps[0, 10, 10, 4], maps[0, ..., 0] = 5, 3, 99
  respond = jax.jit(crops.responses, static_argnums=(1, 2, 3, 4))
  found = respond(maps, 140, 40, 4, "all")
  assert found.levels[0, :2].tolist() == [2, 4]
  grown = whole_number_resize(maps[0, ..., 2].astype(int), 140) / 280**2
  assert found.strengths[0, 0] == pytest.approx(grown.max(), rel=1e-6)
  np.testing.assert_array_equal(found.centres, select(maps, 140, 40, 4, "all"))
  # Four windows over a whole image leave nothing to the fifth.
  all_taken = respond(maps[:, :2, :2], 32, 31, 8, "all").strengths[0]
  assert np.isfinite(all_taken[0]) and np.isneginf(all_taken[-1])


@pytest.mark.parametrize("coords", crops.COORDS)
def test_a_centre_lies_in_its_cell(coords):
  """Planted peaks of a few cells: each is found in the cell it was planted in."""
  edges = crops.cell_edges(14, 492, 1230, coords)
  assert (np.diff(edges) > 0).all() and len(edges) == 15
  for row, column in ((0, 13), (6, 7), (13, 2)):
    maps = np.zeros((1, 14, 14, 5), np.float32)
    maps[0, row, column, 1] = 1
    centre = crops.select_regions(maps, 492, 40, 1, "level", coords)[0, 0]
    assert crops.cells_of(centre, (14, 14), 492, coords).tolist() == [row, column]
    middle = (np.asarray(centre) + 0.5) * 2.5
    assert (edges[[row, column]] <= middle).all() and (middle < edges[[row + 1, column + 1]]).all()
  if coords == "resize":
    assert edges[0] == 0 and edges[-1] == 1230
  else:  # as far to one side of a cell's centre as to the other
    np.testing.assert_allclose((edges[1:] + edges[:-1]) / 2, (37.5 + 32 * np.arange(14)) * 2.5)


@pytest.mark.parametrize("options, word", [
  ({"mask_scope": "both"}, "mask_scope"), ({"coords": "pixels"}, "coords"),
  ({"coords": "receptive_field", "image_size": 160}, "receptive_field")])
def test_wrong_options_are_named(options, word):
  options = {"image_size": 492, "mask_size": 9, "num": 2, **options}
  with pytest.raises(UserError, match=word):
    crops.select_regions(jnp.zeros((1, 14, 14, 5)), **options)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cut_is_slicing(platform, monkeypatch):
  monkeypatch.setattr(platforms, "traced_for", lambda: platform)
  images = np.random.default_rng(2).integers(0, 256, (3, 21, 21, 3)).astype(np.uint8)
  first = np.array([[(0, 0), (13, 13)], [(0, 13), (5, 7)], [(13, 0), (12, 1)]], np.int32)
  found = np.asarray(jax.jit(lambda *given: crops.cut(*given, 8))(images, first))
  assert found.dtype == np.uint8
  for image, places, patches in zip(images, first, found, strict=True):
    for (row, column), patch in zip(places, patches, strict=True):
      np.testing.assert_array_equal(patch, image[row:row + 8, column:column + 8])


@pytest.mark.parametrize("image_size, full, size", [(492, 1230, 384), (160, 400, 125), (64, 64, 9)])
def test_crops_are_centred_and_inside(image_size, full, size):
  rows = np.arange(image_size, dtype=np.int32)
  centres = np.stack([rows, rows[::-1]], -1)[None]
  first = np.asarray(crops.corners(centres, image_size, full, size))
  assert first.min() == 0 and first.max() == full - size
  wanted = (centres + 0.5) * full / image_size
  inside = (wanted - size / 2 >= 0) & (wanted + size / 2 <= full)
  assert inside.any() and not inside.all()
  assert np.abs(first + size / 2 - wanted)[inside].max() < 1


def test_a_crop_larger_than_the_image_is_refused():
  with pytest.raises(UserError, match="crop_size"):
    crops.corners(jnp.zeros((1, 1, 2), jnp.int32), 10, 20, 21)


@pytest.mark.parametrize("full, size", [(400, 160), (123, 50), (40, 64), (40, 40)])
def test_small_view_is_pillows_antialiased_resize(full, size):
  image = np.random.default_rng(3).integers(0, 256, (full, full, 3)).astype(np.uint8)
  wanted = np.stack([
    np.asarray(Image.fromarray(image[..., channel].astype(np.float32)).resize(
      (size, size), Image.Resampling.BILINEAR)) for channel in range(3)], -1)
  found = jax.jit(crops.small_view, static_argnums=1)(image[None], size)[0]
  np.testing.assert_allclose(found * 255, wanted, atol=2e-3)


def test_both_ways_to_resize_agree():
  """Sums of taps (CPU, GPU) and matrix products (TPU) are the same function."""
  weights = crops._resize_weights(400, 160)
  rows = np.random.default_rng(4).integers(0, 256, (2, 400, 6)).astype(np.uint8)
  np.testing.assert_allclose(
    crops._resize_by_taps(weights, jnp.asarray(rows)),
    crops._resize_by_matrix(weights, jnp.asarray(rows), jnp.float32), rtol=1e-5)


def test_the_tpus_program_is_the_matrix_product():
  image = jax.ShapeDtypeStruct((1, 50, 50, 3), jnp.uint8)
  traced = jax.jit(lambda x: crops.small_view(x, 20)).trace(image)
  text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu")}
  assert "dot_general" in text["tpu"] and "dot_general" not in text["cpu"]


def test_small_view_in_bfloat16_keeps_an_even_image_even():
  image = np.full((1, 100, 100, 3), 200, np.uint8)
  view = crops.small_view(image, 40, jnp.bfloat16)
  assert view.dtype == jnp.bfloat16
  np.testing.assert_allclose(view.astype(jnp.float32), 200 / 255, rtol=2 ** -7)
