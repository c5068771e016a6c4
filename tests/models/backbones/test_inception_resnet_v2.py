"""Inception-ResNet-v2's blocks as they are computed, held against one branch at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models import norm
from medattn_jax.models.backbones.inception_resnet_v2 import Block
from medattn_jax.models.norm import ConvBN

UNIT = functools.partial(ConvBN, group_size=2, momentum=0.9, epsilon=1e-3)
BRANCHES = (((4,),), ((3,), (5, (3, 3))), ((2,), (6, (3, 3)), (7, (3, 3))))


@pytest.fixture
def answers():
  """answers(train, unit, as_one) → a block's gradients, answer and statistics."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 6, 5, 8)), jnp.float32)
  slope = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  variables = Block(UNIT, BRANCHES, 0.17).init(jax.random.key(0), x, True)
  drawn = lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
  variables = {**jax.tree.map(drawn, variables), "params": jax.tree.map(
    lambda a: a + 0.1 * drawn(a) if a.ndim == 1 else a, variables["params"])}

  def of(train, unit=UNIT, as_one=False):
    block = Block(unit, BRANCHES, 0.17, as_one=as_one)

    def loss(params, x):
      y, left = block.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
      return (y * slope).sum(), (y, left)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

  return of


def same(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, wanted)


@pytest.mark.parametrize("train", [True, False])
def test_branches_computed_as_one_are_the_branches(train, answers):
  same(answers(train, as_one=True), answers(train))


@pytest.mark.parametrize("train", [True, False])
def test_wide_branches_apart_are_those_computed_together(train, answers, monkeypatch):
  wanted = answers(train)
  monkeypatch.setattr(norm, "WIDE", 4)
  same(answers(train, functools.partial(UNIT, apart=True)), wanted)


@pytest.mark.parametrize("train", [True, False])
def test_on_a_gpu_a_block_is_the_same(train, answers, a_gpus_ways):
  wanted, asked = answers(train), a_gpus_ways()
  same(answers(train), wanted)
  assert asked.count("cuda") >= 5
