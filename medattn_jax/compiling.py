"""Programs compiled beside the run: those of later phases while the first one trains."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import Any, NamedTuple

import jax

from medattn_jax import heap, onednn
from medattn_jax.experiment import Experiment

WORKERS = 2  # XLA compiles most of a program on one core


class Compiled(NamedTuple):
  """A train step that is ready, and the seconds that its compilation took."""

  step: Any
  seconds: float


class Compiling:
  """Compiles the programs of phases in the background, in the order in which they are asked for.

  The train step is handed out as it is. The program that answers goes into JAX's compilation cache,
  where the first validation finds it.

  Programs are traced one by one: Python traces two at once no faster, and the run would wait twice
  as long for its own.
  """

  def __init__(self):
    self._tracing = threading.Lock()
    self._pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
    self._steps: dict[str, concurrent.futures.Future] = {}
    self._answers: list[concurrent.futures.Future] = []

  def __enter__(self) -> Compiling:
    return self

  def __exit__(self, *_) -> None:
    # Who stops the run does not wait for the compiler.
    self._pool.shutdown(wait=False, cancel_futures=True)

  def ask(self, *phases: Experiment) -> None:
    """Has the programs of these phases compiled; those asked for before are not compiled again."""
    new = [now for now in phases if now.phase not in self._steps]
    # The first is waited for; of the others what takes longest begins first.
    for now in [*new[:1], *sorted(new[1:], key=lambda now: -len(now.trained))]:
      self._steps[now.phase] = self._pool.submit(self._train_step, now)
    self._answers += [self._pool.submit(self._eval_step, now) for now in new]

  def step(self, now: Experiment) -> Compiled:
    """The phase's train step, once it is ready. Raises what compiling it raised."""
    self.ask(now)
    program, seconds = self._steps[now.phase].result()
    return Compiled(heap.Kept(program), seconds)

  def _train_step(self, now: Experiment) -> Compiled:
    start = time.monotonic()
    with onednn.used(jax.default_backend()):
      with self._tracing:
        lowered = now.lower_train_step()
      return Compiled(lowered.compile(), time.monotonic() - start)

  def _eval_step(self, now: Experiment) -> None:
    with self._tracing:
      lowered = now.lower_eval_step()
    with onednn.storing():
      lowered.compile()
