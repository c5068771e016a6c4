"""analysis.screening: points of scikit-learn's curve; machines that saw nothing they score."""

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax import metrics
from medattn_jax.analysis import screening


def graded(patients, seed=0, skill=1.5, digits=9):
  """Both eyes of patients: levels, patients and probabilities that know something of the levels."""
  rng = np.random.default_rng(seed)
  patient = np.repeat([f"p{i}" for i in range(patients)], 2)
  level = np.repeat(rng.choice(5, patients, p=[0.4, 0.1, 0.2, 0.2, 0.1]), 2)
  seen = level + rng.normal(0, 1 / skill, 2 * patients)
  return level, patient, metrics.probabilities_of(
    (-1.5 * np.abs(np.arange(5) - seen[:, None])).round(digits))


@pytest.mark.parametrize("digits", [1, 9])
def test_points_are_read_off_scikit_learns_curve(digits):
  """The best there is on the curve, with ties and without; under weights, of rows written out."""
  rng = np.random.default_rng(digits)
  positive = rng.random(150) < 0.4
  score = (rng.normal(size=150) + positive).round(digits)
  times = rng.integers(0, 4, (3, 150)).astype(float)
  times[0] = 1
  for asked, at in screening.POINTS:
    make = {"sensitivity": screening.sensitivity_under, "specificity": screening.specificity_under}
    found = make[asked](positive, score, at)(times)
    for value, weight in zip(found, times, strict=True):
      rows = np.repeat(np.arange(150), weight.astype(int))
      false, true, _ = sk.roc_curve(positive[rows], score[rows], drop_intermediate=False)
      best = true[1 - false >= at - 1e-12].max() if asked == "sensitivity" else (
        1 - false[true >= at - 1e-12].min())
      assert value == pytest.approx(best, abs=1e-12)
  whole = screening.sensitivity_under(positive, score, 0.5)(times[:1])[0]
  assert whole == metrics.sensitivity_at_specificity(positive, score, 0.5)


def test_a_resample_of_one_kind_is_undefined():
  positive, score = np.array([True, False, True]), np.array([0.1, 0.2, 0.3])
  weight = np.array([[1.0, 0, 1], [0, 1, 0], [1, 1, 1]])
  for statistic in (screening.sensitivity_under(positive, score, 0.9),
                    screening.specificity_under(positive, score, 0.9)):
    assert np.isnan(statistic(weight)).tolist() == [True, True, False]


def test_folds_keep_patients_together_and_the_share_of_positives():
  level, patient, _ = graded(120)
  positive = level >= 2
  splits = screening._splits(positive, patient, 10, seed=0)
  assert len(splits) == 10
  assert sorted(np.concatenate([held for _, held in splits])) == list(range(240))
  for rest, held in splits:
    assert not set(patient[rest]) & set(patient[held]) and len(rest) + len(held) == 240
    assert abs(positive[held].mean() - positive.mean()) < 0.1


def test_no_machine_sees_what_it_scores():
  """Noise that is known by heart when it was trained on: scores of other folds know nothing."""
  rng = np.random.default_rng(0)
  noise = metrics.probabilities_of(rng.normal(0, 2, (160, 5)))
  patient = np.repeat(np.arange(80), 2).astype(str)
  positive = np.repeat(rng.random(80) < 0.5, 2)
  # Both eyes look the same, so that a fold that splits a patient would tell.
  noise[1::2] = noise[::2]
  score = screening.cross_validated(noise, positive, patient, folds=3).score
  assert sk.roc_auc_score(positive, score) < 0.62
  seen = screening.transferred(noise, positive, patient, noise)
  sharp = screening._machine(10.0, 10.0).fit(noise, positive).decision_function(noise)
  assert sk.roc_auc_score(positive, sharp) > 0.95 and seen.score.shape == (160,)


def test_a_machine_learns_what_no_single_probability_says():
  """Referable where p1 is near one half, from either side: no threshold, but a region."""
  rng = np.random.default_rng(1)
  middle = rng.random(240)
  probabilities = np.stack([1 - middle, middle, *np.zeros((3, 240))], axis=1)
  positive = np.abs(middle - 0.5) < 0.25
  patient = np.repeat(np.arange(120), 2).astype(str)
  found = screening.cross_validated(probabilities, positive, patient, folds=2)
  assert sk.roc_auc_score(positive, found.score) > 0.97
  assert abs(sk.roc_auc_score(positive, middle) - 0.5) < 0.1
  assert len(found.settings) == 2 and sorted(set(found.fold)) == [0, 1]
  other = screening.transferred(
    probabilities[:160], positive[:160], patient[:160], probabilities[160:])
  assert sk.roc_auc_score(positive[160:], other.score) > 0.97


def test_the_search_takes_whole_patients_up_to_its_limit():
  patient = np.repeat(np.arange(100), 3).astype(str)
  rows = screening._some(patient, 50, seed=0)
  assert len(rows) == 48 and set(np.unique(patient[rows], return_counts=True)[1]) == {3}
  assert not np.array_equal(rows, screening._some(patient, 50, seed=1))
  np.testing.assert_array_equal(screening._some(patient, 300, seed=0), np.arange(300))


def test_too_few_patients_of_a_kind():
  level, patient, probabilities = graded(30)
  one = patient == patient[level >= 2][0]
  assert screening.cross_validated(probabilities, one, patient) is None
  assert screening.transferred(probabilities, level < 9, patient, probabilities) is None
  three = np.isin(patient, np.unique(patient[level >= 2])[:3])
  found = screening.cross_validated(probabilities, three, patient)
  assert len(found.settings) in (2, 3)


def test_figures_of_scores_and_of_none():
  level, patient, probabilities = graded(100)
  score, positive = probabilities[:, 2:].sum(1), level >= 2
  found = screening.of_scores(positive, score, patient, score >= 0.5, resamples=300)
  assert found["auc"] == pytest.approx(sk.roc_auc_score(positive, score), abs=1e-12)
  assert found["accuracy"] == pytest.approx(sk.accuracy_score(positive, score >= 0.5), abs=1e-12)
  assert (found["images"], found["positives"]) == (200, int(positive.sum()))
  for name in ("auc", "accuracy"):
    low, high = found[f"{name}_ci"]
    assert 0 <= low < found[name] < high <= 1
  names = {screening.point_name(*point) for point in screening.POINTS}
  assert names == {"sensitivity_at_specificity_50", "sensitivity_at_specificity_90",
                   "sensitivity_at_specificity_95", "specificity_at_sensitivity_95"}
  for name in names:
    low, high = found[name]["interval"]
    assert 0 <= low <= found[name]["value"] <= high <= 1 and low < high
  for rows in (level == 0, np.zeros(200, bool)):
    none = screening.of_scores(positive[rows], score[rows], patient[rows], positive[rows])
    assert none["auc"] is None and none["auc_ci"] is None
    assert all(none[name] == {"value": None, "interval": None} for name in names)
    assert none["accuracy"] == (1.0 if rows.any() else None)
