"""IDRiD: grades and masks of differently numbered photographs joined, boxes on their lesions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import pipeline, preprocess, schema
from medattn_jax.data import prepare as module
from medattn_jax.data.sources import idrid
from medattn_jax.errors import UserError

MA, HE, EX, SE = range(4)
WIDTH, HEIGHT = 240, 160
GRADES = {"train": (3, 0, 2, 4), "test": (1, 2)}
SETS = {"train": "a. Training Set", "test": "b. Testing Set"}
KINDS = {"MA": "1. Microaneurysms", "HE": "2. Haemorrhages", "EX": "3. Hard Exudates",
         "SE": "4. Soft Exudates", "OD": "5. Optic Disc"}
# y0, x0, y1, x1 on the photographs' own pixels.
SPOTS = [(60, 100, 72, 118), (90, 130, 100, 150), (40, 110, 44, 114)]


def photograph(seed, make, spots=()):
  image = make.eye_picture(WIDTH, HEIGHT, seed)
  for y0, x0, y1, x1 in spots:
    image[y0:y1, x0:x1] = (0, 0, 255)
  return image


def mask(spots, width=WIDTH, height=HEIGHT) -> bytes:
  """As IDRiD's: a palette of black and red, packed by LZW."""
  lit = np.zeros((height, width), np.uint8)
  for y0, x0, y1, x1 in spots:
    lit[y0:y1, x0:x1] = 1
  image = Image.fromarray(lit, "P")
  image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
  file = io.BytesIO()
  image.save(file, "TIFF", compression="tiff_lzw")
  return file.getvalue()


def grading(folder, split):
  return folder / "B. Disease Grading" / "1. Original Images" / SETS[split]


def segmentation(folder, split, kind=None):
  place = folder / "A. Segmentation"
  if kind is None:
    return place / "1. Original Images" / SETS[split]
  return place / "2. All Segmentation Groundtruths" / SETS[split] / KINDS[kind]


@pytest.fixture
def raw(tmp_path, make):
  """Grades of six; of A's three the first is B's third, the second its test's first, saved anew;
  the third is none of B's."""
  folder = tmp_path / "IDRiD training and segmentation"  # a name that says nothing of its files
  for split, grades in GRADES.items():
    grading(folder, split).mkdir(parents=True)
    for number, _ in enumerate(grades, 1):
      lesions = SPOTS if (split, number) in (("train", 3), ("test", 1)) else ()
      image = photograph(10 * (split == "test") + number, make, lesions)
      path = grading(folder, split) / f"IDRiD_{number:03}.jpg"
      path.write_bytes(make.encoded(image, subsampling=0))
    sheets = folder / "B. Disease Grading" / "2. Groundtruths"
    sheets.mkdir(exist_ok=True)
    name = {"train": "a. IDRiD_Disease Grading_Training Labels.csv",
            "test": "b. IDRiD_Disease Grading_Testing Labels.csv"}[split]
    rows = [f"IDRiD_{number:03},{grade},1,,,,,,,,," for number, grade in enumerate(grades, 1)]
    text = "\r\n".join(["Image name,Retinopathy grade,Risk of macular edema ,,,,,,,,,", *rows,
                        ",,,,,,,,,,,", ""])
    (sheets / name).write_bytes(text.encode())
    segmentation(folder, split).mkdir(parents=True)
    for kind in KINDS:
      segmentation(folder, split, kind).mkdir(parents=True)
  bytes_of = lambda split, n: (grading(folder, split) / f"IDRiD_{n:03}.jpg").read_bytes()
  (segmentation(folder, "train") / "IDRiD_01.jpg").write_bytes(bytes_of("train", 3))
  again = Image.open(io.BytesIO(bytes_of("test", 1)))
  (segmentation(folder, "train") / "IDRiD_02.jpg").write_bytes(make.encoded(again, quality=70))
  other = make.encoded(photograph(77, make, SPOTS))
  (segmentation(folder, "test") / "IDRiD_55.jpg").write_bytes(other)
  put = lambda n, kind, spots: (
    segmentation(folder, "train", kind) / f"IDRiD_{n:02}_{kind}.tif").write_bytes(mask(spots))
  put(1, "MA", SPOTS[2:])
  put(1, "EX", SPOTS[:2])
  put(1, "OD", [(70, 50, 90, 70)])
  put(2, "SE", SPOTS)
  put(2, "HE", [])
  (segmentation(folder, "test", "MA") / "IDRiD_55_MA.tif").write_bytes(mask(SPOTS))
  return folder


