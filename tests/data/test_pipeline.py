"""Batches: what a plain loop would read, at any step, from any process, or an error."""

from __future__ import annotations

import io
import itertools
import platform
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import pipeline
from medattn_jax.data.backend import tf
from medattn_jax.errors import UserError

SIZE = 48  # of the small set
TRAIN = {"batch_size": 4, "full_size": SIZE, "seed": 3}


@pytest.fixture(scope="module")
def dataset(small_set):
  return pipeline.open_dataset("csv", small_set, full_size=SIZE)


def take(stream, count):
  return list(itertools.islice(stream, count))


def same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def plain(example: dict) -> dict:
  """One row of a batch, by PIL and a loop."""
  images = [np.asarray(Image.open(file).convert("RGB")) for file in example["images"]]
  eyes = len(images)
  return {
    "image": np.stack([images[0], images[-1]]),
    "level": np.array([example["levels"][0], example["levels"][-1]]),
    "mask": np.array([1, eyes == 2]),
  }


def test_a_batch_is_what_a_plain_loop_reads(dataset, make):
  order = np.concatenate([pipeline.epoch_order(11, 3, epoch) for epoch in range(3)])
  stream = pipeline.train_batches(dataset, "train", start_step=0, **TRAIN)
  for step, batch in enumerate(take(stream, 8)):  # 32 rows: nearly three epochs of 11
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (4, 2, SIZE, SIZE, 3)
    assert batch["level"].dtype == np.int32 and batch["mask"].dtype == np.float32
    for row, number in enumerate(order[4 * step : 4 * step + 4]):
      expected = plain(make.example_of(int(number)))
      for key, value in expected.items():
        np.testing.assert_array_equal(batch[key][row], value, err_msg=f"{key} of {number}")


def test_an_epoch_holds_every_patient_once_and_epochs_differ(dataset):
  orders = [pipeline.epoch_order(11, 3, epoch) for epoch in range(4)]
  for order in orders:
    assert sorted(order) == list(range(11))
  assert len({tuple(order) for order in orders}) == 4
  assert tuple(pipeline.epoch_order(11, 4, 0)) != tuple(orders[0])


@pytest.mark.parametrize("balanced", [False, True])
def test_a_stream_resumes_at_any_step(dataset, balanced):
  whole = take(
    pipeline.train_batches(dataset, "train", start_step=0, balanced=balanced, **TRAIN), 7
  )
  for start in (1, 5, 6):
    stream = pipeline.train_batches(dataset, "train", start_step=start, balanced=balanced, **TRAIN)
    same(next(stream), whole[start])


def test_a_late_start_reads_nothing_of_what_it_skips(dataset, monkeypatch):
  asked = []
  kind = type(dataset.records("train"))
  get = kind.__getitem__
  monkeypatch.setattr(kind, "__getitem__", lambda self, n: asked.append(n) or get(self, n))
  next(pipeline.train_batches(dataset, "train", start_step=10**9, **TRAIN))
  assert len(asked) < 60  # this batch and what is fetched ahead


FAULTS = """
import resource, sys
import numpy as np
from medattn_jax.data import pipeline

dataset = pipeline.open_dataset("csv", sys.argv[1], full_size=int(sys.argv[2]))
size = int(sys.argv[2])
stream = pipeline.train_batches(
  dataset, "train", batch_size=4, full_size=size, seed=3, start_step=0)
next(stream)
for turn in range(20):
  if turn == 10:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(2**18)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_arrays_of_the_process_are_not_new_pages_each_time(small_set):
  """As they are once tf.data has begun with a generator of Python: 512 of 4 KiB here."""
  run = subprocess.run([sys.executable, "-c", FAULTS, small_set, str(SIZE)], timeout=120,
                       capture_output=True, text=True, check=True)
  assert float(run.stdout.split()[-1]) < 100


LEFT = """
import atexit, sys

atexit.register(lambda: print([one.gi_frame is None for one in pipeline._open]))
from medattn_jax.data import pipeline

dataset = pipeline.open_dataset("csv", sys.argv[1], full_size=int(sys.argv[2]))
stream = pipeline.train_batches(
  dataset, "train", batch_size=4, full_size=int(sys.argv[2]), seed=3, start_step=0)
