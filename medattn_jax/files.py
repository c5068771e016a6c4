"""Files that are whole or not there: written aside, synced, renamed; read if they are plain."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator, Mapping

from medattn_jax.errors import UserError


def check_folder(place: pathlib.Path) -> None:
  """Raises UserError where a folder cannot be made or written to. Touches nothing."""
  existing = place.absolute()
  while not os.path.lexists(existing):
    existing = existing.parent
  if not existing.is_dir():
    raise UserError(f"{place}: {existing} is a file; accepted: a folder to write to")
  if not os.access(existing, os.W_OK | os.X_OK):
    raise UserError(f"{place}: {existing} cannot be written to; accepted: a folder to write to")


def check_new_folder(out: str) -> pathlib.Path:
  """The folder that --out names, to be made by `placing`.

  Raises UserError where it cannot be, before any work.
  """
  accepted = "accepted: a new folder or an empty one"
  if not out:
    raise UserError(f"--out='': {accepted}")
  place = pathlib.Path(os.path.abspath(out))
  if place.is_symlink():
    raise UserError(f"--out={out}: is a link; {accepted}")
  check_folder(place)
  if place.is_dir():
    if os.listdir(place):
      raise UserError(f"--out={out}: is not empty; {accepted}")
    if place.samefile(os.curdir) or place.is_mount():
      raise UserError(f"--out={out}: cannot be put in place while it is in use; {accepted}")
    check_folder(place.parent)
  return place


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a path beside `path` to write to; renamed over `path` when the block ends well."""
  path = pathlib.Path(path)
  aside = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    yield aside
    with open(aside, "rb") as written:
      os.fsync(written.fileno())
    os.replace(aside, path)
    sync_directory(path.parent)
  except OSError as error:
    if error.filename in (None, os.fspath(aside)):  # a full disk names no file
      error.filename = os.fspath(path)
    raise
  finally:
    aside.unlink(missing_ok=True)


@contextlib.contextmanager
def placing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a new folder beside `path` to fill; renamed to `path` when the block ends well.

  Nothing may be at `path` but an empty folder: OSError otherwise.
  """
  path = pathlib.Path(path).absolute()
  aside = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    aside.mkdir(parents=True)
    try:
      yield aside
      for inside, _, names in os.walk(aside):
        for name in names:
          with open(os.path.join(inside, name), "rb") as written:
            os.fsync(written.fileno())
        sync_directory(inside)
      os.rename(aside, path)
    finally:
      shutil.rmtree(aside, ignore_errors=True)
    sync_directory(path.parent)
  except OSError as error:
    if error.filename is None or str(error.filename).startswith(os.fspath(aside)):
      error.filename = os.fspath(path)
    raise


def sync_directory(path: str | os.PathLike) -> None:
  """Makes renames within the directory `path` durable."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  with replacing(path) as aside:
    aside.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
  write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: object) -> None:
  """Writes strict JSON. Raises ValueError on NaN or infinity."""
  write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_all(place: str | os.PathLike, contents: Mapping[str, bytes]) -> None:
  """Writes files by name into a folder, which is made where it is missing, each of them whole."""
  place = pathlib.Path(place)
  place.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    write_bytes(place / name, content)


def read_bytes(path: str | os.PathLike, most: int | None = None) -> bytes:
  """The bytes of a plain file, of no more than `most` bytes.

  Raises OSError otherwise. A folder may be a stranger's: nothing waits here for who writes into a
  pipe, or reads a device without end.
  """
  with open(path, "rb", opener=_at_once) as file:
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
      raise OSError(errno.EINVAL, "is no plain file", os.fspath(path))
    if most is not None and found.st_size > most:
      raise OSError(errno.EFBIG, f"is larger than {most} bytes", os.fspath(path))
    return file.read()


def _at_once(path: str, flags: int) -> int:
  return os.open(path, flags | os.O_NONBLOCK)


def in_place(path: str, flags: int) -> int:
  """An opener for a file of ours that is written where it is: OSError where it is a link.

  What a link leads to is not ours, and a pipe is not waited for.
  """
  return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def sha256(path: str | os.PathLike) -> str:
  """The hexadecimal SHA-256 of a file, read in blocks."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
