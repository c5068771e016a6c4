"""From the lines of published lists to labelled photographs, with the same care for every layout.

A line that cannot be used is rejected with its place and its reason and costs no other; a picture
that no line names is rejected too.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator

from medattn_jax.data import preprocess, sources
from medattn_jax.data.sources import pictures, sheets
from medattn_jax.errors import UserError

DEPTH = 3  # a download often lies a folder or two below the one it was unpacked into
MAX_FOLDERS = 2000
# A level as spreadsheets write it; Python's int() would also read "1_0" and other scripts' digits.
LEVEL = re.compile(r"([0-4])(\.0*)?")
UNGRADABLE = re.compile(r"5(\.0*)?")  # what several of these lists call what cannot be graded


class Folder:
  """The pictures below the folder `name` of `root`, wherever below it they lie."""

  def __init__(self, root: pathlib.Path, name: str, skip: Collection[pathlib.Path] = ()):
    self.root, self.name = root, name
    self.is_there = (root / name).is_dir()
    self._pictures = pictures.Pictures(root / name, skip) if self.is_there else None

  def find(self, image: str) -> pathlib.Path:
    """The real place of the picture that a list calls `image`; raises BadImage."""
    if self._pictures is None:
      raise preprocess.BadImage(f"is missing: there is no folder {self.name}")
    return preprocess.resolve(self.root / self.name / self._pictures.find(image), self.root)

  def rejected(self, why: str) -> list[tuple[str, str]]:
    """Folders that cannot be listed, and the pictures that `find` has not found, with `why`."""
    if self._pictures is None:
      return []
    faults = self._pictures.closed + [(name, why) for name in self._pictures.unasked()]
    return [((pathlib.PurePath(self.name) / name).as_posix(), fault) for name, fault in faults]


@dataclasses.dataclass(frozen=True)
class Line:
  """What one line of a list says of a picture."""

  where: str  # such as "train.txt line 3"
  image: str  # as the list names it
  level: str
  split: str  # "" where it is to be drawn
  folder: Folder
  patient: str = ""  # "" for one of its own
  eye: str = ""
  fault: str = ""  # why the line cannot be used


def labelled(
  lines: Iterable[Line],
  folders: Iterable[tuple[Folder, str]],
  notes: list[str],
  seed: int,
  lists: str,
) -> sources.Labelled:
  """The photographs that `lines` name, in their order.

  A photograph's name is the list's; where two pictures bear one name it is their path. `notes` are
  added to.

  Args:
    folders: each folder the lines speak of, and why a picture in it that none names is rejected.
    seed: of the split by patients, where a line states none.
    lists: the words for the lists in errors.
  """
  found: dict[pathlib.Path, list[Line]] = collections.defaultdict(list)
  rejected: list[tuple[str, str]] = []
  for line in lines:
    try:
      if not line.image:
        raise preprocess.BadImage(line.fault or "names no image")
      path = line.folder.find(line.image)
      if line.fault:
        raise preprocess.BadImage(line.fault)
      if not LEVEL.fullmatch(line.level):
        shown = f"level {line.level!r}" if line.level else "an empty level"
        raise preprocess.BadImage(f"has {shown}: 0-4 (0, 1, 2, 3, 4) are accepted")
      found[path].append(line)
    except preprocess.BadImage as error:
      rejected.append((line.image or line.where, f"{error} ({line.where})"))
  names = collections.Counter(own[0].image for own in found.values())
  photographs, twice = [], 0
  for path, own in found.items():
    first = own[0]
    image_id = first.image
    if names[image_id] > 1:
      image_id = path.relative_to(first.folder.root.resolve()).as_posix()
    if len({_label(line) for line in own}) > 1:
      told = "; ".join(f"{line.where}: level {line.level}" for line in own[:4])
      rejected.append((image_id, f"is labelled more than once and differently ({told})"))
      continue
    twice += len(own) - 1
    photographs.append(sources.Photograph(
      image_id=image_id,
      path=path,
      level=int(LEVEL.fullmatch(first.level)[1]),
      patient=first.patient or image_id,
      eye=first.eye,
      split=first.split,
    ))
  if twice:
    notes.append(f"{twice} lines repeat an image that is listed already: it is taken once")
  unlabelled = [fault for folder, why in folders for fault in folder.rejected(why)]
  if unlabelled:
    notes.append(f"{len(unlabelled)} pictures have no label and are left out, the first: "
                 f"{unlabelled[0][0]}")
  splits = sources.assign_splits(photographs, seed, lists)
  return sources.Labelled(photographs, rejected + unlabelled, notes, splits)


def _label(line: Line) -> tuple[str, ...]:
  return LEVEL.fullmatch(line.level)[1], line.patient, line.eye, line.split


def rows_of(
  sheet: pathlib.Path, header: list[str], rows: Iterable[tuple[int, list[str]]], notes: list[str]
) -> Iterator[tuple[str, dict[str, str], str]]:
  """(where, {column: cell}, "" or why it cannot be used) of each row of a sheet that is not empty.

  Raises UserError where there is none. How many are empty is added to `notes`.
  """
  count = blank = 0
  for number, row in rows:
    if not any(cell.strip() for cell in row):
      blank += 1  # spreadsheets leave thousands of them
      continue
    count += 1
    where = f"{sheet.name} line {number}"
    try:
      yield where, sheets.cells(header, row), ""
    except preprocess.BadImage as error:
      yield where, collections.defaultdict(str), str(error)
  if not count:
    raise UserError(f"{sheet} has a header but no rows: one row an image is needed")
  if blank:
    notes.append(f"{blank} empty rows of {sheet.name} are left out")


def has(folder: pathlib.Path, *names: str) -> bool:
  """Whether one of these is in the folder, be it a link to nothing."""
  return any(os.path.lexists(folder / name) for name in names)


def folder_with(
  place: pathlib.Path, fits: Callable[[pathlib.Path], bool], what: str
) -> pathlib.Path | None:
  """`place`, or the one folder below it, not far down, that `fits`; None where there is none.

  Raises UserError, with the words `what` is accepted, where several fit that lie equally deep.
  """
  level = [place]
  for _ in range(DEPTH + 1):
    found = [folder for folder in level if fits(folder)]
    if len(found) > 1:
      names = ", ".join(str(folder) for folder in found[:3])
      raise UserError(f"--input={place} holds {len(found)} such folders, {names}; accepted: {what}")
    if found:
      return found[0]
    level = [inner for folder in level for inner in _folders(folder)][:MAX_FOLDERS]
  return None


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
  try:
    with os.scandir(folder) as entries:
      names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
  except OSError:  # what cannot be listed holds nothing that is found
    return []
  return [folder / name for name in names]
