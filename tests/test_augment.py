"""The eight transforms of a square, and chance that depends on (key, example) alone."""

import jax
import jax.numpy as jnp
import numpy as np

from medattn_jax import augment

ALL = dict(dihedral=True, brightness=0.1, contrast=0.2, colour=0.1)


def test_flips_give_the_eight_transforms_and_no_other():
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  bits = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], bool)
  turned = np.asarray(augment.dihedral(jnp.array([image] * 8), bits))
  expected = [np.rot90(x, k) for x in (image, image[:, ::-1]) for k in range(4)]
  assert {x.tobytes() for x in turned} == {np.ascontiguousarray(x).tobytes() for x in expected}
  assert turned.dtype == np.uint8


def test_a_draw_depends_on_key_and_example_alone():
  key = jax.random.key(3)
  whole = augment.draw(key, jnp.arange(8), **ALL)
  part = augment.draw(key, jnp.array([5, 2]), **ALL)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
    np.testing.assert_array_equal(a[jnp.array([5, 2])], b)
  other = augment.draw(jax.random.key(4), jnp.arange(8), **ALL)
  assert not np.array_equal(whole.gain, other.gain)


def test_draws_stay_within_their_bounds_and_use_them():
  drawn = augment.draw(jax.random.key(0), jnp.arange(4000), **ALL)
  assert drawn.flips.mean(0).min() > 0.45 and drawn.flips.mean(0).max() < 0.55
  low, high = 0.8 * 0.9, 1.2 * 1.1
  assert low <= drawn.gain.min() < low + 0.03 and high - 0.03 < drawn.gain.max() <= high
  middle = 0.5 * drawn.gain.mean(-1) + drawn.bias[:, 0]
  assert np.abs(middle - 0.5).max() <= 0.1 + 1e-6


def test_nothing_asked_is_nothing_done():
  drawn = augment.draw(
      jax.random.key(0), jnp.arange(5), dihedral=False, brightness=0.0, contrast=0.0, colour=0.0
  )
  assert not drawn.flips.any()
  assert (drawn.gain == 1).all() and (drawn.bias == 0).all()
