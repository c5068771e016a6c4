"""analysis.lesions: overlaps by hand, chance against its own formula, and the best possible."""

import itertools
import time

import numpy as np
import pytest

from medattn_jax.analysis import lesions


def test_iom_by_hand():
  region = [[0, 0, 100, 100]]
  others = [[10, 10, 20, 20],  # inside: 1
            [90, 90, 110, 110],  # a quarter of the smaller
            [0, 100, 10, 110],  # touching
            [-50, -50, 150, 150],  # the region is the smaller: 1
            [5, 5, 5, 50]]  # no area
  np.testing.assert_allclose(lesions.iom(region, others), [[1, 0.25, 0, 1, 0]])
  np.testing.assert_allclose(lesions.iom(others, region)[:, 0], [1, 0.25, 0, 1, 0])


def test_recall_per_box_and_per_image():
  region = np.array([[0, 0, 50, 50]])
  true = [np.array([[0, 0, 10, 10], [200, 200, 210, 210]]),  # one of two found
          np.array([[100, 100, 120, 120]]),  # none found
          np.zeros((0, 4)),  # nothing to find: not counted
          np.array([[45, 0, 55, 10], [48, 20, 58, 30]])]  # overlaps of .5 and .2
  box, image = lesions.recall(true, [region] * 4, 0.3)
  assert box == pytest.approx(2 / 5) and image == pytest.approx(2 / 3)
  assert lesions.recall([np.zeros((0, 4))], [region]) == (None, None)


def test_random_boxes_are_inside_uniform_and_seeded():
  boxes = lesions.random_boxes(np.random.default_rng(0), 20000, 30, 100)
  assert boxes.min() == 0 and boxes.max() == 100
  assert (boxes[:, 2:] - boxes[:, :2] == 30).all()
  counts = np.bincount(boxes[:, 0], minlength=71)
  assert counts.size == 71 and counts.min() > 200 and counts.max() < 370
  again = lesions.random_boxes(np.random.default_rng(0), 20000, 30, 100)
  np.testing.assert_array_equal(boxes, again)


def test_random_recall_follows_the_areas():
  """A point-like lesion in the middle is inside one random square in (30/71)² of the draws."""
  true = [np.array([[49.5, 49.5, 50.5, 50.5]])] * 300
  box, image = lesions.random_recall(true, 1, 30, 100, draws=20)
  assert box == image == pytest.approx((30 / 71) ** 2, abs=0.02)


def test_best_finds_all_that_can_be_found():
  """Four clusters, four squares: all found; a fifth cluster cannot be."""
  rng = np.random.default_rng(0)
  centres = np.array([[60, 60], [60, 330], [330, 60], [330, 330], [200, 200]])
  corner = (centres[:, None] + rng.integers(-25, 25, (5, 12, 2))).reshape(-1, 2)
  true = np.concatenate([corner, corner + 8], axis=1)
  boxes = lesions.best_boxes(true[:48], 4, 90, 400)
  assert lesions.recall([true[:48]], [boxes]) == (1, 1)
  assert boxes.min() >= 0 and boxes.max() <= 400 and (boxes[:, 2:] - boxes[:, :2] == 90).all()
  box, _ = lesions.best_recall([true], 4, 90, 400)
  assert box == pytest.approx(48 / 60)


@pytest.mark.parametrize("seed", [*range(10), 122, 298, 328])
def test_best_is_the_best_on_a_small_board(seed):
  """Against every pair of places of a 14×14 image; in the last three greed alone falls short."""
  corner = np.random.default_rng(seed).integers(0, 12, (9, 2))
  true = np.concatenate([corner, corner + 2], axis=1)
  places = np.array(list(itertools.product(range(11), range(11))))
  covers = lesions.iom(np.concatenate([places, places + 4], axis=1), true) >= 0.3
  most = (covers[:, None] | covers[None]).sum(-1).max()
  assert (lesions.iom(lesions.best_boxes(true, 2, 4, 14), true) >= 0.3).any(0).sum() == most


def test_best_beats_random_and_takes_no_time():
  rng = np.random.default_rng(3)
  corner = rng.integers(0, 1220, (200, 2))
  true = [np.concatenate([corner, corner + 10], axis=1)]
  begin = time.perf_counter()
  best, _ = lesions.best_recall(true, 4, 384, 1230)
  assert time.perf_counter() - begin < 2
  chance, _ = lesions.random_recall(true, 4, 384, 1230)
  assert best > chance + 0.05


def test_squares_larger_than_the_image_are_the_image():
  true = [np.array([[3, 3, 5, 5]])]
  assert lesions.best_recall(true, 4, 64, 32) == (1, 1)
  assert lesions.random_recall(true, 4, 64, 32) == (1, 1)
