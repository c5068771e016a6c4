"""Chips by name: their data sheets, and their compilers where no such chip is at hand.

A target is a chip's name, or a chip's name and a topology: "v5e" is one chip, "v5e:2x4" eight of
them, "h200:8" eight GPUs of one host, "h200:2x8" two such hosts. To compile for one needs the
chip's plug-in alone: libtpu for a TPU; jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc for
a GPU. JAX is told to be a CPU's, or it would look for the chip.
"""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any, NamedTuple

from medattn_jax.errors import UserError, nearest


class Chip(NamedTuple):
  """A data sheet.

  Attributes:
    flops: bfloat16 floating point operations a second, dense.
    bandwidth: of its memory, bytes a second.
    memory: bytes that a program may have.
    link: bytes a second to its neighbours, one way, over all links that a ring uses.
    clock: cycles a second by which the compiler's cycles become time; None where it counts none.
    one, topology: the topology's name of which one chip is taken; what a topology looks like.
  """

  flops: float
  bandwidth: float
  memory: int
  link: float
  clock: float | None
  one: str
  topology: str


GIB = 2**30
CHIPS = {
  "v5e": Chip(197e12, 819e9, int(15.75 * GIB), 90e9, 1.5e9, "2x2", r"\d+x\d+"),
  "v5p": Chip(459e12, 2765e9, int(95.74 * GIB), 180e9, 1.75e9, "2x2x1", r"\d+x\d+x\d+"),
  "v6e": Chip(918e12, 1640e9, int(31.25 * GIB), 180e9, 1.75e9, "2x4", r"\d+x\d+"),
  "h100": Chip(989e12, 3352e9, 84_942_979_072, 450e9, None, "1", r"(\d+x)?\d+"),
  "h200": Chip(989e12, 4800e9, 151_397_597_184, 450e9, None, "1", r"(\d+x)?\d+"),
}
_HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
device_description_str: "{name}" """


class Target(NamedTuple):
  """A chip's name and the number and arrangement of them."""

  chip: str
  topology: str

  @property
  def sheet(self) -> Chip:
    return CHIPS[self.chip]

  @property
  def count(self) -> int:
    """Chips."""
    return math.prod(map(int, self.topology.split("x"))) if self.topology else 1

  @property
  def tpu(self) -> bool:
    return self.chip.startswith("v")


def target(text: str) -> Target:
  """Raises UserError for a chip that is not known or a topology that is none of its own."""
  chip, _, topology = text.lower().partition(":")
  if chip not in CHIPS:
    raise UserError(
      f"target {text!r}{nearest(chip, list(CHIPS))}; accepted: {', '.join(CHIPS)}, "
      "alone or with a topology (v5e:2x4, v5p:2x2x1, h200:8)")
  if topology and not re.fullmatch(CHIPS[chip].topology, topology):
    raise UserError(
      f"target {text!r}: topology {topology!r}; accepted: as in "
      f"{ {'v5p': 'v5p:2x2x1'}.get(chip, f'{chip}:2x4')}")
  return Target(chip, topology)


def missing(wanted: Target) -> str | None:
  """What is to be installed to compile for a target, or None where nothing is."""
  if wanted.tpu:
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed"
  plugins = importlib.util.find_spec("jax_plugins")
  there = plugins and any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
  return None if there else "no CUDA plug-in of JAX is installed"


# Of the process that compiles, from before it imports JAX.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_LOG_DIR": "disabled", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}


def devices(wanted: Target) -> list[Any]:
  """The compile-only devices of a target. A second process with libtpu waits or is refused."""
  from jax.experimental import topologies

  chip, arranged = wanted.sheet, wanted.topology or wanted.sheet.one
  if wanted.tpu:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{wanted.chip}:{arranged}")
  else:
    hosts, _, each = arranged.rpartition("x")
    found = topologies.get_topology_desc(
      platform="cuda", topology_name="", topology=f"1x{hosts or 1}x{each}",
      target_config=_HOPPER.format(
        bandwidth=int(chip.bandwidth), memory=chip.memory, name=wanted.chip.upper()))
  return list(found.devices[:wanted.count])
