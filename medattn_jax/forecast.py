"""What a page's train step costs a target: compiled in a process apart, read, and reckoned.

Nothing runs and nothing is allocated. The times are a model (programs/roofline.py): real runs are
slower, and the model serves to compare two programs, or to see what bounds one.
"""

from __future__ import annotations

import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_collections

from medattn_jax import config, experiment, files
from medattn_jax.errors import UserError
from medattn_jax.programs import apart, chips, places, report, roofline, traffic, unrun
from medattn_jax.programs.report import Report
from medattn_jax.programs.roofline import Bound

# Of a GPU's memory, what is left to cuDNN's workspaces, NCCL's buffers and the driver's context:
# its compiler knows of none of them. [choice]
MARGIN = 0.08
# Near its memory's end a GPU's compiler computes things again, which takes it minutes and hides how
# much is missing. Here a program keeps what it is written to keep (phases.P.remat).
_AS_WRITTEN = {"xla_gpu_memory_limit_slop_factor": 10_000}
_NEEDS = re.compile(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Forecast(NamedTuple):
  """Of one phase's train step. Bytes and operations are those of one device and one update.

  Attributes:
    phase, target: what was compiled, for what; `kind` as JAX names the device.
    devices, images: of all devices; the images of one update.
    leaves: of the state, each of which should be donated but for those `unread`.
    needs, memory: bytes that it needs at its peak, and that a program may have; None: not known.
    lowering, compiling: seconds.
    report: of the compiled program; None where the compiler refused it for its memory.
    flops, accessed, cycles, seconds: as in the report, but a loop counted as often as it runs; and
      where the compiler gives none: FLOPs by the program before compilation, bytes by its text.
    bound: its time by the chip's data sheet; None where there is none.
    places: where the cycles go, or the bytes where the compiler counts no cycles.
  """

  phase: str
  target: chips.Target
  kind: str
  devices: int
  images: int
  dtype: str
  leaves: int
  unread: int
  needs: int | None
  memory: int | None
  lowering: float
  compiling: float
  report: Report | None
  flops: float | None
  accessed: float | None
  hbm: float | None
  cycles: int | None
  seconds: float | None
  bound: Bound | None
  places: places.Places | None

  @property
  def fits(self) -> bool:
    """Whether the program has room: by the compiler's word, or by its peak less a GPU's margin."""
    if self.report is None or self.target.tpu or self.memory is None:
      return self.report is not None
    return self.needs <= self.memory * (1 - MARGIN if self.target.gpu else 1)

  @property
  def rate(self) -> float | None:
    """Images a second of all devices, by the model."""
    return self.images / self.bound.seconds if self.bound else None

  def row(self) -> dict[str, Any]:
    """As one JSON object."""
    found = {
      "phase": self.phase, "target": str(self.target), "device_kind": self.kind,
      "devices": self.devices, "batch": self.images, "dtype": self.dtype, "fits": self.fits,
      "lower_seconds": round(self.lowering, 2), "compile_seconds": round(self.compiling, 2),
      "flops_per_step": self.flops, "bytes_accessed": self.accessed,
      "hbm_bytes": self.hbm, "cycles": self.cycles,
      "compiler_ms": self.seconds and 1e3 * self.seconds,
      "peak_memory_bytes": self.needs, "memory_bytes": self.memory, "leaves": self.leaves,
      "unread": self.unread}
    if self.report:
      own = self.report.row()
      found |= {key: own[key] for key in (
        "collectives", "synchronous", "inside", "wire_bytes", "donated", "arguments",
        "temporaries")}
    if self.bound:
      found["model"] = {
        "step_ms": 1e3 * self.bound.seconds, "by": self.bound.by,
        "arithmetic_ms": 1e3 * self.bound.arithmetic, "memory_ms": 1e3 * self.bound.memory,
        "collectives_ms": 1e3 * self.bound.collectives,
        "images_per_second_per_chip": self.rate / self.devices}
    return found


def of(page: ml_collections.ConfigDict, phase: str, target: chips.Target, depth: int = 3,
       largest: int = 0, keep: str | None = None) -> Forecast:
  """Compiles a phase of a page for a target, in a process apart.

  Args:
    depth: of the module path by which `places` gathers.
    largest: how many instructions `places` lists one by one; 0: no places at all.
    keep: a file for the compiled program's text.

  Raises:
    UserError: the batch does not divide over the target's devices, the target's plug-in is not
      installed, or its compiler failed for another reason than memory.
  """
  return apart.run(
    _compile, config.to_dict(page), phase, target, depth, largest, keep, target=target)


def _compile(values, phase, target, *how) -> Forecast:
  return here(config.from_dict(values), phase, target, chips.devices(target), *how)


def here(page: ml_collections.ConfigDict, phase: str, target: chips.Target, devices: Sequence[Any],
         depth: int = 3, largest: int = 0, keep: str | None = None) -> Forecast:
  """`of`, in a process that is the target's already, on some of its devices."""
  import jax

  experiment.check(page, len(devices))
  now = experiment.build(page, phase, devices)
  sheet, kind = target.sheet or chips.sheet_of(devices[0].device_kind), devices[0].device_kind
  start = time.monotonic()
  lowered = now.lower_train_step()
  middle = time.monotonic()
  found = Forecast(
    phase=phase, target=target, kind=kind, devices=len(devices), images=now.images,
    dtype=page.precision, leaves=len(jax.tree.leaves(now.abstract_state)), unread=0,
    needs=None, memory=_memory(devices[0], sheet), lowering=middle - start, compiling=0.0,
    report=None, flops=None, accessed=None, hbm=None, cycles=None, seconds=None,
    bound=None, places=None)
  try:
    if target.chip == chips.CPU:
      compiled = unrun.compiled(lowered)
    else:
      compiled = lowered.compile(compiler_options=_AS_WRITTEN if target.gpu else {})
  except jax.errors.JaxRuntimeError as error:
    text = " ".join(str(error).split())
  else:
    found = found._replace(compiling=time.monotonic() - middle)
    if keep:
      files.write_bytes(pathlib.Path(keep), compiled.as_text().encode())
    return _read(found, now, lowered, compiled, depth, largest, sheet)
  if "RESOURCE_EXHAUSTED" not in text:
    raise UserError(f"target {target}: its compiler failed: {text[:400]}")
  return found._replace(compiling=time.monotonic() - middle, needs=_needed(text))


def _read(found, now, lowered, compiled, depth, largest, sheet) -> Forecast:
  text, told = compiled.as_text(), report.read(compiled)
  near = traffic.VMEM if told.cycles else None
  try:
    accessed = hbm = float(sum(traffic.moved(text, near).values()))
    if told.cycles and told.accessed:  # a TPU's counts what stays on the chip too, by its own rule
      accessed = told.accessed * traffic.repeats(text)
  except traffic.UnknownLoop:
    accessed = hbm = told.accessed
  # What XLA says of a loop is said of one round.
  flops = told.flops if now.page.accumulation == 1 else None
  if flops is None:
    flops = _lowered_flops(now)
  read = sum(name.startswith("state") for name in report.inputs(lowered))
  found = found._replace(
    report=told, unread=found.leaves - read, needs=told.peak, flops=flops,
    accessed=accessed, hbm=hbm, cycles=told.cycles, seconds=told.seconds,
    places=places.of(text, depth, largest) if largest else None)
  if sheet is None or flops is None or hbm is None:
    return found
  return found._replace(bound=roofline.bound(
    flops, hbm, sum(told.wire.values()), len(told.collectives), found.devices, sheet, told.seconds,
    found.target.hosts))


def _lowered_flops(now: experiment.Experiment) -> float | None:
  """Operations of a device's update, by its program before compilation, on the host's CPU."""
  import jax

  page = now.config.copy_and_resolve_references()
  rounds, page.phases[now.phase].accumulation = now.page.accumulation, 1
  try:
    devices = jax.devices("cpu")[: now.mesh.size]
  except RuntimeError:  # JAX_PLATFORMS hides it
    return None
  if len(devices) < now.mesh.size:
    devices, page.data.batch_size = devices[:1], page.data.batch_size // now.mesh.size
  alone = experiment.build(page, now.phase, devices).lower_train_step()
  return rounds * alone.cost_analysis()["flops"]  # of one device: what is mapped over them counts


def _memory(device: Any, sheet: chips.Chip | None) -> int | None:
  if sheet:
    return sheet.memory
  if device.platform == "cpu":
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return (device.memory_stats() or {}).get("bytes_limit")


def _needed(text: str) -> int | None:
  """Bytes that a compiler which refused a program said it needs."""
  found = _NEEDS.search(text)
  if not found:
    return None
  number, unit = [part for part in found.groups() if part]
  return int(float(number) * _UNITS[unit])
