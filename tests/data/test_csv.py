"""labels.csv as people write it: read, or refused with the line and what is accepted."""

from __future__ import annotations

import os
import unicodedata

import pytest

from medattn_jax.data.sources import csv
from medattn_jax.errors import UserError


def read(camera, seed=0):
  return csv.read(camera.folder, seed)


def by_id(labelled):
  return {photograph.image_id: photograph for photograph in labelled.photographs}


def test_names_of_every_kind_are_found(camera):
  names = ["a b.jpg", "é.jpg", "眼底.jpg", "a,b.jpg", 'q"q.jpg', "it's.jpg", "007.jpg", "x.JPG",
           "v1.2.jpeg", "-dash.jpg", "sub/dir/deep.jpg", "#1.jpg", "100%.jpg", "1e3.jpg"]
  camera.both(names)
  labelled = read(camera)
  assert [p.image_id for p in labelled.photographs] == names and not labelled.rejected
  assert [p.level for p in labelled.photographs] == [n % 5 for n in range(len(names))]
  assert all(p.path.name == os.path.basename(p.image_id) for p in labelled.photographs)


def test_names_without_extension_with_another_case_or_form_or_folder(camera):
  camera.picture("10_left.jpeg")
  camera.picture("IM01.JPG", seed=1)
  camera.picture(unicodedata.normalize("NFD", "café.jpg"), seed=2)
  camera.picture("train/20_right.png", seed=3)
  camera.picture("w/win.jpg", seed=4)
  camera.picture("007.jpg", seed=5)
  rows = [("10_left", 0), ("im01.jpg", 1), ("café", 2), ("20_right", 3), ("w\\win.jpg", 4),
          ("007", 1)]
  camera.sheet(rows)
  found = by_id(read(camera))
  assert [found[name].level for name, _ in rows] == [level for _, level in rows]
  assert found["20_right"].path.name == "20_right.png" and found["007"].patient == "007"


def test_a_name_that_fits_two_files_is_no_name(camera):
  camera.picture("a.jpg")
  camera.picture("a.png", seed=1)
  camera.picture("b.jpg", seed=2)
  camera.sheet([("a", 0), ("b", 1)])
  labelled = read(camera)
  assert list(by_id(labelled)) == ["b"]
  assert labelled.rejected[0][0] == "a" and "a.jpg, a.png" in labelled.rejected[0][1]


@pytest.mark.parametrize("name, reason", [
  ("../secret.jpg", "outside"), ("x/../../secret.jpg", "outside"), ("..\\secret.jpg", "outside"),
  ("/etc/passwd", "absolute"), ("C:\\secret.jpg", "absolute"), ("out.jpg", "link to outside"),
  ("linked/secret.jpg", "behind the link"), ("none.jpg", "missing"), ("loop.jpg", "loop"),
  ("dangling.jpg", "link to nothing"),
])  # fmt: skip
def test_nothing_outside_is_read(camera, tmp_path, name, reason):
  secret = camera.picture("../elsewhere/secret.jpg")
  camera.picture("../secret.jpg")
  camera.picture("good.jpg", seed=1)
  for link, target in (("out.jpg", secret), ("linked", secret.parent), ("loop.jpg", "loop.jpg"),
                       ("dangling.jpg", "gone.jpg")):
    (camera.folder / link).symlink_to(target)
  camera.sheet([(name, 0), ("good.jpg", 1)])
  labelled = read(camera)
  assert list(by_id(labelled)) == ["good.jpg"]
  assert dict(labelled.rejected)[name].count(reason) and "line 2" in dict(labelled.rejected)[name]


def test_patients_and_eyes_come_from_columns_then_names(camera):
  names = ["10_left", "10_right", "scan", "p1", "p2", "12_LEFT"]
  for seed, name in enumerate(names):
    camera.picture(f"{name}.jpg", seed=seed)
  camera.sheet([(name, 0) for name in names])
  found = by_id(read(camera))
  assert [(found[n].patient, found[n].eye) for n in names] == [
    ("10", "left"), ("10", "right"), ("scan", ""), ("p1", ""), ("p2", ""), ("12", "left")
  ]  # fmt: skip
  camera.sheet([("10_left", 0, "7", "Right"), ("10_right", 0, "007", ""), ("p1", 1, " ", "")],
               ("image", "level", "patient", "eye"))
  labelled = read(camera)
  found = by_id(labelled)
  assert (found["10_left"].patient, found["10_left"].eye) == ("7", "right")
  assert (found["10_right"].patient, found["10_right"].eye) == ("007", "right")
  assert found["p1"].patient == "p1" and any("1 rows have no patient" in n for n in labelled.notes)


