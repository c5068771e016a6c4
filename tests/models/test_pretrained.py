"""Converted weights answer as the reference implementations did."""

import importlib.util
import re

import jax
import numpy as np
import pytest

from medattn_jax import models
from medattn_jax.errors import UserError
from medattn_jax.models import pretrained

NAMES = tuple(pretrained.HEADS)


@pytest.fixture(scope="module")
def weights(shared):
  """The module that draws the reference's weights and reads what it answered."""
  spec = importlib.util.spec_from_file_location(
    "synthetic_weights", shared / "parity" / "synthetic_weights.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def golden(weights, shared):
  """name → the reference's answers, and its tensors' shapes."""
  return lambda name: weights.load_golden(shared / "parity" / f"golden_{name}.json")


@pytest.fixture
def constants(golden):
  """name → a state dict whose n-th tensor holds n alone, in the memory of one number."""
  return lambda name: {
    tensor: np.broadcast_to(np.float32(n), shape)
    for n, (tensor, shape) in enumerate(golden(name)["tensors"].items())}


# Both VGG-16 have weights of half a gigabyte: one of them is enough for every day.
@pytest.mark.parametrize("name", [
  pytest.param(name, marks=[pytest.mark.slow] if name == "vgg16" else []) for name in NAMES])
def test_answers_as_the_reference(name, golden, weights):
  expected = golden(name)
  state = weights.state_dict(expected["tensors"], expected["weight_seed"])
  variables = pretrained.from_torch(name, state)
  net = models.backbone(name, expected["num_classes"])
  images = weights.images(**expected["input"])
  logits, out = jax.jit(lambda v, x: net.apply(v, x, train=False))(variables, images)
  wanted = np.asarray(expected["logits"])
  error = np.abs(logits - wanted).max() / np.ptp(wanted)
  wanted = np.asarray(expected["pooled"])
  pooled_error = np.abs(out["pooled"][:, :16] - wanted).max() / np.ptp(wanted)
  print(f"{name}: logits {error:.1e}, pooled {pooled_error:.1e} of their range")
  assert error < 1e-4
  assert pooled_error < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_does_not_fit(name, constants):
  state = constants(name)
  kernel = next(key for key, value in state.items() if value.ndim == 4)
  dense = next(key for key, value in state.items() if value.ndim == 2)
  *_, gone = (key for key, value in state.items() if value.ndim == 1)
  broken = {key: value for key, value in state.items() if key != gone}
  broken[kernel] = state[kernel][:, :, :1]
  broken[dense] = state[dense][:, 1:]
  broken["layer9.weight"] = np.zeros(3)
  with pytest.raises(UserError) as error:
    pretrained.from_torch(name, broken)
  missing, unknown, misshapen = str(error.value).split("; ")
  assert gone in missing and "layer9.weight" in unknown
  assert kernel in misshapen and dense in misshapen
  assert "num_batches_tracked" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_lands_once(name, constants):
  """Each of the state dict's numbers, and no other, is in one leaf of the variables."""
  state = constants(name)
  left = {float(value.flat[0]): value.size for key, value in state.items()
          if "num_batches" not in key and "AuxLogits" not in key}
  variables = pretrained.from_torch(name, state)
  assert set(variables) == {"params", "batch_stats"}
  for leaf in jax.tree.leaves(variables):
    assert leaf.dtype == np.float32
    assert leaf.min() == leaf.max()
    assert left.pop(float(leaf.flat[0])) == leaf.size
  assert not left


def test_googlenets_auxiliary_heads_are_left_behind(constants):
  state = constants("googlenet")
  more = {"aux1.conv.conv.weight": np.zeros((128, 512, 1, 1)), "aux2.fc2.bias": np.zeros(10)}
  found = [pretrained.from_torch("googlenet", s) for s in (state, {**state, **more})]
  assert jax.tree.all(jax.tree.map(np.array_equal, *found))


def test_the_names_in_the_file_of_densenets_weights(constants):
  """It says denselayer1.norm.1 where the module says denselayer1.norm1."""
  state = constants("densenet121")
  older = {re.sub(r"(denselayer\d+\.[a-z]+)", r"\1.", key): value for key, value in state.items()}
  assert "features.denseblock4.denselayer16.conv.2.weight" in older
  found = [pretrained.from_torch("densenet121", s) for s in (state, older)]
  assert jax.tree.all(jax.tree.map(np.array_equal, *found))


@pytest.mark.parametrize("name, head", [("vgg16", "classifier.6"), ("resnet50", "fc")])
def test_weights_without_a_head_make_a_network_without_classes(name, head, constants):
  state = {key: value for key, value in constants(name).items() if not key.startswith(head)}
  params = pretrained.from_torch(name, state)["params"]
  assert head.replace(".", "-") not in params
  assert ("classifier-3" in params) == (name == "vgg16")


def test_unknown_name():
  with pytest.raises(UserError, match="inception_v3"):
    pretrained.from_torch("inception_v4", {})
