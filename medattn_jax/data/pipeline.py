"""From a data set on disk to batches of numpy arrays (TFDS and tf.data).

A training batch is a function of (seed, step) alone: the rows of step s are places s·B … s·B+B-1
of an endless stream of epochs, each epoch's order is drawn from (seed, epoch), and a run starts at
any step without reading what it skips. Decoding runs in parallel and in order; photographs that are
kept decoded (decoded.py) are read instead.

A row of a batch is a patient with both eyes, or (pairs=False) a single photograph.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import simplejpeg

from medattn_jax.data import decoded, workers
from medattn_jax.data.backend import tf
from medattn_jax.data.buffers import Buffers
from medattn_jax.data.stored import DataSet, open_dataset
from medattn_jax.errors import UserError

__all__ = ["Batch", "DataSet", "epoch_order", "eval_batches", "keep_decoded", "open_dataset"]
__all__ += ["photographs", "train_batches"]

Batch = dict[str, np.ndarray]

_ENDLESS = sys.maxsize  # in place of a last step

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
  steps = range(len(asked))
  stream = _batches(dataset, split, asked.__getitem__, steps, 1, form, threads, 4 * form.group)

  def shown(image: np.ndarray) -> np.ndarray:
    image.flags.writeable = False
    return image

  return (shown(batch["image"][0, 0]) for batch in stream)


def keep_decoded(dataset: DataSet, split: str, full_size: int, channels: int) -> None:
  """Decodes a split once; streams of this size and these channels read that from then on.

  Raises:
    UserError: as `photographs` and `decoded.write` do.
  """
  every = range(len(dataset.photo_levels(split)))
  read = photographs(dataset, split, every, full_size=full_size, channels=channels)
  decoded.write(dataset, split, full_size, channels, read)


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
    """How many photographs a call of Python from tf.data reads and decodes, at most.

    A call costs some 350 µs in all, as much as ten photographs of 48² and a third of one of 400².
    """
    return min(64, max(8, 2**23 // (self.size**2 * self.channels)))


def _batches(
  dataset: DataSet,
  split: str,
  numbers: Callable[[np.ndarray], np.ndarray],
  steps: range,
  rows: int,
  form: _Form,
  threads: int | None,
  ahead: int = 2,
) -> Iterator[Batch]:
  """The batches of these steps, of the rows that `numbers` has at places s·rows … of a step s.

  Numbers from the end of the split on are padding. `ahead` batches are fetched ahead.

  tf.data calls `fill` in its threads, in order, each time for some rows. JPEGs of the size asked
  for are decoded there, where they belong, which spares a copy (.5 ms of 8 at 1230²), and what is
  kept decoded is read there; TensorFlow decodes what else there is, of which Python would let no
  more than one at a time.
  """
  begun: dict[int, tuple[np.ndarray, Batch]] = {}  # by step; with its numbers
  places_of: dict[int, list[np.ndarray]] = {}  # of what TensorFlow decodes, by the place after it
  damage: list[UserError] = []
  lock = threading.Lock()
  records = dataset.records(split)
  each = None if form.pairs else dataset.places(split)
  kept = decoded.find(dataset, split, form.size, form.channels)
  counts = (dataset.levels(split) >= 0).sum(1)
  first_of = np.cumsum(counts) - counts  # the number of each example's first photograph
  levels = dataset.levels(split) if form.pairs else dataset.photo_levels(split)[:, None]
  buffers = Buffers((rows, form.eyes, form.size, form.size, form.channels))
  jpeg = dataset.encoding == "jpeg" and dataset.full_size == form.size
  in_place = kept.read if kept else _decode_jpeg if jpeg else None
  places = range(steps.start * rows, min(steps.stop * rows, _ENDLESS))
  cores = threads or workers.cores()
  chunk = max(1, min(form.group // form.eyes, ahead * rows // max(cores, 2)))
  calls = -(-ahead * rows // chunk)

  def batch_of(step: int) -> tuple[np.ndarray, Batch]:
    with lock:
      if step not in begun:
        asked = numbers(np.arange(step * rows, (step + 1) * rows))
        batch = _empty(asked, levels, form, dataset.max_boxes)
        begun[step] = asked, {"image": buffers.take(len(begun)), **batch}
      return begun[step]

  def read(first: int, last: int) -> Iterator[tuple[bytes | int, np.ndarray]]:
    """The photographs of these rows, encoded or, where they are kept decoded, their numbers; and
    where each belongs: uint8 [1 or 2, F, F, channels]."""
    for place in range(first, last):
      step, row = divmod(place, rows)
      asked, batch = batch_of(step)
      if asked[row] >= len(levels):
        batch["image"][row] = 0
        continue
      if form.pairs:
        example, eyes = int(asked[row]), range(int(batch["mask"][row].sum()))
      else:
        example, eye = map(int, each[asked[row]])
        eyes = (eye,)
      if form.evaluation or not kept:
        encoded = _read(batch, row, records[example], eyes, dataset)
      for at, eye in enumerate(eyes):  # the last one is that of a missing eye too
        where = batch["image"][row, at : None if at == len(eyes) - 1 else at + 1]
        yield int(first_of[example]) + eye if kept else encoded[eye], where

  def fill(first: np.ndarray) -> tuple[np.int64, np.ndarray]:
    last, left = min(int(first) + chunk, places.stop), []
    try:
      for content, where in read(int(first), last):
        if in_place:
          in_place(content, where)
        else:
          left.append((content, where))
    except UserError as error:
      damage.append(error)
      raise
    except Exception as error:
      damage.append(unreadable(error))
      raise
    places_of[last] = [where for _, where in left]
    return np.int64(last), np.array([content for content, _ in left], object)

  def filled_by(first: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    last, left = tf.numpy_function(fill, [first], [tf.int64, tf.string], stateful=False)
    shape = [form.size, form.size, form.channels]
    if in_place:
      return last, tf.zeros([0, *shape], tf.uint8)
    return last, tf.map_fn(
      lambda one: _decoded(one, dataset, form), tf.ensure_shape(left, [None]),
      fn_output_signature=tf.TensorSpec(shape, tf.uint8))

  def unreadable(error: Exception) -> UserError:
    line = " ".join(str(error).split())[:200]
    return UserError(f"{dataset.folder}, split {split}, cannot be read: {line}")

  options = tf.data.Options()
  options.deterministic = True
  if threads:
    options.threading.private_threadpool_size = threads
  # Not from_generator: from then on glibc would keep no array above 128 kB, of nobody's.
  stream = tf.data.Dataset.range(places.start, places.stop, chunk)
  stream = stream.map(_AS_IT_IS(filled_by), num_parallel_calls=min(cores, calls))
  stream = stream.prefetch(max(1, calls - cores - 1)).with_options(options)

  def iterate() -> Iterator[Batch]:
    filled, there = _elements(stream), places.start
    for step in steps:
      try:
        while there < (step + 1) * rows:
          there, images = next(filled)
          for where, image in zip(places_of.pop(int(there)), images, strict=True):
            where[...] = image
      except tf.errors.OpError as error:
        raise (damage[0] if damage else unreadable(error)) from None
      yield begun.pop(step)[1]

  found = iterate()
  _open.add(found)
  return found


def _elements(stream: tf.data.Dataset) -> Iterator[tuple]:
  """The elements of a stream, as numpy has them; asked for more, tf.errors.OutOfRangeError.

  Its own iterator takes a millisecond for each beside threads that want Python's lock, as it gives
  the lock away ten times.
  """
  specs = tf.nest.flatten(stream.element_spec)
  kinds = {"output_types": [spec.dtype for spec in specs],
           "output_shapes": [spec.shape for spec in specs]}
  iterator = tf.raw_ops.AnonymousIteratorV3(**kinds)
  tf.raw_ops.MakeIterator(dataset=tf.data.experimental.to_variant(stream), iterator=iterator)
  while True:
    yield tuple(one.numpy() for one in tf.raw_ops.IteratorGetNext(iterator=iterator, **kinds))


def _empty(asked: np.ndarray, levels: np.ndarray, form: _Form, most: int) -> Batch:
  """The batch of these numbers but for what is read from records; levels are -1 for no eye."""
  level = levels[np.minimum(asked, len(levels) - 1)]
  there = (level >= 0) & (asked < len(levels))[:, None]
  batch = {"level": np.where(level >= 0, level, level[:, :1]), "mask": there.astype(np.float32)}
  if form.evaluation:
    batch["patient"] = np.full(len(asked), "", object)
    batch |= {key: np.full(there.shape, "", object) for key in ("image_id", "eye")}
    batch["boxes"] = np.zeros((*there.shape, most, 4), np.float32)
    batch["box_type"] = np.full((*there.shape, most), -1, np.int32)
  return batch


def _read(
  batch: Batch, row: int, record: bytes, eyes: Sequence[int], dataset: DataSet
) -> Sequence[bytes]:
  """The photographs of a record, which `eyes` counts; what else the batch asks for is filled in.

  TensorFlow's own parser takes three times as long, as it copies each photograph.
  """
  feature = tf.train.Example.FromString(record).features.feature
  words = lambda key: feature[key].bytes_list.value
  encoded = words("images")
  if max(eyes) >= len(encoded):
    raise ValueError(f"{len(encoded)} photographs where the set's index counts {max(eyes) + 1}")
  if "patient" not in batch:
    return encoded
  batch["patient"][row] = words("patient")[0].decode()
  of = np.array(feature["boxes/eye"].int64_list.value)
  scale = batch["image"].shape[2] / dataset.full_size
  for place, eye in enumerate(eyes):
    for key, name in (("image_id", "image_ids"), ("eye", "eyes")):
      batch[key][row, place] = words(name)[eye].decode()
    own = np.flatnonzero(of == eye)
    boxes = np.reshape(feature["boxes/box"].float_list.value, (-1, 4))[own]
    batch["boxes"][row, place, : len(own)] = boxes.astype(np.float32) * scale
    types = np.array(feature["boxes/type"].int64_list.value, int)[own]
    batch["box_type"][row, place, : len(own)] = types
  return encoded


def _decode_jpeg(content: bytes, into: np.ndarray) -> None:
  """Decodes a JPEG of F × F pixels into uint8 [n, F, F, channels], n times; else ValueError."""
  size, channels = into.shape[2:]
  found = simplejpeg.decode_jpeg(content, "GRAY" if channels == 1 else "RGB", buffer=into[0])
  if found.shape[:2] != (size, size):
    raise ValueError(f"a photograph of {found.shape[1]}×{found.shape[0]} pixels in a set of "
                     f"{size}×{size}")
  into[1:] = into[0]


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
