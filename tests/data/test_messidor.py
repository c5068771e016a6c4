"""Messidor: its twelve archives with their spreadsheets, errata applied, nothing unpacked."""

from __future__ import annotations

import struct
import sys
import zipfile

import pytest

from medattn_jax.data import prepare as module
from medattn_jax.data.sources import messidor
from medattn_jax.errors import UserError

HEADER = ("Image name", "Ophthalmologic department", "Retinopathy grade", "Risk of macular edema ")
ROWS = {
  "Base11": [("20051020_43808_0100_PP.tif", 0), ("20051020_63045_0100_PP.tif", 3),
             ("20051020_64007_0100_PP.tif", 1), ("20051020_63936_0100_PP.tif", 3)],
  "Base13": [("20060523_48477_0100_PP.tif", 2), ("20060523_43174_0100_PP.tif", 1)],
  "Base33": [("20051202_55582_0400_PP.tif", 1), ("20051202_54744_0400_PP.tif", 1),
             ("20051202_55626_0400_PP.tif", 2), ("20051205_33025_0400_PP.tif", 3),
             ("20051202_40508_0400_PP.tif", 0), ("20051202_37259_0400_PP.tif", 2)],
}  # fmt: skip


def record(kind, content):
  return struct.pack("<HH", kind, len(content)) + content