def read(folder):
  return idrid.read(folder, seed=0)


def found_in(labelled):
  return {p.image_id: p for p in labelled.photographs}


def test_grades_splits_and_lesions(raw):
  labelled = read(raw)
  found = found_in(labelled)
  assert [(i, p.level, p.split) for i, p in found.items()] == [
    (f"{split}/IDRiD_{number:03}", grade, split)
    for split, grades in GRADES.items() for number, grade in enumerate(grades, 1)
  ]  # fmt: skip
  assert len({p.patient for p in found.values()}) == 6
  # A's first is B's third, and A's second, of its training set, one of B's test set.
  assert sorted(found["train/IDRiD_003"].boxes) == sorted(
    [(MA, *SPOTS[2]), (EX, *SPOTS[0]), (EX, *SPOTS[1])])
  assert sorted(found["test/IDRiD_001"].boxes) == sorted((SE, *spot) for spot in SPOTS)
  assert sum(bool(p.boxes) for p in found.values()) == 2
  (name, reason), = labelled.rejected
  assert name == "A. Segmentation/1. Original Images/b. Testing Set/IDRiD_55.jpg"
  assert "no grade: it is none of the graded" in reason
  notes = " ".join(labelled.notes)
  assert "of 3 photographs with masks 1 are graded ones byte by byte, 1 by what they show" in notes
  assert "2 photographs have lesions: 1 microaneurysm, 0 haemorrhage, 2 hard_exudate" in notes
  assert "1 masks of the optic disc" in notes
  assert "no validation split: 4 train, 2 test" in labelled.splits[0]


def test_regions_that_touch_at_a_corner_are_one_lesion(raw):
  path = segmentation(raw, "train", "MA") / "IDRiD_01_MA.tif"
  path.write_bytes(mask([(10, 10, 12, 12), (12, 12, 14, 15), (30, 30, 31, 31), (0, 0, 1, 1),
                         (HEIGHT - 1, WIDTH - 1, HEIGHT, WIDTH)]))
  boxes = found_in(read(raw))["train/IDRiD_003"].boxes
  assert sorted(box for kind, *box in boxes if kind == MA) == [
    [0, 0, 1, 1], [10, 10, 14, 15], [30, 30, 31, 31], [HEIGHT - 1, WIDTH - 1, HEIGHT, WIDTH]]


def test_what_shows_two_alike_or_none_is_not_guessed(raw, make):
  # Two graded ones that are nearly the same: which of them A's second is cannot be told.
  twin = Image.open(grading(raw, "test") / "IDRiD_001.jpg")
  (grading(raw, "test") / "IDRiD_002.jpg").write_bytes(make.encoded(twin, quality=80))
  labelled = read(raw)
  assert not found_in(labelled)["test/IDRiD_001"].boxes
  assert sum("no grade" in reason for _, reason in labelled.rejected) == 2


