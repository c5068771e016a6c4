"""From a data set on disk to batches of numpy arrays (TFDS and tf.data).

A training batch is a function of (seed, step) alone: the rows of step s are places s·B … s·B+B-1
of an endless stream of epochs, each epoch's order is drawn from (seed, epoch), and a run starts at
any step without reading what it skips. Decoding runs in parallel and in order.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from medattn_jax import console
from medattn_jax.data import datasets, schema
from medattn_jax.data.backend import tf, tfds
from medattn_jax.data.datasets import prepared
from medattn_jax.errors import UserError

Batch = dict[str, np.ndarray]


class DataSet:
  """A data set on disk, checked against its index.

  Attributes:
    name: the set's name. folder: where it lies. full_size: side of the stored photographs.
    splits: {split: number of examples}. max_boxes: the most boxes of one photograph, at least 1.
    about: what the set was made from.
  """

  def __init__(self, folder: pathlib.Path):
    index = prepared.read_index(folder)
    self.folder = folder
    self.name: str = index["name"]
    self.full_size: int = index["full_size"]
    self.max_boxes: int = index["boxes"]
    self.about: Mapping[str, Any] = index["about"]
    self._words = {split: words.split() for split, words in index["levels"].items()}
    self.splits = {split: len(words) for split, words in self._words.items()}

  def levels(self, split: str) -> np.ndarray:
    """int32 [n, 2]: the levels of every example's photographs, -1 where there is none."""
    return self._levels(self.check(split))

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
    rows = [[-1 if c == "-" else int(c) for c in word] for word in self._words[split]]
    levels = np.array(rows, np.int32).reshape(-1, 2)
    levels.setflags(write=False)
    return levels

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
    synthetic: for a drawn set, the numbers {seed, train, validation, test}.

  Raises:
    UserError: unknown name, nothing prepared there, or damage; the message says what to do.
  """
  if name in datasets.DRAWN:
    folder = _draw(pathlib.Path(data_dir), full_size, synthetic)
  elif name in datasets.NAMES:
    folder = pathlib.Path(data_dir) / name / schema.VERSION
    if not folder.is_dir():
      raise UserError(f"no data set {name} in {data_dir}: make it with `medattn prepare "
                      f"--source={name} --input=DIR --data-dir={data_dir}`")
  else:
    folder = datasets.find(name)
  dataset = DataSet(folder)
  if dataset.full_size != full_size:
    console.say(f"data set {dataset.name} is stored at {dataset.full_size} pixels; its "
                f"photographs are resized to {full_size} while they are read")
  return dataset


def train_batches(
  dataset: DataSet,
  split: str,
  *,
  batch_size: int,
  full_size: int,
  seed: int,
  start_step: int,
  balanced: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Endless batches from step `start_step` on: this process's rows of the global batch.

  Args:
    batch_size: patients of the global batch; each process has batch_size / process_count of them.
    balanced: draws with replacement so that every level (the patient's higher one) is as frequent.
    threads: size of a private pool; TensorFlow's own by default.

  Yields:
    image uint8 [b, 2, F, F, 3]; level int32 [b, 2]; mask float32 [b, 2], 0 for a missing fellow
    eye, which is a copy of the own eye.

  Raises:
    UserError: a split that is not there, or (while iterating) damage, naming the file.
  """
  rows = _share(batch_size, process_index, process_count)
  levels = dataset.levels(split)

  def numbers() -> Iterator[np.ndarray]:
    drawn = functools.lru_cache(2)(
      functools.partial(epoch_order, len(levels), seed, levels=levels if balanced else None)
    )
    step = start_step
    while True:
      places = np.arange(step * batch_size + rows.start, step * batch_size + rows.stop)
      epochs, within = np.divmod(places, len(levels))
      yield np.array([drawn(int(e))[i] for e, i in zip(epochs, within, strict=True)])
      step += 1

  return _batches(dataset, split, numbers, len(rows), full_size, threads, evaluation=False)


