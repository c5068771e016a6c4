"""Photographs as the examples they become, and counted."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from medattn_jax.data import schema
from medattn_jax.data.sources import Photograph

MAX_COLUMNS = 12  # of the table: with more classes each has a row

T = TypeVar("T")
Entry = tuple[Photograph, T]  # a photograph and what came of it


def examples(kept: Iterable[Entry]) -> dict[str, list[list[Entry]]]:
  """The examples of each split: one or two photographs of one patient, left before right.

  Lefts and rights are paired in order; two photographs are also paired where an eye is unknown.
  Whatever is left is an example by itself.
  """
  patients = collections.defaultdict(list)
  for entry in kept:
    patients[entry[0].split, entry[0].patient].append(entry)
  found = collections.defaultdict(list)
  for split in schema.SPLITS:
    for (where, _), entries in patients.items():
      if where != split:
        continue
      eyes = {eye: [e for e in entries if e[0].eye == eye] for eye in ("left", "", "right")}
      if len(entries) == 2 and eyes[""]:
        found[split].append(eyes["left"] + eyes[""] + eyes["right"])
        continue
      pairs = min(len(eyes["left"]), len(eyes["right"]))
      for number in range(pairs):
        found[split].append([eyes["left"][number], eyes["right"][number]])
      rest = eyes["left"][pairs:] + eyes["right"][pairs:] + eyes[""]
      found[split] += [[entry] for entry in rest]
  return dict(found)


def patients(found: Mapping[str, list[list[Entry]]]) -> dict[str, int]:
  """How many patients each split has."""
  return {split: len({e[0][0].patient for e in rows}) for split, rows in found.items()}


def one_eyed(found: Mapping[str, list[list[Entry]]]) -> dict[str, int]:
  """How many patients of each split have no example of two photographs."""
  counts = {}
  for split, rows in found.items():
    most: dict[str, int] = collections.defaultdict(int)
    for entries in rows:
      patient = entries[0][0].patient
      most[patient] = max(most[patient], len(entries))
    counts[split] = sum(number == 1 for number in most.values())
  return counts


def show(
  patients: Mapping[str, int], levels: Mapping[str, Sequence[int]], **more: Mapping[str, object]
) -> None:
  """Prints the images of every level of every split; `more` are further columns, by split."""
  classes = max(map(len, levels.values()), default=0)
  names = (name.replace("_", " ") for name in more)
  table = [["split", "patients", "images", *(f"level {n}" for n in range(classes)), *names]]
  table += [
    [split, patients[split], sum(n), *n, *(column[split] for column in more.values())]
    for split, n in levels.items()
  ]
  wide = classes > MAX_COLUMNS
  for first, *cells in zip(*table, strict=True) if wide else table:
    print(f"{first:<12}" + "".join(f"{cell:>{12 if wide else 9}}" for cell in cells))
