"""`--source=deepdrid`: the regular photographs of DeepDRiD, as its repository has them.

  regular_fundus_images/
    regular-fundus-training/    regular-fundus-training.csv, Images/1/1_l1.jpg …
    regular-fundus-validation/  regular-fundus-validation.csv, Images/265/265_l1.jpg …
    Online-Challenge1&2-Evaluation/  Challenge1_labels.xlsx (image_id,DR_Levels), Images/347/…

Each eye is photographed twice: l1, l2, r1, r2. A patient's photographs are paired left with right
in the sheet's order, so a patient is two examples of one id, and is split and counted as one.
The sheets' image_path has backslashes and not the folder Images: files are found by image_id. A
level stands in the column of its eye; where a file's name says the other eye, as eleven in the
training sheet do, the column counts, which is what was graded.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Collection, Mapping

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.data.sources import labels, pictures, sheets, xlsx
from medattn_jax.errors import UserError

REGULAR = "regular_fundus_images"
PARTS = {
  "train": ("regular-fundus-training", ("regular-fundus-training.csv",)),
  "validation": ("regular-fundus-validation", ("regular-fundus-validation.csv",)),
  "test": ("Online-Challenge1&2-Evaluation", ("Challenge1_labels.xlsx", "Challenge1_labels.csv")),
}
OTHERS = "ultra-widefield_images"
LEVELS = {eye: f"{eye}_eye_dr_level" for eye in schema.EYES}
OF_TEST = ("dr_levels", "dr_level")
UNGRADABLE = 5
WHAT = (f"a folder {REGULAR} with {', '.join(folder for folder, _ in PARTS.values())}, each with "
        "its sheet and Images")
_NAME = re.compile(r"(.+)_([lr])\d*", re.IGNORECASE)


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The labelled photographs of the folder that `place` is or holds; `skip` is not looked into.

  Raises UserError where a sheet as a whole cannot be used, and where a patient is in two splits. A
  row that cannot be used is in `rejected`.
  """
  root = sources.find_folder(
    place, lambda f: sources.has(f, *(folder for folder, _ in PARTS.values())), WHAT)
  if root is None:
    raise UserError(f"--input={place} has no {PARTS['train'][0]}; accepted: {WHAT}")
  notes: list[str] = []
  found, rejected, parts, turned = [], [], [], []
  for split, (name, names) in PARTS.items():
    files = pictures.Pictures(root, skip, name)
    there = next((n for n in names if sources.has(root / name, n)), None)
    if there is None:
      parts.append((files, f"has no label: there is no {' or '.join(names)}"))
      notes.append(f"there is no {name}/{' or '.join(names)}: no {split} split")
      continue
    parts.append((files, f"has no label in {there}"))
    sheet = root / name / there
    header, rows = _table(root, sheet, split == "test")
    make = functools.partial(_photograph, files=files, split=split, turned=turned)
    some, bad = labels.collect(sheet, header, rows, "image_id", make, notes)
    found += some
    rejected += bad
  if not found and not rejected:
    raise UserError(f"--input={place} has no sheet of labels; accepted: {WHAT}")
  if turned:
    notes.append(f"{len(turned)} names say another eye than the column of their level, which "
                 "counts")
  if any(sources.has(f, OTHERS) for f in (root, root.parent) if f.is_relative_to(place)):
    notes.append(f"{OTHERS} are photographs of another kind and are not read")
  photographs, bad = labels.once(found, root, notes)
  return labels.labelled(photographs, rejected + bad, parts, notes, seed, root)


def _photograph(
  cells: Mapping[str, str], files: pictures.Pictures, split: str, turned: list[str]
) -> sources.Photograph:
  """A row's; its name joins `turned` where that says another eye than its level does."""
  image = cells["image_id"]
  path = files.find(image)
  found = _NAME.fullmatch(image)
  named = {"l": "left", "r": "right"}[found[2].lower()] if found else ""
  patient = cells["patient_id"] or (found[1] if found else "")
  if split == "test":
    levels = {named: next((cells[name] for name in OF_TEST if cells[name]), "")}
  else:
    levels = {eye: cells[column] for eye, column in LEVELS.items() if cells[column]}
  if len(levels) > 1:
    if not named:
      raise preprocess.BadImage("has a level of both eyes and a name that says neither")
    levels = {named: levels[named]}
  if not patient:
    raise preprocess.BadImage("has no patient: PATIENT_l1, _l2, _r1, _r2 are accepted")
  eye, level = next(iter(levels.items()), (named, ""))
  if named and eye and named != eye:
    turned.append(image)
  level = labels.level(level, ungradable=UNGRADABLE)
  return sources.Photograph(image, path, level, patient, eye, split)


def _table(root: pathlib.Path, sheet: pathlib.Path, of_test: bool):
  """The header in small letters, and the rows."""
  needed = ("image_id",) if of_test else ("patient_id", "image_id", *LEVELS.values())
  if sheet.suffix == ".xlsx":
    found = xlsx.rows(sheets.content(sheet, root, WHAT), sheet, WHAT)
    header = [cell.strip().lower() for cell in found[0][1]] if found else []
    missing = [name for name in needed if header.count(name) != 1]
    if missing:
      raise UserError(f"{sheet} has no column {' and '.join(missing)}: its header is "
                      f"{', '.join(header)[:200]!r}; accepted: {WHAT}")
    rows = iter(found[1:])
  else:
    header, rows = sheets.read(sheet, root, needed, WHAT)
  if of_test and sum(header.count(name) for name in OF_TEST) != 1:
    raise UserError(f"{sheet} has no column DR_Levels: its header is {', '.join(header)[:200]!r}; "
                    f"accepted: {WHAT}")
  return header, rows
