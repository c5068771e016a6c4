"""Two processes of one machine train as one process with two devices does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from medattn_jax.checkpoint import Checkpoints

PAGE = str(pathlib.Path(__file__).parent / "pages" / "tiny.py")


def start(workdir, data_dir, devices, *flags):
  return subprocess.Popen(
      [sys.executable, "-m", "medattn_jax", "train", f"--config={PAGE}", f"--workdir={workdir}",
       f"--config.data.dir={data_dir}", *flags],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def finish(*processes):
  answers = [process.communicate(timeout=300) for process in processes]
  for process, (_, err) in zip(processes, answers, strict=True):
    assert process.returncode == 0, err
  return [out for out, _ in answers]


def result(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  metrics = json.loads((workdir / "evaluation" / "metrics.json").read_text())
  predictions = (workdir / "evaluation" / "predictions.csv").read_text().splitlines()
  return (
      [(line["step"], line["loss"]) for line in lines if "loss" in line],
      metrics,
      [row.split(",")[:4] for row in predictions],
  )


def test_two_processes_train_and_evaluate_as_one(tmp_path):
  finish(start(tmp_path / "one", tmp_path / "data", 2))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  flags = [f"--coordinator=127.0.0.1:{port}", "--processes=2"]
  outputs = finish(
      *(start(tmp_path / "two", tmp_path / "data", 1, *flags, f"--process={i}") for i in (0, 1))
  )
  assert "M-Net" in outputs[0] and not outputs[1]
  (losses, metrics, rows), (expected, expected_metrics, expected_rows) = (
      result(tmp_path / name) for name in ("two", "one")
  )
  assert [step for step, _ in losses] == [step for step, _ in expected]
  np.testing.assert_allclose([x for _, x in losses], [x for _, x in expected], rtol=1e-4)
  assert rows == expected_rows
  assert metrics["patients"] == expected_metrics["patients"] == 6
  trees = [Checkpoints(tmp_path / name / "checkpoints").load(12)[0] for name in ("one", "two")]
  kernels = [tree["params"]["m_net"]["head"]["kernel"] for tree in trees]
  np.testing.assert_allclose(*kernels, atol=5e-3)  # AdamW turns rounding into steps
