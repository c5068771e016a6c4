"""Two processes of one machine do as one process with two devices does, and end together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from medattn_jax import processes
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
PAGE = str(ROOT / "tests" / "pages" / "tiny.py")
STEPS = 12


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start(*arguments, devices=1):
  return subprocess.Popen(
      [sys.executable, *map(str, arguments)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
  )


def start_two(*arguments):
  flags = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
  return [start("-m", "medattn_jax", *arguments, *flags, f"--process={i}") for i in (0, 1)]


def finish(*started, status=0):
  """What each wrote to (standard output, standard error); all must end with `status`."""
  try:
    answers = [process.communicate(timeout=300) for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [status] * len(started), answers
  return answers


def train(workdir, data_dir):
  return ["train", f"--config={PAGE}", f"--workdir={workdir}", f"--config.data.dir={data_dir}"]


def one_process(*arguments):
  return finish(start("-m", "medattn_jax", *arguments, devices=2))


@pytest.fixture(scope="module")
def data_dir(made_once):
  return made_once("processes_data", pathlib.Path.mkdir)


@pytest.fixture(scope="module")
def one(made_once, data_dir):
  """A run of one process with two devices."""
  return made_once("processes_run", lambda workdir: one_process(*train(workdir, data_dir)))


def losses(workdir):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def predictions(folder):
  header, *rows = (folder / "predictions.csv").read_text().splitlines()
  names = [row.split(",")[:4] for row in rows]
  return header, names, np.array([row.split(",")[5:] for row in rows], float)


def assert_same_run(workdir, other):
  got, expected = losses(workdir), losses(other)
  assert list(got) == list(expected) == list(range(1, STEPS + 1))
  np.testing.assert_allclose([*got.values()], [*expected.values()], rtol=1e-4)
  trees = [Checkpoints(w / "checkpoints").load(STEPS)[0] for w in (workdir, other)]
  kernels = [tree["params"]["m_net"]["head"]["kernel"] for tree in trees]
  np.testing.assert_allclose(*kernels, atol=5e-3)  # AdamW turns rounding into steps
  (header, names, numbers), (header_2, names_2, numbers_2) = (
      predictions(w / "evaluation") for w in (workdir, other)
  )
  assert header == header_2 and names == names_2 and len(names) == 11
  np.testing.assert_allclose(numbers, numbers_2, atol=2e-3)


def test_two_processes_train_and_evaluate_as_one(one, data_dir, tmp_path):
  (out, err), (other_out, other_err) = finish(*start_two(*train(tmp_path / "two", data_dir)))
  assert "M-Net" in out and "M-Net" not in other_out
  assert "validation" in err and len(other_err.splitlines()) == 1 and "joining" in other_err
  assert_same_run(tmp_path / "two", one)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_one_step_and_either_number_goes_on(one, data_dir, tmp_path):
  workdir = tmp_path / "run"
  both = start_two(*train(workdir, data_dir))
  log = workdir / "metrics.jsonl"
  while not (log.exists() and len(log.read_text().splitlines()) >= 4):
    assert all(process.poll() is None for process in both), finish(*both)
    time.sleep(0.01)
  both[1].send_signal(signal.SIGTERM)
  for _, err in finish(*both, status=143):
    assert "stopped by SIGTERM" in err and "Traceback" not in err
  step = Checkpoints(workdir / "checkpoints").steps()[-1]
  assert step == max(losses(workdir)) >= 4 and not (workdir / "evaluation").exists()
  shutil.copytree(workdir, tmp_path / "copy")
  err = finish(*start_two(*train(workdir, data_dir)))[0][1]
  assert f"resuming at step {step}" in err
  assert_same_run(workdir, one)
  one_process(*train(tmp_path / "copy", data_dir))
  assert_same_run(tmp_path / "copy", one)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(one, tmp_path):
  finish(*start_two("evaluate", f"--workdir={one}", "--split=train", f"--out={tmp_path / 'two'}"))
  one_process("evaluate", f"--workdir={one}", "--split=train", f"--out={tmp_path / 'one'}")
  files = [(tmp_path / name / "predictions.csv").read_text() for name in ("one", "two")]
  assert files[0] == files[1] and len(files[0].splitlines()) > 20


# What follows speaks to processes.py alone: no TensorFlow, a few seconds each.

BEGIN = """
import os, signal, sys, time
import numpy as np
from medattn_jax import cli, processes
from medattn_jax.errors import UserError
number = int(sys.argv[1])
def begin():
  signal.signal(signal.SIGTERM, cli.stop)
  processes.start(f"127.0.0.1:{sys.argv[2]}", 2, number)
"""


def two_scripts(code):
  port = free_port()
  return [start("-c", BEGIN + code, i, port) for i in (0, 1)]


def test_rows_are_joined_in_the_order_of_processes_whatever_the_order_of_their_names():
  both = two_scripts("""
begin()
name = np.array([["ö", ""], ["b,c", "日本" * number]], object)
rows = {"n": np.arange(2) + 2 * number, "name": name}
if number:
  rows = dict(reversed(rows.items()))
  time.sleep(0.5)