next(stream)
"""


def test_a_process_may_end_with_a_stream_open(small_set):
  """TensorFlow's threads call Python: of such processes some hung at their end, or aborted."""
  run = subprocess.run([sys.executable, "-c", LEFT, small_set, str(SIZE)], timeout=120,
                       capture_output=True, text=True, check=True)
  assert run.stdout.split() == ["[True]"]


def test_processes_share_a_batch(dataset):
  whole = take(pipeline.train_batches(dataset, "train", start_step=2, **TRAIN), 2)
  parts = [
    take(
      pipeline.train_batches(
        dataset, "train", start_step=2, process_index=index, process_count=2, **TRAIN
      ),
      2,
    )
    for index in range(2)
  ]
  for step, batch in enumerate(whole):
    same({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


def test_balanced_draws_every_level_equally_often():
  levels = np.array([[0, -1]] * 90 + [[1, 4]] * 8 + [[2, 1]] * 2)  # patients: 0, 4 and 2
  highest = levels.max(axis=1)
  drawn = np.concatenate([pipeline.epoch_order(100, 0, e, levels) for e in range(60)])
  shares = np.bincount(highest[drawn], minlength=5) / len(drawn)
  np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 0, 1 / 3], atol=0.03)
  assert set(drawn) == set(range(100))  # and every patient of a level is reached


@pytest.mark.parametrize("batch_size", [2, 3, 5, 8])
def test_evaluation_meets_every_patient_once(dataset, make, batch_size):
  batches = list(
    pipeline.eval_batches(dataset, "test", batch_size=batch_size, full_size=SIZE)
  )
  assert all(len(batch["patient"]) == batch_size for batch in batches)
  rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  assert list(rows["patient"][:5]) == [f"{n:03}" for n in range(5)]
  assert set(rows["patient"][5:]) <= {""} and not rows["mask"][5:].any()
  assert set(rows["image_id"][5:].ravel()) <= {""} and (rows["box_type"][5:] == -1).all()
  for number in range(5):
    for key, value in plain(make.example_of(number)).items():
      np.testing.assert_array_equal(rows[key][number], value)
    example = make.example_of(number)
    for eye, name in enumerate(example["image_ids"]):
      assert rows["image_id"][number, eye] == name
      assert rows["eye"][number, eye] == example["eyes"][eye]
    for eye in range(2):
      own = [box for box in example["boxes"] if box["eye"] == eye]
      there = rows["box_type"][number, eye] >= 0
      assert list(rows["box_type"][number, eye][there]) == [box["type"] for box in own]
      np.testing.assert_array_equal(rows["boxes"][number, eye][there].reshape(-1, 4),
                                    np.array([box["box"] for box in own]).reshape(-1, 4))


