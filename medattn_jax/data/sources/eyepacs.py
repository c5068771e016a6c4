"""`--source=eyepacs`: Kaggle's Diabetic Retinopathy Detection of 2015, its parts unpacked.

  trainLabels.csv           image,level: 35,126 photographs
  train/10_left.jpeg …
  retinopathy_solution.csv  image,level,Usage: 10,906 Public and 42,670 Private
  test/1_left.jpeg …

The public half of the test photographs is the validation split, the private half the test split
(papers: §1). TFDS's `diabetic_retinopathy_detection` has the same folder as its manual_dir, and
beside it sample/, ten of the training photographs once more; the solution it downloads elsewhere,
under a name of its own: put that beside trainLabels.csv, it is known by its columns.
A patient is the number before _left and _right.
"""

from __future__ import annotations

import collections
import os
import pathlib
import re
from collections.abc import Collection, Mapping

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

TRAIN, SOLUTION = "trainLabels.csv", "retinopathy_solution.csv"
USAGES = {"public": "validation", "private": "test"}
# Of each half: the sheet, its columns, the folder of its photographs.
HALVES = (
  (TRAIN, ("image", "level"), "train"),
  (SOLUTION, ("image", "level", "usage"), "test"),
)
WHAT = (f"a folder with {TRAIN} (image,level) beside train/, with {SOLUTION} (image,level,Usage) "
        "beside test/, or with both")
_PART = re.compile(r"(train|test)\.zip\.\d+", re.IGNORECASE)


def read(folder: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The labelled photographs of `folder`; `skip` are folders below it that are not looked into.

  Raises UserError where neither half is there. A row that cannot be used is in `rejected`, and so
  is a photograph without a row.
  """
  del seed  # nothing is drawn by chance
  found: labels.Found = []
  rejected: labels.Rejected = []
  notes: list[str] = []
  usable = 0
  for name, columns, inner in HALVES:
    # The columns of the training labels are in many a sheet, the solution's in none but it.
    sheet = sheets.find(folder, name, columns if name == SOLUTION else ())
    place = folder / inner
    there = _inside(place, folder)
    if sheet and there:
      usable += 1
    else:
      notes += _told(folder, name, place, sheet, there)
    if not there:
      continue
    files = pictures.Pictures(folder, skip, inner)
    why = f"has no label: {name} is not there"
    if sheet:
      header, rows = sheets.read(sheet, folder, columns, WHAT)
      make = lambda cells, inner=inner, files=files: _photograph(cells, inner, files)
      some, bad = labels.collect(sheet, header, rows, "image", make, notes)
      found += some
      rejected += bad
      why = f"has no label in {sheet.name}"
    rejected += files.closed + [(picture, why) for picture in files.unasked()]
  if not usable:
    if not notes:  # as Kaggle's tool leaves the whole, all in one
      notes += [f"{path.name} is not unpacked" for path in sorted(folder.glob("*.zip*"))[:1]]
    raise UserError(f"--input={folder} has no photographs with their labels"
                    f"{''.join(f'; {note}' for note in notes)}; accepted: {WHAT}")
  if (folder / "sample").is_dir():
    notes.append("sample/ is not read: its photographs are in train/ too")
  photographs, bad = labels.once(found, folder, notes)
  photographs, torn = _whole(photographs)
  return sources.Labelled(photographs, rejected + bad + torn, notes, [
    "splits are Kaggle's, its public half as validation and its private half as test: "
    f"{labels.by_split(photographs)}"
  ])


def _photograph(
  cells: Mapping[str, str], half: str, files: pictures.Pictures
) -> sources.Photograph:
  image = cells["image"]
  split = USAGES.get(cells["usage"].lower()) if half == "test" else "train"
  if split is None:
    raise preprocess.BadImage(f"has Usage {cells['usage']!r}: Public or Private is accepted")
  level, path = labels.level(cells["level"]), files.find(image)
  patient, eye = schema.side_of(pictures.stem(image)) or (image, "")
  return sources.Photograph(image, path, level, patient, eye, split)


def _whole(
  photographs: list[sources.Photograph],
) -> tuple[list[sources.Photograph], labels.Rejected]:
  """The photographs of the patients who are in one split, and (image_id, why not) of the others."""
  splits = collections.defaultdict(set)
  for photograph in photographs:
    splits[photograph.patient].add(photograph.split)
  kept, torn = [], []
  for photograph in photographs:
    where = splits[photograph.patient]
    if len(where) == 1:
      kept.append(photograph)
    else:
      told = " and ".join(sorted(where))
      torn.append((photograph.image_id, f"has a patient, {photograph.patient}, in two splits, "
                                        f"{told}"))
  return kept, torn


def _inside(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Whether `path` is a folder, and no link that leads out of `folder`."""
  return path.is_dir() and pathlib.Path(os.path.realpath(path)).is_relative_to(folder.resolve())


def _told(
  folder: pathlib.Path, name: str, place: pathlib.Path, sheet: pathlib.Path | None, there: bool
) -> list[str]:
  """What to say of a half that is not wholly there: what is missing, and how it is unpacked."""
  notes = []
  if there:
    notes.append(f"{place.name}/ is there without {name}, and is left out")
  elif place.is_symlink():
    notes.append(f"{place.name} is a link to outside of {folder.name} or to nothing, and is not "
                 "followed")
  elif sheet:
    notes.append(f"{name} is there without {place.name}/")
  parts = sorted(path.name for path in folder.glob("*") if _PART.fullmatch(path.name)
                 and path.name.lower().startswith(f"{place.name}."))
  if parts and not there:
    notes.append(f"{parts[0]} … {parts[-1]} are the parts of one archive: unpack them with "
                 f"`cat {place.name}.zip.0* > {place.name}.zip && unzip {place.name}.zip`, or "
                 f"`7z x {parts[0]}`")
  archives = [f"{place.name}.zip"] * (not there and not parts) + [f"{name}.zip"] * (not sheet)
  notes += [f"{archive} is not unpacked: `unzip {archive}`" for archive in archives
            if (folder / archive).is_file()]
  return notes
