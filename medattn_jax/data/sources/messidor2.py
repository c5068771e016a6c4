"""`--source=messidor2`: Messidor-2 with the adjudicated grades that Google published on Kaggle.

  IMAGES/20051020_43808_0100_PP.png, IM000023.JPG …   1,748 photographs, from ADCIS
  messidor-2.csv       left;right: 874 pairs, from ADCIS
  messidor_data.csv    image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable: Kaggle's

Grades are 0-4. Kaggle's sheet names some photographs .jpg that are .JPG; four of its rows are not
gradable and have no grade. A pair is a patient; without messidor-2.csv each photograph is one.
Nobody published a split, and the set is there to be tested on: all of it is the test split.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Collection, Mapping

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

SHEET, PAIRS = "messidor_data.csv", "messidor-2.csv"
COLUMNS = ("image_id", "adjudicated_dr_grade")
WHAT = f"a folder with {SHEET} ({','.join(COLUMNS)}, …), {PAIRS} (left;right) and IMAGES/"
_PART = re.compile(r"IMAGES\.zip(\.\d+)?|IMAGES\.z\d\d", re.IGNORECASE)


def read(folder: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The graded photographs of `folder`; `skip` are folders below it that are not looked into.

  Raises UserError where the sheet of grades cannot be used. A row that cannot be used is in
  `rejected`, and so is a photograph without a row.
  """
  del seed  # nothing is drawn by chance
  notes: list[str] = []
  sheet = sheets.find(folder, SHEET, COLUMNS)
  files = pictures.Pictures(folder, skip)
  packed = sorted(n for n in files.names if _PART.fullmatch(n.rpartition("/")[2]))
  if packed and not files.unasked():
    notes.append(f"{packed[0]} is not unpacked: `7z x {packed[0]}`")
  if sheet is None:
    told = "".join(f"; {note}" for note in notes)
    raise UserError(f"--input={folder} has no {SHEET}{told}; accepted: {WHAT}")
  pairs, doubtful = _pairs(folder, notes)

  def photograph(cells: Mapping[str, str]) -> sources.Photograph:
    image = cells["image_id"]
    path = _find(files, image)
    if cells["adjudicated_gradable"].partition(".")[0] == "0":
      raise preprocess.BadImage("is not gradable (adjudicated_gradable 0)")
    level = labels.level(cells["adjudicated_dr_grade"])
    key = _key(image)
    if key in doubtful:
      raise preprocess.BadImage(f"is in more than one pair of {PAIRS} ({doubtful[key]})")
    patient, eye = pairs.get(key, (pictures.stem(image), ""))
    return sources.Photograph(image, path, level, patient, eye, "test")

  header, rows = sheets.read(sheet, folder, COLUMNS, WHAT)
  found, rejected = labels.collect(sheet, header, rows, "image_id", photograph, notes)
  photographs, bad = labels.once(found, folder, notes)
  alone = sum(photograph.eye == "" for photograph in photographs)
  if pairs and alone:
    notes.append(f"{alone} photographs are in no pair of {PAIRS}: each is a patient of its own")
  rejected += bad + files.closed
  rejected += [(picture, f"has no row in {sheet.name}") for picture in files.unasked()]
  return sources.Labelled(photographs, rejected, notes, [
    f"no split is published: all {len(photographs)} photographs are the test split"
  ])


def _find(files: pictures.Pictures, image: str) -> pathlib.Path:
  """As Pictures.find, and by the name without its suffix where there is none with it."""
  try:
    return files.find(image)
  except preprocess.BadImage:
    if pictures.stem(image) == image:
      raise
    return files.find(pictures.stem(image))


def _key(image: str) -> str:
  return pictures.folded(pictures.stem(image.replace("\\", "/").rpartition("/")[2]))


def _pairs(
  folder: pathlib.Path, notes: list[str]
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
  """Of every paired photograph (patient, eye); and the lines of those in more than one pair.

  A patient bears the name of the left photograph.
  """
  sheet = sheets.find(folder, PAIRS, schema.EYES)
  if sheet is None:
    notes.append(f"{PAIRS} is not there: each photograph counts as a patient of its own, though "
                 "two of them may be one's two eyes")
    return {}, {}
  header, rows = sheets.read(sheet, folder, schema.EYES, f"{PAIRS} has left;right")
  columns = [header.index(eye) for eye in schema.EYES]
  pairs: dict[str, tuple[str, str]] = {}
  lines = collections.defaultdict(list)
  for line, row in rows:
    images = [row[column].strip() if column < len(row) else "" for column in columns]
    patient = next((pictures.stem(image) for image in images if image), "")
    for eye, image in zip(schema.EYES, images, strict=True):
      if image:
        pairs[_key(image)] = patient, eye
        lines[_key(image)].append(line)
  told = lambda numbers: f"lines {', '.join(map(str, numbers))}"
  return pairs, {key: told(numbers) for key, numbers in lines.items() if len(numbers) > 1}
