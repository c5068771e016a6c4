"""A CPU's program that is read and never run, compiled with the least effort."""

from __future__ import annotations

from typing import Any

import jax

# Its instructions need no polish. The older emitters of fusions take half the time; a compiler that
# has them no more refuses the option.
_PLAIN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_OPTIONS = (_PLAIN | {"xla_cpu_use_fusion_emitters": False}, _PLAIN)


def compiled(lowered: jax.stages.Lowered) -> Any:
  """The program of a CPU, good to be read: collectives, memory, donated buffers, text."""
  first, second = _OPTIONS
  try:
    return lowered.compile(compiler_options=first)
  except jax.errors.JaxRuntimeError:
    return lowered.compile(compiler_options=second)
