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
ONE_WORKDIR = {"--workdir": {**_WORKDIR, "required": True}, **_GRADED, **_OUT}

# Name → (what it does, its flags as argparse takes them).
STUDIES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
  "kappa": (
    "quadratic weighted kappa by three decision rules, with intervals over patients",
    ONE_RUN | {"--tune": {
      "metavar": "F.csv", "help": "with --predictions: the same model's on a validation split"}}),
}


def load(name: str) -> Any:
  """The module of a study."""
  return importlib.import_module(f"medattn_jax.studies.{name}")
