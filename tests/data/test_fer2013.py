"""`prepare --source=fer2013`: every pixel as it was, every bad row named."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc

import numpy as np
import pytest

from medattn_jax.data import pipeline
from medattn_jax.data import prepare as module
from medattn_jax.data.sources import fer2013
from medattn_jax.errors import UserError

USAGES = ("Training", "Training", "PublicTest", "PrivateTest")


def faces(count: int = 12) -> np.ndarray:
  return np.random.default_rng(2).integers(0, 256, (count, 48, 48), np.uint8)


def row(number: int, face: np.ndarray) -> list[str]:
  return [str(number % 7), " ".join(map(str, face.ravel())), USAGES[number % 4]]


def write_sheet(folder, rows, header=("emotion", "pixels", "Usage"), end="\n", start=b"") -> None:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator=end)
  writer.writerows([header, *rows])
  (folder / "fer2013.csv").write_bytes(start + text.getvalue().encode())


def test_a_sheet_of_pixels_becomes_a_set(folder, data, capsys, read, rejected_of):
  images = faces()
  write_sheet(folder, [row(n, face) for n, face in enumerate(images)])
  summary = module.prepare("fer2013", folder, data)
  assert summary.patients == {"train": 6, "validation": 3, "test": 3}
  dataset = pipeline.open_dataset("fer2013", data, full_size=48)
  assert (dataset.channels, dataset.num_classes, dataset.full_size) == (1, 7, 48)
  for split, usage in (("train", "Training"), ("validation", "PublicTest"),
                       ("test", "PrivateTest")):
    numbers = [n for n in range(12) if USAGES[n % 4] == usage]
    found, levels, names = read(data, "fer2013", split)
    np.testing.assert_array_equal(found[..., 0], images[numbers])
    assert levels.tolist() == [n % 7 for n in numbers]
    assert names == [f"{split}_{n:05}" for n in numbers]
  assert "level 5  level 6" in capsys.readouterr().out and rejected_of(data) == {}
  module.prepare("fer2013", folder / "fer2013.csv", data)
  assert "nothing to do" in capsys.readouterr().err


def test_a_sheet_as_others_write_it(folder, data, read):
  """Another order of columns, blanks, quotes, CRLF, a byte order mark, an empty line."""
  images = faces(4)
  rows = [[f" {usage}", f' "{level}"', pixels]
          for level, pixels, usage in (row(n, face) for n, face in enumerate(images))]
  lines = ['Usage, emotion, "pixels"', "", *(",".join(cells) for cells in rows), ""]
  (folder / "FER2013.CSV").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
  summary = module.prepare("fer2013", folder, data)
  assert summary.patients == {"train": 2, "validation": 1, "test": 1} and summary.rejected == 0
  np.testing.assert_array_equal(read(data, "fer2013", "train")[0][..., 0], images[:2])


def test_bad_rows_are_named_and_cost_no_good_one(folder, data, read, rejected_of):
  good = [row(n, face) for n, face in enumerate(faces(4))]
  pixels = good[0][1]
  bad = {
    "has 2303 pixels": ["0", pixels.rsplit(" ", 1)[0], "Training"],
    "has 2305 pixels": ["0", pixels + " 0", "Training"],
    "has a pixel '256'": ["0", "256 " + pixels.split(" ", 1)[1], "Training"],
    "has a pixel '-1'": ["0", "-1 " + pixels.split(" ", 1)[1], "Training"],
    "has a pixel '1_0'": ["0", "1_0 " + pixels.split(" ", 1)[1], "Training"],
    "has a pixel '99999999999999999999'": ["0", "9" * 5000 + " " + pixels.split(" ", 1)[1],
                                           "Training"],
    "has a pixel 'nan'": ["0", "nan " + pixels.split(" ", 1)[1], "Training"],
    "has 0 pixels": ["0", "", "Training"],
    "has emotion '7'": ["7", pixels, "Training"],
    "has emotion 'happy'": ["happy", pixels, "Training"],
    "has emotion ''": ["", pixels, "Training"],
    "has Usage 'Validation'": ["0", pixels, "Validation"],
    "has 2 cells": ["0", pixels],
    "has 4 cells": ["0", pixels, "Training", "x"],
    "has more than 65536 characters": ["0", "1 " * 5_000_000, "Training"],
  }
  write_sheet(folder, [*good[:2], *bad.values(), *good[2:]])
  summary = module.prepare("fer2013", folder, data)
  rejected = rejected_of(data)
  assert summary.rejected == len(rejected) == len(bad)
  for line, reason in enumerate(bad, start=4):
    assert reason in rejected[f"fer2013.csv line {line}"]
  assert summary.patients == {"train": 2, "validation": 1, "test": 1}
  np.testing.assert_array_equal(read(data, "fer2013", "train")[0][..., 0], faces(4)[:2])


def test_a_row_without_end_takes_no_memory(folder):
  with open(folder / "fer2013.csv", "wb") as file:
    file.write(b"emotion,pixels,Usage\n0,")
    for _ in range(64):
      file.write(b"1 " * 2**19)  # 64 MB
  tracemalloc.start()
  found = fer2013.read(folder, 0)
  assert tracemalloc.get_traced_memory()[1] < 4e6
  tracemalloc.stop()
  assert found.counts == {} and "more than" in found.rejected[0][1]


@pytest.mark.parametrize("text, named", [
  ("", "is empty"), ("\n\n", "is empty"), ("emotion,pixels,Usage\n", "a header but no rows"),
  ("emotion,pixels\n0,1 2 3\n", "no column usage.*begins 'emotion,pixels'.*accepted: a fer2013"),
  ("emotion;pixels;Usage\n0;1;Training\n", "no column emotion.*separated by commas"),
  ("0,1 2 3,Training\n", "no column emotion and pixels and usage"),
  ("emotion,pixels,Usage," + "x" * 70000 + "\n", "no column"),
  ("emotion,emotion,pixels,Usage\n", "no column emotion"),
  ("\x00\x01", "no column"),
])  # fmt: skip
def test_sheets_that_cannot_be_used_are_named(folder, data, text, named):
  (folder / "fer2013.csv").write_text(text)
  with pytest.raises(UserError, match=named) as error:
    module.prepare("fer2013", folder, data)
  assert "fer2013.csv" in str(error.value) and "\n" not in str(error.value)
  assert not data.exists()


def test_a_sheet_with_nothing_usable_makes_no_set(folder, data, rejected_of, no_set):
  write_sheet(folder, [["9", "1 2", "Training"], ["0", "1 2", "Training"]])
  with pytest.raises(UserError, match=r"no photograph is usable: 2 are rejected.*line 2, because"):
    module.prepare("fer2013", folder, data)
  assert no_set(data, "fer2013") and len(rejected_of(data)) == 2


def test_the_index_holds_one_character_a_photograph(folder, data):
  write_sheet(folder, [row(n, face) for n, face in enumerate(faces(8))])
  module.prepare("fer2013", folder, data)
  content = json.loads((data / "fer2013/1.0.0/index.json").read_text())["content"]
  assert content["levels"] == {"train": "0- 1- 4- 5-", "validation": "2- 6-", "test": "3- 0-"}
