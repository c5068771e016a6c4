"""On a CPU a step works in memory that the heap keeps, and not in new pages each time.

XLA asks for all of a step's temporaries at once and gives them back when it ends. What is above
32 MB glibc takes from the system and returns to it, page by page: a sixth of a small step's time.
But a hole in the heap it keeps, as long as anything lies above it; the heap, that is, of the main
thread, so that this thread must run the program itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_MOST = 2**25 - 2**13  # bytes: once so much was freed, glibc looks to the heap for arrays below it
_PIECE = 2**24  # bytes; several side by side are the hole
_FIRST = 3  # runs of a program without it


def run_in_caller() -> None:
  """Has CPUs run a program in the thread that calls it, where its inputs are there.

  To be said before JAX has its devices. Among several processes nothing changes: there a thread
  that is inside a program could not be told that the others have left.
  """
  if not jax.distributed.is_initialized():
    jax.config.update("jax_cpu_enable_async_dispatch", False)


class Kept:
  """A compiled program; on a CPU with room for its temporaries in the heap.

  To be made and called by the main thread.
  """

  def __init__(self, program: Callable[..., Any]):
    self._program, self._runs, self._above = program, 0, None

  def __call__(self, *given: Any) -> Any:
    # Not before: what first runs leave behind, a few bytes each, would lie in the hole and part it.
    if self._runs == _FIRST and jax.default_backend() == "cpu":
      # Twice what is needed: those of the run before may be given back a moment late.
      self._above = _hole(2 * self._program.memory_analysis().temp_size_in_bytes)
    self._runs += 1
    return self._program(*given)


def _hole(size: int) -> np.ndarray:
  """Makes room for `size` bytes at least, below the array that it returns and as long as that is.

  No page is touched here.
  """
  freed = np.empty(_MOST, np.uint8)
  del freed
  arrays = [np.empty(_PIECE, np.uint8) for _ in range(size // _PIECE + 2)]
  return arrays[-1]
