"""Zip archives, read entry by entry into memory: nothing is ever unpacked onto the disk.

An entry is believed nothing either: one whose name leads out of the archive, a link, one that is
locked, packed in another way than zip tools do, or declares more than MAX_BYTES is refused, and
reading ends where the declared size does.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib

from medattn_jax.data import preprocess

MAX_BYTES = preprocess.MAX_BYTES  # of one entry, unpacked
MAX_ENTRIES = 100_000
# What a damaged archive raises while it is read; zipfile says RuntimeError where a byte of it names
# a compression that there is not, or says that it is locked.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)
_UNREADABLE = (*DAMAGE, OSError, MemoryError, struct.error)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # lzma takes the memory a header asks for


def entries(path: str | os.PathLike) -> tuple[list[str], list[tuple[str, str]]]:
  """The names of the files within the archive `path`, and (name, why not) of those refused.

  Raises BadImage where there is no archive to be read.
  """
  with preprocess.plain_file(path) as file:
    try:
      with zipfile.ZipFile(file) as archive:
        found = [entry for entry in archive.infolist() if not entry.is_dir()]
    except _UNREADABLE as error:
      raise preprocess.BadImage(f"is no zip archive, or damaged ({_line(error)})") from None
  if len(found) > MAX_ENTRIES:
    raise preprocess.BadImage(f"has {len(found)} entries, more than {MAX_ENTRIES}")
  names: list[str] = []
  refused: list[tuple[str, str]] = []
  seen: set[str] = set()
  for entry in found:
    why = _fault(entry) or ("is there twice" if entry.filename in seen else "")
    seen.add(entry.filename)
    if why:
      refused.append((entry.filename, f"{why}: it is not read"))
    else:
      names.append(entry.filename)
  return names, refused


def read(path: str | os.PathLike, name: str) -> bytes:
  """The bytes of the entry `name`, checked against its checksum. Raises BadImage otherwise."""
  with preprocess.plain_file(path) as file:
    try:
      with zipfile.ZipFile(file) as archive:
        entry = archive.getinfo(name)
        why = _fault(entry)
        if why:
          raise preprocess.BadImage(why)
        with archive.open(entry) as opened:
          content = opened.read(entry.file_size + 1)  # to the end, where the checksum is compared
    except KeyError:
      raise preprocess.BadImage(f"is no more in {os.path.basename(path)}") from None
    except preprocess.BadImage:
      raise
    except _UNREADABLE as error:
      raise preprocess.BadImage(f"is damaged within its archive ({_line(error)})") from None
  if not content:
    raise preprocess.BadImage("is empty (0 bytes)")
  return content


def _fault(entry: zipfile.ZipInfo) -> str:
  name = entry.filename.replace("\\", "/")
  if name.startswith("/") or re.match(r"[A-Za-z]:", name):
    return "has an absolute path as its name"
  if ".." in name.split("/"):
    return "has a name that leads outside of its archive"
  kind = stat.S_IFMT(entry.external_attr >> 16)
  if kind not in (0, stat.S_IFREG):
    return "is a link" if kind == stat.S_IFLNK else "is no plain file"
  if entry.flag_bits & 1:
    return "is locked with a password"
  if entry.compress_type not in METHODS:
    return f"is packed by method {entry.compress_type} (stored and deflated entries are read)"
  if entry.file_size > MAX_BYTES:
    return f"declares {entry.file_size} bytes, more than {MAX_BYTES}"
  return ""


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:120] or type(error).__name__
