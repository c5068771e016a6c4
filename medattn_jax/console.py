"""What a person reads while a command works: lines on stderr, and one live line on a terminal."""

from __future__ import annotations

import sys
import time

_speaks = True


def say(text: str) -> None:
  """One line on stderr."""
  if _speaks:
    _line(text)


def warn(text: str) -> None:
  """One line on stderr about something skipped, guessed or changed."""
  _line(f"warning: {text}")


def only_warnings() -> None:
  """Leaves it to the first of several processes to say how things go."""
  global _speaks  # noqa: PLW0603 (a process says it once, of itself)
  _speaks = False


class Live:
  """A line that is overwritten on a terminal, and printed every `seconds` elsewhere."""

  def __init__(self, seconds: float = 15.0):
    self.seconds = seconds
    self.last = -float("inf")

  def show(self, text: str) -> None:
    if not _speaks:
      return
    if sys.stderr.isatty():
      print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif time.monotonic() - self.last >= self.seconds:
      print(text, file=sys.stderr, flush=True)
      self.last = time.monotonic()

  def close(self) -> None:
    _clear()


def duration(seconds: float) -> str:
  """1:02:03 or 4:05."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plain(text: str) -> str:
  """`text` with codes for what would move a terminal: the name of a file may hold anything."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _line(text: str) -> None:
  _clear()
  print(f"medattn: {plain(text)}", file=sys.stderr, flush=True)


def _clear() -> None:
  if sys.stderr.isatty():
    print("\r\x1b[K", end="", file=sys.stderr, flush=True)
