"""Messidor-2: Google's grades, ADCIS's photographs and pairs, names that differ by their case."""

from __future__ import annotations

import pytest

from medattn_jax.data import prepare as module
from medattn_jax.data.sources import messidor2
from medattn_jax.errors import UserError

# As in the sheet, the file, the grade, whether gradable.
ROWS = [
  ("20051020_43808_0100_PP.png", "20051020_43808_0100_PP.png", "0", "1"),
  ("20051020_43832_0100_PP.png", "20051020_43832_0100_PP.tif", "2", "1"),  # saved otherwise
  ("IM000023.jpg", "IM000023.JPG", "1", "1"),
  ("IM000024.jpg", "IM000024.JPG", "4", "1"),
  ("IM002385.jpg", "IM002385.JPG", "", "0"),
  ("IM002386.jpg", "IM002386.JPG", "3", "1"),
]
PAIRS = "left;right\n" + "".join(f"{ROWS[n][1]};{ROWS[n + 1][1]}\n" for n in (0, 2, 4))


@pytest.fixture
def raw(camera, make):
  (camera.folder / "IMAGES").mkdir()
  for seed, (_, name, *_) in enumerate(ROWS):
    kind = {"png": "PNG", "tif": "TIFF", "JPG": "JPEG"}[name[-3:]]
    picture = make.encoded(make.eye_picture(120, 90, seed), kind)
    (camera.folder / "IMAGES" / name).write_bytes(picture)
  write_grades(camera.folder, [(name, grade, "0", gradable) for name, _, grade, gradable in ROWS])
  (camera.folder / "messidor-2.csv").write_text(PAIRS)
  (camera.folder / "messidor_readme.txt").write_text("about")
  return camera.folder


def write_grades(folder, rows):
  header = "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"
  text = "\n".join([header, *(",".join(row) for row in rows)])
  (folder / "messidor_data.csv").write_text(text + "\n")


def read(folder):
  return messidor2.read(folder, seed=0)


def test_pairs_are_patients_and_cases_are_forgiven(raw):
  labelled = read(raw)
  found = {p.image_id: p for p in labelled.photographs}
  assert [(i, p.level, p.patient, p.eye, p.split) for i, p in found.items()] == [
    ("20051020_43808_0100_PP.png", 0, "20051020_43808_0100_PP", "left", "test"),
    ("20051020_43832_0100_PP.png", 2, "20051020_43808_0100_PP", "right", "test"),
    ("IM000023.jpg", 1, "IM000023", "left", "test"),
    ("IM000024.jpg", 4, "IM000023", "right", "test"),
    ("IM002386.jpg", 3, "IM002385", "right", "test"),
  ]
  assert found["IM000023.jpg"].path.name == "IM000023.JPG"
  assert labelled.rejected == [
    ("IM002385.jpg", "is not gradable (adjudicated_gradable 0) (messidor_data.csv line 6)")
  ]
  assert "all 5 photographs are the test split" in labelled.splits[0]


def test_without_pairs_each_is_a_patient_and_that_is_said(raw):
  (raw / "messidor-2.csv").unlink()
  labelled = read(raw)
  assert len({p.patient for p in labelled.photographs}) == 5
  assert {p.eye for p in labelled.photographs} == {""}
  assert any("messidor-2.csv is not there" in note for note in labelled.notes)


def test_what_is_of_no_use_is_named(raw, camera):
  camera.picture("IMAGES/IM009999.JPG", seed=9)
  camera.picture("IMAGES/IM000030.JPG", seed=10)
  (raw / "IMAGES" / "IM000024.JPG").unlink()
  with open(raw / "messidor-2.csv", "a") as pairs:
    pairs.write("IM000023.JPG;20051020_43832_0100_PP.png\n")
  rows = [(name, grade, "0", gradable) for name, _, grade, gradable in ROWS]
  rows[5] = ("IM002386.jpg", "", "", "1")
  write_grades(raw, [*rows, ("IM000030.jpg", "1.0", "", "1.0"), ("../x.jpg", "1", "", "1")])
  labelled = read(raw)
  assert {p.image_id: (p.level, p.patient) for p in labelled.photographs} == {
    "20051020_43808_0100_PP.png": (0, "20051020_43808_0100_PP"), "IM000030.jpg": (1, "IM000030")
  }  # fmt: skip
  reasons = dict(labelled.rejected)
  for name, reason in (
    ("20051020_43832_0100_PP.png", "in more than one pair of messidor-2.csv (lines 2, 5)"),
    ("IM000023.jpg", "lines 3, 5"), ("IM000024.jpg", "is missing"), ("IM002385.jpg", "gradable"),
    ("IM002386.jpg", "has an empty level"), ("../x.jpg", "outside"),
    ("IMAGES/IM009999.JPG", "has no row in messidor_data.csv"),
  ):  # fmt: skip
    assert reason in reasons.pop(name)
  assert not reasons
  assert any("1 photographs are in no pair" in note for note in labelled.notes)


def test_a_missing_sheet_or_archive_is_told(raw):
  (raw / "messidor_data.csv").unlink()
  with pytest.raises(UserError, match=r"no messidor_data\.csv; accepted: .*IMAGES/"):
    read(raw)
  for picture in (raw / "IMAGES").iterdir():
    picture.unlink()
  (raw / "IMAGES.zip.001").write_bytes(b"PK")
  with pytest.raises(UserError, match=r"`7z x IMAGES\.zip\.001`"):
    read(raw)


def test_the_set_is_made_once(raw, tmp_path, capsys):
  run = lambda: module.prepare("messidor2", raw, tmp_path / "data", full_size=48, workers=1)
  summary = run()
  assert summary.patients == {"test": 3} and summary.levels == {"test": [1, 1, 1, 1, 1]}
  assert summary.rejected == 1
  assert run() == summary and "nothing to do" in capsys.readouterr().err
