"""Checkpoints that are complete or not there, and are verified before their numbers are used.

The one module that knows Orbax. A step's directory, `checkpoints/<step>`, holds

  tree/           the arrays, as Orbax writes them
  meta.json       what the caller wants to know beside the arrays
  manifest.json   size and SHA-256 of every file above, and a SHA-256 of itself

It is written under a hidden name, synced and given its own name by one rename. Orbax does not
notice a flipped bit and takes an empty directory for its latest step; the manifest does neither.

Everything is stored as plain arrays of the host, so that a step saved on eight devices is read on
one and the reverse. The tree's containers (dataclasses, tuples, optax states) are stored as nested
dictionaries keyed by field name or index.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from medattn_jax import arrays, console, files, manifest, processes
from medattn_jax.errors import UserError

T = TypeVar("T")
Tree = Any

_SAVING, _DROPPING = ".saving-", ".dropping-"  # Hidden names of what is not there yet, or no more.
# What tensorstore says in words where Python has an errno.
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_DISK_WORDS = tuple(os.strerror(number) for number in _DISK_ERRNOS)


class Damaged(UserError):
  """A checkpoint that is not what was written: a file is missing, changed or strange."""

  def __init__(self, step: int, why: str, directory: str | os.PathLike = ""):
    super().__init__(f"{pathlib.Path(directory) / str(step)}: damaged checkpoint: {why}")
    self.step, self.why = step, why


class Checkpoints:
  """The checkpoints of one directory. With several processes, all of them make every call.

  Args:
    directory: where the steps lie; made at the first save.
    keep: how many of the newest steps stay (at least two); the best one stays besides.
  """

  def __init__(self, directory: str | os.PathLike, keep: int = 2):
    self.directory = pathlib.Path(directory).absolute()  # Orbax takes absolute paths only.
    self.keep = max(2, keep)
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._pending = False
    self._damaged: set[int] = set()

  # Writing.

  def save(
    self,
    step: int,
    tree: Tree,
    meta: Mapping,
    score: float | None = None,
    *,
    replace: bool = False,
  ) -> None:
    """Copies `tree` to the host and writes it in the background; the caller may donate it at once.

    The write before this one is waited for.

    Args:
      step: the checkpoint's name, a number from 0.
      tree: nested containers of arrays (no PRNG keys, nothing of size zero); None is kept.
      meta: strict JSON; `phase_index` orders the phases when the best step is asked for.
      score: higher is better; None for a step that was not evaluated.
      replace: whether an intact checkpoint of this step gives way to this one when it is complete,
        or stays as it is.

    Raises:
      UserError: the write before this one met a full or read-only disk.
      TypeError, ValueError: the tree or meta cannot be stored.
    """
    self.wait()
    meta_text = json.dumps(dict(meta), indent=2, allow_nan=False) + "\n"
    if score is not None and not math.isfinite(score):
      score = None
    rank = None if score is None else [int(meta.get("phase_index", 0)), float(score)]
    stored = arrays.to_host(tree)
    self._pending = True
    if jax.process_index() == 0:
      arguments = (step, stored, meta_text, rank, replace)
      self._thread = threading.Thread(target=self._write, args=arguments, name=f"save-{step}")
      self._thread.start()

  def wait(self, together: bool = True) -> None:
    """Waits for the write under way. Raises what it met, on every process.

    `together`: False where this process ends alone, and so waits for its own write only.
    """
    if not self._pending:
      return
    self._pending = False
    error = None
    if self._thread is not None:
      self._thread.join()
      error, self._error, self._thread = self._error, None, None
    if not together:
      return
    agreed = processes.agree(error is None)
    if error is not None:
      raise error
    if not agreed:
      raise UserError(f"{self.directory}: the first process could not save a checkpoint")

  def drop(self, step: int) -> None:
    """Deletes a step; one that is not there is no error. It disappears in one rename."""
    self.wait()
    if jax.process_index() == 0:
      self._drop(step)

  def _drop(self, step: int) -> None:
    hidden = self.directory / f"{_DROPPING}{step}"
    try:
      os.rename(self.directory / str(step), hidden)
    except FileNotFoundError:
      return
    shutil.rmtree(hidden, ignore_errors=True)  # What is left is swept at the next save.

  def _write(self, step: int, tree: dict, meta_text: str, rank: list | None, replace: bool) -> None:
    aside = self.directory / f"{_SAVING}{step}"
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._sweep()
      intact = os.path.lexists(self._path(step)) and self._is_intact(step)
      if intact and not replace:
        return
      aside.mkdir()
      _orbax_save(aside / "tree", tree)
      (aside / "meta.json").write_text(meta_text)
      manifest.write(aside, {"step": step, "rank": rank})
      if intact:
        self._drop(step)
      os.rename(aside, self._path(step))
      files.sync_directory(self.directory)
      self._damaged.discard(step)
      self._prune(step)
    except BaseException as error:
      self._error = _plain(error, step, self.directory)
      shutil.rmtree(aside, ignore_errors=True)

  def _sweep(self) -> None:
    """Removes what saves and deletions killed half-way have left. Only a writer may."""
    for name in os.listdir(self.directory):
      if name.startswith((_SAVING, _DROPPING)):
        shutil.rmtree(self.directory / name)

  def _is_intact(self, step: int) -> bool:
    """Whether what bears the step's name is intact; if not, it is moved out of the way."""
    path = self._path(step)
    if _is_empty(path):
      return False  # A rename onto an empty directory succeeds.
    why = self._why_damaged(step)
    if why is None:
      return True
    number, away = 1, path.with_name(f"{step}.damaged")
    while os.path.lexists(away):
      number, away = number + 1, path.with_name(f"{step}.damaged-{number}")
    os.rename(path, away)
    console.warn(f"{path}: damaged checkpoint: {why}; moved to {away.name} and written anew")
    return False

  def _prune(self, newest: int) -> None:
    intact = [
      step
      for step in self.steps()
      if step not in self._damaged and self._why_damaged(step, sums=False) is None
    ]
    kept = {newest, *intact[-self.keep :]}
    if ranked := [(rank, step) for step in intact if (rank := self._rank(step))]:
      kept.add(max(ranked)[1])
    for step in self.steps():
      if step < newest and step not in kept:
        self._drop(step)

  # Looking.

  def steps(self) -> list[int]:
    """The complete steps (those with a manifest), oldest first. Looks at names only."""
    return [step for step in self._entries() if (self._path(step) / manifest.NAME).is_file()]

  def any(self) -> bool:
    """Whether there is anything to begin from or to lose: a step, intact or damaged."""
    return any(not _is_empty(self._path(step)) for step in self._entries())

  def _entries(self) -> list[int]:
    """Every entry that is named as a step is, whatever it may be."""
    try:
      names = os.listdir(self.directory)
    except FileNotFoundError:
      return []
    except OSError as error:
      raise UserError(f"{self.directory}: cannot list checkpoints: {error.strerror}") from None
    return sorted(int(n) for n in names if re.fullmatch("0|[1-9][0-9]{0,8}", n))

  def resolve(self, step: str | int = "latest") -> int:
    """The number of the step that is meant.

    Args:
      step: "latest" or "last", the newest; "best", the highest (phase, score), of equals the later,
        or the newest where no step has a score; or a number.

    Raises:
      UserError: there is no such step, or `step` is none of the above.
    """
    steps = processes.from_first(self.steps())
    if isinstance(step, str) and step.isascii() and step.isdigit():
      step = int(step)
    if step not in ("latest", "last", "best") and type(step) is not int:
      raise UserError(f"step={step!r}: accepted are a step's number, 'best' and 'last'")
    for other in sorted(set(self._entries()) - set(steps)):
      damaged = Damaged(other, f"{manifest.NAME} is missing", self.directory)
      empty = f"{self._path(other)}: an empty directory, no checkpoint"
      console.warn(f"{empty if _is_empty(self._path(other)) else damaged}; passed over")
    if not steps:
      raise UserError(f"{self.directory}: no checkpoint there")
    if step in ("latest", "last"):
      return steps[-1]
    if step != "best":
      if step not in steps:
        raise UserError(f"{self.directory}: no checkpoint of step {step}; there are {steps}")
      return step
    ranked = []
    for candidate in steps:
      try:
        if rank := self._rank(candidate):
          ranked.append((rank, candidate))
      except manifest.Broken as broken:
        console.warn(f"{Damaged(candidate, str(broken), self.directory)}; passed over")
    return max(ranked)[1] if ranked else steps[-1]

  def verify(self, step: int) -> None:
    """Compares every file of a step with its manifest. Raises Damaged, on every process."""
    why = self._why_damaged(step)
    if not processes.agree(why is None):
      self._damaged.add(step)
      raise Damaged(step, why or "another process found it so", self.directory)

  def _why_damaged(self, step: int, *, sums: bool = True) -> str | None:
    try:
      manifest.check(self._path(step), sums=sums)
      self._rank(step)
      named = manifest.read(self._path(step)).get("step")
      return None if named == step else f"it is a copy of step {named}"
    except manifest.Broken as broken:
      return str(broken)

  def _rank(self, step: int) -> tuple:
    """(phase index, score) of a step; () without a score. Raises manifest.Broken."""
    rank = manifest.read(self._path(step)).get("rank")
    try:
      return () if rank is None else (int(rank[0]), float(rank[1]))
    except (TypeError, ValueError, LookupError):
      raise manifest.Broken(f"{manifest.NAME} has no rank") from None

  def _path(self, step: int) -> pathlib.Path:
    return self.directory / str(step)

  # Reading.

  def meta(self, step: int) -> dict:
    """The meta of a step without its arrays, verified by itself. Raises Damaged."""
    try:
      meta = json.loads(manifest.read_file(self._path(step), "meta.json"))
    except (manifest.Broken, ValueError) as error:
      raise Damaged(step, str(error), self.directory) from None
    if not isinstance(meta, dict):
      raise Damaged(step, "meta.json is no JSON object", self.directory)
    return meta

  def newest_meta(self) -> dict | None:
    """The meta of the newest step whose meta is intact, whatever became of its arrays."""
    for step in reversed(self._entries()):
      with contextlib.suppress(Damaged):
        return self.meta(step)
    return None

  def load(self, step: int) -> tuple[dict, dict]:
    """Reads a step into numpy arrays, whatever the devices. Returns (nested dict, meta).

    Raises:
      Damaged: the files are not what was written.
    """
    self.verify(step)
    tree, meta, failure = None, None, None
    try:
      tree = _orbax_load(self._path(step) / "tree")
      meta = self.meta(step)
    except Exception as error:
      failure = error
    if not processes.agree(isinstance(tree, dict) and isinstance(meta, dict)):
      why = " ".join(f"cannot be read: {failure!r}".split())[:300]
      raise Damaged(step, why, self.directory) from failure
    return tree, meta

  def restore(self, step: int, target: Tree) -> tuple[Tree, dict]:
    """Reads a step into the containers and onto the shardings of `target`. Returns (tree, meta).

    Args:
      step: its number.
      target: the tree that was saved, with jax.ShapeDtypeStruct leaves (with their shardings; a
        leaf without one goes to the default device).

    Raises:
      Damaged: the files are not what was written.
      UserError: they are, and hold other arrays than `target`.
    """
    stored, meta = self.load(step)
    try:
      return arrays.place(stored, target), meta
    except arrays.Mismatch as mismatch:
      raise UserError(f"{self._path(step)}: {mismatch}") from None

  def newest_intact(self, restore: Callable[[int], T]) -> T | None:
    """What `restore(step)` returns for the newest step that is not Damaged; None if there is none.

    Every step that is passed over is said on stderr with the reason.

    Raises:
      UserError: there are checkpoints and all of them are damaged.
    """
    reasons = []
    for step in reversed(processes.from_first(self._entries())):
      if _is_empty(self._path(step)):
        console.warn(f"{self._path(step)}: an empty directory, no checkpoint; passed over")
        continue
      try:
        return restore(step)
      except Damaged as damaged:
        self._damaged.add(step)
        reasons.append(f"{step}: {damaged.why}")
        console.warn(f"{damaged}; going back to the one before")
    if reasons:
      raise UserError(
        f"{self.directory}: every checkpoint is damaged ({'; '.join(reasons[:3])});"
        " move the folder away to begin anew"
      )
    return None


