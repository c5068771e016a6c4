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
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

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
  """A prepared photograph: its file's name holds its checksum. Or the reason why there is none."""

  name: str = ""
  reason: str = ""
  source: str = ""  # checksum of the raw file
  oddities: int = 0  # a sum of ENLARGED and STRETCHED
  placement: preprocess.Placement | None = None  # where it was asked for


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


def work(jobs: list[Job], workers: int) -> dict[str, Done]:
  """Does the jobs, in as many processes; returns what came of each by its key.

  What an earlier run left in the store is taken where it is intact.
  """
  from rich.console import Console
  from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

  terminal = Console(stderr=True)
  live = console.Live()
  live.last = time.monotonic()  # short work is not spoken of
  stores = {job.store for job in jobs}
  there = {path.name.partition(".")[0]: path.name
           for store in stores for path in pathlib.Path(store).glob("*.jpg")}
  jobs = [dataclasses.replace(job, there=there.get(job.key, "")) for job in jobs]
  done: dict[str, Done] = {}
  with Progress("photographs", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=terminal, disable=not terminal.is_terminal, transient=True) as progress:
    task = progress.add_task("", total=len(jobs))
    for job, result in _results(jobs, workers):
      done[job.key] = result
      progress.advance(task)
      if not terminal.is_terminal:
        live.show(f"medattn: {len(done)} of {len(jobs)} photographs")
  return done


def _results(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Done]]:
  if workers == 1 or len(jobs) < POOL_FROM:
    yield from ((job, _photograph(job)) for job in jobs)
    return
  waiting = collections.deque(jobs)
  while waiting:
    suspects: list[Job] = []
    yield from _pooled(waiting, min(workers, len(waiting)), suspects)
    # A picture has ended its process. Which of those at hand is found by doing each by itself.
    for job in suspects:
      alone: list[Job] = []
      yield from _pooled(collections.deque([job]), 1, alone)
      if alone:
        yield job, Done(reason="ends the process that decodes it")


def _pooled(
  waiting: collections.deque[Job], workers: int, suspects: list[Job]
) -> Iterator[tuple[Job, Done]]:
  """Results until `waiting` is empty, or a process dies: `suspects` are then those at hand."""
  pool = concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context("spawn"), initializer=_start_worker
  )
  running: dict[concurrent.futures.Future, Job] = {}
  try:
    while waiting or running:
      while waiting and len(running) < 4 * workers:  # bounded, however long the sheet
        running[pool.submit(_photograph, waiting[0])] = waiting[0]
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
    if job.entry:
      content = archives.read(job.path, job.entry)
    else:
      content = preprocess.read_bytes(job.path)
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


def checksum(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()[:32]
