"""`medattn study calibration`: are the probabilities as often right as they say?"""

from __future__ import annotations

from typing import Any

import numpy as np

from medattn_jax import console
from medattn_jax.analysis import calibration
from medattn_jax.studies import answers, writing

SHOWN = {
  "expected_calibration_error": "expected calibration error",
  "negative_log_likelihood": "negative log-likelihood", "brier": "Brier score",
  "confidence": "mean confidence", "accuracy": "accuracy of the likeliest grade"}


def run(
  workdir: str | None = None, predictions: str | None = None, data: str | None = None,
  split: str | None = None, step: str | int = "best", out: str | None = None,
  tune: str | None = None,
) -> dict[str, Any]:
  """Calibration of one run before and after temperature scaling.

  The temperature is fitted on validation alone: the data set's validation split for a workdir, the
  file `tune` for a predictions.csv. Without one there is no after, and that is said.

  Args:
    workdir: of the run; or
    predictions: a predictions.csv.
    data, split, step: what is graded, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/calibration by default.
    tune: the same model's predictions.csv of a validation split.

  Returns:
    What calibration.json holds.

  Raises:
    UserError: nothing was written.
  """
  place = answers.folder("calibration", [workdir] if workdir else [], out)
  graded, validation = answers.with_tuning(workdir, predictions, data, split, step, tune)
  temperature = after = None
  before = calibration.of_probabilities(graded.probabilities, graded.level)
  if validation is not None:
    temperature = calibration.temperature(validation.probabilities, validation.level)
    if temperature in calibration.TEMPERATURES:
      console.warn(f"the best temperature lies beyond {temperature:g}, which is taken")
    after = calibration.of_probabilities(
      calibration.cooled(graded.probabilities, temperature), graded.level)
  found = {
    "run": graded.source, "tuned_on": None if validation is None else validation.source,
    "images": len(graded.level), "patients": len(np.unique(graded.patient.astype(str))),
    "temperature": temperature, "before": before, "after": after}
  sides = {"as the model answers": before}
  if after is not None:
    sides[f"at temperature {temperature:.3f}"] = after
  return writing.finish(
    "calibration", place, found, {"reliability.png": _figure(sides, graded)},
    title=writing.about(graded.source), header=("", *sides),
    rows=[(label, *(writing.shown(side[key]) for side in sides.values()))
          for key, label in SHOWN.items()],
    notes=[] if validation is None else
    [f"the temperature is fitted on {writing.about(validation.source)} "
     f"({len(validation.level):,} photographs)"])


def _figure(sides: dict[str, Any], graded: answers.Answers) -> bytes:
  from medattn_jax.analysis import curves, figures  # import matplotlib

  labels = {
    name: f"ECE {side['expected_calibration_error']:.3f}, "
          f"NLL {side['negative_log_likelihood']:.3f}, Brier {side['brier']:.3f}"
    for name, side in sides.items()}
  return figures.png(curves.calibrated(
    {name: side["curve"] for name, side in sides.items()}, labels,
    title=writing.about(graded.source)))
