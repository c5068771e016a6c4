"""Writing a data set: whole or not there, with an index that damage cannot hide from.

A set is a TFDS set of array_record files plus index.json: every file's size, the checksums of the
small files, the levels of every example, the region that decides where it is known, and what the
set was made from. Records carry checksums
of their own (array_record notices every flipped bit), so what is read is what was written.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from medattn_jax import files
from medattn_jax.data import schema
from medattn_jax.data.backend import tf, tfds
from medattn_jax.errors import UserError

INDEX = "index.json"
# What an index says that names no other: fundus photographs.
FUNDUS = {
  "channels": 3, "encoding": "jpeg", "classes": schema.LEVELS, "region": None, "frame": None}


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set made from photographs on disk by `medattn prepare`; it bears its source's name.

  Args:
    source: the set's name, e.g. "csv".
    full_size: side of the stored photographs in pixels.
    examples: for each split, what yields its examples (dicts of schema.features, photographs as
      open files of the encoding) in the order they are stored in.
    channels, encoding: of the stored photographs, as in schema.features.
    num_classes: levels are 0 … num_classes - 1.
    frame: "cropped", each photograph by its own black border, or "whole": aligned images.
  """

  VERSION = tfds.core.Version(schema.VERSION)
  name = "prepared"
  region = None

  def __init__(
    self,
    *,
    source: str,
    full_size: int,
    examples: Mapping[str, Callable[[], Iterable[dict[str, Any]]]],
    channels: int = FUNDUS["channels"],
    encoding: str = FUNDUS["encoding"],
    num_classes: int = FUNDUS["classes"],
    frame: str = "cropped",
    **arguments,
  ):
    self.name = source
    self.stored = (full_size, channels, encoding)
    self.num_classes = num_classes
    self.frame = frame
    self.examples = examples
    super().__init__(file_format=schema.FILE_FORMAT, **arguments)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Graded photographs, one patient an example.",
      features=schema.features(*self.stored),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in self.examples}

  def _generate_examples(self, split):
    yield from enumerate(self.examples[split]())


@contextlib.contextmanager
def exclusive(path: pathlib.Path, *, wait: bool) -> Iterator[None]:
  """Holds the lock file `path`; it is free again when its holder ends, however it ends.

  Raises BlockingIOError where another process holds it and `wait` is false.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+", opener=files.in_place) as lock:
    fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield


def install(
  make: Callable[[str], Any],
  data_dir: str | os.PathLike,
  about: Mapping[str, Any],
  notes: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes the set of the builder `make(directory)` and puts it into `data_dir` by one rename.

  A set of ours in its place is replaced once the new one is complete. The caller holds the lock.

  Args:
    make: constructs the TFDS builder over a data_dir.
    data_dir: where the set goes, as <name>/<version>.
    about: JSON-able facts kept in the index (what the set was made from).
    notes: more of them, by the name of the file within the set they are kept in.

  Returns:
    The set's folder.

  Raises:
    UserError: a folder that is no set of ours is in the way.
  """
  data_dir = pathlib.Path(data_dir)
  relative = pathlib.Path(make(os.fspath(data_dir)).data_dir).relative_to(data_dir)
  final = data_dir / relative
  if final.exists() and not (final / INDEX).is_file():
    raise UserError(f"{final} is in the way and is no data set of ours: move it, or name another "
                    "--data-dir")
  aside = data_dir / f".building-{relative.parts[0]}"
  shutil.rmtree(aside, ignore_errors=True)
  try:
    builder = make(os.fspath(aside))
    tfds.disable_progress_bar()
    try:
      with contextlib.redirect_stdout(io.StringIO()):  # TFDS talks of downloads
        builder.download_and_prepare()
    except RuntimeError as error:  # array_record knows no OSError
      full = next((e for e in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
                   if os.strerror(e) in str(error)), None)
      if full is None:
        raise
      raise OSError(full, os.strerror(full), os.fspath(data_dir)) from None
    folder = aside / relative
    for name, value in (notes or {}).items():
      files.write_json(folder / name, value)
    write_index(builder, folder, about)
    for path in [*folder.iterdir(), folder]:
      files.sync_directory(path)  # fsync, of files as of folders
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
      os.rename(final, aside / "replaced")
    os.rename(folder, final)
    files.sync_directory(final.parent)
  finally:
    shutil.rmtree(aside, ignore_errors=True)
  return final


