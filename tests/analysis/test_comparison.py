"""analysis.comparison and agreement: paired, over patients, against scikit-learn."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax.analysis import agreement, comparison, delong


def two(patients=150, seed=0, skill=(0.9, 0.5)):
  """Levels, patients, and two scores of which the second knows more."""
  rng = np.random.default_rng(seed)
  patient = np.repeat(np.arange(patients), 2).astype(str)
  level = np.repeat(rng.integers(0, 5, patients), 2)
  shared = rng.normal(0, 0.4, 2 * patients)
  scores = np.stack([level + shared + rng.normal(0, noise, 2 * patients) for noise in skill])
  return level, patient, scores


def grades(score):
  return np.clip(np.round(score), 0, 4).astype(int)


def test_areas_and_kappas_are_scikit_learns_and_the_better_wins():
  level, patient, scores = two()
  found = comparison.of_areas(level >= 2, scores, patient)
  np.testing.assert_allclose(
    found["areas"], [sk.roc_auc_score(level >= 2, score) for score in scores], atol=1e-12)
  for way in ("clustered", "independent", "bootstrap"):
    told = found[way]
    assert told["difference"] == pytest.approx(found["areas"][1] - found["areas"][0])
    assert 0 < told["interval"][0] < told["difference"] < told["interval"][1]
    assert told["p"] < 0.05
  alone = delong.compared(*delong.areas(level >= 2, scores))
  assert found["independent"] == alone
  kappa = comparison.of_kappas(level, [grades(score) for score in scores], patient, 5)
  np.testing.assert_allclose(
    kappa["kappas"],
    [sk.cohen_kappa_score(level, grades(score), weights="quadratic") for score in scores],
    atol=1e-12)
  assert kappa["difference"]["difference"] > 0 and kappa["difference"]["p"] < 0.05
  json.dumps([found, kappa], allow_nan=False)


def test_pairing_makes_the_interval_narrower():
  """What both models share does not blur their difference."""
  level, patient, scores = two(skill=(0.5, 0.45))
  kappa = comparison.of_kappas(level, [grades(score) for score in scores], patient, 5)
  width = np.diff(kappa["difference"]["interval"])[0]
  unpaired = np.hypot(*(np.diff(edges)[0] for edges in kappa["intervals"]))
  assert width < 0.9 * unpaired
  turned = comparison.of_kappas(level, [grades(score) for score in scores[::-1]], patient, 5)
  assert turned["difference"]["difference"] == -kappa["difference"]["difference"]
  assert turned["difference"]["p"] == pytest.approx(kappa["difference"]["p"])


def test_eyes_that_repeat_each_other_are_not_taken_for_more():
  """Doubled rows: the test that takes them for independent is too sure, the others are not."""
  level, _, scores = two(60, skill=(0.8, 0.7))
  one = comparison.of_areas(level >= 2, scores, np.arange(120).astype(str))
  double = lambda values: np.repeat(values, 2, axis=-1)
  found = comparison.of_areas(
    double(level >= 2), double(scores), double(np.arange(120).astype(str)))
  width = lambda of: np.diff(of["interval"])[0]
  assert width(found["clustered"]) == pytest.approx(width(one["clustered"]), rel=1e-6)
  assert width(found["bootstrap"]) == pytest.approx(width(one["bootstrap"]), rel=0.1)
  assert width(found["independent"]) < 0.75 * width(one["independent"])


def test_the_same_model_twice_and_one_kind_alone():
  level, patient, scores = two(20)
  same = np.stack([scores[0], scores[0]])
  found = comparison.of_areas(level >= 2, same, patient)
  for way in ("clustered", "independent", "bootstrap"):
    assert found[way]["difference"] == 0 and found[way]["p"] is None
  kappa = comparison.of_kappas(level, [grades(scores[0])] * 2, patient, 5)
  assert kappa["difference"] == {"difference": 0.0, "interval": None, "p": None}
  none = comparison.of_areas(level >= 9, scores, patient)
  assert none["areas"] is None and none["clustered"] is None
  flat = np.zeros(40, int)
  assert comparison.of_kappas(flat, [flat, flat], patient, 5)["kappas"] == [None, None]


def test_rules_are_scikit_learns():
  level, patient, scores = two(50)
  given = {"first": grades(scores[0]), "second": grades(scores[1])}
  found = agreement.of_rules(level, patient, given, 5, resamples=200)
  for name, grade in given.items():
    assert found[name]["kappa"] == pytest.approx(
      sk.cohen_kappa_score(level, grade, weights="quadratic"), abs=1e-12)
    assert found[name]["accuracy"] == pytest.approx(sk.accuracy_score(level, grade), abs=1e-12)
    assert found[name]["kappa_ci"][0] < found[name]["kappa"] < found[name]["kappa_ci"][1]
