"""Normalisation over groups is what it says, and its closed-form gradient is the gradient."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models import blocks, convolution, moments
from medattn_jax.models.norm import (
  Conv,
  ConvBN,
  GroupBatchNorm,
  add_bias,
  conv_bn,
  statistics,
  together,
)
from medattn_jax.models.pooling import max_pool


def plain(x, scale, bias, group, epsilon=1e-5):
  """Per-group normalisation, written out; leaves autodiff to it."""
  parts = []
  for i in range(0, len(x), group):
    part = x[i:i + group]
    mean = part.mean((0, 1, 2))
    var = ((part - mean) ** 2).mean((0, 1, 2))
    parts.append((part - mean) / jnp.sqrt(var + epsilon) * scale + bias)
  return jnp.concatenate(parts)


@pytest.fixture
def case():
  rng = np.random.default_rng(0)
  x = rng.normal(1.5, 2, (12, 5, 3, 7)).astype(np.float32)
  params = {"scale": rng.normal(1, 0.3, 7).astype(np.float32),
            "bias": rng.normal(size=7).astype(np.float32)}
  stats = {"mean": rng.normal(size=7).astype(np.float32),
           "var": rng.uniform(1, 2, 7).astype(np.float32)}
  return x, params, stats


def apply(norm, x, params, stats):
  y, new = norm.apply(
    {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
  return y, new["batch_stats"]


@pytest.mark.parametrize("group", [2, 4, 12])
def test_each_group_is_normalised_alone(case, group):
  x, params, stats = case
  y, new = apply(GroupBatchNorm(group, 0.8), x, params, stats)
  np.testing.assert_allclose(y, plain(x, **params, group=group), atol=2e-5)
  groups = x.reshape(12 // group, -1, 7)
  np.testing.assert_allclose(
    new["mean"], 0.8 * stats["mean"] + 0.2 * groups.mean(1).mean(0), atol=1e-5)
  np.testing.assert_allclose(
    new["var"], 0.8 * stats["var"] + 0.2 * groups.var(1).mean(0), rtol=1e-5)


def test_none_is_one_group_of_the_whole_batch(case):
  x, params, stats = case
  np.testing.assert_allclose(
    apply(GroupBatchNorm(None), x, params, stats)[0], plain(x, **params, group=12), atol=2e-5)


def test_gradient(case):
  x, params, stats = case
  weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  ours = jax.grad(
    lambda x, p: (jnp.sin(apply(GroupBatchNorm(4), x, p, stats)[0]) * weight).sum(), (0, 1))
  wanted = jax.grad(lambda x, p: (jnp.sin(plain(x, **p, group=4)) * weight).sum(), (0, 1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
               ours(x, params), wanted(x, params))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("gpu", [False, True])
def test_known_statistics_are_those_it_would_find(case, relu, gpu, request):
  """Of pieces that are joined, each summed but once; with all gradients and the running ones."""
  x, params, stats = case
  if gpu:
    request.getfixturevalue("a_gpus_ways")()
  weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  norm = GroupBatchNorm(4, 0.8)

  def loss(x, params, known):
    if known:
      pieces = jnp.split(x, [2, 5], -1)
      found = [statistics(piece, 4) for piece in pieces]
      known = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *found)
    y, left = norm.apply({"params": params, "batch_stats": stats}, x, True, relu, known or None,
                         mutable=["batch_stats"])
    return (jnp.sin(y) * weight).sum(), (y, left)

  run = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
               run(x, params, True), run(x, params, False))


def test_evaluation_uses_the_running_statistics_alone(case):
  x, params, stats = case
  norm = GroupBatchNorm(5)  # does not divide the batch, and need not
  y = norm.apply({"params": params, "batch_stats": stats}, x, False)
  wanted = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, wanted, atol=2e-5)


@pytest.mark.parametrize("batch", [2, 6, 0])
def test_a_batch_that_is_not_whole_groups_is_refused(batch):
  norm = GroupBatchNorm(4)
  with pytest.raises(ValueError, match="group_size=4"):
    jax.eval_shape(lambda: norm.init(jax.random.key(0), jnp.zeros((batch, 2, 2, 3)), True))


def test_statistics_are_float32_for_bfloat16(case):
  x, params, stats = case
  y, new = apply(GroupBatchNorm(4), jnp.asarray(x + 30, jnp.bfloat16), params, stats)
  assert y.dtype == jnp.bfloat16
  assert new["mean"].dtype == new["var"].dtype == jnp.float32
  rounded = np.asarray(jnp.asarray(x + 30, jnp.bfloat16), np.float32)
  np.testing.assert_allclose(
    y.astype(jnp.float32), plain(rounded, **params, group=4), atol=0.03, rtol=0.01)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_by_one_is_the_convolution(stride):
  x = np.random.default_rng(2).normal(size=(2, 7, 6, 5)).astype(np.float32)
  conv = Conv(4, stride=stride, use_bias=True)
  variables = conv.init(jax.random.key(0), x)
  wanted = jax.lax.conv_general_dilated(
    x, variables["params"]["kernel"], (stride, stride), "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"))
  np.testing.assert_allclose(conv.apply(variables, x), wanted, atol=1e-5)


@pytest.mark.parametrize("kernel, stride, padding", [
  ((3, 3), 1, None), ((3, 3), 2, None), ((1, 7), 1, None), ((2, 3), 1, (1, 2)),
  ((3, 3), 1, (0, 0))])
@pytest.mark.parametrize("size", [(0, 0), (1, 1), (2, 2), (1, 2), (3, 1)])
def test_features_smaller_than_the_kernel(size, kernel, stride, padding):
  x = np.random.default_rng(4).normal(size=(2, *size, 5)).astype(np.float32)
  conv = Conv(4, kernel, stride, padding)
  variables = conv.init(jax.random.key(0), x)
  rows, columns = padding or (kernel[0] // 2, kernel[1] // 2)
  wanted = lambda x, kernel: jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((rows, rows), (columns, columns)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"))
  y, pull = jax.vjp(lambda x, kernel: conv.apply({"params": {"kernel": kernel}}, x),
                    x, variables["params"]["kernel"])
  plain, plain_pull = jax.vjp(wanted, x, variables["params"]["kernel"])
  np.testing.assert_allclose(y, plain, atol=1e-5)
  for found, expected in zip(pull(jnp.cos(y)), plain_pull(jnp.cos(y)), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kernel, stride, padding", [
  ((3, 3), 1, None), ((3, 3), 2, None), ((3, 3), 2, (0, 0)), ((7, 7), 2, None), ((1, 7), 1, None),
  ((3, 2), 3, (1, 0))])
def test_gradients_are_jaxs_own_and_in_a_loop_convolutions_that_a_cpu_has(kernel, stride, padding):
  x = np.random.default_rng(5).normal(size=(2, 18, 17, 3)).astype(np.float32)
  conv = Conv(4, kernel, stride, padding)
  weights = conv.init(jax.random.key(0), x)["params"]["kernel"]
  rows, columns = padding or (kernel[0] // 2, kernel[1] // 2)

  def wanted(x, weights):
    return jax.lax.conv_general_dilated(
      x, weights, (stride, stride), ((rows, rows), (columns, columns)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def gradients(function, x, weights):
    y, pull = jax.vjp(function, x, weights)
    return pull(jnp.cos(y))

  ours = lambda x, weights: conv.apply({"params": {"kernel": weights}}, x)
  for found, expected in zip(
      gradients(ours, x, weights), gradients(wanted, x, weights), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  def layouts(function):
    def looped(xs, weights):
      return jax.lax.map(lambda x: gradients(function, x, weights), xs)

    text = jax.jit(looped).lower(np.stack([x, x]), weights).compile().as_text()
    found = re.findall(r" convolution\(.*dim_labels=(\S+?),", text)
    assert len(found) == 3
    return set(found)

  # Others XLA's CPU computes in a loop number by number.
  assert layouts(ours) == {"b01f_01io->b01f"} != layouts(wanted)


@pytest.mark.parametrize("kernel, stride, padding, side", [
  ((3, 3), 1, None, 9), ((1, 7), 1, None, 9), ((3, 3), 2, None, 5), ((3, 3), 2, (0, 0), 4)])
def test_padding_is_symmetric(kernel, stride, padding, side):
  """PyTorch's: with stride 2, not what XLA's SAME pads."""
  x = np.random.default_rng(3).normal(size=(1, 9, 9, 2)).astype(np.float32)
  conv = Conv(1, kernel, stride, padding)
  variables = conv.init(jax.random.key(0), x)
  y = conv.apply(variables, x)
  assert y.shape == (1, side, side, 1)
  rows, columns = padding or (kernel[0] // 2, kernel[1] // 2)
  padded = np.pad(x[0], ((rows, rows), (columns, columns), (0, 0)))
  weights = np.asarray(variables["params"]["kernel"])[..., 0]
  corner = (padded[:kernel[0], :kernel[1]] * weights).sum()
  np.testing.assert_allclose(y[0, 0, 0, 0], corner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_a_maximum_taken_first_knows_of_a_bias(train):
  class Unit(nn.Module):
    @nn.compact
    def __call__(self, x, first):
      conv, norm = Conv(4, (3, 3), use_bias=True, name="conv"), GroupBatchNorm(2, 0.9, name="bn")
      if first:
        return conv_bn(conv, norm, x, train, max_pool, relu=True)
      return max_pool(norm(conv(x), train, relu=True))

  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 9, 9, 3)), jnp.float32)
  draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
  variables = Unit().init(jax.random.key(0), x, True)
  params = jax.tree.map(draw, variables["params"])
  assert (params["bn"]["scale"] < 0).any() and (params["bn"]["scale"] > 0).any()

  def loss(params, first):
    y, left = Unit().apply({**variables, "params": params}, x, first, mutable=["batch_stats"])
    return jnp.square(y).sum(), (y, left)

  found, wanted = (jax.grad(loss, has_aux=True)(params, first) for first in (True, False))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("side", [None, 2])
def test_a_maximum_taken_first_is_the_maximum_taken_last(dtype, side):
  """Whatever gamma's sign; in training, with the running statistics it leaves, and after it."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(1, 2, (4, 13, 15, 3)), dtype)
  unit = ConvBN(6, (3, 3), group_size=2, dtype=dtype)
  variables = unit.init(jax.random.key(0), x, True)
  scale = jnp.asarray([1.0, -2.0, 0.5, -0.1, 1.5, 0.01])
  variables["params"]["bn"] = {"scale": scale, "bias": jnp.linspace(-1, 1, 6)}
  weight = jnp.asarray(rng.normal(size=(4, 6, 7, 6)), jnp.float32)
  shown = lambda x: blocks.split(x, side) if side else x

  def loss(params, x, first):
    given = ({**variables, "params": params}, shown(x), True)
    if first:
      y, left = unit.apply(*given, max_pool, mutable=["batch_stats"])
    else:
      y, left = unit.apply(*given, mutable=["batch_stats"])
      y = max_pool(y)
    return jnp.sum(y * weight), (y, left)

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  grads, (y, left) = run(variables["params"], x, True)
  wanted, (last, wanted_left) = run(variables["params"], x, False)
  near = {"rtol": 0, "atol": 1e-5 if dtype == jnp.float32 else 0.03}
  np.testing.assert_allclose(y, last, **near)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               left, wanted_left)
  if dtype == jnp.float32:  # of rounded numbers several may be the largest
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), grads, wanted)
  after = {**variables, **left}
  np.testing.assert_allclose(
    unit.apply(after, shown(x), False, max_pool), max_pool(unit.apply(after, shown(x), False)),
    **near)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_relu_with_the_normalisation_is_relu_after_it(case, dtype, train):
  x, params, stats = case
  norm = GroupBatchNorm(4)
  weight = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

  def loss(params, x, **how):
    y, left = norm.apply(
      {"params": params, "batch_stats": stats}, x, train, **how, mutable=["batch_stats"])
    y = y if how else jax.nn.relu(y)
    return jnp.sum(y * weight), (y, left)

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnames="relu")
  found, wanted = run(params, x.astype(dtype), relu=True), run(params, x.astype(dtype))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
    a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-5, atol=1e-5), found, wanted)


