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


_RAGGED = functools.partial(tf.io.RaggedFeature, row_splits_dtype=tf.int64)
_SPEC = {
  "images": _RAGGED(tf.string),
  "patient": tf.io.FixedLenFeature([], tf.string),
  "image_ids": _RAGGED(tf.string),
  "eyes": _RAGGED(tf.string),
  "boxes/eye": _RAGGED(tf.int64),
  "boxes/type": _RAGGED(tf.int64),
  "boxes/box": _RAGGED(tf.float32, partitions=[tf.io.RaggedFeature.UniformRowLength(4)]),
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
    """How many rows are read at once: pairs, or single photographs, the more the smaller they are.

    A step of tf.data costs many times what decoding a photograph of 48² pixels does, and a call of
    Python from it a fifth of what one of 400² does.
    """
    return 16 if self.pairs else min(64, max(1, 2**19 // (self.size**2 * self.channels)))


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
  levels = dataset.levels(split) if form.pairs else dataset.photo_levels(split)[:, None]

  def chunks() -> Iterator[np.ndarray]:
    for asked in numbers():
      there = asked[asked < len(levels)]
      yield from (there[i : i + form.chunk] for i in range(0, len(there), form.chunk))

  source = tf.data.Dataset.from_generator(
    chunks, output_signature=tf.TensorSpec([None], tf.int64))
  two_batches = 2 * rows * form.eyes
  stream = _photographs(dataset, split, source, form, threads, ahead=two_batches)
  return _assembled(stream, numbers(), levels, rows, form, dataset.max_boxes)


def _photographs(
  dataset: DataSet,
  split: str,
  source: tf.data.Dataset,
  form: _Form,
  threads: int | None,
  ahead: int,
) -> Iterator[Batch]:
  """The photographs of the rows whose numbers `source` has, in chunks; one by one, in order.

  Each has its "image", and for evaluation its names and boxes. At least `ahead` of them are
  fetched ahead.
  """
  records = dataset.records(split)
  places = None if form.pairs else dataset.places(split)
  damage: list[UserError] = []
  most, scale = dataset.max_boxes, form.size / dataset.full_size
  spec = _SPEC if form.evaluation else {"images": _SPEC["images"]}

  def fetch(number: np.ndarray) -> bytes:
    try:
      return records[int(number if form.pairs else places[number, 0])]
    except UserError as error:
      damage.append(error)
      raise

  def encoded(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
    """Of a chunk, what each of its photographs has; the image as it lies in the record."""
    fetched = lambda numbers: np.array([fetch(number) for number in numbers], object)
    read = tf.numpy_function(fetched, [numbers], tf.string, stateful=False)
    parsed = tf.io.parse_example(tf.ensure_shape(read, [None]), spec)
    images = parsed["images"]
    if form.pairs:
      row, eye = images.value_rowids(), tf.ragged.range(images.row_lengths()).flat_values
      own = lambda values: values.flat_values
    else:
      row, eye = tf.range(tf.size(numbers)), tf.gather(tf.constant(places[:, 1]), numbers)
      own = lambda values: tf.gather(values.flat_values, values.row_starts() + eye)
    made = {"image": own(images)}
    if form.evaluation:
      made["patient"] = tf.gather(parsed["patient"], row)
      made["image_id"], made["eye"] = own(parsed["image_ids"]), own(parsed["eyes"])
      mine = tf.gather(parsed["boxes/eye"], row) == eye[:, None]
      of_each = lambda values, fill, shape: tf.ragged.boolean_mask(
        tf.gather(values, row), mine).to_tensor(fill, shape=[None, most, *shape])
      made["boxes"] = of_each(parsed["boxes/box"] * scale, 0, [4])
      made["box_type"] = of_each(tf.cast(parsed["boxes/type"], tf.int32), -1, [])
    return made

  def decoded(photograph: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {**photograph, "image": _decoded(photograph["image"], dataset, form)}

  def chunk(numbers: tf.Tensor) -> dict[str, tf.Tensor]:
    made = encoded(numbers)
    image = tf.TensorSpec([form.size, form.size, form.channels], tf.uint8)
    one = lambda content: _decoded(content, dataset, form)
    return {**made, "image": tf.map_fn(one, made["image"], fn_output_signature=image)}

  options = tf.data.Options()
  options.deterministic = True
  if threads:
    options.threading.private_threadpool_size = threads
  parallel = threads or tf.data.AUTOTUNE
  mapped = lambda stream, does: stream.map(_AS_IT_IS(does), num_parallel_calls=parallel)
  if form.pairs:
    stream = mapped(mapped(source, encoded).unbatch(), decoded).prefetch(ahead)
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
        for place in range(len(read["image"])):
          yield {key: value[place] for key, value in read.items()}
    except broken as error:
      if damage:
        raise damage[0] from None
      line = " ".join(error.message.split())[:200]
      raise UserError(f"{dataset.folder}, split {split}, cannot be read: {line}") from None

  return iterate()


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
