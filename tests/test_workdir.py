"""The workdir: one training at a time, a config that is whole, a log that outlives kill -9."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from medattn_jax.errors import UserError
from medattn_jax.workdir import MetricsLog, Workdir

ROOT = pathlib.Path(__file__).parents[1]

HOLDER = """
import sys, time
from medattn_jax.workdir import MetricsLog, Workdir
with Workdir(sys.argv[1]).lock():
  log = MetricsLog(sys.argv[1] + "/metrics.jsonl")
  log.write({"step": 1})
  print("held", flush=True)
  time.sleep(60)
"""


def holder(path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_a_second_training_is_refused_and_a_killed_one_hinders_nobody(tmp_path):
  path = tmp_path / "runs/new"
  with holder(path) as first:
    try:
      with pytest.raises(UserError, match=f"{path}: another training is running in it") as caught:
        Workdir(path).lock().__enter__()
      assert f"process {first.pid}" in str(caught.value)
      with pytest.raises(UserError, match=f"process {first.pid}"):  # It has not lost its lock.
        Workdir(path).lock().__enter__()
    finally:
      first.send_signal(signal.SIGKILL)
  # Its line had not waited in a buffer.
  assert MetricsLog(path / "metrics.jsonl").read() == [{"step": 1}]
  with Workdir(path).lock():
    assert (path / ".lock").read_text() == f"{os.getpid()}\n"
  with Workdir(path).lock():  # Free again after an orderly end.
    pass


def test_a_folder_made_for_nothing_goes_again_with_its_parents(tmp_path):
  with pytest.raises(ValueError), Workdir(tmp_path / "new/run").lock():
    (tmp_path / "new/run/compilation_cache").mkdir()
    raise ValueError
  assert not list(tmp_path.iterdir())
  (tmp_path / "mine").mkdir()
  with Workdir(tmp_path / "mine").lock():
    pass
  assert (tmp_path / "mine").is_dir()
  with Workdir(tmp_path / "new/run").lock():
    (tmp_path / "new/run/config.json").write_text("{}")
  assert (tmp_path / "new/run/config.json").exists()


def test_folders_that_cannot_be_a_workdir_are_the_users_error(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("mine")
  for path in (tmp_path / "file", tmp_path / "file/below", pathlib.Path("/proc/none")):
    with pytest.raises(UserError, match=f"workdir {path}: .*accepted is a folder"):
      Workdir(path).lock().__enter__()
  assert (tmp_path / "file").read_text() == "mine"

  def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
  with pytest.raises(UserError, match="cannot be written to: no space left on device"):
    Workdir(tmp_path / "full").lock().__enter__()


def test_what_is_already_in_the_folder_is_left_alone(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with Workdir(tmp_path).lock():
    Workdir(tmp_path).write_config({"seed": 1})
  assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "notes.txt"]
  assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_config_comes_back_as_it_nests(tmp_path):
  config = {"seed": 1, "model": {"name": "m_net", "mean": [0.5, 0.5]}, "none": None}
  Workdir(tmp_path).write_config(config)
  assert Workdir(tmp_path).read_config() == config


@pytest.mark.parametrize(
  "damage", [b"", b'{"seed": 1', b"[1]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000]
)
def test_a_damaged_config_is_named(tmp_path, damage):
  (tmp_path / "config.json").write_bytes(damage)
  with pytest.raises(UserError, match=f"^{tmp_path}/config.json: damaged, ") as caught:
    Workdir(tmp_path).read_config()
  assert "\n" not in str(caught.value)


def test_a_missing_config_or_workdir_is_named(tmp_path):
  with pytest.raises(UserError, match=f"{tmp_path}: no config.json"):
    Workdir(tmp_path).read_config()
  with pytest.raises(UserError, match="none: no such folder"):
    Workdir(tmp_path / "none").read_config()


def test_the_log_is_strict_json_a_line_each(tmp_path):
  log = MetricsLog(tmp_path / "metrics.jsonl")
  log.write({"step": 1, "loss": np.float32("nan"), "rates": np.asarray([0.5, np.inf])})
  log.write({"step": np.int32(2), "phase": "m", "nested": {"kappa": -float("inf"), "n": True}})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
    {"step": 1, "loss": None, "rates": [0.5, None]},
    {"step": 2, "phase": "m", "nested": {"kappa": None, "n": True}},
  ]
  log.close()


def test_a_resumed_log_is_what_an_unbroken_one_would_be(tmp_path, capsys):
  path, lines = tmp_path / "metrics.jsonl", [{"step": s, "loss": s / 7} for s in range(6)]
  log = MetricsLog(path)
  for line in lines:
    log.write(line)
  log.close()
  whole = path.read_bytes()
  broken = whole.split(b"\n")
  broken[1:1] = [b"garbage", b"\0\0\0", b'{"loss": 1}', b'{"step": NaN}', b'{"step": "2"}', b"[3]"]
  path.write_bytes(b"\n".join(broken)[:-9])  # the last line is torn, too
  assert log.read() == lines[:-1]
  assert "7 lines that are not whole passed over" in capsys.readouterr().err
  log.truncate_after(3)
  assert path.read_bytes() == whole[: whole.index(b'{"step": 4')]
  said = capsys.readouterr().err
  assert "1 lines after step 3 dropped" in said and "7 lines that were not whole dropped" in said
  for line in lines[4:]:
    log.write(line)
  log.close()
  assert path.read_bytes() == whole and log.read() == lines


def test_the_line_of_a_validation_that_is_done_again_goes(tmp_path):
  log = MetricsLog(tmp_path / "metrics.jsonl")
  lines = [{"step": 2, "loss": 1.0}, {"step": 2, "validation_kappa": 0.5},
           {"step": 4, "loss": 0.5}, {"step": 4, "validation_kappa": 0.6}]
  for line in lines:
    log.write(line)
  log.truncate_after(4)
  assert log.read() == lines
  log.truncate_after(4, validated=False)
  assert log.read() == lines[:3]


def test_a_whole_log_is_not_touched_by_a_resume(tmp_path, capsys):
  log = MetricsLog(tmp_path / "metrics.jsonl")
  log.truncate_after(0)  # no file: nothing to do
  log.write({"step": 1})
  before = os.stat(log.path)
  log.truncate_after(1)
  after = os.stat(log.path)
  assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
  assert capsys.readouterr().err == ""
  log.close()


def test_a_full_disk_is_the_users_error_and_the_torn_line_is_mended(tmp_path):
  log = MetricsLog(tmp_path / "metrics.jsonl")
  log.write({"step": 1})
  room = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20, room[1]))
  try:
    with pytest.raises(UserError, match=f"{log.path}: cannot be written to: "):
      log.write({"step": 2, "loss": 0.123456789})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, room)
  log.truncate_after(2)
  log.write({"step": 2})
  assert log.read() == [{"step": 1}, {"step": 2}]
  log.close()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_strangers_config_that_is_no_file_is_not_waited_for(tmp_path, make):
  make(tmp_path / "config.json")
  with pytest.raises(UserError, match=r"config\.json: cannot be read: is no plain file"):
    Workdir(tmp_path).read_config()


def test_what_a_strangers_links_lead_to_is_not_written_to(tmp_path):
  run, mine = tmp_path / "run", tmp_path / "mine.txt"
  run.mkdir()
  mine.write_text("mine\n")
  (run / ".lock").symlink_to(mine)
  with pytest.raises(UserError, match=r"\.lock in it is a link"), Workdir(run).lock():
    pass
  (run / "metrics.jsonl").symlink_to(mine)
  with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written to"):
    MetricsLog(run / "metrics.jsonl").write({"step": 1})
  os.mkfifo(run / "pipe.jsonl")
  for use in (lambda log: log.write({"step": 1}), lambda log: log.truncate_after(0)):
    with pytest.raises(UserError, match=r"pipe\.jsonl: cannot be"):
      use(MetricsLog(run / "pipe.jsonl"))
  assert mine.read_text() == "mine\n"