def test_means_after_a_1x1_convolution_are_means_before_it():
  """With their gradients; the result keeps the unit's dtype whatever the means' is."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 5, 8)).astype(np.float32)
  unit = ConvBN(3, group_size=2)
  variables = unit.init(jax.random.key(0), x, True)

  def mean(x):  # of 3×3, with zeros beyond the edges
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return total / np.float32(9)

  def loss(params, x, first):
    given = {**variables, "params": params}
    y, _ = (unit.apply(given, mean(x), True, mutable=["batch_stats"]) if first else
            unit.clone(mean=mean).apply(given, x, True, mutable=["batch_stats"]))
    return jnp.sum(jnp.sin(y)), y

  run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               run(variables["params"], x, False), run(variables["params"], x, True))
  wide = lambda x: mean(x.astype(jnp.float32))
  half = ConvBN(3, group_size=2, dtype=jnp.bfloat16, mean=wide)
  y, _ = half.apply(variables, x, True, mutable=["batch_stats"])
  assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("apart, products", [(False, 3), (True, 9)])
def test_units_computed_together_are_the_units(train, apart, products):
  """With means or without; one product for all, and one for each of its gradients."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 6, 5, 8)).astype(np.float32)
  slopes = [rng.normal(size=(4, 6, 5, features)).astype(np.float32) for features in (3, 4, 2, 5)]

  def mean(x):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / 9

  class Units(nn.Module):
    at_once: bool

    @nn.compact
    def __call__(self, x):
      unit = functools.partial(ConvBN, group_size=2, apart=apart)
      units = [unit(3, name="a"), unit(4, name="b"), unit(2, mean=mean, name="c"),
               unit(5, mean=lambda x: 2 * mean(x), name="d")]
      return together(units, x, train) if self.at_once else [unit(x, train) for unit in units]

  variables = Units(False).init(jax.random.key(0), x)
  variables = jax.tree.map(
    lambda a: a + rng.uniform(0, 0.5, a.shape).astype(np.float32), variables)

  def run(at_once):
    def loss(params, x):
      ys, left = Units(at_once).apply({**variables, "params": params}, x, mutable=["batch_stats"])
      return sum((y * slope).sum() for y, slope in zip(ys, slopes, strict=True)), (ys, left)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True)), (variables["params"], x)

  (each, given), (joined, _) = run(False), run(True)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
               joined(*given), each(*given))
  count = lambda step: step.lower(*given).as_text().count("dot_general")
  assert (count(joined), count(each)) == (products, 12)


