"""Screening: who is to be referred, by a support vector machine on the probabilities (papers §1).

The Messidor protocol: the five probabilities of each image feed an SVM with an RBF kernel, which
tells referable from not by cross-validation, or ill from well after training on another set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from medattn_jax import metrics
from medattn_jax.analysis import delong, intervals

FOLDS, INNER_FOLDS = 10, 5
# Smooth before sharp, so that of equals the smoothest is taken.
COSTS, WIDTHS = (0.1, 1.0, 10.0), (0.01, 0.1, 1.0)
# C and gamma are searched on no more images than this: an SVM's time grows with their square.
SEARCHED = 4000
RESAMPLES = 2000
# Where a screening programme reads its curve: (what is asked for, at how much of the other).
POINTS = (
  ("sensitivity", 0.5), ("sensitivity", 0.9), ("sensitivity", 0.95), ("specificity", 0.95))


class Scored(NamedTuple):
  """What a machine says of images that it was not trained on.

  Attributes:
    score: float64 [n]; the decision function, above 0 where positive is more likely.
    settings: {C, gamma} of each machine that was trained.
    fold: int64 [n]; which machine scored it.
  """

  score: np.ndarray
  settings: list[dict[str, float]]
  fold: np.ndarray


def cross_validated(
  probabilities: np.ndarray, positive: np.ndarray, patient: np.ndarray, *, folds: int = FOLDS,
  seed: int = 0,
) -> Scored | None:
  """Scores by machines trained on the other folds; no patient is in two folds.

  Folds keep the share of positives as far as patients allow. C and gamma are chosen anew within
  each training part (by its own inner folds), so that no image helps to choose what scores it.
  There are fewer folds where fewer patients have images of one kind; None where they are too few
  for two.

  Args:
    probabilities: float [n, C].
    positive: bool [n].
    patient: [n]; whose image it is.
    folds: how many.
    seed: of the folds.
  """
  splits = _splits(positive, patient, folds, seed)
  if splits is None:
    return None
  score, fold = np.zeros(len(positive)), np.zeros(len(positive), np.int64)
  settings = []
  for number, (rest, held) in enumerate(splits):
    machine, chosen = _train(probabilities[rest], positive[rest], patient[rest], seed)
    score[held], fold[held] = machine.decision_function(probabilities[held]), number
    settings.append(chosen)
  return Scored(score, settings, fold)


def transferred(
  probabilities: np.ndarray, positive: np.ndarray, patient: np.ndarray, asked: np.ndarray, *,
  seed: int = 0,
) -> Scored | None:
  """Scores of `asked` float [m, C] by a machine trained on another set, given first.

  None where that set has images of one kind alone.
  """
  if len(np.unique(positive)) < 2:
    return None
  machine, chosen = _train(probabilities, positive, patient, seed)
  return Scored(machine.decision_function(asked), [chosen], np.zeros(len(asked), np.int64))


def _train(
  probabilities: np.ndarray, positive: np.ndarray, patient: np.ndarray, seed: int
) -> tuple[Pipeline, dict[str, float]]:
  """The machine whose C and gamma rank best in inner folds by patient, trained on all rows."""
  rows = _some(patient, SEARCHED, seed)
  splits = _splits(positive[rows], patient[rows], INNER_FOLDS, seed)
  chosen = {"C": 1.0, "gamma": 0.1}  # where there is too little to choose by
  best = -1.0
  for cost in COSTS if splits else ():
    for width in WIDTHS:
      score = cross_val_predict(
        _machine(cost, width), probabilities[rows], positive[rows], cv=splits,
        method="decision_function")
      area = metrics.auc(positive[rows], score)
      if area > best + 1e-9:
        best, chosen = area, {"C": cost, "gamma": width}
  return _machine(chosen["C"], chosen["gamma"]).fit(probabilities, positive), chosen


def _machine(cost: float, width: float) -> Pipeline:
  """Probabilities at mean zero and deviation one, for gamma to mean the same on any set."""
  return make_pipeline(StandardScaler(), SVC(kernel="rbf", C=cost, gamma=width, cache_size=500))


def _splits(
  positive: np.ndarray, patient: np.ndarray, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]] | None:
  """(rows to train on, rows to score) of each fold; None where no two folds have both kinds."""
  patient = np.asarray(patient, str)
  having = [len(np.unique(patient[positive == kind])) for kind in (False, True)]
  for count in range(min(folds, *having), 1, -1):
    maker = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    splits = list(maker.split(positive, positive, patient))
    if all(len(np.unique(positive[rest])) == 2 and len(held) for rest, held in splits):
      return splits
  return None


def _some(patient: np.ndarray, most: int, seed: int) -> np.ndarray:
  """Rows of patients drawn by chance until there are `most` rows; all rows where they are fewer."""
  _, owner = np.unique(np.asarray(patient, str), return_inverse=True)
  if len(owner) <= most:
    return np.arange(len(owner))
  order = np.random.default_rng(seed).permutation(owner.max() + 1)
  count = np.cumsum(np.bincount(owner)[order])
  return np.flatnonzero(np.isin(owner, order[: max(1, np.searchsorted(count, most, "right"))]))


def sensitivity_under(
  positive: np.ndarray, score: np.ndarray, specificity: float
) -> metrics.Statistic:
  """The highest sensitivity at a specificity not under `specificity`, under weights."""
  rates = _counts(positive, score)

  def sensitivity(weight: np.ndarray) -> np.ndarray:
    true, false, ill, well = rates(weight)
    reached = (false <= (1 - specificity) * well + 1e-9).sum(1, keepdims=True)
    return _ratio(np.take_along_axis(true, reached - 1, 1), ill, well)

  return sensitivity


def specificity_under(
  positive: np.ndarray, score: np.ndarray, sensitivity: float
) -> metrics.Statistic:
  """The highest specificity at a sensitivity not under `sensitivity`, under weights."""
  rates = _counts(positive, score)

  def specificity(weight: np.ndarray) -> np.ndarray:
    true, false, ill, well = rates(weight)
    short = (true < sensitivity * ill - 1e-9).sum(1, keepdims=True)
    return _ratio(well - np.take_along_axis(false, np.minimum(short, true.shape[1] - 1), 1),
                  well, ill)

  return specificity


def _counts(positive: np.ndarray, score: np.ndarray):
  """weight float [r, n] → (true, false positives [r, k] as more are called, positives, negatives).

  The first column calls none; a column ends where the score falls.
  """
  order = np.argsort(-np.asarray(score, np.float64), kind="stable")
  ill = np.asarray(positive, bool)[order]
  ranked = np.asarray(score)[order]
  ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))

  def counts(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    weight = weight[:, order]
    found = [np.cumsum(weight * kind, axis=1)[:, ends] for kind in (ill, ~ill)]
    found = [np.concatenate([np.zeros_like(part[:, :1]), part], axis=1) for part in found]
    return (*found, *(part[:, -1:] for part in found))

  return counts


def _ratio(part: np.ndarray, whole: np.ndarray, other: np.ndarray) -> np.ndarray:
  """part / whole [r], NaN in a resample of one kind alone."""
  defined = (whole > 0) & (other > 0)
  return np.where(defined, part / np.where(defined, whole, 1), np.nan)[:, 0]


def of_scores(
  positive: np.ndarray, score: np.ndarray, patient: np.ndarray, called: np.ndarray, *,
  resamples: int = RESAMPLES, seed: int = 0,
) -> dict[str, object]:
  """Area, accuracy and operating points, with intervals over patients.

  Args:
    positive: bool [n].
    score: float [n]; higher means positive is more likely.
    patient: [n]; whose image it is.
    called: bool [n]; the decision, for accuracy.
    resamples, seed: of the bootstrap. What the scores were fitted to is not resampled.

  Returns:
    images, positives, auc, auc_ci, accuracy, accuracy_ci, and for each of POINTS, by a name such as
    sensitivity_at_specificity_90, {value, interval}. None where all or none are positive, and
    without images.
  """
  positive, patient = np.asarray(positive, bool), np.asarray(patient, str)
  having = {kind: (int((positive == kind).sum()), len(np.unique(patient[positive == kind])))
            for kind in (True, False)}
  right = np.asarray(called, bool) == positive
  makers = {"sensitivity": sensitivity_under, "specificity": specificity_under}
  statistics = [metrics.mean_under(right)]
  statistics += [makers[asked](positive, score, at) for asked, at in POINTS]
  resampled = metrics.resampled(patient, statistics, resamples, seed)
  everyone = np.ones((1, len(positive)))
  accuracy = float(right.mean()) if len(right) else None
  auc, auc_ci = metrics.auc(positive, score), None
  if auc is not None:
    _, variance = delong.areas(positive, np.asarray(score)[None], patient)
    auc_ci = intervals.of_area(auc, variance[0, 0])
  found = {
    "images": len(positive), "positives": having[True][0], "auc": auc, "auc_ci": auc_ci,
    "accuracy": accuracy,
    "accuracy_ci": intervals.of_share(
      accuracy, resampled[0], len(positive), len(np.unique(patient)))}
  for (asked, at), statistic, spread in zip(POINTS, statistics[1:], resampled[1:], strict=True):
    value = None if auc is None else float(statistic(everyone)[0])
    interval = intervals.of_share(value, spread, *having[asked == "sensitivity"])
    found[point_name(asked, at)] = {"value": value, "interval": interval}
  return found


def point_name(asked: str, at: float) -> str:
  """sensitivity_at_specificity_90 and the like."""
  other = "specificity" if asked == "sensitivity" else "sensitivity"
  return f"{asked}_at_{other}_{100 * at:.0f}"
