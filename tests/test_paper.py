"""The pages of configs/paper, small: each trains, evaluates and prints its row of the table."""

from __future__ import annotations

import csv
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import synthetic

pytestmark = pytest.mark.slow

PAGES = pathlib.Path(__file__).resolve().parents[1] / "configs" / "paper"
SIZE = 128
# What makes the papers' pages small enough for two cores.
SMALL = {
  "model.backbone": "resnet_local", "model.crop_backbone": "resnet_local", "model.init_from": "",
  "model.crop_init": "m_net", "model.neck_features": 16, "model.attention_features": 16,
  "model.crop_size": 40, "model.mask_size": 26, "norm.group_size": 2, "data.full_size": SIZE,
  "data.image_size": 64, "data.batch_size": 4, "evaluation.batch_size": 8,
  "evaluation.bootstrap": 100}
PHASE = {"steps": 3, "accumulation": 1, "learning_rate": 1e-3}


def medattn(*words):
  done = subprocess.run(
    [sys.executable, "-m", "medattn_jax", *map(str, words)], capture_output=True, text=True,
    check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def train(page, workdir, keys):
  return medattn("train", f"--config={PAGES / page}.py", f"--workdir={workdir}",
                 *(f"--config.{key}={value}" for key, value in keys.items()))


def phases(*names):
  return {f"phases.{name}.{key}": value for name in names for key, value in PHASE.items()}


def table(path, header, rows):
  with open(path, "w", newline="") as file:
    csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  """{name: data_dir} of drawn eyes as Kaggle's EyePACS and as Messidor-2, prepared."""
  folder = tmp_path_factory.mktemp("raw")
  drawn = [eye for k in range(40) for eye in synthetic.draw_patient(0, k, 160).eyes]
  rows = []
  (folder / "messidor2" / "IMAGES").mkdir(parents=True)
  for split in ("train", "test"):
    (folder / "eyepacs" / split).mkdir(parents=True)
  for number, eye in enumerate(drawn):
    patient = int(eye.image_id.split("_")[0])
    name, split = f"{patient + 1}_{eye.eye}", "train" if patient < 20 else "test"
    Image.fromarray(eye.image).save(folder / "eyepacs" / split / f"{name}.jpeg", quality=92)
    rows.append((split, name, eye.level, "Public" if patient < 28 else "Private"))
    Image.fromarray(eye.image).save(folder / "messidor2" / "IMAGES" / f"IM{number:06}.png")
  table(folder / "eyepacs" / "trainLabels.csv", ("image", "level"),
        [(name, level) for split, name, level, _ in rows if split == "train"])
  table(folder / "eyepacs" / "retinopathy_solution.csv", ("image", "level", "Usage"),
        [(name, level, usage) for split, name, level, usage in rows if split == "test"])
  table(folder / "messidor2" / "messidor_data.csv",
        ("image_id", "adjudicated_dr_grade", "adjudicated_dme", "adjudicated_gradable"),
        [(f"IM{number:06}.png", eye.level, 0, 1) for number, eye in enumerate(drawn)])
  for name in ("eyepacs", "messidor2"):
    medattn("prepare", f"--source={name}", f"--input={folder / name}",
            f"--data-dir={folder / 'data'}", f"--full-size={SIZE}")
  return folder / "data"


def test_each_row_of_the_eyepacs_table(sets, tmp_path):
  keys = SMALL | {"data.dir": sets}
  run = lambda name: tmp_path / name
  train("eyepacs_m_net", run("m_net"), keys | phases("joint"))
  train("eyepacs_m_a", run("m_a"), keys | phases("m", "a"))
  for seed in range(3):
    train("eyepacs_zoom_in_net", run(f"zoom_{seed}"), keys | phases("m", "a", "c") | {"seed": seed})
  for name in ("m_net", "m_a", "zoom_0"):
    medattn("evaluate", f"--workdir={run(name)}", "--split=validation",
            f"--out={run(name) / 'validation'}")
  zooms = [f"--workdir={run(f'zoom_{seed}')}" for seed in range(3)]
  medattn("study", "ensemble", *zooms)
  medattn("study", "screening", zooms[0], f"--data={sets / 'messidor2'}",
          f"--train-data={sets / 'eyepacs'}", f"--out={run('zoom_0') / 'studies' / 'messidor'}")
  first = [f"--workdir={run(name)}" for name in ("m_net", "m_a")]
  printed = medattn("study", "table", *first, *zooms)
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()
          if line.startswith("|")]
  found = {(row[0], row[1], row[5]) for row in rows}
  for method in ("M-Net", "M-Net + A-Net", "Zoom-in-Net"):
    for split in ("validation", "test"):
      assert (method, "quadratic weighted kappa", f"eyepacs, {split}") in found, printed
  assert any(method.startswith("ensemble") for method, *_ in found), printed
  for figure in ("referable: AUC", "abnormal: AUC"):
    assert any(row[:2] == ("Zoom-in-Net", figure) for row in found), printed


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("attention_*.py")))
def test_each_row_of_the_global_attention(page, tmp_path):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (("train", 16), ("val", 8), ("test", 8)):
    arrays[f"{split}_images"] = rng.integers(0, 256, (count, 64, 64), np.uint8)
    arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
  np.savez(tmp_path / "set.npz", **arrays)
  medattn("prepare", "--source=npz", f"--input={tmp_path / 'set.npz'}",
          f"--data-dir={tmp_path / 'data'}")
  small = {
    "data.dir": tmp_path / "data", "data.full_size": 64, "data.image_size": 64,
    "data.batch_size": 4, "norm.group_size": 2, "evaluation.batch_size": 8,
    "evaluation.bootstrap": 100, "phases.joint.steps": 2, "phases.frozen.steps": 1}
  train(page, tmp_path / "run", small)
  printed = medattn("study", "table", f"--workdir={tmp_path / 'run'}")
  assert page.removeprefix("attention_") in printed and "accuracy" in printed, printed
