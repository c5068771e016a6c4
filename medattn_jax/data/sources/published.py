"""What the published sets have in common: the rows of their sheets become photographs.

Their sheets are what their publishers wrote, so one bad row costs itself alone, and nothing in them
ends the work.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

from medattn_jax.data import preprocess, schema
from medattn_jax.data.sources import Photograph, sheets
from medattn_jax.errors import UserError

# A level as spreadsheets write it; Python's int() would also read "1_0" and other scripts' digits.
_LEVEL = re.compile(r"([0-9])(\.0*)?")

# A row's photograph, and where it stands, as in "line 3 of a.csv".
Found = list[tuple[str, Photograph]]


def level(text: str, highest: int = schema.LEVELS - 1) -> int:
  """The level that a cell states; raises BadImage where it is none of 0 … highest."""
  found = _LEVEL.fullmatch(text)
  if found is None or int(found[1]) > highest:
    shown = f"grade {text!r}" if text else "no grade"
    raise preprocess.BadImage(f"has {shown}: 0-{highest} are accepted")
  return int(found[1])


def collect(
  header: list[str],
  rows: Iterable[tuple[int, list[str]]],
  sheet: str,
  column: str,
  photograph: Callable[[Mapping[str, str]], Photograph],
) -> tuple[Found, list[tuple[str, str]]]:
  """The photographs that the rows of a sheet name, and (picture, why not) of those it cannot be.

  Args:
    header, rows: as sheets.table gives them; rows without any text are nothing.
    sheet: its name. column: the one that names the picture.
    photograph: makes one of a row's {column: cell}, or raises BadImage.
  """
  found: Found = []
  rejected = []
  for line, row in rows:
    if not any(cell.strip() for cell in row):
      continue
    where, image = f"line {line} of {sheet}", ""
    try:
      cells = sheets.cells(header, row)
      image = cells[column]
      if not image:
        raise preprocess.BadImage("names no image")
      found.append((where, photograph(cells)))
    except preprocess.BadImage as error:
      rejected.append((image or f"{sheet} line {line}", f"{error} ({where})"))
  return found, rejected


def once(found: Found) -> tuple[list[Photograph], list[tuple[str, str]], list[str]]:
  """Each picture once; those that rows say different things of are rejected.

  Returns the photographs, (image_id, why not), and what to say.
  """
  by_file = collections.defaultdict(list)
  for where, photograph in found:
    by_file[photograph.path, photograph.entry].append((where, photograph))
  photographs, rejected, twice = [], [], 0
  for rows in by_file.values():
    first = rows[0][1]
    if len({(p.level, p.patient, p.eye, p.split) for _, p in rows}) > 1:
      told = "; ".join(f"{where}: level {p.level}" for where, p in rows[:4])
      rejected.append((first.image_id, f"is labelled more than once and differently ({told})"))
    else:
      photographs.append(first)
      twice += len(rows) - 1
  notes = [f"{twice} rows repeat an image that is listed already"] if twice else []
  return photographs, rejected, notes


def whole(photographs: Iterable[Photograph]) -> tuple[list[Photograph], list[tuple[str, str]]]:
  """The photographs of the patients who are in one split, and (image_id, why not) of the others."""
  photographs = list(photographs)
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


def told(photographs: Iterable[Photograph]) -> str:
  """'8 train, 2 test', of the splits that have any."""
  counts = collections.Counter(photograph.split for photograph in photographs)
  return ", ".join(f"{counts[split]} {split}" for split in schema.SPLITS if counts[split])


def csv_table(
  sheet: pathlib.Path, root: pathlib.Path, required: tuple[str, ...], what: str
) -> tuple[list[str], Iterable[tuple[int, list[str]]]]:
  """Header and rows of a sheet below `root`. Raises UserError where it is of no use as a whole."""
  text, _ = sheets.text(sheets.content(sheet, root, what), sheet)
  header, rows, _ = sheets.table(text, sheet, required, (), what)
  return header, rows


def find_sheet(
  folder: pathlib.Path, name: str, columns: tuple[str, ...] = ()
) -> pathlib.Path | None:
  """The file right in `folder` that is called `name`, or else the .csv that has the `columns`."""
  there = sorted(folder.glob("*"))
  named = [path for path in there if path.name.lower() == name.lower()]
  if named or not columns:
    return named[0] if named else None
  for path in there:
    if path.suffix.lower() == ".csv":
      with contextlib.suppress(UserError):  # some other sheet
        csv_table(path, folder, columns, name)
        return path
  return None


def inside(path: pathlib.Path, folder: pathlib.Path) -> bool:
  """Whether `path` is a folder, and no link that leads out of `folder`."""
  return path.is_dir() and pathlib.Path(os.path.realpath(path)).is_relative_to(folder.resolve())
