"""Losses equal the textbook's, and split over devices and microbatches without a difference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss

from medattn_jax import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(12, 5)).astype(np.float32)
LEVEL = RNG.integers(0, 5, 12)
MASK = np.array([1] * 9 + [0] * 3, np.float32)


def test_cross_entropy_is_the_masked_mean_log_loss():
  total, weight = losses.graded(LOGITS, LEVEL, MASK)
  p = np.exp(LOGITS.astype(np.float64))
  p /= p.sum(-1, keepdims=True)
  expected = log_loss(LEVEL[:9], p[:9], labels=range(5))
  assert total / weight == pytest.approx(expected, rel=1e-5)


def test_class_weights_weigh_examples():
  weights = (1.0, 2.0, 3.0, 4.0, 5.0)
  total, weight = losses.graded(LOGITS, LEVEL, MASK, class_weights=weights)
  singles = [losses.graded(LOGITS[i : i + 1], LEVEL[i : i + 1], MASK[i : i + 1]) for i in range(12)]
  own = np.asarray(weights)[LEVEL] * MASK
  assert weight == pytest.approx(own.sum())
  assert total == pytest.approx(sum(w * float(s[0]) for w, s in zip(own, singles, strict=True)))


def test_focal_without_focus_is_cross_entropy_and_focus_spares_the_easy():
  plain = losses.graded(LOGITS, LEVEL, MASK)[0]
  unfocused = losses.graded(LOGITS, LEVEL, MASK, name="focal", focal_gamma=0.0)[0]
  assert unfocused == pytest.approx(plain)
  easy = jnp.array([[9.0, 0, 0, 0, 0]]), jnp.array([0]), jnp.ones(1)
  ratio = losses.graded(*easy, name="focal")[0] / losses.graded(*easy)[0]
  assert ratio < 1e-5
  for logits in (LOGITS, LOGITS * 1000):
    grad = jax.grad(lambda x: losses.graded(x, LEVEL, MASK, name="focal", focal_gamma=0.5)[0])
    assert np.isfinite(grad(logits)).all()


def test_mse_is_of_the_expected_grade():
  logits = jnp.log(jnp.array([[0.5, 0.5, 1e-9, 1e-9, 1e-9]]))
  total, _ = losses.graded(logits, jnp.array([2]), jnp.ones(1), name="mse")
  assert total == pytest.approx((0.5 - 2) ** 2, rel=1e-4)


def test_ordinal_adds_the_squared_error_to_another_loss():
  entropy, squares, both = (
      losses.graded(LOGITS, LEVEL, MASK, **options)[0]
      for options in ({}, {"name": "mse"}, {"ordinal": 0.5})
  )
  assert both == pytest.approx(entropy + 0.5 * squares)
  assert losses.graded(LOGITS, LEVEL, MASK, name="mse", ordinal=3.0)[0] == pytest.approx(squares)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "mse"])
def test_parts_add_up_to_the_whole(name):
  whole = losses.graded(LOGITS, LEVEL, MASK, name=name)
  parts = [losses.graded(LOGITS[i::3], LEVEL[i::3], MASK[i::3], name=name) for i in range(3)]
  np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-5)
