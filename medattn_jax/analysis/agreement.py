"""Agreement of grades with levels, with intervals over patients: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from medattn_jax import metrics
from medattn_jax.analysis import intervals

RESAMPLES = 2000


def of_rules(
  level: np.ndarray, patient: np.ndarray, grades: Mapping[str, np.ndarray], num_classes: int,
  *, resamples: int = RESAMPLES, seed: int = 0,
) -> dict[str, dict[str, float | list[float] | None]]:
  """Kappa and accuracy of several decisions on the same images.

  Args:
    level: int [n].
    patient: [n]; whose image it is.
    grades: int [n] by the name of the rule that gave them. What a rule was tuned on is not
      resampled: its intervals are those of the tuned rule.
    num_classes: C.
    resamples, seed: of the bootstrap over patients.

  Returns:
    {rule: {kappa, kappa_ci, accuracy, accuracy_ci}}; None where undefined.
  """
  statistics = [
    statistic for grade in grades.values()
    for statistic in (metrics.kappa_under(level, grade, num_classes),
                      metrics.mean_under(np.asarray(grade) == level))]
  found = metrics.resampled(patient, statistics, resamples, seed)
  images, patients = len(level), len(np.unique(np.asarray(patient, str)))
  rules = {}
  for number, (name, grade) in enumerate(grades.items()):
    kappa = metrics.quadratic_weighted_kappa(level, grade, num_classes)
    accuracy = float(np.mean(np.asarray(grade) == level))
    rules[name] = {
      "kappa": kappa, "kappa_ci": intervals.of_kappa(kappa, found[2 * number], patients),
      "accuracy": accuracy,
      "accuracy_ci": intervals.of_share(accuracy, found[2 * number + 1], images, patients)}
  return rules
