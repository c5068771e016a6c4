"""oneDNN's calls give what XLA's own convolutions and products give, and where they must not be
made they are not."""

from __future__ import annotations

import pathlib
import threading

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from medattn_jax import onednn
from medattn_jax.models import convolution

available = pytest.mark.skipif(
  not onednn.available(), reason=f"not with jaxlib {jaxlib.__version__} on this processor")


def drawn(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def slopes(x, kernel, stride, padding):
  """The convolution and its gradients, as one jitted function of x and kernel."""
  def summand(x, kernel):
    y = convolution.convolve(x, kernel, stride, padding)
    return jnp.vdot(y, drawn(2, *y.shape)), y

  return jax.jit(jax.grad(summand, (0, 1), has_aux=True)).lower(x, kernel)


def calls(lowered):
  text = lowered.as_text()
  return text.count("__onednn$convolution"), text.count("__onednn$matmul")


# What is asked for: 3×3s, wide and long kernels, edges that no window reaches, few and many images
# and channels, small features in parts; of x: images, rows, columns, channels.
SHAPES = {
  "a square kernel": ((16, 20, 20, 64), (3, 3, 64, 64), 1, (1, 1), (3, 0)),
  "no padding": ((6, 21, 24, 32), (3, 3, 32, 48), 1, (0, 0), (3, 0)),
  "a row": ((8, 17, 17, 48), (1, 7, 48, 40), 1, (0, 3), (3, 0)),
  "a column": ((8, 17, 19, 48), (7, 1, 48, 40), 1, (3, 0), (3, 0)),
  "at stride 2": ((16, 24, 24, 64), (3, 3, 64, 48), 2, (1, 1), (2, 1)),
  "at stride 2, a row left over": ((16, 24, 23, 64), (3, 3, 64, 48), 2, (0, 0), (2, 1)),
  "at stride 2, many taps": ((8, 40, 40, 3), (7, 7, 3, 64), 2, (3, 3), (2, 0)),
  "at stride 2, many taps and rows": ((4, 80, 40, 3), (7, 7, 3, 64), 2, (3, 3), (4, 0)),
  "small features of many images": ((40, 14, 14, 48), (3, 3, 48, 64), 1, (1, 1), (5, 0)),
  "tiny features": ((16, 4, 4, 256), (3, 3, 256, 128), 1, (1, 1), (1, 1)),
  "to tiny ones": ((16, 6, 7, 256), (3, 3, 256, 128), 2, (1, 1), (1, 1)),
  "three channels": ((8, 64, 64, 3), (5, 5, 3, 32), 1, (2, 2), (7, 0)),
  "many rows": ((4, 50, 34, 32), (3, 3, 32, 48), 1, (1, 1), (6, 0)),
  "many rows at stride 2": ((4, 99, 34, 48), (3, 3, 48, 64), 2, (0, 0), (5, 1)),
  "one image": ((1, 48, 48, 32), (3, 3, 32, 64), 1, (1, 1), (6, 0)),
  "1×1": ((16, 20, 20, 64), (1, 1, 64, 48), 1, (0, 0), (0, 3)),
  "too little": ((2, 8, 8, 16), (3, 3, 16, 16), 1, (1, 1), (0, 0)),
}


@available
@pytest.mark.parametrize("name", SHAPES)
def test_a_convolution_and_its_gradients(name):
  shape, taps, stride, padding, expected = SHAPES[name]
  x, kernel = drawn(0, *shape), drawn(1, *taps)
  (plain_x, plain_kernel), plain = slopes(x, kernel, stride, padding).compile()(x, kernel)
  with onednn.used():
    lowered = slopes(x, kernel, stride, padding)
    (of_x, of_kernel), y = lowered.compile()(x, kernel)
  assert calls(lowered) == expected
  for one, other in ((y, plain), (of_x, plain_x), (of_kernel, plain_kernel)):
    assert one.shape == other.shape
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


@available
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_products_of_matrices_and_of_many(turned):
  for batch in ((), (3, 2)):
    a, b = drawn(0, *batch, 40, 30), drawn(1, *batch, 30, 20)
    given = [x.swapaxes(-1, -2) if turn else x for x, turn in zip((a, b), turned, strict=True)]
    with onednn.used():
      product = jax.jit(lambda a, b: onednn.multiply(a, b, turned)).lower(*given).compile()
    np.testing.assert_allclose(product(*given), a @ b, atol=1e-4)


@available
def test_only_what_is_traced_within_and_in_this_thread_calls_it():
  x, kernel = drawn(0, 16, 20, 20, 64), drawn(1, 3, 3, 64, 64)
  step = jax.jit(lambda x, kernel: convolution.convolve(x, kernel, 1, (1, 1)))
  found = {}

  def look(name):
    found[name] = calls(step.lower(x, kernel))

  look("before")
  with onednn.used():
    look("within")
    other = threading.Thread(target=look, args=("in another thread",))
    other.start()
    other.join()
  look("behind")
  assert found.pop("within") == (1, 0)
  assert found == dict.fromkeys(("before", "in another thread", "behind"), (0, 0))


@available
def test_bfloat16_stays_with_xla():
  x, kernel = (drawn(0, 16, 20, 20, 64), drawn(1, 3, 3, 64, 64))
  with onednn.used():
    lowered = slopes(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), 1, (1, 1))
  assert calls(lowered) == (0, 0)


