"""The first signal stops at a safe place, the second at once; exit statuses are the shell's."""

import os
import signal
import subprocess
import sys

import pytest

from medattn_jax.signals import Signals, Stopped


def test_noted_while_waiting_raised_when_asked():
  with Signals() as signals:
    signals.waits = True
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
      signals.check()
  assert stopped.value.status == 143


def test_raised_on_the_spot_where_nothing_can_be_lost():
  with pytest.raises(Stopped) as stopped, Signals():
    signal.raise_signal(signal.SIGINT)
  assert stopped.value.status == 130


def test_handlers_are_put_back():
  before = signal.getsignal(signal.SIGINT)
  with Signals():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before


def test_the_second_signal_ends_the_process():
  code = """
import signal
from medattn_jax.signals import Signals
with Signals() as signals:
  signals.waits = True
  signal.raise_signal(signal.SIGINT)
  print("goes on", flush=True)
  signal.raise_signal(signal.SIGINT)
  print("never", flush=True)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (130, "goes on\n")


def test_a_terminal_that_goes_away_stops_the_run_unless_it_was_started_with_nohup():
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
  try:
    with pytest.raises(Stopped) as stopped, Signals():
      signal.raise_signal(signal.SIGHUP)
    assert stopped.value.status == 129
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals():
      signal.raise_signal(signal.SIGHUP)
  finally:
    signal.signal(signal.SIGHUP, before)
