"""Single photographs: batches of them and banks of them are what a plain loop would read."""

from __future__ import annotations

import io
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from medattn_jax import files
from medattn_jax.data import pipeline, pixels
from medattn_jax.data.datasets import prepared
from medattn_jax.errors import UserError

SIZE = 48  # of the small set
TRAIN = {"batch_size": 4, "full_size": SIZE, "seed": 3, "pairs": False}


@pytest.fixture(scope="module")
def dataset(small_set):
  return pipeline.open_dataset("csv", small_set, full_size=SIZE)


@pytest.fixture(scope="module")
def photographs(make):
  """{split: [(example, place, level, image, gray)]}, by PIL and a loop."""
  found = {}
  for split, count in (("train", 11), ("test", 5)):
    found[split] = []
    for number in range(count):
      example = make.example_of(number)
      for place, file in enumerate(example["images"]):
        gray = Image.open(io.BytesIO(file.getvalue()))
        gray.draft("L", gray.size)  # the JPEG's own luma
        image = np.asarray(Image.open(file).convert("RGB"))
        found[split].append(
          (example, place, example["levels"][place], image, np.asarray(gray)[..., None])
        )
  return found


@pytest.fixture(scope="module")
def drawings():
  """uint8 [12, 20, 20, 3] of chance, and a function that writes them as a set of PNGs."""
  images = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), np.uint8)

  def write(folder, channels):
    shown = images if channels == 3 else images[..., :1]
    make = lambda directory: prepared.Prepared(
      source="npz", full_size=20, channels=channels, encoding="png", num_classes=36,
      examples={"train": lambda: (pixels.example(f"{i}", 3 * i, image, 20)
                                  for i, image in enumerate(shown))},
      data_dir=directory,
    )
    prepared.install(make, folder, {})
    return pipeline.open_dataset("npz", folder, full_size=20)

  return images, write


def take(stream, count):
  return list(itertools.islice(stream, count))


def same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_what_a_plain_loop_reads(dataset, photographs, channels):
  rows = photographs["train"]
  order = np.concatenate([pipeline.epoch_order(len(rows), 3, epoch) for epoch in range(3)])
  stream = pipeline.train_batches(dataset, "train", start_step=0, channels=channels, **TRAIN)
  for step, batch in enumerate(take(stream, 11)):  # 44 rows: more than two epochs of 18
    assert batch["image"].shape == (4, 1, SIZE, SIZE, channels)
    assert batch["image"].dtype == np.uint8 and batch["mask"].dtype == np.float32
    assert batch["level"].shape == batch["mask"].shape == (4, 1)
    assert batch["level"].dtype == np.int32 and batch["mask"].all()
    for row, number in enumerate(order[4 * step : 4 * step + 4]):
      _, _, level, image, gray = rows[number]
      assert batch["level"][row, 0] == level
      np.testing.assert_array_equal(batch["image"][row, 0], image if channels == 3 else gray)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_stream_resumes_at_any_step_and_in_any_process(dataset, balanced):
  options = {"balanced": balanced, "channels": 1, **TRAIN}
  whole = take(pipeline.train_batches(dataset, "train", start_step=0, **options), 7)
  for start in (1, 6):
    parts = [
      next(pipeline.train_batches(
        dataset, "train", start_step=start, process_index=index, process_count=2, **options))
      for index in range(2)
    ]
    same({key: np.concatenate([part[key] for part in parts]) for key in whole[0]}, whole[start])


def test_a_late_start_reads_nothing_of_what_it_skips(dataset, monkeypatch):
  asked, kind = [], type(dataset.records("train"))
  get = kind.__getitem__
  monkeypatch.setattr(kind, "__getitem__", lambda self, n: asked.append(n) or get(self, n))
  next(pipeline.train_batches(dataset, "train", start_step=10**9, **TRAIN))
  assert len(asked) < 60  # this batch and what is fetched ahead


