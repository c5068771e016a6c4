"""Kaggle's EyePACS folders: both halves or one, whatever is missing told with what to do."""

from __future__ import annotations

import shutil

import pytest

from medattn_jax.data import pipeline, schema
from medattn_jax.data import prepare as module
from medattn_jax.data.sources import eyepacs
from medattn_jax.errors import UserError

TRAIN = {"10_left": 0, "10_right": 1, "13_left": 4, "13_right": 2, "15_left": 3}
TEST = {"1_left": (0, "Private"), "1_right": (2, "Private"), "2_left": (0, "Public"),
        "2_right": (4, "Public"), "3_left": (1, "Private")}


@pytest.fixture
def raw(camera):
  """The raw folder, as Kaggle's parts unpack beside one another."""
  for seed, image in enumerate(TRAIN):
    camera.picture(f"train/{image}.jpeg", seed=seed)
  for seed, image in enumerate(TEST, 50):
    camera.picture(f"test/{image}.jpeg", seed=seed)
  write(camera.folder / "trainLabels.csv", "image,level", TRAIN.items())
  write(camera.folder / "retinopathy_solution.csv", "image,level,Usage",
        [(image, *row) for image, row in TEST.items()])
  return camera.folder


def write(path, header, rows):
  path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def read(folder):
  return eyepacs.read(folder, seed=0)


def splits_of(labelled):
  return {p.image_id: p.split for p in labelled.photographs}


def test_both_halves(raw, camera):
  for image in ("10_left", "10_right"):
    (raw / "sample").mkdir(exist_ok=True)
    shutil.copy(raw / "train" / f"{image}.jpeg", raw / "sample")
  write(raw / "sampleSubmission.csv", "image,level", [("1_left", 0)])
  camera.picture("train/99_left.jpeg", seed=9)
  (raw / "test" / "3_left.jpeg").unlink()
  labelled = read(raw)
  assert splits_of(labelled) == {
    **dict.fromkeys(TRAIN, "train"), "1_left": "test", "1_right": "test", "2_left": "validation",
    "2_right": "validation",
  }  # fmt: skip
  found = {p.image_id: p for p in labelled.photographs}
  assert [found[i].level for i in TRAIN] == list(TRAIN.values()) and found["2_right"].level == 4
  assert (found["13_right"].patient, found["13_right"].eye) == ("13", "right")
  assert found["10_left"].path == (raw / "train" / "10_left.jpeg").resolve()
  rejected = dict(labelled.rejected)
  assert rejected.pop("3_left") == "is missing (retinopathy_solution.csv line 6)"
  assert rejected.pop("train/99_left.jpeg") == "has no label in trainLabels.csv" and not rejected
  assert any("sample/" in note for note in labelled.notes)
  assert "5 train, 2 validation, 2 test" in labelled.splits[0]


def test_one_half_is_enough(raw):
  (raw / "retinopathy_solution.csv").unlink()
  labelled = read(raw)
  assert set(splits_of(labelled).values()) == {"train"} and len(labelled.photographs) == 5
  assert len(labelled.rejected) == 5
  assert dict(labelled.rejected)["test/1_left.jpeg"] == (
    "has no label: retinopathy_solution.csv is not there")
  assert any("test/ is there without retinopathy_solution.csv" in note for note in labelled.notes)


def test_the_solution_is_known_by_its_columns_as_tfds_names_it(raw):
  shutil.rmtree(raw / "train")
  (raw / "trainLabels.csv").unlink()
  name = "kaggl-forum-messa-attac_90528_2877_retin_soluJd0-Q1.csv"
  (raw / "retinopathy_solution.csv").rename(raw / name)
  write(raw / "sampleSubmission.csv", "image,level", [("1_left", 0)])
  labelled = read(raw)
  assert set(splits_of(labelled).values()) == {"validation", "test"} and not labelled.rejected


