"""A-Net's stops stand to one another as the paper says."""

import jax
import jax.numpy as jnp
import numpy as np

from medattn_jax.models.attention import AttentionNet


def test_gate(draw_variables):
  net = AttentionNet(5, features=8)
  m = np.random.default_rng(0).normal(size=(4, 3, 6, 7)).astype(np.float32)
  variables = draw_variables(net, m)
  y, out = jax.jit(net.apply)(variables, m)
  np.testing.assert_allclose(out["A"].sum((1, 2)), np.ones((4, 5)), rtol=1e-5)
  np.testing.assert_allclose(out["G"], out["S"] * out["A"], rtol=1e-6)
  np.testing.assert_allclose(y, out["G"].sum((1, 2)), rtol=1e-5)
  params = variables["params"]
  assert set(params["attention"]) == {"kernel"}, "a bias before the spatial softmax is dead"
  score = m @ params["score"]["kernel"][0, 0] + params["score"]["bias"]
  np.testing.assert_allclose(out["S"], score, rtol=1e-4, atol=1e-5)
  assert float(jnp.ptp(out["A"], axis=(1, 2)).min()) > 1e-3


def test_every_parameter_learns_from_the_first_step():
  net = AttentionNet(5, features=8, group_size=4)
  m = np.random.default_rng(0).normal(size=(8, 4, 4, 7)).astype(np.float32)
  variables = jax.jit(net.init)(jax.random.key(0), m)

  def loss(params):
    (y, _), _ = net.apply({**variables, "params": params}, m, True, mutable=["batch_stats"])
    return (y ** 2).sum() + y[:, 0].sum()

  for path, leaf in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(variables["params"])):
    assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_a_kernel_of_one_keeps_each_cell_to_itself():
  net = AttentionNet(5, features=8, kernel=1)
  m = np.random.default_rng(0).normal(size=(1, 4, 4, 7)).astype(np.float32)
  variables = net.init(jax.random.key(0), m)
  moved = m.copy()
  moved[0, 0, 0] += 1
  before, after = (net.apply(variables, x)[1]["A"] for x in (m, moved))
  ratio = np.asarray(after / before)[0].reshape(16, 5)  # the softmax moves all others alike
  np.testing.assert_allclose(ratio[2:], np.broadcast_to(ratio[1], (14, 5)), rtol=1e-5)
  assert (np.abs(ratio[0] / ratio[1] - 1) > 1e-6).any()
