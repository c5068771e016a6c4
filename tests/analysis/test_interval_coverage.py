"""Intervals hold the true value in 93 to 97 of 100 sets that are drawn from a known population.

A patient has two eyes that are ill alike (correlation .6), and a model that errs alike on both. The
truth is that of 200,000 patients. Two standard errors of a share of 500 sets are two in a
hundred, so an interval of 95 % lies in that range.
"""

import functools

import numpy as np
import pytest

from medattn_jax import metrics
from medattn_jax.analysis import agreement, comparison, delong, intervals, screening

SETS, PATIENTS, RESAMPLES = 500, 200, 400
EDGES = (0.6, 0.9, 1.5, 1.9)


def draw(seed, patients=PATIENTS):
  """Levels [n], patients [n], and the scores [2, n] of a model and of a worse one like it."""
  rng = np.random.default_rng(seed)
  both = lambda spread: np.repeat(rng.normal(0, spread, patients), 2)
  each = lambda spread: rng.normal(0, spread, 2 * patients)
  ill = both(0.6**0.5) + each(0.4**0.5)
  seen = ill + both(0.4) + each(0.4)
  scores = np.stack([seen + each(0.3), seen + both(0.3) + each(0.4)])
  return np.digitize(ill, EDGES), np.repeat(np.arange(patients), 2).astype(str), scores


def grades(score):
  return np.digitize(score, EDGES)


@functools.cache
def truth():
  """Every figure of the population."""
  level, _, scores = draw(10**6, patients=200_000)
  found = {}
  for k, score in enumerate(scores):
    found["kappa", k] = metrics.quadratic_weighted_kappa(level, grades(score))
    found["accuracy", k] = np.mean(grades(score) == level)
    found["auc", k] = metrics.auc(level >= 2, score)
  ill, well = (np.sort(scores[0][kind]) for kind in (level >= 2, level < 2))
  for asked, at in screening.POINTS:
    found[screening.point_name(asked, at)] = (
      np.mean(ill > np.quantile(well, at)) if asked == "sensitivity"
      else np.mean(well < np.quantile(ill, 1 - at)))
  return found


def coverage(hits):
  """How many in a hundred, by name."""
  return {name: 100 * float(np.mean(held)) for name, held in hits.items()}


def within(edges, value):
  return edges is not None and edges[0] <= value <= edges[1]


def check(found, low=93, high=97):
  print({name: round(value, 1) for name, value in found.items()})
  assert all(low <= value <= high for value in found.values()), found


def test_areas_and_their_difference():
  """Obuchowski's for eyes of one patient; DeLong's where a patient has one eye in the set."""
  known = truth()
  gain = known["auc", 1] - known["auc", 0]
  hits = {"auc": [], "difference": [], "auc, one eye": [], "difference, one eye": [],
          "eyes taken for patients": []}
  for seed in range(SETS):
    level, patient, scores = draw(seed)
    positive = level >= 2
    areas, covariance = delong.areas(positive, scores, patient)
    hits["auc"].append(within(intervals.of_area(areas[0], covariance[0, 0]), known["auc", 0]))
    hits["difference"].append(within(delong.compared(areas, covariance)["interval"], gain))
    areas, covariance = delong.areas(positive[::2], scores[:, ::2])
    hits["auc, one eye"].append(
      within(intervals.of_area(areas[0], covariance[0, 0]), known["auc", 0]))
    hits["difference, one eye"].append(
      within(delong.compared(areas, covariance)["interval"], gain))
    areas, covariance = delong.areas(positive, scores)
    hits["eyes taken for patients"].append(
      within(intervals.of_area(areas[0], covariance[0, 0]), known["auc", 0]))
  found = coverage(hits)
  assert found.pop("eyes taken for patients") < found["auc"]
  check(found)


@pytest.mark.slow
def test_kappa_accuracy_and_differences():
  known = truth()
  hits = {}
  for seed in range(SETS):
    level, patient, scores = draw(seed)
    given = [grades(score) for score in scores]
    rule = agreement.of_rules(
      level, patient, {"one": given[0]}, 5, resamples=RESAMPLES, seed=seed)["one"]
    eyes = agreement.of_rules(level, np.arange(len(level)), {"one": given[0]}, 5,
                              resamples=RESAMPLES, seed=seed)["one"]
    kappas = comparison.of_kappas(
      level, given, patient, 5, resamples=RESAMPLES, seed=seed)["difference"]
    areas = comparison.of_areas(level >= 2, scores, patient, resamples=RESAMPLES, seed=seed)
    for name, edges, value in (
      ("kappa", rule["kappa_ci"], known["kappa", 0]),
      ("accuracy", rule["accuracy_ci"], known["accuracy", 0]),
      ("kappa, eyes taken for patients", eyes["kappa_ci"], known["kappa", 0]),
      ("difference of kappas", kappas["interval"], known["kappa", 1] - known["kappa", 0]),
      ("difference of areas", areas["bootstrap"]["interval"],
       known["auc", 1] - known["auc", 0])):
      hits.setdefault(name, []).append(within(edges, value))
  found = coverage(hits)
  assert found.pop("kappa, eyes taken for patients") < found["kappa"]
  check(found)


@pytest.mark.slow
def test_operating_points():
  """Also near the end of the scale (sensitivity .99), where percentiles of the bootstrap fail."""
  known = truth()
  hits, percentiles = {}, []
  for seed in range(SETS):
    level, patient, scores = draw(seed)
    positive = level >= 2
    found = screening.of_scores(
      positive, scores[0], patient, positive, resamples=RESAMPLES, seed=seed)
    for asked, at in screening.POINTS:
      name = screening.point_name(asked, at)
      hits.setdefault(name, []).append(within(found[name]["interval"], known[name]))
    statistic = screening.sensitivity_under(positive, scores[0], 0.5)
    drawn = metrics.resampled(patient, [statistic], RESAMPLES, seed)[0]
    percentiles.append(
      within(metrics.interval(drawn), known["sensitivity_at_specificity_50"]))
  found = coverage(hits)
  assert np.mean(percentiles) < 0.9
  check(found)
