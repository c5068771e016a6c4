"""`--source=messidor`: Messidor, 1,200 photographs of three hospitals, grades 0-3.

  Base11.zip … Base34.zip   100 TIFF files each, or folders of these names, unpacked
  Annotation_Base11.xls …   or .csv; beside them, or within: Image name, Ophthalmologic department,
                            Retinopathy grade, Risk of macular edema

Archives are read as they lie, nothing is unpacked (data/archives.py). The grades are Messidor's
own, 0 none, 1 and 2 few and more lesions, 3 many or new vessels, and not the international scale of
0-4; {0, 1} and {2, 3} are its not referable and referable (papers: §1).

Messidor's errata, on its download page (adcis.net/en/third-party/messidor), are applied: four
grades in Base11 and Base13 (31 August and 24 October 2016), and 13 pairs of copies in Base33
(16 August 2017), of which the second is left out; one pair has two grades (9 February 2018: which
is right is not said), so both are. The page itself was not at hand: names, grades and dates are
those on which four public programs that cite it agree.

Who a photograph is of is not published: each counts as a patient of its own. Nor is a split, and
the set is there to be tested on: all of it is the test split.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from medattn_jax.data import archives, preprocess, sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

BASES = tuple(f"Base{hospital}{part}" for hospital in "123" for part in "1234")
COLUMNS = ("image name", "retinopathy grade")
HIGHEST = 3
MAX_SHEET_BYTES = 8 * 2**20
WHAT = "a folder with Base11.zip to Base34.zip (or such folders) and their Annotation_BaseNN.xls"
# Errata: the right grade.
GRADES = {
  "20051020_63045_0100_PP": 0,
  "20051020_64007_0100_PP": 3,
  "20051020_63936_0100_PP": 1,
  "20060523_48477_0100_PP": 3,
}
# Errata: pairs of copies.
COPIES = (
  ("20051202_55582_0400_PP", "20051202_54744_0400_PP"),
  ("20051202_41076_0400_PP", "20051202_40508_0400_PP"),
  ("20051202_48287_0400_PP", "20051202_41238_0400_PP"),
  ("20051202_48586_0400_PP", "20051202_41260_0400_PP"),
  ("20051202_55457_0400_PP", "20051202_54530_0400_PP"),
  ("20051202_55626_0400_PP", "20051205_33025_0400_PP"),
  ("20051202_54783_0400_PP", "20051202_55607_0400_PP"),
  ("20051202_48575_0400_PP", "20051202_41034_0400_PP"),
  ("20051205_32966_0400_PP", "20051205_35099_0400_PP"),
  ("20051202_55484_0400_PP", "20051202_54555_0400_PP"),
  ("20051205_32981_0400_PP", "20051205_35110_0400_PP"),
  ("20051202_55562_0400_PP", "20051202_54611_0400_PP"),
  ("20051202_54547_0400_PP", "20051202_55498_0400_PP"),
)
_BASE = re.compile(r"base[ _-]?([123][1-4])(?!\d)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _File:
  """A file of the set: `name` as if its archive were a folder."""

  name: str
  path: pathlib.Path
  entry: str

  @property
  def base(self) -> str:
    """The last of its folders and its own name to tell; "" where none does."""
    told = [_BASE.search(part) for part in reversed(self.name.split("/"))]
    return next((f"Base{found[1]}" for found in told if found), "")

  @property
  def key(self) -> str:
    return pictures.folded(pictures.stem(self.name.rpartition("/")[2]))

  def rows(self, folder: pathlib.Path) -> tuple[list[str], Iterable[tuple[int, list[str]]]]:
    """Header and rows of a sheet. Raises BadImage or UserError where it is of no use."""
    path = preprocess.resolve(self.path, folder)
    content = archives.read(path, self.entry) if self.entry else preprocess.read_bytes(path)
    if len(content) > MAX_SHEET_BYTES:
      raise preprocess.BadImage(f"has {len(content)} bytes, more than {MAX_SHEET_BYTES}")
    if self.name.lower().endswith(".xls"):
      return _xls(content)
    text, _ = sheets.text(content, self.name)
    header, rows, _ = sheets.table(text, self.name, COLUMNS, (), f"the columns {COLUMNS}")
    return header, rows


def read(folder: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The graded photographs of `folder`; `skip` are folders below it that are not looked into.

  Raises UserError where there is no sheet, or one that needs xlrd, and that is not installed. An
  archive, sheet or row that cannot be used is in `rejected`, and so is a photograph without a row.
  """
  del seed  # nothing is drawn by chance
  notes = ["whose eyes the photographs show is not published: each counts as a patient of its own"]
  files, rejected = _files(folder, skip, notes)
  tables = _tables(files, notes)
  if not tables:
    told = f"; {rejected[0][0]} {rejected[0][1]}" if rejected else ""
    raise UserError(f"--input={folder} has no Annotation_BaseNN.xls or .csv{told}; accepted: "
                    f"{WHAT}")
  images = _Images(folder, files)
  found: labels.Found = []
  for table in tables:
    try:
      header, rows = table.rows(folder)
      make = functools.partial(images.photograph, base=table.base)
      some, bad = labels.collect(
        pathlib.PurePath(table.name), header, rows, COLUMNS[0], make, notes)
    except (preprocess.BadImage, UserError) as error:
      rejected.append((table.name, str(error).removeprefix(f"{table.name} ")))
      continue
    found += some
    rejected += bad
  photographs, bad = labels.once(found, folder, notes)
  rejected += bad
  photographs = _without_copies(photographs, rejected, notes)
  if images.corrected:
    notes.append(f"errata: {len(images.corrected)} grades are corrected")
  there = {photograph.image_id.partition("/")[0] for photograph in photographs}
  absent = [base for base in BASES if base not in there]
  if absent and len(absent) < len(BASES):
    notes.append(f"no photograph of {', '.join(absent)} is usable: Messidor has {len(BASES)} parts")
  rejected += [(file.name, "has no row in a sheet that is read") for file in images.unasked()]
  return sources.Labelled(photographs, rejected, notes, [
    f"no split is published: all {len(photographs)} photographs are the test split"
  ])