found = processes.gather_rows(rows)
assert found["n"].tolist() == [0, 1, 2, 3]
assert found["name"].tolist() == [["ö", ""], ["b,c", ""], ["ö", ""], ["b,c", "日本"]]
assert found["name"].dtype == object
assert processes.gather({"a": number}) == [{"a": 0}, {"a": 1}]
assert processes.from_first([number]) == [0]
assert not processes.agree(number == 1) and processes.agree(True)
large = np.random.default_rng(number).integers(0, 255, 5_000_000, np.uint8)  # more than gRPC's 4 MB
assert (processes.gather_rows({"x": large})["x"].reshape(2, -1)[number] == large).all()
processes.same("config", {"seed": 3})
try:
  processes.same("config", {"seed": number})
except UserError as error:
  print(error)
cli.leave(0)
""")
  for out, _ in finish(*both):
    assert "config: process 1 has seed = 1 where process 0 has 0; accepted: the same" in out


COMMAND = """
def evaluate(flags, rest):
  begin()
  processes.meet()
  {}
cli.evaluate = evaluate
cli.main(["evaluate", "--workdir=run"])
"""


@pytest.mark.parametrize("leaves", [0, 1])
@pytest.mark.parametrize(
    ("how", "statuses", "words"),
    [
        ("raise UserError('full disk')", (2, 2), "error: process {} ended: full disk"),
        ("signal.raise_signal(signal.SIGTERM)", (143, 143), ""),
        ("raise KeyError('ours to mend')", (1, 2), "error: process {} ended: its log says why"),
    ],
)
def test_who_waits_for_one_that_ends_hears_why(leaves, how, statuses, words):
  both = two_scripts(COMMAND.format(f"""
  if number == {leaves}:
    {how}
  processes.meet()"""))
  answers = [process.communicate(timeout=60) for process in both]
  codes = [process.returncode for process in both]
  assert (codes[leaves], codes[1 - leaves]) == statuses, answers
  err = answers[1 - leaves][1]
  assert words.format(leaves) in err and "Traceback" not in err


def test_one_that_dies_within_a_step_does_not_leave_the_other_waiting():
  both = two_scripts(COMMAND.format("""
  import jax
  from medattn_jax import sharding
  from jax.sharding import PartitionSpec as P
  add = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, sharding.AXIS), mesh=sharding.mesh(),
                              in_specs=P(sharding.AXIS), out_specs=P()))
  for turn in range(100_000):
    x = sharding.put({"x": np.ones(1, np.float32)}, sharding.batched(sharding.mesh()))["x"]
    assert float(add(x)[0]) == 2
    if turn == 50 and number:
      os.kill(os.getpid(), signal.SIGKILL)"""))
  answers = [process.communicate(timeout=60) for process in both]
  assert [process.returncode for process in both] == [2, -9], answers[0][1]
  assert "medattn: error: another process of this run is gone" in answers[0][1]


@pytest.mark.parametrize("flags", [
    (None, 2, 0), (None, None, 1), ("host", 2, 0), ("host:1", None, 0), ("host:1", 2, None),
    ("host:1", 2, 2), ("host:1", 0, 0), ("auto", 2, None), ("auto", None, 0),
])  # fmt: skip
def test_flags_that_make_no_run_are_refused(flags):
  with pytest.raises(UserError, match="accepted: "):
    processes.start(*flags)


def test_auto_takes_what_the_cluster_says():
  code = """
os.environ |= {"SLURM_JOB_ID": str(int(sys.argv[2]) % 4096), "SLURM_STEP_NODELIST": "localhost",
           "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": sys.argv[1],
           "SLURM_LOCALID": sys.argv[1]}
processes.start("auto", None, None)
print(processes.gather(number))
cli.leave(0)
"""
  assert [out for out, _ in finish(*two_scripts(code))] == ["[0, 1]\n"] * 2


def test_auto_without_a_cluster_is_refused():
  code = COMMAND.replace("begin()", "processes.start('auto', None, None)").format("")
  (_, err), = finish(start("-c", BEGIN + code, 0, 0), status=2)
  assert "--coordinator=auto: no cluster is found" in err and "Traceback" not in err


def test_one_process_needs_no_flag_and_agrees_with_itself():
  processes.start(None, None, None)
  rows = {"name": np.array([["ö", ""], ["b,c", "日本"]], object), "n": np.arange(2)}
  assert processes.gather_rows(rows)["name"] is rows["name"]
  assert processes.gather(3) == [3] and processes.agree(True) and not processes.agree(False)
  processes.end(0)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["bank", "stats", "batch"])
def test_two_processes_share_a_bank_as_two_devices_do(source, tmp_path):
  page = ROOT / "tests" / "pages" / "tiny_map.py"
  command = lambda name: [
      "train", f"--config={page}", f"--workdir={tmp_path / name}",
      f"--config.data.dir={tmp_path / 'data'}", f"--config.attention.source={source}",
  ]  # fmt: skip
  one_process(*command("one"))
  finish(*start_two(*command("two")))
  got, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
  assert list(got) == list(expected)
  np.testing.assert_allclose([*got.values()], [*expected.values()], rtol=1e-3)
  trees = [Checkpoints(tmp_path / w / "checkpoints").load(STEPS)[0] for w in ("one", "two")]
  np.testing.assert_allclose(*(tree["constants"]["map"] for tree in trees), atol=0.05)
  shapes = [tree["params"]["pixel_classifier"]["rows"]["kernel"].shape for tree in trees]
  assert shapes[0] == shapes[1]
