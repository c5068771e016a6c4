"""SIGTERM, SIGINT and SIGHUP: stop at the next safe place, at once when asked twice."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Stopped(BaseException):
  """A signal asked the run to stop. `status` is the exit status: 128 + its number."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.status = 128 + number


class Signals:
  """While entered, the first signal is noted, the second ends the process.

  Inside a step nothing may stop half-way: there the loop asks `check()` between steps. Where
  nothing can be lost, `waits = False` lets the first signal raise Stopped on the spot.
  """

  CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

  def __init__(self):
    self.waits = False
    self.number = 0

  def __enter__(self) -> Signals:
    caught = set(self.CAUGHT)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: the terminal may go away
      caught.remove(signal.SIGHUP)
    self._before = {number: signal.signal(number, self._caught) for number in caught}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def check(self) -> None:
    """Raises Stopped if a signal has come."""
    if self.number:
      raise Stopped(self.number)

  def _caught(self, number: int, frame: FrameType | None) -> None:
    if self.number:
      os._exit(128 + number)
    self.number = number
    if not self.waits:
      raise Stopped(number)
