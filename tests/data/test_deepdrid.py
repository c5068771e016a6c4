"""`prepare --source=deepdrid`: two views an eye, backslashes, a spreadsheet, and names that err."""

from __future__ import annotations

import csv
import io
import os
import zipfile

import numpy as np
import pytest

from medattn_jax import metrics
from medattn_jax.data import pipeline
from medattn_jax.data import prepare as module
from medattn_jax.data.sources import deepdrid, xlsx
from medattn_jax.errors import UserError

TOP = "regular_fundus_images"
TRAINING, VALIDATION, CHALLENGE = (
  "regular-fundus-training", "regular-fundus-validation", "Online-Challenge1&2-Evaluation")
HEADER = ("patient_id", "image_id", "image_path", "Overall quality", "left_eye_DR_Level",
          "right_eye_DR_Level", "patient_DR_Level", "Clarity", "Field definition", "Artifact")
# Patient 56 and 164 as they are in the training sheet: a file's name may say the other eye.
PATIENTS = {
  "1": {"1_l1": ("left", 0), "1_l2": ("left", 0), "1_r1": ("right", 2), "1_r2": ("right", 2)},
  "56": {"56_l1": ("left", 1), "56_r3": ("left", 1), "56_l3": ("right", 0), "56_r2": ("right", 0)},
  "164": {"164_r3": ("left", 3), "164_r4": ("left", 3), "164_r1": ("right", 4),
          "164_l3": ("right", 4)},
}
SHEET_XML = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{}
</sheetData></worksheet>"""
STRINGS_XML = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">{}</sst>"""


def workbook(rows, sheet=SHEET_XML, strings=STRINGS_XML) -> bytes:
  """An .xlsx as Excel saves it: texts shared, numbers in place, empty cells not there at all."""
  shared: list[str] = []
  xml = ""
  for number, row in enumerate(rows, start=1):
    xml += f'<row r="{number}">'
    for letter, value in zip("ABCDEF", row, strict=False):
      if isinstance(value, str) and value:
        xml += f'<c r="{letter}{number}" t="s"><v>{len(shared)}</v></c>'
        shared.append(value)
      elif value != "":
        xml += f'<c r="{letter}{number}"><v>{value}</v></c>'
    xml += "</row>"
  items = "".join(f"<si><t>{text}</t></si>" for text in shared)
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("[Content_Types].xml", "<Types/>")
    archive.writestr("xl/worksheets/sheet2.xml", SHEET_XML.format("<row/>"))
    archive.writestr("xl/worksheets/sheet1.xml", sheet.format(xml))
    archive.writestr("xl/sharedStrings.xml", strings.format(items))
  return file.getvalue()


def part(camera, name, patients):
  """One of the labelled parts: Images/PATIENT/NAME.jpg and a sheet with other paths than those."""
  rows = []
  for patient, photographs in patients.items():
    worst = max(level for _, level in photographs.values())
    for image, (eye, level) in photographs.items():
      seed = int(patient) * 10 + len(rows)
      camera.picture(f"{TOP}/{name}/Images/{patient}/{image}.jpg", 64, 48, seed=seed)
      levels = (level, "") if eye == "left" else ("", level)
      rows.append((patient, image, f"\\{name}\\{patient}\\{image}.jpg", 1, *levels, worst, 8, 8, 0))
  with open(camera.folder / TOP / name / f"{name}.csv", "w", newline="") as file:
    csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])


def views(patient: int, left: int, right: int) -> dict[str, tuple[str, int]]:
  return {f"{patient}_{eye[0]}{view}": (eye, level)
          for eye, level in (("left", left), ("right", right)) for view in (1, 2)}


@pytest.fixture
def repository(camera):
  part(camera, TRAINING, PATIENTS)
  part(camera, VALIDATION, {"265": views(265, 3, 4)})
  names = [*views(347, 1, 2), *views(353, 0, 0)]
  for seed, name in enumerate(names):
    camera.picture(f"{TOP}/{CHALLENGE}/Images/{name[:3]}/{name}.jpg", 64, 48, seed=500 + seed)
  levels = [1, 1, 2, 2, 0, 0, 0, 0]
  folder = camera.folder / TOP / CHALLENGE
  (folder / "Challenge1_labels.xlsx").write_bytes(
    workbook([("image_id", "DR_Levels "), *zip(names, levels, strict=True)]))
  (folder / "Challenge1_upload.csv").write_text("image_id,DR_Level\n347_l1,\n")
  (folder / "Readme.docx").write_bytes(b"PK")
  camera.picture("ultra-widefield_images/ultra-widefield-training/Images/1/1_l2.jpg", 64, 48)
  return camera


