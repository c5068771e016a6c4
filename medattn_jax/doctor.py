"""What is installed, which devices there are, how fast they multiply, and what to mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from medattn_jax.programs import ceilings

LIBRARIES = (
  ("medattn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  + ("tensorflow", "tensorflow-cpu", "tensorflow-datasets", "clu", "pillow", "simplejpeg")
  + ("scikit-learn", "matplotlib", "safetensors", "torch", "libtpu")
)


def run() -> None:
  """Prints the versions, the devices with their memory and matmul rates, and advice."""
  out = rich.console.Console(soft_wrap=True)
  table = _table("Versions", ("library", "version"))
  table.add_row("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
  found = versions()
  for name, version in found.items():
    table.add_row(name, version or "not installed")
  out.print(table)

  try:
    import jax

    devices = jax.local_devices()
  except Exception as error:  # a broken driver is what a doctor is asked about
    out.print(f"\nJAX finds no devices: {' '.join(str(error).split())}", markup=False)
    devices = []
  table = _table(
    "Devices",
    ("device", "kind", "memory", "in use", "float32 TFLOP/s", "bfloat16 TFLOP/s"),
    justify="right",
  )
  for kind in dict.fromkeys(device.device_kind for device in devices):
    alike = [device for device in devices if device.device_kind == kind]
    limit, used = memory(alike[0])
    rates = [f"{ceilings.matmul_rate(alike[0], dtype) / 1e12:.2f}"
             for dtype in ("float32", "bfloat16")]
    name = f"{len(alike)} × {alike[0].platform}" if len(alike) > 1 else alike[0].platform
    table.add_row(name, kind, limit, used, *rates)
  if devices:
    out.print(table)

  lines = advice(found, {device.platform for device in devices}, os.environ, accelerators())
  out.print("\nAdvice", style="bold")
  for line in lines or ["nothing to mend"]:
    out.print(f"• {line}", markup=False, highlight=False)


def versions() -> dict[str, str | None]:
  """The installed version of each library, None where there is none. Imports none of them."""
  found: dict[str, str | None] = {}
  for name in LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return found


def memory(device: Any) -> tuple[str, str]:
  """(limit, in use) of a device, in words; the host's memory for a CPU."""
  stats = device.memory_stats() or {}
  limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
  if device.platform == "cpu":
    page = os.sysconf("SC_PAGE_SIZE")
    limit = os.sysconf("SC_PHYS_PAGES") * page
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
      used = limit - os.sysconf("SC_AVPHYS_PAGES") * page
  return _gib(limit), _gib(used)


def accelerators() -> set[str]:
  """The kinds of accelerators this host has drivers for: "cuda", "tpu"; seen without JAX."""
  found = set()
  if any(pathlib.Path("/dev").glob("nvidia[0-9]*")):
    found.add("cuda")
  if any(pathlib.Path("/dev").glob("accel[0-9]*")) or importlib.util.find_spec("libtpu"):
    found.add("tpu")
  return found


def advice(
  found: Mapping[str, str | None],
  platforms: set[str],
  environment: Mapping[str, str],
  present: set[str],
) -> list[str]:
  """What is worth mending, in order of weight.

  Args:
    found: library → version or None.
    platforms: the platforms of JAX's devices ("cpu", "gpu", "tpu").
    environment: variables.
    present: what `accelerators` sees.
  """
  lines, flags = [], environment.get("XLA_FLAGS", "")
  forced = environment.get("JAX_PLATFORMS", "")
  if platforms <= {"cpu"}:
    if forced and "cpu" in forced.split(",") and present:
      lines.append(f"JAX_PLATFORMS={forced} hides the accelerator: unset it to use it")
    elif "cuda" in present:
      lines.append(
        "an NVIDIA GPU is here and JAX does not use it: pip install 'medattn_jax[cuda12]'"
        " (or [cuda13], by the driver)"
      )
    elif "tpu" in present:
      lines.append("a TPU is here and JAX does not use it: pip install 'medattn_jax[tpu]'")
    else:
      lines.append("no accelerator: the demo page trains on a CPU; the papers' pages need more")
  if found.get("jax") and found.get("jaxlib") and found["jax"] != found["jaxlib"]:
    lines.append(f"jax {found['jax']} and jaxlib {found['jaxlib']} differ: install them together")
  tensorflow = found.get("tensorflow") or found.get("tensorflow-cpu")
  if not tensorflow or not found.get("tensorflow-datasets"):
    lines.append("no TensorFlow: predict and load() need none; train, evaluate and prepare do")
  if found.get("tensorflow") and platforms & {"gpu", "tpu"}:
    lines.append("tensorflow-cpu is enough for the data, and starts faster than tensorflow")
  if "gpu" in platforms:
    if environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() == "false":
      lines.append("XLA_PYTHON_CLIENT_PREALLOCATE=false: memory may end in small pieces, unset it")
    elif "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environment:
      lines.append(
        "JAX takes three quarters of the GPU's memory at the start; where it has the GPU to itself,"
        " XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 gives it more"
      )
  if "xla_force_host_platform_device_count" in flags:
    lines.append(f"XLA_FLAGS={flags} splits the CPU into devices: for tests; hardly faster")
  if sys.version_info < (3, 12):
    lines.append("Python 3.11 ends at jax 0.10; newer ones need Python 3.12")
  return lines


def _table(title: str, columns: Sequence[str], justify: str = "left") -> rich.table.Table:
  table = rich.table.Table(title=title, title_justify="left", title_style="bold")
  for number, column in enumerate(columns):
    table.add_column(column, justify=justify if number > 1 else "left")
  return table


def _gib(count: int | None) -> str:
  return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
