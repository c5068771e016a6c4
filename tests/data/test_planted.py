"""Planted regions: the class is told inside and nowhere else, the same at every run."""

from __future__ import annotations

import functools
import subprocess
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from medattn_jax.data import pipeline, planted
from medattn_jax.errors import UserError

SIZE = 48


@pytest.fixture(scope="module")
def images():
  """500 images of seed 4: float [500, S, S], their classes, and the region."""
  drawn = [planted.draw(4, number, SIZE) for number in range(500)]
  stack = np.stack([image for image, _ in drawn]).astype(float)
  return stack, np.array([level for _, level in drawn]), planted.region(4, SIZE)


def slopes(images: np.ndarray, where: np.ndarray) -> np.ndarray:
  """[n, cells]: in cells of 6×6 pixels, how far the gratings' directions lean to one side.

  Only of pixels whose neighbours are in `where` too, so that nothing beyond it is seen.
  """
  rest = images - images.mean(0)
  down, right = (np.roll(rest, -1, a) - np.roll(rest, 1, a) for a in (1, 2))
  seen = where & np.roll(where, 1, 0) & np.roll(where, -1, 0)
  seen &= np.roll(where, 1, 1) & np.roll(where, -1, 1)
  cells = SIZE // 6
  lean = (down * right * seen).reshape(-1, cells, 6, cells, 6).sum((2, 4)).reshape(-1, cells**2)
  return lean / lean.std()


def accuracy(features: np.ndarray, levels: np.ndarray) -> float:
  """Of a classifier that has learnt from the first 300, on the others."""
  model = LogisticRegression(C=0.1, max_iter=1000).fit(features[:300], levels[:300])
  return model.score(features[300:], levels[300:])


def test_an_image_is_a_function_of_seed_and_number():
  first, level = planted.draw(7, 3, SIZE)
  planted.draw(8, 4, SIZE)
  again, same_level = planted.draw(7, 3, SIZE)
  np.testing.assert_array_equal(first, again)
  assert level == same_level and first.dtype == np.uint8
  for other in (planted.draw(7, 4, SIZE), planted.draw(8, 3, SIZE)):
    assert (first != other[0]).mean() > 0.5
  assert not np.array_equal(planted.region(7, SIZE), planted.region(8, SIZE))


def test_the_class_is_told_inside_and_not_outside(images):
  stack, levels, region = images
  assert accuracy(slopes(stack, region), levels) > 0.85
  # 200 tossed coins: a deviation of 0.035.
  assert abs(accuracy(slopes(stack, ~region), levels) - 0.5) < 0.12
  assert abs(accuracy((stack * ~region)[:, ::4, ::4].reshape(500, -1) / 255, levels) - 0.5) < 0.12


def test_gratings_outside_are_like_those_inside(images):
  """What tells the region apart is neither how much nor how strongly something varies."""
  stack, _, region = images
  for what in (stack.mean(0), stack.std(0), np.abs(stack - stack.mean(0)).mean(0)):
    for sign in (1, -1):
      for cut in np.quantile(sign * what, np.linspace(0.05, 0.95, 19)):
        chosen = sign * what > cut
        assert (chosen & region).sum() / (chosen | region).sum() < 0.4
  # The distractors do lean, each image otherwise: they are there.
  inner, outer = slopes(stack, region), slopes(stack, ~region)
  for leanings in (inner[:, inner.std(0) > 0], outer[:, outer.std(0) > 0]):
    assert (leanings**4).mean() / (leanings**2).mean() ** 2 > 10  # noise alone: near 3


def test_a_grating_is_wholly_inside_or_outside(monkeypatch):
  marks, add = [], planted._grating
  monkeypatch.setattr(planted, "_grating", lambda image, *rest: marks.append(rest))
  for seed in range(8):
    region = planted.region(seed, 96)
    for number in range(20):
      marks.clear()
      planted.draw(seed, number, 96)
      assert len(marks) > 3
      for place, rest in enumerate(marks):
        canvas = np.zeros((96, 96))
        add(canvas, *rest)
        touched = np.abs(canvas) > 1e-9
        assert touched.sum() > 100  # the disc is 7.7 pixels in radius
        assert not (touched & (region if place else ~region)).any()