def test_a_level_is_of_the_eye_of_its_column(repository):
  found = deepdrid.read(repository.folder, 0)
  train = {p.image_id: (p.patient, p.eye, p.level) for p in found.photographs if p.split == "train"}
  assert train == {image: (patient, *label) for patient, photographs in PATIENTS.items()
                   for image, label in photographs.items()}
  test = {p.image_id: (p.patient, p.eye, p.level) for p in found.photographs if p.split == "test"}
  assert test["347_r2"] == ("347", "right", 2) and len(test) == 8
  assert not found.rejected
  assert "5 names say another eye than the column of their level, which counts" in found.notes
  assert any("ultra-widefield_images are photographs of another kind" in n for n in found.notes)


def test_a_patient_of_four_photographs_is_two_examples_and_counts_once(
  repository, data, capsys, rejected_of
):
  summary = module.prepare("deepdrid", repository.folder, data, full_size=48, workers=1)
  assert summary.patients == {"train": 3, "validation": 1, "test": 2}
  assert summary.levels == {"train": [4, 2, 2, 2, 2], "validation": [0, 0, 0, 2, 2],
                            "test": [4, 2, 2, 0, 0]}
  assert rejected_of(data) == {}
  dataset = pipeline.open_dataset("deepdrid", data, full_size=48)
  batch = next(pipeline.eval_batches(dataset, "train", batch_size=6, full_size=48))
  assert batch["patient"].tolist() == ["1", "1", "56", "56", "164", "164"]
  assert batch["image_id"].tolist() == [
    ["1_l1", "1_r1"], ["1_l2", "1_r2"], ["56_l1", "56_l3"], ["56_r3", "56_r2"],
    ["164_r3", "164_r1"], ["164_r4", "164_l3"]]
  assert (batch["eye"] == ["left", "right"]).all() and batch["mask"].all()
  assert batch["level"].tolist() == [[0, 2], [0, 2], [1, 0], [1, 0], [3, 4], [3, 4]]
  # As evaluate's table has it: every photograph once, and the interval drawn by patients.
  patient, level = np.repeat(batch["patient"], 2), batch["level"].ravel()
  assert len(set(batch["image_id"].ravel())) == 12
  found = metrics.grading_metrics(level, patient, np.eye(5)[level], None, bootstrap=20)
  assert (found["images"], found["patients"]) == (12, 3)
  alone = list(pipeline.eval_batches(dataset, "train", batch_size=5, full_size=48, pairs=False))
  names = [name for one in alone for name in one["image_id"].ravel() if name]
  assert len(names) == len(set(names)) == 12
  module.prepare("deepdrid", repository.folder / TOP, data, full_size=48, workers=1)
  assert "nothing to do" in capsys.readouterr().err


def test_what_is_bad_is_named_and_costs_no_good_one(repository):
  top = repository.folder / TOP
  sheet = top / TRAINING / f"{TRAINING}.csv"
  rows = list(csv.reader(io.StringIO(sheet.read_text())))
  rows[1][4] = "5"  # 1_l1
  rows[2][4] = ""  # 1_l2, of neither eye
  rows[3][4] = "1"  # 1_r1, of both eyes: the name tells
  rows[4][5] = "2.0"
  rows += [["2", "2_l1", "", 1, "0", "", 0], ["", "", "", 1, "0", "", 0],
           ["3", "scan", "", 1, "0", "1", 1], ["", "other", "", 1, "0", "", 0]]
  for name in ("scan", "other", "stray"):
    repository.picture(f"{TOP}/{TRAINING}/Images/3/{name}.jpg", 64, 48)
  with open(sheet, "w", newline="") as file:
    csv.writer(file).writerows(rows)
  found = deepdrid.read(repository.folder, 0)
  kept = {p.image_id: (p.eye, p.level) for p in found.photographs if p.patient == "1"}
  assert kept == {"1_r1": ("right", 2), "1_r2": ("right", 2)}
  reasons = dict(found.rejected)
  for name, reason in (("1_l1", "is graded 5: not to be graded"), ("1_l2", "has an empty level"),
                       ("2_l1", f"is missing ({TRAINING}.csv line 14)"),
                       (f"{TRAINING}.csv line 15", "names no image"),
                       ("scan", "has a level of both eyes and a name that says neither"),
                       ("other", "has no patient"),
                       (f"{TRAINING}/Images/3/stray.jpg", f"has no label in {TRAINING}.csv")):
    assert reason in reasons.pop(name)
  assert not reasons


