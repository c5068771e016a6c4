"""`medattn study kappa`: how well the grades agree with the levels, by each rule of deciding."""

from __future__ import annotations

from typing import Any

import numpy as np

from medattn_jax import metrics
from medattn_jax.analysis import agreement
from medattn_jax.studies import answers, writing

RULES = {
  "argmax": "the likeliest grade",
  "rounding": "the expected grade, rounded",
  "thresholds": "the expected grade, tuned thresholds",
  "decision": "the run's own decision",
}


def run(
  workdir: str | None = None, predictions: str | None = None, data: str | None = None,
  split: str | None = None, step: str | int = "best", out: str | None = None,
  tune: str | None = None,
) -> dict[str, Any]:
  """Quadratic weighted kappa (papers §1) of one run, with intervals over patients.

  The thresholds are tuned on validation alone: the data set's validation split for a workdir, the
  file `tune` for a predictions.csv. Without one that rule is left out, and said to be.

  Args:
    workdir: of the run; or
    predictions: a predictions.csv.
    data, split, step: what is graded, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/kappa by default.
    tune: the same model's predictions.csv of a validation split.

  Returns:
    What kappa.json holds.

  Raises:
    UserError: nothing was written.
  """
  place = answers.folder("kappa", [workdir] if workdir else [], out)
  graded, validation = answers.with_tuning(workdir, predictions, data, split, step, tune)
  classes = graded.probabilities.shape[1]
  score = metrics.expected_grade(graded.probabilities)
  grades = {
    "argmax": graded.probabilities.argmax(1),
    "rounding": metrics.decide(score, metrics.start_thresholds(classes))}
  thresholds = None
  if validation is not None:
    thresholds = metrics.tune_thresholds(
      metrics.expected_grade(validation.probabilities), validation.level, classes)
    grades["thresholds"] = metrics.decide(score, thresholds)
  grades["decision"] = graded.grade
  rules = agreement.of_rules(graded.level, graded.patient, grades, classes)
  best = "decision" if thresholds is None else "thresholds"
  confusion = metrics.confusion_matrix(graded.level, grades[best], classes)
  found = {
    "run": graded.source, "tuned_on": None if validation is None else validation.source,
    "images": len(graded.level), "patients": len(np.unique(graded.patient.astype(str))),
    "resamples": agreement.RESAMPLES, "rules": rules,
    "thresholds": None if thresholds is None else thresholds.tolist(),
    "confusion_matrix": confusion.tolist(), "confusion_matrix_of": best}
  from medattn_jax.analysis import figures  # imports matplotlib

  title = (f"{writing.about(graded.source)}\n{RULES[best]}: quadratic weighted kappa "
           f"{writing.shown(rules[best]['kappa'])}")
  drawn = {"confusion_matrix.png": figures.png(figures.confusion(confusion, title=title))}
  return writing.finish(
    "kappa", place, found, drawn, title=writing.about(graded.source),
    header=("decided by", "kappa", "95 % interval", "accuracy", "95 % interval"),
    rows=[(RULES[name], writing.shown(rule["kappa"]), writing.interval(rule["kappa_ci"]),
           writing.shown(rule["accuracy"]), writing.interval(rule["accuracy_ci"]))
          for name, rule in rules.items()],
    notes=[f"{found['images']:,} photographs of {found['patients']:,} patients, who are what is "
           "resampled"])
