"""analysis.calibration: by hand, against scikit-learn, and a temperature that is known."""

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from medattn_jax import metrics
from medattn_jax.analysis import calibration


def graded(n, seed=0, classes=5, scale=1.5):
  """Probabilities that are right as often as they say, and levels drawn by them."""
  rng = np.random.default_rng(seed)
  probabilities = metrics.probabilities_of(rng.normal(0, scale, (n, classes)))
  level = (probabilities.cumsum(1) < rng.random((n, 1))).sum(1)
  return probabilities, level


def test_every_figure_by_hand():
  probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.25, 0.75], [0.5, 0.5]])
  found = calibration.of_probabilities(probabilities, np.array([0, 1, 1, 1]), bins=4)
  # Bins (0, .25], (.25, .5], (.5, .75], (.75, 1]: the top is .5 and wrong; .75 and right; .8 twice,
  # once right.
  assert found["curve"]["images"] == [0, 1, 1, 2]
  assert found["curve"]["accuracy"] == [0, 0, 1, 0.5]
  np.testing.assert_allclose(found["curve"]["confidence"], [0, 0.5, 0.75, 0.8], atol=1e-15)
  assert found["expected_calibration_error"] == pytest.approx((0.5 + 0.25 + 2 * 0.3) / 4, abs=1e-12)
  assert found["negative_log_likelihood"] == pytest.approx(
    -np.log(0.8 * 0.2 * 0.75 * 0.5) / 4, abs=1e-12)
  assert found["brier"] == pytest.approx((0.08 + 1.28 + 0.125 + 0.5) / 4, abs=1e-12)
  assert (found["accuracy"], found["confidence"]) == (0.5, pytest.approx(0.7125))


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_scikit_learns(classes):
  probabilities, level = graded(400, classes=classes)
  found = calibration.of_probabilities(probabilities, level)
  labels = list(range(classes))
  assert found["negative_log_likelihood"] == pytest.approx(
    sk.log_loss(level, probabilities, labels=labels), abs=1e-9)
  assert found["brier"] == pytest.approx(sk.brier_score_loss(
    level, probabilities if classes > 2 else probabilities[:, 1], labels=labels,
    scale_by_half=False), abs=1e-9)


@pytest.mark.parametrize("known", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found(known):
  """Probabilities that were right, made too sure or too shy, are brought back."""
  probabilities, level = graded(8000)
  bent = calibration.cooled(probabilities, 1 / known)
  found = calibration.temperature(bent, level)
  assert found == pytest.approx(known, rel=0.06)
  mended = calibration.cooled(bent, found)
  before, after = (calibration.of_probabilities(p, level)["expected_calibration_error"]
                   for p in (bent, mended))
  assert after < 0.02 and (known == 1 or after < before / 5)


def test_the_temperature_is_where_the_slope_is_nothing():
  probabilities, level = graded(300, scale=3)
  found = calibration.temperature(probabilities, level)
  logits = np.log(probabilities)
  own = logits[np.arange(300), level]
  # d/dβ of the mean log-likelihood of softmax(β log p) at β = 1/T.
  slope = (own - (special.softmax(logits / found, axis=1) * logits).sum(1)).mean()
  assert abs(slope) < 1e-5


def test_log_probabilities_serve_as_logits():
  """The model's own logits and log p give the same at any temperature."""
  logits = np.random.default_rng(0).normal(0, 2, (50, 5))
  probabilities = special.softmax(logits, axis=1)
  np.testing.assert_allclose(
    calibration.cooled(probabilities, 1.7), special.softmax(logits / 1.7, axis=1), atol=1e-12)
  np.testing.assert_array_equal(
    calibration.cooled(probabilities, 1.7).argmax(1), probabilities.argmax(1))


def test_ends_of_the_range_and_none():
  level = np.arange(5).repeat(4)
  right = metrics.probabilities_of(3.0 * np.eye(5)[level])
  assert calibration.temperature(right, level) == pytest.approx(0.05)
  wrong = metrics.probabilities_of(9.0 * np.eye(5)[(level + 1) % 5])
  assert calibration.temperature(wrong, level) == pytest.approx(20.0)
  assert calibration.temperature(np.full((20, 5), 0.2), level) == 1.0
  certain = np.eye(5)[(level + 1) % 5]  # written as 0: no less is known than half a grain
  assert calibration.negative_log_likelihood(certain, level) == pytest.approx(33 * np.log(2))
