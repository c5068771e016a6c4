"""Compilers of chips that are not here: devices to compile for, not to run on.

Needs the chip's plug-in alone: libtpu for a TPU; jax-cuda13-plugin, jax-cuda13-pjrt and
nvidia-cuda-nvcc for a GPU. JAX is told to be a CPU's, or it would look for the chip.
"""

from __future__ import annotations

import importlib.util
import os

TPU = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
_HOPPER = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: %d l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: %d registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 } }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "%s" """
GPU = {
  "h100": _HOPPER % (3_352_320_000_000, 84_942_979_072, "H100"),
  "h200": _HOPPER % (4_800_000_000_000, 151_397_597_184, "H200")}
NAMES = (*GPU, *TPU)


def missing(target: str) -> str | None:
  """What is to be installed for a target, or None where nothing is."""
  if target in TPU:
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed"
  plugins = importlib.util.find_spec("jax_plugins")
  there = plugins and any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))
  return None if there else "no CUDA plug-in of JAX is installed"


def prepare() -> None:
  """To be called before JAX is imported."""
  os.environ.update(
    JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="", TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-8", TPU_LOG_DIR="disabled",
    JAX_ENABLE_COMPILATION_CACHE="false", TF_CPP_MIN_LOG_LEVEL="3")


def device(target: str):
  """One compile-only device of a target. A second process with libtpu waits or is refused."""
  from jax.experimental import topologies

  if target in TPU:
    found = topologies.get_topology_desc(platform="tpu", topology_name=TPU[target])
  else:
    found = topologies.get_topology_desc(
      platform="cuda", topology_name="", topology="1x1x1", target_config=GPU[target])
  return found.devices[0]