def write_index(builder: Any, folder: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Writes the index of a complete set in `folder`: every record is read back and so proved.

  The builder has, besides what every TFDS builder has, num_classes: int, and region: bool [S, S],
  the part of every photograph that decides, or None; and frame, see Prepared.
  """
  levels, most = {}, 1
  for split in builder.info.splits:
    words = []
    for record in Records(builder, split):
      feature = tf.train.Example.FromString(record).features.feature
      row = list(feature["levels"].int64_list.value)
      words.append("".join(schema.DIGITS[level] for level in row) + "-" * (2 - len(row)))
      eyes = list(feature["boxes/eye"].int64_list.value)
      most = max([most, *(eyes.count(eye) for eye in set(eyes))])
    levels[split] = " ".join(words)
  image = builder.info.features["images"].feature
  region = builder.region
  content = {
    "name": builder.name,
    "full_size": image.shape[0],
    "channels": image.shape[2],
    "encoding": image.encoding_format,
    "classes": builder.num_classes,
    "frame": builder.frame,
    "region": None if region is None else ["".join(".#"[x] for x in row) for row in region * 1],
    "boxes": most,
    "levels": levels,
    "files": {
      path.name: [path.stat().st_size, files.sha256(path) if path.suffix == ".json" else ""]
      for path in sorted(folder.iterdir())
    },
    "about": dict(about),
  }
  files.write_json(folder / INDEX, {"sha256": _digest(content), "content": content})


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_index(folder: pathlib.Path) -> dict[str, Any]:
  """The index of the set in `folder`, after checking it and the set's files against it.

  Keys: name, full_size, channels, encoding, classes, frame, region (rows of "." and "#", or None),
  boxes (the most boxes of one photograph, at least 1), levels {split: one word of two of
  schema.DIGITS, or "-", an example}, files, about. Raises UserError naming what is damaged.
  """
  path = folder / INDEX
  try:
    index = json.loads(files.read_bytes(path))
    content = index["content"]
    if index["sha256"] != _digest(content):
      raise ValueError("its checksum does not fit")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is damaged or missing ({error}); {_remedy(folder)}") from None
  for name, (size, digest) in content["files"].items():
    path = folder / name
    if not path.is_file():
      raise UserError(f"{path} is missing; {_remedy(folder)}")
    if path.stat().st_size != size or (digest and files.sha256(path) != digest):
      raise UserError(f"{path} is damaged: it is not what was written; {_remedy(folder)}")
  return FUNDUS | content


def photographs(folder: pathlib.Path, split: str) -> Iterator[list[bytes]]:
  """The encoded photographs of every example of a set, in order. Raises UserError on damage."""
  for record in Records(tfds.builder_from_directory(os.fspath(folder)), split):
    yield list(tf.train.Example.FromString(record).features.feature["images"].bytes_list.value)


class Records:
  """The serialized examples of one split, by number. Safe to use from many threads.

  Raises UserError naming the file where a record does not bear its checksum.
  """

  def __init__(self, builder: Any, split: str):
    self._files = [str(path) for path in builder.info.splits[split].filepaths]
    self._ends = list(itertools.accumulate(builder.info.splits[split].shard_lengths))
    try:
      self._source = builder.as_data_source(split).data_source
    except Exception as error:
      raise UserError(f"{self._files[0]} and its shards cannot be opened: {_line(error)}") from None

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, number: int) -> bytes:
    if not 0 <= number < len(self):
      raise IndexError(number)
    try:
      return self._source[number]
    except Exception as error:
      path = pathlib.Path(self._files[bisect.bisect_right(self._ends, number)])
      raise UserError(f"{path} is damaged ({_line(error)}); {_remedy(path.parent)}") from None

  def __iter__(self) -> Iterator[bytes]:
    return (self[number] for number in range(len(self)))


def _remedy(folder: pathlib.Path) -> str:
  return f"remove {folder} and make the data set again"


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:160]
