"""The eight transforms of a square, and chance that depends on (key, example) alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax import augment, platforms

ALL = dict(dihedral=True, mirror=False, shift=0.25, brightness=0.1, contrast=0.2, colour=0.1)


def test_flips_give_the_eight_transforms_and_no_other():
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  bits = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], bool)
  turned = np.asarray(augment.dihedral(jnp.array([image] * 8), bits))
  expected = [np.rot90(x, k) for x in (image, image[:, ::-1]) for k in range(4)]
  assert {x.tobytes() for x in turned} == {np.ascontiguousarray(x).tobytes() for x in expected}
  assert turned.dtype == np.uint8


def test_every_platform_turns_alike():
  """In the CPU's call and as the others run it; gradients too."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.random((8, 5, 5, 2), np.float32))
  slope = jnp.asarray(rng.random((8, 5, 5, 2), np.float32))
  flips = jnp.array(augment.VIEWS)
  expected, expected_pull = jax.vjp(lambda x: augment._at_once(x, flips), images)
  turned, pull = jax.vjp(lambda x: augment.dihedral(x, flips), images)
  np.testing.assert_array_equal(turned, expected)
  np.testing.assert_array_equal(pull(slope)[0], expected_pull(slope)[0])
  assert len({x.tobytes() for x in np.asarray(augment.dihedral(
    jnp.stack([images[0]] * 8), jnp.array(augment.VIEWS)))}) == 8


def test_a_draw_depends_on_key_and_example_alone():
  key = jax.random.key(3)
  whole = augment.draw(key, jnp.arange(8), 16, **ALL)
  part = augment.draw(key, jnp.array([5, 2]), 16, **ALL)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
    assert (a[jnp.array([5, 2])] == b).all()
  other = augment.draw(jax.random.key(4), jnp.arange(8), 16, **ALL)
  assert not np.array_equal(whole.gain, other.gain)


def test_draws_stay_within_their_bounds_and_use_them():
  drawn = augment.draw(jax.random.key(0), jnp.arange(4000), 16, **ALL)
  assert drawn.flips.mean(0).min() > 0.45 and drawn.flips.mean(0).max() < 0.55
  assert set(np.unique(drawn.offset)) == set(range(-4, 5))
  low, high = 0.8 * 0.9, 1.2 * 1.1
  assert low <= drawn.gain.min() < low + 0.03 and high - 0.03 < drawn.gain.max() <= high
  middle = 0.5 * drawn.gain.mean(-1) + drawn.bias[:, 0]
  assert np.abs(middle - 0.5).max() <= 0.1 + 1e-6


def test_nothing_asked_is_nothing_done():
  drawn = augment.draw(
      jax.random.key(0), jnp.arange(5), 16, dihedral=False, mirror=False, shift=0.0, brightness=0.0,
      contrast=0.0, colour=0.0)
  assert drawn.flips is None and drawn.offset is None
  assert (drawn.gain == 1).all() and (drawn.bias == 0).all()


def test_a_mirror_flips_left_and_right_alone():
  drawn = augment.draw(jax.random.key(0), jnp.arange(400), 16, **{
    **ALL, "dihedral": False, "mirror": True})
  assert not drawn.flips[:, [0, 2]].any()
  assert 0.4 < drawn.flips[:, 1].mean() < 0.6


def shift_by_hand(image, down, across):
  moved, side = np.zeros_like(image), len(image)
  for row in range(side):
    for column in range(side):
      if 0 <= row - down < side and 0 <= column - across < side:
        moved[row, column] = image[row - down, column - across]
  return moved


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_a_shift_moves_pixels_and_fills_with_zero(platform, dtype, monkeypatch):
  """On every platform, to the last bit; and the gradient goes back the way the pixels came."""
  monkeypatch.setattr(platforms, "traced_for", lambda: platform)
  rng = np.random.default_rng(0)
  offsets = np.array([(0, 0), (1, -2), (-3, 4), (4, 4), (-5, 1)], np.int32)
  images, slope = (jnp.asarray(255 * rng.random((5, 5, 5, 2)), dtype) for _ in range(2))
  drawn = augment.Draw(None, jnp.asarray(offsets), None, None, None)
  by_hand = lambda arrays, sign: np.stack([
    shift_by_hand(array, *(sign * by)) for array, by in zip(arrays, offsets, strict=True)])

  moved = jax.jit(lambda x: augment.move(x, drawn))(images)
  assert moved.dtype == dtype
  np.testing.assert_array_equal(moved, by_hand(np.asarray(images), 1))
  if dtype != jnp.uint8:
    (back,) = jax.vjp(lambda x: augment.move(x, drawn), images)[1](slope)
    np.testing.assert_array_equal(back, by_hand(np.asarray(slope), -1))


def test_normalising_shades_each_image_of_a_batch_of_pairs():
  drawn = augment.draw(jax.random.key(1), jnp.arange(6), 8, **ALL)
  images = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 3), np.uint8)
  mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])
  made = augment.normalise(jnp.array(images), drawn, mean, std, jnp.float32)
  plain = np.stack([
    (image / 255 * gain + bias - mean) / std
    for image, gain, bias in zip(
      images.reshape(6, 8, 8, 3), np.asarray(drawn.gain), np.asarray(drawn.bias), strict=True)])
  np.testing.assert_allclose(made.reshape(plain.shape), plain, atol=2e-5)


def test_gray_is_normalised_for_each_of_three_channels_where_they_differ():
  images = np.random.default_rng(0).integers(0, 256, (2, 1, 4, 4, 1), np.uint8)
  mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  made = augment.normalise(jnp.array(images), None, mean, std, jnp.float32)
  np.testing.assert_allclose(made, (images / 255 - mean) / std, atol=1e-5)
  shaded = augment.draw(jax.random.key(1), jnp.arange(2), 4, **{**ALL, "colour": 0.0})
  made = augment.normalise(jnp.array(images), shaded, mean, std, jnp.float32)
  gain, bias = (np.asarray(x)[:, None, None, None] for x in (shaded.gain, shaded.bias))
  np.testing.assert_allclose(made, (images / 255 * gain + bias - mean) / std, atol=2e-5)
  alike = augment.normalise(jnp.array(images), None, (0.5,) * 3, (0.25,) * 3, jnp.float32)
  assert alike.shape == images.shape
