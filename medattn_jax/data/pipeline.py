"""From a data set on disk to batches of numpy arrays (TFDS and tf.data).

A training batch is a function of (seed, step) alone: the rows of step s are places s·B … s·B+B-1
of an endless stream of epochs, each epoch's order is drawn from (seed, epoch), and a run starts at
any step without reading what it skips. Decoding runs in parallel and in order.

A row of a batch is a patient with both eyes, or (pairs=False) a single photograph.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from medattn_jax.data.backend import tf
from medattn_jax.data.stored import DataSet, open_dataset
from medattn_jax.errors import UserError

__all__ = ["Batch", "DataSet", "epoch_order", "eval_batches", "open_dataset", "photographs"]
__all__ += ["train_batches"]

Batch = dict[str, np.ndarray]

_ENDLESS = sys.maxsize  # in place of a last step
_READERS = 2  # chunks read at once: Python reads one after the other, but waits for both

_open: weakref.WeakSet[Iterator[Batch]] = weakref.WeakSet()


@atexit.register
def _close() -> None:
  """Ends the streams that are left: TensorFlow's threads would wait for a Python that has ended."""
  for stream in list(_open):
    stream.close()


# AutoGraph would write each function anew, for its ifs: half a second a stream, and they have none.
_AS_IT_IS = tf.autograph.experimental.do_not_convert