@pytest.mark.parametrize(
  "level", ["mild", "7", "-1", "", " ", "1.5", "nan", "1_0", "٣", "2,0", "0x1"]
)
def test_levels_are_0_to_4_and_nothing_else(camera, level):
  camera.picture("a.jpg")
  camera.picture("b.jpg", seed=1)
  camera.sheet([("a.jpg", level), ("b.jpg", "3.0")])
  labelled = read(camera)
  assert {p.image_id: p.level for p in labelled.photographs} == {"b.jpg": 3}
  (name, reason), = labelled.rejected
  assert name == "a.jpg" and "0-4" in reason and "line 2" in reason
  assert repr(level.strip()) in reason or "empty level" in reason


def test_odd_eyes_splits_and_cells_cost_their_row_alone(camera):
  for seed, name in enumerate("abcd"):
    camera.picture(f"{name}.jpg", seed=seed)
  (camera.folder / "labels.csv").write_text(
    "image,level,eye,split\na,0,OD,train\nb,1,left,val\nc,2,left,train,extra\n"
    "d,3,Left,TRAIN\n\n,,,\n"
  )
  labelled = read(camera)
  assert list(by_id(labelled)) == ["d"] and by_id(labelled)["d"].split == "train"
  reasons = dict(labelled.rejected)
  assert "'OD'" in reasons["a"] and "'val'" in reasons["b"]
  assert "5 cells" in reasons["labels.csv line 4"]
  assert any("1 empty rows" in note for note in labelled.notes)


def test_the_same_picture_twice_is_taken_once_or_refused(camera):
  for seed, name in enumerate("abc"):
    camera.picture(f"{name}.jpg", seed=seed)
  (camera.folder / "link.jpg").symlink_to("c.jpg")
  camera.sheet([("a", 0), ("a.jpg", 0), ("b", 1), ("b", 3), ("c", 2), ("link", 2)])
  labelled = read(camera)
  assert list(by_id(labelled)) == ["a", "c"]
  assert any("2 rows repeat" in note for note in labelled.notes)
  (name, reason), = labelled.rejected
  assert name == "b" and "level 1" in reason and "level 3" in reason


def test_pictures_without_a_label_are_named(camera):
  camera.both(["a.jpg"])
  camera.picture("sub/other.png", seed=1)
  (camera.folder / "notes.txt").write_text("no picture")
  labelled = read(camera)
  assert labelled.rejected == [("sub/other.png", "has no label in labels.csv")]


ROWS = "image,level\na.jpg,2\nb.jpg,3\n"


@pytest.mark.parametrize("content, said", [
  (ROWS.encode("utf-8-sig"), ""), (ROWS.replace("\n", "\r\n").encode(), ""),
  (ROWS.replace("\n", "\r").encode(), ""), (ROWS.rstrip().encode(), ""),
  (ROWS.encode("utf-16"), "UTF-16"), (("\ufeff" + ROWS).encode("utf-16-be"), "UTF-16"),
  (ROWS.replace(",", ";").encode(), "semicolons"), (ROWS.replace(",", "\t").encode(), "tabs"),
  (("\n \n" + ROWS).encode(), ""), (ROWS.replace("image,level", " Image , LEVEL ").encode(), ""),
  (ROWS.replace("image,level", '"image","level"').encode(), ""),
  (b"level,image\n2,a.jpg\n3,b.jpg\n", ""), (ROWS.replace("\n", ",x\n").encode(), "not read: x"),
])  # fmt: skip
def test_encodings_line_ends_separators_and_headers(camera, content, said):
  camera.picture("a.jpg")
  camera.picture("b.jpg", seed=1)
  (camera.folder / "labels.csv").write_bytes(content)
  labelled = read(camera)
  assert {p.image_id: p.level for p in labelled.photographs} == {"a.jpg": 2, "b.jpg": 3}
  assert said in " ".join(labelled.notes) and bool(said) == bool(labelled.notes)


