"""`--source=csv`: a folder of photographs with a labels.csv.

Columns `image` (with or without extension) and `level` (0-4); optional `patient`, `eye` (left,
right), `split` (train, validation, test). Without a patient, NN_left and NN_right are one patient,
any other picture is its own. Names are looked up among the files found below the folder, so no
name in the sheet can lead outside.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

SHEET = "labels.csv"
REQUIRED = ("image", "level")
OPTIONAL = ("patient", "eye", "split")
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
  make = lambda cells: _photograph(cells, files)
  found, rejected = labels.collect(sheet, header, rows, "image", make, notes)
  guessed = sum(not photograph.patient for _, photograph in found)
  if guessed and "patient" in header:
    notes.append(f"{guessed} rows have no patient: it is taken from the image's name")
  photographs, bad = labels.once(found, folder, notes)
  for photograph in photographs:
    stem = pictures.stem(photograph.image_id.replace("\\", "/"))
    patient, side = schema.side_of(stem.rpartition("/")[2]) or (stem, "")
    photograph.patient = photograph.patient or patient
    photograph.eye = photograph.eye or side
  parts = [(files, f"has no label in {SHEET}")]
  return labels.labelled(photographs, rejected + bad, parts, notes, seed, sheet)


def _text(sheet: pathlib.Path) -> tuple[str, list[str]]:
  """The sheet's text, and what to say of its encoding."""
  if not sheet.exists() and not sheet.is_symlink():
    others = sorted(path.name for path in sheet.parent.glob("*.csv"))[:3]
    hint = f" (there is {', '.join(others)})" if others else ""
    raise UserError(f"{sheet.parent} has no {SHEET}{hint}: {_COLUMNS}")
  text, encoding = sheets.text(sheets.content(sheet, sheet.parent, _COLUMNS), sheet)
  return text, [f"{SHEET} is {encoding}"] if encoding else []


def _photograph(cells: Mapping[str, str], files: pictures.Pictures) -> sources.Photograph:
  path, level = files.find(cells["image"]), labels.level(cells["level"])
  eye, split = cells["eye"].lower(), cells["split"].lower()
  if eye and eye not in schema.EYES:
    raise preprocess.BadImage(f"has eye {cells['eye']!r}: left, right or nothing is accepted")
  if split and split not in schema.SPLITS:
    raise preprocess.BadImage(f"has split {cells['split']!r}: {', '.join(schema.SPLITS)} or "
                              "nothing is accepted")
  return sources.Photograph(cells["image"], path, level, cells["patient"], eye, split)
