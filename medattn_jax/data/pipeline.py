"""From a data set on disk to batches of numpy arrays (TFDS and tf.data).

A training batch is a function of (seed, step) alone: the rows of step s are places s·B … s·B+B-1
of an endless stream of epochs, each epoch's order is drawn from (seed, epoch), and a run starts at
any step without reading what it skips. Decoding runs in parallel and in order.

A row of a batch is a patient with both eyes, or (pairs=False) a single photograph.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from medattn_jax.data.backend import tf
from medattn_jax.data.stored import DataSet, open_dataset
from medattn_jax.errors import UserError

__all__ = ["Batch", "DataSet", "epoch_order", "eval_batches", "open_dataset", "photographs"]
__all__ += ["train_batches"]

Batch = dict[str, np.ndarray]

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

  form = _Form(full_size, channels, pairs, evaluation=False)
  return _batches(dataset, split, numbers, len(rows), form, threads)


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

  def numbers() -> Iterator[np.ndarray]:
    for first in range(0, len(filled), batch_size):
      yield filled[first + rows.start : first + rows.stop]

  form = _Form(full_size, channels, pairs, evaluation=True)
  return _batches(dataset, split, numbers, len(rows), form, threads)


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
  source = tf.data.Dataset.from_tensor_slices(asked).batch(form.chunk)
  return (one["image"] for one in _photographs(dataset, split, source, form, threads, ahead=16))


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
  def chunk(self) -> int:
    """How many single photographs are read at once, the more the smaller they are.

    A step of tf.data costs many times what decoding a photograph of 48² pixels does.
    """
    return min(64, max(1, 2**19 // (self.size**2 * self.channels)))


def _batches(
  dataset: DataSet,
  split: str,
  numbers: Callable[[], Iterator[np.ndarray]],
  rows: int,
  form: _Form,
  threads: int | None,
) -> Iterator[Batch]:
  """Batches of the rows that `numbers` (arrays of `rows` row numbers) asks for.

  Numbers from the end of the split on are padding.
  """
  if form.pairs:
    wanted = tf.TensorSpec([rows], tf.int64)
    source = tf.data.Dataset.from_generator(numbers, output_signature=wanted).unbatch()
  else:
    starts = range(0, rows, form.chunk)
    chunks = lambda: (row[first : first + form.chunk] for row in numbers() for first in starts)
    wanted = tf.TensorSpec([None], tf.int64)
    source = tf.data.Dataset.from_generator(chunks, output_signature=wanted)
  two_batches = 2 * rows * form.eyes
  stream = _photographs(dataset, split, source, form, threads, ahead=two_batches)
  return _assembled(stream, rows, form)


def _photographs(
  dataset: DataSet,
  split: str,
  source: tf.data.Dataset,
  form: _Form,
  threads: int | None,
  ahead: int,
) -> Iterator[Batch]:
  """The photographs of the rows whose numbers `source` has, one by one, in order.

  Its elements are numbers, or for single photographs chunks of them. At least `ahead` photographs
  are fetched ahead.
  """
  records = dataset.records(split)
  places = None if form.pairs else dataset.places(split)
  last = len(records if form.pairs else places) - 1
  damage: list[UserError] = []
  most, scale = dataset.max_boxes, form.size / dataset.full_size
  spec = _SPEC if form.evaluation else {key: _SPEC[key] for key in ("images", "levels")}

  def fetch(number: np.ndarray) -> bytes:
    row = min(int(number), last)
    try:
      return records[row if form.pairs else int(places[row, 0])]
    except UserError as error:
      damage.append(error)
      raise

  def example(number: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor]:
    parsed = tf.io.parse_single_example(tf.ensure_shape(record, []), spec)
    count = tf.shape(parsed["levels"], tf.int64)[0]
    if form.pairs:
      own = tf.constant([0, 1], tf.int64)
    else:
      own = tf.gather(tf.constant(places[:, 1]), tf.minimum(number, last))[None]
    there = own < count
    real = there & (number <= last)
    eye = lambda values: tf.ensure_shape(tf.gather(values, tf.minimum(own, count - 1)), own.shape)
    made = {
      "image": tf.where(there, eye(parsed["images"]), ""),
      "level": tf.cast(eye(parsed["levels"]), tf.int32),
      "mask": tf.cast(real, tf.float32),
    }
    if form.evaluation:
      named = lambda values: tf.where(real, values, "")
      made["patient"] = tf.fill([form.eyes], named(parsed["patient"])[0])
      made["image_id"] = named(eye(parsed["image_ids"]))
      made["eye"] = named(eye(parsed["eyes"]))
      kept = [real[i] & (parsed["boxes/eye"] == own[i]) for i in range(form.eyes)]
      scaled = parsed["boxes/box"] * scale
      made["boxes"] = tf.stack([_padded(scaled[mine], most, 0) for mine in kept])
      types = tf.cast(parsed["boxes/type"], tf.int32)
      made["box_type"] = tf.stack([_padded(types[mine], most, -1) for mine in kept])
    return made

  def decoded(photograph: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    content = photograph["image"]
    image = tf.cond(content == "", lambda: tf.zeros([0, 0, form.channels], tf.uint8),
                    lambda: _decoded(content, dataset, form))
    return {**photograph, "image": image}

  def both(number: tf.Tensor) -> dict[str, tf.Tensor]:
    return example(number, tf.numpy_function(fetch, [number], tf.string, stateful=False))

  def single(row: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
    one = {key: value[0] for key, value in example(*row).items()}
    return {**one, "image": _decoded(one["image"], dataset, form)}

  def chunk(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
    fetched = lambda numbers: np.array([fetch(number) for number in numbers], object)
    read = tf.numpy_function(fetched, [numbers], tf.string, stateful=False)
    made = {"image": tf.TensorSpec([form.size, form.size, form.channels], tf.uint8),
            "level": tf.TensorSpec([], tf.int32), "mask": tf.TensorSpec([], tf.float32)}
    if form.evaluation:
      made |= dict.fromkeys(("patient", "image_id", "eye"), tf.TensorSpec([], tf.string))
      made["boxes"] = tf.TensorSpec([most, 4], tf.float32)
      made["box_type"] = tf.TensorSpec([most], tf.int32)
    return tf.map_fn(single, (numbers, tf.ensure_shape(read, [None])), fn_output_signature=made)

  options = tf.data.Options()
  options.deterministic = True
  if threads:
    options.threading.private_threadpool_size = threads
  parallel = threads or tf.data.AUTOTUNE
  mapped = lambda stream, does: stream.map(_AS_IT_IS(does), num_parallel_calls=parallel)
  if form.pairs:
    stream = mapped(mapped(source, both).unbatch(), decoded).prefetch(ahead)
  else:
    stream = mapped(source, chunk).prefetch(-(-ahead // form.chunk))
  stream = stream.with_options(options)
  broken = tf.errors.OpError  # bound here: at the interpreter's end module names are gone

  def iterate() -> Iterator[Batch]:
    try:
      for read in stream.as_numpy_iterator():
        if form.pairs:
          yield read
          continue
        for place in range(len(read["level"])):
          yield {key: value[place] for key, value in read.items()}
    except broken as error:
      if damage:
        raise damage[0] from None
      line = " ".join(error.message.split())[:200]
      raise UserError(f"{dataset.folder}, split {split}, cannot be read: {line}") from None

  return iterate()


def _assembled(stream: Iterator[Batch], rows: int, form: _Form) -> Iterator[Batch]:
  """Batches of `rows` rows from single photographs.

  By numpy and not by tf.data: its batches cost a second copy for the pair, and page faults for a
  fresh buffer each time (together two thirds of what decoding costs).
  """
  shape = (rows, form.eyes)
  buffers = _Buffers((*shape, form.size, form.size, form.channels))
  for first in stream:
    batch = {"image": buffers.take()}
    for key in (key for key in first if key not in batch):
      text = isinstance(first[key], bytes)
      batch[key] = np.empty((*shape, *np.shape(first[key])), object if text else first[key].dtype)
    for place in np.ndindex(shape):
      photograph = next(stream) if any(place) else first
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