@available
def test_a_program_that_calls_it_is_not_stored_and_others_are(tmp_path):
  """XLA would read one of its calls as something else, as it stores it."""
  least = "jax_persistent_cache_min_compile_time_secs"
  before = {key: getattr(jax.config, key) for key in ("jax_compilation_cache_dir", least)}
  kernel = drawn(1, 3, 3, 64, 64)

  def compiled(name, function, *arrays):
    """Whether it calls oneDNN."""
    function.__name__ = name
    step = jax.jit(function)
    return "__onednn$" in onednn.compiled(lambda: step.lower(*arrays)).as_text()

  def convolved(x, kernel):
    return convolution.convolve(x, kernel, 1, (1, 1))

  def stored():
    return {file.name.split("-")[0] for file in pathlib.Path(tmp_path).glob("*-cache")}

  try:
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update(least, 0.0)
    assert not compiled("without", lambda x: x + 1, kernel)
    for _ in range(2):  # JAX remembers a trace
      assert compiled("calls", convolved, drawn(0, 16, 20, 20, 64), kernel)
    assert not compiled("afterwards", lambda x: x + 4, kernel)
    assert getattr(jax.config, least) == 0.0
    assert stored() >= {"jit_without", "jit_afterwards"}
    assert "jit_calls" not in stored()

    with onednn._unstored():
      waits = threading.Thread(target=compiled, args=("waited", lambda x: x + 3, kernel))
      waits.start()
      waits.join(0.5)
      assert waits.is_alive() and "jit_waited" not in stored()
    waits.join()
    assert "jit_waited" in stored()
  finally:
    for key, value in before.items():
      jax.config.update(key, value)
    compilation_cache.reset_cache()


def test_an_untried_jaxlib_or_a_slower_processor_is_left_alone(monkeypatch, tmp_path):
  x, kernel = drawn(0, 24, 20, 20, 64), drawn(1, 3, 3, 64, 64)
  without = tmp_path / "cpuinfo"
  without.write_text("processor : 0\nflags\t\t: fpu sse2 avx avx2 fma\n")
  for name, value in (("JAXLIBS", ("0.0.1",)), ("CPUINFO", without)):
    with monkeypatch.context() as patch:
      patch.setattr(onednn, name, value)
      onednn.available.cache_clear()
      text = onednn.compiled(lambda: slopes(x, kernel, 1, (1, 1))).as_text()
      assert "__onednn$" not in text, name
  onednn.available.cache_clear()


def test_the_pinned_jaxlib_was_tried():
  """Otherwise a CPU's steps would quietly take a quarter longer."""
  pins = (pathlib.Path(__file__).parents[1] / "constraints.txt").read_text()
  (pinned,) = [line.split("==")[1] for line in pins.splitlines() if line.startswith("jaxlib==")]
  assert pinned in onednn.JAXLIBS
