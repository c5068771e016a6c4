"""`medattn prepare`: a set whole or not there, every picture in it or in rejected.csv."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import photographs, pipeline, preprocess, schema
from medattn_jax.data import prepare as module
from medattn_jax.errors import UserError

SIZE = 64


def prepare(camera, data_dir, **options):
  return module.prepare("csv", camera.folder, data_dir, full_size=SIZE, workers=1, **options)


def rows_of(data_dir: pathlib.Path) -> dict[str, tuple]:
  """{image_id: (split, patient, eye, level, image)} of the set in `data_dir`."""
  dataset = pipeline.open_dataset("csv", data_dir, full_size=SIZE)
  rows = {}
  for split in dataset.splits:
    for b in pipeline.eval_batches(dataset, split, batch_size=3, full_size=SIZE):
      for i, e in np.argwhere(b["mask"] > 0):
        values = (b["eye"][i, e], int(b["level"][i, e]), b["image"][i, e])
        rows[b["image_id"][i, e]] = (split, b["patient"][i], *values)
  return rows


def same_rows(a: dict, b: dict) -> None:
  assert list(a) == list(b)
  for name in a:
    assert a[name][:4] == b[name][:4]
    np.testing.assert_array_equal(a[name][4], b[name][4])


def rejected_of(data_dir: pathlib.Path) -> dict[str, str]:
  with open(data_dir / "rejected.csv", newline="", encoding="utf-8") as file:
    lines = list(csv.reader(file))
  assert lines[0] == ["file", "reason"]
  return dict(lines[1:])


def test_a_camera_folder_becomes_a_set(camera, tmp_path, capsys):
  names = ["1_left.jpg", "1_right.jpg", "2_left.jpg", "é b.jpg", "眼,底.jpg", 'q"q.JPG']
  sizes = [(200, 150), (150, 200), (96, 96), (120, 90), (180, 160), (80, 80)]
  for seed, (name, (width, height)) in enumerate(zip(names, sizes, strict=True)):
    exif = Image.Exif()
    exif[0x0112] = 6 if seed == 0 else 1
    camera.picture(name, width, height, seed, exif=exif)
  camera.sheet([(n, i % 5, "test" if "_" in n else "train") for i, n in enumerate(names)],
               ("image", "level", "split"))
  data = tmp_path / "data"
  summary = prepare(camera, data)
  rows = rows_of(data)
  assert list(sorted(rows)) == sorted(names) and rejected_of(data) == {}
  for number, name in enumerate(names):
    split, patient, eye, level, image = rows[name]
    assert (split, level) == ("test" if "_" in name else "train", number % 5)
    assert (patient, eye) == ((name[0], name[2:-4]) if "_" in name else (name[:-4], ""))
    # The one function that `predict` uses too, and one JPEG between.
    own = preprocess.prepare_photograph(
      preprocess.load_photograph(camera.folder / name), SIZE
    ).astype(int)
    assert np.abs(image - own).mean() < 3
  out = capsys.readouterr()
  assert "test                2        3        1        1        1" in out.out
  assert "rejected.csv" in out.out and "smaller than" not in out.err
  assert summary.patients == {"train": 3, "test": 2} and summary.rejected == 0
  assert sorted(os.listdir(data)) == [".csv.lock", "csv", "rejected.csv"]
  dataset = pipeline.open_dataset("csv", data, full_size=SIZE)
  np.testing.assert_array_equal(dataset.levels("test"), [[0, 1], [2, -1]])


def test_bad_pictures_are_named_and_cost_no_good_one(camera, tmp_path):
  camera.both([f"{n}.jpg" for n in range(9)])
  (camera.folder / "1.jpg").write_bytes((camera.folder / "1.jpg").read_bytes()[:900])
  (camera.folder / "2.jpg").write_bytes(b"")
  (camera.folder / "3.jpg").write_text("<html></html>")
  (camera.folder / "4.jpg").unlink()
  os.mkfifo(camera.folder / "4.jpg")
  (camera.folder / "5.jpg").unlink()
  Image.new("RGB", (100, 100)).save(camera.folder / "6.jpg")
  (camera.folder / "extra.jpg").write_bytes((camera.folder / "0.jpg").read_bytes())
  summary = prepare(camera, tmp_path / "data")
  rejected = rejected_of(tmp_path / "data")
  assert sorted(rows_of(tmp_path / "data")) == ["0.jpg", "7.jpg", "8.jpg"]
  for name, reason in (("1", "truncated"), ("2", "empty"), ("3", "web page"), ("4", "a pipe"),
                       ("5", "missing"), ("6", "wholly black"), ("extra", "no label")):
    assert reason in rejected.pop(f"{name}.jpg")
  assert not rejected and summary.rejected == 7


def test_pages_that_are_left_out_are_told(camera, tmp_path, capsys):
  camera.both(["a.jpg", "b.tif"])
  more = Image.open(camera.folder / "a.jpg")
  camera.picture("b.tif", kind="TIFF", seed=1, save_all=True, append_images=[more])
  prepare(camera, tmp_path / "data")
  assert "1 photographs have several pages or frames, of which the first" in capsys.readouterr().err


def test_what_a_strangers_links_lead_to_is_not_written_to(camera, tmp_path):
  camera.both(["a.jpg"])
  (tmp_path / "data").mkdir()
  (tmp_path / "theirs").mkdir()
  (tmp_path / "data" / ".prepare-csv").symlink_to(tmp_path / "theirs")
  with pytest.raises(UserError, match=r"\.prepare-csv is a link; accepted"):
    prepare(camera, tmp_path / "data")
  assert not list((tmp_path / "theirs").iterdir())
  (tmp_path / "data" / ".csv.lock").unlink()
  (tmp_path / "mine.txt").write_text("mine")
  (tmp_path / "data" / ".csv.lock").symlink_to(tmp_path / "mine.txt")
  with pytest.raises(UserError, match=r"\.csv\.lock: Too many levels of symbolic links"):
    prepare(camera, tmp_path / "data")
  assert (tmp_path / "mine.txt").read_text() == "mine"


def test_nothing_usable_is_an_error_and_leaves_no_set(camera, tmp_path):
  camera.both(["a.jpg", "b.jpg"])
  for name in "ab":
    (camera.folder / f"{name}.jpg").write_bytes(b"no picture")
  with pytest.raises(UserError, match=r"no photograph is usable.*2 are rejected.*rejected\.csv"):
    prepare(camera, tmp_path / "data")
  assert not (tmp_path / "data" / "csv").exists()
  assert set(rejected_of(tmp_path / "data")) == {"a.jpg", "b.jpg"}


def test_pairs_are_left_then_right_and_never_the_same_eye(camera, tmp_path):
  rows = [("a", "p", "right"), ("b", "p", "left"), ("c", "q", "left"), ("d", "q", "left"),
          ("e", "r", ""), ("f", "r", ""), ("g", "s", "right"), ("h", "s", "left"),
          ("i", "s", "left"), ("j", "s", "")]
  for seed, (name, _, _) in enumerate(rows):
    camera.picture(f"{name}.jpg", seed=seed)
  camera.sheet([(name, 0, patient, eye, "train") for name, patient, eye in rows],
               ("image", "level", "patient", "eye", "split"))
  prepare(camera, tmp_path / "data")
  dataset = pipeline.open_dataset("csv", tmp_path / "data", full_size=SIZE)
  batch = next(pipeline.eval_batches(dataset, "train", batch_size=8, full_size=SIZE))
  pairs = ["".join(ids) for ids in batch["image_id"] if any(ids)]
  assert sorted(pairs) == ["ba", "c", "d", "ef", "hg", "i", "j"]


def test_what_the_machine_failed_at_is_looked_at_again(camera, tmp_path, capsys, monkeypatch):
  """A disk or memory may be well again; a picture that is damaged stays so."""
  camera.both([f"{n}_left.jpg" for n in range(3)])
  (camera.folder / "0_left.jpg").write_bytes(b"no picture")
  data, read = tmp_path / "data", preprocess.read_bytes

  def fails(path):
    if "1_left" in str(path):
      raise preprocess.BadImage("cannot be read: Input/output error")
    return read(path)

  with monkeypatch.context() as patched:
    patched.setattr(preprocess, "read_bytes", fails)
    for _ in range(2):  # as long as it lasts nothing is made anew
      prepare(camera, data)
      assert set(rejected_of(data)) == {"0_left.jpg", "1_left.jpg"}
  assert "nothing to do" in capsys.readouterr().err
  prepare(camera, data)
  assert "can be by now" in capsys.readouterr().err
  assert set(rejected_of(data)) == {"0_left.jpg"}
  assert set(rows_of(data)) == {"1_left.jpg", "2_left.jpg"}
  prepare(camera, data)
  assert "nothing to do" in capsys.readouterr().err


def test_a_second_run_does_nothing_and_a_changed_input_is_prepared_anew(
  camera, tmp_path, capsys, monkeypatch
):
  camera.both([f"{n}_left.jpg" for n in range(4)])
  camera.picture("other.jpg")
  data = tmp_path / "data"
  prepare(camera, data)
  index = data / "csv" / "1.0.0" / "index.json"
  written, before = index.stat().st_mtime_ns, rows_of(data)
  (data / "rejected.csv").unlink()
  capsys.readouterr()
  summary = prepare(camera, data)
  out = capsys.readouterr()
  assert "nothing to do" in out.err and index.stat().st_mtime_ns == written
  assert summary.rejected == 1 and "other.jpg" in rejected_of(data)

  # Other labels and one picture more: the pictures done are not done again.
  decoded = []
  decode = preprocess.decode_photograph
  monkeypatch.setattr(preprocess, "decode_photograph", lambda c: decoded.append(c) or decode(c))
  camera.picture("4_left.jpg", seed=4)
  camera.sheet([(f"{n}_left.jpg", 4) for n in range(5)])
  prepare(camera, data)
  after = rows_of(data)
  assert len(decoded) == 1 and "made anew" in capsys.readouterr().err
  assert {row[3] for row in after.values()} == {4} and len(after) == 5
  for name in before:
    np.testing.assert_array_equal(before[name][4], after[name][4])

  # A picture changed under its name is done again; another size too.
  camera.picture("0_left.jpg", seed=99)
  prepare(camera, data)
  assert len(decoded) == 2
  assert (rows_of(data)["0_left.jpg"][4] != after["0_left.jpg"][4]).any()
  module.prepare("csv", camera.folder, data, full_size=48, workers=1)
  assert len(decoded) == 7
  assert pipeline.open_dataset("csv", data, full_size=48).full_size == 48


def test_a_damaged_set_is_prepared_anew(camera, tmp_path, capsys):
  camera.both(["a.jpg", "b.jpg"])
  data = tmp_path / "data"
  prepare(camera, data)
  before = rows_of(data)
  next((data / "csv" / "1.0.0").glob("*array_record*")).unlink()
  prepare(camera, data)
  assert "is missing" in capsys.readouterr().err
  assert rows_of(data).keys() == before.keys()


def test_what_is_not_ours_is_left_alone(camera, tmp_path):
  camera.both(["a.jpg"])
  data = tmp_path / "data"
  (data / "csv" / "1.0.0").mkdir(parents=True)
  (data / "csv" / "1.0.0" / "thesis.txt").write_text("years of work")
  (data / "other.txt").write_text("more")
  with pytest.raises(UserError, match="no data set of ours"):
    prepare(camera, data)
  assert (data / "csv" / "1.0.0" / "thesis.txt").read_text() == "years of work"
  shutil.rmtree(data / "csv")
  prepare(camera, data)
  assert (data / "other.txt").read_text() == "more"


def test_the_set_may_lie_within_the_input(camera):
  camera.both(["a.jpg", "b.jpg"])
  for data in (camera.folder, camera.folder / "data"):
    prepare(camera, data)
    prepare(camera, data)
    assert rejected_of(data) == {} and len(rows_of(data)) == 2


@pytest.mark.parametrize("options, named", [
  ({"source": "cvs"}, "'cvs' is unknown.*csv"), ({"input_dir": "/none"}, "--input=/none"),
  ({"full_size": 0}, "--full-size=0"), ({"workers": 0}, "--workers=0"),
])  # fmt: skip
def test_mistaken_arguments_are_named(camera, tmp_path, options, named):
  camera.both(["a.jpg"])
  given = {"source": "csv", "input_dir": camera.folder, "data_dir": tmp_path / "d", **options}
  with pytest.raises(UserError, match=named):
    module.prepare(**given)
  assert not (tmp_path / "d").exists()
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"--data-dir=.*file is no folder"):
    prepare(camera, tmp_path / "file")


def command(camera, data, workers):
  return [sys.executable, "-m", "medattn_jax", "prepare", "--source=csv",
          f"--input={camera.folder}", f"--data-dir={data}", f"--full-size={SIZE}",
          f"--workers={workers}"]


def test_a_full_disk_is_said_and_the_next_run_goes_on(camera, tmp_path, monkeypatch):
  from medattn_jax.data.datasets import prepared

  camera.both(["a.jpg", "b.jpg"])
  data = tmp_path / "data"
  full = "Failed to finalize writing: write() failed: No space left on device; writing x"

  def fail(builder):
    raise RuntimeError(full)  # as array_record does

  with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left") as error:
    patch.setattr(prepared.Prepared, "download_and_prepare", fail)
    prepare(camera, data)
  assert str(data) in str(error.value)
  assert sorted(os.listdir(data)) == [".csv.lock", ".prepare-csv"]  # no set, and no half of one
  monkeypatch.setattr(preprocess, "decode_photograph", None)  # nothing is decoded again
  prepare(camera, data)
  assert len(rows_of(data)) == 2


def test_a_killed_run_goes_on_and_its_workers_end(camera, tmp_path, monkeypatch):
  first = camera.picture("0.jpg", 1600, 1200)
  for number in range(1, 40):
    shutil.copy(first, camera.folder / f"{number}.jpg")
  camera.sheet([(f"{n}.jpg", 0) for n in range(40)])
  data = tmp_path / "data"
  store = data / ".prepare-csv"
  run = subprocess.Popen(command(camera, data, 2), stderr=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while len(list(store.glob("*.jpg"))) < 5:
    assert run.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
  run.send_signal(signal.SIGKILL)
  run.wait()
  done = {path.name: path.stat().st_mtime_ns for path in store.glob("*.jpg")}
  assert not (data / "csv").exists() and not (data / "rejected.csv").exists()
  while any(os.path.exists(f"/proc/{child}") for child in children):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  # One of the finished ones is damaged meanwhile: it is noticed, and done again.
  path = store / next(iter(done))
  path.write_bytes(path.read_bytes()[:-100] + bytes(100))
  decoded, decode = [], preprocess.decode_photograph
  monkeypatch.setattr(preprocess, "decode_photograph", lambda c: decoded.append(c) or decode(c))
  prepare(camera, data)
  assert len(decoded) == 40 - len(done) + 1
  resumed = rows_of(data)
  prepare(camera, tmp_path / "afresh")
  same_rows(resumed, rows_of(tmp_path / "afresh"))
  assert not store.exists()


def test_many_workers_give_the_same_set(camera, tmp_path):
  camera.both([f"{n}.jpg" for n in range(12)])
  (camera.folder / "3.jpg").write_bytes(b"no picture")
  prepare(camera, tmp_path / "one")
  done = subprocess.run(command(camera, tmp_path / "two", 2), capture_output=True, text=True,
                        timeout=120, check=True)
  assert "Traceback" not in done.stderr
  one, two = tmp_path / "one", tmp_path / "two"
  assert (one / "rejected.csv").read_bytes() == (two / "rejected.csv").read_bytes()
  same_rows(rows_of(one), rows_of(two))


def test_two_runs_at_once_are_one_too_many(camera, tmp_path):
  from medattn_jax.data.datasets import prepared

  camera.both(["a.jpg"])
  with prepared.exclusive(tmp_path / ".csv.lock", wait=False), pytest.raises(
    UserError, match="another prepare"
  ):
    prepare(camera, tmp_path)
  prepare(camera, tmp_path)  # a lock file that is left hinders nobody


def test_a_picture_that_ends_its_process_costs_itself_alone(camera, tmp_path, monkeypatch):
  camera.both([f"{n}.jpg" for n in range(10)])
  jobs = [
    photographs.Job(str(camera.folder / f"{n}.jpg"), str(tmp_path), f"{n}", SIZE, 90, "cropped")
    for n in range(10)
  ]
  # A module of its own, since the workers import it.
  (tmp_path / "deadly.py").write_text(
    "import os\nfrom medattn_jax.data import photographs\ndef photograph(job):\n"
    "  return os._exit(1) if job.key == '4' else photographs.Done(name=job.key)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  import deadly

  monkeypatch.setattr(photographs, "_photograph", deadly.photograph)
  results = {job.key: done for job, done in photographs._results(jobs, 2)}
  assert len(results) == 10
  assert {key for key, done in results.items() if done.reason} == {"4"}
  assert "ends the process" in results["4"].reason


def test_only_the_source_of_images_and_not_tensorflow_is_in_a_worker():
  code = ("import sys, medattn_jax.data, medattn_jax.data.photographs, medattn_jax.data.prepare;"
          "print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax') if m in sys.modules])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_no_network_is_asked_for(camera, tmp_path):
  camera.both(["1_left.jpg", "1_right.jpg", "2_left.jpg"])
  code = f"""
