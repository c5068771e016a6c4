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

import pathlib
import re
from collections.abc import Collection, Iterator

from medattn_jax.data import schema, sources
from medattn_jax.data.sources import listed, sheets, xlsx
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
WHAT = (f"a folder {REGULAR} with {', '.join(folder for folder, _ in PARTS.values())}, each with "
        "its sheet and Images")
_NAME = re.compile(r"(.+)_([lr])\d*", re.IGNORECASE)


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The labelled photographs of the folder that `place` is or holds; `skip` is not looked into.

  Raises UserError where a sheet as a whole cannot be used, and where a patient is in two splits. A
  row that cannot be used is in `rejected`.
  """
  root = listed.folder_with(
    place, lambda f: listed.has(f, *(folder for folder, _ in PARTS.values())), WHAT)
  if root is None:
    raise UserError(f"--input={place} has no {PARTS['train'][0]}; accepted: {WHAT}")
  notes: list[str] = []
  lines, folders, turned = [], [], 0
  for split, (name, names) in PARTS.items():
    folder = listed.Folder(root, name, skip)
    sheet = next((n for n in names if listed.has(root / name, n)), None)
    if sheet is None:
      folders.append((folder, f"has no label: there is no {' or '.join(names)}"))
      notes.append(f"there is no {name}/{' or '.join(names)}: no {split} split")
      continue
    folders.append((folder, f"has no label in {sheet}"))
    for line, other in _lines(root, folder, root / name / sheet, split, notes):
      lines.append(line)
      turned += other
  if not lines:
    raise UserError(f"--input={place} has no sheet of labels; accepted: {WHAT}")
  if turned:
    notes.append(f"{turned} names say another eye than the column of their level, which counts")
  if any(listed.has(f, OTHERS) for f in (root, root.parent) if f.is_relative_to(place)):
    notes.append(f"{OTHERS} are photographs of another kind and are not read")
  return listed.labelled(lines, folders, notes, seed, str(root))


def _lines(
  root: pathlib.Path, folder: listed.Folder, sheet: pathlib.Path, split: str, notes: list[str]
) -> Iterator[tuple[listed.Line, bool]]:
  """The lines of a sheet, and whether the name says another eye than the level does."""
  header, rows, by_eye = _table(root, sheet, split == "test")
  for where, cells, fault in listed.rows_of(sheet, header, rows, notes):
    image = cells["image_id"]
    found = _NAME.fullmatch(image)
    named = {"l": "left", "r": "right"}[found[2].lower()] if found else ""
    patient = cells["patient_id"] or (found[1] if found else "")
    if by_eye:
      levels = {eye: cells[column] for eye, column in LEVELS.items() if cells[column]}
    else:
      levels = {named: next((cells[name] for name in OF_TEST if cells[name]), "")}
    if len(levels) > 1:
      levels = {named: levels[named]} if named else levels
    eye, level = next(iter(levels.items()), (named, ""))
    if not fault and len(levels) > 1:
      fault = "has a level of both eyes and a name that says neither"
    elif not fault and image and not patient:
      fault = "has no patient: PATIENT_l1, _l2, _r1, _r2 are accepted"
    elif listed.UNGRADABLE.fullmatch(level):
      fault = fault or "has level 5: not to be graded"
    yield (
      listed.Line(where, image, level, split, folder, patient, eye, fault),
      bool(named and eye and named != eye),
    )


def _table(root: pathlib.Path, sheet: pathlib.Path, of_test: bool):
  """The header in small letters, the rows, and whether there is a column of each eye."""
  content = sheets.content(sheet, root, WHAT)
  needed = ("image_id",) if of_test else ("patient_id", "image_id", *LEVELS.values())
  if sheet.suffix == ".xlsx":
    found = xlsx.rows(content, sheet, WHAT)
    header = [cell.strip().lower() for cell in found[0][1]] if found else []
    missing = [name for name in needed if header.count(name) != 1]
    if missing:
      raise UserError(f"{sheet} has no column {' and '.join(missing)}: its header is "
                      f"{', '.join(header)[:200]!r}; accepted: {WHAT}")
    rows = iter(found[1:])
  else:
    text, _ = sheets.text(content, sheet)
    header, rows, _ = sheets.table(text, sheet, needed, (), WHAT)
  if of_test and sum(header.count(name) for name in OF_TEST) != 1:
    raise UserError(f"{sheet} has no column DR_Levels: its header is {', '.join(header)[:200]!r}; "
                    f"accepted: {WHAT}")
  return header, rows, not of_test