class _Images:
  """The pictures of the set, to be found by a sheet's names."""

  def __init__(self, folder: pathlib.Path, files: Iterable[_File]):
    self.corrected: set[str] = set()  # the names of those with an erratum
    self._folder = folder
    self._by_key = collections.defaultdict(list)
    self._asked: set[_File] = set()
    for file in files:
      if pictures.stem(file.name) != file.name:
        self._by_key[file.key].append(file)

  def photograph(self, cells: Mapping[str, str], base: str) -> sources.Photograph:
    """The photograph of a row of the sheet of `base` ("" where it does not tell)."""
    image = cells[COLUMNS[0]]
    if "/" in image or "\\" in image:
      raise preprocess.BadImage("is no file's name but a path")
    name = pictures.stem(image)
    there = self._by_key.get(pictures.folded(name), [])
    # A sheet speaks of its own part, or, where all are in one folder, of any.
    there = [file for file in there if not base or file.base in (base, "")]
    if len(there) > 1:
      raise preprocess.BadImage(f"may be any of {', '.join(file.name for file in there[:3])}")
    if not there:
      raise preprocess.BadImage("is missing")
    file = there[0]
    self._asked.add(file)
    path = preprocess.resolve(file.path, self._folder)
    stated = labels.level(cells[COLUMNS[1]], HIGHEST)
    level = GRADES.get(name, stated)
    if level != stated:
      self.corrected.add(name)
    image_id = f"{file.base or base}/{image}".lstrip("/")
    return sources.Photograph(image_id, path, level, image_id, "", "test", file.entry)

  def unasked(self) -> Iterator[_File]:
    return (file for files in self._by_key.values() for file in files if file not in self._asked)


