"""`prepare --check` says what there is, and writes nothing."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import check as module
from medattn_jax.data import prepare
from medattn_jax.errors import UserError


def state(folder: pathlib.Path) -> dict:
  return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def clinic(camera):
  """Patients 1 to 4 of two eyes, 5 of one, in stated splits."""
  names = [f"{n}_{eye}" for n in range(1, 5) for eye in ("left", "right")] + ["5_left"]
  for seed, name in enumerate(names):
    camera.picture(f"{name}.jpg", 100 + 2 * seed, 60 + seed, seed)
  camera.sheet([(name, seed % 5, "train" if name < "4" else "test")
                for seed, name in enumerate(names)], ("image", "level", "split"))
  return camera


def test_what_is_said_is_what_is_made(clinic, data, capsys):
  shutil.copy(clinic.folder / "1_left.jpg", clinic.folder / "2_left.jpg")
  (clinic.folder / "3_left.jpg").write_bytes((clinic.folder / "3_left.jpg").read_bytes()[:900])
  (clinic.folder / "stray.jpg").write_bytes(b"")
  before = state(clinic.folder.parent)
  found = module.check("csv", clinic.folder, workers=1)
  assert state(clinic.folder.parent) == before
  assert found.patients == {"train": 3, "test": 2} and found.one_eyed == {"train": 1, "test": 1}
  assert found.shorter == (60, 64, 68) and found.longer == (100, 108, 116)
  assert found.repeated == 1 and len(found.rejected) == 2
  out = capsys.readouterr().out
  assert f"{clinic.folder}: checked as csv; nothing is written" in out
  assert ("split        patients   images  level 0  level 1  level 2  level 3  level 4  one eye\n"
          "train               3        5        2        1        1        1        0        1"
          ) in out
  assert "the shorter side has 60 to 68 pixels, 64 in the median" in out
  assert "3_left: is damaged" in out and "stray.jpg: has no label in labels.csv" in out
  made = prepare.prepare("csv", clinic.folder, data, full_size=48, workers=1)
  assert (made.patients, made.levels, made.rejected) == (found.patients, found.levels, 2)


def test_it_ends_as_prepare_would(clinic, capsys):
  shutil.copy(clinic.folder / "1_left.jpg", clinic.folder / "4_left.jpg")
  with pytest.raises(UserError, match=r"1_left \(train\) and 4_left \(test\) are the same"):
    module.check("csv", clinic.folder, workers=1)
  assert ("1 photographs repeat another one\n  1_left (train, level 0) and 4_left (test, level 1)\n"
          ) in capsys.readouterr().out  # all is said before
  found = module.check("csv", clinic.folder, workers=1, drop_duplicates=True)
  assert found.patients == {"train": 3, "test": 2} and found.one_eyed == {"train": 1, "test": 1}
  for path in clinic.folder.glob("*.jpg"):
    path.write_bytes(b"no picture")
  with pytest.raises(UserError, match=r"no photograph is usable: 9 are rejected, the first, 1_lef"):
    module.check("csv", clinic.folder, workers=1)
  with pytest.raises(UserError, match="'cvs' is unknown"):
    module.check("cvs", clinic.folder)


def test_much_that_is_rejected_is_counted(camera, capsys):
  camera.both(["good.jpg"])
  camera.sheet([("good.jpg", 1)] + [(f"{n}.jpg", 0) for n in range(50)])
  module.check("csv", camera.folder, workers=1)
  out = capsys.readouterr().out.splitlines()
  assert "51 rejected" not in out and "50 rejected" in out
  assert sum(line.endswith(")") and "is missing (labels.csv line" in line for line in out) == 20
  assert out[-1] == "  and 30 more: is missing"


def test_pixels_that_are_ready_are_checked_too(folder, capsys):
  images = np.random.default_rng(0).integers(0, 256, (8, 20, 20), np.uint8)
  images[5] = images[1]
  labels = np.arange(8)[:, None] % 3
  np.savez(folder / "a.npz", train_images=images[:4], train_labels=labels[:4],
           test_images=images[4:], test_labels=labels[4:])
  before = state(folder)
  found = module.check("npz", folder, workers=2, seed=3)  # of benchmarks the splits are as they are
  assert state(folder) == before
  assert found.levels == {"train": [2, 1, 1], "test": [1, 2, 1]}
  assert found.repeated == 1 and found.shorter == (20, 20, 20)
  said = capsys.readouterr()
  assert "1 photographs repeat another one pixel by pixel, 1 of them one of another" in said.err
  assert "--workers and --seed do nothing with --source=npz" in said.err
  assert "1 photographs repeat another one" in said.out
  with pytest.raises(UserError, match="--drop-duplicates: --source=npz keeps the splits"):
    module.check("npz", folder, drop_duplicates=True)


def test_many_workers_find_the_same(clinic):
  (clinic.folder / "2_left.jpg").write_bytes(b"no picture")
  assert module.check("csv", clinic.folder, workers=2) == module.check(
    "csv", clinic.folder, workers=1)


def test_the_command_needs_no_place_and_no_tensorflow(clinic):
  code = ("import sys, runpy\nsys.argv = ['medattn', *sys.argv[1:]]\n"
          "from medattn_jax import cli\n"
          "def leave(status, why=''):\n"
          "  print(status, [m for m in ('tensorflow', 'jax') if m in sys.modules], why)\n"
          "  raise SystemExit(status)\n"
          "cli.leave = leave\ncli.main()")
  run = lambda *arguments: subprocess.run(
    [sys.executable, "-c", code, "prepare", "--source=csv", f"--input={clinic.folder}",
     *arguments], capture_output=True, text=True, check=False, cwd=os.getcwd())
  done = run("--check", "--workers=1")
  assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0 [] ", done.stderr
  without = run()
  assert without.returncode == 2 and "--data-dir is missing; accepted: " in without.stderr


def test_a_set_within_the_input_is_no_input(clinic):
  prepare.prepare("csv", clinic.folder, clinic.folder, full_size=48, workers=1)
  clinic.picture(".prepare-csv/left.jpg")
  before = json.dumps(sorted(map(str, state(clinic.folder))))
  assert not module.check("csv", clinic.folder, workers=1).rejected
  assert json.dumps(sorted(map(str, state(clinic.folder)))) == before


def test_aligned_images_are_checked_as_a_whole(camera):
  camera.both(["a.jpg", "b.jpg"])
  Image.new("RGB", (60, 60)).save(camera.folder / "b.jpg")
  cropped = module.check("csv", camera.folder, workers=1)
  assert cropped.rejected == [("b.jpg", "is wholly black")]
  assert not module.check("csv", camera.folder, workers=1, frame="whole").rejected
