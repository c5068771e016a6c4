"""Jobs done in processes of their own, where a process that dies costs the job it was at.

Each process has a pipe to itself, so an answer that ends short says which job ended it. The
standard library's pool says only that it broke; and where a process dies while the next one
starts, its Python 3.11 waits for ever.
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

AHEAD = 3  # jobs at hand in a process, so that it never waits for its parent


@dataclasses.dataclass(frozen=True)
class Died:
  """The answer to a job whose process ended before it was done."""

  exitcode: int | None


def cores() -> int:
  """The cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def answers(
  does: Callable[[Any], Any], jobs: Iterable, processes: int
) -> Iterator[tuple[int, Any]]:
  """(number, does(job)) of each of the jobs, numbered from 0, in the order in which they end.

  A job whose process died is answered by `Died`, and the next one gets another process; what
  `does` raises is raised. The processes are spawned, never forked; they leave Ctrl-C to their
  parent and end with it, even where that is killed.
  """
  context = multiprocessing.get_context("spawn")
  waiting = collections.deque(enumerate(jobs))
  teams: dict[multiprocessing.connection.Connection, _Worker] = {}
  try:
    while waiting or any(worker.at for worker in teams.values()):
      while len(teams) < min(processes, len(waiting)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, does), daemon=True)
        process.start()
        theirs.close()  # so that its end is the end of what we read
        teams[ours] = _Worker(process)
      _hand_out(waiting, teams)
      for pipe in multiprocessing.connection.wait([p for p, worker in teams.items() if worker.at]):
        worker = teams[pipe]
        try:
          good, answer = pipe.recv()
        except (EOFError, OSError):
          (number, _), *rest = worker.at
          waiting.extendleft(reversed(rest))
          del teams[pipe]
          pipe.close()
          worker.process.join()
          yield number, Died(worker.process.exitcode)
          continue
        number, _ = worker.at.popleft()
        if not good:
          raise answer
        yield number, answer
  finally:
    for pipe in teams:
      pipe.close()
    for worker in teams.values():
      worker.process.join()


@dataclasses.dataclass
class _Worker:
  process: multiprocessing.process.BaseProcess
  at: collections.deque = dataclasses.field(default_factory=collections.deque)


def _hand_out(waiting, teams):
  """One job after another to whoever has the fewest."""
  while waiting:
    pipe = min(teams, key=lambda pipe: len(teams[pipe].at))
    if len(teams[pipe].at) >= AHEAD:
      return
    teams[pipe].at.append(waiting.popleft())
    try:
      pipe.send(teams[pipe].at[-1][1])
    except OSError:
      return  # it has died: its pipe will say so


def _serve(pipe, does):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_the_parent, daemon=True).start()
  try:
    while True:
      job = pipe.recv()
      try:
        answer = True, does(job)
      except Exception as e:
        e.add_note(traceback.format_exc())  # the place where it was raised does not travel
        answer = False, e
      pipe.send(answer)
  except (EOFError, OSError):
    return  # its parent needs no more


def _end_with_the_parent():
  multiprocessing.parent_process().join()
  os._exit(1)
