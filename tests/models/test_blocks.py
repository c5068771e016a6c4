"""Pictures in blocks: the same numbers as pixel by pixel, gradients too, at sizes odd and even."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models import blocks
from medattn_jax.models.norm import ConvBN
from medattn_jax.models.pooling import max_pool


def pictures(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("size", [(12, 12), (13, 15), (11, 14)])
@pytest.mark.parametrize("side", [2, 4])
def test_split_and_back(size, side):
  x = pictures(2, *size, 3)
  split = blocks.split(x, side)
  assert split.channels == 3
  np.testing.assert_array_equal(split.pixels(), x)
  inside = np.ones(size).sum() if split.inside is None else split.inside.sum()
  assert inside == size[0] * size[1]


@pytest.mark.parametrize("size", [(16, 16), (17, 19), (18, 15)])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_a_convolution_in_blocks_is_the_convolution(size, stride, padding):
  x, kernel = pictures(2, *size, 3), pictures(3, 3, 3, 5, seed=1)
  plain = jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((padding, padding),) * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"))
  found = blocks.convolve(blocks.split(x, 4), kernel, stride, padding)
  assert found.side == 4 // stride
  np.testing.assert_allclose(found.pixels(), plain, atol=1e-5)


def test_a_stride_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="stride 3 in blocks of 4"):
    blocks.convolve(blocks.split(pictures(1, 16, 16, 3), 4), pictures(3, 3, 3, 5), 3, 0)


class Stem(nn.Module):
  """The first layers of both inceptions, narrow."""

  blocks: bool

  @nn.compact
  def __call__(self, x, train):
    x = blocks.split(x, 4) if self.blocks else x
    x = ConvBN(4, (3, 3), 2, (0, 0), group_size=2, name="first")(x, train)
    x = ConvBN(4, (3, 3), 1, (0, 0), group_size=2, name="second")(x, train)
    return max_pool(ConvBN(6, (3, 3), group_size=2, name="third")(x, train))


@pytest.mark.parametrize("size", [
  (33, 35), *(pytest.param(size, marks=pytest.mark.slow) for size in ((32, 32), (34, 31)))])
def test_a_stem_in_blocks_is_the_stem(size):
  x = pictures(4, *size, 3)
  variables = Stem(False).init(jax.random.key(0), x, True)
  slope = pictures(*Stem(False).apply(variables, x, False).shape, seed=2)

  def answers(stem, train):
    def loss(params, x):
      y, stats = stem.apply(
        {"params": params, "batch_stats": variables["batch_stats"]}, x, train,
        mutable=["batch_stats"])
      return (y * slope).sum(), (y, stats)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

  for train in (True, False):
    found, wanted = answers(Stem(True), train), answers(Stem(False), train)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, wanted)


def test_equal_pixels_give_the_first_its_gradient():
  x = jnp.ones((1, 7, 7, 2))
  found = jax.grad(lambda x: blocks.max_pool(blocks.split(x, 2)).sum())(x)
  wanted = jax.grad(lambda x: nn.max_pool(x, (3, 3), (2, 2)).sum())(x)
  np.testing.assert_array_equal(found, wanted)
