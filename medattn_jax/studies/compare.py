"""`medattn study compare`: is the second model better than the first on the same images?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medattn_jax.analysis import comparison
from medattn_jax.studies import answers, writing

AREAS = {"auc_referable": (2, "AUC, referable"), "auc_any": (1, "AUC, any sign")}
KAPPAS = {"kappa": "kappa, the runs' own decisions", "kappa_argmax": "kappa, the likeliest grade"}
WAYS = {"clustered": "eyes of a patient as one", "independent": "DeLong, images as independent",
        "bootstrap": "bootstrap over patients"}


def run(
  workdir: Sequence[str] = (), predictions: Sequence[str] = (), data: str | None = None,
  split: str | None = None, step: str | int = "best", out: str | None = None,
) -> dict[str, Any]:
  """Differences of two runs with intervals and p-values; workdirs come before files.

  Args:
    workdir, predictions: two runs in all.
    data, split, step: what the workdirs grade, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/compare of the first workdir by default.

  Returns:
    What compare.json holds. Differences are of the second run less the first.

  Raises:
    UserError: nothing was written; images that one run lacks or has another level of.
  """
  place = answers.folder("compare", workdir, out)
  first, second = answers.together(
    answers.gather(workdir, predictions, data, split, step, least=2, most=2))
  level, patient = first.level, first.patient
  classes = first.probabilities.shape[1]
  found: dict[str, Any] = {
    "first": first.source, "second": second.source, "images": len(level),
    "patients": len(np.unique(patient.astype(str))), "resamples": comparison.RESAMPLES}
  for key, (least, _) in AREAS.items():
    scores = np.stack([run.probabilities[:, least:].sum(1) for run in (first, second)])
    found[key] = comparison.of_areas(level >= least, scores, patient)
  found["kappa"] = comparison.of_kappas(level, [first.grade, second.grade], patient, classes)
  found["kappa_argmax"] = comparison.of_kappas(
    level, [run.probabilities.argmax(1) for run in (first, second)], patient, classes)
  lines = _lines(found)
  return writing.finish(
    "compare", place, found, {"differences.png": _figure(lines, found, first, second)},
    title=f"first: {first.name}\nsecond: {second.name}",
    header=("", "first", "second", "second - first", "95 % interval", "p"),
    rows=[(name, *map(writing.shown, values), _signed(difference), writing.interval(edges),
           _p(p)) for name, values, difference, edges, p in lines],
    notes=[f"{found['images']:,} photographs of {found['patients']:,} patients"])


def _lines(found: dict[str, Any]) -> list[tuple]:
  """(name, [first, second], difference, interval, p) of each figure and way of telling."""
  lines = []
  for key, (_, name) in AREAS.items():
    for way, words in WAYS.items():
      told = found[key][way] or {"difference": None, "interval": None, "p": None}
      lines.append((f"{name} ({words})", found[key]["areas"] or [None, None],
                    told["difference"], told["interval"], told["p"]))
  for key, name in KAPPAS.items():
    told = found[key]["difference"]
    lines.append((name, found[key]["kappas"], told["difference"], told["interval"], told["p"]))
  return lines


def _figure(
  lines: Sequence[tuple], found: dict[str, Any], first: answers.Answers, second: answers.Answers
) -> bytes:
  from medattn_jax.analysis import curves, figures  # import matplotlib

  rows = [(name, difference, edges,
           "not defined" if difference is None else f"{_signed(difference)}   p {_p(p)}")
          for name, _, difference, edges, p in lines]
  return figures.png(curves.differences(
    rows, title=f"first: {writing.short(first.name)}\nsecond: {writing.short(second.name)}\n"
    f"{found['images']:,} photographs of {found['patients']:,} patients",
    below="second less first, with 95 % intervals", sides=("first is better", "second is better")))


def _signed(value: float | None) -> str:
  return "–" if value is None else f"{value:+.3f}"


def _p(value: float | None) -> str:
  return "–" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"
