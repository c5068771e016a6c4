"""Photographs prepared by all cores, one file each, so that work once done stays done.

This module starts in the worker processes: it knows no TensorFlow. A file's name is
<key>.<checksum>.<checksum of the raw file>.<what was done to it>.jpg; the key stands for the raw
file (place, size, time) and what it is to become; what was done is a sum of ENLARGED, STRETCHED,
FRAMES. Where lesions were drawn on the photograph, its preprocess.Placement, as numbers joined by
-, stands before the .jpg.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from medattn_jax import console, files
from medattn_jax.data import archives, preprocess, workers
from medattn_jax.data.sources import Photograph

METHOD = 1  # raise when preprocess gives other pixels: what was prepared before is then stale
POOL_FROM = 8  # fewer photographs are done sooner than processes start
ENLARGED, STRETCHED, FRAMES = 1, 2, 4
_DIED = "ends the process that decodes it"
# Reasons that lie in the machine, perhaps, and not in the photograph.
PASSING = ("cannot be opened: ", "cannot be read: ", preprocess.NO_MEMORY, _DIED)


@dataclasses.dataclass(frozen=True)
class Job:
  """One photograph to prepare. `key` names its file and what it is to become."""

  path: str
  store: str
  key: str
  full_size: int
  quality: int
  frame: str
  entry: str = ""  # its name within `path`, where that is a zip archive
  placed: bool = False  # where its pixels went is to be told
  there: str = ""  # the file an earlier run left


@dataclasses.dataclass(frozen=True)
class Done:
  """A photograph that is prepared, or only looked at. Or the reason why it cannot be used."""

  name: str = ""  # of its file, where it is prepared; the name holds the file's checksum
  reason: str = ""
  source: str = ""  # checksum of the raw file
  oddities: int = 0  # a sum of ENLARGED, STRETCHED and FRAMES
  pixels: str = ""  # checksum of what would be prepared, where it is only looked at
  size: tuple[int, int] = (0, 0)  # width and height of the raw file, where it is only looked at
  placement: preprocess.Placement | None = None  # where it was asked for

  @property
  def content(self) -> str:
    """The same for the same pixels, whatever the file they came in."""
    return self.pixels or self.name.split(".")[1]


def jobs_of(
  photographs: Iterable[Photograph],
  rejected: list[tuple[str, str]],
  store: pathlib.Path,
  full_size: int,
  quality: int,
  frame: str,
) -> dict[str, Job]:
  """A job for each photograph that is there, by image_id; what went missing joins `rejected`."""
  jobs = {}
  for photograph in photographs:
    try:
      status = os.stat(photograph.path)
    except OSError as error:
      rejected.append((photograph.image_id, f"cannot be read: {error.strerror}"))
      continue
    path, entry, placed = os.fspath(photograph.path), photograph.entry, bool(photograph.boxes)
    identity = [METHOD, path, status.st_size, status.st_mtime_ns, full_size, quality, frame]
    identity += [entry, placed] if entry or placed else []
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    job = Job(path, os.fspath(store), key, full_size, quality, frame, entry, placed)
    jobs[photograph.image_id] = job
  return jobs


def work(
  jobs: list[Job], processes: int | None, does: Callable[[Job], Done] | None = None
) -> dict[str, Done]:
  """Does the jobs, in as many processes (the cores by default); what came of each by its key.

  By default photographs are prepared: what an earlier run left in the store is taken where it is
  intact. `does` is a function of this module to do instead, which has no store.
  """
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

  terminal = Console(stderr=True)
  live = console.Live()
  live.last = time.monotonic()  # short work is not spoken of
  stores = set() if does else {job.store for job in jobs}
  there = {path.name.partition(".")[0]: path.name
           for store in stores for path in pathlib.Path(store).glob("*.jpg")}
  jobs = [dataclasses.replace(job, there=there.get(job.key, "")) for job in jobs]
  done: dict[str, Done] = {}
  with Progress("photographs", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=terminal, disable=not terminal.is_terminal, transient=True) as progress:
    task = progress.add_task("", total=len(jobs))
    for job, result in _results(jobs, processes or workers.cores(), does):
      done[job.key] = result
      progress.advance(task)
      if not terminal.is_terminal:
        live.show(f"medattn: {len(done)} of {len(jobs)} photographs")
  return done


def _results(
  jobs: list[Job], processes: int, does: Callable[[Job], Done] | None = None
) -> Iterator[tuple[Job, Done]]:
  does = does or _photograph
  if processes == 1 or len(jobs) < POOL_FROM:
    yield from ((job, does(job)) for job in jobs)
    return
  ended = []
  for number, done in workers.answers(does, jobs, processes):
    if isinstance(done, workers.Died):
      ended.append(jobs[number])
    else:
      yield jobs[number], done
  # Memory may have been short for as many at once: each has another chance, by itself.
  for job in ended:
    [(_, done)] = workers.answers(does, [job], 1)
    died = isinstance(done, workers.Died)
    yield job, Done(reason=_DIED) if died else done


def _photograph(job: Job) -> Done:
  """Prepares one photograph into the store, or takes the one that is there and intact."""
  store = pathlib.Path(job.store)
  if job.there:
    _, written, source, oddities, *placement, _ = job.there.split(".")
    if checksum((store / job.there).read_bytes()) == written:
      placement = preprocess.Placement.parse(placement[0]) if placement else None
      return Done(job.there, source=source, oddities=int(oddities), placement=placement)
  try:
    content = _bytes(job)
    raw = preprocess.decode_photograph(content)
    if job.frame == "whole":
      edges = (0, raw.shape[0], 0, raw.shape[1])
      image = preprocess.fit_aligned(raw, job.full_size, 3)
    else:
      edges = preprocess.field_of_view(raw)
      image = preprocess.prepare_photograph(raw, job.full_size, edges)
  except preprocess.BadImage as error:
    return Done(reason=str(error))
  except MemoryError:
    return Done(reason=preprocess.NO_MEMORY)
  jpeg = io.BytesIO()
  Image.fromarray(image).save(jpeg, "JPEG", quality=job.quality, subsampling=0)  # colour kept whole
  source = checksum(content)
  height, width, _ = raw.shape
  oddities = ENLARGED * (max(height, width) < job.full_size)
  oddities += STRETCHED * (job.frame == "whole" and height != width)
  oddities += FRAMES * preprocess.has_more_frames(content)
  placement = None
  if job.placed:
    turn = preprocess.orientation(content)
    placement = preprocess.Placement(turn, height, width, *edges, job.frame == "cropped")
  told = f".{placement}" if placement else ""
  name = f"{job.key}.{checksum(jpeg.getvalue())}.{source}.{oddities}{told}.jpg"
  files.write_bytes(store / name, jpeg.getvalue())
  return Done(name, source=source, oddities=oddities, placement=placement)


def look(job: Job) -> Done:
  """What would come of a photograph, without preparing it: usable, or the reason why it is not."""
  try:
    content = _bytes(job)
    raw = preprocess.decode_photograph(content)
    height, width = raw.shape[:2]
    y0, y1, x0, x1 = 0, height, 0, width
    if job.frame != "whole":
      y0, y1, x0, x1 = preprocess.field_of_view(raw)
  except preprocess.BadImage as error:
    return Done(reason=str(error))
  except MemoryError:
    return Done(reason=preprocess.NO_MEMORY)
  seen = np.ascontiguousarray(raw[y0:y1, x0:x1])
  pixels = hashlib.blake2b(seen.data, digest_size=16, person=b"%dx%d" % seen.shape[:2])
  return Done(source=checksum(content), pixels=pixels.hexdigest(), size=(width, height))


def _bytes(job: Job) -> bytes:
  if job.entry:
    return archives.read(job.path, job.entry)
  return preprocess.read_bytes(job.path)


def checksum(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:32]
