"""Mistakes are one line and exit status 2; help is quick."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

SMOKE = "--config=configs/smoke.py"
COMMAND = [sys.executable, "-m", "medattn_jax"]


def medattn(*arguments):
  return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "train"),
        ([], "COMMAND"),
        (["train", SMOKE], "--workdir"),
        (["train", "--config=nowhere.py", "--workdir=w"], "nowhere.py"),
        (["train", SMOKE, "--workdir=w", "--conf.x=1"], "--conf.x=1"),
        (["train", SMOKE, "--workdir=w", "stray"], "stray"),
        (["train", SMOKE, "--workdir=w", "--config.seed"], "--config.seed=VALUE"),
        (["train", SMOKE, "--workdir=w", "--config.seeed=1"], "did you mean seed"),
        (["evaluate", "--workdir=w", "--limit=3"], "--limit=3"),
        (["explain", "--workdir=w", "--limit=x"], "--limit"),
        (["import-weights", "--model=resnet50", "--out=w"], "--weights"),
        (["import-weights", "--model=resnet5", "--weights=a.pth", "--out=w"], "mean resnet50?"),
        (["export", "--workdir=w"], "--out"),
        (["evaluate", "--workdir=\x1b]0;no\x07"], r"\x1b]0;no\x07: no such folder"),
        (["export", "--workdir=w", "--out=tests"], "not empty"),
        (["export", "--workdir=no/such/run", "--out=new"], "no/such/run: no such folder"),
    ],
)
def test_mistakes(arguments, words):
  done = medattn(*arguments)
  assert done.returncode == 2
  assert done.stderr.startswith("medattn: error: ") and done.stderr.count("\n") == 1
  assert words in done.stderr


def test_help_names_every_command_within_a_second():
  start = time.monotonic()
  done = medattn("--help")
  seconds = time.monotonic() - start
  assert done.returncode == 0
  for command in ("train", "evaluate", "explain", "predict", "export", "prepare", "doctor",
                  "import-weights"):
    assert command in done.stdout
  assert "no medical device" in done.stdout
  assert seconds < 1


def test_a_full_disk_a_reader_that_leaves_and_closed_streams():
  shell = lambda line: subprocess.run(
      ["bash", "-c", f"{' '.join(COMMAND)} {line}"], capture_output=True, text=True, check=False
  )
  full = shell("--help > /dev/full")
  assert full.returncode == 2 and "No space" in full.stderr
  assert full.stderr.startswith("medattn: error: ") and full.stderr.count("\n") == 1
  left = shell("--help | true; exit ${PIPESTATUS[0]}")
  assert (left.returncode, left.stderr) == (0, "")
  closed = shell("fly 0<&- 1>&- 2>&-")
  assert closed.returncode == 2


def test_sigterm_ends_any_command_with_its_status():
  code = "import os, signal; from medattn_jax import cli\n"
  code += "cli.doctor = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\ncli.main(['doctor'])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (143, "")


def test_a_current_folder_that_is_gone_is_said(tmp_path):
  (tmp_path / "gone").mkdir()
  root = pathlib.Path(__file__).resolve().parents[1]
  line = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {' '.join(COMMAND)} evaluate --workdir=w"
  done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False,
                        env={**os.environ, "PYTHONPATH": str(root)})
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert done.stderr.startswith("medattn: error: the current folder: no such file or directory")
