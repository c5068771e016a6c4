"""Does reading batches cost more than decoding their JPEGs? (input floor of every training)

`python -m benchmarks.pipeline [--size=1230] [--patients=16] [--threads=N] [--data=DIR] [--json]`

Draws a small set or opens a prepared one, then times, alternating, `train_batches` and the bare
decoding of the very same JPEGs, already in memory, by the same decoder, as parallel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", type=int, default=1230, help="pixels a side")
  parser.add_argument("--patients", type=int, default=16)
  parser.add_argument("--batch", type=int, default=4, help="patients of a batch")
  parser.add_argument("--steps", type=int, default=25, help="batches of a round")
  parser.add_argument("--threads", type=int, help="of a private pool; TensorFlow's own by default")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--data-dir", help="where the drawn set is kept; a temporary folder else")
  parser.add_argument("--data", help="a prepared set to read instead: its folder, size --size")
  parser.add_argument("--json", action="store_true", help="the JSON line alone")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    row = measure(flags, flags.data_dir or scratch)
  if not flags.json:
    print(f"{'':24}{'images/s':>10}{'ms/image':>10}")
    for what, key in (("train_batches", "images_per_second"), ("bare JPEG decoding", "bare")):
      print(f"{what:24}{row[key]:10.1f}{1000 / row[key]:10.2f}")
    cost = row["cost_over_bare"]
    print(f"cost over bare decoding: {cost['median']:.3f} "
          f"({cost['min']:.3f} to {cost['max']:.3f}), in processor time "
          f" {row['processor_cost_over_bare']:.3f}; "
          f"{row['bytes_per_image'] / 1000:.0f} kB a JPEG")
  print(json.dumps(row, allow_nan=False))


def measure(flags: argparse.Namespace, data_dir: str) -> dict:
  from medattn_jax.data import pipeline
  from medattn_jax.data.backend import tf

  numbers = {"seed": 0, "train": flags.patients, "validation": 0, "test": 0}
  dataset = pipeline.open_dataset(
    flags.data or "synthetic_fundus", data_dir, full_size=flags.size, synthetic=numbers
  )
  jpegs = [
    jpeg
    for record in dataset.records("train")
    for jpeg in tf.train.Example.FromString(record).features.feature["images"].bytes_list.value
  ]
  options = tf.data.Options()
  options.deterministic = True
  if flags.threads:
    options.threading.private_threadpool_size = flags.threads
  decoding = (
    tf.data.Dataset.from_tensor_slices(jpegs).repeat()
    .map(tf.io.decode_jpeg, num_parallel_calls=flags.threads or tf.data.AUTOTUNE)
    .with_options(options)
  )
  images = 2 * flags.batch * flags.steps

  # Each round starts afresh and is timed while its reader waits for it, so what one prefetches is
  # never timed as the other's. Returns images a second and processor seconds; the latter are fair
  # on a machine shared with others.
  def timed(stream, count: int) -> tuple[float, float]:
    for _ in range(count // flags.steps * 3):
      next(stream)
    start, worked = time.perf_counter(), time.process_time()
    for _ in range(count):
      next(stream)
    return images / (time.perf_counter() - start), time.process_time() - worked

  def read() -> tuple[float, float]:
    return timed(
      pipeline.train_batches(
        dataset, "train", batch_size=flags.batch, full_size=flags.size, seed=0, start_step=0,
        threads=flags.threads,
      ),
      flags.steps,
    )

  def decode() -> tuple[float, float]:
    return timed(iter(decoding), images)

  read(), decode()  # warm
  pairs = [(read(), decode()) for _ in range(flags.rounds)]
  walls = [theirs[0] / ours[0] for ours, theirs in pairs]
  return {
    "name": "pipeline",
    "config": {"size": flags.size, "threads": flags.threads, "rounds": flags.rounds},
    "batch": flags.batch,
    "images_per_second": round(statistics.median(ours[0] for ours, _ in pairs), 2),
    "bare": round(statistics.median(theirs[0] for _, theirs in pairs), 2),
    "cost_over_bare": {
      "min": round(min(walls), 3),
      "median": round(statistics.median(walls), 3),
      "max": round(max(walls), 3),
    },
    "processor_cost_over_bare": round(
      statistics.median(ours[1] / theirs[1] for ours, theirs in pairs), 3
    ),
    "bytes_per_image": round(sum(map(len, jpegs)) / len(jpegs)),
  }


if __name__ == "__main__":
  main()