import socket
def refuse(*arguments): raise SystemExit(f"network: {{arguments}}")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from medattn_jax.data import prepare, pipeline
prepare.prepare("csv", {str(camera.folder)!r}, {str(tmp_path / "d")!r}, full_size=64, workers=1)
data = pipeline.open_dataset("csv", {str(tmp_path / "d")!r}, full_size=64)
next(pipeline.train_batches(data, "train", batch_size=1, full_size=64, seed=0, start_step=0))
"""
  done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True,
                        timeout=120, check=False, env={**os.environ, "http_proxy": "http://127.0.0.1:9"})
  assert done.returncode == 0, done.stderr


def test_the_real_photograph(shared, tmp_path):
  source = shared / "realdata" / "retina_cc0"
  module.prepare("csv", source, tmp_path, full_size=492, workers=1)
  dataset = pipeline.open_dataset("csv", tmp_path, full_size=492)
  assert dataset.splits == {"train": 1}
  batch = next(pipeline.eval_batches(dataset, "train", batch_size=1, full_size=492))
  assert batch["patient"][0] == "retina_cc0" and list(batch["eye"][0]) == ["left", ""]
  red, green, blue = batch["image"][0, 0, 200:300, 200:300].mean((0, 1))
  assert red > green > blue * 0.8 and red > 120  # a retina
  assert batch["image"][0, 0, :20, :20].max() < 30  # beside the disc


def test_the_index_says_what_the_records_hold(camera, tmp_path):
  camera.both([f"{n}_left.jpg" for n in range(5)])
  prepare(camera, tmp_path)
  content = json.loads((tmp_path / "csv/1.0.0/index.json").read_text())["content"]
  assert content["full_size"] == SIZE and content["boxes"] == 1
  assert sum(len(words.split()) for words in content["levels"].values()) == 5
  assert set(content["levels"]) == set(schema.SPLITS)  # five patients fill all three
