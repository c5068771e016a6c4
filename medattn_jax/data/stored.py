"""A data set on disk, opened and checked; a drawn one is drawn first where it is not there yet."""

from __future__ import annotations

import functools
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from medattn_jax import console
from medattn_jax.data import datasets
from medattn_jax.data.backend import tfds
from medattn_jax.data.datasets import prepared
from medattn_jax.errors import UserError


class DataSet:
  """A data set on disk, checked against its index.

  Photographs are numbered within a split: by example, then left before right.

  Attributes:
    name: the set's name. folder: where it lies. full_size: side of the stored photographs.
    channels: 1 or 3, as stored. encoding: "jpeg" or "png". num_classes: of its levels.
    frame: "cropped", each photograph by its own black border, or "whole": aligned images; None
      where an older set does not say.
    splits: {split: number of examples}. max_boxes: the most boxes of one photograph, at least 1.
    region: bool [S, S], the part of every photograph that decides, S being the size asked for; or
      None where that is not known.
    about: what the set was made from.
  """

  def __init__(self, folder: pathlib.Path, size: int | None = None):
    """Opens the set in `folder`; `size`, where given, is what `region` is resized to (nearest)."""
    index = prepared.read_index(folder)
    self.folder = folder
    self.name: str = index["name"]
    self.full_size: int = index["full_size"]
    self.channels: int = index["channels"]
    self.encoding: str = index["encoding"]
    self.num_classes: int = index["classes"]
    self.frame: str | None = index["frame"]
    self.max_boxes: int = index["boxes"]
    self.region = _region(index["region"], size or self.full_size)
    self.about: Mapping[str, Any] = index["about"]
    self._words = {split: words.split() for split, words in index["levels"].items()}
    self.splits = {split: len(words) for split, words in self._words.items()}

  def levels(self, split: str) -> np.ndarray:
    """int32 [n, 2]: the levels of every example's photographs, -1 where there is none."""
    return self._levels(self.check(split))

  def photo_levels(self, split: str) -> np.ndarray:
    """int32 [n]: the level of every photograph of the split, by its number."""
    return self._photo_levels(self.check(split))

  def places(self, split: str) -> np.ndarray:
    """int64 [n, 2]: the example of every photograph of the split, and its place (0, 1) therein."""
    return np.argwhere(self.levels(split) >= 0)

  def records(self, split: str) -> prepared.Records:
    """The serialized examples of a split."""
    return self._records(self.check(split))

  def check(self, split: str) -> str:
    """Returns `split`. Raises UserError where the set has no such split."""
    if split not in self.splits:
      raise UserError(f"data set {self.name} in {self.folder} has no split {split!r}, only "
                      f"{', '.join(self.splits)}")
    return split

  @functools.cache  # noqa: B019  a set lives as long as its run
  def _levels(self, split: str) -> np.ndarray:
    rows = [[-1 if c == "-" else int(c, 36) for c in word] for word in self._words[split]]
    return _fixed(np.array(rows, np.int32).reshape(-1, 2))

  @functools.cache  # noqa: B019
  def _photo_levels(self, split: str) -> np.ndarray:
    levels = self._levels(split)
    return _fixed(levels[levels >= 0])

  @functools.cache  # noqa: B019
  def _records(self, split: str) -> prepared.Records:
    try:
      builder = tfds.builder_from_directory(str(self.folder))
    except Exception as error:
      raise UserError(f"{self.folder} cannot be opened: {error}") from None
    return prepared.Records(builder, split)


def open_dataset(
  name: str,
  data_dir: str | pathlib.Path | None,
  *,
  full_size: int,
  synthetic: Mapping[str, Any] | None = None,
) -> DataSet:
  """Opens the set `name` below `data_dir`; a drawn one is drawn first where it is not there yet.

  Args:
    name: a name of datasets.NAMES, or a folder: of `medattn prepare --data-dir`, or the set's own.
    data_dir: the TFDS data_dir (what `--data-dir` named). Unused where `name` is a folder.
    full_size: pixels the batches will have; another stored size is resized while reading.
    synthetic: for a drawn set, the numbers {seed, train, validation, test} that its builder takes.

  Raises:
    UserError: unknown name, nothing prepared there, or damage; the message says what to do.
  """
  folder = datasets.located(name, data_dir)
  if folder is None:
    folder = _draw(name, pathlib.Path(data_dir), full_size, synthetic)
  dataset = DataSet(folder, full_size)
  if dataset.full_size != full_size:
    console.say(f"data set {dataset.name} is stored at {dataset.full_size} pixels; its "
                f"photographs are resized to {full_size} while they are read")
  return dataset


def _draw(
  name: str, data_dir: pathlib.Path, size: int, numbers: Mapping[str, Any]
) -> pathlib.Path:
  """The folder of the drawn set of `numbers`, drawn and indexed where it is not there yet."""
  drawn = importlib.import_module(f"medattn_jax.data.datasets.{name}")
  try:
    builder = drawn.build(data_dir, size=size, **numbers)
  except (UserError, OSError):
    raise
  except Exception as error:  # whatever TFDS makes of a damaged dataset_info.json
    raise UserError(f"{data_dir / name} is damaged ({error}): remove it, it is drawn again"
                    ) from None
  folder = pathlib.Path(builder.data_dir)
  if not (folder / prepared.INDEX).exists():
    with prepared.exclusive(folder.parent / ".index.lock", wait=True):
      if not (folder / prepared.INDEX).exists():
        prepared.write_index(builder, folder, {"source": "drawn", "size": size, **numbers})
  return folder


def _region(rows: list[str] | None, size: int) -> np.ndarray | None:
  """bool [size, size] of rows of "." and "#", resized to the nearest."""
  if rows is None:
    return None
  stored = np.array([[c == "#" for c in row] for row in rows])
  near = (2 * np.arange(size) + 1) * len(stored) // (2 * size)
  return _fixed(stored[near][:, near])


def _fixed(array: np.ndarray) -> np.ndarray:
  array.setflags(write=False)
  return array
