"""What the input pipeline costs over bare JPEG decoding, and how many cores feed an accelerator.

`python -m benchmarks.pipeline [--size=small|full] [--image-size=1230] [--device-rate=N]
[--patients=16] [--batch=4] [--steps=40] [--threads=N] [--data-dir=DIR] [--data=FOLDER] [--decoded]
[--json] [--plot=FILE]`

Draws a set (or takes a prepared one), then times in turns, in one run, `pipeline.train_batches` and
the bare decoding of as many of the very same JPEGs, already in memory (a missing eye, which the
pipeline copies, is not counted): by tf.data and TensorFlow's decoder, as parallel, which is what a
plain pipeline could hope for; and by the pipeline's own decoder, in a thread a core, which do
nothing else. All have the same pixels. With --decoded the pipeline reads what `medattn decode`
keeps beside a set, made here first. A core's rate is of processor time, so it is fair on a machine
shared with others. With --device-rate, the images a second that an accelerator takes
(benchmarks.step tells), it says how many such cores that needs, and whether this machine has them:
input_bound.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

from benchmarks import rows
from medattn_jax.data import workers
from medattn_jax.errors import UserError

SIZES = {
  "small": {"image_size": 400, "patients": 8, "steps": 150, "rounds": 3},
  "full": {"image_size": 1230, "patients": 16, "steps": 40, "rounds": 5},
}
WARM = 3  # batches of a round before it is timed


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--image-size", type=rows.count, help="pixels a side")
  parser.add_argument("--patients", type=rows.count)
  parser.add_argument("--batch", type=rows.count, default=4, help="patients of a batch")
  parser.add_argument("--steps", type=rows.count, help="batches of a round")
  parser.add_argument("--threads", type=rows.count, help="of a pool; TensorFlow's own by default")
  parser.add_argument("--rounds", type=rows.count)
  parser.add_argument("--device-rate", type=rows.above_zero, help="of a device: images a second")
  parser.add_argument("--data-dir", help="where the drawn set is kept; a temporary folder else")
  parser.add_argument("--data", help="a prepared set to read instead: its folder, of --image-size")
  parser.add_argument("--decoded", action="store_true", help="read photographs kept decoded")
  flags = rows.parsed(parser, SIZES)
  with tempfile.TemporaryDirectory() as scratch:
    try:
      row = measure(flags, flags.data_dir or scratch)
    except UserError as error:
      rows.stop("pipeline", error)
  rows.say([row], table(row), flags.json)
  if flags.plot:
    plot(row, flags.plot)


def measure(flags: argparse.Namespace, data_dir: str) -> dict[str, Any]:
  import simplejpeg

  from medattn_jax.data import pipeline
  from medattn_jax.data.backend import tf

  numbers = {"seed": 0, "train": flags.patients, "validation": 0, "test": 0}
  dataset = pipeline.open_dataset(
    flags.data or "synthetic_fundus", data_dir, full_size=flags.image_size, synthetic=numbers
  )
  jpegs = [
    jpeg
    for record in dataset.records("train")
    for jpeg in tf.train.Example.FromString(record).features.feature["images"].bytes_list.value
  ]
  if flags.decoded:
    pipeline.keep_decoded(dataset, "train", flags.image_size, 3)
  options = tf.data.Options()
  options.deterministic = True
  if flags.threads:
    options.threading.private_threadpool_size = flags.threads
  # As the pipeline does: TensorFlow's default is a tenth faster and has other pixels.
  decode_jpeg = functools.partial(tf.io.decode_jpeg, channels=3, dct_method="INTEGER_ACCURATE")
  decoding = (
    tf.data.Dataset.from_tensor_slices(jpegs).repeat()
    .map(decode_jpeg, num_parallel_calls=flags.threads or tf.data.AUTOTUNE)
    .with_options(options)
  )
  # Each round starts afresh and is timed while its reader waits for it, so what one prefetches is
  # never timed as the other's. Returns seconds, and processor seconds.
  def timed(stream, count: int) -> tuple[float, float]:
    for _ in range(count // flags.steps * WARM):
      next(stream)
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(count):
      next(stream)
    return time.perf_counter() - start, time.process_time() - worked

  def batches():
    return pipeline.train_batches(
      dataset, "train", batch_size=flags.batch, full_size=flags.image_size, seed=0, start_step=0,
      threads=flags.threads)

  def read() -> tuple[float, float]:
    return timed(batches(), flags.steps)

  def decode() -> tuple[float, float]:
    return timed(iter(decoding), images)

  def decode_alone() -> tuple[float, float]:
    def share(first: int) -> None:
      for number in range(first, images, threads):
        simplejpeg.decode_jpeg(jpegs[number % len(jpegs)], "RGB")

    start, worked = time.perf_counter(), time.process_time()
    list(pool.map(share, range(threads)))
    return time.perf_counter() - start, time.process_time() - worked

  there = itertools.islice(batches(), WARM, WARM + flags.steps)
  images = int(sum(batch["mask"].sum() for batch in there))
  threads = flags.threads or workers.cores()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    decode(), decode_alone()  # warm
    rounds = [(read(), decode(), decode_alone()) for _ in range(flags.rounds)]
  return found(rounds, images, flags, sum(map(len, jpegs)) / len(jpegs))


def found(
  rounds: list[tuple[tuple[float, float], ...]], images: int, flags: argparse.Namespace, size: float
) -> dict[str, Any]:
  """The row of rounds of so many images.

  Args:
    rounds: (seconds, processor seconds) of each: the pipeline, bare decoding, the decoder alone.
    size: of a JPEG, bytes.
  """
  a_core = images / statistics.median(one[0][1] for one in rounds)
  reads = [one[0][0] for one in rounds]
  over = {}
  for which, key in ((1, "bare"), (2, "decoder")):
    pairs = [(one[0], one[which]) for one in rounds]
    over |= {
      key: rows.rounded(images / statistics.median(theirs[0] for _, theirs in pairs)),
      f"{key}_per_core": rows.rounded(
        images / statistics.median(theirs[1] for _, theirs in pairs)),
      f"cost_over_{key}": rows.spread([ours[0] / theirs[0] for ours, theirs in pairs]),
      f"processor_cost_over_{key}": rows.rounded(
        statistics.median(ours[1] / theirs[1] for ours, theirs in pairs))}
  rate = images / statistics.median(reads)
  wanted = flags.device_rate
  return {
    **rows.row(
      "pipeline", config={key: getattr(flags, key) for key in (
        "image_size", "threads", "rounds", "decoded")},
      devices=0, device_kind="cpu", batch=flags.batch, dtype="uint8",
      milliseconds=[1000 * one / flags.steps for one in reads], images=images / flags.steps,
      input_bound=None if wanted is None else rate < wanted),
    "images_per_second": rows.rounded(rate), "images_per_second_per_core": rows.rounded(a_core),
    **over, "cores": workers.cores(), "device_rate": wanted,
    "cores_for_device_rate": None if wanted is None else math.ceil(wanted / a_core),
    "bytes_per_image": round(size)}


def _ours(row: dict[str, Any]) -> str:
  return "train_batches" + ", kept decoded" * row["config"]["decoded"]


def table(row: dict[str, Any]) -> str:
  text = rows.table(("", "images/s", "of a core", "ms a core and image"), [
    (what, row[rate], row[core], 1000 / row[core]) for what, rate, core in (
      (_ours(row), "images_per_second", "images_per_second_per_core"),
      ("bare JPEG decoding", "bare", "bare_per_core"),
      ("the decoder alone", "decoder", "decoder_per_core"))])
  for what, key in (("bare decoding", "bare"), ("the decoder alone", "decoder")):
    cost = row[f"cost_over_{key}"]
    text += (f"\ncost over {what}: {cost['median']:.3f} ({cost['min']:.3f} to {cost['max']:.3f}), "
             f"in processor time {row[f'processor_cost_over_{key}']:.3f}")
  text += f"\n{row['bytes_per_image'] / 1000:.0f} kB a JPEG, {row['cores']} cores"
  if row["device_rate"]:
    text += (f"\none accelerator at {row['device_rate']:g} images/s needs "
             f"{row['cores_for_device_rate']} such cores; "
             f"{'the input' if row['input_bound'] else 'the step'} is the bottleneck here")
  return text


def plot(row: dict[str, Any], path: pathlib.Path) -> None:
  """Images a second by cores, of the pipeline and of bare decoding, and what a device asks for."""

  def draw(panel):
    most = max(2 * row["cores"], (row["cores_for_device_rate"] or 0) + 1)
    for key, what, style in (("images_per_second_per_core", _ours(row), "-"),
                             ("bare_per_core", "bare JPEG decoding", "--"),
                             ("decoder_per_core", "the decoder alone", ":")):
      panel.plot([0, most], [0, most * row[key]], style, color="#4c78a8",
                 label=f"{what}, by processor time")
    panel.plot(row["cores"], row["images_per_second"], "o", color="#4c78a8",
               label=f"{_ours(row)}, by the clock")
    if row["device_rate"]:
      needed = row["cores_for_device_rate"]
      panel.axhline(row["device_rate"], color="#f58518", linewidth=1)
      panel.axvline(needed, color="#f58518", linewidth=1, linestyle=":")
      panel.annotate(f"{row['device_rate']:g} images/s: {needed} cores",
                     (0, row["device_rate"]), (4, 4), textcoords="offset points", fontsize=8)
    panel.set(xlabel="cores", ylabel="images/s", xlim=(0, most))
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.set_title(f"{row['config']['image_size']}² JPEGs of {row['bytes_per_image'] / 1000:.0f} "
                    "kB", fontsize=10)
    panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))

  rows.figure(path, 5.2, 4.4, draw)


if __name__ == "__main__":
  main()
