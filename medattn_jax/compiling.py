"""Programs compiled beside the run: those of later phases while the first one trains."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from medattn_jax import heap, onednn
from medattn_jax.experiment import Experiment

_LARGE = 2**18  # pixels of a device's small batch
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
    self._is_traced: dict[str, threading.Event] = {}
    self._answers: dict[str, concurrent.futures.Future] = {}

  def __enter__(self) -> Compiling:
    return self

  def __exit__(self, *_) -> None:
    # Who stops the run does not wait for the compiler.
    self._pool.shutdown(wait=False, cancel_futures=True)

  def begin(self, now: Experiment) -> None:
    """Has the phase's train step compiled; returns as soon as it is traced, or has failed.

    For a run that has Python to do, such as an import, while XLA works: to trace beside that would
    take both as long, and XLA would begin later.
    """
    self._ask_step(now)
    self._is_traced[now.phase].wait()

  def ask(self, *phases: Experiment) -> None:
    """Has the programs of these phases compiled; those asked for before are not compiled again."""
    new = [now for now in phases if now.phase not in self._steps]
    # The first is waited for; of the others what takes longest begins first.
    for now in [*new[:1], *sorted(new[1:], key=lambda now: -len(now.trained))]:
      self._ask_step(now)
    for now in phases:
      if now.phase not in self._answers:
        self._answers[now.phase] = self._pool.submit(self._eval_step, now)

  def step(self, now: Experiment) -> Compiled:
    """The phase's train step, once it is ready. Raises what compiling it raised."""
    self.ask(now)
    program, seconds = self._steps[now.phase].result()
    return Compiled(heap.Kept(program), seconds)

  def _ask_step(self, now: Experiment) -> None:
    self._is_traced[now.phase] = threading.Event()
    self._steps[now.phase] = self._pool.submit(self._train_step, now)

  def _train_step(self, now: Experiment) -> Compiled:
    start, traced = time.monotonic(), self._is_traced[now.phase].set

    def lower():
      lowered = self._traced(now.lower_train_step)
      traced()
      return lowered

    try:
      if jax.default_backend() == "cpu" and _large(now):
        program = onednn.compiled(lower)
      else:
        program = _compiled(lower)
    finally:
      traced()  # or who waits for that would wait for ever
    return Compiled(program, time.monotonic() - start)

  def _eval_step(self, now: Experiment) -> None:
    _compiled(lambda: self._traced(now.lower_eval_step))

  def _traced(self, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Lowered:
    with self._tracing:
      return lower()


def _large(now: Experiment) -> bool:
  """Whether steps take long enough for a program that is compiled at each start."""
  images = now.images // (now.page.accumulation * now.mesh.size)
  return images * now.config.data.image_size**2 >= _LARGE


def _compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
  lowered = lower()
  with onednn.stored():
    return lowered.compile()