def _orbax_handler():
  # Imported here: `import medattn_jax` and a lock need no Orbax. Each process acts for itself:
  # one writes, all read, and none waits for the others inside Orbax.
  import orbax.checkpoint as ocp

  logging.getLogger("absl").addFilter(_raised_anyway)
  alone = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(),
    active_processes={jax.process_index()},
    barrier_sync_key_prefix=f"process_{jax.process_index()}",
  )
  return ocp, ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
  )


def _raised_anyway(record: logging.LogRecord) -> bool:
  """Whether to print a record: Orbax logs the traceback of what it raises, of a full disk too."""
  return not (record.exc_info and "orbax" in record.pathname)


def _orbax_save(path: pathlib.Path, tree: dict) -> None:
  ocp, checkpointer = _orbax_handler()
  before = sys.unraisablehook
  # After a write that failed the others find nobody who waits, and say so with a traceback each.
  sys.unraisablehook = lambda late: str(late.exc_value) == "Event loop is closed" or before(late)
  with checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
  sys.unraisablehook = before  # not after a failure: they may still come


def _orbax_load(path: pathlib.Path) -> dict:
  ocp, checkpointer = _orbax_handler()
  with checkpointer:
    shapes = checkpointer.metadata(path).item_metadata.tree
    promised = sum(
      math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes)
    )
    if promised > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
      raise ValueError(f"it promises {promised >> 30} GiB of arrays, more than there is memory")
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _is_empty(path: pathlib.Path) -> bool:
  try:
    return not path.is_symlink() and not os.listdir(path)
  except OSError:
    return False


def _plain(error: BaseException, step: int, directory: pathlib.Path) -> BaseException:
  """The user's error in what stopped a save, if it is one: the disk or the rights."""
  text = str(error)
  words = next((word for word in _DISK_WORDS if word.lower() in text.lower()), None)
  if not isinstance(error, OSError) and words is None:
    return error
  why = words or error.strerror or text
  plain = UserError(
    f"{directory}: checkpoint {step} was not saved: {why.lower()};"
    " the earlier ones are untouched, run again when it is mended"
  )
  plain.__cause__ = error
  return plain
