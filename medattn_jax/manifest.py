"""A folder that vouches for its files: their sizes and SHA-256 sums, and one of the manifest's own.

The sums find damage (a flipped bit, a torn copy, a file that is gone or too many), not malice:
whoever may write the folder may write a manifest to it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import stat

from medattn_jax import files

NAME = "manifest.json"
_MAX_BYTES = 64 << 20


class Broken(Exception):
  """A folder that is not what its manifest says; the message is the reason, in one line."""


def write(folder: pathlib.Path, facts: dict) -> None:
  """Writes the manifest of all files in `folder` and syncs the files and folders to the disk.

  Args:
    folder: holds plain files and folders only.
    facts: strict JSON to keep beside the sums, under any names but "files" and "sha256".
  """
  sums = {
    name: {"size": os.path.getsize(folder / name), "sha256": files.sha256(folder / name)}
    for name in _listing(folder)
  }
  (folder / NAME).write_bytes(_sealed({**facts, "files": sums}))
  for inside, _, names in os.walk(folder):
    for name in names:
      with open(os.path.join(inside, name), "rb") as file:
        os.fsync(file.fileno())
    files.sync_directory(inside)


def read(folder: pathlib.Path) -> dict:
  """The facts and "files" of a manifest that is byte for byte as written; Broken otherwise."""
  with contextlib.suppress(OSError):  # it is said below what is missing
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
      raise Broken("it is no directory")
  raw = _plain(folder, NAME)
  try:
    content = json.loads(raw)
    content.pop("sha256")
    intact = isinstance(content["files"], dict) and _sealed(content) == raw
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    intact = False
  if not intact:
    raise Broken(f"{NAME} is not what was written")
  return content


def check(folder: pathlib.Path, *, sums: bool = True) -> dict:
  """Compares every file with the manifest. Returns the manifest's content.

  A name that points outside is never opened: only files found by walking the folder are, and any
  name beyond those is missing.

  Args:
    folder: the folder.
    sums: False compares names and sizes only, which is quick.

  Raises:
    Broken: anything is missing, changed, unreadable, too many, or no plain file.
  """
  content = read(folder)
  try:
    expected, found = content["files"], set(_listing(folder)) - {NAME}
    for name in sorted(expected.keys() | found):
      if name not in found:
        raise Broken(f"{name} is missing")
      if name not in expected:
        raise Broken(f"{name} is not in its manifest")
      if (size := os.path.getsize(folder / name)) != expected[name]["size"]:
        raise Broken(f"{name} has {size} bytes instead of {expected[name]['size']}")
      if sums and files.sha256(folder / name) != expected[name]["sha256"]:
        raise Broken(f"{name} is not what was written")
  except OSError as error:
    raise Broken(f"{error.filename}: {error.strerror}") from None
  except (KeyError, TypeError):
    raise Broken(f"{NAME} lacks sizes or sums") from None
  return content


def read_file(folder: pathlib.Path, name: str) -> bytes:
  """The bytes of one small file, compared with the manifest. Raises Broken."""
  expected = read(folder)["files"].get(name)
  raw = _plain(folder, name)
  if expected != {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}:
    raise Broken(f"{name} is not what was written")
  return raw


def _plain(folder: pathlib.Path, name: str) -> bytes:
  """The bytes of a small file that is no link. Raises Broken."""
  try:
    if stat.S_ISLNK(os.lstat(folder / name).st_mode):
      raise Broken(f"{name} is a link")
    return files.read_bytes(folder / name, _MAX_BYTES)
  except FileNotFoundError:
    raise Broken(f"{name} is missing") from None
  except OSError as error:
    raise Broken(f"{name}: {error.strerror}") from None


def _listing(folder: pathlib.Path) -> list[str]:
  """The names of all files below `folder`, relative to it. Nothing but plain files is accepted."""
  names = []
  for inside, folders, here in os.walk(folder, onerror=_raise):
    for name in here + [f for f in folders if os.path.islink(os.path.join(inside, f))]:
      relative = os.path.relpath(os.path.join(inside, name), folder)
      if not stat.S_ISREG(os.lstat(os.path.join(inside, name)).st_mode):
        raise OSError(errno.EINVAL, "is no plain file", relative)
      names.append(relative)
  return sorted(names)


def _raise(error: OSError) -> None:
  raise error


def _sealed(content: dict) -> bytes:
  """The bytes of a manifest: any other bytes are none, however little they differ."""
  body = json.dumps(content, sort_keys=True, allow_nan=False)
  whole = {**content, "sha256": hashlib.sha256(body.encode()).hexdigest()}
  return (json.dumps(whole, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
