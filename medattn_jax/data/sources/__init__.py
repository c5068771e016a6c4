"""The raw data sets `medattn prepare` reads; one module each, `read(folder, seed, skip)`.

A source has either photographs, files that are to be cropped and encoded (Labelled), or pixels
that are ready, arrays within one file (Arrays).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np

from medattn_jax.data import preprocess, schema
from medattn_jax.errors import UserError

FRACTIONS = (("train", 0.7), ("validation", 0.1), ("test", 0.2))
DEPTH = 3  # a download often lies a folder or two below the one it was unpacked into
MAX_FOLDERS = 2000


@dataclasses.dataclass
class Photograph:
  """One labelled picture of a raw data set. `path` is a real file below the input folder."""

  image_id: str
  path: pathlib.Path
  level: int
  patient: str  # "" until assign_splits for one of its own
  eye: str  # "left", "right" or ""
  split: str  # "" until assign_splits
  entry: str = ""  # the picture's name within `path`, where that is a zip archive
  # Lesions: (index of schema.TYPES, y0, x0, y1, x1), in pixels as the file has them (before EXIF
  # turns them), y1 and x1 the first that are beyond.
  boxes: tuple[tuple[int, int, int, int, int], ...] = ()
  drawn: bool = False  # the split was drawn by chance


@dataclasses.dataclass
class Labelled:
  """What a source found: photographs in the sheet's order, what it left out, what to say."""

  photographs: list[Photograph]
  rejected: list[tuple[str, str]]  # (file, reason)
  notes: list[str]
  splits: list[str]  # what assign_splits did


@dataclasses.dataclass
class Arrays:
  """Photographs that are arrays within one file, of one size, each its own patient."""

  file: RawFile
  size: int
  channels: int  # 1 or 3
  num_classes: int
  counts: dict[str, int]  # of the photographs of each split that has any
  # Of a split: (image_id, level, uint8 [size, size] or [size, size, 3]), the same each time.
  read: Callable[[str], Iterator[tuple[str, int, np.ndarray]]]
  rejected: list[tuple[str, str]]  # (file, reason)
  notes: list[str]


class RawFile:
  """A plain file that is read more than once and must stay as it was.

  Attributes:
    path: where it is. digest: its SHA-256, hexadecimal.
  """

  def __init__(self, path: pathlib.Path, what: str):
    """Reads the file once. Raises UserError, which says `what` is accepted in its place."""
    self.path = path
    try:
      with preprocess.plain_file(path) as file:
        self._state = _state(file)
        self.digest = hashlib.file_digest(file, "sha256").hexdigest()
    except preprocess.BadImage as error:
      raise UserError(f"{path} {error}; accepted: {what}") from None

  @contextlib.contextmanager
  def open(self) -> Iterator[BinaryIO]:
    """The file, open for reading. Raises UserError where it is no longer the one that was read."""
    try:
      with preprocess.plain_file(self.path) as file:
        if _state(file) == self._state:
          yield file
          if _state(file) == self._state:
            return
    except preprocess.BadImage:  # it is not even a file any more
      pass
    raise UserError(f"{self.path} was changed while it was read: run prepare again")


def _state(file: BinaryIO) -> tuple[int, ...]:
  status = os.fstat(file.fileno())
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def find_file(place: pathlib.Path, fits: Callable[[str], bool], what: str) -> RawFile:
  """The one file of the folder `place` whose name `fits`; or `place`, where it is a file itself.

  Args:
    what: the words for such a file, as in "a fer2013.csv".

  Raises:
    UserError: there is none, or more than one, or a link that leads outside of the folder.
  """
  if not place.is_dir():
    return RawFile(place, what)
  names = sorted(name for name in os.listdir(place) if fits(name))
  if not names:
    raise UserError(f"--input={place} has no such file; accepted: a folder with {what}, or the "
                    "file itself")
  if len(names) > 1:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise UserError(f"--input={place} has {len(names)} such files, {', '.join(names[:5])}{more}; "
                    f"accepted: a folder with {what} alone, or the file itself")
  try:
    return RawFile(preprocess.resolve(place / names[0], place), what)
  except preprocess.BadImage as error:
    raise UserError(f"{place / names[0]} {error}; accepted: {what}") from None


def find_folder(
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


def has(folder: pathlib.Path, *names: str) -> bool:
  """Whether one of these is in the folder, be it a link to nothing."""
  return any(os.path.lexists(folder / name) for name in names)


def assign_splits(photographs: Iterable[Photograph], seed: int, sheet: str) -> list[str]:
  """Gives every photograph without a split its patient's: stated elsewhere, or drawn.

  One without a patient becomes a patient of its own.
  Drawn from (seed, patient), 70 % train, 10 % validation, 20 % test. Where no split at all is
  stated and a draw left one empty, single patients are moved so that few patients fill all three.

  Returns:
    Lines that say what was done.

  Raises:
    UserError: a patient with two stated splits.
  """
  photographs = list(photographs)
  for photograph in photographs:
    photograph.patient = photograph.patient or photograph.image_id
  stated: dict[str, set[str]] = {}
  for photograph in photographs:
    stated.setdefault(photograph.patient, set()).update({photograph.split} - {""})
  torn = sorted(patient for patient, splits in stated.items() if len(splits) > 1)
  if torn:
    more = f" (and {len(torn) - 1} more patients)" if len(torn) > 1 else ""
    splits = " and ".join(sorted(stated[torn[0]]))
    raise UserError(f"{sheet}: patient {torn[0]} is in two splits, {splits}{more}: all photographs "
                    "of a patient belong to one split")
  place = {patient: _place(seed, patient) for patient, splits in stated.items() if not splits}
  drawn = {patient: _by_place(x) for patient, x in place.items()}
  notes = []
  if len(drawn) == len(stated):
    moved = _fill(drawn, place)
    if moved:
      notes.append(f"{moved} of {len(drawn)} patients moved between splits so that none is empty")
  for photograph in photographs:
    if not photograph.split:
      patient = photograph.patient
      photograph.drawn = patient in drawn
      photograph.split = drawn[patient] if photograph.drawn else next(iter(stated[patient]))
  if drawn:
    counts = ", ".join(f"{list(drawn.values()).count(s)} {s}" for s in schema.SPLITS)
    notes.insert(0, f"{len(drawn)} patients without a split were split by patient, seed {seed}: "
                    f"{counts}")
  return notes


def _place(seed: int, patient: str) -> float:
  digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
  return int.from_bytes(digest[:8], "big") / 2**64


def _by_place(place: float) -> str:
  for split, share in FRACTIONS:
    place -= share
    if place < 0:
      return split
  return FRACTIONS[-1][0]


def _fill(drawn: dict[str, str], place: dict[str, float]) -> int:
  """Moves single patients into empty splits, train first; returns how many."""
  moved = 0
  for split in ("train", "test", "validation"):
    held = {s: sorted((p for p in drawn if drawn[p] == s), key=place.get) for s in schema.SPLITS}
    donor = max(schema.SPLITS, key=lambda s: len(held[s]))
    if len(held[donor]) == 1 and split == "test":
      donor = "validation"  # of two patients, the one that is not trained on is for the test
    if not held[split] and (len(held[donor]) > 1 or (held[donor] and split != "validation")):
      drawn[held[donor][0]] = split
      moved += 1
  return moved
