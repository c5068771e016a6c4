"""Inception-ResNet-v2's blocks as they are computed on a TPU, held against one branch at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models.backbones.inception_resnet_v2 import Block
from medattn_jax.models.norm import ConvBN

UNIT = functools.partial(ConvBN, group_size=2, momentum=0.9, epsilon=1e-3)
BRANCHES = (((4,),), ((3,), (5, (3, 3))), ((2,), (6, (3, 3)), (7, (3, 3))))


@pytest.mark.parametrize("train", [True, False])
def test_branches_computed_as_one_are_the_branches(train):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4, 6, 5, 8)), jnp.float32)
  slope = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  variables = Block(UNIT, BRANCHES, 0.17).init(jax.random.key(0), x, True)
  drawn = lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
  variables = {**jax.tree.map(drawn, variables), "params": jax.tree.map(
    lambda a: a + 0.1 * drawn(a) if a.ndim == 1 else a, variables["params"])}

  def answers(as_one):
    block = Block(UNIT, BRANCHES, 0.17, as_one=as_one)

    def loss(params, x):
      y, left = block.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
      return (y * slope).sum(), (y, left)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

  found, wanted = answers(True), answers(False)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, wanted)
