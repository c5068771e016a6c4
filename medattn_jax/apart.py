"""What XLA's CPU is not to join to its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def call(function: Callable[..., jax.Array], *given: Any) -> jax.Array:
  """function(*given), in a call that is not inlined: given and answer lie in memory.

  Where a function turns axes or makes choices, XLA's CPU else computes what it is given again for
  each use, number by number. (It does not keep an optimization barrier.)
  """
  return set_xla_metadata(jax.jit(function)(*given), inlineable="false")