@pytest.mark.parametrize("content, named", [
  (None, "no labels.csv"), (b"", "empty"), (b"\n\n", "empty"), (b"image,level\n", "no rows"),
  (b"image,level\n,\n\n", "no rows"),
  (b"image,grade\na.jpg,1\n", "no column level.*'image, grade'"),
  (b"a.jpg,1\nb.jpg,2\n", "no column image and level"), (b"image level\na.jpg 1\n", "no column"),
  (b"image:level\na.jpg:1\n", "no column.*commas, semicolons, tabs"),
  (b"image,level,level\na.jpg,1,2\n", "more than one column level"),
  ("image,level\na.jpg,1\né.jpg,2\n".encode("latin-1"), "line 3 is not UTF-8 .byte 0xe9"),
  (b"PK\x03\x04" + bytes(100), "no text"), (b"\xff\xfei", "damaged UTF-16"),
  (b'image,level\na.jpg,1\n"b.jpg,2\nc.jpg,3\n', "line 3 cannot be read"),
  (b'image,level\n"' + b"x" * 200000 + b'",1\n', "line 2 cannot be read"),
])  # fmt: skip
def test_a_sheet_of_no_use_is_refused_as_a_whole(camera, content, named):
  camera.picture("a.jpg")
  if content is not None:
    (camera.folder / "labels.csv").write_bytes(content)
  with pytest.raises(UserError, match=named) as error:
    read(camera)
  assert "\n" not in str(error.value) and str(camera.folder) in str(error.value)


def test_a_sheet_that_is_no_file_is_refused_without_waiting(camera, tmp_path):
  sheet = camera.folder / "labels.csv"
  os.mkfifo(sheet)
  with pytest.raises(UserError, match="a pipe"):
    read(camera)
  sheet.unlink()
  (tmp_path / "secret").write_text(ROWS)
  sheet.symlink_to(tmp_path / "secret")
  with pytest.raises(UserError, match="link to outside"):
    read(camera)


def test_a_patient_in_two_splits_is_named(camera):
  names = ["7_left", "7_right", "8_left"]
  for seed, name in enumerate(names):
    camera.picture(f"{name}.jpg", seed=seed)
  columns = ("image", "level", "split")
  camera.sheet([("7_left", 0, "train"), ("7_right", 0, "test"), ("8_left", 1, "test")], columns)
  with pytest.raises(UserError, match="patient 7 is in two splits, test and train"):
    read(camera)
  camera.sheet([("7_left", 0, "test"), ("7_right", 0, ""), ("8_left", 1, "train")], columns)
  assert [p.split for p in read(camera).photographs] == ["test", "test", "train"]


def test_the_drawn_split_keeps_patients_together_and_its_shares(camera):
  from medattn_jax.data import sources

  def photographs(count):
    return [sources.Photograph(f"{n}_{eye}", camera.folder, 0, str(n), eye, "")
            for n in range(count) for eye in ("left", "right")]

  many = photographs(3000)
  sources.assign_splits(many, 0, "labels.csv")
  split = {p.patient: p.split for p in many}
  assert all(split[p.patient] == p.split for p in many)
  shares = [list(split.values()).count(s) / 3000 for s in ("train", "validation", "test")]
  assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
  # A patient's place depends on the seed and the patient alone.
  few = photographs(40)
  sources.assign_splits(few, 0, "labels.csv")
  assert all(split[p.patient] == p.split for p in few)
  sources.assign_splits(other := photographs(3000), 1, "labels.csv")
  assert any(split[p.patient] != p.split for p in other)
  for count, splits in ((1, {"train"}), (2, {"train", "test"}),
                        (3, {"train", "test", "validation"})):
    for seed in range(20):
      tiny = photographs(count)
      notes = sources.assign_splits(tiny, seed, "labels.csv")
      assert {p.split for p in tiny} == splits and "without a split" in notes[0]


def test_a_large_sheet_is_read_in_seconds(camera):
  import time

  camera.picture("a.jpg")
  camera.sheet([("a.jpg", 1)] + [(f"{n}_left", n % 5) for n in range(100_000)])
  start = time.perf_counter()
  labelled = read(camera)
  assert len(labelled.rejected) == 100_000 and len(labelled.photographs) == 1
  assert time.perf_counter() - start < 15