def test_the_challenge_may_be_a_csv_or_without_labels(repository):
  folder = repository.folder / TOP / CHALLENGE
  os.remove(folder / "Challenge1_labels.xlsx")
  found = deepdrid.read(repository.folder, 0)
  assert {p.split for p in found.photographs} == {"train", "validation"}
  assert len([name for name, why in found.rejected if "there is no Challenge1_labels" in why]) == 8
  assert any("no test split" in note for note in found.notes)
  (folder / "Challenge1_labels.csv").write_text("image_id,DR_Levels\n347_l1,2\n347_r1,1\n")
  found = deepdrid.read(repository.folder, 0)
  assert [(p.image_id, p.level) for p in found.photographs if p.split == "test"] == [
    ("347_l1", 2), ("347_r1", 1)]


def test_a_patient_in_two_splits_is_named(repository):
  part(repository, VALIDATION, {"56": views(56, 3, 4)})
  with pytest.raises(UserError, match="patient 56 is in two splits, train and validation"):
    deepdrid.read(repository.folder, 0)


BOMB = ('<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><worksheet><sheetData>{}<row r="9"><c><v>&a;</v>'
        "</c></row></sheetData></worksheet>")


@pytest.mark.parametrize("content, named", [
  (b"", r"is empty \(0 bytes\)"), (b"image_id,DR_Levels\n", "is no .xlsx file, or damaged"),
  (workbook([("image_id", "grade"), ("347_l1", 1)]), "has no column DR_Levels: its header is"),
  (workbook([("name", "DR_Levels"), ("347_l1", 1)]), "has no column image_id"),
  (workbook([]), "has no column image_id"),
  (workbook([("image_id", "DR_Levels")]), "has a header but no rows"),
  (workbook([("image_id", "DR_Levels")], sheet=BOMB), "damaged .its XML has a DOCTYPE"),
  (workbook([("image_id",)], sheet="<worksheet>{}"), "damaged .no element found"),
  (workbook([("image_id",)], strings="<sst/>{0:.0}"), "damaged .A1 is string '0' of 0"),
  (workbook([("image_id",)])[:-40], "damaged .File is not a zip"),
])  # fmt: skip
def test_spreadsheets_that_cannot_be_used_are_named(repository, data, content, named):
  (repository.folder / TOP / CHALLENGE / "Challenge1_labels.xlsx").write_bytes(content)
  with pytest.raises(UserError, match=named) as error:
    module.prepare("deepdrid", repository.folder, data, workers=1)
  assert "Challenge1_labels.xlsx" in str(error.value) and "\n" not in str(error.value)
  assert not data.exists()


def test_cells_are_read_where_they_say_they_are(tmp_path):
  rows = ('<row r="2"><c r="C2" t="inlineStr"><is><t>in</t></is></c><c><v>1.0</v></c></row>'
          '<row r="4"><c r="A4" t="s"><v>0</v></c><c r="B4" t="str"><f>x</f><v>sum</v></c></row>')
  strings = STRINGS_XML.format("<si><r><t>a</t></r><r><t xml:space='preserve'> b</t></r>"
                               "<rPh><t>spoken</t></rPh></si>")
  content = workbook([], sheet=SHEET_XML.format(rows), strings=strings)
  assert xlsx.rows(content, tmp_path, "") == [(2, ["", "", "in", "1.0"]), (4, ["a b", "sum"])]


def test_a_part_that_grows_without_end_takes_no_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(xlsx, "LIMIT", 1000)
  with pytest.raises(UserError, match=r"sheet1\.xml has more than 1000 bytes"):
    xlsx.rows(workbook([(1,) * 6] * 100), tmp_path, "")
