"""`synthetic_fundus`: the drawn photographs of data/synthetic.py as a TFDS data set.

It is generated where it is missing, by all cores, and read like every other set. The drawing
processes never import TensorFlow, and are spawned, never forked: TensorFlow has threads by then.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import io
import itertools
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time

from medattn_jax.data import schema, synthetic
from medattn_jax.data.backend import tfds
from medattn_jax.errors import UserError

DIED = (
  "a drawing process died: too little memory, or a script that calls this"
  " without `if __name__ == '__main__':`"
)
SPAWN_FROM = 12  # fewer patients are drawn sooner than a process is started


@dataclasses.dataclass(kw_only=True)
class SyntheticFundusConfig(tfds.core.BuilderConfig):
  """Which patients to draw, and how large; train, validation and test are numbers of patients."""

  seed: int
  size: int
  train: int
  validation: int
  test: int


class SyntheticFundus(tfds.core.GeneratorBasedBuilder):
  """Both eyes of drawn patients; the splits are disjoint ranges of patient numbers."""

  name = "synthetic_fundus"
  VERSION = tfds.core.Version(schema.VERSION)
  BUILDER_CONFIGS = []  # noqa: RUF012 (TFDS reads a plain list)

  def _info(self):
    return self.dataset_info_from_configs(
      description="Drawn fundus photographs with lesions, graded 0-4 (see data/synthetic.py).",
      features=schema.features(self.builder_config.size),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    config, first, splits = self.builder_config, 0, {}
    progress = _Progress(sum(getattr(config, split) for split in schema.SPLITS), config.size)
    for split in schema.SPLITS:
      count = getattr(config, split)
      if count:
        splits[split] = self._generate_examples(range(first, first + count), progress)
      first += count
    return splits

  def _generate_examples(self, patients, progress):
    config = self.builder_config
    draw = functools.partial(synthetic.draw_example, config.seed, size=config.size)
    spawn = len(patients) >= SPAWN_FROM
    for example in _drawn_by_all_cores(draw, patients) if spawn else map(draw, patients):
      progress.add(len(example["images"]))
      yield example["patient"], example


def build(data_dir, *, seed: int, size: int, train: int, validation: int, test: int):
  """The builder of this set, generated first if it is not there yet.

  Args:
    data_dir: TFDS data directory; the set goes to DIR/synthetic_fundus/<config>/<version>.
    seed, size: what to draw, and its pixels a side.
    train, validation, test: numbers of patients; a split of 0 is left out.

  Raises:
    UserError: a number that makes no set, or a directory that cannot be written.
  """
  numbers = {"seed": seed, "size": size, "train": train, "validation": validation, "test": test}
  for key, least in (("seed", 0), ("size", 16), ("train", 1), ("validation", 0), ("test", 0)):
    if not isinstance(numbers[key], int) or numbers[key] < least:
      raise UserError(
        f"synthetic_fundus: {key} = {numbers[key]!r}: an integer ≥ {least} is accepted"
      )
  config = SyntheticFundusConfig(
    name=f"size{size}_seed{seed}_{train}_{validation}_{test}",
    description=f"{train}/{validation}/{test} patients, {size} pixels, seed {seed}",
    **numbers,
  )
  make = functools.partial(
    SyntheticFundus, data_dir=os.fspath(data_dir), config=config, file_format=schema.FILE_FORMAT
  )
  builder = make()
  target = pathlib.Path(builder.data_path)
  if not target.exists():
    try:
      _generate(builder, target)
    except (OSError, RuntimeError) as e:  # array_record says of a full disk RuntimeError
      why = getattr(e, "strerror", None) or str(e).split("; writing")[0]
      raise UserError(f"{data_dir}: cannot write the data set synthetic_fundus: {why}") from e
    # Read anew: where another process drew it, this builder knows no splits yet.
    builder = make()
  return builder


def _generate(builder, target):
  """Generates aside and renames; one process at a time, the others wait and find it done."""
  if getattr(multiprocessing.current_process(), "_inheriting", False):
    # A spawned process is importing its parent's script, and would wait here for its parent.
    sys.exit("synthetic_fundus: called while a process starts: `if __name__ == '__main__':` lacks")
  target.parent.mkdir(parents=True, exist_ok=True)
  with open(target.parent / ".lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"synthetic_fundus: waiting for another process that draws {target}", file=sys.stderr)
      fcntl.flock(lock, fcntl.LOCK_EX)
    if target.exists():
      return
    # What a killed generation left behind; nobody else writes while the lock is held.
    for left in target.parent.glob(f"incomplete.*_{target.name}"):
      shutil.rmtree(left)
    tfds.disable_progress_bar()
    # TFDS speaks of a download, and makes a directory for it; there is none.
    downloads = tempfile.TemporaryDirectory(f"_{target.name}", "incomplete.", target.parent)
    with downloads, contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(file_format=schema.FILE_FORMAT, download_dir=downloads.name)


def _drawn_by_all_cores(draw, patients):
  """`map(draw, patients)`, a few patients ahead; a process that dies is noticed at once."""
  cores, patients = _cores(), iter(patients)
  pool = concurrent.futures.ProcessPoolExecutor(
    cores, multiprocessing.get_context("spawn"), initializer=synthetic.start_worker
  )
  try:
    ahead = collections.deque(pool.submit(draw, k) for k in itertools.islice(patients, 3 * cores))
    while ahead:
      yield ahead.popleft().result()
      ahead.extend(pool.submit(draw, k) for k in itertools.islice(patients, 1))
  except concurrent.futures.process.BrokenProcessPool:
    raise OSError(None, DIED) from None
  finally:
    pool.shutdown(cancel_futures=True)


class _Progress:
  """A line on stderr now and then: patients done, of how many, images a second."""

  def __init__(self, patients, size, every=2.0):
    self.patients, self.every = patients, every
    self.done = self.images = 0
    self.start = self.said = time.monotonic()
    print(f"synthetic_fundus: drawing {patients} patients at {size} pixels", file=sys.stderr)

  def add(self, images):
    self.done += 1
    self.images += images
    now = time.monotonic()
    if now - self.said < self.every and self.done < self.patients:
      return
    self.said = now
    live = sys.stderr.isatty()
    rate = self.images / max(now - self.start, 1e-6)
    print(
      f"synthetic_fundus: {self.done}/{self.patients} patients, {rate:.0f} images/s",
      end="\r" if live and self.done < self.patients else "\n",
      file=sys.stderr,
      flush=True,
    )
    if not live:
      self.every = min(self.every * 2, 30.0)  # a log wants few lines


def _cores():
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
