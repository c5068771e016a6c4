"""`--source=ddr`: the grading part of DDR, as its authors or as Kaggle have it.

The authors': a folder DR_grading with train.txt, valid.txt and test.txt (a line: NAME.jpg GRADE)
beside the folders train, valid and test. Grades are 0-4, and 5 for what cannot be graded. Kaggle's:
DR_grading.csv (id_code,diagnosis; no grade 5 and no splits) beside a folder DR_grading (often with
one of the same name within). Neither says which photographs are of one patient.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection, Iterator, Sequence

from medattn_jax.data import sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

GRADING = "DR_grading"
SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # NAME.txt beside NAME
SHEET, IMAGE, LEVEL = f"{GRADING}.csv", "id_code", "diagnosis"
WHAT = (f"a folder {GRADING} with train.txt, valid.txt, test.txt and the folders train, valid, "
        f"test; or {SHEET} ({IMAGE},{LEVEL}) beside a folder {GRADING}")
UNGRADABLE = 5
_LINE = re.compile(r"(\S.*?)\s+(\S+)")


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The labelled photographs of the folder that `place` is or holds; `skip` is not looked into.

  Raises UserError where a list as a whole cannot be used. A line that cannot, and a photograph
  that cannot be graded, is in `rejected`.
  """
  # The parts for segmentation and detection, beside the one for grading, have folders like these.
  root = sources.find_folder(
    place, lambda f: sources.has(f, "train.txt") and f.name in (place.name, GRADING), WHAT)
  notes = ["no patients are named: every photograph is taken as a patient of its own"]
  tables, parts, rejected = [], [], []
  if root is not None:
    for split, name in SPLITS.items():
      sheet, files = root / f"{name}.txt", pictures.Pictures(root, skip, name)
      if sources.has(root, sheet.name):
        why = f"has no label in {sheet.name}"
        tables.append((sheet, (IMAGE, LEVEL), _rows(sheet, rejected), files, split))
      else:
        why = f"has no label: there is no {sheet.name}"
        notes.append(f"there is no {sheet.name}: no {split} split")
      parts.append((files, why))
  else:
    root = sources.find_folder(place, lambda f: sources.has(f, SHEET), WHAT)
    if root is None:
      raise UserError(f"--input={place} has neither {GRADING}/train.txt nor {SHEET}; accepted: "
                      f"{WHAT}")
    sheet, files = root / SHEET, pictures.Pictures(root, skip, GRADING)
    tables.append((sheet, *sheets.read(sheet, root, (IMAGE, LEVEL), WHAT), files, ""))
    notes.append(f"{SHEET} states no splits: a patient with several photographs may be in several")
    parts.append((files, f"has no label in {SHEET}"))
  found = []
  for sheet, header, rows, files, split in tables:
    make = lambda cells, files=files, split=split: sources.Photograph(
      cells[IMAGE], files.find(cells[IMAGE]), labels.level(cells[LEVEL], ungradable=UNGRADABLE),
      "", "", split)
    some, bad = labels.collect(sheet, header, rows, IMAGE, make, notes)
    found += some
    rejected += bad
  ungradable = sum(f"is graded {UNGRADABLE}" in why for _, why in rejected)
  if ungradable:
    notes.append(f"{ungradable} photographs are graded {UNGRADABLE} (not to be graded) and are "
                 "left out")
  photographs, bad = labels.once(found, root, notes)
  return labels.labelled(photographs, rejected + bad, parts, notes, seed, root)


def _rows(sheet: pathlib.Path, rejected: labels.Rejected) -> Iterator[tuple[int, Sequence[str]]]:
  """(line, (image, grade)) of one of the authors' lists; other lines join `rejected`."""
  text, _ = sheets.text(sheets.content(sheet, sheet.parent, WHAT), sheet)
  if not text.strip():
    raise UserError(f"{sheet} is empty: one line an image, NAME GRADE, is needed")
  for number, line in enumerate(text.splitlines(), start=1):
    found = _LINE.fullmatch(line.strip())
    if found:
      yield number, found.groups()
    elif line.strip():
      rejected.append((f"{sheet.name} line {number}",
                       f"is {line.strip()[:40]!r}: NAME GRADE is accepted"))
