"""The bank's benchmark: it starts where only JAX is, and what it prints are numbers that fit."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import bank
from medattn_jax.programs import chips

KEYS = {"name", "config", "devices", "device_kind", "batch", "dtype", "compile_seconds", "step_ms",
        "images_per_second", "flops_per_step", "mfu", "peak_memory_bytes", "input_bound"}
ROOT = pathlib.Path(__file__).parents[2]
# None in sys.modules: importing it fails as if it were not installed.
BARE = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "sklearn"):
  sys.modules[name] = None
sys.argv[0] = "benchmarks.bank"
import runpy
runpy.run_module("benchmarks.bank", run_name="__main__")
"""


def run(*words):
  return subprocess.run(
    [sys.executable, "-c", BARE, "--images=8192", "--image-size=16", "--batch=8", "--rounds=1",
     "--steps=1", *words],
    cwd=ROOT, capture_output=True, text=True, check=False,
    env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.slow
def test_it_measures_without_tensorflow_and_config_pages(tmp_path):
  done = run("--classifiers=linear", f"--plot={tmp_path / 'figure.png'}")
  assert done.returncode == 0, done.stderr
  *lines, last = done.stdout.splitlines()
  row = json.loads(last)
  assert row["bank_bytes"] == 8192 * 16 * 16
  assert row.keys() >= KEYS and row["mfu"] is None and row["map_ms"] > 0
  assert row["ratio"] == pytest.approx(row["step_ms"]["min"] / row["without_ms"], rel=1e-3)
  assert row["images_per_second"] == pytest.approx(8000 / row["step_ms"]["min"], rel=1e-3)
  assert row["passes"] == 2  # forward and gradient, in whole blocks
  assert row["map_flops"] == 4 * 8192 * 16 * 16 < row["flops_per_step"]
  assert any(line.startswith("linear") and "8192" in line for line in lines)
  assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_target_without_its_compiler_is_named():
  absent = [name for name in chips.CHIPS if chips.missing(chips.target(name))]
  if not absent:
    pytest.skip("all compilers are installed")
  done = run(f"--target={absent[0]}")
  assert done.returncode == 2
  assert "not installed" in done.stderr or "no CUDA" in done.stderr
  assert "Traceback" not in done.stderr


def test_where_the_map_costs_as_much_as_all_else():
  rows = [{"config": {"images": 100}, "map_ms": 9.0, "without_ms": 20.0},
          {"config": {"images": 1000}, "map_ms": 10.0, "without_ms": 20.0}]
  assert bank.doubling(rows) == 2000  # by the largest bank: a small one's rate is its overhead