def test_balanced_goes_by_a_photographs_own_level(tmp_path, make):
  # Left eyes of level 0, right ones of 4 but for one: by patients 4 would be drawn nearly alone.
  levels = [[0, 4]] * 9 + [[0, 2]]
  examples = [{**make.example_of(1), "levels": row, "boxes": []} for row in levels]
  build = lambda directory: prepared.Prepared(
    source="csv", full_size=SIZE, examples={"train": lambda: examples}, data_dir=directory)
  prepared.install(build, tmp_path, {})
  dataset = pipeline.open_dataset("csv", tmp_path, full_size=SIZE)
  batches = take(pipeline.train_batches(
    dataset, "train", start_step=0, balanced=True, **{**TRAIN, "batch_size": 60}), 10)
  drawn = np.bincount(np.concatenate([batch["level"][:, 0] for batch in batches]), minlength=5)
  np.testing.assert_allclose(drawn / 600, [1 / 3, 0, 1 / 3, 0, 1 / 3], atol=0.07)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluation_meets_every_photograph_once(dataset, photographs, batch_size):
  truth = photographs["test"]
  options = {"batch_size": batch_size, "full_size": SIZE, "pairs": False}
  batches = list(pipeline.eval_batches(dataset, "test", **options))
  assert all(batch["mask"].shape == (batch_size, 1) for batch in batches)
  rows = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  for row, (example, place, level, image, _) in enumerate(truth):
    np.testing.assert_array_equal(rows["image"][row, 0], image)
    assert rows["level"][row, 0] == level and rows["mask"][row, 0] == 1
    assert rows["patient"][row] == example["patient"]
    assert rows["image_id"][row, 0] == example["image_ids"][place]
    assert rows["eye"][row, 0] == example["eyes"][place]
    own = [box for box in example["boxes"] if box["eye"] == place]
    there = rows["box_type"][row, 0] >= 0
    assert list(rows["box_type"][row, 0][there]) == [box["type"] for box in own]
    np.testing.assert_array_equal(rows["boxes"][row, 0][there].reshape(-1, 4),
                                  np.array([box["box"] for box in own]).reshape(-1, 4))
  assert not rows["mask"][len(truth):].any() and (rows["box_type"][len(truth):] == -1).all()
  assert {*rows["patient"][len(truth):], *rows["image_id"][len(truth):].ravel()} <= {""}
  if batch_size == 8:
    parts = [next(pipeline.eval_batches(
      dataset, "test", process_index=i, process_count=2, **options)) for i in range(2)]
    same({key: np.concatenate([part[key] for part in parts]) for key in batches[0]}, batches[0])


def test_a_bank_is_in_the_order_asked(dataset, photographs):
  truth = photographs["train"]
  numbers = [*np.random.default_rng(1).permutation(len(truth)), 5, 5, 0]
  for channels in (1, 3):
    bank = list(pipeline.photographs(dataset, "train", numbers, full_size=SIZE, channels=channels))
    assert len(bank) == len(numbers)
    for number, image in zip(numbers, bank, strict=True):
      np.testing.assert_array_equal(image, truth[number][3 if channels == 3 else 4])
  assert list(pipeline.photographs(dataset, "train", [], full_size=SIZE, channels=1)) == []
  small = next(pipeline.photographs(dataset, "train", [7], full_size=SIZE // 2, channels=3))
  assert small.shape == (SIZE // 2, SIZE // 2, 3)
  for beyond in (-1, len(truth)):
    with pytest.raises(IndexError, match=f"of {len(truth)}"):
      pipeline.photographs(dataset, "train", [0, beyond], full_size=SIZE, channels=1)
  with pytest.raises(UserError, match=r"data\.channels is 2"):
    pipeline.photographs(dataset, "train", [0], full_size=SIZE, channels=2)


def test_photographs_are_numbered_by_example_then_eye(dataset, photographs):
  for split, rows in photographs.items():
    levels = dataset.photo_levels(split)
    assert levels.dtype == np.int32 and levels.tolist() == [row[2] for row in rows]
    assert dataset.places(split).tolist() == [
      [int(row[0]["patient"]), row[1]] for row in rows
    ]
  assert (dataset.channels, dataset.encoding, dataset.num_classes) == (3, "jpeg", 5)
  assert dataset.region is None


def test_what_is_stored_without_loss_is_read_without_loss(drawings, tmp_path):
  images, write = drawings
  colour, gray = write(tmp_path / "colour", 3), write(tmp_path / "gray", 1)
  assert (colour.channels, gray.channels, gray.encoding) == (3, 1, "png")
  assert gray.photo_levels("train").tolist() == list(range(0, 36, 3))  # one character a level
  numbers = range(len(images))

  def read(dataset, channels):
    return np.stack(list(
      pipeline.photographs(dataset, "train", numbers, full_size=20, channels=channels)))

  np.testing.assert_array_equal(read(colour, 3), images)
  np.testing.assert_array_equal(read(gray, 1), images[..., :1])
  np.testing.assert_array_equal(read(gray, 3), np.repeat(images[..., :1], 3, -1))
  luma = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
  np.testing.assert_array_equal(read(colour, 1)[..., 0], luma)


def test_an_index_of_before_is_of_fundus_photographs(small_set, tmp_path):
  """Sets made when there were no other kinds go on being read."""
  shutil.copytree(small_set, tmp_path / "set")
  path = tmp_path / "set/csv/1.0.0/index.json"
  content = json.loads(path.read_text())["content"]
  for key in ("channels", "encoding", "classes", "region"):
    del content[key]
  files.write_json(path, {"sha256": prepared._digest(content), "content": content})
  old = pipeline.open_dataset("csv", tmp_path / "set", full_size=SIZE)
  assert (old.channels, old.encoding, old.num_classes, old.region) == (3, "jpeg", 5, None)
  new = pipeline.open_dataset("csv", small_set, full_size=SIZE)
  read = lambda dataset: next(
    pipeline.eval_batches(dataset, "test", batch_size=5, full_size=SIZE))
  same(read(old), read(new))
