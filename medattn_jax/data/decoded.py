"""Photographs of a data set decoded once and kept beside it, as `medattn decode` does.

For hosts whose cores decode fewer photographs than their accelerators train on: to read one is a
copy and a sum. Of one split, size and number of channels there are two files in the set's folder,
decoded/SPLIT_FxFxC.pixels, the photographs' bytes one after another by their number, and ….json,
written last, with a checksum of each. They are what the pipeline decodes, so a run may change from
one to the other.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import weakref
from collections.abc import Iterable

import numpy as np

from medattn_jax import files
from medattn_jax.data.datasets import prepared
from medattn_jax.data.stored import DataSet
from medattn_jax.errors import UserError

FOLDER = "decoded"


class Decoded:
  """The photographs of a split, by number. Safe to use from many threads."""

  def __init__(self, path: pathlib.Path, sums: list[int], size: int):
    """Opens `path`, which has len(sums) photographs of so many bytes (`size`)."""
    self._path, self._sums, self._size = path, sums, size
    try:
      self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for a pipe's writer
      weakref.finalize(self, os.close, self._file).atexit = False
      found = os.fstat(self._file).st_size
    except OSError as error:
      raise self._damaged(error.strerror) from None
    if found != len(sums) * size:
      raise self._damaged(f"{found} bytes instead of {len(sums) * size}")

  def read(self, number: int, into: np.ndarray) -> None:
    """Reads a photograph into uint8 [n, F, F, C], n times. Raises UserError where it is damaged."""
    flat = memoryview(into[0]).cast("B")  # never a copy
    there, start = 0, number * self._size
    while there < self._size:
      more = os.preadv(self._file, [flat[there:]], start + there)
      if not more:
        raise self._damaged(f"photograph {number} ends early")
      there += more
    if checksum(np.asarray(flat)) != self._sums[number]:
      raise self._damaged(f"photograph {number} is not what was written")
    into[1:] = into[0]

  def _damaged(self, why: str | None) -> UserError:
    return UserError(f"{self._path} is damaged or missing: {why}; remove {self._path.parent}, and "
                     "make it again with `medattn decode`")


def place(dataset: DataSet, split: str, size: int, channels: int) -> pathlib.Path:
  """Where these photographs' bytes lie, or would."""
  return dataset.folder / FOLDER / f"{split}_{size}x{size}x{channels}.pixels"


def find(dataset: DataSet, split: str, size: int, channels: int) -> Decoded | None:
  """The photographs of a split at `size`² pixels, or None where they are not kept.

  Raises:
    UserError: they are damaged, or another set's.
  """
  path = place(dataset, split, size, channels)
  told = path.with_suffix(".json")
  if not told.exists():
    return None
  try:
    content = json.loads(files.read_bytes(told))
    sums, of = list(content["sums"]), content["set"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{told} is damaged ({error}); remove {path.parent}, and make it again with "
                    "`medattn decode`") from None
  if of != _name(dataset) or len(sums) != len(dataset.photo_levels(split)):
    raise UserError(f"{path} was made of another data set; remove {path.parent}, and make it again "
                    "with `medattn decode`")
  return Decoded(path, sums, size * size * channels)


def write(
  dataset: DataSet, split: str, size: int, channels: int, photographs: Iterable[np.ndarray]
) -> None:
  """Keeps all photographs of a split, uint8 [size, size, channels] in the order of their numbers.

  Another process that does the same waits.

  Raises:
    UserError: the disk has no room for them. OSError: it cannot be written to.
  """
  path = place(dataset, split, size, channels)
  needed = len(dataset.photo_levels(split)) * size * size * channels
  with prepared.exclusive(path.parent / ".lock", wait=True):
    if find(dataset, split, size, channels):  # by another process, meanwhile
      return
    for left in (*path.parent.glob(f".{path.name}.*.part"), path):  # by one that was killed
      left.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
      raise UserError(f"{path}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free "
                      "there; accepted: a disk with room for them")
    sums = []
    with files.replacing(path) as aside, open(aside, "wb") as file:
      for image in photographs:
        sums.append(checksum(image.reshape(-1)))
        file.write(image)
    files.write_json(path.with_suffix(".json"), {"set": _name(dataset), "sums": sums})


def checksum(flat: np.ndarray) -> int:
  """Of uint8 [n]: its sum in words of 64 bits, and of the bytes left over; notices a flipped bit.

  A quarter of what zlib's crc32 takes, and two thirds of the copy itself.
  """
  words = len(flat) // 8 * 8
  found = flat[:words].view(np.uint64).sum(dtype=np.uint64)
  return (int(found) + int(flat[words:].sum())) % 2**64


def _name(dataset: DataSet) -> str:
  """Of a set with all that it holds: a set made anew has another."""
  return files.sha256(dataset.folder / prepared.INDEX)
