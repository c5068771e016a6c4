"""From a data set on disk to batches of numpy arrays (TFDS and tf.data).

A training batch is a function of (seed, step) alone: the rows of step s are places s·B … s·B+B-1
of an endless stream of epochs, each epoch's order is drawn from (seed, epoch), and a run starts at
any step without reading what it skips. Decoding runs in parallel and in order.
"""

from __future__ import annotations

import functools
import pathlib
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

  return _batches(dataset, split, numbers, len(rows), full_size, threads, boxes=False)


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

  return _batches(dataset, split, numbers, len(rows), full_size, threads, boxes=True)


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


def _batches(dataset, split, numbers, rows, full_size, threads, boxes) -> Iterator[Batch]:
  """Batches of the examples that `numbers` (arrays of `rows` example numbers) asks for.

  Numbers from the end of the split on are padding. `boxes`: with all that evaluation needs.
  """
  records = dataset.records(split)
  damage: list[UserError] = []
  spec = _SPEC if boxes else {key: _SPEC[key] for key in ("images", "levels")}
  lengths = {"levels": 2, "image_ids": 2, "eyes": 2}
  lengths |= dict.fromkeys(("boxes/eye", "boxes/type", "boxes/box"), 2 * dataset.max_boxes)

  def fetch(number: np.ndarray) -> bytes:
    try:
      return records[min(int(number), len(records) - 1)]
    except UserError as error:
      damage.append(error)
      raise

  def example(number: tf.Tensor) -> dict[str, tf.Tensor]:
    record = tf.numpy_function(fetch, [number], tf.string, stateful=False)
    parsed = tf.io.parse_single_example(tf.ensure_shape(record, []), spec)
    made = {key: _padded(parsed[key], n) for key, n in lengths.items() if key in parsed}
    if boxes:
      made["patient"] = parsed["patient"]
      made["boxes"] = tf.shape(parsed["boxes/eye"])[0]
    made["image"] = _decoded(parsed["images"], dataset.full_size, full_size)
    made["eyes_there"] = tf.shape(parsed["levels"])[0]
    return {"number": number, **made}

  options = tf.data.Options()
  options.deterministic = True
  if threads:
    options.threading.private_threadpool_size = threads
  stream = (
    tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec([rows], tf.int64))
    .unbatch()
    .map(example, num_parallel_calls=threads or tf.data.AUTOTUNE)
    .batch(rows, drop_remainder=True)
    .prefetch(2)
    .with_options(options)
  )

  broken = tf.errors.OpError  # bound here: at the interpreter's end module names are gone

  def iterate() -> Iterator[Batch]:
    try:
      for raw in stream.as_numpy_iterator():
        batch = _train_fields(raw, len(records))
        if boxes:
          batch |= _eval_fields(raw, batch["mask"], full_size / dataset.full_size)
        yield batch
    except broken as error:
      if damage:
        raise damage[0] from None
      line = " ".join(error.message.split())[:200]
      raise UserError(f"{dataset.folder}, split {split}, cannot be read: {line}") from None

  return iterate()


def _padded(values: tf.Tensor, length: int) -> tf.Tensor:
  """`values` [n, …] with zeros (or "") up to [length, …]."""
  missing = [[0, length - tf.shape(values)[0]]] + [[0, 0]] * (values.shape.rank - 1)
  fill = "" if values.dtype == tf.string else 0
  return tf.ensure_shape(tf.pad(values, missing, constant_values=fill),
                         [length, *values.shape[1:]])


def _decoded(photographs: tf.Tensor, stored: int, size: int) -> tf.Tensor:
  """One or two JPEGs to uint8 [2, size, size, 3]; a missing second is a copy of the first."""

  def decode(number: int) -> tf.Tensor:
    image = tf.io.decode_jpeg(photographs[number], channels=3, dct_method="INTEGER_ACCURATE")
    image = tf.ensure_shape(image, [stored, stored, 3])
    if size == stored:
      return image
    image = tf.image.resize(image, [size, size], antialias=True)
    return tf.cast(tf.round(image), tf.uint8)

  own = decode(0)
  return tf.stack([own, tf.cond(tf.shape(photographs)[0] > 1, lambda: decode(1), lambda: own)])


def _train_fields(raw: Batch, count: int) -> Batch:
  there = np.arange(2) < raw["eyes_there"][:, None]
  real = raw["number"][:, None] < count
  levels = raw["levels"].astype(np.int32)
  return {
    "image": raw["image"],
    "level": np.where(there, levels, levels[:, :1]),
    "mask": (there & real).astype(np.float32),
  }


def _eval_fields(raw: Batch, mask: np.ndarray, scale: float) -> Batch:
  kept = mask > 0
  rows, slots = raw["boxes/eye"].shape
  boxes = np.zeros((rows, 2, slots // 2, 4), np.float32)
  types = np.full((rows, 2, slots // 2), -1, np.int32)
  for row in range(rows):
    for eye in np.flatnonzero(kept[row]):
      own = np.flatnonzero(raw["boxes/eye"][row, : raw["boxes"][row]] == eye)
      boxes[row, eye, : len(own)] = raw["boxes/box"][row, own] * scale
      types[row, eye, : len(own)] = raw["boxes/type"][row, own]
  text = {key: np.where(kept, _strings(raw[key]), "") for key in ("image_ids", "eyes")}
  return {
    "patient": np.where(kept.any(axis=1), _strings(raw["patient"]), ""),
    "image_id": text["image_ids"],
    "eye": text["eyes"],
    "boxes": boxes,
    "box_type": types,
  }


def _strings(values: np.ndarray) -> np.ndarray:
  decoded = [value.decode() for value in values.ravel()]
  return np.array(decoded, dtype=object).reshape(values.shape)
