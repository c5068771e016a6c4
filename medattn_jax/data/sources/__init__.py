"""The raw data sets `medattn prepare` reads; one module each, `read(folder, seed, skip)`."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable

from medattn_jax.data import schema
from medattn_jax.errors import UserError

FRACTIONS = (("train", 0.7), ("validation", 0.1), ("test", 0.2))


@dataclasses.dataclass
class Photograph:
  """One labelled picture of a raw data set. `path` is a real file below the input folder."""

  image_id: str
  path: pathlib.Path
  level: int
  patient: str
  eye: str  # "left", "right" or ""
  split: str  # "" until assign_splits


@dataclasses.dataclass
class Labelled:
  """What a source found: photographs in the sheet's order, what it left out, what to say."""

  photographs: list[Photograph]
  rejected: list[tuple[str, str]]  # (file, reason)
  notes: list[str]
  splits: list[str]  # what assign_splits did


def assign_splits(photographs: Iterable[Photograph], seed: int, sheet: str) -> list[str]:
  """Gives every photograph without a split its patient's: stated elsewhere, or drawn.

  Drawn from (seed, patient), 70 % train, 10 % validation, 20 % test. Where no split at all is
  stated and a draw left one empty, single patients are moved so that few patients fill all three.

  Returns:
    Lines that say what was done.

  Raises:
    UserError: a patient with two stated splits.
  """
  photographs = list(photographs)
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
      photograph.split = drawn[patient] if patient in drawn else next(iter(stated[patient]))
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
