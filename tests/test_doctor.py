"""The doctor: answers everywhere, imports nothing heavy, and advises by what it sees."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from medattn_jax import doctor

ROOT = pathlib.Path(__file__).parents[1]
WHOLE = dict.fromkeys(doctor.LIBRARIES, "1.0") | {"tensorflow": None}


def test_run_answers_on_a_cpu_without_tensorflow_in_seconds():
  code = "import sys, medattn_jax.doctor as d; d.run(); assert 'tensorflow' not in sys.modules"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
  run = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert run.returncode == 0 and run.stderr == "", run.stderr
  for word in ("Versions", jax.__version__, "Devices", "cpu", "GiB", "TFLOP/s", "Advice"):
    assert word in run.stdout, (word, run.stdout)


def test_broken_devices_are_told_and_not_raised(monkeypatch, capsys):
  def broken():
    raise RuntimeError("no driver\nat all")

  monkeypatch.setattr(jax, "local_devices", broken)
  doctor.run()
  assert "JAX finds no devices: no driver at all" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("found", "platforms", "environment", "present", "said"),
  [
    ({}, {"cpu"}, {}, set(), "no accelerator"),
    ({}, {"cpu"}, {}, {"cuda"}, "medattn_jax[cuda12]"),
    ({}, {"cpu"}, {}, {"tpu"}, "medattn_jax[tpu]"),
    ({}, {"cpu"}, {"JAX_PLATFORMS": "cpu"}, {"cuda"}, "JAX_PLATFORMS=cpu hides"),
    ({}, {"gpu"}, {}, {"cuda"}, "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"),
    ({}, {"gpu"}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, {"cuda"}, "small pieces"),
    ({"jaxlib": "2.0"}, {"tpu"}, {}, {"tpu"}, "jaxlib 2.0 differ"),
    ({"tensorflow-cpu": None}, {"tpu"}, {}, {"tpu"}, "predict and load() need none"),
    ({"tensorflow": "2.0"}, {"gpu"}, {}, {"cuda"}, "tensorflow-cpu is enough"),
    ({}, {"cpu"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, set(), "for tests"),
  ],
)
def test_advice_follows_from_what_is_seen(found, platforms, environment, present, said):
  lines = doctor.advice(WHOLE | found, platforms, environment, present)
  assert sum(said in line for line in lines) == 1, lines


def test_a_host_that_is_well_gets_no_advice(monkeypatch):
  monkeypatch.setattr(doctor.sys, "version_info", (3, 12, 1))
  environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
  assert doctor.advice(WHOLE, {"gpu"}, environment, {"cuda"}) == []
