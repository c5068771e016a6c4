"""What averaging gains over single answers, with intervals over patients. Arrays only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from medattn_jax import metrics

FIGURES = ("kappa", "kappa_argmax", "accuracy", "accuracy_argmax", "auc_referable")


class Graded(NamedTuple):
  """One way of answering for the same photographs.

  Attributes:
    probabilities: float64 [n, C].
    thresholds: float64 [C-1]; of the decision on the expected grade, tuned elsewhere. None: the
      likeliest class decides.
  """

  probabilities: np.ndarray
  thresholds: np.ndarray | None


def mean(members: Sequence[np.ndarray]) -> np.ndarray:
  """The mean of probabilities [n, C] of several: float64 [n, C].

  Of probabilities as metrics.probabilities_of makes them the sum is exact, and so the mean the
  same in whatever order they come; of one it is that one.
  """
  return np.sum(members, axis=0, dtype=np.float64) / len(members)


def figures(
  level: np.ndarray, patient: np.ndarray, answers: Mapping[str, Graded], *, whole: str,
  singles: Sequence[str], best: str, resamples: int, seed: int = 0,
) -> dict[str, dict]:
  """How good each way of answering is, and what the mean of them gains.

  All see the same resamples of patients, so a gain's interval is that of the paired difference.
  Thresholds are not tuned anew in a resample.

  Args:
    level: int [n].
    patient: [n].
    answers: by name.
    whole: the name of the mean.
    singles: the names of what it is a mean of.
    best: the one of them that is best elsewhere (on validation).
    resamples: of the patients.
    seed: of the resamples.

  Returns:
    {"answers": {name: {figure: value, figure_ci: [low, high]}}, "gain": {"over_best",
    "over_mean": {figure: value, figure_ci}}}; the figures are FIGURES, None where undefined.
  """
  level = np.asarray(level, np.int64)
  classes = next(iter(answers.values())).probabilities.shape[1]
  every = np.ones((1, len(level)))
  named, found = {}, {}
  for name, own in answers.items():
    statistics = _statistics(level, own, classes)
    named[name] = np.array([one(every)[0] for one in statistics])
    # One at a time: the draw is a function of the seed, so all are given the same patients.
    found[name] = metrics.resampled(patient, statistics, resamples, seed)

  def shown(value: np.ndarray, drawn: np.ndarray) -> dict[str, float | list[float] | None]:
    figures = {}
    for at, name in enumerate(FIGURES):
      defined = bool(np.isfinite(value[at]))
      figures[name] = float(value[at]) if defined else None
      figures[f"{name}_ci"] = metrics.interval(drawn[at]) if defined else None
    return figures

  single = lambda of: np.mean([of[name] for name in singles], axis=0)
  return {
    "answers": {name: shown(named[name], found[name]) for name in answers},
    "gain": {
      "over_best": {"best": best, **shown(named[whole] - named[best], found[whole] - found[best])},
      "over_mean": shown(named[whole] - single(named), found[whole] - single(found))}}


def _statistics(level: np.ndarray, own: Graded, classes: int) -> list[metrics.Statistic]:
  decided = metrics.grades(own.probabilities, own.thresholds)
  likeliest = own.probabilities.argmax(1)
  return [
    metrics.kappa_under(level, decided, classes), metrics.kappa_under(level, likeliest, classes),
    metrics.mean_under(decided == level), metrics.mean_under(likeliest == level),
    metrics.auc_under(level >= 2, own.probabilities[:, 2:].sum(1))]


def best_of(level: np.ndarray, answers: Mapping[str, Graded]) -> str:
  """The name of the highest kappa; of the highest accuracy where none has a kappa."""

  def worth(name: str) -> tuple[float, float]:
    own = answers[name]
    grade = metrics.grades(own.probabilities, own.thresholds)
    kappa = metrics.quadratic_weighted_kappa(level, grade, own.probabilities.shape[1])
    return (-2.0 if kappa is None else kappa, float(np.mean(grade == level)))

  return max(answers, key=worth)
