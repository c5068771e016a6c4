"""Agreement of grades with levels, with intervals over patients: arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from medattn_jax import metrics

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
  rules = {}
  for number, (name, grade) in enumerate(grades.items()):
    kappa = metrics.quadratic_weighted_kappa(level, grade, num_classes)
    rules[name] = {
      "kappa": kappa,
      "kappa_ci": None if kappa is None else metrics.interval(found[2 * number]),
      "accuracy": float(np.mean(np.asarray(grade) == level)),
      "accuracy_ci": metrics.interval(found[2 * number + 1])}
  return rules
