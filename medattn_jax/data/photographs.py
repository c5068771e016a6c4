"""Photographs prepared by all cores, one file each, so that work once done stays done.

This module starts in the worker processes: it knows no TensorFlow. A file's name is
<key>.<checksum>.<checksum of the raw file>.<what was done to it>.jpg; the key stands for the raw
file (place, size, time) and what it is to become; what was done is a sum of ENLARGED, STRETCHED.
Where lesions were drawn on the photograph, its preprocess.Placement, as numbers joined by -, stands
before the .jpg.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image

from medattn_jax import console, files
from medattn_jax.data import archives, preprocess
from medattn_jax.data.sources import Photograph

METHOD = 1  # raise when preprocess gives other pixels: what was prepared before is then stale
POOL_FROM = 8  # fewer photographs are done sooner than processes start
ENLARGED, STRETCHED = 1, 2


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
  oddities: int = 0  # a sum of ENLARGED and STRETCHED
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
  jobs: list[Job], workers: int | None, does: Callable[[Job], Done] | None = None
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
    for job, result in _results(jobs, workers or _cores(), does):
      done[job.key] = result
      progress.advance(task)
      if not terminal.is_terminal:
        live.show(f"medattn: {len(done)} of {len(jobs)} photographs")
  return done


def _results(
  jobs: list[Job], workers: int, does: Callable[[Job], Done] | None = None
) -> Iterator[tuple[Job, Done]]:
  does = does or _photograph
  if workers == 1 or len(jobs) < POOL_FROM:
    yield from ((job, does(job)) for job in jobs)
    return
  waiting = collections.deque(jobs)
  while waiting:
    suspects: list[Job] = []
    yield from _pooled(waiting, min(workers, len(waiting)), suspects, does)
    # A picture has ended its process. Which of those at hand is found by doing each by itself.
    for job in suspects:
      alone: list[Job] = []
      yield from _pooled(collections.deque([job]), 1, alone, does)
      if alone:
        yield job, Done(reason="ends the process that decodes it")


def _pooled(
  waiting: collections.deque[Job], workers: int, suspects: list[Job], does: Callable[[Job], Done]
) -> Iterator[tuple[Job, Done]]:
  """Results until `waiting` is empty, or a process dies: `suspects` are then those at hand."""
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn"), initializer=_start_worker
  )
  running: dict[concurrent.futures.Future, Job] = {}
  try:
    while waiting or running:
      while waiting and len(running) < 4 * workers:  # bounded, however long the sheet
        running[pool.submit(does, waiting[0])] = waiting[0]
        waiting.popleft()
      ready, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
      for future in ready:
        result = future.result()
        yield running.pop(future), result
  except BrokenProcessPool:
    suspects.extend(running.values())
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
  """A worker leaves Ctrl-C to its parent and ends with it, even where that is killed."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  sentinel = multiprocessing.parent_process().sentinel

  def watch() -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


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
    return Done(reason="needs more memory than there is")
  jpeg = io.BytesIO()
  Image.fromarray(image).save(jpeg, "JPEG", quality=job.quality, subsampling=0)  # colour kept whole
  source = checksum(content)
  height, width, _ = raw.shape
  oddities = ENLARGED * (max(height, width) < job.full_size)
  oddities += STRETCHED * (job.frame == "whole" and height != width)
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
    return Done(reason="needs more memory than there is")
  seen = np.ascontiguousarray(raw[y0:y1, x0:x1])
  pixels = hashlib.blake2b(seen.data, digest_size=16, person=b"%dx%d" % seen.shape[:2])
  return Done(source=checksum(content), pixels=pixels.hexdigest(), size=(width, height))


def _bytes(job: Job) -> bytes:
  if job.entry:
    return archives.read(job.path, job.entry)
  return preprocess.read_bytes(job.path)


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def checksum(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:32]
