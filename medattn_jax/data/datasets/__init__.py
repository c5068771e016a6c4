"""The data sets there are, by name, and where they lie. Knows no TensorFlow."""

from __future__ import annotations

import pathlib

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
