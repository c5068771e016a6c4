"""`--source=csv`: a folder of photographs with a labels.csv.

Columns `image` (with or without extension) and `level` (0-4); optional `patient`, `eye` (left,
right), `split` (train, validation, test). Without a patient, NN_left and NN_right are one patient,
any other picture is its own. Names are looked up among the files found below the folder, so no
name in the sheet can lead outside.
"""

from __future__ import annotations

import collections
import csv
import io
import os
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterator

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.errors import UserError

SHEET = "labels.csv"
REQUIRED = ("image", "level")
OPTIONAL = ("patient", "eye", "split")
MAX_SHEET_BYTES = 256 * 2**20
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
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
  header, rows, separator = _table(sheet, text)
  if separator != ",":
    notes.append(f"{SHEET} is separated by {SEPARATORS[separator]}")
  unknown = [name for name in header if name and name not in REQUIRED + OPTIONAL]
  if unknown:
    notes.append(f"columns of {SHEET} that are not read: {', '.join(unknown)}")
  pictures = _Pictures(folder, skip)
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
      cells = _cells(header, row)
      image = cells["image"]
      if not image:
        raise preprocess.BadImage("names no image")
      path = preprocess.resolve(folder / pictures.find(image), folder)
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
  rejected += pictures.closed
  unlabelled = [(name, f"has no label in {SHEET}") for name in pictures.unasked()]
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
  try:
    preprocess.resolve(sheet, sheet.parent)
    content = preprocess.read_bytes(sheet)
  except preprocess.BadImage as error:
    raise UserError(f"{sheet} {error}: {_COLUMNS}") from None
  if content.startswith((b"\xff\xfe", b"\xfe\xff")):
    try:
      return content.decode("utf-16"), [f"{SHEET} is UTF-16"]
    except UnicodeDecodeError as error:
      raise UserError(f"{sheet} is damaged UTF-16 ({error.reason}): save it as UTF-8") from None
  if b"\0" in content:
    raise UserError(f"{sheet} is no text (it has zero bytes): save it as CSV in UTF-8")
  try:
    return content.decode("utf-8-sig"), []
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise UserError(f"{sheet} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}): save "
                    "the sheet as UTF-8") from None


def _table(sheet: pathlib.Path, text: str) -> tuple[list[str], Iterator, str]:
  """The header's names, an iterator of (line, cells), and the separator."""
  first = next((line for line in re.split(r"\r\n|\r|\n", text) if line.strip()), None)
  if first is None:
    raise UserError(f"{sheet} is empty: {_COLUMNS}")
  try:
    headers = {s: [c.strip().lower() for c in next(csv.reader([first], delimiter=s))]
               for s in SEPARATORS}
  except csv.Error as error:
    raise UserError(f"{sheet}: its header cannot be read ({error}): {_COLUMNS}") from None
  separator = next((s for s in SEPARATORS if set(REQUIRED) <= set(headers[s])), None)
  if separator is None:
    separator = max(SEPARATORS, key=lambda s: len(headers[s]))
    missing = " and ".join(name for name in REQUIRED if name not in headers[separator])
    shown = ", ".join(headers[separator])[:200]
    raise UserError(f"{sheet} has no column {missing}: its header, read as separated by "
                    f"{SEPARATORS[separator]}, is {shown!r}; {_COLUMNS} (separated by "
                    f"{', '.join(SEPARATORS.values())})")
  header = headers[separator]
  double = [name for name in REQUIRED + OPTIONAL if header.count(name) > 1]
  if double:
    raise UserError(f"{sheet} has more than one column {double[0]}: one is accepted")

  def rows() -> Iterator[tuple[int, list[str]]]:
    # strict: a quote that never closes would otherwise swallow the rows after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line, seen = 1, False
    try:
      for row in reader:
        if seen and row:
          yield line, row
        seen = seen or any(cell.strip() for cell in row)
        line = reader.line_num + 1
    except csv.Error as error:
      raise UserError(f"{sheet} line {line} cannot be read ({error}): quotes must be closed, and "
                      "doubled inside quotes") from None

  return header, rows(), separator


