"""Schedules hit their stated points; SGD is the textbook's."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from medattn_jax import optim


def page(**changes):
  values = dict(
      steps=100, learning_rate=0.1, optimizer="sgd", momentum=0.9, weight_decay=0.0,
      schedule="constant", warmup_steps=0, decay_every=20, decay_rate=0.1, accumulation=1,
      clip_norm=0.0, ema=0.0,
  )  # fmt: skip
  return ml_collections.ConfigDict(values | changes)


def test_schedules():
  step = optim.schedule(page(schedule="step"))
  rates = [step(0), step(19), step(20), step(40)]
  np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 1e-3], rtol=1e-5)
  cosine = optim.schedule(page(schedule="cosine", warmup_steps=10))
  assert cosine(0) == pytest.approx(0.01) and cosine(9) == pytest.approx(0.1)
  assert cosine(10) == pytest.approx(0.1) and cosine(55) == pytest.approx(0.05, rel=1e-3)
  assert cosine(100) == pytest.approx(0.0, abs=1e-6)
  assert optim.schedule(page(warmup_steps=1))(0) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["constant", "step", "cosine"])
def test_rates_are_the_schedules(kind):
  asked = page(schedule=kind, warmup_steps=3, steps=30)
  each = [float(optim.schedule(asked)(step)) for step in range(30)]
  rates = optim.rates(asked)
  assert isinstance(rates, np.ndarray) and rates.dtype == np.float32
  np.testing.assert_allclose(rates, each, rtol=1e-5, atol=1e-9)


def test_sgd_with_momentum_is_the_papers():
  optimizer = optim.build(page())
  params = {"w": jnp.ones(2)}
  state, velocity, w = optimizer.init(params), np.zeros(2), np.ones(2)
  for gradient in (np.array([1.0, 2.0]), np.array([-1.0, 0.5])):
    updates, state = optimizer.update({"w": jnp.array(gradient, jnp.float32)}, state, params)
    velocity = 0.9 * velocity + gradient
    w = w - 0.1 * velocity
    params = {"w": params["w"] + updates["w"]}
    np.testing.assert_allclose(params["w"], w, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_spares_vectors(optimizer):
  built = optim.build(page(optimizer=optimizer, weight_decay=0.5))
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  zeros = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
  updates, _ = built.update(zeros, built.init(params), params)
  assert (updates["kernel"] < 0).all() and (updates["bias"] == 0).all()


def test_clipping_bounds_the_norm():
  built = optim.build(page(clip_norm=1.0, momentum=0.0, learning_rate=1.0))
  updates, _ = built.update({"w": jnp.array([30.0, 40.0])}, built.init({"w": jnp.ones(2)}))
  np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-5)


def leaves():
  """As a network has them: of a few numbers, a multiple of 256 or not, many rows of 256."""
  shapes = {"a": (), "b": (5,), "c": (256,), "d": (3, 3, 3, 32), "e": (1, 1, 2080, 30),
            "f": (7, 991)}
  rng = np.random.default_rng(0)
  return {name: jnp.asarray(rng.normal(2, 1, shape), jnp.float32)
          for name, shape in shapes.items()}


def test_a_gpus_norm_is_the_norm():
  found = jax.jit(optim._norm_by_parts)(leaves())
  np.testing.assert_allclose(found, optax.tree.norm(leaves()), rtol=1e-6)
  assert optim._norm_by_parts({}) == optim.norm({}) == 0
  np.testing.assert_array_equal(optim.norm(leaves()), optax.tree.norm(leaves()))


def test_a_gpu_reads_from_a_vector_what_many_leaves_share():
  thrice = lambda x: optim.shared(3) * x
  assert thrice(2.0) == 6 and optim.shared(3).dtype == jnp.float32
  on = {kind: jax.jit(thrice).trace(2.0).lower(lowering_platforms=(kind,)).as_text()
        for kind in ("cuda", "cpu")}
  assert "optimization_barrier" in on["cuda"] and "2xf32" in on["cuda"]
  assert "optimization_barrier" not in on["cpu"]


def test_gradients_are_divided_by_their_weights():
  found = optim.divided(leaves(), jnp.float32(3))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / np.float32(3)), found, leaves())
  assert (optim.divided({"a": jnp.zeros(2)}, jnp.float32(0))["a"] == 0).all()


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_is_optaxs(most):
  theirs, _ = optax.clip_by_global_norm(most).update(leaves(), optax.EmptyState())
  built = optim.build(page(clip_norm=most, momentum=0.0, learning_rate=-1.0))
  ours, _ = built.update(leaves(), built.init(leaves()))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_branches_of_an_earlier_phase_move_less():
  params = {"m_net": {"w": jnp.ones(2)}, "c_net": {"w": jnp.ones(2)}}
  optimizer = optim.build(page(optimizer="adamw", earlier_rate=0.1), earlier=("m_net", "a_net"))
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  np.testing.assert_allclose(updates["m_net"]["w"], 0.1 * updates["c_net"]["w"], rtol=1e-6)
  assert (updates["c_net"]["w"] < 0).all()
