"""Photographs kept decoded: the pixels that decoding gives, read whole or not at all."""

from __future__ import annotations

import collections
import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest

from medattn_jax import decode
from medattn_jax.data import decoded, pipeline
from medattn_jax.errors import UserError

SIZE = 48


@pytest.fixture
def dataset(small_set, tmp_path):
  shutil.copytree(small_set, tmp_path / "data")
  return pipeline.open_dataset("csv", tmp_path / "data", full_size=SIZE)


def keep(dataset, split="train", size=SIZE, channels=3):
  pipeline.keep_decoded(dataset, split, size, channels)
  return decoded.place(dataset, split, size, channels)


def same(stream, other):
  for one, two in itertools.zip_longest(stream, other):
    assert one.keys() == two.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], two[key])


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("size", "channels"), [(SIZE, 3), (SIZE, 1), (33, 3)])
def test_batches_are_those_of_what_is_encoded(dataset, pairs, size, channels):
  form = {"full_size": size, "pairs": pairs, "channels": channels}

  def all_there_is():
    train = pipeline.train_batches(dataset, "train", batch_size=4, seed=3, start_step=2, **form)
    every = pipeline.eval_batches(dataset, "train", batch_size=4, **form)
    return [*itertools.islice(train, 9), *every]

  before = all_there_is()
  keep(dataset, size=size, channels=channels)
  same(all_there_is(), before)


def test_training_reads_no_record_then(dataset, monkeypatch):
  asked = collections.Counter()
  kind = type(dataset.records("train"))
  get = kind.__getitem__
  monkeypatch.setattr(kind, "__getitem__", lambda self, n: asked.update([n]) or get(self, n))
  keep(dataset)
  assert asked and not asked.clear()
  next(pipeline.train_batches(
    dataset, "train", batch_size=4, full_size=SIZE, seed=3, start_step=0))
  list(pipeline.photographs(dataset, "train", [3, 0, 3], full_size=SIZE, channels=3))
  assert not asked


def test_other_sizes_and_splits_are_decoded_as_before(dataset):
  keep(dataset)
  assert decoded.find(dataset, "train", SIZE, 3)
  for wanted in (("test", SIZE, 3), ("train", 33, 3), ("train", SIZE, 1)):
    assert decoded.find(dataset, *wanted) is None


def flip(path, dataset):
  with open(path, "r+b") as file:
    file.seek(5 * SIZE**2 * 3 + 7)
    byte = file.read(1)[0]
    file.seek(-1, 1)
    file.write(bytes([byte ^ 16]))


def cut(path, dataset):
  path.write_bytes(path.read_bytes()[:-1])


def lose(path, dataset):
  path.unlink()


def garble(path, dataset):
  path.with_suffix(".json").write_text('{"sums": 3')


def of_another(path, dataset):
  told = json.loads(path.with_suffix(".json").read_text())
  path.with_suffix(".json").write_text(json.dumps(told | {"set": "other"}))


@pytest.mark.parametrize(("damage", "words"), [
  (flip, "photograph 5 is not what was written"), (cut, "bytes instead of"),
  (lose, "No such file"), (garble, "is damaged"), (of_another, "another data set")])
def test_damage_is_one_line_that_says_what_to_do(dataset, damage, words):
  path = keep(dataset)
  damage(path, dataset)
  with pytest.raises(UserError, match=words) as caught:
    list(pipeline.photographs(dataset, "train", range(8), full_size=SIZE, channels=3))
  assert path.stem in str(caught.value) and f"remove {path.parent}" in str(caught.value)


def test_a_file_cut_while_it_is_read_is_damage(dataset):
  path = keep(dataset)
  held = decoded.find(dataset, "train", SIZE, 3)
  cut(path, dataset)
  into = np.empty((1, SIZE, SIZE, 3), np.uint8)
  held.read(0, into)
  with pytest.raises(UserError, match="ends early"):
    held.read(len(dataset.photo_levels("train")) - 1, into)


def test_a_checksum_notices_each_bit():
  flat = np.random.default_rng(0).integers(0, 256, 21, np.uint8)
  sound = decoded.checksum(flat)
  for place, bit in itertools.product(range(21), range(8)):
    struck = flat.copy()
    struck[place] ^= 1 << bit
    assert decoded.checksum(struck) != sound


def test_what_ended_halfway_is_not_there(dataset):
  def ends():
    yield np.zeros((SIZE, SIZE, 3), np.uint8)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    decoded.write(dataset, "train", SIZE, 3, ends())
  place = decoded.place(dataset, "train", SIZE, 3)
  left = place.with_name(f".{place.name}.1.part")  # of one that was killed
  left.write_bytes(b"x")
  place.write_bytes(b"x")  # of one killed before it wrote its checksums
  assert decoded.find(dataset, "train", SIZE, 3) is None
  keep(dataset)
  assert decoded.find(dataset, "train", SIZE, 3) and not left.exists()
  assert {one.name for one in place.parent.iterdir()} == {
    place.name, place.with_suffix(".json").name, ".lock"}


def test_no_room_is_said_before_anything_is_written(dataset, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda _: collections.namedtuple("U", "free")(1000))
  with pytest.raises(UserError, match=r"are needed and 0\.0 GB are free"):
    keep(dataset)
  assert not decoded.place(dataset, "train", SIZE, 3).exists()


def test_the_command(dataset, capsys):
  page = str(pathlib.Path(__file__).parents[2] / "configs" / "demo.py")
  changes = [("data.name", str(dataset.folder)), ("data.full_size", str(SIZE)),
             ("data.image_size", "24"), ("model.crop_size", "16"), ("model.mask_size", "8")]
  decode.run(page, "train,test", changes)
  said = capsys.readouterr().out.splitlines()
  assert "train: " in said[0] and "test: " in said[1] and str(dataset.folder) in said[2]
  assert all(decoded.find(dataset, split, SIZE, 3) for split in ("train", "test"))
  decode.run(page, None, changes)
  assert "are there already" in capsys.readouterr().out
  with pytest.raises(UserError, match="has no nix; accepted: train, test"):
    decode.run(page, "train,nix", changes)