def test_a_biass_gradient_is_summed_in_float32():
  """1,001 in bfloat16 is 1,000."""
  y, bias = jnp.zeros((7, 11, 13, 2), jnp.bfloat16), jnp.zeros(2)
  of_y, of_bias = jax.vjp(add_bias, y, bias)[1](jnp.ones_like(y))
  np.testing.assert_array_equal(of_bias, np.array([1001, 1001], np.float32))
  assert (of_y.dtype, of_bias.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_scaled_convolution_added_to_what_there_is():
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=(2, 5, 3, c)).astype(np.float32) for c in (6, 4))
  conv = Conv(6, use_bias=True)
  params = {"kernel": rng.normal(size=(1, 1, 4, 6)), "bias": rng.normal(size=6)}
  params = {"params": {key: value.astype(np.float32) for key, value in params.items()}}
  found = conv.apply(params, x, y, 0.3, method=conv.onto)
  np.testing.assert_allclose(found, x + 0.3 * conv.apply(params, y), rtol=1e-5, atol=1e-5)


def test_a_gpus_one_product_is_what_a_plain_loop_gives(a_gpus_ways):
  """With all gradients; the bias's and the kernel's are summed and kept in float32."""
  rng = np.random.default_rng(0)
  x, y = (rng.normal(size=(2, 5, 3, c)).astype(np.float32) for c in (6, 4))
  conv = Conv(6, use_bias=True)
  params = {"kernel": rng.normal(size=(1, 1, 4, 6)), "bias": rng.normal(size=6)}
  params = {key: value.astype(np.float32) for key, value in params.items()}

  def loss(params, x, y, conv=conv):
    return jnp.sum(jnp.sin(conv.apply({"params": params}, x, y, 0.3, method=conv.onto)))

  plain = jax.grad(loss, (0, 1, 2))(params, x, y)
  a_gpus_ways()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
               plain, jax.grad(loss, (0, 1, 2))(params, x, y))
  product = lambda kernel, bias: convolution.add_product(
    jnp.zeros((1001, 6), jnp.bfloat16), jnp.ones((1001, 4), jnp.bfloat16), kernel, bias)
  out, back = jax.vjp(product, params["kernel"][0, 0], params["bias"])
  for gradient in back(jnp.ones_like(out)):
    np.testing.assert_array_equal(gradient, np.full(gradient.shape, 1001, np.float32))
  assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(("rows", "blocks", "pieces"), [
  (8 * 59**2, 1, 236), (8 * 29**2, 2, 116), (8 * 14**2, 2, 112), (128 * 10**2, 3, 80),
  (128 * 59**2, 1, 1), (32 * 29**2, 2, 1), (8 * 29**2, 8, 1), (256 * 14**2, 8, 1), (7 * 11, 1, 7),
  (13, 1, 1), (1, 1, 1)])
def test_in_how_many_pieces_a_gpu_sums(rows, blocks, pieces):
  """Enough to be busy, where XLA's own would be fewer than 200 with those beside them."""
  assert moments._pieces(rows, blocks) == pieces


def test_sums_in_pieces_are_the_sums():
  rng = np.random.default_rng(0)
  one, other = (rng.normal(size=(2, 4, 16, 3)).astype(np.float32) for _ in range(2))
  assert moments._pieces(4 * 16, 2) == 8
  for inside in (None, rng.random((16, 3)) < 0.5):
    found = moments._sums_at_once((one, other), inside)
    for x, total in zip((one, other), found, strict=True):
      wanted = np.where(True if inside is None else inside, x, 0).sum((1, 2), keepdims=True)
      np.testing.assert_allclose(total, wanted, rtol=1e-5, atol=1e-5)
