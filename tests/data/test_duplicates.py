"""The same photograph under two names: in one split, said, and dropped where that is asked for."""

from __future__ import annotations

import random
import shutil

import pytest

from medattn_jax.data import duplicates, schema
from medattn_jax.data import prepare as module
from medattn_jax.data.photographs import Done
from medattn_jax.data.sources import Photograph
from medattn_jax.errors import UserError


def entries(*rows):
  """(name, content, split, patient?, level?, drawn?) of each photograph."""
  found = []
  for name, content, split, *more in rows:
    patient, level, drawn = [*more, *(name, 0, False)[len(more) :]]
    photograph = Photograph(name, None, level, patient, "", split, drawn=drawn)
    found.append((photograph, Done(pixels=content)))
  return found


def splits(settled):
  return {photograph.image_id: photograph.split for photograph, _ in settled.kept}


def test_without_copies_nothing_is_done_or_said():
  kept = entries(("a", "1", "train"), ("b", "2", "test"))
  for drop in (False, True):
    settled = duplicates.settle(kept, drop)
    assert settled.kept == kept and not settled.notes and not settled.fault
    assert settled.same == settled.rejected == []


def test_copies_in_stated_splits_are_a_fault_that_names_them():
  settled = duplicates.settle(entries(
    ("a", "1", "train"), ("b", "2", "train"), ("c", "1", "train"), ("d", "1", "test"),
    ("e", "2", "validation"), ("f", "3", "test"), ("g", "3", "test")), False)
  assert [len(own) for own in settled.same] == [3, 2, 2]
  assert "a (train) and d (test) are the same photograph in two splits, and so are 1 more" in (
    settled.fault)
  assert "--drop-duplicates" in settled.fault and len(settled.kept) == 7 and not settled.notes


def test_copies_within_a_split_are_kept_and_said():
  settled = duplicates.settle(entries(("a", "1", "train", "p"), ("b", "1", "train", "q", 2)), False)
  assert not settled.fault and len(settled.kept) == 2
  assert "1 photographs have different levels under their several names, the first: a (level 0), " \
    "b (level 2)" in settled.notes[0]
  assert "1 photographs are there more than once under different names" in settled.notes[1]


def test_dropped_copies_stay_where_they_are_tested_on():
  settled = duplicates.settle(entries(
    ("a", "1", "train"), ("b", "1", "validation", "b", 3), ("c", "1", "test"), ("d", "1", "test"),
    ("e", "2", "validation"), ("f", "2", "train"), ("g", "3", "train"), ("h", "3", "train")), True)
  assert splits(settled) == {"c": "test", "e": "validation", "g": "train"} and not settled.fault
  assert dict(settled.rejected) == {
    "a": "is the same photograph as c (test): dropped from train",
    "b": "is the same photograph as c (test), labelled 0 there and 3 here: dropped from validation",
    "d": "is the same photograph as c (test): dropped from test",
    "f": "is the same photograph as e (validation): dropped from train",
    "h": "is the same photograph as g (train): dropped from train",
  }
  assert "5 photographs that are another one under a second name are dropped, 3 of them" in (
    settled.notes[-1])


def test_patients_whose_split_was_drawn_are_put_together():
  settled = duplicates.settle(entries(
    ("a", "1", "test", "p", 0, True), ("b", "2", "test", "p", 0, True),
    ("c", "2", "train", "q", 0, True), ("d", "3", "train", "q", 0, True),
    ("e", "3", "validation", "r", 0, True), ("f", "4", "validation", "r", 0, True),
    ("g", "5", "test", "s", 0, True),  # shares nothing
    ("h", "6", "test", "t"), ("i", "6", "train", "u", 0, True), ("j", "7", "train", "u", 0, True),
  ), False)
  assert splits(settled) == {**dict.fromkeys("abcdef", "train"), **dict.fromkeys("ghij", "test")}
  assert not settled.fault and not settled.rejected
  assert any("3 patients have a photograph of a patient in another split" in n
             for n in settled.notes)


def test_no_photograph_and_no_patient_is_ever_in_two_splits():
  chance = random.Random(0)
  faults = 0
  for _ in range(300):
    kinds = {f"p{n}": (chance.choice(schema.SPLITS), chance.random() < 0.7) for n in range(9)}
    rows = []
    for number in range(chance.randrange(1, 25)):
      patient, (split, drawn) = chance.choice(sorted(kinds.items()))
      rows.append((f"{number}", f"{chance.randrange(14)}", split, patient, 0, drawn))
    for drop in (False, True):
      settled = duplicates.settle(entries(*rows), drop)
      homes, places = {}, {}
      for photograph, done in settled.kept:
        places.setdefault(done.content, set()).add(photograph.split)
        homes.setdefault(photograph.patient, set()).add(photograph.split)
        if not photograph.drawn:
          assert photograph.split == kinds[photograph.patient][0]
      torn = any(len(where) > 1 for where in places.values())
      assert torn == bool(settled.fault) and all(len(where) == 1 for where in homes.values())
      assert not drop or (not torn and len(places) == len(settled.kept))
      assert len(settled.kept) + len(settled.rejected) == len(rows)
      faults += torn
      stated = {content for _, content, _, patient, _, drawn in rows if not drawn}
      assert not torn or len(stated) > 1  # what was drawn alone is never at fault
  assert 0 < faults < 300


def test_prepare_ends_at_a_shared_photograph_and_goes_on_without(camera, data, capsys, rejected_of):
  names = [f"{n}.jpg" for n in range(6)]
  camera.both(names)
  shutil.copy(camera.folder / "0.jpg", camera.folder / "4.jpg")
  # Other bytes, the same pixels: a comment is put into the file.
  content = (camera.folder / "1.jpg").read_bytes()
  (camera.folder / "5.jpg").write_bytes(content[:2] + b"\xff\xfe\x00\x06four" + content[2:])
  camera.sheet([(name, 0 if n in (0, 4) else n % 5, "train" if n < 4 else "test")
                for n, name in enumerate(names)], ("image", "level", "split"))
  prepare = lambda **more: module.prepare(
    "csv", camera.folder, data, full_size=48, workers=1, **more)
  with pytest.raises(UserError, match=r"0\.jpg \(train\) and 4\.jpg \(test\) are") as error:
    prepare()
  assert "\n" not in str(error.value) and not (data / "csv").exists()
  summary = prepare(drop_duplicates=True)
  assert summary.patients == {"train": 2, "test": 2}
  assert summary.levels == {"train": [0, 0, 1, 1, 0], "test": [2, 0, 0, 0, 0]}
  assert rejected_of(data) == {
    "0.jpg": "is the same photograph as 4.jpg (test): dropped from train",
    "1.jpg": "is the same photograph as 5.jpg (test), labelled 0 there and 1 here: dropped from "
    "train",
  }
  capsys.readouterr()
  prepare(drop_duplicates=True)
  assert "nothing to do" in capsys.readouterr().err and len(rejected_of(data)) == 2
  with pytest.raises(UserError, match="two splits"):  # nor is the set of another wish taken for it
    prepare()
  assert (data / "csv").exists()