def _cells(header: list[str], row: list[str]) -> dict[str, str]:
  cells = collections.defaultdict(str)
  cells.update((name, cell.strip()) for name, cell in zip(header, row, strict=False))
  if any(cell.strip() for cell in row[len(header) :]):
    raise preprocess.BadImage(f"has {len(row)} cells where the header has {len(header)}: a name "
                              "with a separator in it needs quotes")
  return cells


def _photograph(cells: dict[str, str], path: pathlib.Path) -> sources.Photograph:
  level = _LEVEL.fullmatch(cells["level"])
  if level is None:
    shown = f"level {cells['level']!r}" if cells["level"] else "an empty level"
    raise preprocess.BadImage(f"has {shown}: 0-4 (0, 1, 2, 3, 4) are accepted")
  stem = _stem(cells["image"].replace("\\", "/"))
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


def _stem(name: str) -> str:
  root, suffix = os.path.splitext(name)
  return root if suffix.lower() in preprocess.SUFFIXES else name


def _folded(name: str) -> str:
  """One spelling of what file systems and sheets spell differently: accents, case."""
  return unicodedata.normalize("NFC", name).casefold()


class _Pictures:
  """The files below a folder, to be found by the names a sheet gives them."""

  def __init__(self, folder: pathlib.Path, skip: Collection[pathlib.Path]):
    self.closed: list[tuple[str, str]] = []  # folders that cannot be listed
    self._links: set[str] = set()
    self._names: list[str] = []
    skipped = {os.path.realpath(path) for path in skip}
    closed = lambda e: self.closed.append(
      (os.path.relpath(e.filename, folder), f"cannot be listed: {e.strerror}")
    )
    for where, inner, files in os.walk(folder, onerror=closed):
      relative = pathlib.PurePath(os.path.relpath(where, folder))
      inner[:] = [d for d in inner if os.path.realpath(os.path.join(where, d)) not in skipped]
      for name in inner:
        if os.path.islink(os.path.join(where, name)):
          self._links.add((relative / name).as_posix())
      # A folder or pipe that is named like a picture is told apart when it is opened.
      named = files + [d for d in inner if _stem(d) != d]
      self._names += [(relative / name).as_posix() for name in named]
    self._names.sort()  # a folder is listed in no order
    self._asked: set[str] = set()
    # From the strictest reading of a name to the most lenient.
    views = (
      lambda n: n,
      _stem,
      _folded,
      lambda n: _folded(_stem(n)),
      lambda n: n.rpartition("/")[2],
      lambda n: _stem(n.rpartition("/")[2]),
      lambda n: _folded(n.rpartition("/")[2]),
      lambda n: _folded(_stem(n.rpartition("/")[2])),
    )
    self._views = []
    for number, view in enumerate(views):
      table = collections.defaultdict(list)
      for name in self._names:
        if number % 2 == 0 or view(name) != views[number - 1](name):
          table[view(name)].append(name)
      self._views.append(table)

  def find(self, image: str) -> str:
    """The relative name of the file the sheet calls `image`; raises BadImage."""
    name = image
    if "\\" in name and name not in self._views[0]:
      name = name.replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
      raise preprocess.BadImage("is an absolute path: names below the input folder are accepted")
    if ".." in parts:
      raise preprocess.BadImage("leads outside of the input folder: names below it are accepted")
    name = "/".join(part for part in parts if part not in ("", "."))
    for number, table in enumerate(self._views):
      matches = table.get(_folded(name) if number % 4 > 1 else name, ())
      if len(matches) > 1:
        raise preprocess.BadImage(f"may be any of {', '.join(matches[:3])}")
      if matches:
        self._asked.update(matches)
        return matches[0]
    behind = next((link for link in self._links if name.startswith(f"{link}/")), None)
    if behind:
      raise preprocess.BadImage(f"is behind the link {behind}, which is not followed")
    raise preprocess.BadImage("is missing")

  def unasked(self) -> list[str]:
    """The pictures that no name in the sheet has found."""
    return [n for n in self._names if n not in self._asked and _stem(n) != n]
