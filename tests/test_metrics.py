"""metrics: against scikit-learn, by hand, and where nothing is defined."""

import json
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax import metrics


def graded(n, seed=0, patients=None, noise=1.0):
  """Levels, patients and probabilities that know something of the levels."""
  rng = np.random.default_rng(seed)
  level = rng.choice(5, n, p=[0.5, 0.1, 0.2, 0.1, 0.1])
  patient = np.array([f"p{i // 2}" for i in range(n)] if patients is None else patients)
  logits = -np.abs(np.arange(5) - level[:, None] - rng.normal(0, noise, (n, 1))) * 1.5
  return level, patient, metrics.probabilities_of(logits)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed):
  rng = np.random.default_rng(seed)
  level, grade = rng.integers(0, 5, (2, 60))
  if seed == 4:  # A level that neither side holds still takes its place on the scale.
    level, grade = np.where(level == 2, 1, level), np.where(grade == 2, 3, grade)
  expected = sk.cohen_kappa_score(level, grade, weights="quadratic", labels=range(5))
  assert metrics.quadratic_weighted_kappa(level, grade) == pytest.approx(expected, abs=1e-12)


def test_undefined_is_none_and_strict_json():
  level, probabilities = np.zeros(4, int), np.tile([0.9, 0.05, 0.03, 0.01, 0.01], (4, 1))
  patient = np.array(["a", "a", "b", "c"])
  for rows in (4, 0):
    found = metrics.grading_metrics(
      level[:rows], patient[:rows], probabilities[:rows], [0.5, 1.5, 2.5, 3.5], bootstrap=20)
    json.dumps(found, allow_nan=False)
    for key in ("quadratic_weighted_kappa", "kappa_argmax", "kappa_ci", "auc_referable",
                "auc_referable_ci", "auc_any", "sensitivity_at_specificity_50_any",
                "sensitivity_at_specificity_50_referable"):
      assert found[key] is None, key
    assert found["images"] == rows
  assert found["accuracy"] is None and found["expected_calibration_error"] is None


def test_all_right_in_one_class_counts_as_right():
  found = metrics.grading_metrics(
    np.zeros(3, int), np.array(list("abc")), np.eye(5)[[0, 0, 0]], [0.5, 1.5, 2.5, 3.5])
  assert found["accuracy"] == 1 and found["expected_calibration_error"] == 0


def test_decide_reaches_a_threshold_at_equality():
  assert metrics.decide(np.array([0.0, 0.5, 1.49, 3.5, 4.0]), [0.5, 1.5, 2.5, 3.5]).tolist() == [
    0, 1, 1, 4, 4]


def test_probabilities_add_up_exactly_in_any_order():
  """Sums of float softmaxes differ in the last bit by their order, and break or make ties."""
  logits = np.random.default_rng(0).normal(0, 4, (500, 5))
  found = metrics.probabilities_of(logits)
  raised = np.exp(logits)
  np.testing.assert_allclose(found, raised / raised.sum(1, keepdims=True), atol=1e-9)
  np.testing.assert_array_equal(found[:, 1:].sum(1), 1 - found[:, 0])
  np.testing.assert_array_equal(found[:, ::-1].cumsum(1)[:, 2], 1 - (found[:, 1] + found[:, 0]))


def test_expected_grade():
  assert metrics.expected_grade(np.array([[0.5, 0, 0, 0, 0.5], [0, 1, 0, 0, 0]])).tolist() == [2, 1]


def test_tuning_recovers_a_bent_scale():
  """Scores squeezed into 0..2 need thresholds the rounding rule does not have."""
  rng = np.random.default_rng(1)
  level = rng.integers(0, 5, 3000)
  score = level * 0.4 + rng.uniform(-0.15, 0.15, 3000)
  thresholds = metrics.tune_thresholds(score, level)
  assert metrics.quadratic_weighted_kappa(level, metrics.decide(score, thresholds)) > 0.999
  np.testing.assert_allclose(thresholds, [0.2, 0.6, 1.0, 1.4], atol=0.06)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20, 60, 200])
def test_tuning_is_monotone_deterministic_and_never_worse_than_the_start(n):
  for seed in range(8):
    level, _, probabilities = graded(n, seed, noise=1.5)
    score = metrics.expected_grade(probabilities)
    tuned = metrics.tune_thresholds(score, level)
    assert np.all(np.diff(tuned) >= 0) and np.isfinite(tuned).all() and tuned.shape == (4,)
    np.testing.assert_array_equal(tuned, metrics.tune_thresholds(score, level))
    start = metrics.quadratic_weighted_kappa(
      level, metrics.decide(score, metrics.start_thresholds(5)))
    if start is not None:
      after = metrics.quadratic_weighted_kappa(level, metrics.decide(score, tuned))
      assert after >= start - 1e-12


def test_tuning_does_not_chase_a_handful():
  """Where the start is already perfect nothing moves; one level alone leaves the start."""
  level = np.array([0, 1, 2, 3, 4])
  start = metrics.start_thresholds(5)
  np.testing.assert_array_equal(metrics.tune_thresholds(level + 0.1, level), start)
  for score, same in ((np.array([1.0, 3.0]), np.array([2, 2])), (np.zeros(0), np.zeros(0, int))):
    np.testing.assert_array_equal(metrics.tune_thresholds(score, same), start)


