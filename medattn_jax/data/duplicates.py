"""The same photograph under several names: never in two splits, and never unsaid.

The same is what has the same pixels, whatever its name and the way its file was packed. Where a
split was drawn by chance, patients that share a photograph are put together. Where the splits are
stated it is a fault, unless copies are to be dropped: then the photograph stays where it is tested
on, since a model must not have been trained on it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from medattn_jax.data import schema
from medattn_jax.data.photographs import Done
from medattn_jax.data.sources import Photograph

STAYS = ("test", "validation", "train")  # of the splits a photograph is in: in the first of these

Entry = tuple[Photograph, Done]


@dataclasses.dataclass
class Settled:
  """What came of the duplicates.

  Attributes:
    kept: what is left. rejected: (file, reason) of what was dropped. notes: what is to be said.
    same: the names of each photograph that has several, as they came. fault: why `kept` may not be
      used, or "".
  """

  kept: list[Entry]
  rejected: list[tuple[str, str]]
  notes: list[str]
  same: list[list[Photograph]]
  fault: str = ""


def settle(kept: Sequence[Entry], drop: bool) -> Settled:
  """Finds what is there more than once; drops it (`drop`), or keeps it within one split."""
  groups = collections.defaultdict(list)
  for entry in kept:
    groups[entry[1].content].append(entry)
  groups = [[p for p, _ in own] for own in groups.values() if len(own) > 1]
  found = Settled(list(kept), [], _differing(groups), groups)
  if drop:
    _drop(found, groups)
    return found
  _join(found, groups)
  place = {photograph.image_id: photograph for photograph, _ in found.kept}
  groups = [[place[photograph.image_id] for photograph in own] for own in groups]
  torn = [own for own in groups if len({photograph.split for photograph in own}) > 1]
  if torn:
    first = torn[0][0]
    other = next(photograph for photograph in torn[0] if photograph.split != first.split)
    more = f", and so are {len(torn) - 1} more" if len(torn) > 1 else ""
    found.fault = (f"{first.image_id} ({first.split}) and {other.image_id} ({other.split}) are the "
                   f"same photograph in two splits{more}; accepted: photographs in one split each, "
                   "or --drop-duplicates, which keeps them where they are tested on")
  elif groups:
    names = ", ".join(photograph.image_id for photograph in groups[0][:3])
    found.notes.append(f"{len(groups)} photographs are there more than once under different names "
                       f"and are all kept, the first: {names}")
  return found


def _differing(groups: list[list[Photograph]]) -> list[str]:
  differing = [own for own in groups if len({photograph.level for photograph in own}) > 1]
  if not differing:
    return []
  told = ", ".join(f"{photograph.image_id} (level {photograph.level})"
                   for photograph in differing[0][:3])
  return [f"{len(differing)} photographs have different levels under their several names, the "
          f"first: {told}"]


def _drop(found: Settled, groups: list[list[Photograph]]) -> None:
  """Keeps one of each group: the first of those in the split that comes first in STAYS."""
  across = 0
  for own in groups:
    stays = min(own, key=lambda photograph: STAYS.index(photograph.split))
    for photograph in own:
      if photograph is not stays:
        across += photograph.split != stays.split
        levels = (f", labelled {stays.level} there and {photograph.level} here"
                  if stays.level != photograph.level else "")
        found.rejected.append((
          photograph.image_id, f"is the same photograph as {stays.image_id} ({stays.split})"
          f"{levels}: dropped from {photograph.split}"
        ))
  if groups:
    gone = {image_id for image_id, _ in found.rejected}
    found.kept = [entry for entry in found.kept if entry[0].image_id not in gone]
    found.notes.append(f"{len(gone)} photographs that are another one under a second name are "
                       f"dropped, {across} of them because the other is in another split")


def _join(found: Settled, groups: list[list[Photograph]]) -> None:
  """Puts patients whose split was drawn where the patient is that has a photograph of theirs."""
  first: dict[str, str] = {}  # another patient of the same lot; the first of a lot is there itself

  def lot(patient: str) -> str:
    while first.setdefault(patient, patient) != patient:
      first[patient] = first[first[patient]]
      patient = first[patient]
    return patient

  for own in groups:
    for photograph in own[1:]:
      first[lot(photograph.patient)] = lot(own[0].patient)
  stated, drawn = collections.defaultdict(set), collections.defaultdict(set)
  for photograph, _ in found.kept:
    if photograph.patient in first:
      of = drawn if photograph.drawn else stated
      of[lot(photograph.patient)].add(photograph.split)
  moved = set()
  for number, (photograph, done) in enumerate(found.kept):
    if photograph.drawn and photograph.patient in first:
      mine = lot(photograph.patient)
      split = next(s for s in schema.SPLITS if s in (stated[mine] or drawn[mine]))
      if split != photograph.split:
        moved.add(photograph.patient)
        found.kept[number] = dataclasses.replace(photograph, split=split), done
  if moved:
    found.notes.append(f"{len(moved)} patients have a photograph of a patient in another split and "
                       "are put with that one")
