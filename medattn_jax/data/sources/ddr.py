"""`--source=ddr`: the grading part of DDR, as its authors or as Kaggle have it.

The authors': a folder DR_grading with train.txt, valid.txt and test.txt (a line: NAME.jpg GRADE)
beside the folders train, valid and test. Grades are 0-4, and 5 for what cannot be graded. Kaggle's:
DR_grading.csv (id_code,diagnosis; no grade 5 and no splits) beside a folder DR_grading (often with
one of the same name within). Neither says which photographs are of one patient.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection

from medattn_jax.data import sources
from medattn_jax.data.sources import listed, sheets
from medattn_jax.errors import UserError

GRADING = "DR_grading"
SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # NAME.txt beside NAME
SHEET, IMAGE, LEVEL = f"{GRADING}.csv", "id_code", "diagnosis"
WHAT = (f"a folder {GRADING} with train.txt, valid.txt, test.txt and the folders train, valid, "
        f"test; or {SHEET} ({IMAGE},{LEVEL}) beside a folder {GRADING}")
_LINE = re.compile(r"(\S.*?)\s+(\S+)")


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The labelled photographs of the folder that `place` is or holds; `skip` is not looked into.

  Raises UserError where a list as a whole cannot be used. A line that cannot, and a photograph
  that cannot be graded, is in `rejected`.
  """
  # The parts for segmentation and detection, beside the one for grading, have folders like these.
  root = listed.folder_with(
    place, lambda f: listed.has(f, "train.txt") and f.name in (place.name, GRADING), WHAT)
  notes = ["no patients are named: every photograph is taken as a patient of its own"]
  if root is not None:
    lines, folders = _of_lists(root, skip, notes)
  else:
    root = listed.folder_with(place, lambda f: listed.has(f, SHEET), WHAT)
    if root is None:
      raise UserError(f"--input={place} has neither {GRADING}/train.txt nor {SHEET}; accepted: "
                      f"{WHAT}")
    lines, folders = _of_sheet(root, skip, notes)
  ungradable = sum(line.fault.startswith("is graded 5") for line in lines)
  if ungradable:
    notes.append(f"{ungradable} photographs are graded 5 (not to be graded) and are left out")
  return listed.labelled(lines, folders, notes, seed, str(root))


def _of_lists(root: pathlib.Path, skip: Collection[pathlib.Path], notes: list[str]):
  """The lines of the authors' lists, and their folders."""
  lines, folders = [], []
  for split, name in SPLITS.items():
    sheet = root / f"{name}.txt"
    folder = listed.Folder(root, name, skip)
    if not listed.has(root, sheet.name):
      notes.append(f"there is no {sheet.name}: no {split} split")
      folders.append((folder, f"has no label: there is no {sheet.name}"))
      continue
    folders.append((folder, f"has no label in {sheet.name}"))
    text, _ = sheets.text(sheets.content(sheet, root, WHAT), sheet)
    own = []
    for number, content in enumerate(text.splitlines(), start=1):
      if not content.strip():
        continue
      found = _LINE.fullmatch(content.strip())
      image, grade = found.groups() if found else ("", "")
      fault = "" if found else f"is {content.strip()[:40]!r}: NAME GRADE is accepted"
      own.append(_line(f"{sheet.name} line {number}", image, grade, split, folder, fault))
    if not own:
      raise UserError(f"{sheet} is empty: one line an image, NAME GRADE, is needed")
    lines += own
  return lines, folders


def _of_sheet(root: pathlib.Path, skip: Collection[pathlib.Path], notes: list[str]):
  """The lines of Kaggle's sheet, and its folder."""
  sheet = root / SHEET
  text, _ = sheets.text(sheets.content(sheet, root, WHAT), sheet)
  header, rows, _ = sheets.table(text, sheet, (IMAGE, LEVEL), (), WHAT)
  folder = listed.Folder(root, GRADING, skip)
  lines = [
    _line(where, cells[IMAGE], cells[LEVEL], "", folder, fault)
    for where, cells, fault in listed.rows_of(sheet, header, rows, notes)
  ]
  notes.append(f"{SHEET} states no splits: a patient with several photographs may be in several")
  return lines, [(folder, f"has no label in {SHEET}")]


def _line(
  where: str, image: str, grade: str, split: str, folder: listed.Folder, fault: str
) -> listed.Line:
  if listed.UNGRADABLE.fullmatch(grade):
    fault = "is graded 5: not to be graded"
  return listed.Line(where, image, grade, split, folder, fault=fault)
