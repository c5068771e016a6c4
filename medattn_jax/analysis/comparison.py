"""Two models on the same images: is one better, by how much, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medattn_jax import metrics
from medattn_jax.analysis import delong, intervals

RESAMPLES = 2000


def of_areas(
  positive: np.ndarray, scores: np.ndarray, patient: np.ndarray, *, resamples: int = RESAMPLES,
  seed: int = 0,
) -> dict[str, object]:
  """The areas under two ROC curves of the same images, and their difference in three ways.

  Args:
    positive: bool [n].
    scores: float [2, n]; higher means positive is more likely.
    patient: [n]; whose image it is.
    resamples, seed: of the bootstrap.

  Returns:
    images, positives, areas [2] with their intervals, and {difference, interval, z, p} of the
    second less the first: `clustered` (Obuchowski: eyes of one patient are one observation; the one
    to report), `independent` (DeLong's own test, for images that are all of different patients)
    and `bootstrap` over patients. None where all or none are positive.
  """
  positive, scores = np.asarray(positive, bool), np.asarray(scores, np.float64)
  found: dict[str, object] = {"images": len(positive), "positives": int(positive.sum())}
  if positive.all() or not positive.any():
    return found | dict.fromkeys(
      ("areas", "intervals", "clustered", "independent", "bootstrap"))
  areas, covariance = delong.areas(positive, scores, patient)
  _, alone = delong.areas(positive, scores)
  resampled = metrics.resampled(
    patient, [metrics.auc_under(positive, score) for score in scores], resamples, seed)
  return found | {
    "areas": areas.tolist(),
    "intervals": [intervals.of_area(area, covariance[k, k]) for k, area in enumerate(areas)],
    "clustered": delong.compared(areas, covariance),
    "independent": delong.compared(areas, alone),
    "bootstrap": intervals.of_difference(
      float(areas[1] - areas[0]), resampled[1] - resampled[0], _patients(patient))}


def of_kappas(
  level: np.ndarray, grades: Sequence[np.ndarray], patient: np.ndarray, num_classes: int, *,
  resamples: int = RESAMPLES, seed: int = 0,
) -> dict[str, object]:
  """Quadratic weighted kappa of two decisions on the same images, and their difference.

  Args:
    level: int [n].
    grades: two of int [n]. What they were tuned on is not resampled.
    patient: [n]; whose image it is.
    num_classes: C.
    resamples, seed: of the paired bootstrap over patients.

  Returns:
    kappas [2] with their intervals, difference {difference, interval, p} of the second less the
    first; None where undefined.
  """
  resampled = metrics.resampled(
    patient, [metrics.kappa_under(level, grade, num_classes) for grade in grades], resamples, seed)
  kappas = [metrics.quadratic_weighted_kappa(level, grade, num_classes) for grade in grades]
  difference = None if None in kappas else kappas[1] - kappas[0]
  patients = _patients(patient)
  return {
    "kappas": kappas,
    "intervals": [intervals.of_kappa(kappa, spread, patients)
                  for kappa, spread in zip(kappas, resampled, strict=True)],
    "difference": intervals.of_difference(difference, resampled[1] - resampled[0], patients)}


def _patients(patient: np.ndarray) -> int:
  return len(np.unique(np.asarray(patient, str)))
