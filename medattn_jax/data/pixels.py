"""Pixels that are ready become examples: encoded without loss, neither cropped nor, unless asked
for, resized."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from medattn_jax import console
from medattn_jax.data.sources import Arrays

METHOD = 2  # raise when `examples` gives other pixels: what was prepared before is then stale


class Census:
  """What is odd about photographs that are kept all the same, found while they are written."""

  def __init__(self, total: int):
    self.total, self.seen = total, 0
    self._live = console.Live()
    self._live.last = time.monotonic()  # short work is not spoken of
    self._first: dict[bytes, tuple[str, str]] = {}  # the first of these pixels: split, name
    self._copies: list[tuple[str, str]] = []
    self._torn = 0
    self._blank: list[str] = []

  def add(self, split: str, name: str, image: np.ndarray) -> None:
    self.seen += 1
    self._live.show(f"medattn: {self.seen} of {self.total} photographs")
    if image.min() == image.max():
      self._blank.append(name)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
    where, first = self._first.setdefault(digest, (split, name))
    if first != name:
      self._copies.append((first, name))
      self._torn += where != split

  def remarks(self) -> Iterator[str]:
    self._live.close()
    if self._copies:
      yield (f"{len(self._copies)} photographs repeat another one pixel by pixel, {self._torn} of "
             f"them one of another split, and are all kept, the first: "
             f"{' and '.join(self._copies[0])}")
    if self._blank:
      yield (f"{len(self._blank)} photographs have one shade throughout and are all kept, the "
             f"first: {self._blank[0]}")


def examples(arrays: Arrays, split: str, size: int, census: Census) -> Iterator[dict[str, Any]]:
  """The examples of a split as schema.features wants them: one photograph, one patient each."""
  for name, level, image in arrays.read(split):
    census.add(split, name, image)
    yield example(name, level, image, size)


def example(name: str, level: int, image: np.ndarray, size: int) -> dict[str, Any]:
  """One photograph uint8 [h, h], [h, h, 1] or [h, h, 3] as an example, size × size, as PNG."""
  picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
  if picture.size != (size, size):
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
  png = io.BytesIO()
  picture.save(png, "PNG", compress_level=1)
  return {
    "patient": name,
    "images": [png.getvalue()],
    "image_ids": [name],
    "eyes": [""],
    "levels": [level],
    "boxes": [],
  }
