"""`--source=npz`: photographs as arrays in one .npz file, in the layout of MedMNIST.

{train,val,test}_images uint8 [N, H, H] or [N, H, H, 3] and {train,val,test}_labels [N, 1], whole
numbers from 0. The file is read image by image, as the zip archive it is: nothing is unpickled, and
no memory is taken for what a header declares.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Collection, Iterator
from typing import BinaryIO, NoReturn

import numpy as np

from medattn_jax.data import schema, sources
from medattn_jax.data.archives import DAMAGE
from medattn_jax.errors import UserError

KEYS = {"train": "train", "validation": "val", "test": "test"}
OPTIONAL = "validation"
SIDES = (16, 8000)
MAX_PHOTOGRAPHS = 10**7
WHAT = "one .npz file with {train,val,test}_images and {train,val,test}_labels"
IMAGES = "uint8 [N, H, H] or [N, H, H, 3]"
LABELS = f"whole numbers [N, 1], 0 to {schema.MAX_CLASSES - 1}"


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Arrays:
  """The photographs of the .npz file that `place` is or holds; splits are its own.

  Raises UserError where the file or one of its arrays cannot be used. An image cannot be bad by
  itself.
  """
  del seed, skip  # nothing is drawn by chance, and no folder looked into
  file = sources.find_file(place, lambda name: name.lower().endswith(".npz"), WHAT)
  with _archive(file) as archive:
    there = {name.removesuffix(".npy") for name in archive.namelist()}
    splits = [s for s in schema.SPLITS
              if s != OPTIONAL or {f"{KEYS[s]}_images", f"{KEYS[s]}_labels"} & there]
    for split in splits:
      for key in (f"{KEYS[split]}_images", f"{KEYS[split]}_labels"):
        if key not in there:
          _refuse(file, f"has no array {key}, only {', '.join(sorted(there)[:10]) or 'nothing'}",
                  f"{WHAT}; without val_… there is no validation split")
    shapes = {split: _image_shape(file, archive, f"{KEYS[split]}_images") for split in splits}
    levels = {split: _labels(file, archive, f"{KEYS[split]}_labels") for split in splits}
  for split in splits:
    if shapes[split][0] != len(levels[split]):
      _refuse(file, f"{KEYS[split]}_images has {shapes[split][0]} images and {KEYS[split]}_labels "
              f"{len(levels[split])} labels", "as many labels as images")
    if shapes[split][1:] != shapes["train"][1:]:
      _refuse(file, f"{KEYS[split]}_images is {list(shapes[split])} and train_images "
              f"{list(shapes['train'])}", "images of one size and number of channels")
  found = np.unique(np.concatenate(list(levels.values())))
  absent = sorted(set(range(int(found[-1]) + 1)) - set(found.tolist()))
  notes = [f"no photograph has label {', '.join(map(str, absent))}"] if absent else []
  if OPTIONAL not in splits:
    notes.append(f"{file.path.name} has no val_images: there is no validation split")

  def images(split: str) -> Iterator[tuple[str, int, np.ndarray]]:
    key = KEYS[split]
    with _archive(file) as archive, _array(file, archive, f"{key}_images", IMAGES) as (array, *_):
      for number, level in enumerate(levels[split]):
        image = _read(array, shapes[split][1:], np.dtype(np.uint8))
        yield f"{key}_{number:05}", int(level), image
      _end(array)

  return sources.Arrays(
    file=file,
    size=shapes["train"][1],
    channels=math.prod(shapes["train"][3:]),
    num_classes=int(found[-1]) + 1,
    counts={split: shapes[split][0] for split in splits},
    read=images,
    rejected=[],
    notes=notes,
  )


def _refuse(file: sources.RawFile, fault: str, accepted: str) -> NoReturn:
  raise UserError(f"{file.path}: {fault}; accepted: {accepted}")


@contextlib.contextmanager
def _archive(file: sources.RawFile) -> Iterator[zipfile.ZipFile]:
  with file.open() as opened:
    try:
      with zipfile.ZipFile(opened) as archive:
        yield archive
    except UserError:
      raise
    except DAMAGE as error:
      why = " ".join(str(error).split())[:160] or type(error).__name__
      raise UserError(f"{file.path} is no .npz file, or damaged ({why}); accepted: {WHAT}"
                      ) from None


@contextlib.contextmanager
def _array(
  file: sources.RawFile, archive: zipfile.ZipFile, key: str, accepted: str
) -> Iterator[tuple[BinaryIO, tuple[int, ...], np.dtype]]:
  """The array `key`, open where its numbers begin, its shape and dtype."""
  with archive.open(f"{key}.npy") as array:
    if np.lib.format.read_magic(array) != (1, 0):  # later ones may have a header of any length
      _refuse(file, f"{key} has a header of another version than 1.0", accepted)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
    if dtype.hasobject:
      _refuse(file, f"{key} holds Python objects, which are not read", accepted)
    declared = math.prod(shape) * dtype.itemsize
    held = archive.getinfo(f"{key}.npy").file_size - array.tell()
    if declared != held:
      _refuse(file, f"{key} declares {declared} bytes ({dtype} {list(shape)}) and has {held}",
              "an undamaged file")
    if fortran and len(shape) > 1:
      _refuse(file, f"{key} is in Fortran's order", f"{accepted} in C's (np.ascontiguousarray)")
    yield array, shape, dtype


def _image_shape(file, archive, key: str) -> tuple[int, ...]:
  """[N, H, H] or [N, H, H, 3], the shape of an array of images."""
  with _array(file, archive, key, IMAGES) as (_, shape, dtype):
    shown = f"{key} is {dtype} {list(shape)}"
    if dtype != np.uint8:
      _refuse(file, shown, IMAGES)
    if len(shape) > 4 or (len(shape) == 4 and shape[3] not in (1, 3)):
      _refuse(file, f"{shown}: not a photograph each but a volume or more", IMAGES)
    if len(shape) < 3 or shape[1] != shape[2]:
      _refuse(file, f"{shown}: not square", IMAGES)
    if not SIDES[0] <= shape[1] <= SIDES[1]:
      _refuse(file, shown, f"{SIDES[0]} to {SIDES[1]} pixels a side")
    if not 1 <= shape[0] <= MAX_PHOTOGRAPHS:
      _refuse(file, shown, f"1 to {MAX_PHOTOGRAPHS} images")
    return shape


def _labels(file, archive, key: str) -> np.ndarray:
  """int64 [N], checked."""
  with _array(file, archive, key, LABELS) as (array, shape, dtype):
    shown = f"{key} is {dtype} {list(shape)}"
    if len(shape) == 2 and shape[1] > 1:
      _refuse(file, f"{shown}: several labels an image", LABELS)
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or math.prod(shape) > MAX_PHOTOGRAPHS:
      _refuse(file, shown, LABELS)
    labels = _read(array, shape, dtype).reshape(-1)
    _end(array)
  strange = np.flatnonzero((labels < 0) | (labels >= schema.MAX_CLASSES))
  if strange.size:
    _refuse(file, f"{key}[{strange[0]}] is {labels[strange[0]]}", LABELS)
  return labels.astype(np.int64)


def _read(array: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  length = math.prod(shape) * dtype.itemsize
  content = array.read(length)
  if len(content) < length:
    raise EOFError("it ends early")
  return np.frombuffer(content, dtype).reshape(shape)


def _end(array: BinaryIO) -> None:
  """Reads on to the end of the array, where the archive compares its checksum."""
  if array.read(1):
    raise EOFError("it is longer than declared")