def workbook(rows) -> bytes:
  """A spreadsheet of Excel 97 with one table, of texts and numbers: BIFF 8 within OLE 2."""
  text = lambda value, form: struct.pack(form, len(value)) + b"\0" + value.encode("latin-1")
  bof = lambda kind: record(0x809, struct.pack("<HHHHII", 0x600, kind, 0, 0, 0, 0))
  cells = b""
  for y, row in enumerate(rows):
    for x, cell in enumerate(row):
      place = struct.pack("<HHH", y, x, 0)
      if isinstance(cell, str):
        cells += record(0x204, place + text(cell, "<H"))
      else:
        cells += record(0x203, place + struct.pack("<d", cell))
  sheet = lambda place: record(0x85, struct.pack("<IBB", place, 0, 0) + text("Feuil1", "<B"))
  start = len(bof(5) + sheet(0) + record(10, b""))
  stream = bof(5) + sheet(start) + record(10, b"") + bof(16) + cells + record(10, b"")
  count = max(8, -(-len(stream) // 512))  # from 4,096 bytes on a stream has sectors of its own
  stream = stream.ljust(count * 512, b"\0")
  chain = [0xFFFFFFFD, 0xFFFFFFFE, *range(3, 2 + count), 0xFFFFFFFE]
  table = struct.pack("<128I", *chain, *[0xFFFFFFFF] * (128 - len(chain)))

  def folder(name, kind, child, first, size):
    label = name.encode("utf-16-le") + b"\0\0"
    links = struct.pack("<HBBIII", len(label), kind, 1, 0xFFFFFFFF, 0xFFFFFFFF, child)
    return label.ljust(64, b"\0") + links + bytes(36) + struct.pack("<III", first, size, 0)

  folders = folder("Root Entry", 5, 1, 0xFFFFFFFE, 0)
  folders += folder("Workbook", 2, 0xFFFFFFFF, 2, len(stream))
  header = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16)
  header += struct.pack("<HHHHH6xIIIIIIIII", 0x3E, 3, 0xFFFE, 9, 6, 0, 1, 1, 0, 4096,
                        0xFFFFFFFE, 0, 0xFFFFFFFE, 0)
  header += struct.pack("<109I", 0, *[0xFFFFFFFF] * 108)
  return header + table + folders.ljust(512, b"\0") + stream


def as_csv(rows) -> bytes:
  return "".join(";".join(map(str, row)) + "\r\n" for row in rows).encode()


def table(base):
  return [HEADER, *((name, "Service Ophtalmologie", grade, 0) for name, grade in ROWS[base])]


@pytest.fixture(scope="module")
def tiffs(make):
  names = [name for rows in ROWS.values() for name, _ in rows]
  return {name: make.encoded(make.eye_picture(96, 72, seed), "TIFF")
          for seed, name in enumerate(names)}


@pytest.fixture
def raw(tmp_path, tiffs):
  """The folder of a user who has three of the archives, and saved the sheets as CSV."""
  folder = tmp_path / "raw"
  folder.mkdir()
  for base, rows in ROWS.items():
    with zipfile.ZipFile(folder / f"{base}.zip", "w") as archive:
      for name, _ in rows:
        archive.writestr(name, tiffs[name])
    (folder / f"Annotation_{base}.csv").write_bytes(as_csv(table(base)))
  return folder


def read(folder):
  return messidor.read(folder, seed=0)


def levels_of(labelled):
  return {p.image_id: p.level for p in labelled.photographs}


LEVELS = {
  "Base11/20051020_43808_0100_PP.tif": 0, "Base11/20051020_63045_0100_PP.tif": 0,
  "Base11/20051020_64007_0100_PP.tif": 3, "Base11/20051020_63936_0100_PP.tif": 1,
  "Base13/20060523_48477_0100_PP.tif": 3, "Base13/20060523_43174_0100_PP.tif": 1,
  "Base33/20051202_55582_0400_PP.tif": 1, "Base33/20051202_40508_0400_PP.tif": 0,
  "Base33/20051202_37259_0400_PP.tif": 2,
}  # fmt: skip


def test_errata_are_applied(raw):
  labelled = read(raw)
  assert levels_of(labelled) == LEVELS
  reasons = dict(labelled.rejected)
  # One is left out of a pair of copies, both of a pair with two grades; a half of a pair is kept.
  assert reasons.pop("Base33/20051202_54744_0400_PP.tif") == (
    "is a copy of Base33/20051202_55582_0400_PP.tif (Messidor's errata)")
  assert "has grade 2 where that has 3" in reasons.pop("Base33/20051202_55626_0400_PP.tif")
  assert "has grade 3 where that has 2" in reasons.pop("Base33/20051205_33025_0400_PP.tif")
  assert not reasons
  notes = " ".join(labelled.notes)
  assert "4 grades are corrected" in notes and "3 photographs of Base33 are copies" in notes
  assert "no photograph of Base12, Base14" in notes and "patient of its own" in notes
  assert all((p.patient, p.split, p.eye) == (p.image_id, "test", "") for p in labelled.photographs)
  assert len({name for pair in messidor.COPIES for name in pair}) == 26  # no photograph twice


def test_spreadsheets_are_read_where_messidor_put_them(raw, tiffs):
  pytest.importorskip("xlrd")
  for base in ROWS:
    (raw / f"Annotation_{base}.csv").unlink()
  # Beside the archive, within it, and beside unpacked photographs; an older one too.
  (raw / "Annotation_Base11.xls").write_bytes(workbook(table("Base11")))
  rows = [(name, "", float(LEVELS.get(f"Base11/{name}", 0)), 0) for name, _ in ROWS["Base11"]]
  (raw / "Annotation_Base11_update20161024.xls").write_bytes(workbook([HEADER, *rows]))
  with zipfile.ZipFile(raw / "Base13.zip", "a") as archive:
    archive.writestr("Annotation_Base13.xls", workbook(table("Base13")))
  (raw / "Base33").mkdir()
  for name, _ in ROWS["Base33"]:
    (raw / "Base33" / name).write_bytes(tiffs[name])
  (raw / "Base33" / "Annotation_Base33.xls").write_bytes(workbook(table("Base33")))
  labelled = read(raw)
  assert levels_of(labelled) == LEVELS
  where = {p.image_id[:6]: (p.path.name, p.entry) for p in labelled.photographs}
  assert where["Base11"] == ("Base11.zip", "20051020_63936_0100_PP.tif")
  assert where["Base33"] == ("20051202_37259_0400_PP.tif", "")
  assert any("Base33.zip is not read: its photographs are there unpacked" in note
             for note in labelled.notes)
  # A damaged one costs its own part alone.
  (raw / "Annotation_Base11.xls").write_bytes(workbook(table("Base11"))[:700])
  (raw / "Annotation_Base11_update20161024.xls").write_bytes(b"PK no spreadsheet")
  labelled = read(raw)
  assert {image[:6] for image in levels_of(labelled)} == {"Base13", "Base33"}
  reasons = dict(labelled.rejected)
  assert "no .xls file, or damaged" in reasons["Annotation_Base11.xls"]
  assert "no .xls file, or damaged" in reasons["Annotation_Base11_update20161024.xls"]
  assert "has no row" in reasons["Base11/20051020_43808_0100_PP.tif"]
  (raw / "Base33" / "Annotation_Base33.xls").write_bytes(workbook([("Name", "Grade")]))
  assert "no columns" in dict(read(raw).rejected)["Base33/Annotation_Base33.xls"]


def test_without_xlrd_the_spreadsheets_are_named(raw, monkeypatch):
  monkeypatch.setitem(sys.modules, "xlrd", None)
  (raw / "Annotation_Base11.xls").write_bytes(workbook(table("Base11")))
  labelled = read(raw)  # all are there as CSV
  assert levels_of(labelled) == LEVELS
  assert any("1 sheets are read as .csv" in note for note in labelled.notes)
  (raw / "Annotation_Base11.csv").unlink()
  with pytest.raises(UserError, match=r"xlrd.*is not installed: `pip install .*\.csv"):
    read(raw)


def test_entries_that_lead_outside_and_bad_rows_cost_themselves_alone(raw, tiffs, tmp_path):
  with zipfile.ZipFile(raw / "Base13.zip", "a") as archive:
    archive.writestr("../20060523_43174_0100_PP.tif", b"outside")
    archive.writestr("20060523_00001_0100_PP.tif", tiffs["20060523_43174_0100_PP.tif"])
  (raw / "Base12.zip").write_bytes(b"no archive")
  with open(raw / "Annotation_Base13.csv", "a") as sheet:
    sheet.write("20060523_00002_0100_PP.tif;;1;0\n../20051020_43808_0100_PP.tif;;1;0\n"
                "20060523_48477_0100_PP.tif;;4;0\n20051020_43808_0100_PP.tif;;1;0\n;;;\n")
  before = sorted(tmp_path.rglob("*"))
  labelled = read(raw)
  assert levels_of(labelled) == LEVELS and sorted(tmp_path.rglob("*")) == before
  reasons = dict(labelled.rejected)
  for name, reason in (
    ("Base12.zip", "no zip archive"), ("Base13/../20060523_43174_0100_PP.tif", "leads outside"),
    ("Base13/20060523_00001_0100_PP.tif", "has no row"),
    ("20060523_00002_0100_PP.tif", "is missing"), ("../20051020_43808_0100_PP.tif", "a path"),
    ("20060523_48477_0100_PP.tif", "level '4': 0-3 are accepted"),
    ("20051020_43808_0100_PP.tif", "is missing (Annotation_Base13.csv line 7)"),
  ):  # fmt: skip
    assert reason in reasons[name]


def test_no_sheet_is_an_error(tmp_path):
  (tmp_path / "Base11").mkdir()
  with pytest.raises(UserError, match=r"no Annotation_BaseNN\.xls or \.csv; accepted: .*Base11"):
    read(tmp_path)


def test_photographs_are_prepared_out_of_their_archives(raw, tmp_path, capsys, monkeypatch):
  with zipfile.ZipFile(raw / "Base13.zip", "w") as archive:  # one that cannot be decoded
    archive.writestr(ROWS["Base13"][0][0], b"II*\0 no picture")
    archive.writestr(ROWS["Base13"][1][0], b"")
  run = lambda: module.prepare("messidor", raw, tmp_path / "data", full_size=48, workers=1)
  summary = run()
  assert summary.levels == {"test": [3, 2, 1, 1, 0]} and summary.patients == {"test": 7}
  rejected = (tmp_path / "data" / "rejected.csv").read_text()
  assert summary.rejected == 5 and "20060523_43174_0100_PP.tif,is empty (0 bytes)" in rejected
  assert sorted(path.name for path in raw.iterdir()) == sorted(
    [f"{base}.zip" for base in ROWS] + [f"Annotation_{base}.csv" for base in ROWS])
  assert run() == summary and "nothing to do" in capsys.readouterr().err
