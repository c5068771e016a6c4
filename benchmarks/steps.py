"""A training step made ready to be read and run: what the benchmarks of steps share."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import pages
from benchmarks.rows import rounded
from medattn_jax import experiment as experiments
from medattn_jax import heap, models, onednn
from medattn_jax.errors import UserError
from medattn_jax.experiment import Experiment
from medattn_jax.programs import ceilings, chips, traffic, unrun


def split(count: int) -> None:
  """Makes so many devices of a CPU, unless JAX has counted them already."""
  with contextlib.suppress(RuntimeError):
    jax.config.update("jax_num_cpu_devices", count)


def devices(asked: str | None) -> list[int]:
  """How many devices to measure on; a CPU is split into as many as are asked for."""
  try:
    counts = [int(one) for one in asked.split(",")] if asked else []
  except ValueError:
    raise UserError(f"--devices={asked}; accepted: numbers with commas between") from None
  if counts:
    split(max(1, *counts))
  heap.run_in_caller()
  there = jax.devices()
  if counts and not 1 <= min(counts) <= max(counts) <= len(there):
    raise UserError(f"--devices={asked}; accepted: from 1 to {len(there)}")
  return counts or [len(there) if there[0].platform != "cpu" else 1]


def build(page: Any, phase: str | None, devices: Sequence[Any] | None = None) -> Experiment:
  """The phase of a page (the last, or the only one that learns from nothing), on devices."""
  if phase is None:
    phase = pages.phases(page)[-1]
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
    self.compiled, self.state, self.batch = heap.Kept(compiled), state, batch
    self.metrics = None

  def run(self, steps: int) -> float:
    """Milliseconds a step, over so many."""
    jax.block_until_ready((self.state, self.batch))
    begin = time.perf_counter()
    for _ in range(steps):
      self.state, self.metrics = self.compiled(self.state, self.batch)
    jax.block_until_ready((self.state, self.metrics))
    return (time.perf_counter() - begin) * 1000 / steps


def compiled(
  lower: Callable[[], jax.stages.Lowered], run: bool = True, alone: bool = True
) -> tuple[Any, float]:
  """(compiled, the seconds that it took with tracing); with `run` False a CPU's only to be read.

  With `alone` False XLA shares out what devices do: it cannot share out a call of oneDNN.
  """
  begin = time.perf_counter()
  if not run:
    program = unrun.compiled(lower())
  elif alone and jax.default_backend() == "cpu":
    program = onednn.compiled(lower)
  else:
    program = lower().compile()
  return program, time.perf_counter() - begin


def _host_cpu() -> list[Any]:
  """The host's CPU, on which what is only counted is lowered.

  Raises:
    UserError: JAX_PLATFORMS hides it.
  """
  try:
    return jax.devices("cpu")[:1]
  except RuntimeError:
    raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms}: without the host's CPU nothing "
                    "counts operations; accepted: with cpu after a comma, or unset") from None


def counted(lowered: jax.stages.Lowered) -> float | None:
  """Floating point operations by XLA's count; None on a GPU or TPU, whose plug-in counts none.

  What is lowered to be run on a CPU may call oneDNN, of which XLA counts nothing (see `compiled`).
  """
  return (lowered.cost_analysis() or {}).get("flops")


_COUNTED: dict[str, float] = {}  # by page and phase: more devices have the same share each


def flops(page: Any, phase: str, devices: int = 1) -> float:
  """Floating point operations of an update, over all devices: XLA's count, before it compiles.

  Of one small batch on one device, times how many there are: a program's own count sees a loop's
  body once, and each device updates all params. Counted for the host's CPU: a GPU's or TPU's
  plug-in counts nothing before it compiles.
  """
  page = copy.deepcopy(page)
  each = page.phases[phase].accumulation
  page.phases[phase].accumulation = 1
  page.data.batch_size //= devices
  key = json.dumps([page.to_dict(), phase])
  if key not in _COUNTED:
    _COUNTED[key] = counted(build(page, phase, _host_cpu()).lower_train_step())
  return devices * each * _COUNTED[key]


def moved(text: str) -> float | None:
  """Bytes that one run of a device's program moves; None where its text does not tell."""
  try:
    return sum(traffic.moved(text).values())
  except traffic.UnknownLoop:
    return None


class Ceilings(NamedTuple):
  """What a device reaches, measured and by its data sheet.

  Attributes:
    multiplied: floating point operations a second of a matrix product in the step's precision.
    copied: bytes read and written a second.
    sheet: the data sheet's operations a second in bfloat16; None where it is not known.
  """

  multiplied: float
  copied: float
  sheet: float | None


@functools.cache
def ceilings_here(precision: str) -> Ceilings:
  device = jax.devices()[0]
  known = chips.sheet_of(device.device_kind)
  return Ceilings(ceilings.matmul_rate(device, precision), ceilings.copy_rate(device),
                  known.flops if known else None)


def efficiency(
  milliseconds: float, operations: float, accessed: float | None, devices: int, held: Ceilings
) -> dict[str, Any]:
  """How near a step is to the machine.

  Args:
    operations: of a step, over all devices.
    accessed: bytes that a device moves.

  Returns:
    mfu: share of the devices' measured matmul ceiling; None on a CPU, where it is
    `ceiling_share` alone; the bound of its own program (the longer of its arithmetic at that
    ceiling and its bytes at the copies' rate), and the step's time over it.
  """
  arithmetic = 1000 * operations / devices / held.multiplied
  memory = None if accessed is None else 1000 * accessed / held.copied
  bound = max(arithmetic, memory or 0.0)
  share = arithmetic / milliseconds
  accelerator = jax.devices()[0].platform != "cpu"
  return {
    "mfu": share if accelerator else None, "ceiling_share": rounded(share),
    "data_sheet_share": None if held.sheet is None else rounded(
      1000 * operations / devices / held.sheet / milliseconds),
    "matmul_flops_per_second": rounded(held.multiplied),
    "copy_bytes_per_second": rounded(held.copied), "bytes_per_device": accessed,
    "roofline_ms": rounded(bound), "bound_by": "memory" if (memory or 0) > arithmetic else
    "arithmetic", "step_over_roofline": rounded(milliseconds / bound)}
