"""The boundary drawn at the freeze: where two classes part, whatever the common factor."""

import jax
import numpy as np
import pytest

from medattn_jax.models import two_classes

split = jax.jit(two_classes.split)


def graded(low, high, seed=0):
  """A map whose weights scatter about `low`, and about `high` within a disc."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:40, :40]
  disc = (y - 14) ** 2 + (x - 25) ** 2 < 64
  spread = np.exp(rng.normal(0, 0.25, disc.shape))
  return np.where(disc, high, low) * spread, disc


@pytest.mark.parametrize("low, high", [(0.1, 0.6), (0.01, 0.05), (0.2, 0.9)])
def test_the_classes_come_to_lie_on_either_side_of_one_half(low, high):
  weights, disc = graded(low, high)
  found = np.asarray(split(weights)) > 0.5
  assert (found & disc).sum() / (found | disc).sum() > 0.95


def test_a_common_factor_changes_nothing():
  weights, _ = graded(0.1, 0.5)
  np.testing.assert_allclose(split(weights), split(weights * 0.01), atol=1e-3)


def test_the_order_of_the_pixels_stays():
  weights, _ = graded(0.1, 0.5)
  before, after = weights.ravel(), np.asarray(split(weights)).ravel()
  assert (np.diff(after[np.argsort(before)]) >= 0).all()


def test_the_boundary_is_lis():
  weights, _ = graded(0.1, 0.5, seed=3)
  found = np.asarray(split(weights)) > 0.5
  high, low = weights[found].mean(), weights[~found].mean()
  boundary = (high - low) / np.log(high / low)
  assert weights[~found].max() <= boundary + 1e-3 and weights[found].min() >= boundary - 1e-3


@pytest.mark.parametrize("value", [0.0, 0.88, 1.0])
def test_a_map_of_one_value_is_left_alone(value):
  np.testing.assert_allclose(split(np.full((8, 8), value)), value, atol=1e-6)


def test_weights_that_hardly_differ_are_not_torn_in_two():
  weights = np.random.default_rng(0).uniform(0.87, 0.89, (16, 16))
  np.testing.assert_allclose(split(weights), weights, rtol=1e-6)
