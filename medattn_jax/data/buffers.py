"""Arrays for batches, used again and again."""

from __future__ import annotations

import math
import sys

import numpy as np


class Buffers:
  """uint8 arrays of one shape, handed out again once nobody refers to them any more.

  A view, and an array JAX made without a copy, hold a reference to what they show. They begin where
  JAX's CPU needs no copy: at a multiple of 64 bytes.
  """

  KEPT = 4

  def __init__(self, shape: tuple[int, ...]):
    self._shape = shape
    self._arrays: list[np.ndarray] = []  # flat, and larger
    probe = [object()]
    self._idle = sys.getrefcount(probe[0])

  def take(self, others: int) -> np.ndarray:
    """One that is free; so many `others`, beside those KEPT, are not to be forgotten."""
    for number in range(len(self._arrays)):
      if sys.getrefcount(self._arrays[number]) == self._idle:
        return self._shown(number)
    flat = np.empty(math.prod(self._shape) + 64, np.uint8)
    self._arrays = [*self._arrays[1 - self.KEPT - others :], flat]
    del flat
    return self._shown(-1)

  def _shown(self, number: int) -> np.ndarray:
    flat = self._arrays[number]
    start = -flat.__array_interface__["data"][0] % 64
    return flat[start : start + math.prod(self._shape)].reshape(self._shape)
