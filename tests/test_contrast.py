"""Local contrast equals a plain Gaussian high-pass, the same in the view and in a crop."""

import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter

from medattn_jax import contrast

RNG = np.random.default_rng(0)


def photograph(size=120):
  smooth = gaussian_filter(RNG.normal(size=(size, size, 3)), (12, 12, 0)) * 3 + 0.5
  return np.clip(smooth, 0.2, 0.8).astype(np.float32)


def test_means_are_those_of_a_gaussian():
  image = photograph()
  means = np.asarray(contrast.local_means(image[None], 0.05)[0])
  blur = lambda channel: gaussian_filter(channel, 0.05 * 120, mode="nearest")
  blurred = np.stack([blur(image[..., c]) for c in range(3)], -1)
  centres = ((np.arange(20) + 0.5) * 6 - 0.5).astype(int)
  inner = slice(4, 16)
  expected = blurred[centres][:, centres]
  np.testing.assert_allclose(means[inner, inner], expected[inner, inner], atol=0.01)


def test_light_and_tint_go_and_a_lesion_stays():
  image = np.full((1, 120, 120, 3), (0.7, 0.4, 0.2), np.float32)
  image *= np.linspace(0.7, 1.2, 120, dtype=np.float32)[None, None, :, None]
  image[0, 60:64, 60:64] -= 0.1
  means = contrast.local_means(image, 0.05)
  left = np.asarray(contrast.subtract(jnp.asarray(image), means, 4.0))[0]
  assert np.abs(left[30:50, 20:100] - 0.5).max() < 0.03
  assert (left[61:63, 61:63] < 0.25).all()


def test_a_crop_shows_what_the_whole_shows():
  image = photograph()[None]
  means = contrast.local_means(image, 0.05)
  whole = contrast.subtract(jnp.asarray(image), means, 4.0)
  corners = np.array([[[0, 0], [17, 80]]], np.int32)
  crops = np.stack([image[:, r : r + 40, c : c + 40] for r, c in corners[0]], 1)
  shown = contrast.subtract_crops(jnp.asarray(crops), means, corners, 120, 4.0)
  for k, (r, c) in enumerate(corners[0]):
    np.testing.assert_allclose(shown[:, k], whole[:, r : r + 40, c : c + 40], atol=1e-5)
