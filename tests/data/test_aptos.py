"""`prepare --source=aptos`: Kaggle's folder, and the one others made of it."""

from __future__ import annotations

import csv
import os

import pytest

from medattn_jax.data import prepare as module
from medattn_jax.data.sources import aptos
from medattn_jax.errors import UserError

CODES = [f"{number:012x}" for number in range(0x000C1434D8D7, 0x000C1434D8D7 + 12)]


def sheet(camera, name, rows, header=("id_code", "diagnosis"), empty=0):
  with open(camera.folder / name, "w", newline="") as file:
    csv.writer(file, lineterminator="\r\n").writerows([header, *rows, *[("", "")] * empty])


def pictures(camera, folder, codes):
  for code in codes:
    camera.picture(f"{folder}/{code}.png", 64, 48, seed=CODES.index(code), kind="PNG")


@pytest.fixture
def kaggle(camera):
  """Kaggle's own: train.csv with labels, test.csv without."""
  pictures(camera, "train_images", CODES[:10])
  pictures(camera, "test_images", CODES[10:])
  sheet(camera, "train.csv", [(code, n % 5) for n, code in enumerate(CODES[:10])])
  sheet(camera, "test.csv", [(code,) for code in CODES[10:]], ("id_code",))
  sheet(camera, "sample_submission.csv", [(code, 0) for code in CODES[10:]])
  return camera


@pytest.fixture
def split_again(camera):
  """As split up again: folders within folders, and a test.csv that ends in empty rows."""
  for name, folder, codes in (("train_1", "train", CODES[:6]), ("valid", "val", CODES[6:8]),
                              ("test", "test", CODES[8:])):
    pictures(camera, f"{folder}_images/{folder}_images", codes)
    sheet(camera, f"{name}.csv", [(code, CODES.index(code) % 5) for code in codes],
          empty=30 * (name == "test"))
  return camera


def test_kaggles_folder_is_split_by_photograph(kaggle):
  found = aptos.read(kaggle.folder, 0)
  assert [p.image_id for p in found.photographs] == CODES[:10]
  assert [p.level for p in found.photographs] == [n % 5 for n in range(10)]
  assert all(p.patient == p.image_id and p.eye == "" and p.drawn for p in found.photographs)
  assert {p.split for p in found.photographs} == {"train", "validation", "test"}
  assert [p.split for p in aptos.read(kaggle.folder, 0).photographs] == [
    p.split for p in found.photographs]
  assert any(p.split != q.split for p, q in zip(
    found.photographs, aptos.read(kaggle.folder, 1).photographs, strict=True))
  assert found.rejected == [
    (f"test_images/{code}.png", "has no label: test.csv has no column diagnosis")
    for code in CODES[10:]]
  said = " ".join(found.notes + found.splits)
  assert "every photograph is taken as a patient of its own" in said
  assert "test.csv has no labels" in said and "10 patients without a split" in said


def test_what_is_split_up_again_keeps_its_splits(split_again):
  found = aptos.read(split_again.folder, 0)
  assert [p.split for p in found.photographs] == ["train"] * 6 + ["validation"] * 2 + ["test"] * 4
  assert [p.level for p in found.photographs] == [n % 5 for n in range(12)]
  assert not found.rejected and not any(p.drawn for p in found.photographs)
  assert "30 empty rows of test.csv are left out" in found.notes
  os.remove(split_again.folder / "valid.csv")
  found = aptos.read(split_again.folder, 0)
  assert {p.split for p in found.photographs} == {"train", "test"}
  assert "there is no valid.csv: no validation split" in found.notes
  assert dict(found.rejected) == {f"val_images/val_images/{code}.png": "has no label: there is no "
                                  "valid.csv" for code in CODES[6:8]}


def test_a_set_is_made_and_made_once(split_again, data, capsys, read, rejected_of):
  folder = split_again.folder
  (folder / f"train_images/train_images/{CODES[0]}.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
  os.remove(folder / f"train_images/train_images/{CODES[1]}.png")
  with open(folder / "train_1.csv", "a") as file:
    file.write(f"{CODES[2]},2\n{CODES[3]},4\n../../secret,1\n{CODES[11]},9\nabc,1,2\n")
  summary = module.prepare("aptos", folder.parent, data, full_size=48, workers=1)  # one above
  assert summary.levels == {"train": [1, 0, 1, 0, 1], "validation": [0, 1, 1, 0, 0],
                            "test": [1, 1, 0, 1, 1]}
  assert summary.patients == {"train": 3, "validation": 2, "test": 4}
  rejected = rejected_of(data)
  for name, reason in ((CODES[0], "is no picture"), (CODES[1], "is missing (train_1.csv line 3)"),
                       (CODES[3], "differently (train_1.csv line 5: level 3; train_1.csv line 9: "
                        "level 4)"), ("../../secret", "leads outside"),
                       (CODES[11], "is missing (train_1.csv line 11)"),
                       ("train_1.csv line 12", "has 3 cells where the header has 2")):
    assert reason in rejected.pop(name)
  assert not rejected and "1 rows repeat an image" in capsys.readouterr().err
  assert read(data, "aptos", "train")[2] == [CODES[2], CODES[4], CODES[5]]
  module.prepare("aptos", folder.parent, data, full_size=48, workers=1)
  assert "nothing to do" in capsys.readouterr().err and len(rejected_of(data)) == 6


def test_one_name_for_two_pictures_is_no_name(split_again):
  folder = split_again.folder
  split_again.picture(f"val_images/{CODES[0]}.png", 64, 48, seed=70, kind="PNG")
  with open(folder / "valid.csv", "a") as file:
    file.write(f"{CODES[0]},3\n")
  found = aptos.read(folder, 0)
  both = {p.image_id: p for p in found.photographs if CODES[0] in p.image_id}
  assert {name: p.split for name, p in both.items()} == {
    f"train_images/train_images/{CODES[0]}.png": "train",
    f"val_images/{CODES[0]}.png": "validation",
  }
  assert len({p.patient for p in found.photographs}) == len(found.photographs) == 13


@pytest.mark.parametrize("name, content, named", [
  ("train.csv", "id_code,level\na,1\n", "no column diagnosis; accepted: a folder with train.csv"),
  ("train.csv", "image,diagnosis\na,1\n", "no column id_code"),
  ("train.csv", "id_code,diagnosis\n,\n", "a header but no rows"),
  ("train.csv", "", "is empty"),
  ("test.csv", "x\n1\n", "test.csv has no column id_code"),
  ("train.csv", None, "has no train.csv; accepted: "),
])  # fmt: skip
def test_lists_that_cannot_be_used_are_named(kaggle, data, name, content, named):
  os.remove(kaggle.folder / name)
  if content is not None:
    (kaggle.folder / name).write_text(content)
  with pytest.raises(UserError, match=named) as error:
    module.prepare("aptos", kaggle.folder, data, workers=1)
  assert str(kaggle.folder) in str(error.value) and "\n" not in str(error.value)
  assert not data.exists()


def test_of_two_such_folders_neither_is_taken(kaggle, split_again):
  os.mkdir(kaggle.folder / "deeper")
  for name in ("a", "b"):
    os.mkdir(kaggle.folder / "deeper" / name)
    (kaggle.folder / "deeper" / name / "train.csv").write_text("")
  with pytest.raises(UserError, match=r"holds 2 such folders, .*/a, .*/b; accepted"):
    aptos.read(kaggle.folder / "deeper", 0)
  assert "train.csv is not read: train_1.csv is" in aptos.read(kaggle.folder, 0).notes
