"""The tables of models answer by name and mend a typo."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

from medattn_jax import models
from medattn_jax.errors import UserError


@pytest.mark.parametrize("name, size, pooled", [
  ("inception_resnet_v2", 299, 1536), ("inception_v3", 299, 2048), ("resnet_small", 160, 128),
  ("resnet_local", 125, 128), ("googlenet", 197, 1024), ("vgg16", 203, 4096),
  ("vgg16_bn", 197, 4096), ("resnet18", 203, 512), ("resnet50", 197, 2048),
  ("densenet121", 203, 1024)])
def test_backbones_answer_alike(name, size, pooled):
  net = models.backbone(name, num_classes=7)
  x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  (logits, out), _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x)
  assert logits.shape == (2, 7)
  assert out["pooled"].shape == (2, pooled) and out["pooled"].dtype == jnp.float32
  channels = 512 if name.startswith("vgg") else pooled
  assert out["features"].shape[-1] == channels and min(out["features"].shape) > 0
  bare, _ = jax.eval_shape(models.backbone(name).init_with_output, jax.random.key(0), x)
  assert bare[0] is None


@pytest.mark.parametrize("name, least", [*models.SMALLEST.items(), ("resnet18", 1)])
def test_no_smaller_picture_leaves_features(name, least):
  def cells(size):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    (_, out), _ = jax.eval_shape(models.backbone(name).init_with_output, jax.random.key(0), x)
    return out["features"].shape[1]

  assert models.SMALLEST.get(name, 1) == least
  assert cells(least) == 1
  with contextlib.suppress(ZeroDivisionError):  # kernel_init, of a layer that no pixel reaches
    assert cells(least - 1) == 0


def test_the_small_backbones_stride_is_16():
  for size, cells in ((160, 10), (128, 8), (125, 8)):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    (_, out), _ = jax.eval_shape(
      models.backbone("resnet_small").init_with_output, jax.random.key(0), x)
    assert out["features"].shape == (1, cells, cells, 128)


def test_a_typo_is_answered_with_the_nearest_name():
  with pytest.raises(UserError, match=r"inception_v3.*did you mean inception_v3"):
    models.backbone("inceptionv3")


def test_tables_speak_of_the_same_models_and_branches():
  for name, phases in models.PHASES.items():
    if not models.ANSWERS[name]:
      continue  # one network, one answer
    last = list(phases.values())[-1]
    stops = {stop for answer in models.ANSWERS[name].values() for stop in answer}
    assert {f"y_{branch[0].upper()}" for branch in last} == stops