def train_batches(
  dataset: DataSet,
  split: str,
  *,
  batch_size: int,
  full_size: int,
  seed: int,
  start_step: int,
  balanced: bool = False,
  pairs: bool = True,
  channels: int = 3,
  process_index: int = 0,
  process_count: int = 1,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Endless batches from step `start_step` on: this process's rows of the global batch.

  Args:
    batch_size: rows of the global batch; each process has batch_size / process_count of them.
    balanced: draws with replacement so that every level (the patient's higher one) is as frequent.
    pairs: a row is a patient, E = 2 eyes; else a photograph, E = 1, each by itself.
    channels: 3, or 1 for gray; a photograph stored otherwise is converted.
    threads: size of a private pool; TensorFlow's own by default.

  Yields:
    image uint8 [b, E, F, F, channels]; level int32 [b, E]; mask float32 [b, E], 0 for a missing
    fellow eye, which is a copy of the own eye.

  Raises:
    UserError: a split that is not there, or (while iterating) damage, naming the file.
  """
  rows = _share(batch_size, process_index, process_count)
  levels = dataset.levels(split) if pairs else dataset.photo_levels(split)[:, None]

  drawn = functools.lru_cache(8)(
    functools.partial(epoch_order, len(levels), seed, levels=levels if balanced else None)
  )

  def numbers(places: np.ndarray) -> np.ndarray:
    steps, places = np.divmod(places, len(rows))
    epochs, places = np.divmod(steps * batch_size + rows.start + places, len(levels))
    return np.concatenate([drawn(int(e))[places[epochs == e]] for e in np.unique(epochs)])

  form = _Form(full_size, channels, pairs, evaluation=False)
  steps = range(start_step, _ENDLESS)
  return _batches(dataset, split, numbers, steps, len(rows), form, threads)


def eval_batches(
  dataset: DataSet,
  split: str,
  *,
  batch_size: int,
  full_size: int,
  pairs: bool = True,
  channels: int = 3,
  process_index: int = 0,
  process_count: int = 1,
  examples: np.ndarray | None = None,
  threads: int | None = None,
) -> Iterator[Batch]:
  """Every example (or photograph: `pairs`) once, in stored order; the last batch is padded.

  Yields, beside the arrays of train_batches:
    patient [b] str, image_id [b, E] str, eye [b, E] str (object arrays; "" where padded);
    boxes float32 [b, E, K, 4] in the full_size frame; box_type int32 [b, E, K], -1 where padded;
    K = dataset.max_boxes. Padding has mask 0 and patient "".

  `examples`: int [n], the numbers of those wanted, in their order; all by default.
  """
  rows = _share(batch_size, process_index, process_count)
  count = len(dataset.levels(split) if pairs else dataset.photo_levels(split))
  wanted = np.arange(count) if examples is None else np.asarray(examples, np.int64)
  if wanted.size and not 0 <= wanted.min() <= wanted.max() < count:
    raise IndexError(f"examples {wanted.min()} to {wanted.max()} of {count}")
  filled = np.concatenate([wanted, np.full(-len(wanted) % batch_size, count)])
  own = filled.reshape(-1, batch_size)[:, rows.start : rows.stop]
  form = _Form(full_size, channels, pairs, evaluation=True)
  numbers, steps = own.reshape(-1).__getitem__, range(len(own))
  return _batches(dataset, split, numbers, steps, len(rows), form, threads)


def photographs(
  dataset: DataSet,
  split: str,
  numbers: Sequence[int] | np.ndarray,
  *,
  full_size: int,
  channels: int,
  threads: int | None = None,
) -> Iterator[np.ndarray]:
  """The photographs with these numbers (see DataSet), in the order asked, each as often as asked.

  Yields:
    uint8 [F, F, channels], read-only.

  Raises:
    UserError: as train_batches does. IndexError: a number beyond the split.
  """
  asked, count = np.asarray(numbers, np.int64).reshape(-1), len(dataset.photo_levels(split))
  if asked.size and not 0 <= asked.min() <= asked.max() < count:
    raise IndexError(f"photographs {asked.min()} to {asked.max()} of {count}")
  form = _Form(full_size, channels, pairs=False, evaluation=False)
  places = range(len(asked))
  stream = _photographs(dataset, split, asked.__getitem__, places, form, threads, 4 * form.group)
  return (one["image"] for one in itertools.islice(stream, len(asked)))


def epoch_order(
  count: int, seed: int, epoch: int, levels: np.ndarray | None = None
) -> np.ndarray:
  """The example numbers of one epoch, int64 [count], from (seed, epoch).

  A permutation; or, given levels int [count, E], draws with replacement in which every level that
  occurs (an example's is the highest of its eyes) is equally likely.
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


def _share(batch_size: int, process_index: int, process_count: int) -> range:
  """This process's contiguous rows of the global batch."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(f"data.batch_size is {batch_size}: a positive multiple of the number of "
                    f"processes ({process_count}) is needed")
  each = batch_size // process_count
  return range(process_index * each, (process_index + 1) * each)


@dataclasses.dataclass(frozen=True)
class _Form:
  """How photographs are to be had: see train_batches; `evaluation`: with names and boxes."""

  size: int
  channels: int
  pairs: bool
  evaluation: bool

  def __post_init__(self):
    if self.channels not in (1, 3):
      raise UserError(f"data.channels is {self.channels}: 1 (gray) and 3 (colour) are accepted")

  @property
  def eyes(self) -> int:
    return 2 if self.pairs else 1

  @property
  def group(self) -> int:
    """How many photographs are decoded at once, the more the smaller they are.

    A step of tf.data costs more than decoding a photograph of 48² pixels, and a tenth of 400².
    """
    return min(16, max(4, 2**22 // (self.size**2 * self.channels)))

  @property
  def chunk(self) -> int:
    """How many rows are read at once, at most: a call of Python from tf.data costs 150 µs."""
    return 4 * self.group // self.eyes


def _batches(
  dataset: DataSet,
  split: str,
  numbers: Callable[[np.ndarray], np.ndarray],
  steps: range,
  rows: int,
  form: _Form,
  threads: int | None,
) -> Iterator[Batch]:
  """The batches of these steps, of the rows that `numbers` has at places s·rows … of a step s.

  Numbers from the end of the split on are padding.
  """
  levels = dataset.levels(split) if form.pairs else dataset.photo_levels(split)[:, None]
  places = range(steps.start * rows, min(steps.stop * rows, _ENDLESS))
  two_batches = 2 * rows * form.eyes
  stream = _photographs(dataset, split, numbers, places, form, threads, ahead=two_batches)
  asked = (numbers(np.arange(step * rows, (step + 1) * rows)) for step in steps)
  return _assembled(stream, asked, levels, rows, form, dataset.max_boxes)


def _photographs(
  dataset: DataSet,
  split: str,
  numbers: Callable[[np.ndarray], np.ndarray],
  places: range,
  form: _Form,
  threads: int | None,
  ahead: int,
) -> Iterator[Batch]:
  """The photographs of the rows that `numbers` has at these places; one by one, in order.

  Each has its "image", and for evaluation its names and boxes. At least `ahead` of them are
  fetched ahead.
  """
  records = dataset.records(split)
  each = None if form.pairs else dataset.places(split)
  count = len(records) if form.pairs else len(each)
  most, scale = dataset.max_boxes, form.size / dataset.full_size
  kinds = {"image": tf.TensorSpec([None], tf.string)}
  if form.evaluation:
    kinds |= {key: kinds["image"] for key in ("patient", "image_id", "eye")}
    kinds["boxes"] = tf.TensorSpec([None, most, 4], tf.float32)
    kinds["box_type"] = tf.TensorSpec([None, most], tf.int32)
  # A small batch waits for no more than it needs.
  chunk, group_size = min(form.chunk, ahead // form.eyes), min(form.group, ahead)
  damage: list[UserError] = []

  def record(number: int) -> bytes:
    try:
      return records[int(number)]
    except UserError as error:
      damage.append(error)
      raise

  def fetch(first: np.ndarray) -> list[np.ndarray]:
    """Of a chunk's photographs what `kinds` names, the image as it lies in the record."""
    asked = numbers(np.arange(first, min(first + chunk, places.stop)))
    asked = asked[asked < count]
    wanted = [(row, None) for row in asked] if form.pairs else each[asked]
    found = [
      one for row, eye in wanted for one in _of_record(record(row), eye, form.evaluation, most)]
    return [np.array([one[key] for one in found], spec.dtype.as_numpy_dtype)
            .reshape(-1, *spec.shape[1:]) for key, spec in kinds.items()]

  def encoded(first: tf.Tensor) -> dict[str, tf.Tensor]:
    types = [spec.dtype for spec in kinds.values()]
    values = tf.numpy_function(fetch, [first], types, stateful=False)
    return {key: tf.ensure_shape(value, spec.shape)
            for (key, spec), value in zip(kinds.items(), values, strict=True)}

  def decoded(group: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Of a group, the same decoded; what the last one lacks is filled with its first."""
    content = group.pop("image")
    filled = tf.range(group_size) % tf.size(content)
    made = {key: tf.gather(value, filled) for key, value in group.items()}
    if "boxes" in made:
      made["boxes"] *= scale
    one = lambda place: _decoded(content[place], dataset, form)
    return {**made, "image": tuple(one(place) for place in tf.unstack(filled, group_size))}

  options = tf.data.Options()
  options.deterministic = True
  if threads:
    options.threading.private_threadpool_size = threads
  parallel = threads or tf.data.AUTOTUNE
  # Not from_generator: from then on glibc would keep no array above 128 kB, of nobody's.
  source = tf.data.Dataset.range(places.start, places.stop, chunk)
  read = source.map(_AS_IT_IS(encoded), num_parallel_calls=threads or _READERS)
  stream = read.rebatch(group_size).map(_AS_IT_IS(decoded), num_parallel_calls=parallel)
  stream = stream.prefetch(-(-ahead // group_size)).with_options(options)
  broken = tf.errors.OpError  # bound here: at the interpreter's end module names are gone

  def iterate() -> Iterator[Batch]:
    try:
      for group in stream.as_numpy_iterator():
        for place in range(group_size):
          yield {key: value[place] for key, value in group.items()}
    except broken as error:
      if damage:
        raise damage[0] from None
      line = " ".join(error.message.split())[:200]
      raise UserError(f"{dataset.folder}, split {split}, cannot be read: {line}") from None

  found = iterate()
  _open.add(found)
  return found


def _of_record(record: bytes, eye: int | None, named: bool, most: int) -> Iterator[dict[str, Any]]:
  """What each photograph of a record (or this one alone) has; its names and `most` boxes if asked.

  TensorFlow's own parser takes three times as long, as it copies each photograph.
  """
  feature = tf.train.Example.FromString(record).features.feature
  words = lambda key: feature[key].bytes_list.value
  images = words("images")
  for number in range(len(images)) if eye is None else (eye,):
    made = {"image": images[number]}
    if named:
      made |= {"patient": words("patient")[0], "image_id": words("image_ids")[number],
               "eye": words("eyes")[number]}
      own = np.flatnonzero(np.array(feature["boxes/eye"].int64_list.value) == number)
      boxes, types = np.zeros((most, 4), np.float32), np.full(most, -1)
      boxes[: len(own)] = np.reshape(feature["boxes/box"].float_list.value, (-1, 4))[own]
      types[: len(own)] = np.array(feature["boxes/type"].int64_list.value, int)[own]
      made |= {"boxes": boxes, "box_type": types}
    yield made


def _assembled(
  stream: Iterator[Batch], numbers: Iterator[np.ndarray], levels: np.ndarray, rows: int,
  form: _Form, most: int,
) -> Iterator[Batch]:
  """Batches of the rows that `numbers` has, from single photographs and `levels`, -1 for no eye.

  By numpy and not by tf.data: its batches cost a second copy for the pair, and page faults for a
  fresh buffer each time (together two thirds of what decoding costs), and each thing that it
  carries beside a photograph some hundredths.
  """
  shape = (rows, form.eyes)
  buffers = _Buffers((*shape, form.size, form.size, form.channels))
  for asked in numbers:
    level = levels[np.minimum(asked, len(levels) - 1)]
    there = (level >= 0) & (asked < len(levels))[:, None]
    batch = {"image": buffers.take(), "level": np.where(level >= 0, level, level[:, :1]),
             "mask": there.astype(np.float32)}
    if form.evaluation:
      batch |= {key: np.full(shape, "", object) for key in ("patient", "image_id", "eye")}
      batch["boxes"] = np.zeros((*shape, most, 4), np.float32)
      batch["box_type"] = np.full((*shape, most), -1, np.int32)
    for place in np.ndindex(shape):
      if there[place]:
        photograph = next(stream)
        image = photograph.pop("image")
        for key, value in photograph.items():
          batch[key][place] = value.decode() if isinstance(value, bytes) else value
      elif place[1] == 0:
        image = 0  # a row of padding
      batch["image"][place] = image  # of a missing eye the own one
    if form.evaluation:
      batch["patient"] = batch["patient"][:, 0]
    yield batch
    del batch  # or its buffer would never be free


class _Buffers:
  """uint8 arrays of one shape, handed out again once nobody refers to them any more.

  A view, and an array JAX made without a copy, hold a reference to what they show. They begin where
  JAX's CPU needs no copy: at a multiple of 64 bytes.
  """

  KEPT = 4

  def __init__(self, shape: tuple[int, ...]):
    self._shape = shape
    self._arrays: list[np.ndarray] = []  # flat, and larger
    probe = [object()]
    self._idle = sys.getrefcount(probe[0])

  def take(self) -> np.ndarray:
    for number in range(len(self._arrays)):
      if sys.getrefcount(self._arrays[number]) == self._idle:
        return self._shown(number)
    flat = np.empty(math.prod(self._shape) + 64, np.uint8)
    self._arrays = [*self._arrays[1 - self.KEPT :], flat]
    del flat
    return self._shown(-1)

  def _shown(self, number: int) -> np.ndarray:
    flat = self._arrays[number]
    start = -flat.__array_interface__["data"][0] % 64
    return flat[start : start + math.prod(self._shape)].reshape(self._shape)


def _decoded(content: tf.Tensor, dataset: DataSet, form: _Form) -> tf.Tensor:
  """uint8 [size, size, channels] of an encoded photograph of the set."""
  if dataset.encoding == "jpeg":
    image = tf.io.decode_jpeg(content, channels=form.channels, dct_method="INTEGER_ACCURATE")
  elif form.channels < dataset.channels:
    # As PIL makes it gray; TensorFlow weighs the colours of a PNG otherwise than of a JPEG.
    colours = tf.cast(tf.io.decode_png(content, channels=3), tf.int32)
    gray = tf.reduce_sum(colours * [19595, 38470, 7471], axis=-1, keepdims=True) + 0x8000
    image = tf.cast(gray // 0x10000, tf.uint8)
  else:
    image = tf.io.decode_png(content, channels=form.channels)
  stored, size = dataset.full_size, form.size
  image = tf.ensure_shape(image, [stored, stored, form.channels])
  if size == stored:
    return image
  image = tf.image.resize(tf.cast(image, tf.float32), [size, size], antialias=True)
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
