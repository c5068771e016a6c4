"""analysis.coverage: recall curves against plain loops, boxes of maps against climbing by hand."""

import numpy as np
import pytest

from medattn_jax.analysis import coverage, lesions


def drawn(seed, images=30, number=16):
  """Lesions (of some photographs none), their types, and more or fewer than `number` boxes."""
  rng = np.random.default_rng(seed)
  box = lambda n, low, high: np.concatenate([c := rng.integers(0, 80, (n, 2)),
                                             c + rng.integers(low, high, (n, 2))], axis=1)
  true = [box(k, 2, 12) for k in rng.integers(0, 6, images)]
  types = [rng.integers(0, 3, len(own)) for own in true]
  return true, types, [box(k, 10, 30) for k in rng.integers(1, number + 5, images)]


@pytest.mark.parametrize("seed", range(3))
def test_a_curve_is_a_plain_loop(seed):
  true, types, proposed = drawn(seed)
  founds = [coverage.found(t, p, 16) for t, p in zip(true, proposed, strict=True)]
  curve = coverage.curve(founds)
  of_one = coverage.curve(coverage.of_type(founds, types, 1))
  for n in range(1, 17):
    hits, total, images, with_hit, ones, ones_hit = 0, 0, 0, 0, 0, 0
    for lesions_there, kinds, boxes in zip(true, types, proposed, strict=True):
      seen = []
      for lesion in lesions_there:
        area = lambda b: (b[2] - b[0]) * (b[3] - b[1])
        best = 0.0
        for other in boxes[:n]:
          down = max(0, min(lesion[2], other[2]) - max(lesion[0], other[0]))
          along = max(0, min(lesion[3], other[3]) - max(lesion[1], other[1]))
          best = max(best, down * along / min(area(lesion), area(other)))
        seen.append(best >= 0.3)
      hits, total = hits + sum(seen), total + len(seen)
      images, with_hit = images + bool(seen), with_hit + any(seen)
      ones += int((kinds == 1).sum())
      ones_hit += sum(s for s, kind in zip(seen, kinds, strict=True) if kind == 1)
    assert curve.box[n - 1] == pytest.approx(hits / total, abs=1e-12)
    assert curve.image[n - 1] == pytest.approx(with_hit / images, abs=1e-12)
    assert of_one.box[n - 1] == pytest.approx(ones_hit / ones, abs=1e-12)
    assert (curve.box[n - 1], curve.image[n - 1]) == pytest.approx(
      lesions.recall(true, [boxes[:n] for boxes in proposed]), abs=1e-12)
  assert (np.diff(curve.box) >= 0).all() and (np.diff(curve.image) >= 0).all()
  assert curve.box[0] < curve.box[-1]


def test_without_lesions_there_is_no_curve():
  nothing = [np.zeros((4, 0), bool)] * 3
  assert coverage.curve(nothing) is None and coverage.mean_curve([None, None]) is None
  assert coverage.interval(nothing, ["a", "b", "c"], resamples=10, seed=0) is None


def test_the_best_grows_and_ends_with_all():
  true, *_ = drawn(5)
  best = coverage.curve([coverage.found_by_best(own, 16, 20, 92) for own in true])
  assert (np.diff(best.box) >= 0).all() and best.box[-1] == 1
  squares = [lesions.random_boxes(np.random.default_rng(0), 16, 20, 92) for _ in true]
  chance = coverage.curve([coverage.found(*pair, 16) for pair in zip(true, squares, strict=True)])
  assert (best.box[:5] > chance.box[:5] + 0.2).all()
  for n in (1, 4):
    assert (best.box[n - 1], best.image[n - 1]) == pytest.approx(
      lesions.best_recall(true, n, 20, 92), abs=1e-12)


