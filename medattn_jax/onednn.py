"""On a CPU oneDNN convolves and multiplies: jaxlib has it, and it takes a quarter to a half less.

XLA's passes never call it in JAX's build, but what comes after them can. So its calls are made
here, in the words of those passes. XLA promises nothing of these, and ends the process where it
cannot read them: they are made with jaxlibs that were tried, on processors for which all that is
asked of oneDNN is fast. Everywhere else XLA's own convolutions and products stay.

XLA cannot store a program that has such a call: it must not come into JAX's compilation cache, and
is compiled at each start. So only what `compiled` makes has them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import pathlib
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jaxlib
from jaxtyping import Float

JAXLIBS = ("0.10.0", "0.10.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0",
           "0.12.0.1")  # tried
CPUINFO = pathlib.Path("/proc/cpuinfo")
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}  # without, some calls are 1000× slower
_WORTH = 2**23  # multiplications; below, a call costs as much as it saves
_TINY = 6  # rows or columns that a convolution gives; below, XLA's is the faster one
_SMALL, _WIDE, _TOGETHER = 16**2, 128, 16  # pixels, channels, images of a kernel's gradient
_TALL, _ROWS = 32, 14  # rows that a kernel's gradient is summed over: more, in parts of so many
_LEAST = "jax_persistent_cache_min_compile_time_secs"  # below, JAX stores no program

_NAME = "__onednn$"  # begins those of the calls
_here = threading.local()


class _Cache:
  """JAX's: at a time there are threads whose programs are stored, or one whose program is not."""

  def __init__(self):
    self.storing = 0  # threads; -1: none may
    self.changed = threading.Condition()

  @contextlib.contextmanager
  def begun(self, free: Callable[[], bool], by: int) -> Iterator[None]:
    """Waits until it is free, then counts `by` threads that store."""
    with self.changed:
      self.changed.wait_for(free)
      self.storing += by
    try:
      yield
    finally:
      with self.changed:
        self.storing -= by
        self.changed.notify_all()


_cache = _Cache()


@functools.cache
def available() -> bool:
  """Whether this process may call oneDNN."""
  if (jaxlib.__version__ not in JAXLIBS or platform.system() != "Linux"
      or "ONEDNN_MAX_CPU_ISA" in os.environ):
    return False
  lines = CPUINFO.read_text().splitlines()
  flags = next((line for line in lines if line.startswith("flags")), "")
  return platform.machine() == "x86_64" and set(flags.split()) >= _NEEDED


