"""`--source=aptos`: Kaggle's APTOS 2019 Blindness Detection, as it is or split up again.

As it is: train.csv (id_code,diagnosis), train_images/ID.png, and test.csv and test_images/ without
labels, which are of no use. Split up again, as others publish it: train_1.csv, valid.csv and
test.csv, all with labels, and their pictures below train_images/, val_images/ and test_images/
(often in a folder of the same name once more). Nothing says which photographs are of one patient.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection

from medattn_jax.data import sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

IMAGE, LEVEL = "id_code", "diagnosis"
# Of a split: its lists, of which the first that is there is read, and the folder of its pictures.
PARTS = {
  "train": (("train_1.csv", "train.csv"), "train_images"),
  "validation": (("valid.csv",), "val_images"),
  "test": (("test.csv",), "test_images"),
}
WHAT = (f"a folder with train.csv ({IMAGE},{LEVEL}) and train_images; or with train_1.csv, "
        "valid.csv, test.csv and train_images, val_images, test_images")


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The labelled photographs of the folder that `place` is or holds; `skip` is not looked into.

  Raises UserError where a list as a whole cannot be used. A line that cannot is in `rejected`.
  """
  root = sources.find_folder(place, lambda f: sources.has(f, *PARTS["train"][0]), WHAT)
  if root is None:
    raise UserError(f"--input={place} has no train.csv; accepted: {WHAT}")
  notes = ["no patients are named: every photograph is taken as a patient of its own"]
  tables, parts = {}, []
  for split, (names, part) in PARTS.items():
    there = [name for name in names if sources.has(root, name)]
    files = pictures.Pictures(root, skip, part)
    if there:
      sheet = root / there[0]
      header, rows = sheets.read(sheet, root, (IMAGE,), WHAT, (LEVEL,))
      why = f"has no label in {sheet.name}"
      if LEVEL in header:
        tables[split] = (sheet, files, header, rows)
      elif split == "test":
        why = f"has no label: {sheet.name} has no column {LEVEL}"
        notes.append(f"{sheet.name} has no labels (no column {LEVEL}): its photographs are not "
                     "used")
      else:
        raise UserError(f"{sheet} has no column {LEVEL}; accepted: {WHAT}")
      notes += [f"{name} is not read: {sheet.name} is" for name in there[1:]]
    else:
      why = f"has no label: there is no {names[0]}"
    parts.append((files, why))
  if len(tables) > 1:
    missing = [split for split in PARTS if split not in tables]
    notes += [f"there is no {PARTS[split][0][0]}: no {split} split" for split in missing]
  found, rejected = [], []
  for split, (sheet, files, header, rows) in tables.items():
    state = split if len(tables) > 1 else ""
    make = lambda cells, files=files, state=state: sources.Photograph(
      cells[IMAGE], files.find(cells[IMAGE]), labels.level(cells[LEVEL]), "", "", state)
    some, bad = labels.collect(sheet, header, rows, IMAGE, make, notes)
    found += some
    rejected += bad
  photographs, bad = labels.once(found, root, notes)
  return labels.labelled(photographs, rejected + bad, parts, notes, seed, root)
