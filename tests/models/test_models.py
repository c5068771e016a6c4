"""The tables of models answer by name and mend a typo."""

import jax
import jax.numpy as jnp
import pytest

from medattn_jax import models
from medattn_jax.errors import UserError


@pytest.mark.parametrize("name, size, pooled", [
  ("inception_resnet_v2", 299, 1536), ("inception_v3", 299, 2048), ("resnet_small", 160, 128),
  ("resnet_local", 125, 128)])
def test_backbones_answer_alike(name, size, pooled):
  net = models.backbone(name, num_classes=7)
  x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  (logits, out), _ = jax.eval_shape(net.init_with_output, jax.random.key(0), x)
  assert logits.shape == (2, 7)
  assert out["pooled"].shape == (2, pooled) and out["pooled"].dtype == jnp.float32
  assert out["features"].shape[-1] == pooled
  bare, _ = jax.eval_shape(models.backbone(name).init_with_output, jax.random.key(0), x)
  assert bare[0] is None


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
    last = list(phases.values())[-1]
    stops = {stop for answer in models.ANSWERS[name].values() for stop in answer}
    assert {f"y_{branch[0].upper()}" for branch in last} == stops
