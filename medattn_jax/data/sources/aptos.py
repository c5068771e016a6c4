"""`--source=aptos`: Kaggle's APTOS 2019 Blindness Detection, as it is or split up again.

As it is: train.csv (id_code,diagnosis), train_images/ID.png, and test.csv and test_images/ without
labels, which are of no use. Split up again, as others publish it: train_1.csv, valid.csv and
test.csv, all with labels, and their pictures below train_images/, val_images/ and test_images/
(often in a folder of the same name once more). Nothing says which photographs are of one patient.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterator

from medattn_jax.data import sources
from medattn_jax.data.sources import listed, sheets
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
  root = listed.folder_with(place, lambda f: listed.has(f, *PARTS["train"][0]), WHAT)
  if root is None:
    raise UserError(f"--input={place} has no train.csv; accepted: {WHAT}")
  notes = ["no patients are named: every photograph is taken as a patient of its own"]
  tables, folders = {}, []
  for split, (names, pictures) in PARTS.items():
    there = [name for name in names if listed.has(root, name)]
    folder = listed.Folder(root, pictures, skip)
    if there:
      header, rows = _table(root, there[0])
      why = f"has no label in {there[0]}"
      if LEVEL in header:
        tables[split] = (there[0], folder, header, rows)
      elif split == "test":
        why = f"has no label: {there[0]} has no column {LEVEL}"
        notes.append(f"{there[0]} has no labels (no column {LEVEL}): its photographs are not used")
      else:
        raise UserError(f"{root / there[0]} has no column {LEVEL}; accepted: {WHAT}")
      notes += [f"{name} is not read: {there[0]} is" for name in there[1:]]
    else:
      why = f"has no label: there is no {names[0]}"
    folders.append((folder, why))
  if len(tables) > 1:
    missing = [split for split in PARTS if split not in tables]
    notes += [f"there is no {PARTS[split][0][0]}: no {split} split" for split in missing]
  lines = _lines(tables, len(tables) > 1, notes)
  return listed.labelled(lines, folders, notes, seed, str(root))


def _table(root: pathlib.Path, name: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
  sheet = root / name
  text, _ = sheets.text(sheets.content(sheet, root, WHAT), sheet)
  header, rows, _ = sheets.table(text, sheet, (IMAGE,), (LEVEL,), WHAT)
  return header, rows


def _lines(tables: dict, stated: bool, notes: list[str]) -> Iterator[listed.Line]:
  for split, (name, folder, header, rows) in tables.items():
    for where, cells, fault in listed.rows_of(folder.root / name, header, rows, notes):
      state = split if stated else ""
      yield listed.Line(where, cells[IMAGE], cells[LEVEL], state, folder, fault=fault)