def test_regions_differ_and_keep_their_size():
  regions = np.stack([planted.region(seed, SIZE) for seed in range(40)])
  areas = regions.mean((1, 2))
  assert areas.min() >= 0.05 and areas.max() <= 0.20
  assert not regions[:, [0, -1]].any() and not regions[:, :, [0, -1]].any()
  assert len(np.unique(regions.reshape(40, -1), axis=0)) == 40
  assert (regions.mean(0) > 0).mean() > 0.6  # anywhere
  for seed in range(10):  # and the same one at any size
    coarse, fine = planted.region(seed, SIZE), planted.region(seed, 3 * SIZE)
    assert (coarse == fine[1::3, 1::3]).mean() > 0.999
    assert 0.05 <= planted.region(seed, 16).mean() <= 0.20


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_classes_are_equally_frequent(classes):
  levels = [planted.draw(0, number, 16, classes)[1] for number in range(600)]
  np.testing.assert_allclose(np.bincount(levels) / 600, np.full(classes, 1 / classes), atol=0.08)


def test_an_image_is_the_same_at_every_size_but_for_noise(monkeypatch):
  monkeypatch.setattr(planted, "NOISE", 0.0)
  for number in range(3):
    small, level = planted.draw(2, number, SIZE)
    large, same_level = planted.draw(2, number, 3 * SIZE)
    assert level == same_level
    assert np.abs(small.astype(int) - large[1::3, 1::3]).max() <= 1


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  folder = tmp_path_factory.mktemp("drawn")
  numbers = {"seed": 5, "train": 12, "validation": 3, "test": 4}
  return folder, numbers, pipeline.open_dataset(
    "planted_region", folder, full_size=32, synthetic=numbers)


def test_a_set_holds_the_images_and_their_region(drawn):
  folder, numbers, dataset = drawn
  assert dataset.splits == {"train": 12, "validation": 3, "test": 4}
  assert (dataset.channels, dataset.num_classes, dataset.full_size) == (1, 2, 32)
  np.testing.assert_array_equal(dataset.region, planted.region(5, 32))
  first, names = 0, []
  for split, count in dataset.splits.items():
    images = pipeline.photographs(dataset, split, range(count), full_size=32, channels=1)
    for number, image in enumerate(images):
      truth, level = planted.draw(5, first + number, 32)
      np.testing.assert_array_equal(image[..., 0], truth)
      assert dataset.photo_levels(split)[number] == level
    first += count
    for batch in pipeline.eval_batches(dataset, split, batch_size=2, full_size=32, pairs=False):
      names += [name for name in batch["patient"] if name]
  assert len(set(names)) == len(names) == 19  # no image in two splits
  index = (dataset.folder / "index.json").stat().st_mtime_ns
  again = pipeline.open_dataset("planted_region", folder, full_size=32, synthetic=numbers)
  assert (again.folder / "index.json").stat().st_mtime_ns == index


def test_many_processes_draw_the_same_and_know_no_tensorflow():
  from medattn_jax.data.datasets import drawn

  draw = functools.partial(planted.draw_example, 3, size=32)
  assert list(drawn.draw_all(draw, range(8), spawn_from=8)) == [draw(k) for k in range(8)]
  code = ("import sys, medattn_jax.data.planted;"
          "print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_the_region_follows_the_size_asked_for(drawn):
  _, _, dataset = drawn
  for size in (16, 80):
    region = pipeline.open_dataset(str(dataset.folder), None, full_size=size).region
    assert region.shape == (size, size) and region.dtype == bool
    assert (region != planted.region(5, size)).mean() < 0.04


def test_more_classes_are_another_set(drawn):
  folder, numbers, two = drawn
  four = pipeline.open_dataset(
    "planted_region", folder, full_size=32, synthetic={**numbers, "num_classes": 4})
  assert four.num_classes == 4 and four.folder != two.folder
  assert set(np.concatenate([four.photo_levels(s) for s in four.splits])) == {0, 1, 2, 3}


@pytest.mark.parametrize("key, bad", [
  ("seed", -1), ("train", 0), ("test", 1.5), ("num_classes", 5), ("num_classes", 1),
])  # fmt: skip
def test_numbers_that_make_no_set_are_named(tmp_path, key, bad):
  good = {"seed": 0, "train": 1, "validation": 0, "test": 0}
  with pytest.raises(UserError, match=rf"planted_region: {key} = {bad}: an integer .* accepted"):
    pipeline.open_dataset("planted_region", tmp_path, full_size=32, synthetic={**good, key: bad})
  assert list(tmp_path.iterdir()) == []
