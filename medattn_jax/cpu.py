"""What makes steps fast where the devices are CPUs: glibc's heap, and who multiplies."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
import platform

# Parameters of mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# Left to Eigen are convolutions: YNNPACK runs one of up to 64 features on one core alone.
_YNNPACK = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": _YNNPACK}


def keep_heap() -> bool:
  """One heap that gives nothing back below 2 GiB; to be called before other threads are started.

  XLA's buffers of a step are else new pages each time, a tenth of the step and more. Nothing is
  changed where steps run on an accelerator, where GLIBC_TUNABLES settles it, or without glibc.

  Returns:
    Whether the heap is kept.
  """
  environment = os.environ
  accelerated = accelerators() and environment.get("JAX_PLATFORMS") != "cpu"
  if (accelerated or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
      or platform.libc_ver()[0] != "glibc"):
    return False
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(name, value) for name, value in (
    (_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)))


def accelerators() -> set[str]:
  """The kinds of accelerators this host has drivers for: "cuda", "tpu"; seen without JAX."""
  found = set()
  if any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
    found.add("cuda")
  if any(pathlib.Path("/dev").glob("accel[0-9]*")) or importlib.util.find_spec("libtpu"):
    found.add("tpu")
  return found


def compiler_options(platform: str) -> dict[str, str]:
  """XLA's options for a step on devices of `platform`: none but on a CPU whose XLA knows them."""
  return OPTIONS if platform == "cpu" and _known() else {}


@functools.cache
def _known() -> bool:
  import jax

  try:
    jax.jit(lambda x: x).lower(0.0).compile(compiler_options=OPTIONS)
  except jax.errors.JaxRuntimeError:
    return False
  return True
