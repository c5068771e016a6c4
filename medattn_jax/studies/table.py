"""`medattn study table`: what the paper reports, and what workdirs reached, row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from medattn_jax import console, files
from medattn_jax.errors import UserError
from medattn_jax.studies import answers
from medattn_jax.workdir import Workdir

_MAX_BYTES = 16 << 20
KAPPA = "quadratic weighted kappa"
M_NET, M_A, ZOOM, ENSEMBLE = "M-Net", "M-Net + A-Net", "Zoom-in-Net", "ensemble of Zoom-in-Nets"
BRANCHES = {"m_net": M_NET, "m_a": M_A, "zoom_in_net": ZOOM}
# What is asked of Messidor, by the names in screening.json.
SCREENED = {"referable": "referable", "any": "abnormal"}
SCREENING = {"auc": "AUC", "accuracy": "accuracy",
             "sensitivity_at_specificity_50": "sensitivity at specificity .5"}
RECALL = {"box": "lesions found by four regions", "image": "photographs with a lesion found"}

# (method, figure, split, the paper's set) → what Wang et al. (MICCAI 2017) report. None: any split.
PAPER = {
  (M_NET, KAPPA, "validation", "EyePACS"): 0.832, (M_NET, KAPPA, "test", "EyePACS"): 0.825,
  (M_A, KAPPA, "validation", "EyePACS"): 0.837, (M_A, KAPPA, "test", "EyePACS"): 0.832,
  (ZOOM, KAPPA, "validation", "EyePACS"): 0.857, (ZOOM, KAPPA, "test", "EyePACS"): 0.849,
  (ENSEMBLE, KAPPA, "validation", "EyePACS"): 0.865, (ENSEMBLE, KAPPA, "test", "EyePACS"): 0.854,
  (ZOOM, "referable: AUC", None, "Messidor"): 0.957,
  (ZOOM, "referable: accuracy", None, "Messidor"): 0.911,
  (ZOOM, "referable: sensitivity at specificity .5", None, "Messidor"): 0.960,
  (ZOOM, "abnormal: AUC", None, "Messidor"): 0.921,
  (ZOOM, "abnormal: accuracy", None, "Messidor"): 0.905,
  (ZOOM, "abnormal: sensitivity at specificity .5", None, "Messidor"): 0.978,
  (ZOOM, RECALL["box"], None, "182 of EyePACS"): 0.76,
  (ZOOM, RECALL["image"], None, "182 of EyePACS"): 0.83,
}


class Row(NamedTuple):
  """A figure that a workdir reached."""

  method: str
  figure: str
  split: str
  ours: float
  interval: list[float] | None
  data: str
  photographs: int | None
  workdir: str
  file: str


def run(workdir: Sequence[str] = (), out: str | None = None) -> dict[str, Any]:
  """Prints the table as Markdown, and writes it to table.md and table.json.

  Read are config.json, metrics.json in any folder of a workdir (evaluate's, and what its --out was
  told to put beside it, such as WORKDIR/validation), and the JSON of studies in WORKDIR/studies.
  A file that cannot be read is passed over with a warning.

  Args:
    workdir: of the runs, one or more.
    out: the folder for the files; WORKDIR/studies/table of the first workdir by default.

  Returns:
    What table.json holds.

  Raises:
    UserError: no workdir, one that is none, or nothing evaluated in any; nothing was written.
  """
  if not workdir:
    raise UserError("--workdir=D: accepted is one or more, whose evaluations make the table")
  place = answers.folder("table", workdir, out)
  ours = [row for one in workdir for row in rows_of(one)]
  if not ours:
    raise UserError(f"{', '.join(map(str, workdir))}: nothing is evaluated; accepted: workdirs "
                    "after `medattn evaluate`")
  text = markdown(ours)
  found = {"study": "table", "workdirs": [str(one) for one in workdir],
           "rows": [{**row._asdict(), "paper": paper_of(row)} for row in ours]}
  files.write_all(place, {
    "table.md": text.encode(),
    "table.json": (json.dumps(found, indent=2, allow_nan=False) + "\n").encode()})
  print(text, end="")
  console.say(f"written to {place / 'table.md'} and table.json beside it")
  return found


def rows_of(workdir: str) -> list[Row]:
  """What a workdir reached, evaluations before studies."""
  place = Workdir(workdir)
  config = place.read_config()
  try:
    method = label(config)
  except (KeyError, TypeError):
    raise UserError(f"{place.config}: names no model; accepted: the one of a training") from None
  rows = []
  for path in (*sorted(place.path.glob("*/metrics.json")),
               *sorted(place.path.glob("studies/*/*.json"))):
    try:
      found = json.loads(files.read_bytes(path, _MAX_BYTES))
      make = _STUDIES.get(found["study"]) if "study" in found else _of_evaluation
      rows += [
        Row(*row, str(workdir), path.relative_to(place.path).as_posix())
        for row in (make(found, method) if make else ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      console.warn(f"{path}: passed over, not what `medattn` writes "
                   f"({' '.join(str(error).split())[:80] or type(error).__name__})")
  if not rows:
    console.warn(f"{workdir}: nothing is evaluated in it")
  return rows


def label(config: Mapping[str, Any]) -> str:
  """How a row is called, from a config.json."""
  model = config["model"]
  if model["name"] != "global_attention":
    return {"zoom_in_net": ZOOM, "m_net": M_NET}.get(model["name"], str(model["name"]))
  source = config["attention"]["source"]
  weighed = "no attention" if source == "none" else f"attention from {source}"
  return f"{model['backbone']}, {weighed}"


def _of_evaluation(found: Mapping[str, Any], method: str) -> Iterator[tuple]:
  """The rows of a metrics.json, less workdir and file."""
  split, data, images = str(found["split"]), str(found["data"]), int(found["images"])
  # A row needs its number; what is not defined makes none.
  row = lambda *of: [(*of, data, images)] if of[3] is not None else []
  kappa, kappa_ci = _number(found["quadratic_weighted_kappa"]), _interval(found["kappa_ci"])
  for name, branch in found["branches"].items():
    own = _number(branch["quadratic_weighted_kappa"])
    yield from row(BRANCHES.get(name, str(name)), KAPPA, split, own,
                   kappa_ci if own == kappa else None)
  if not found["branches"]:
    yield from row(method, KAPPA, split, kappa, kappa_ci)
    yield from row(method, "accuracy", split, _number(found["accuracy"]), None)
  yield from row(method, "referable: AUC of the probability", split,
                 _number(found["auc_referable"]), _interval(found["auc_referable_ci"]))
  yield from row(method, "abnormal: AUC of the probability", split, _number(found["auc_any"]), None)
  if recall := found.get("lesion_recall"):
    for key, name in RECALL.items():
      name = name.replace("four", {4: "four"}.get(int(recall["boxes_per_image"]),
                                                  str(int(recall["boxes_per_image"]))))
      yield from [(method, name, split, _number(recall[key]), None, data, int(recall["images"]))]
  if attention := found.get("attention"):
    yield from row(method, "share of the pixels attended", split, _number(attention["area"]), None)
    yield from row(method, "IoU with the true region", split, _number(attention["iou"]), None)


def _of_screening(found: Mapping[str, Any], method: str) -> Iterator[tuple]:
  for question, name in SCREENED.items():
    machine = found[question]["svm"]
    if question == "any" and found["trained_on"] is None:
      name = f"{name}, cross-validated"  # which is not the paper's protocol
    for key, figure in SCREENING.items():
      value = machine[key]["value"] if isinstance(machine[key], Mapping) else machine[key]
      edges = machine[key]["interval"] if isinstance(machine[key], Mapping) else (
        machine[f"{key}_ci"])
      if _number(value) is not None:
        yield (method, f"{name}: {figure}", _split(found["run"]), _number(value),
               _interval(edges), _data(found["run"]), int(found["images"]))


def _of_ensemble(found: Mapping[str, Any], method: str) -> Iterator[tuple]:
  first, whole = found["runs"][0], found["answers"][found["mean"]]
  if _number(whole["kappa"]) is not None:
    yield (ENSEMBLE if method == ZOOM else f"ensemble of {method}", KAPPA, _split(first),
           _number(whole["kappa"]), _interval(whole["kappa_ci"]), _data(first),
           int(found["images"]))


def _split(source: Mapping[str, Any]) -> str:
  return str(source.get("split", ""))


def _data(source: Mapping[str, Any]) -> str:
  return str(source.get("data") or source["predictions"])


_STUDIES = {"screening": _of_screening, "ensemble": _of_ensemble}


def _number(value: Any) -> float | None:
  if value is None:
    return None
  if isinstance(value, bool) or not math.isfinite(float(value)):
    raise ValueError(f"{value} where a number is expected")
  return float(value)


def _interval(value: Any) -> list[float] | None:
  if value is None:
    return None
  low, high = map(_number, value)
  return [low, high]


def paper_of(row: Row) -> float | None:
  """What the paper reports for such a row, of its own data set."""
  for (method, figure, split, _), value in PAPER.items():
    if (method, figure) == (row.method, row.figure) and split in (None, row.split):
      return value
  return None


def markdown(ours: Sequence[Row]) -> str:
  """The paper's rows, with ours under each; then ours that it has none of."""
  head = ("method", "figure", "paper", "ours", "95 % interval", "data", "photographs", "from")
  lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---|---|---:|---|"]

  def line(*cells: object) -> None:
    lines.append("| " + " | ".join(
      " ".join(str(cell).split()).replace("|", r"\|") for cell in cells) + " |")

  def our(row: Row, paper: str) -> None:
    interval = "" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
    line(row.method, row.figure, paper, f"{row.ours:.3f}", interval,
         f"{row.data}, {row.split}".rstrip(", "), f"{row.photographs:,}",
         f"{row.workdir}: {row.file}")

  placed = set()
  for (method, figure, split, data), value in PAPER.items():
    paper = f"{value:.3f} ({data})"
    same = [row for row in ours if (row.method, row.figure) == (method, figure)
            and split in (None, row.split)]
    for row in same:
      our(row, paper)
      placed.add(row.workdir + row.file + row.method + row.figure)
    if not same:
      line(method, figure, paper, "–", "", split or "", "", "")
  for row in ours:
    if row.workdir + row.file + row.method + row.figure not in placed:
      our(row, "–")
  lines += ["", "The paper's figures are of the set in brackets (EyePACS: 35,126 photographs to "
            "train, 10,906 validation, 42,670 test; Messidor: 1,200), ours of the set in their "
            "row. Compare them where that is the same one."]
  return "\n".join(lines) + "\n"
