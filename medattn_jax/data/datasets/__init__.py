"""The data sets there are, by name, and where they lie. Knows no TensorFlow."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

from medattn_jax.data import schema
from medattn_jax.errors import UserError, nearest

PREPARED = (  # by `medattn prepare --source=NAME`
  "csv", "npz", "fer2013",
  "eyepacs", "messidor", "messidor2", "idrid",
  "aptos", "ddr", "deepdrid",
)  # fmt: skip
# Made on first use: each a module of this package, with build(data_dir, *, size, **numbers).
DRAWN = ("synthetic_fundus", "planted_region")
ARRAYS = ("npz", "fer2013")  # of them, those of pixels that are ready
NAMES = PREPARED + DRAWN


def located(name: str, data_dir: str | pathlib.Path | None) -> pathlib.Path | None:
  """The folder of the set `name`, below `data_dir` or a folder itself; None for a drawn one.

  Raises UserError where there is none, as `find` does.
  """
  if name in DRAWN:
    return None
  if name not in NAMES:
    return find(name)
  folder = pathlib.Path(data_dir) / name / schema.VERSION
  if not folder.is_dir():
    raise UserError(f"no data set {name} in {data_dir}: make it with `medattn prepare "
                    f"--source={name} --input=DIR --data-dir={data_dir}`")
  return folder


def find(name: str) -> pathlib.Path:
  """The folder of the one set that the folder `name` is or holds.

  Raises UserError where `name` is neither a known data set nor such a folder.
  """
  folder = pathlib.Path(name)
  if not folder.is_dir():
    hint = nearest(name, NAMES)
    raise UserError(f"data set {name!r} is neither known ({', '.join(NAMES)}) nor a folder{hint}")
  found = [path.parent for pattern in ("", "*/", "*/*/", "*/*/*/")
           for path in sorted(folder.glob(f"{pattern}index.json"))]
  found = [path for path in found if path.name == schema.VERSION]
  if not found:
    raise UserError(f"{folder} holds no data set: make one with `medattn prepare --source=S "
                    f"--input=DIR --data-dir={folder}`")
  if len(found) > 1:
    names = ", ".join(str(path) for path in found)
    raise UserError(f"{folder} holds more than one data set: name one of {names}")
  return found[0]


def check_levels(dataset: Any, splits: Iterable[str], num_classes: int) -> None:
  """Raises UserError where one of the splits has a level that a model of so many cannot answer."""
  for split in splits:
    if (highest := int(dataset.levels(split).max(initial=-1))) >= num_classes:
      raise UserError(
        f"model.num_classes = {num_classes}: data set {dataset.name}, split {split}, has level "
        f"{highest}; accepted: at least {highest + 1}")
