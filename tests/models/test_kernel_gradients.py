"""A kernel's gradient summed over parts is the gradient; only a CPU's program has parts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models import kernel_gradients

# (images, rows, columns, channels in, out), kernel, stride, padding
CASES = [
  ((8, 14, 14, 8, 16), (3, 3), 1, (1, 1)),
  ((6, 9, 13, 5, 7), (3, 3), 2, (1, 1)),
  ((6, 11, 7, 4, 6), (1, 7), 1, (0, 3)),
  ((6, 11, 7, 4, 6), (7, 1), 1, (3, 0)),
  ((4, 13, 12, 3, 8), (7, 7), 2, (3, 3)),
  ((9, 8, 9, 6, 5), (5, 5), 3, (0, 1)),
  ((7, 6, 6, 4, 4), (3, 3), 1, (0, 0)),
]


def plain(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), [(around, around) for around in padding],
    dimension_numbers=("NHWC", "HWIO", "NHWC"))


def gradients(convolve, x, kernel, stride, padding):
  """Of a loss that each output feels differently."""

  def loss(x, kernel):
    y = convolve(x, kernel, stride, padding)
    return jnp.sum(jnp.sin(y) + jnp.arange(y.size).reshape(y.shape) / y.size * y)

  return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)


def drawn(shape, size, dtype=np.float32):
  rng = np.random.default_rng(0)
  *given, wanted = shape
  kernel = rng.normal(size=(*size, given[-1], wanted)) / np.sqrt(np.prod(size) * given[-1])
  return rng.normal(size=given).astype(dtype), kernel.astype(dtype)


@pytest.mark.parametrize("shape,size,stride,padding", CASES)
def test_the_sum_over_parts_is_the_gradient(shape, size, stride, padding, monkeypatch):
  monkeypatch.setattr(kernel_gradients, "_PART", 4)  # as many parts as there may be
  x, kernel = drawn(shape, size)
  ours = gradients(kernel_gradients.convolve, x, kernel, stride, padding)
  for mine, wanted in zip(ours, gradients(plain, x, kernel, stride, padding), strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def convolutions(convolve, x, kernel, platform):
  """Those of the gradients' program for a platform, in order, without their operands' names."""
  traced = jax.jit(lambda x, kernel: gradients(convolve, x, kernel, 1, (1, 1))).trace(x, kernel)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  found = [line.strip() for line in text.splitlines() if "stablehlo.convolution" in line]
  return [re.sub(r"%\w+", "", line) for line in found]


def test_a_cpu_alone_sums_over_parts(monkeypatch):
  monkeypatch.setattr(kernel_gradients, "_PART", 4)
  x, kernel = drawn((8, 6, 6, 4, 4), (3, 3))
  assert len(convolutions(kernel_gradients.convolve, x, kernel, "cpu")) == 2 + 8
  for other in ("tpu", "cuda"):
    wanted = convolutions(plain, x, kernel, other)
    assert len(wanted) == 3
    assert convolutions(kernel_gradients.convolve, x, kernel, other) == wanted


@pytest.mark.parametrize("images,each,wanted", [
  (64, 2**14, 1), (64, 2**15, 2), (64, 2**20, 8), (7, 2**20, 7), (11, 2**20, 1), (12, 2**18, 3)])
def test_parts_are_equal_and_as_few_as_the_cache_holds(images, each, wanted):
  assert kernel_gradients.parts(images, each) == wanted


def test_rounded_numbers_are_not_summed_in_parts(monkeypatch):
  monkeypatch.setattr(kernel_gradients, "_PART", 4)
  x, kernel = drawn((8, 6, 6, 4, 4), (3, 3), jnp.bfloat16)
  wanted = convolutions(plain, x, kernel, "cpu")
  assert convolutions(kernel_gradients.convolve, x, kernel, "cpu") == wanted
