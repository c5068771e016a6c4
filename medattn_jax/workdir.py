"""The folder of a run: who may write to it, its configuration, and its log of numbers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from medattn_jax import console, files
from medattn_jax.errors import UserError

_MAX_CONFIG_BYTES = 16 << 20


class Workdir:
  """Paths and files of one run. Making one touches no disk; what is not ours is never deleted."""

  def __init__(self, path: str | os.PathLike):
    if not os.fspath(path):  # pathlib takes it for the current folder
      raise UserError("workdir = '': accepted is the path of a folder")
    self.path = pathlib.Path(path).absolute()
    self.checkpoints = self.path / "checkpoints"
    self.evaluation = self.path / "evaluation"
    self.metrics = self.path / "metrics.jsonl"
    self.config = self.path / "config.json"
    self.maps = self.path / "maps"

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Holds the workdir for a training, making the folder if it is missing.

    The system frees the lock when its process ends, however it ends: nothing stays to clean up.
    Where nothing else came into a folder that was made here, it goes again: a run that is refused
    leaves no trace.

    Raises:
      UserError: another training holds it, or it cannot be written to.
    """
    lock = self.path / ".lock"
    made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      # Opened to append: a second training must not empty the file that names the first.
      file = open(lock, "a+", opener=files.in_place)  # noqa: SIM115 (entered below)
    except OSError as error:
      why = "is a file" if isinstance(error, FileExistsError) else _reason(error)
      if error.errno == errno.ELOOP and lock.is_symlink():
        why = f"{lock.name} in it is a link"
      raise UserError(
        f"workdir {self.path}: {why}; accepted is a folder that can be written to"
      ) from None
    with file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        file.seek(0)
        holder = file.read(32).strip()
        whose = f" (process {holder})" if holder.isdigit() else ""
        raise UserError(
          f"workdir {self.path}: another training is running in it{whose}; take another folder or"
          " end that one first"
        ) from None
      except OSError as error:
        raise UserError(f"workdir {self.path}: cannot be locked: {_reason(error)}") from None
      try:
        with self.plain_errors():
          if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            raise OSError(errno.EBUSY, "a training that ends is removing it; run again")
          self._probe()
          file.truncate(0)
          file.write(f"{os.getpid()}\n")
          file.flush()
        yield
      finally:
        if made:
          self._remove_if_unused(made)

  def _remove_if_unused(self, made: Sequence[pathlib.Path]) -> None:
    """Removes the folders `made` where they hold nothing but the lock and empty folders."""
    inside = list(os.walk(self.path, topdown=False))
    if [name for *_, names in inside for name in names] == [".lock"]:
      with contextlib.suppress(OSError):
        (self.path / ".lock").unlink()
        for folder in [where for where, *_ in inside] + list(made[1:]):
          os.rmdir(folder)

  def _probe(self) -> None:
    """Finds a read-only or full disk now and not after the first hour."""
    probe = self.path / f".probe-{os.getpid()}"
    try:
      probe.write_bytes(b"\0")
    finally:
      probe.unlink(missing_ok=True)

  @contextlib.contextmanager
  def plain_errors(self) -> Iterator[None]:
    """Turns what the disk refuses (full, read-only, no right) into a UserError of one line."""
    try:
      yield
    except OSError as error:
      raise UserError(f"workdir {self.path}: cannot be written to: {_reason(error)}") from error

  def keep_map(self, step: int, weights: np.ndarray) -> None:
    """Keeps the map of a global attention, float32 [H, W], as it was at a step."""
    content = io.BytesIO()
    np.save(content, np.asarray(weights, np.float32), allow_pickle=False)
    with self.plain_errors():
      self.maps.mkdir(exist_ok=True)
      files.write_bytes(self.maps / f"{step:08d}.npy", content.getvalue())

  def kept_maps(self) -> dict[int, pathlib.Path]:
    """The maps that were kept, by their step in order."""
    found = (path for path in sorted(self.maps.glob("*.npy")) if path.stem.isdigit())
    return {int(path.stem): path for path in found}

  def truncate_maps(self, step: int) -> None:
    """Removes the maps kept after `step`: those steps are done again."""
    for number, path in self.kept_maps().items():
      if number > step:
        path.unlink()

  def write_config(self, config: Mapping) -> None:
    """Writes config.json, whole, nested as `config` is."""
    with self.plain_errors():
      files.write_json(self.config, dict(config))

  def read_config(self) -> dict:
    """Reads config.json. Raises UserError naming it where it is missing or damaged."""
    try:
      if not self.path.is_dir():
        raise UserError(f"workdir {self.path}: no such folder")
      content = files.read_bytes(self.config, _MAX_CONFIG_BYTES)
      config = json.loads(content, parse_constant=_refuse)
    except FileNotFoundError:
      raise UserError(
        f"workdir {self.path}: no config.json in it; accepted is a folder that `medattn train` made"
      ) from None
    except OSError as error:
      raise UserError(f"{self.config}: cannot be read: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
      if isinstance(error, UserError):
        raise
      why = " ".join(str(error).split())[:200]
      raise UserError(f"{self.config}: damaged, not the JSON that was written ({why})") from None
    if not isinstance(config, dict):
      raise UserError(f"{self.config}: damaged, a JSON object is expected")
    return config


class MetricsLog:
  """metrics.jsonl: one line of strict JSON for each logged step, flushed as it is written.

  Args:
    path: the file; made when missing, appended to when there.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self._file = None

  def write(self, values: Mapping) -> None:
    """Appends a line; `values` has a "step". Numbers that are not finite become null.

    Raises:
      UserError: the disk is full or read-only.
    """
    line = json.dumps(_strict(values), allow_nan=False)
    try:
      if self._file is None:
        # One write a line, past every buffer: what is logged outlives kill -9.
        self._file = open(  # noqa: SIM115
          self.path, "ab", buffering=0, opener=files.in_place)
      written = self._file.write(line.encode() + b"\n")
      if written != len(line.encode()) + 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
      raise UserError(f"{self.path}: cannot be written to: {_reason(error)}") from error

  def truncate_after(self, step: int, validated: bool = True) -> None:
    """Drops the lines of later steps, which a resumed run writes again, and lines that are no JSON.

    Where the step is not `validated`, and will be again, its validation's line goes too. What is
    kept is kept byte for byte; the file is replaced as a whole. Said on stderr.
    """
    self.close()
    kept, later, garbage = [], 0, 0
    try:
      for line in io.BytesIO(files.read_bytes(self.path)):
        found = _read(line)
        if found is None:
          garbage += 1
        elif found["step"] > step or (
            found["step"] == step and not validated and _validates(found)):
          later += 1
        else:
          kept.append(line)
      if later or garbage:
        files.write_bytes(self.path, b"".join(kept))
    except FileNotFoundError:
      return
    except OSError as error:
      raise UserError(f"{self.path}: cannot be mended: {_reason(error)}") from error
    if later:
      console.say(f"{self.path.name}: {later} lines after step {step} dropped, to be logged again")
    if garbage:
      console.warn(f"{self.path}: {garbage} lines that were not whole dropped")

  def read(self) -> list[dict]:
    """The lines that are whole, in order; [] where there is no file."""
    try:
      lines = files.read_bytes(self.path).splitlines(keepends=True)
    except FileNotFoundError:
      return []
    whole = [found for line in lines if (found := _read(line)) is not None]
    if len(whole) < len(lines):
      console.warn(f"{self.path}: {len(lines) - len(whole)} lines that are not whole passed over")
    return whole

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def _read(line: bytes) -> dict | None:
  """A line of the log; None for one that is torn or was not written by the log."""
  if not line.endswith(b"\n"):
    return None
  try:
    found = json.loads(line, parse_constant=_refuse)
    return found if type(found["step"]) is int else None
  except (ValueError, KeyError, TypeError, RecursionError):
    return None


def _validates(found: Mapping) -> bool:
  return any(name.startswith("validation_") for name in found)


def _refuse(constant: str) -> None:
  raise ValueError(f"{constant} is no JSON")


def _strict(value: object) -> object:
  """`value` in Python's own types, with None for what JSON has no number for."""
  if isinstance(value, Mapping):
    return {str(key): _strict(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(item) for item in value]
  if value is None or isinstance(value, str | bool | int):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return _strict(np.asarray(value).tolist())


def _reason(error: OSError) -> str:
  return (error.strerror or str(error)).lower()
