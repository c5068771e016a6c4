"""Converted weights answer as the reference implementations did."""

import importlib.util

import jax
import numpy as np
import pytest

from medattn_jax import models
from medattn_jax.errors import UserError
from medattn_jax.models import pretrained

NAMES = ("inception_resnet_v2", "inception_v3")


@pytest.fixture(scope="module", params=NAMES)
def reference(shared, request):
  """(name, golden answers, the reference's state dict, its input)."""
  spec = importlib.util.spec_from_file_location(
    "synthetic_weights", shared / "parity" / "synthetic_weights.py")
  weights = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(weights)
  golden = weights.load_golden(shared / "parity" / f"golden_{request.param}.json")
  state = weights.state_dict(golden["tensors"], golden["weight_seed"])
  return request.param, golden, state, weights.images(**golden["input"])


def test_answers_as_the_reference(reference):
  name, golden, state, images = reference
  variables = pretrained.from_torch(name, state)
  net = models.backbone(name, golden["num_classes"])
  logits, out = jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, images)
  wanted = np.asarray(golden["logits"])
  error = np.abs(logits - wanted).max() / np.ptp(wanted)
  wanted = np.asarray(golden["pooled"])
  pooled_error = np.abs(out["pooled"][:, :16] - wanted).max() / np.ptp(wanted)
  print(f"{name}: logits {error:.1e}, pooled {pooled_error:.1e} of their range")
  assert error < 1e-4
  assert pooled_error < 1e-4


def test_refuses_what_does_not_fit(reference):
  name, _, state, _ = reference
  kernel = next(key for key in state if key.endswith("conv.weight"))
  mean = next(key for key in state if key.endswith("running_mean"))
  broken = {key: value for key, value in state.items() if key != mean}
  broken[kernel] = state[kernel][:, :, :1]
  broken["layer9.weight"] = np.zeros(3)
  with pytest.raises(UserError) as error:
    pretrained.from_torch(name, broken)
  for tensor in (kernel, mean, "layer9.weight"):
    assert tensor in str(error.value)
  assert "num_batches_tracked" not in str(error.value)


def test_every_tensor_lands_once(reference):
  """All of the state dict's numbers, and no others, are in the variables."""
  name, _, state, _ = reference
  variables = pretrained.from_torch(name, state)
  total = lambda arrays: sum(float(np.abs(a).sum(dtype=np.float64)) for a in arrays)
  wanted = [v for key, v in state.items() if "num_batches" not in key and "AuxLogits" not in key]
  assert total(jax.tree.leaves(variables)) == pytest.approx(total(wanted), rel=1e-9)
  assert sum(a.size for a in jax.tree.leaves(variables)) == sum(a.size for a in wanted)


def test_unknown_name():
  with pytest.raises(UserError, match="inception_v3"):
    pretrained.from_torch("inception_v4", {})