def compiled(lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
  """lower().compile() for the CPU, with oneDNN's calls where it takes them, and then not stored."""
  if not available():
    return lower().compile()
  with used():
    lowered = lower()
  with _unstored() if _NAME in lowered.as_text() else stored():
    return lowered.compile()


@contextlib.contextmanager
def used() -> Iterator[None]:
  """What this thread traces within for the CPU calls oneDNN, and must not be stored."""
  # By a precision that a CPU has anyway JAX tells what is traced here from what is not.
  with jax.default_matmul_precision("float32"):
    _here.used = True
    try:
      yield
    finally:
      _here.used = False


def stored() -> contextlib.AbstractContextManager[None]:
  """What is compiled within comes into JAX's cache, whatever other threads do."""
  return _cache.begun(lambda: _cache.storing >= 0, 1)


@contextlib.contextmanager
def _unstored() -> Iterator[None]:
  """What any thread compiles meanwhile is not, but for what waits in `stored`."""
  with _cache.begun(lambda: _cache.storing == 0, -1):
    least = getattr(jax.config, _LEAST)
    jax.config.update(_LEAST, math.inf)
    try:
      yield
    finally:
      jax.config.update(_LEAST, least)


def takes(products: int, dtype: Any) -> bool:
  """Whether oneDNN is to do so many multiplications of this dtype."""
  return _in_use() and dtype == "float32" and products >= _WORTH


def _in_use() -> bool:
  return getattr(_here, "used", False)


def convolve(
  x: Float[jax.Array, "b 1 h w c"], kernel: Float[jax.Array, "k l c d"], stride: int,
  padding: Sequence[tuple[int, int]], turned: bool = False,
) -> Float[jax.Array, "b 1 h2 w2 d"] | None:
  """The convolution of x with so many rows, and columns, of zeros before and behind it.

  None where XLA's own is to be taken. A `turned` kernel is [k, l, d, c].
  """
  if not _in_use():
    return None
  sides = [(side + sum(around) - taps) // stride + 1
           for side, around, taps in zip(x.shape[2:4], padding, kernel.shape, strict=False)]
  products = len(x) * math.prod(sides) * kernel.size
  if min(sides) < _TINY or not takes(products, x.dtype):
    return None
  inside, outside = (4, 3) if turned else (3, 4)
  return _convolution(
    x, (0, 4, 1, 2, 3), kernel[None], (inside, outside, 0, 1, 2), [(0, 0), *padding],
    {"strides": [1, stride, stride], "window_dilations": [1] * 3},
    (len(x), 1, *sides, kernel.shape[outside - 1]))


def kernel_gradient(
  x: Float[jax.Array, "h w c b"], gradient: Float[jax.Array, "b 1 h2 w2 d"], stride: int,
  padding: Sequence[tuple[int, int]],
) -> Float[jax.Array, "k l c d"]:
  """Of a convolution's kernel, of its features turned and its output's gradient.

  A convolution in three dimensions, rows, columns and channels, the gradient its kernel and the
  batch what is summed over: so oneDNN has full rows of channels to multiply.
  """
  *sides, channels, batch = x.shape
  rows, (before, _) = gradient.shape[2], padding[0]
  if rows > _TALL:
    # All at once such a gradient, here the kernel, is larger than a core's second cache.
    taps = sides[0] + sum(padding[0]) - stride * (rows - 1)
    parts = []
    for first in range(0, rows, _ROWS):
      last = min(first + _ROWS, rows)
      begin, end = stride * first - before, stride * (last - 1) + taps - before
      parts.append(kernel_gradient(
        x[max(0, begin):end], gradient[:, :, first:last], stride,
        [(max(0, -begin), max(0, end - sides[0])), padding[1]]))
    return sum(parts)
  if math.prod(sides) <= _SMALL and channels < _WIDE and batch > _TOGETHER:
    # All at once such features are read from the third cache, again for each tap.
    parts = range(0, batch, _TOGETHER)
    return sum(kernel_gradient(x[..., part:part + _TOGETHER], gradient[part:part + _TOGETHER],
                               stride, padding) for part in parts)
  taps = [side + sum(around) - stride * (out - 1) for side, around, out in zip(
    sides, padding, gradient.shape[2:4], strict=True)]
  return _convolution(
    x[None], (0, 4, 1, 2, 3), gradient, (0, 4, 2, 3, 1), [*padding, (0, 0)],
    {"strides": [1] * 3, "window_dilations": [stride, stride, 1]},
    (1, *taps, channels, gradient.shape[-1]))[0]


def _convolution(x, axes, kernel, kernel_axes, padding, window, shape):
  """Axes: of batch and features, or of features in and out; then those of space."""

  def data(batch, feature, *space):
    return {"dims": x.ndim, "data": {
      "batch_dim": batch, "feature_dim": feature, "spatial_dims": space}}

  inside, outside, *space = kernel_axes
  before, behind = zip(*padding, strict=True)
  return _call("convolution", "conv", {
    "dims": x.ndim, "feature_groups": 1, "input": data(*axes), "output": data(*axes),
    "kernel": {"dims": x.ndim, "filter": {
      "input_feature_dim": inside, "output_feature_dim": outside, "spatial_dims": space}},
    "window": {"pad_left": before, "pad_right": behind, **window}}, shape, x, kernel)


def multiply(
  a: Float[jax.Array, "*batch m k"], b: Float[jax.Array, "*batch k n"],
  turned: tuple[bool, bool] = (False, False),
) -> Float[jax.Array, "*batch m n"]:
  """a @ b; either may be given turned, as [k, m] or [n, k]."""
  shape = (*a.shape[:-2], a.shape[-1 if turned[0] else -2], b.shape[-2 if turned[1] else -1])
  words = {"transpose_a": turned[0], "transpose_b": turned[1]}
  return _call("matmul", "matmul", words, shape, a, b)


def _call(target, config, words, shape, *arrays):
  """Version 2 of XLA's calls is the one whose words are a string."""
  call = jax.ffi.ffi_call(
    f"{_NAME}{target}", jax.ShapeDtypeStruct(shape, arrays[0].dtype), custom_call_api_version=2,
    legacy_backend_config=json.dumps({f"onednn_{config}_config": words}))
  return call(*arrays)