def test_archives_that_are_not_unpacked_are_told_with_what_to_do(raw):
  shutil.rmtree(raw / "train")
  for number in range(1, 6):
    (raw / f"train.zip.00{number}").write_bytes(b"PK")
  labelled = read(raw)
  assert any("train.zip.001 … train.zip.005" in note and "`7z x train.zip.001`" in note
             for note in labelled.notes)
  assert any("trainLabels.csv is there without train/" in note for note in labelled.notes)
  shutil.rmtree(raw / "test")
  (raw / "test.zip").write_bytes(b"PK")
  (raw / "trainLabels.csv").rename(raw / "trainLabels.csv.zip")
  with pytest.raises(UserError, match=r"trainLabels\.csv\.zip`.*unzip test\.zip`.*accepted") as e:
    read(raw)
  assert "\n" not in str(e.value)
  shutil.rmtree(raw)
  raw.mkdir()
  with pytest.raises(UserError, match=r"no photographs with their labels; accepted: .*trainLabels"):
    read(raw)
  (raw / "diabetic-retinopathy-detection.zip").write_bytes(b"PK")
  with pytest.raises(UserError, match=r"labels; diabetic-retinopathy-detection\.zip is not unp"):
    read(raw)


def test_rows_of_no_use_cost_themselves_alone(raw):
  with open(raw / "trainLabels.csv", "a") as sheet:
    sheet.write("10_left,0\n13_left,1\n../10_left,0\n,\n16_left,5\n,2\n")
  with open(raw / "retinopathy_solution.csv", "a") as sheet:
    sheet.write("4_left,1,Hidden\n")
  labelled = read(raw)
  rejected = dict(labelled.rejected)
  assert "more than once and differently (trainLabels.csv line 4: level 4; trainLabels.csv" in (
    rejected.pop("13_left"))
  assert "outside" in rejected.pop("../10_left") and "0-4" in rejected.pop("16_left")
  assert "names no image" in rejected.pop("trainLabels.csv line 12")
  assert "Public or Private" in rejected.pop("4_left") and not rejected
  assert len(labelled.photographs) == 9
  assert any("1 rows repeat" in note for note in labelled.notes)


def test_a_patient_in_two_splits_is_in_none(raw):
  sheet = raw / "retinopathy_solution.csv"
  sheet.write_text(sheet.read_text().replace("1_right,2,Private", "1_right,2,Public"))
  labelled = read(raw)
  assert not {"1_left", "1_right"} & splits_of(labelled).keys() and len(labelled.photographs) == 8
  assert dict(labelled.rejected)["1_left"] == "has a patient, 1, in two splits, test and validation"


def test_a_link_to_elsewhere_is_not_followed(raw, tmp_path):
  (raw / "test").rename(tmp_path / "elsewhere")
  (raw / "test").symlink_to(tmp_path / "elsewhere")
  labelled = read(raw)
  assert set(splits_of(labelled).values()) == {"train"} and not labelled.rejected
  assert any("test is a link to outside" in note for note in labelled.notes)


def test_the_set_has_both_eyes_together_and_is_made_once(raw, tmp_path, capsys):
  (raw / "train" / "13_left.jpeg").write_bytes(b"")
  run = lambda: module.prepare("eyepacs", raw, tmp_path / "data", full_size=48, workers=1)
  summary = run()
  assert summary.patients == {"train": 3, "validation": 1, "test": 2} and summary.rejected == 1
  assert summary.levels["train"] == [1, 1, 1, 1, 0]
  dataset = pipeline.open_dataset("eyepacs", tmp_path / "data", full_size=48)
  patients = {}
  for split in schema.SPLITS:
    for batch in pipeline.eval_batches(dataset, split, batch_size=2, full_size=48):
      for patient, images, mask in zip(batch["patient"], batch["image_id"], batch["mask"],
                                       strict=True):
        if patient:
          assert patient not in patients
          patients[patient] = [image for image, m in zip(images, mask, strict=True) if m]
  assert patients["10"] == ["10_left", "10_right"] and patients["13"] == ["13_right"]
  out = capsys.readouterr().out
  assert "splits are Kaggle's" in out and "validation          1        2        1" in out
  assert (tmp_path / "data" / "rejected.csv").read_text() == (
    "file,reason\n13_left,is empty (0 bytes)\n")
  assert run() == summary and "nothing to do" in capsys.readouterr().err