def test_intervals_resample_patients():
  true, _, proposed = drawn(1, images=80)
  founds = [coverage.found(t, p, 4) for t, p in zip(true, proposed, strict=True)]
  curve = coverage.curve(founds)
  apart = coverage.interval(founds, [str(i) for i in range(80)], resamples=500, seed=0)
  assert (apart.box[:, 0] < curve.box).all() and (curve.box < apart.box[:, 1]).all()
  assert (apart.image[:, 0] <= curve.image).all() and (curve.image <= apart.image[:, 1]).all()
  # Sixteen copies of five photographs, a patient each: as wide as five patients make it.
  copies = [founds[i % 5] for i in range(80)]
  width = lambda names: np.ptp(coverage.interval(copies, names, resamples=500, seed=0).box, axis=1)
  few, many = width([str(i % 5) for i in range(80)]), width([str(i) for i in range(80)])
  assert (few >= 2 * many).all() and (many[1:] > 0).all()


def climbed(values, row, column):
  """Where the steepest way up from a cell ends, step by step."""
  while True:
    near = [(values[r, c], -abs(r - row) - abs(c - column) == 0, r, c)
            for r in range(max(0, row - 1), min(len(values), row + 2))
            for c in range(max(0, column - 1), min(values.shape[1], column + 2))]
    _, _, up, along = max(near, key=lambda cell: cell[0])
    if values[up, along] <= values[row, column]:
      return row, column
    row, column = up, along


@pytest.mark.parametrize("seed", range(4))
def test_peaks_are_found_by_climbing(seed):
  """On one level: every cell climbs to its peak; the boxes hold what reaches half its height."""
  values = np.random.default_rng(seed).normal(size=(7, 9))
  gated = np.stack([values + 50, values], axis=-1)  # level 0 carries nothing
  edges = np.arange(8) * 10.0, np.arange(10) * 10.0
  found = coverage.peaks(gated, *edges, 16)
  basins = {}
  for row in range(7):
    for column in range(9):
      basins.setdefault(climbed(values, row, column), []).append((row, column))
  expected = []
  for peak in sorted(basins, key=lambda peak: -values[peak]):
    if values[peak] > 0:
      cells = np.array([cell for cell in basins[peak] if values[cell] >= 0.5 * values[peak]])
      expected.append([*10 * cells.min(0), *10 * (cells.max(0) + 1)])
  assert found.tolist() == expected[:16] and len(found) > 3
  assert coverage.peaks(gated, *edges, 2).tolist() == expected[:2]


def test_one_finding_in_two_levels_is_one_box():
  gated = np.zeros((5, 5, 4))
  gated[0:2, 0:2, 1] = [[4, 3], [3, 1]]  # the 1 is below half of the 4
  gated[0, 1, 2] = 2  # a weaker peak where level 1 glows
  gated[4, 4, 3] = 1
  edges = np.arange(6) * 8.0
  assert coverage.peaks(gated, edges, edges, 16).tolist() == [[0, 0, 16, 16], [32, 32, 40, 40]]
  assert coverage.peaks(-gated, edges, edges, 16).shape == (0, 4)


def test_covered_counts_every_pixel_once():
  _, _, proposed = drawn(7)
  for boxes in proposed:
    painted = np.zeros((100, 100), bool)
    shares = coverage.covered(boxes, 16, 100)
    for n in range(16):
      if n < len(boxes):
        top, left, bottom, right = boxes[n]
        painted[top:bottom, left:right] = True
      assert shares[n] == pytest.approx(painted.mean(), abs=1e-12)
  assert coverage.covered(np.zeros((0, 4)), 3, 100).tolist() == [0, 0, 0]


def test_scattered_boxes_keep_their_sides_and_stay_inside():
  boxes = np.array([[0, 0, 30, 10], [5, 5, 6, 100], [0, 0, 100, 100]] * 200)
  moved = coverage.scattered(np.random.default_rng(0), boxes, 100)
  np.testing.assert_array_equal(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2])
  assert moved.min() == 0 and moved.max() == 100
  assert 65 < moved[::3, 0].max() <= 70 and abs(moved[::3, 0].mean() - 35) < 5
