"""What is written for each platform's compiler by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

_CUDA = ("NVIDIA", "Tesla", "H100", "H200")  # begin the names of its devices, and those of chips.py


def dependent(*given: Any, default: Callable[..., Any], **on: Callable[..., Any]) -> Any:
  """on[platform](*given), or the default's answer: as jax.lax.platform_dependent, but sooner.

  That one leaves the choice to the lowering: it traces and differentiates every function, of which
  all but one are thrown away. What is traced under a mesh, as a step is, need not wait so long.

  Args:
    on: functions for "cpu", "cuda", "tpu".
  """
  platform = traced_for()
  if platform is None:
    return jax.lax.platform_dependent(*given, default=default, **on)
  return on.get(platform, default)(*given)


def traced_for() -> str | None:
  """The platform of the mesh under which this is traced; None where there is none, or no telling.

  (The mesh is part of what JAX keeps traces by, so that none is taken for another platform's.)
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return None
  if device.platform == "gpu":  # of whichever maker
    return "cuda" if device.device_kind.startswith(_CUDA) else None
  return device.platform
