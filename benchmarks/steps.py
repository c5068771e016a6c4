"""A training step made ready to be read and run: what the benchmarks of steps share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from medattn_jax import experiment as experiments
from medattn_jax import models
from medattn_jax.experiment import Experiment


def build(page: Any, phase: str | None, devices: Sequence[Any] | None = None) -> Experiment:
  """The phase of a page (the last, or the only one that learns from nothing), on devices."""
  if phase is None:
    phase = "joint" if "joint" in page.phases else experiments.phases(page)[-1]
  return experiments.build(page, phase, devices)


def host_batches(now: Experiment, seed: int = 0) -> list[dict[str, np.ndarray]]:
  """One update's small batches, of noise: a step takes as long whatever an image shows."""
  rng = np.random.default_rng(seed)
  each, *image = models.image_shape(now.config)
  shape = (now.config.data.batch_size, each)
  return [{
    "image": rng.integers(0, 256, (*shape, *image), np.uint8),
    "level": rng.integers(0, now.config.model.num_classes, shape).astype(np.int32),
    "mask": np.ones(shape, np.float32)} for _ in range(now.page.accumulation)]


class Running:
  """A compiled step with its state and a batch, run again and again.

  Attributes:
    compiled: (state, batch) → (state, metrics), donating the state.
    metrics: of the last step.
  """

  def __init__(self, compiled: Callable, state: Any, batch: Any):
    self.compiled, self.state, self.batch, self.metrics = compiled, state, batch, None

  def run(self, steps: int) -> float:
    """Milliseconds a step, over so many."""
    jax.block_until_ready((self.state, self.batch))
    begin = time.perf_counter()
    for _ in range(steps):
      self.state, self.metrics = self.compiled(self.state, self.batch)
    jax.block_until_ready((self.state, self.metrics))
    return (time.perf_counter() - begin) * 1000 / steps


def compiled(lower: Callable[[], jax.stages.Lowered]) -> tuple[Any, Any, float]:
  """(lowered, compiled, the seconds that both took)."""
  begin = time.perf_counter()
  lowered = lower()
  program = lowered.compile()
  return lowered, program, time.perf_counter() - begin
