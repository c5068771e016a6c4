"""`prepare --source=ddr`: its authors' lists, and Kaggle's sheet."""

from __future__ import annotations

import os

import pytest

from medattn_jax.data import prepare as module
from medattn_jax.data.sources import ddr
from medattn_jax.errors import UserError

NAMES = {
  "train": [f"007-{number:04}-000.jpg" for number in (4, 7, 8, 9, 11, 13)],
  "valid": ["007-2489-100.jpg", "20170413101424496.jpg"],
  "test": ["20170323093305605.jpg", "007-7449-601.jpg", "007-7447-601.jpg"],
}
ALL = [name for names in NAMES.values() for name in names]


@pytest.fixture
def authors(camera):
  """DDR-dataset as it unpacks, with the parts for other tasks; the third grade of each is 5."""
  top = "DDR-dataset/DR_grading"
  for split, names in NAMES.items():
    for name in names:
      camera.picture(f"{top}/{split}/{name}", 64, 48, seed=ALL.index(name))
    grades = [5 if n == 2 else n % 5 for n in range(len(names))]
    lines = [f"{name} {grade}\n" for name, grade in zip(names, grades, strict=True)]
    (camera.folder / top / f"{split}.txt").write_text("".join(lines))
    camera.picture(f"DDR-dataset/lesion_segmentation/{split}/image/{names[0]}", 64, 48)
  (camera.folder / "DDR-dataset/lesion_detection").mkdir()
  (camera.folder / "DDR-dataset/lesion_detection/train.txt").write_text("other things\n")
  return camera


@pytest.fixture
def kaggle(camera):
  for name in ALL:
    camera.picture(f"DR_grading/DR_grading/{name}", 64, 48, seed=ALL.index(name))
  rows = [f"{name},{n % 5}" for n, name in enumerate(ALL[:-2])]  # as there: two have no row
  (camera.folder / "DR_grading.csv").write_text("\n".join(["id_code,diagnosis", *rows, ""]))
  return camera


def test_the_authors_lists_keep_their_splits_and_lose_what_cannot_be_graded(
  authors, data, capsys, read, rejected_of
):
  grading = authors.folder / "DDR-dataset/DR_grading"
  summary = module.prepare("ddr", authors.folder, data, full_size=48, workers=1)
  assert summary.levels == {"train": [2, 1, 0, 1, 1], "validation": [1, 1, 0, 0, 0],
                            "test": [1, 1, 0, 0, 0]}
  assert rejected_of(data) == {
    "007-0008-000.jpg": "is graded 5: not to be graded (train.txt line 3)",
    "007-7447-601.jpg": "is graded 5: not to be graded (test.txt line 3)",
  }
  said = capsys.readouterr().err
  assert "2 photographs are graded 5 (not to be graded) and are left out" in said
  assert "every photograph is taken as a patient of its own" in said
  assert read(data, "ddr", "validation")[2] == NAMES["valid"]
  module.prepare("ddr", grading, data, full_size=48, workers=1)  # the folder itself, the same set
  assert "nothing to do" in capsys.readouterr().err


def test_bad_lines_are_named_and_cost_no_good_one(authors):
  grading = authors.folder / "DDR-dataset/DR_grading"
  (grading / "train/007-0007-000.jpg").unlink()
  (grading / "train/007-0009-000.jpg").rename(grading / "train/007-0009-000.JPG")
  with open(grading / "train.txt", "ab") as file:
    file.write(b"\r\n \r\n007-0013-000.jpg 3\r\nlonely\r\n../test/007-7449-601.jpg 1\r\n"
               b"007-0011-000.jpg x\r\n")
  authors.picture("DDR-dataset/DR_grading/valid/stray.jpg", 64, 48)
  found = ddr.read(authors.folder, 0)
  assert [p.image_id for p in found.photographs if p.split == "train"] == [
    "007-0004-000.jpg", "007-0009-000.jpg", "007-0011-000.jpg"]
  reasons = dict(found.rejected)
  for name, reason in (("007-0007-000.jpg", "is missing (train.txt line 2)"),
                       ("007-0013-000.jpg", "line 6: level 0; train.txt line 9: level 3"),
                       ("train.txt line 10", "is 'lonely': NAME GRADE is accepted"),
                       ("../test/007-7449-601.jpg", "leads outside"),
                       ("007-0011-000.jpg", "has level 'x': 0-4"),
                       ("valid/stray.jpg", "has no label in valid.txt")):
    assert reason in reasons[name]


def test_a_list_that_is_not_there_is_a_split_less(authors):
  grading = authors.folder / "DDR-dataset/DR_grading"
  (grading / "valid.txt").unlink()
  found = ddr.read(authors.folder, 0)
  assert "there is no valid.txt: no validation split" in found.notes
  assert ("valid/007-2489-100.jpg", "has no label: there is no valid.txt") in found.rejected
  assert {p.split for p in found.photographs} == {"train", "test"}


def test_kaggles_sheet_is_split_by_photograph(kaggle):
  found = ddr.read(kaggle.folder, 0)
  assert [(p.image_id, p.level) for p in found.photographs] == [
    (name, n % 5) for n, name in enumerate(ALL[:-2])]
  assert all(p.drawn for p in found.photographs)
  assert {p.split for p in found.photographs} == {"train", "validation", "test"}
  assert dict(found.rejected) == {
    f"DR_grading/DR_grading/{name}": "has no label in DR_grading.csv" for name in ALL[-2:]}
  assert any("may be in several" in note for note in found.notes)


@pytest.mark.parametrize("name, content, named", [
  ("train.txt", b"\n \n", "train.txt is empty: one line an image, NAME GRADE"),
  ("test.txt", b"a\xe9.jpg 1\n", "test.txt line 1 is not UTF-8"),
  ("train.txt", b"PK\x03\x04\x00\x00", "is no text"),
  ("train.txt", None, "has neither DR_grading/train.txt nor DR_grading.csv; accepted: a folder"),
])  # fmt: skip
def test_lists_that_cannot_be_used_are_named(authors, data, name, content, named):
  sheet = authors.folder / "DDR-dataset/DR_grading" / name
  os.remove(sheet)
  if content is not None:
    sheet.write_bytes(content)
  with pytest.raises(UserError, match=named) as error:
    module.prepare("ddr", authors.folder, data, workers=1)
  assert "\n" not in str(error.value) and not data.exists()
