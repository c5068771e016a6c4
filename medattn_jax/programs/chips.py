"""Chips by name: their data sheets, and their compilers where no such chip is at hand.

A target is a chip's name, or a chip's name and a topology: "v5e" is one chip, "v5e:2x4" eight of
them, "h200:8" eight GPUs of one host, "h200:2x8" two such hosts. To compile for one needs the
chip's plug-in alone: libtpu for a TPU; jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc for
a GPU. JAX is told to be a CPU's, or it would look for the chip. Two targets need no plug-in and
have no data sheet: "cpu:8" is eight devices of a CPU, "here" whatever JAX finds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from medattn_jax.errors import UserError, nearest


class Chip(NamedTuple):
  """A data sheet.

  Attributes:
    flops: bfloat16 floating point operations a second, dense.
    bandwidth: of its memory, bytes a second.
    memory: bytes that a program may have, as its compiler or its driver says.
    link: bytes a second that it sends while a ring reduces: of a TPU to its two neighbours of ONE
      ring, as much to each (a second ring, of the torus's other axis, is not counted on); of a GPU
      through its switch. One way: it receives as many meanwhile.
    clock: cycles a second by which the compiler's cycles become time; None where it counts none.
      Not published: what the peak needs of the chip's matrix units.
    one, topology: the topology's name of which one chip is taken; what a topology looks like.
    network: bytes a second to chips of other hosts, one way; as `link` where that leads there too.
  """

  flops: float
  bandwidth: float
  memory: int
  link: float
  clock: float | None
  one: str
  topology: str
  network: float


GIB = 2**30
# cloud.google.com/tpu/docs/{v5e,v5p,v6e}: FLOPs, bandwidth, and 400, 1200 and 800 GB/s of links
# both ways over 4, 6 and 4 of them; of a link's 50, 100, 100 GB/s one way, 45, 90, 90 are what
# jax-ml.github.io/scaling-book/tpus reckons with. Memory: what libtpu says where a program is too
# large. NVIDIA's data sheets of the H100 SXM and H200 SXM: half of their FLOPs with sparsity, half
# of NVLink's 900 GB/s both ways; memory and bandwidth as XLA's target files have them, and of the
# network one 400 Gbit/s adapter a GPU, as in a DGX.
CHIPS = {
  "v5e": Chip(197e12, 819e9, int(15.75 * GIB), 90e9, 1.5e9, "2x2", r"\d+x\d+", 90e9),
  "v5p": Chip(459e12, 2765e9, int(95.74 * GIB), 180e9, 1.75e9, "2x2x1", r"\d+x\d+x\d+", 180e9),
  "v6e": Chip(918e12, 1638e9, int(31.25 * GIB), 180e9, 1.75e9, "2x4", r"\d+x\d+", 180e9),
  "h100": Chip(989e12, 3352e9, 84_942_979_072, 450e9, None, "1", r"(\d+x)?\d+", 50e9),
  "h200": Chip(989e12, 4800e9, 151_397_597_184, 450e9, None, "1", r"(\d+x)?\d+", 50e9),
}
# JAX's device_kind of a chip that is here.
_KINDS = {
  "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
  "TPU v6e": "v6e"}
CPU, HERE = "cpu", "here"
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

  def __str__(self) -> str:
    return f"{self.chip}:{self.topology}" if self.topology else self.chip

  @property
  def sheet(self) -> Chip | None:
    """None for a CPU and for what is here."""
    return CHIPS.get(self.chip)

  @property
  def count(self) -> int:
    """Chips; of "here" JAX alone knows."""
    return math.prod(map(int, self.topology.split("x"))) if self.topology else 1

  @property
  def hosts(self) -> int:
    """Hosts between which there is the network alone."""
    return int(self.topology.split("x")[0]) if self.gpu and "x" in self.topology else 1

  @property
  def tpu(self) -> bool:
    return self.chip.startswith("v")

  @property
  def gpu(self) -> bool:
    return self.chip in ("h100", "h200")


def target(text: str) -> Target:
  """Raises UserError for a chip that is not known or a topology that is none of its own."""
  chip, colon, topology = text.strip().lower().partition(":")
  known = [*CHIPS, CPU, HERE]
  if chip not in known:
    raise UserError(
      f"target {text!r}{nearest(chip, known)}; accepted: {', '.join(known)}, "
      "alone or with a topology (v5e:2x4, v5p:2x2x1, h200:8, cpu:8)")
  looks = {CPU: r"\d+", HERE: ""}.get(chip) if chip not in CHIPS else CHIPS[chip].topology
  example = {HERE: HERE, CPU: "cpu:8", "v5p": "v5p:2x2x1"}.get(
    chip, f"{chip}:8" if chip.startswith("h") else f"{chip}:2x4")
  sides = topology.split("x")
  if colon and not (re.fullmatch(looks, topology) and all(int(side) for side in sides)):
    raise UserError(f"target {text!r}: topology {topology!r}; accepted: as in {example}")
  return Target(chip, topology)


def sheet_of(kind: str) -> Chip | None:
  """The data sheet of a device that is here, by JAX's word for its kind; None for others."""
  if kind in _KINDS:
    return CHIPS[_KINDS[kind]]
  found = re.search(r"\b(H[12]00)\b", kind)
  return CHIPS.get(found.group(1).lower()) if found and "PCIe" not in kind else None


def missing(wanted: Target) -> str | None:
  """What is to be installed to compile for a target, or None where nothing is."""
  if wanted.tpu and not importlib.util.find_spec("libtpu"):
    return "libtpu is not installed; accepted: after pip install libtpu"
  if not wanted.gpu:
    return None
  plugins = importlib.util.find_spec("jax_plugins")
  if plugins and any(
      importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)):
    return None
  version = importlib.metadata.version("jaxlib")
  return (
    f"no CUDA plug-in of JAX is installed; accepted: after pip install jax-cuda13-plugin=={version}"
    f" jax-cuda13-pjrt=={version} nvidia-cuda-nvcc")


# Of the process that compiles for a chip that is not here, from before it imports JAX.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_LOG_DIR": "disabled", "JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
_SPLIT = re.compile(r"\s*--xla_force_host_platform_device_count=\d+")


def environment(wanted: Target) -> dict[str, str]:
  """What the environment of a process that compiles for a target has to say."""
  if wanted.chip == HERE:
    return {"JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
  # As many of the CPU's: the program before compilation is counted on them. JAX takes their number
  # from one place alone.
  flags = _SPLIT.sub("", os.environ.get("XLA_FLAGS", ""))
  return ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": str(wanted.count), "XLA_FLAGS": flags}


def devices(wanted: Target) -> list[Any]:
  """The devices of a target: compile-only ones but for a CPU and what is here.

  To be asked in a process with its `environment`. A second one with libtpu waits or is refused.

  Raises:
    UserError: there is no such topology.
  """
  import jax
  from jax.experimental import topologies

  chip = wanted.sheet
  if chip is None:
    found = jax.devices()
    return found if wanted.chip == HERE else found[: wanted.count]
  try:
    if wanted.tpu:
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{wanted.chip}:{wanted.topology or chip.one}")
    else:
      found = topologies.get_topology_desc(
        platform="cuda", topology_name="",
        topology=f"1x{wanted.hosts}x{wanted.count // wanted.hosts}",
        target_config=_HOPPER.format(
          bandwidth=int(chip.bandwidth), memory=chip.memory, name=wanted.chip.upper()))
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise UserError(f"target {wanted}: its compiler refuses it: {reason[:300]}") from error
  return list(found.devices[: wanted.count])
