"""Training a global attention by the command: goes on bit-equal, and with the same bank alone."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from medattn_jax.checkpoint import Checkpoints
from medattn_jax.workdir import Workdir

PAGE = str(pathlib.Path(__file__).parent / "pages" / "tiny_map.py")


def start(workdir, *flags, devices=2):
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-m", "medattn_jax", "train", f"--config={PAGE}", f"--workdir={workdir}",
     *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def train(workdir, *flags, devices=2):
  process = start(workdir, *flags, devices=devices)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def raw(made_once):
  """Two sets of 24 images each in the MedMNIST layout, prepared: other pixels, equal labels."""
  def make(folder, number):
    rng = np.random.default_rng(number)
    folder.mkdir()
    arrays = {}
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
      arrays[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16), np.uint8)
      arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    np.savez(folder / "set.npz", **arrays)
    subprocess.run(
      [sys.executable, "-m", "medattn_jax", "prepare", "--source=npz", f"--input={folder}",
       f"--data-dir={folder / 'data'}"], check=True, capture_output=True)

  return [made_once(f"aligned_{n}", lambda folder, n=n: make(folder, n)) / "data" for n in (0, 1)]


def flags(data_dir):
  """`data.synthetic.train` is of drawn sets alone: the phase without a bank has this one's size."""
  return ["--config.data.synthetic.train=400",
          "--config.data.name=npz", f"--config.data.dir={data_dir}",
          "--config.data.full_size=16", "--config.data.image_size=16",
          "--config.phases.joint.steps=60", "--config.checkpoint.every=5",
          "--config.evaluation.every=50"]


@pytest.fixture(scope="module")
def finished(made_once, raw):
  def make(workdir):
    status, _, err = train(workdir, *flags(raw[0]))
    assert status == 0, err
    assert "bank of 24 images" in err

  return made_once("tiny_map_run", make)


def end(workdir):
  checkpoints = Checkpoints(workdir / "checkpoints")
  return checkpoints.load(checkpoints.steps()[-1])


def steps(page="config.json", *, of):
  phases = json.loads((of / page).read_text())["phases"]
  return phases["joint"]["steps"], phases["joint"]["steps"] + phases["frozen"]["steps"]


def killed(workdir, *more):
  """A run that was killed once its first checkpoint was there."""
  process = start(workdir, *more)
  while process.poll() is None and not Checkpoints(workdir / "checkpoints").steps():
    time.sleep(0.01)
  process.kill()
  process.communicate()
  assert Checkpoints(workdir / "checkpoints").steps()[-1] < 60


@pytest.mark.slow
def test_a_killed_run_ends_bit_equal_maps_and_all(finished, raw, tmp_path):
  killed(tmp_path / "run", *flags(raw[0]))
  status, _, err = train(tmp_path / "run", *flags(raw[0]))
  assert status == 0, err
  (tree, meta), (expected, expected_meta) = end(tmp_path / "run"), end(finished)
  assert jax.tree.all(jax.tree.map(np.array_equal, tree, expected))
  assert meta["step"] == expected_meta["step"] == steps(of=finished)[1]
  maps, wanted = (Workdir(w).kept_maps() for w in (tmp_path / "run", finished))
  assert list(maps) == list(wanted)
  for step in wanted:
    np.testing.assert_array_equal(np.load(maps[step]), np.load(wanted[step]))


def test_the_frozen_map_is_the_checkpoints_to_the_end(finished):
  joint, last = steps(of=finished)
  tree, _ = end(finished)
  soft = np.load(Workdir(finished).kept_maps()[joint])
  found = tree["constants"]["map"]
  order = np.argsort(soft, axis=None, kind="stable")
  assert (np.diff(found.ravel()[order]) >= 0).all() and joint < last
  metrics = json.loads((finished / "evaluation" / "metrics.json").read_text())
  assert metrics["attention"]["area"] == pytest.approx(float((found > 0.5).mean()))
  assert metrics["thresholds"] is None and metrics["attention"]["iou"] is None


@pytest.mark.slow
def test_other_images_in_the_bank_are_refused(finished, raw, tmp_path):
  killed(tmp_path / "run", *flags(raw[0]))
  status, _, err = train(tmp_path / "run", *flags(raw[1]))
  assert status == 2
  assert "training images are not those" in err and err.count("error:") == 1


def test_a_bank_larger_than_the_set_is_refused_before_any_work(raw, tmp_path):
  status, _, err = train(
    tmp_path / "run", *flags(raw[0]), "--config.attention.source=bank:25")
  assert status == 2 and "has 24 images" in err
  assert not (tmp_path / "run").exists()