def eval_batches(
  dataset: DataSet,
  split: str,
  *,
  batch_size: int,
  full_size: int,
  process_index: int = 0,
  process_count: int = 1,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Every example once, in stored order; the last batch is padded.

  Yields, beside the arrays of train_batches:
    patient [b] str, image_id [b, 2] str, eye [b, 2] str (object arrays; "" where padded);
    boxes float32 [b, 2, K, 4] in the full_size frame; box_type int32 [b, 2, K], -1 where padded;
    K = dataset.max_boxes. Padding has mask 0 and patient "".
  """
  rows = _share(batch_size, process_index, process_count)
  count = len(dataset.levels(split))

  def numbers() -> Iterator[np.ndarray]:
    for first in range(0, count, batch_size):
      yield np.arange(first + rows.start, first + rows.stop)

  return _batches(dataset, split, numbers, len(rows), full_size, threads, evaluation=True)


def epoch_order(
  count: int, seed: int, epoch: int, levels: np.ndarray | None = None
) -> np.ndarray:
  """The example numbers of one epoch, int64 [count], from (seed, epoch).

  A permutation; or, given levels int [count, 2], draws with replacement in which every level that
  occurs (an example's is the higher of its eyes) is equally likely.
  """
  chance = np.random.default_rng([seed % 2**63, epoch])
  if levels is None:
    return chance.permutation(count)
  highest = levels.max(axis=1)
  members = [np.flatnonzero(highest == level) for level in np.unique(highest)]
  chosen = chance.integers(len(members), size=count)
  place = chance.random(count)
  sizes = np.array([len(m) for m in members])
  starts = np.cumsum(sizes) - sizes
  return np.concatenate(members)[starts[chosen] + (place * sizes[chosen]).astype(np.int64)]


def _draw(data_dir: pathlib.Path, size: int, numbers: Mapping[str, Any]) -> pathlib.Path:
  """The folder of the drawn set of `numbers`, drawn and indexed where it is not there yet."""
  from medattn_jax.data.datasets import synthetic_fundus

  try:
    builder = synthetic_fundus.build(data_dir, size=size, **numbers)
  except (UserError, OSError):
    raise
  except Exception as error:  # whatever TFDS makes of a damaged dataset_info.json
    raise UserError(f"{data_dir / 'synthetic_fundus'} is damaged ({error}): remove it, it is drawn "
                    "again") from None
  folder = pathlib.Path(builder.data_dir)
  if not (folder / prepared.INDEX).exists():
    with prepared.exclusive(folder.parent / ".index.lock", wait=True):
      if not (folder / prepared.INDEX).exists():
        prepared.write_index(builder, folder, {"source": "drawn", "size": size, **numbers})
  return folder


def _share(batch_size: int, process_index: int, process_count: int) -> range:
  """This process's contiguous rows of the global batch."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f"data.batch_size is {batch_size}: a positive multiple of the number of "
                    f"processes ({process_count}) is needed")
  each = batch_size // process_count
  return range(process_index * each, (process_index + 1) * each)


_SEQUENCE = functools.partial(tf.io.FixedLenSequenceFeature, allow_missing=True)
_SPEC = {
  "images": _SEQUENCE([], tf.string),
  "levels": _SEQUENCE([], tf.int64),
  "patient": tf.io.FixedLenFeature([], tf.string),
  "image_ids": _SEQUENCE([], tf.string),
  "eyes": _SEQUENCE([], tf.string),
  "boxes/eye": _SEQUENCE([], tf.int64),
  "boxes/type": _SEQUENCE([], tf.int64),
  "boxes/box": _SEQUENCE([4], tf.float32),
}


def _batches(dataset, split, numbers, rows, size, threads, evaluation) -> Iterator[Batch]:
  """Batches of the examples that `numbers` (arrays of `rows` example numbers) asks for.

  Numbers from the end of the split on are padding.
  """
  records = dataset.records(split)
  damage: list[UserError] = []
  stored, most = dataset.full_size, dataset.max_boxes
  spec = _SPEC if evaluation else {key: _SPEC[key] for key in ("images", "levels")}

  def fetch(number: np.ndarray) -> bytes:
    try:
      return records[min(int(number), len(records) - 1)]
    except UserError as error:
      damage.append(error)
      raise

  def example(number: tf.Tensor) -> dict[str, tf.Tensor]:
    record = tf.numpy_function(fetch, [number], tf.string, stateful=False)
    parsed = tf.io.parse_single_example(tf.ensure_shape(record, []), spec)
    eyes = tf.shape(parsed["levels"])[0]
    there = tf.stack([True, eyes > 1])
    real = there & (number < len(records))
    pair = lambda values: tf.ensure_shape(tf.gather(values, tf.stack([0, eyes - 1])), [2])
    made = {
      "image": tf.where(there, pair(parsed["images"]), ""),
      "level": tf.cast(pair(parsed["levels"]), tf.int32),
      "mask": tf.cast(real, tf.float32),
    }
    if evaluation:
      named = lambda values: tf.where(real, values, "")
      made["patient"] = tf.fill([2], named(parsed["patient"])[0])
      made["image_id"] = named(pair(parsed["image_ids"]))
      made["eye"] = named(pair(parsed["eyes"]))
      kept = [real[eye] & (parsed["boxes/eye"] == eye) for eye in range(2)]
      scaled = parsed["boxes/box"] * (size / stored)
      made["boxes"] = tf.stack([_padded(scaled[own], most, 0) for own in kept])
      types = tf.cast(parsed["boxes/type"], tf.int32)
      made["box_type"] = tf.stack([_padded(types[own], most, -1) for own in kept])
    return made

  def decoded(photograph: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    jpeg = photograph["image"]
    image = tf.cond(jpeg == "", lambda: tf.zeros([0, 0, 3], tf.uint8),
                    lambda: _decoded(jpeg, stored, size))
    return {**photograph, "image": image}

  options = tf.data.Options()
  options.deterministic = True
  if threads:
    options.threading.private_threadpool_size = threads
  parallel = threads or tf.data.AUTOTUNE
  photographs = (
    tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec([rows], tf.int64))
    .unbatch()
    .map(example, num_parallel_calls=parallel)
    .unbatch()
    .map(decoded, num_parallel_calls=parallel)
    .prefetch(4 * rows)  # two batches
    .with_options(options)
  )
  broken = tf.errors.OpError  # bound here: at the interpreter's end module names are gone

  def iterate() -> Iterator[Batch]:
    try:
      yield from _assembled(photographs.as_numpy_iterator(), rows, size)
    except broken as error:
      if damage:
        raise damage[0] from None
      line = " ".join(error.message.split())[:200]
      raise UserError(f"{dataset.folder}, split {split}, cannot be read: {line}") from None

  return iterate()


def _assembled(photographs: Iterator[Batch], rows: int, size: int) -> Iterator[Batch]:
  """Batches of `rows` pairs from single photographs.

  By numpy and not by tf.data: its batches cost a second copy for the pair, and page faults for a
  fresh buffer each time (together two thirds of what decoding costs).
  """
  buffers = _Buffers((rows, 2, size, size, 3))
  for first in photographs:
    batch = {"image": buffers.take()}
    for key in (key for key in first if key not in batch):
      text = isinstance(first[key], bytes)
      batch[key] = np.empty((rows, 2, *np.shape(first[key])), object if text else first[key].dtype)
    for place in np.ndindex(rows, 2):
      photograph = next(photographs) if any(place) else first
      for key, value in photograph.items():
        if key == "image" and not value.size:
          value = batch["image"][place[0], 0]
        batch[key][place] = value.decode() if isinstance(value, bytes) else value
    if "patient" in batch:
      batch["patient"] = batch["patient"][:, 0]
    yield batch
    del batch  # or its buffer would never be free


class _Buffers:
  """uint8 arrays of one shape, handed out again once nobody refers to them any more.

  A view, and an array JAX made without a copy, hold a reference to what they show.
  """

  KEPT = 4

  def __init__(self, shape: tuple[int, ...]):
    self._shape = shape
    self._arrays: list[np.ndarray] = []
    probe = [object()]
    self._idle = sys.getrefcount(probe[0])

  def take(self) -> np.ndarray:
    for number in range(len(self._arrays)):
      if sys.getrefcount(self._arrays[number]) == self._idle:
        return self._arrays[number]
    self._arrays = [*self._arrays[1 - self.KEPT :], np.empty(self._shape, np.uint8)]
    return self._arrays[-1]


def _padded(values: tf.Tensor, length: int, fill: int) -> tf.Tensor:
  """`values` [n, …] up to [length, …]."""
  missing = [[0, length - tf.shape(values)[0]]] + [[0, 0]] * (values.shape.rank - 1)
  padded = tf.pad(values, missing, constant_values=tf.cast(fill, values.dtype))
  return tf.ensure_shape(padded, [length, *values.shape[1:]])


def _decoded(jpeg: tf.Tensor, stored: int, size: int) -> tf.Tensor:
  """uint8 [size, size, 3] of a JPEG of `stored` pixels a side."""
  image = tf.io.decode_jpeg(jpeg, channels=3, dct_method="INTEGER_ACCURATE")
  image = tf.ensure_shape(image, [stored, stored, 3])
  if size == stored:
    return image
  image = tf.image.resize(tf.cast(image, tf.float32), [size, size], antialias=True)
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