def test_one_odd_example_does_not_drag_the_thresholds():
  """A severe eye scored .3 among twenty clear ones: kappa 1 would need .2, .2, .2, 3.5."""
  score = np.array([0.1] * 10 + [0.3] + [3.9] * 10)
  level = np.array([0] * 10 + [3] + [4] * 10)
  np.testing.assert_allclose(metrics.tune_thresholds(score, level), [0.2, 1.5, 2.5, 3.5])
  many = metrics.tune_thresholds(np.tile(score, 50), np.tile(level, 50))
  np.testing.assert_allclose(many, [0.2, 0.2, 0.2, 3.5], atol=1e-9)


def test_tuning_holds_on_fresh_data():
  level, _, probabilities = graded(4000, 3, noise=0.8)
  score = metrics.expected_grade(probabilities) * 0.7 + 0.3
  tuned = metrics.tune_thresholds(score[:2000], level[:2000])
  fresh, true = score[2000:], level[2000:]
  gain = metrics.quadratic_weighted_kappa(true, metrics.decide(fresh, tuned)) - (
    metrics.quadratic_weighted_kappa(true, metrics.decide(fresh, metrics.start_thresholds(5))))
  assert gain > 0.01


def test_sensitivity_at_specificity_by_hand():
  positive = np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
  score = np.array([0.1, 0.2, 0.6, 0.7, 0.15, 0.5, 0.8, 0.9])
  # At .5 two of four negatives are above (specificity .5) and three of four positives.
  assert metrics.sensitivity_at_specificity(positive, score) == 0.75


def test_calibration_by_hand():
  probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
  level = np.array([0, 1, 0, 1])
  # .9 is right half the time (off by .4); .6 always right (off by .4).
  assert metrics.expected_calibration_error(probabilities, level) == pytest.approx(0.4)
  _, _, count = metrics.reliability(probabilities, level)
  assert count.sum() == 4


def test_bootstrap_area_is_scikit_learns_on_a_whole_resample():
  """One resample's weighted ranks equal the AUC of the rows written out, ties included."""
  level, patient, probabilities = graded(80, 5)
  score = probabilities[:, 2:].sum(1).round(1)
  grade = probabilities.argmax(1)
  kappa, area = metrics.bootstrap_intervals(patient, level, grade, score, resamples=1, seed=9)
  names, owner = np.unique(patient, return_inverse=True)
  drawn = np.random.default_rng(9).integers(0, len(names), (1, len(names)))[0]
  rows = np.concatenate([np.flatnonzero(owner == one) for one in drawn])
  assert area[0] == pytest.approx(sk.roc_auc_score(level[rows] >= 2, score[rows]), abs=1e-12)
  expected = sk.cohen_kappa_score(level[rows], grade[rows], weights="quadratic", labels=range(5))
  assert kappa[0] == pytest.approx(expected, abs=1e-12)


def test_bootstrap_is_over_patients():
  """A copy of each eye adds no knowledge under its own patient; under a new one it seems to."""
  level, _, probabilities = graded(120, 6, noise=1.5)
  grade, score = probabilities.argmax(1), probabilities[:, 2:].sum(1)
  single = np.array([f"p{i}" for i in range(120)])
  once = metrics.bootstrap_intervals(single, level, grade, score, resamples=300)
  twice = [np.tile(values, 2) for values in (level, grade, score)]
  together = metrics.bootstrap_intervals(np.tile(single, 2), *twice, resamples=300)
  np.testing.assert_allclose(once, together)
  apart = metrics.bootstrap_intervals(
    np.array([f"p{i}" for i in range(240)]), *twice, resamples=300)
  assert np.diff(apart[0]) < 0.85 * np.diff(once[0])


def test_bootstrap_holds_the_point_and_takes_seconds():
  level, patient, probabilities = graded(1000, 7)
  begin = time.perf_counter()
  found = metrics.grading_metrics(level, patient, probabilities, [0.5, 1.5, 2.5, 3.5])
  assert time.perf_counter() - begin < 3
  low, high = found["kappa_ci"]
  assert low < found["quadratic_weighted_kappa"] < high and high - low < 0.15
  low, high = found["auc_referable_ci"]
  assert low < found["auc_referable"] < high


def test_bootstrap_blocks_change_nothing_but_memory(monkeypatch):
  level, patient, probabilities = graded(60, 8)
  arguments = (patient, level, probabilities.argmax(1), probabilities[:, 2:].sum(1))
  whole = metrics.bootstrap_intervals(*arguments, resamples=50)
  monkeypatch.setattr(metrics, "_BLOCK", 60 * 7)
  np.testing.assert_allclose(metrics.bootstrap_intervals(*arguments, resamples=50), whole)


def test_grading_metrics_against_scikit_learn():
  level, patient, probabilities = graded(200, 2)
  thresholds = [0.6, 1.4, 2.5, 3.2]
  found = metrics.grading_metrics(level, patient, probabilities, thresholds, bootstrap=10)
  grade = np.digitize(probabilities @ np.arange(5), thresholds)
  assert found["accuracy"] == pytest.approx(sk.accuracy_score(level, grade))
  assert found["confusion_matrix"] == sk.confusion_matrix(level, grade, labels=range(5)).tolist()
  assert found["kappa_thresholds"] == found["quadratic_weighted_kappa"] == pytest.approx(
    sk.cohen_kappa_score(level, grade, weights="quadratic", labels=range(5)))
  assert found["auc_any"] == pytest.approx(sk.roc_auc_score(level >= 1, 1 - probabilities[:, 0]))
  assert found["patients"] == 100 and found["images"] == 200
