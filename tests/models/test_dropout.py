"""An example's mask is its own, and dropout keeps what is expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models.dropout import dropout

X = np.random.default_rng(0).uniform(1, 2, (6, 5, 40)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(3), 6)


def test_a_mask_does_not_depend_on_the_place_in_the_batch():
  whole = dropout(X, 0.5, KEYS)
  order = np.array([4, 1, 5, 0])
  np.testing.assert_array_equal(dropout(X[order], 0.5, KEYS[order]), whole[order])
  zero = np.asarray(whole == 0)
  assert len(np.unique(zero.reshape(6, -1), axis=0)) == 6, "examples share a mask"


def test_nor_on_the_devices():
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2],
                       axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  function = jax.jit(lambda x, keys: dropout(x, 0.3, keys))
  split = function(jax.device_put(X, spread), jax.device_put(KEYS, spread))
  assert split.sharding.num_devices == 2
  np.testing.assert_array_equal(split, function(X, KEYS))


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_expectation_is_kept(rate):
  """Of 20,000 draws a number: five standard errors."""
  count = 20_000
  x = np.tile(X[:1, 0, :5], (count, 1))
  y = np.asarray(dropout(x, rate, jax.random.split(jax.random.key(0), count)), np.float64)
  share = 5 * np.sqrt(rate * (1 - rate) / count)
  np.testing.assert_allclose((y == 0).mean(0), rate, atol=share)
  np.testing.assert_allclose(y.mean(0), x[0], rtol=share / (1 - rate))
  np.testing.assert_allclose(y[y > 0], x[y > 0] / (1 - rate), rtol=1e-6)


def test_two_dropouts_draw_apart():
  first, second = (np.asarray(dropout(X, 0.5, KEYS, place) == 0) for place in (0, 1))
  assert 0.45 < (first == second).mean() < 0.55


def test_without_keys_nothing_is_dropped():
  assert dropout(X, 0.5, None) is X


def test_bfloat16_is_divided_in_float32():
  y = dropout(jnp.full((6, 1000), 3, jnp.bfloat16), 0.7, KEYS)
  assert y.dtype == jnp.bfloat16
  assert set(np.unique(y).astype(np.float32)) == {0.0, 10.0}
