"""`--source=csv`: a folder of photographs with a labels.csv.

Columns `image` (with or without extension) and `level` (0-4); optional `patient`, `eye` (left,
right), `split` (train, validation, test). Without a patient, NN_left and NN_right are one patient,
any other picture is its own. Names are looked up among the files found below the folder, so no
name in the sheet can lead outside.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Collection

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.data.sources import pictures, sheets
from medattn_jax.errors import UserError

SHEET = "labels.csv"
REQUIRED = ("image", "level")
OPTIONAL = ("patient", "eye", "split")
# A level as spreadsheets write it; Python's int() would also read "1_0" and other scripts' digits.
_LEVEL = re.compile(r"([0-4])(\.0*)?")
_COLUMNS = f"columns {' and '.join(REQUIRED)} are needed, {', '.join(OPTIONAL)} are read"


def read(
  folder: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()
) -> sources.Labelled:
  """The labelled photographs of `folder`; `skip` are folders below it that are not looked into.

  Raises UserError where the sheet as a whole cannot be used. A row that cannot be used is in
  `rejected`, and so is a picture without a row.
  """
  sheet = folder / SHEET
  text, notes = _text(sheet)
  header, rows, separator = sheets.table(text, sheet, REQUIRED, OPTIONAL, _COLUMNS)
  if separator != ",":
    notes.append(f"{SHEET} is separated by {sheets.SEPARATORS[separator]}")
  unknown = [name for name in header if name and name not in REQUIRED + OPTIONAL]
  if unknown:
    notes.append(f"columns of {SHEET} that are not read: {', '.join(unknown)}")
  files = pictures.Pictures(folder, skip)
  found: dict[pathlib.Path, list] = collections.defaultdict(list)  # (line, label, photograph)
  rejected: list[tuple[str, str]] = []
  blank = guessed = count = 0
  for line, row in rows:
    if not any(cell.strip() for cell in row):
      blank += 1
      continue
    count += 1
    image = ""
    try:
      cells = sheets.cells(header, row)
      image = cells["image"]
      if not image:
        raise preprocess.BadImage("names no image")
      path = preprocess.resolve(folder / files.find(image), folder)
      photograph = _photograph(cells, path)
      guessed += "patient" in header and not cells["patient"]
      label = [f"level {photograph.level}"]
      label += [f"{key} {cells[key]}" for key in OPTIONAL if cells[key]]
      found[path].append((line, label, photograph))
    except preprocess.BadImage as error:
      rejected.append((image or f"{SHEET} line {line}", f"{error} (line {line} of {SHEET})"))
  if not count:
    raise UserError(f"{sheet} has a header but no rows: one row an image is needed")
  photographs = []
  twice = 0
  for entries in found.values():
    _, label, first = entries[0]
    if any(other != label for _, other, _ in entries):
      told = "; ".join(f"line {line}: {', '.join(other)}" for line, other, _ in entries[:4])
      rejected.append((first.image_id, f"is labelled more than once and differently ({told})"))
    else:
      photographs.append(first)
      twice += len(entries) - 1
  rejected += files.closed
  unlabelled = [(name, f"has no label in {SHEET}") for name in files.unasked()]
  rejected += unlabelled
  for number, what in (
    (twice, "rows repeat an image that is listed already: it is taken once"),
    (blank, "empty rows are left out"),
    (guessed, "rows have no patient: it is taken from the image's name"),
    (len(unlabelled), f"pictures have no label in {SHEET} and are left out"),
  ):
    if number:
      notes.append(f"{number} {what}")
  splits = sources.assign_splits(photographs, seed, str(sheet))
  return sources.Labelled(photographs, rejected, notes, splits)


def _text(sheet: pathlib.Path) -> tuple[str, list[str]]:
  """The sheet's text, and what to say of its encoding."""
  if not sheet.exists() and not sheet.is_symlink():
    others = sorted(path.name for path in sheet.parent.glob("*.csv"))[:3]
    hint = f" (there is {', '.join(others)})" if others else ""
    raise UserError(f"{sheet.parent} has no {SHEET}{hint}: {_COLUMNS}")
  text, encoding = sheets.text(sheets.content(sheet, sheet.parent, _COLUMNS), sheet)
  return text, [f"{SHEET} is {encoding}"] if encoding else []


def _photograph(cells: dict[str, str], path: pathlib.Path) -> sources.Photograph:
  level = _LEVEL.fullmatch(cells["level"])
  if level is None:
    shown = f"level {cells['level']!r}" if cells["level"] else "an empty level"
    raise preprocess.BadImage(f"has {shown}: 0-4 (0, 1, 2, 3, 4) are accepted")
  stem = pictures.stem(cells["image"].replace("\\", "/"))
  patient, side = schema.side_of(stem.rpartition("/")[2]) or (stem, "")
  eye, split = cells["eye"].lower(), cells["split"].lower()
  if eye and eye not in schema.EYES:
    raise preprocess.BadImage(f"has eye {cells['eye']!r}: left, right or nothing is accepted")
  if split and split not in schema.SPLITS:
    raise preprocess.BadImage(f"has split {cells['split']!r}: {', '.join(schema.SPLITS)} or "
                              "nothing is accepted")
  return sources.Photograph(
    image_id=cells["image"],
    path=path,
    level=int(level[1]),
    patient=cells["patient"] or patient,
    eye=eye or side,
    split=split,
  )
