"""What can be asked of trained models: `medattn study NAME`. The table alone; nothing heavy.

Each study is a module here with `run(**flags) -> dict`, which writes what it returns to
OUT/NAME.json, figures beside it, and prints a table. Its flags arrive under their names.
"""

from __future__ import annotations

import importlib
from typing import Any

# Common flags. Where a study takes several runs they are given again and again.
_WORKDIR = {"metavar": "D", "help": "of a run"}
_WORKDIRS = {"metavar": "D", "action": "append", "default": [], "help": "of a run; again for more"}
_PREDICTIONS = {"metavar": "F.csv", "help": "instead: a predictions.csv, of any model"}
_PREDICTIONS_OF_SEVERAL = {
  **_PREDICTIONS, "action": "append", "default": [],
  "help": "a predictions.csv, of any model; again for more"}
_GRADED = {
  "--data": {"metavar": "NAME|DIR", "help": "another data set than the run's own"},
  "--split": {"metavar": "SPLIT", "help": "test; validation where there is no test"},
  "--step": {"default": "best", "metavar": "N|best|last"},
}
_OUT = {"--out": {"metavar": "DIR", "help": "instead of WORKDIR/studies/NAME"}}

ONE_RUN = {"--workdir": _WORKDIR, "--predictions": _PREDICTIONS, **_GRADED, **_OUT}
SEVERAL_RUNS = {
  "--workdir": _WORKDIRS, "--predictions": _PREDICTIONS_OF_SEVERAL, **_GRADED, **_OUT}
TUNE = {"--tune": {
  "metavar": "F.csv", "help": "with --predictions: the same model's on a validation split"}}
ONE_WORKDIR = {"--workdir": {**_WORKDIR, "required": True}, **_GRADED, **_OUT}

# Name → (what it does, its flags as argparse takes them).
STUDIES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
  "kappa": (
    "quadratic weighted kappa by three decision rules, with intervals over patients",
    ONE_RUN | TUNE),
  "screening": (
    "the Messidor protocol: an SVM on the probabilities tells who is to be referred",
    ONE_RUN | {
      "--train-workdir": {"metavar": "D", "help": "what grades the set to train on; the same"},
      "--train-data": {"metavar": "NAME|DIR", "help": "the set to train normal vs abnormal on"},
      "--train-split": {"metavar": "SPLIT", "help": "of that set; train"},
      "--train-predictions": {"metavar": "F.csv", "help": "instead: a predictions.csv"}}),
  "calibration": (
    "are the probabilities as often right as they say, before and after temperature scaling",
    ONE_RUN | TUNE),
  "compare": (
    "two models on the same images: areas by DeLong's test, kappa by a paired bootstrap",
    SEVERAL_RUNS),
  "table": (
    "the paper's rows beside what workdirs reached, as Markdown",
    {"--workdir": _WORKDIRS, **_OUT}),
  "coverage": (
    "how many lesions lie in the regions, by number of boxes, beside chance and the best possible",
    ONE_WORKDIR | {"--boxes": {
      "type": int, "default": 16, "metavar": "N", "help": "up to how many; 16"}}),
  "clusters": (
    "what the network looks at, grouped by its own features, with a contact sheet of each group",
    ONE_WORKDIR | {
      "--top": {"type": int, "default": 4, "metavar": "N", "help": "places a photograph; 4"},
      "--points": {"type": int, "default": 2000, "metavar": "N",
                   "help": "places in all at most; 2000"},
      "--preference": {"type": float, "default": 0.5, "metavar": "Q", "help":
                       "quantile of the similarities, 0 to 1: the lower, the fewer groups; 0.5"},
      "--damping": {"type": float, "default": 0.9, "metavar": "D", "help": "0.5 to below 1; 0.9"},
    }),
  "ensemble": (
    "the mean probability of several runs, and what it gains over the single ones",
    SEVERAL_RUNS | {"--tune": {
      "metavar": "F.csv", "action": "append", "default": [],
      "help": "the same on a validation split, one for each --predictions in their order"}}),
  "tta": (
    "the mean probability of a photograph's turned and flipped views, and what it gains over one",
    ONE_WORKDIR | {"--views": {
      "type": int, "metavar": "N", "help": "8 turned and flipped, 4 flipped, 2 mirrored; as the "
      "run's training was augmented"}}),
}


def load(name: str) -> Any:
  """The module of a study."""
  return importlib.import_module(f"medattn_jax.studies.{name}")
