"""analysis.ensemble: the mean of one is that one; gains are differences on the same patients."""

import itertools

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax import metrics
from medattn_jax.analysis import ensemble


def answered(seed, level, noise=1.2):
  """Probabilities [n, 5] of a model that sees the levels through noise."""
  seen = level + np.random.default_rng(seed).normal(0, noise, len(level))
  return metrics.probabilities_of(-np.abs(np.arange(5) - seen[:, None]) * 1.5)


@pytest.fixture
def eyes():
  rng = np.random.default_rng(9)
  return rng.integers(0, 5, 160), np.repeat(np.arange(80), 2).astype(str)


def test_the_mean_of_one_is_itself_and_order_does_not_matter(eyes):
  members = [answered(seed, eyes[0]) for seed in range(3)]
  np.testing.assert_array_equal(ensemble.mean(members[:1]), members[0])
  whole = ensemble.mean(members)
  for order in itertools.permutations(members):
    np.testing.assert_array_equal(ensemble.mean(order), whole)
  np.testing.assert_allclose(whole, sum(m / 3 for m in members), atol=1e-15)
  np.testing.assert_allclose(whole.sum(1), 1, atol=1e-15)


def run(level, patient, members, **options):
  thresholds = metrics.start_thresholds(5)
  named = {str(at): ensemble.Graded(own, thresholds) for at, own in enumerate(members)}
  whole = ensemble.Graded(ensemble.mean(members), thresholds)
  return ensemble.figures(
    level, patient, {**named, "all": whole}, whole="all", singles=list(named), best="0",
    **({"resamples": 200} | options))


def test_figures_are_scikit_learns_and_gains_their_differences(eyes):
  level, patient = eyes
  members = [answered(seed, level) for seed in range(3)]
  found = run(level, patient, members)
  figures = {}
  for name, own in zip(("0", "1", "2", "all"), [*members, ensemble.mean(members)], strict=True):
    grade, likeliest = np.floor(own @ np.arange(5) + 0.5), own.argmax(1)
    figures[name] = {
      "kappa": sk.cohen_kappa_score(level, grade, weights="quadratic"),
      "kappa_argmax": sk.cohen_kappa_score(level, likeliest, weights="quadratic"),
      "accuracy": (grade == level).mean(), "accuracy_argmax": (likeliest == level).mean(),
      "auc_referable": sk.roc_auc_score(level >= 2, own[:, 2:].sum(1))}
    for key, value in figures[name].items():
      own_figures = found["answers"][name]
      assert own_figures[key] == pytest.approx(value, abs=1e-9)
      assert own_figures[f"{key}_ci"][0] < value < own_figures[f"{key}_ci"][1]
  gain = found["gain"]
  for key in ensemble.FIGURES:
    singles = [figures[name][key] for name in "012"]
    assert gain["over_best"][key] == pytest.approx(figures["all"][key] - singles[0], abs=1e-9)
    assert gain["over_mean"][key] == pytest.approx(
      figures["all"][key] - np.mean(singles), abs=1e-9)
  assert gain["over_mean"]["kappa"] > 0 and gain["over_mean"]["kappa_ci"][0] > 0


def test_the_interval_of_a_gain_is_paired(eyes):
  """Against resamples drawn and graded one by one; and far narrower than of unpaired figures."""
  level, patient = eyes
  one = answered(0, level)
  other = 0.9 * one + 0.1 * answered(1, level)
  found = run(level, patient, [one, other], resamples=300)["gain"]["over_best"]["accuracy_ci"]
  rng, rows = np.random.default_rng(5), np.arange(160).reshape(80, 2)
  right = lambda p: np.floor(p @ np.arange(5) + 0.5) == level
  change = right(ensemble.mean([one, other])).astype(float) - right(one)
  drawn = [change[rows[rng.integers(0, 80, 80)]].mean() for _ in range(2000)]
  assert found == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.01)
  alike = run(level, patient, [one, one])["gain"]
  assert all(alike["over_best"][f"{key}_ci"] == [0, 0] for key in ensemble.FIGURES)


def test_one_level_alone_is_null(eyes):
  level, patient = np.ones(160, int), eyes[1]
  found = run(level, patient, [answered(seed, level, 0.01) for seed in range(2)])
  for own in (found["answers"]["all"], found["gain"]["over_best"], found["gain"]["over_mean"]):
    assert own["auc_referable"] is None and own["auc_referable_ci"] is None


def test_the_best_has_the_highest_kappa(eyes):
  level, _ = eyes
  named = {str(noise): ensemble.Graded(answered(3, level, noise), None) for noise in (2, 0.5, 1)}
  assert ensemble.best_of(level, named) == "0.5"
  assert ensemble.best_of(np.ones(160, int), named) in named  # no kappa: still one of them