def test_bad_masks_rows_and_files_cost_themselves_alone(raw, make):
  put = lambda kind, content: (
    segmentation(raw, "train", kind) / f"IDRiD_01_{kind}.tif").write_bytes(content)
  put("MA", b"II*\0 no mask")
  put("HE", mask(SPOTS, 100, 80))
  put("SE", mask([(0, 0, HEIGHT, WIDTH - 5)]))
  (segmentation(raw, "train", "MA") / "IDRiD_54_MA.tif").write_bytes(mask(SPOTS))
  grading(raw, "train").joinpath("IDRiD_002.jpg").unlink()
  for path in (grading(raw, "train") / "IDRiD_413.jpg", raw / "extra.jpg"):
    path.write_bytes(make.encoded(make.eye_picture(90, 90)))
  (raw / "C. Localization").mkdir()
  (raw / "C. Localization" / "IDRiD_001.jpg").write_bytes(b"")
  sheet = raw / "B. Disease Grading/2. Groundtruths/b. IDRiD_Disease Grading_Testing Labels.csv"
  sheet.write_bytes(sheet.read_bytes().replace(b"IDRiD_002,2", b"IDRiD_002,7"))
  labelled = read(raw)
  found = found_in(labelled)
  assert set(found) == {"train/IDRiD_001", "train/IDRiD_003", "train/IDRiD_004", "test/IDRiD_001"}
  assert sorted(found["train/IDRiD_003"].boxes) == [(EX, *SPOTS[0]), (EX, *SPOTS[1])]
  reasons = {name.rpartition("/")[2]: reason for name, reason in labelled.rejected}
  for name, reason in (
    ("IDRiD_01_MA.tif", "its lesions are left out"),
    ("IDRiD_01_HE.tif", "has 100x80 pixels and its photograph 240x160"),
    ("IDRiD_01_SE.tif", "marks 98% of its photograph"),
    ("IDRiD_54_MA.tif", "of no photograph"), ("IDRiD_413.jpg", "has no grade"),
    ("extra.jpg", "not in one of IDRiD's folders"), ("IDRiD_55.jpg", "no grade"),
  ):  # fmt: skip
    assert reason in reasons[name]
  reasons = dict(labelled.rejected)
  assert reasons["train/IDRiD_002"].startswith("is missing (a. IDRiD_Disease Grading")
  assert "0-4 are accepted" in reasons["test/IDRiD_002"]
  assert any("1 files of C. Localization" in note for note in labelled.notes)


def test_the_grading_part_alone_will_do_and_the_masks_alone_will_not(raw):
  labelled = idrid.read(raw / "B. Disease Grading", seed=0)
  assert len(labelled.photographs) == 6 and not labelled.rejected
  assert any("there are no masks" in note for note in labelled.notes)
  with pytest.raises(UserError, match=r"has no grades .*accepted: .*B\. Disease Grading"):
    idrid.read(raw / "A. Segmentation", seed=0)


def test_boxes_lie_on_their_lesions_in_the_batch(raw, tmp_path, capsys, monkeypatch):
  data = tmp_path / "data"
  run = lambda size: module.prepare("idrid", raw, data, full_size=size, workers=1)
  summary = run(96)
  assert summary.levels == {"train": [1, 0, 1, 1, 1], "test": [0, 1, 1, 0, 0]}
  assert run(96) == summary and "nothing to do" in capsys.readouterr().err
  assert sorted(boxes_of(data, 96)) == [
    ("test/IDRiD_001", SE, 3), ("train/IDRiD_003", MA, 1), ("train/IDRiD_003", EX, 2)
  ]  # fmt: skip
  # Masks changed, photographs not: these are not decoded again, and their boxes are the new ones.
  path = segmentation(raw, "train", "SE") / "IDRiD_02_SE.tif"
  path.write_bytes(mask(SPOTS[:1]))
  (segmentation(raw, "train", "EX") / "IDRiD_01_EX.tif").unlink()
  monkeypatch.setattr(preprocess, "decode_photograph", None)
  run(96)
  assert "made anew" in capsys.readouterr().err
  assert sorted(boxes_of(data, 96)) == [("test/IDRiD_001", SE, 1), ("train/IDRiD_003", MA, 1)]


def boxes_of(data, size):
  """(image, type, how many boxes), each box found on a spot of the photograph in its batch."""
  dataset = pipeline.open_dataset("idrid", data, full_size=size)
  found = []
  for split in dataset.splits:
    for batch in pipeline.eval_batches(dataset, split, batch_size=2, full_size=size, pairs=False):
      for row in np.flatnonzero(batch["mask"][:, 0]):
        image = batch["image"][row, 0].astype(int)
        blue = image[..., 2] > image[..., 0] + 40
        kinds = batch["box_type"][row, 0]
        for box in batch["boxes"][row, 0][kinds >= 0]:
          y0, x0, y1, x1 = np.round(box).astype(int)
          assert blue[y0:y1, x0:x1].mean() > 0.6
          around = blue[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2].sum()
          assert around <= (y1 - y0 + 2) * (x1 - x0 + 2)  # and it is no bigger than the spot
        image_id = batch["image_id"][row, 0]
        found += [(image_id, kind, int((kinds == kind).sum())) for kind in set(kinds[kinds >= 0])]
  return found


def test_the_types_are_the_schemas():
  assert [schema.TYPES[number] for number in idrid.TYPES.values()] == [
    "microaneurysm", "haemorrhage", "hard_exudate", "cotton_wool_spot"]
