"""What the drawn sets share: generated where they are missing, whole or not there, by one process.

The drawing processes never import TensorFlow, and are spawned, never forked: TensorFlow has
threads by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import multiprocessing
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from medattn_jax import files
from medattn_jax.data import schema, workers
from medattn_jax.data.backend import tfds
from medattn_jax.errors import UserError

DIED = (
  "a drawing process died: too little memory, or a script that calls this"
  " without `if __name__ == '__main__':`"
)


def check(name: str, numbers: Mapping[str, Any], limits: Mapping[str, tuple[int, int]]) -> None:
  """Raises UserError, naming the set, for the first number outside its limits (both included)."""
  for key, (least, most) in limits.items():
    if not isinstance(numbers[key], int) or not least <= numbers[key] <= most:
      accepted = f"≥ {least}" if most == sys.maxsize else f"from {least} to {most}"
      raise UserError(f"{name}: {key} = {numbers[key]!r}: an integer {accepted} is accepted")


def build(make: Callable[[], Any], data_dir: str | os.PathLike) -> Any:
  """The builder that `make` constructs over `data_dir`, generated first if it is not there yet.

  Raises UserError where the directory cannot be written.
  """
  builder = make()
  target = pathlib.Path(builder.data_path)
  if not target.exists():
    try:
      _generate(builder, target)
    except (OSError, RuntimeError) as e:  # array_record says of a full disk RuntimeError
      why = getattr(e, "strerror", None) or str(e).split("; writing")[0]
      raise UserError(f"{data_dir}: cannot write the data set {builder.name}: {why}") from e
    # Read anew: where another process drew it, this builder knows no splits yet.
    builder = make()
  return builder


def splits(
  name: str,
  what: str,
  config: Any,
  examples: Callable[[Progress, range], Iterable[tuple[str, dict]]],
) -> dict[str, Iterable[tuple[str, dict]]]:
  """TFDS's split generators: disjoint ranges of numbers; a split of 0 is left out.

  Args:
    name: of the data set. what: the numbers are of, as in "patients".
    config: has `size`, and of each split how many.
    examples: draws those of a range, and tells how far it is.
  """
  total = sum(getattr(config, split) for split in schema.SPLITS)
  progress = Progress(name, what, total, config.size)
  first, made = 0, {}
  for split in schema.SPLITS:
    count = getattr(config, split)
    if count:
      made[split] = examples(progress, range(first, first + count))
    first += count
  return made


def draw_all(
  draw: Callable[[int], dict], numbers: Sequence[int], spawn_from: int
) -> Iterator[dict]:
  """`map(draw, numbers)`; from `spawn_from` numbers on by all cores, a few ahead.

  A process that dies is noticed at once.
  """
  if len(numbers) < spawn_from:
    yield from map(draw, numbers)
    return
  early, drawn = {}, 0
  for number, example in workers.answers(draw, numbers, workers.cores()):
    if isinstance(example, workers.Died):
      raise OSError(None, DIED)
    early[number] = example
    while drawn in early:
      yield early.pop(drawn)
      drawn += 1


class Progress:
  """A line on stderr now and then: `what` done, of how many, images a second."""

  def __init__(self, name: str, what: str, total: int, size: int, every: float = 2.0):
    self.name, self.what, self.total, self.every = name, what, total, every
    self.done = self.images = 0
    self.start = self.said = time.monotonic()
    print(f"{name}: drawing {total} {what} at {size} pixels", file=sys.stderr)

  def add(self, images: int) -> None:
    self.done += 1
    self.images += images
    now = time.monotonic()
    if now - self.said < self.every and self.done < self.total:
      return
    self.said = now
    live = sys.stderr.isatty()
    rate = self.images / max(now - self.start, 1e-6)
    print(
      f"{self.name}: {self.done}/{self.total} {self.what}, {rate:.0f} images/s",
      end="\r" if live and self.done < self.total else "\n",
      file=sys.stderr,
      flush=True,
    )
    if not live:
      self.every = min(self.every * 2, 30.0)  # a log wants few lines


def _generate(builder, target):
  """Generates aside and renames; one process at a time, the others wait and find it done."""
  if getattr(multiprocessing.current_process(), "_inheriting", False):
    # A spawned process is importing its parent's script, and would wait here for its parent.
    sys.exit(
      f"{builder.name}: called while a process starts: `if __name__ == '__main__':` lacks"
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  with open(target.parent / ".lock", "a+", opener=files.in_place) as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"{builder.name}: waiting for another process that draws {target}", file=sys.stderr)
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