def _files(
  folder: pathlib.Path, skip: Collection[pathlib.Path], notes: list[str]
) -> tuple[list[_File], list[tuple[str, str]]]:
  """The files below `folder` and within the archives there; and (name, why not)."""
  listed = pictures.Pictures(folder, skip)
  rejected = list(listed.closed)
  packed = [name for name in listed.names if name.lower().endswith(".zip")]
  files = [_File(name, folder / name, "") for name in listed.names if name not in packed]
  unpacked = {file.base for file in files if pictures.stem(file.name) != file.name} - {""}
  for name in packed:
    if _File(name, folder / name, "").base in unpacked:
      notes.append(f"{name} is not read: its photographs are there unpacked")
      continue
    try:
      path = preprocess.resolve(folder / name, folder)
      inner, refused = archives.entries(path)
    except preprocess.BadImage as error:
      rejected.append((name, str(error)))
      continue
    place = name[: -len(".zip")]
    rejected += [(f"{place}/{entry}", why) for entry, why in refused]
    files += [_File(f"{place}/{entry}", path, entry) for entry in inner]
  return files, rejected


def _tables(files: Iterable[_File], notes: list[str]) -> list[_File]:
  """The sheets to read: of each part what was saved as CSV, or else what Messidor has, .xls."""
  tables = [file for file in files if file.name.lower().endswith((".csv", ".xls"))]
  exported = {file.base for file in tables if file.name.lower().endswith(".csv")} - {""}
  kept = [file for file in tables
          if file.name.lower().endswith(".csv") or file.base not in exported]
  if len(kept) < len(tables):
    notes.append(f"{len(tables) - len(kept)} sheets are read as .csv, and not as the .xls that is "
                 "there too")
  if any(file.name.lower().endswith(".xls") for file in kept):
    try:
      import xlrd  # noqa: F401
    except ImportError:
      raise UserError("Messidor's sheets are .xls, and xlrd, which reads them, is not installed: "
                      "`pip install 'medattn_jax[xls]'`, or save each as .csv beside it") from None
  return kept


def _xls(content: bytes) -> tuple[list[str], list[tuple[int, list[str]]]]:
  """The header, in small letters, and the rows of a spreadsheet of Excel 97. Raises BadImage."""
  import xlrd

  try:
    book = xlrd.open_workbook(file_contents=content, logfile=io.StringIO(), ragged_rows=True)
    tables = [[[_text(cell) for cell in sheet.row_values(row)] for row in range(sheet.nrows)]
              for sheet in book.sheets()]
  except Exception as error:  # whatever it makes of damage
    why = " ".join(str(error).split())[:120] or type(error).__name__
    raise preprocess.BadImage(f"is no .xls file, or damaged ({why})") from None
  for rows in tables:
    for number, row in enumerate(rows):
      header = [cell.strip().lower() for cell in row]
      if set(COLUMNS) <= set(header):
        return header, list(enumerate(rows[number + 1 :], number + 2))
  raise preprocess.BadImage(f"has no columns {' and '.join(COLUMNS)}")


def _text(cell: object) -> str:
  """A cell as it is shown: Excel has all numbers as floats."""
  return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def _without_copies(
  photographs: list[sources.Photograph], rejected: list[tuple[str, str]], notes: list[str]
) -> list[sources.Photograph]:
  """The photographs without the copies that the errata name; those join `rejected`."""
  by_name = {pictures.stem(p.image_id.rpartition("/")[2]): p for p in photographs}
  out = {}
  for pair in COPIES:
    if not set(pair) <= by_name.keys():
      continue
    first, second = (by_name[name] for name in pair)
    if first.level == second.level:
      out[second.image_id] = f"is a copy of {first.image_id} (Messidor's errata)"
      continue
    for one, other in ((first, second), (second, first)):
      out[one.image_id] = (f"is a copy of {other.image_id} (Messidor's errata), and has grade "
                           f"{one.level} where that has {other.level}")
  if out:
    notes.append(f"errata: {len(out)} photographs of Base33 are copies of others, or have a copy "
                 "of another grade, and are left out")
  rejected += out.items()
  return [photograph for photograph in photographs if photograph.image_id not in out]