def test_some_of_the_patients_in_any_order(dataset):
  arguments = {"batch_size": 2, "full_size": SIZE}
  whole = list(pipeline.eval_batches(dataset, "test", **arguments))
  rows = {key: np.concatenate([batch[key] for batch in whole]) for key in whole[0]}
  for wanted in ([4, 1, 3], [2, 2], []):
    found = list(pipeline.eval_batches(dataset, "test", examples=wanted, **arguments))
    assert len(found) == -(-len(wanted) // 2)
    for step, batch in enumerate(found):
      own = wanted[2 * step : 2 * step + 2]
      same({key: value[: len(own)] for key, value in batch.items()},
           {key: value[own] for key, value in rows.items()})
      assert not batch["mask"][len(own) :].any()
  with pytest.raises(IndexError, match="5 of 5"):
    pipeline.eval_batches(dataset, "test", examples=[5], **arguments)


def test_processes_share_evaluation(dataset):
  arguments = {"batch_size": 4, "full_size": SIZE}
  whole = list(pipeline.eval_batches(dataset, "test", **arguments))
  parts = [
    list(pipeline.eval_batches(dataset, "test", process_index=i, process_count=2, **arguments))
    for i in range(2)
  ]
  assert len(parts[0]) == len(parts[1]) == len(whole)
  for step, batch in enumerate(whole):
    same({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


def test_another_size_is_resized_and_said(small_set, capsys):
  dataset = pipeline.open_dataset("csv", small_set, full_size=SIZE // 2)
  assert f"stored at {SIZE} pixels" in capsys.readouterr().err
  whole = next(pipeline.eval_batches(dataset, "train", batch_size=5, full_size=SIZE))
  half = next(pipeline.eval_batches(dataset, "train", batch_size=5, full_size=SIZE // 2))
  np.testing.assert_array_equal(half["boxes"], whole["boxes"] / 2)
  means = whole["image"].reshape(5, 2, SIZE // 2, 2, SIZE // 2, 2, 3).mean((3, 5))
  # Most of the second batch is padding, of which nothing is decoded.
  for size in (SIZE, SIZE // 2):
    stream = pipeline.eval_batches(dataset, "train", batch_size=10, full_size=size)
    last = list(stream)[1]["image"]
    assert last[0].any() and not last[1:].any()
  # Antialiased: near the mean of the four pixels that become one, also at the disc's edge.
  assert np.abs(half["image"] - means).mean() < 3


def test_levels_are_known_without_decoding(dataset, make):
  levels = dataset.levels("train")
  assert levels.dtype == np.int32 and dataset.levels("train") is levels
  for number, row in enumerate(levels):
    expected = make.example_of(number)["levels"]
    assert list(row) == (expected + [-1])[:2]
  assert dataset.splits == {"train": 11, "test": 5}


@pytest.mark.parametrize("threads", [None, 1, 3, 16])
def test_a_batch_in_use_is_never_written_over(dataset, threads):
  stream = pipeline.train_batches(dataset, "train", start_step=0, threads=threads, **TRAIN)
  first = next(stream)
  view, device = first["image"][:2], jax.device_put(next(stream)["image"])
  before = view.copy(), np.array(device)
  del first
  buffers = {next(stream)["image"].ctypes.data for _ in range(12)}
  np.testing.assert_array_equal(view, before[0])
  np.testing.assert_array_equal(device, before[1])
  assert len(buffers) <= 4  # while those nobody holds are used again
  assert not any(buffer % 64 for buffer in buffers)  # or JAX would copy


def flip(path, place, bit=3):
  content = bytearray(path.read_bytes())
  content[place] ^= 1 << bit
  path.write_bytes(content)


@pytest.fixture
def struck(small_set, tmp_path):
  """A copy of the small set that may be damaged; its folder."""
  shutil.copytree(small_set, tmp_path / "set")
  return tmp_path / "set" / "csv" / "1.0.0"


@pytest.mark.parametrize("part", ["index.json", "dataset_info.json", "features.json"])
def test_a_flipped_bit_in_a_small_file_is_noticed(struck, part):
  size = (struck / part).stat().st_size
  for place in np.linspace(1, size - 2, 12).astype(int):
    flip(struck / part, place)
    with pytest.raises(UserError, match=part):
      pipeline.open_dataset("csv", struck.parents[1], full_size=SIZE)
    flip(struck / part, place)
  pipeline.open_dataset("csv", struck.parents[1], full_size=SIZE)


def test_a_flipped_bit_in_a_record_is_an_error_or_changes_nothing(struck, dataset):
  def read(folder):
    opened = pipeline.open_dataset("csv", folder, full_size=SIZE)
    return list(pipeline.eval_batches(opened, "train", batch_size=4, full_size=SIZE))

  truth, noticed = read(struck.parents[1]), 0
  shard = next(struck.glob("*train*"))
  for place in np.random.default_rng(0).integers(0, shard.stat().st_size, 20):
    flip(shard, place)
    try:
      for batch, true in zip(read(struck.parents[1]), truth, strict=True):
        same(batch, true)
    except UserError as error:
      noticed += 1
      assert str(shard) in str(error)
    flip(shard, place)
  assert noticed > 3


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_missing_or_short_file_is_named_on_opening(struck, damage):
  shard = next(struck.glob("*test*"))
  if damage == "gone":
    shard.unlink()
  else:
    shard.write_bytes(shard.read_bytes()[:-70000])
  with pytest.raises(UserError, match=shard.name):
    pipeline.open_dataset("csv", struck.parents[1], full_size=SIZE)


def test_damage_during_training_names_the_file(small_set, struck):
  dataset = pipeline.open_dataset("csv", struck.parents[1], full_size=SIZE)
  shard = next(struck.glob("*train*"))
  content = shard.read_bytes()
  start = content.index(b"JFIF")
  flip(shard, start + 600)
  with pytest.raises(UserError, match=shard.name):
    take(pipeline.train_batches(dataset, "train", start_step=0, **TRAIN), 8)


def _of_another_size(images):
  file = io.BytesIO()
  Image.new("RGB", (SIZE, SIZE - 8)).save(file, "JPEG")
  return [file.getvalue(), *images[1:]]


@pytest.mark.parametrize(("change", "words"), [
  (lambda images: [images[0][: len(images[0]) // 2], *images[1:]], "JPEG"),
  (lambda images: [b"no picture", *images[1:]], "JPEG"),
  (_of_another_size, f"a photograph of {SIZE}×{SIZE - 8} pixels in a set of {SIZE}×{SIZE}"),
  (lambda images: [], "0 photographs where the set's index counts"),
])
def test_a_sound_record_of_something_else_is_named(dataset, monkeypatch, change, words):
  kind = type(dataset.records("train"))
  get = kind.__getitem__

  def changed(records, number):
    example = tf.train.Example.FromString(get(records, number))
    images = example.features.feature["images"].bytes_list
    images.value[:] = change(list(images.value))
    return example.SerializeToString()

  monkeypatch.setattr(kind, "__getitem__", changed)
  for stream in (pipeline.train_batches(dataset, "train", start_step=0, **TRAIN),
                 pipeline.photographs(dataset, "train", [0], full_size=SIZE, channels=1)):
    with pytest.raises(UserError, match=f"{dataset.folder}, split train, .*{words}"):
      next(stream)


def test_what_is_not_there_is_named(small_set, tmp_path, dataset):
  with pytest.raises(UserError, match=r"'eyepaks'.*csv.*synthetic_fundus"):
    pipeline.open_dataset("eyepaks", small_set, full_size=SIZE)
  with pytest.raises(UserError, match="did you mean synthetic_fundus"):
    pipeline.open_dataset("sinthetic_fundus", small_set, full_size=SIZE)
  with pytest.raises(UserError, match=rf"{tmp_path}.*medattn prepare"):
    pipeline.open_dataset("csv", tmp_path, full_size=SIZE)
  with pytest.raises(UserError, match=rf"{tmp_path} holds no data set"):
    pipeline.open_dataset(str(tmp_path), None, full_size=SIZE)
  with pytest.raises(UserError, match=r"no split 'validation', only train, test"):
    pipeline.eval_batches(dataset, "validation", batch_size=1, full_size=SIZE)
  with pytest.raises(UserError, match="batch_size is 5"):
    pipeline.train_batches(
      dataset, "train", batch_size=5, full_size=SIZE, seed=0, start_step=0, process_count=2
    )


def test_a_set_is_found_by_any_folder_around_it(small_set, make, tmp_path):
  for folder in (small_set, small_set / "csv", small_set / "csv" / "1.0.0"):
    assert pipeline.open_dataset(str(folder), None, full_size=SIZE).splits["train"] == 11
  for name in ("a", "b"):
    make.write_small_set(tmp_path / name, [("test", 1)])
  with pytest.raises(UserError, match="more than one"):
    pipeline.open_dataset(str(tmp_path), None, full_size=SIZE)


def test_a_drawn_set_is_drawn_once_and_indexed(tmp_path):
  numbers = {"seed": 1, "train": 3, "validation": 0, "test": 1}
  first = pipeline.open_dataset("synthetic_fundus", tmp_path, full_size=64, synthetic=numbers)
  index = (first.folder / "index.json").stat().st_mtime_ns
  again = pipeline.open_dataset("synthetic_fundus", tmp_path, full_size=64, synthetic=numbers)
  assert (again.folder / "index.json").stat().st_mtime_ns == index
  assert again.splits == {"train": 3, "test": 1} and again.full_size == 64
  batch = next(pipeline.eval_batches(again, "train", batch_size=3, full_size=64))
  np.testing.assert_array_equal(batch["level"], again.levels("train"))
