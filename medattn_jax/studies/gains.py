"""What averaging gains, written down: shared by the studies of ensembles and of views."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medattn_jax import evaluate
from medattn_jax.analysis import agreement, ensemble
from medattn_jax.studies import writing

SHORT = {"kappa": "kappa", "kappa_argmax": "kappa, likeliest", "accuracy": "accuracy",
         "accuracy_argmax": "accuracy, likeliest", "auc_referable": "AUC, referable"}


def finish(
  study: str, place: pathlib.Path, found: Mapping[str, Any], rows: evaluate.Table,
  graded: Mapping[str, ensemble.Graded], *, whole: str, singles: Sequence[str], best: str,
  words: tuple[str, str], title: str, seed: int, notes: Sequence[str] = (),
) -> dict[str, Any]:
  """Compares the mean with what it is a mean of, writes STUDY.json, predictions.csv, gain.png.

  Args:
    study, place: as in writing.finish.
    found: what the file is to say beside the figures.
    rows: image, patient, eye, level of the photographs.
    graded: each way of answering, by name.
    whole, singles, best: names among them; see ensemble.figures.
    words: what the gains over `best`, and over the mean of the singles, are called.
    title: of table and figure.
    seed: of the resamples.
    notes: lines below the table.
  """
  from medattn_jax.analysis import figures, forest  # import matplotlib

  compared = ensemble.figures(
    rows["level"], rows["patient"], graded, whole=whole, singles=singles, best=best,
    resamples=agreement.RESAMPLES, seed=seed)
  found = {
    **found, "images": len(rows["level"]), "patients": len(np.unique(rows["patient"].astype(str))),
    "resamples": agreement.RESAMPLES, "mean": whole, "singles": list(singles),
    "thresholds": {name: None if own.thresholds is None else own.thresholds.tolist()
                   for name, own in graded.items()}, **compared}
  tuned = any(own.thresholds is not None for own in graded.values())
  shown = ["kappa", "accuracy", "auc_referable"] if tuned else [
    "kappa_argmax", "accuracy_argmax", "auc_referable"]
  over = dict(zip(words, compared["gain"].values(), strict=True))
  table = []
  for name, own in compared["answers"].items():
    table.append((forest.short(name), *(writing.shown(own[key]) for key in shown)))
  for name, own in over.items():
    table.append((name, *(_signed(own[key]) for key in shown)))
    table.append(("  95 % interval", *(writing.interval(own[f"{key}_ci"]) for key in shown)))
  drawn = forest.forest(compared["answers"], over, whole=whole, figures=shown, title=title)
  contents = {
    "gain.png": figures.png(drawn),
    "predictions.csv": evaluate.predictions_csv(
      rows | {"probabilities": graded[whole].probabilities}, graded[whole].thresholds).encode()}
  return writing.finish(
    study, place, found, contents, title=title, header=("", *(SHORT[key] for key in shown)),
    rows=table, notes=[*notes, f"{found['images']:,} photographs of {found['patients']:,} "
                       "patients, who are what is resampled"])


def _signed(value: float | None) -> str:
  return "–" if value is None else f"{value:+.3f}"
