"""analysis.intervals: against textbook forms where one exists; ends of the scale."""

import numpy as np
import pytest
from scipy import stats

from medattn_jax.analysis import intervals


def resamples(error, centre=0.5, count=4000):
  """Figures whose standard deviation is exactly `error`."""
  drawn = np.random.default_rng(0).normal(size=count)
  return centre + error * (drawn - drawn.mean()) / drawn.std(ddof=1)


@pytest.mark.parametrize(("right", "images"), [(30, 40), (1, 40), (39, 40), (0, 25), (25, 25)])
def test_independent_images_have_wilsons_interval(right, images):
  """Resamples that spread as independent images do give the textbook's interval (scipy's)."""
  share = right / images
  found = resamples(np.sqrt(share * (1 - share) / images), share)
  expected = stats.binomtest(right, images).proportion_ci(method="wilson")
  np.testing.assert_allclose(
    intervals.of_share(share, found, images, images), expected, atol=1e-9)


def test_images_that_belong_together_count_for_fewer():
  """Twice the variance is half the images; less than that of independent ones is not believed."""
  error = np.sqrt(0.75 * 0.25 / 400)
  wide = intervals.of_share(0.75, resamples(np.sqrt(2) * error), 400, 200)
  expected = stats.binomtest(150, 200).proportion_ci(method="wilson")
  np.testing.assert_allclose(wide, expected, atol=1e-9)
  narrow = intervals.of_share(0.75, resamples(error / 3), 400, 200)
  np.testing.assert_allclose(
    narrow, stats.binomtest(300, 400).proportion_ci(method="wilson"), atol=1e-9)


def test_all_right_is_no_certainty():
  """Every resample is 1: the patients are counted."""
  low, high = intervals.of_share(1.0, np.ones(500), 80, 50)
  assert low == pytest.approx(50 / (50 + stats.norm.ppf(0.975) ** 2)) and high == 1


def test_kappa_is_fishers():
  low, high = intervals.of_kappa(0.8, resamples(0.03), 10**7)
  z = stats.norm.ppf(0.975) * 0.03 / (1 - 0.64)
  np.testing.assert_allclose(
    [low, high], [np.tanh(np.arctanh(0.8) - z), np.tanh(np.arctanh(0.8) + z)], atol=1e-6)
  few = intervals.of_kappa(0.8, resamples(0.03), 10)
  assert few[0] < low and few[1] > high and few[0] > -1 and few[1] < 1


def test_area_is_of_the_logit():
  low, high = intervals.of_area(0.9, 0.02**2)
  logit = lambda area: np.log(area / (1 - area))
  assert logit(0.9) - logit(low) == pytest.approx(stats.norm.ppf(0.975) * 0.02 / 0.09)
  assert logit(high) - logit(0.9) == pytest.approx(logit(0.9) - logit(low))


def test_a_difference_is_students():
  found = intervals.of_difference(0.05, resamples(0.02), 12)
  assert found["p"] == pytest.approx(2 * stats.t.sf(2.5, 11))
  reach = stats.t.ppf(0.975, 11) * 0.02
  np.testing.assert_allclose(found["interval"], [0.05 - reach, 0.05 + reach])
  # The interval holds zero just where p is more than .05.
  edge = intervals.of_difference(float(reach), resamples(0.02), 12)
  assert edge["p"] == pytest.approx(0.05) and edge["interval"][0] == pytest.approx(0, abs=1e-12)


def test_the_undefined_is_none():
  nothing, same = np.full(10, np.nan), np.zeros(10)
  assert intervals.of_kappa(None, same, 5) is None
  assert intervals.of_kappa(1.0, np.ones(10), 5) is None
  assert intervals.of_kappa(0.5, nothing, 5) is None
  assert intervals.of_kappa(0.5, resamples(0.1), 1) is None
  assert intervals.of_share(None, same, 5, 5) is None
  assert intervals.of_share(0.5, same[:0], 5, 5) is None
  for area, variance in ((1.0, 0.0), (0.9, np.nan), (0.9, 0.0), (0.0, 0.1)):
    assert intervals.of_area(area, variance) is None
  assert intervals.of_difference(None, same, 5) == {
    "difference": None, "interval": None, "p": None}
  assert intervals.of_difference(0.0, same, 5) == {"difference": 0.0, "interval": None, "p": None}
