"""`medattn prepare --check`: what a raw data set holds, before anything is made of it.

Nothing is written anywhere. Every photograph is read, decoded and compared, by all cores, as
`prepare` does before it crops and encodes; so what is said to be usable is.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import statistics
from collections.abc import Sequence

from medattn_jax import console
from medattn_jax.data import photographs, pixels, prepare, schema, tally
from medattn_jax.data.sources import Arrays, Labelled
from medattn_jax.errors import UserError

SHOWN = 20  # of what is rejected


@dataclasses.dataclass(frozen=True)
class Found:
  """What there is. `levels` is {split: [images of level 0, of level 1, …]}.

  `one_eyed`: patients of each split without a photograph of the other eye; every one where the
  pixels are ready. `shorter`, `longer`: least, median and most pixels of the photographs' sides.
  `repeated`: photographs that repeat another one. `rejected`: (file, reason).
  """

  patients: dict[str, int]
  levels: dict[str, list[int]]
  one_eyed: dict[str, int]
  shorter: tuple[int, int, int]
  longer: tuple[int, int, int]
  repeated: int
  rejected: list[tuple[str, str]]


def check(
  source: str,
  input_dir: str | os.PathLike,
  data_dir: str | os.PathLike | None = None,
  *,
  frame: str | None = None,
  workers: int | None = None,
  seed: int = 0,
  drop_duplicates: bool = False,
) -> Found:
  """Prints what `prepare` with the same arguments would find, and writes nothing.

  Raises:
    UserError: once all is printed, what `prepare` would end with.
  """
  input_dir = pathlib.Path(input_dir)
  raw = prepare.read_raw(
    source, input_dir, pathlib.Path(data_dir or input_dir), frame=frame, workers=workers,
    seed=seed, drop_duplicates=drop_duplicates)
  print(f"{input_dir}: checked as {source}; nothing is written")
  if isinstance(raw, Arrays):
    return _check_arrays(raw)
  return _check_photographs(raw, frame or prepare.FRAME, workers, drop_duplicates)


def _check_photographs(raw: Labelled, frame: str, workers: int | None, drop: bool) -> Found:
  rejected = list(raw.rejected)
  jobs = photographs.jobs_of(raw.photographs, rejected, pathlib.Path(), 0, 0, frame)
  done = photographs.work(list(jobs.values()), workers, photographs.look)
  settled = prepare.sorted_out(raw.photographs, jobs, done, rejected, drop)
  examples = tally.examples(settled.kept)
  levels = {split: [0] * schema.LEVELS for split in examples}
  for photograph, _ in settled.kept:
    levels[photograph.split][photograph.level] += 1
  sizes = [result.size for _, result in settled.kept]
  found = Found(
    patients=tally.patients(examples),
    levels=levels,
    one_eyed=tally.one_eyed(examples),
    shorter=_range([min(size) for size in sizes]),
    longer=_range([max(size) for size in sizes]),
    repeated=sum(len(own) - 1 for own in settled.same),
    rejected=rejected,
  )
  tally.show(found.patients, levels, one_eye=found.one_eyed)
  named = lambda p: f"{p.image_id} ({p.split}, level {p.level})"
  _tell(found, [" and ".join(map(named, own)) for own in settled.same])
  if not settled.kept:
    raise UserError(prepare.unusable(rejected))
  if settled.fault:
    raise UserError(settled.fault)
  return found


def _check_arrays(raw: Arrays) -> Found:
  levels = {split: [0] * raw.num_classes for split in raw.counts}
  census = pixels.Census(sum(raw.counts.values()))
  for split in raw.counts:
    for name, level, image in raw.read(split):
      census.add(split, name, image)
      levels[split][level] += 1
  found = Found(
    patients=dict(raw.counts),
    levels=levels,
    one_eyed=dict(raw.counts),
    shorter=(raw.size, raw.size, raw.size),
    longer=(raw.size, raw.size, raw.size),
    repeated=census.repeated,
    rejected=raw.rejected,
  )
  for remark in census.remarks():
    console.warn(remark)
  tally.show(found.patients, levels)
  _tell(found, [])
  if not raw.counts:
    raise UserError(prepare.unusable(raw.rejected))
  return found


def _range(values: Sequence[int]) -> tuple[int, int, int]:
  return (min(values), round(statistics.median(values)), max(values)) if values else (0, 0, 0)


def _tell(found: Found, same: list[str]) -> None:
  """Prints sizes, duplicates and what is rejected, one by one as far as they are few."""
  for what, (least, median, most) in (("shorter", found.shorter), ("longer", found.longer)):
    print(f"the {what} side has {least} to {most} pixels, {median} in the median")
  print(f"{found.repeated} photographs repeat another one")
  for names in same[:SHOWN]:
    print(f"  {names}")
  if len(same) > SHOWN:
    print(f"  and {len(same) - SHOWN} more")
  print(f"{len(found.rejected)} rejected")
  for name, reason in found.rejected[:SHOWN]:
    print(f"  {name}: {reason}")
  kinds = collections.Counter(
    reason.partition(" (")[0] for _, reason in found.rejected[SHOWN:])
  for reason, count in kinds.most_common(SHOWN):
    print(f"  and {count} more: {reason}")
