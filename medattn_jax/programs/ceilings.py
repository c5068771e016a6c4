"""What a device that is here reaches: its matrix products and its copies, measured.

A step's share of them says how near it is to the machine, where a data sheet tells of another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_SECONDS = 0.25  # of all measuring of a rate, about


def matmul_rate(device: Any, dtype: str) -> float:
  """Floating-point operations a second of a square matrix product, the best of a few on `device`.

  The size doubles until one product takes long enough to be timed, so that a CPU answers within a
  second or two and an accelerator is kept busy.
  """
  import jax
  import jax.numpy as jnp

  # As a network's layers run: float32 in float32, not in the reduced passes of a GPU or TPU.
  precision = "highest" if dtype == "float32" else "default"
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
  size, best = 256, 0.0
  while True:
    key = jax.device_put(jax.random.key(0), device)
    a = jax.random.normal(key, (size, size), dtype)
    seconds = _each(lambda: multiply(a, a), device)  # noqa: B023 (called at once)
    best = max(best, 2 * size**3 / seconds)
    if seconds > _SECONDS / 16 or size >= 16384:
      return best
    size *= 2


def copy_rate(device: Any) -> float:
  """Bytes read and written a second by a pass over a large array, which no cache holds."""
  import jax
  import jax.numpy as jnp

  on_cpu = device.platform == "cpu"
  count = 2**26 if on_cpu else 2**29  # numbers of 4 bytes
  held = [jnp.zeros(count, jnp.uint32, device=device)]
  # A copy could be another name of the same bytes. On a CPU in place: new pages cost it more.
  flip = jax.jit(jnp.invert, donate_argnums=(0,) if on_cpu else ())

  def call():
    result = flip(held[0])
    if on_cpu:
      held[0] = result
    return result

  return 8 * count / _each(call, device)


def _each(call: Callable[[], Any], device: Any) -> float:
  """Seconds of a call, of a few in a row, once it is compiled."""
  call().block_until_ready()
  start, rounds, seconds = time.perf_counter(), 0, 0.0
  while seconds < _SECONDS / 4 and rounds < 8:
    result = call()
    if device.platform == "cpu":  # its queue holds the results of all rounds
      result.block_until_ready()
    rounds, seconds = rounds + 1, time.perf_counter() - start
  result.block_until_ready()
  return (time.perf_counter() - start) / rounds
