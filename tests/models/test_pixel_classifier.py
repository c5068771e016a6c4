"""The pixel classifier's passes over bytes are the plain classifier on standardised features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax.models import pixel_classifier

IMAGES, SIZE = 11, 9


def bank(channels, seed=0):
  """images [R, H, W] planar, valid, mean, scale of a bank of which the last image only fills."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (IMAGES + 1, channels, SIZE, SIZE), np.uint8)
  real = images[:IMAGES].astype(np.float64)
  mean = real.mean(0)
  features = IMAGES * channels
  scale = 1 / ((real - mean).std() * np.sqrt(features))
  valid = np.repeat(np.arange(IMAGES + 1) < IMAGES, channels).astype(np.float32)
  planes = images.reshape(-1, SIZE, SIZE)
  standardised = ((real - mean) * scale).reshape(-1, SIZE, SIZE)
  return {"images": planes, "valid": valid, "mean": mean.astype(np.float32),
          "scale": np.float32(scale)}, standardised


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classifier", ["linear", "conv"])
def test_scores_are_the_plain_classifiers(classifier, channels):
  arrays, features = bank(channels)
  rows = len(arrays["images"])
  params = pixel_classifier.init(jax.random.key(0), classifier, rows, hidden=4, bias=2.0)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
  kernel = np.asarray(params["rows"]["kernel"], np.float64)[: len(features)]
  if classifier == "linear":
    plain = np.einsum("r,rhw->hw", kernel[:, 0], features)
  else:
    stacked = np.asarray(jax.lax.conv_general_dilated(
      features[None].astype(np.float32),
      kernel.reshape(-1, 3, 3, 4).transpose(3, 0, 1, 2).astype(np.float32), (1, 1), "SAME"))[0]
    hidden = np.maximum(stacked / 9 + np.asarray(params["hidden_bias"])[:, None, None], 0)
    plain = np.einsum("f,fhw->hw", np.asarray(params["out"]), hidden) / 4
  answers = pixel_classifier.summand(params["rows"]["kernel"], **arrays)
  found = pixel_classifier.scores(answers, params)
  np.testing.assert_allclose(found, plain + float(params["bias"][0]), atol=2e-4)


def test_a_step_moves_the_scores_alike_whatever_the_classifier():
  """Adam's first step is of one size in every parameter: one rate then serves both classifiers."""
  arrays, _ = bank(1)

  def moved(classifier):
    rows = len(arrays["images"])
    params = pixel_classifier.init(jax.random.key(0), classifier, rows, hidden=8, bias=2.0)
    answer = lambda params: pixel_classifier.scores(
      pixel_classifier.summand(params["rows"]["kernel"], **arrays), params)
    gradient = jax.grad(lambda params: answer(params)[2:5, 2:5].mean())(params)
    for _ in range(20):
      params = jax.tree.map(lambda p, g: p + 0.01 * jnp.sign(g), params, gradient)
    return float(answer(params)[2:5, 2:5].mean()) - 2

  assert 0.3 < moved("conv") / moved("linear") < 3


@pytest.mark.parametrize("outputs", [1, 5])
def test_the_gradient_is_the_plain_products(outputs):
  arrays, features = bank(3)
  cotangent = np.random.default_rng(2).normal(size=(outputs, SIZE, SIZE)).astype(np.float32)
  kernel = jnp.zeros((len(arrays["images"]), outputs))
  _, pull = jax.vjp(lambda k: pixel_classifier.summand(k, **arrays), kernel)
  (found,) = pull(cotangent)
  plain = np.einsum("mhw,rhw->rm", cotangent, features)
  np.testing.assert_allclose(found[: len(features)], plain, atol=1e-4)
  assert not np.asarray(found[len(features) :]).any()  # what only fills is not learnt from


@pytest.mark.parametrize("outputs", [1, 5])
def test_blocks_and_one_kernel_agree(outputs, monkeypatch):
  rng = np.random.default_rng(3)
  images = rng.integers(0, 256, (37, 6, 7), np.uint8)
  kernel = rng.normal(size=(37, outputs)).astype(np.float32)
  gradient = rng.normal(size=(outputs, 6, 7)).astype(np.float32)
  monkeypatch.setattr(pixel_classifier, "_BLOCK_BYTES", 5 * 4 * 42)  # blocks of 5, a rest of 2
  np.testing.assert_allclose(
    pixel_classifier._blocked(kernel, images), np.einsum("rm,rhw->mhw", kernel, images),
    rtol=1e-4, atol=1e-2)
  for by_tpu, plain in (
      (pixel_classifier._product(kernel, images), pixel_classifier._blocked(kernel, images)),
      (pixel_classifier._product_gradient(gradient, images),
       pixel_classifier._blocked_gradient(gradient, images))):
    np.testing.assert_allclose(by_tpu, plain, rtol=1e-4, atol=1e-1)
  np.testing.assert_allclose(
    pixel_classifier._fused(kernel, images), pixel_classifier._blocked(kernel, images), rtol=1e-4,
    atol=1e-2)
  np.testing.assert_allclose(
    pixel_classifier._fused_gradient(gradient, images),
    pixel_classifier._blocked_gradient(gradient, images), rtol=1e-4, atol=1e-1)


def test_a_batch_is_a_bank_of_its_own_images():
  arrays, features = bank(3)
  pixels = arrays["images"].reshape(-1, 3, SIZE, SIZE)[:IMAGES].transpose(0, 2, 3, 1)
  kernel = np.random.default_rng(4).normal(size=(len(features), 2)).astype(np.float32)
  parts = [
    pixel_classifier.batch_summands(kernel[3 * own.start : 3 * own.stop], pixels[None, own, None])
    for own in (slice(0, 4), slice(4, IMAGES))]  # two devices
  found = pixel_classifier.batch_answers(jax.tree.map(jnp.add, *parts))
  np.testing.assert_allclose(found, np.einsum("rm,rhw->mhw", kernel, features), atol=1e-4)


def test_every_pixel_matters_at_first():
  for classifier, hidden in (("linear", 0), ("conv", 8), ("conv", 5), ("conv", 1)):
    arrays, _ = bank(1)
    params = pixel_classifier.init(
      jax.random.key(0), classifier, len(arrays["images"]), hidden, 2.0)
    answers = pixel_classifier.summand(params["rows"]["kernel"], **arrays)
    weights = jax.nn.sigmoid(pixel_classifier.scores(answers, params))
    np.testing.assert_allclose(weights, jax.nn.sigmoid(2.0), atol=1e-5)
