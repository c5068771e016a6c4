"""From the rows of sheets of labels to photographs, with the same care for every layout.

A row that cannot be used is rejected with its place and its reason and costs no other.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from medattn_jax.data import preprocess, schema
from medattn_jax.data.sources import Labelled, Photograph, assign_splits, pictures, sheets
from medattn_jax.errors import UserError

# As spreadsheets write one; Python's int() would also read "1_0" and other scripts' digits.
_LEVEL = re.compile(r"([0-9])(\.0*)?")

# A row's photograph, and where it stands, as in "a.csv line 3".
Found = list[tuple[str, Photograph]]
Rejected = list[tuple[str, str]]  # (file, reason)


def level(text: str, highest: int = schema.LEVELS - 1, ungradable: int | None = None) -> int:
  """The level that a cell states; raises BadImage where it is none of 0 … highest.

  Args:
    ungradable: what the sheet calls what cannot be graded.
  """
  found = _LEVEL.fullmatch(text)
  if found and int(found[1]) == ungradable:
    raise preprocess.BadImage(f"is graded {ungradable}: not to be graded")
  if found is None or int(found[1]) > highest:
    shown = f"level {text!r}" if text else "an empty level"
    raise preprocess.BadImage(f"has {shown}: 0-{highest} are accepted")
  return int(found[1])


def collect(
  sheet: pathlib.PurePath,
  header: list[str],
  rows: Iterable[tuple[int, list[str]]],
  column: str,
  photograph: Callable[[Mapping[str, str]], Photograph],
  notes: list[str],
) -> tuple[Found, Rejected]:
  """The photographs that the rows of a sheet name, and (picture, why not) of those it cannot be.

  How many rows are empty is added to `notes`.

  Args:
    header, rows: as sheets.table gives them.
    column: the one that names the picture.
    photograph: makes one of a row's {column: cell}, or raises BadImage.

  Raises:
    UserError: there is no row, or as `rows` does.
  """
  found: Found = []
  rejected: Rejected = []
  blank = 0
  for line, row in rows:
    if not any(cell.strip() for cell in row):
      blank += 1  # spreadsheets leave thousands of them
      continue
    image, where = "", f"{sheet.name} line {line}"
    try:
      cells = sheets.cells(header, row)
      image = cells[column]
      if not image:
        raise preprocess.BadImage("names no image")
      found.append((where, photograph(cells)))
    except preprocess.BadImage as error:
      rejected.append((image or where, f"{error} ({where})"))
  if not found and not rejected:
    raise UserError(f"{sheet} has a header but no rows: one row an image is needed")
  if blank:
    notes.append(f"{blank} empty rows of {sheet.name} are left out")
  return found, rejected


def once(found: Found, root: pathlib.Path, notes: list[str]) -> tuple[list[Photograph], Rejected]:
  """Each picture once, in the rows' order; those that rows say different things of are rejected.

  Where two pictures below `root` bear one name, they are called by their paths. `notes` are added
  to.
  """
  by_file: dict[object, Found] = collections.defaultdict(list)
  for where, photograph in found:
    by_file[photograph.path, photograph.entry].append((where, photograph))
  names = collections.Counter(rows[0][1].image_id for rows in by_file.values())
  photographs, rejected, twice = [], [], 0
  for rows in by_file.values():
    first = rows[0][1]
    if names[first.image_id] > 1:
      first.image_id = first.path.relative_to(root.resolve()).as_posix()
    doubtful = [name for name in ("level", "patient", "eye", "split")
                if len({getattr(photograph, name) for _, photograph in rows}) > 1]
    if doubtful:
      told = "; ".join(
        f"{where}: {', '.join(f'{name} {getattr(photograph, name)}' for name in doubtful)}"
        for where, photograph in rows[:4])
      rejected.append((first.image_id, f"is labelled more than once and differently ({told})"))
    else:
      photographs.append(first)
      twice += len(rows) - 1
  if twice:
    notes.append(f"{twice} rows repeat an image that is listed already: it is taken once")
  return photographs, rejected


def labelled(
  photographs: list[Photograph],
  rejected: Rejected,
  parts: Sequence[tuple[pictures.Pictures, str]],
  notes: list[str],
  seed: int,
  sheet: object,
) -> Labelled:
  """What a source gives whose sheets leave splits open.

  Args:
    rejected: what `collect` and `once` left out.
    parts: where photographs were looked for, and why one that no row names is rejected.
    seed: of the splits that are drawn. sheet: how errors name what states the others.

  Raises:
    UserError: a patient with two stated splits.
  """
  unlabelled = [(name, why) for files, why in parts for name in files.unasked()]
  if unlabelled:
    notes.append(f"{len(unlabelled)} pictures have no label and are left out, the first: "
                 f"{unlabelled[0][0]}")
  closed = [folder for files, _ in parts for folder in files.closed]
  splits = assign_splits(photographs, seed, str(sheet))
  return Labelled(photographs, rejected + closed + unlabelled, notes, splits)


def by_split(photographs: Iterable[Photograph]) -> str:
  """'8 train, 2 test', of the splits that have any."""
  counts = collections.Counter(photograph.split for photograph in photographs)
  return ", ".join(f"{counts[split]} {split}" for split in schema.SPLITS if counts[split])
