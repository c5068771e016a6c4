"""Converted weights answer as the reference implementations did."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

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


@pytest.fixture(scope="module")
def drawn():
  """name → variables of its own layout with two classes, all numbers drawn."""
  def draw(name, **options):
    rng = np.random.default_rng(0)
    leaves = pretrained.layout(name, 2, **options)
    return traverse_util.unflatten_dict({
      path: rng.random(leaf.shape, np.float32) + 0.5 for path, leaf in leaves.items()})
  return draw


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


@pytest.mark.parametrize("name", ["googlenet", "vgg16"])
@pytest.mark.parametrize("classes", [None, 3])
def test_the_layout_is_that_of_the_network(name, classes):
  net = models.backbone(name, classes)
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
  assert pretrained.layout(name, classes) == traverse_util.flatten_dict(dict(shapes))


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
  with pytest.raises(UserError, match=r"'resnet5' .*did you mean resnet50\?.* resnet18"):
    pretrained.to_torch("resnet5", {})


def equal(one, other):
  return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
    jax.tree.map(np.array_equal, one, other))


# VGG's hundred million numbers are for the long tests.
@pytest.mark.parametrize("name", [
  pytest.param(name, marks=[pytest.mark.slow] if name.startswith("vgg") else [])
  for name in NAMES])
def test_there_and_back_is_bit_equal(name, drawn):
  variables = drawn(name)
  state = pretrained.to_torch(name, variables)
  assert equal(pretrained.from_torch(name, state), {"params": {}, "batch_stats": {}} | variables)
  again = pretrained.to_torch(name, pretrained.from_torch(name, state))
  assert equal(again, state)
  counters = {key for key in state if key.endswith("num_batches_tracked")}
  assert counters == {key.replace("running_var", "num_batches_tracked")
                      for key in state if key.endswith("running_var")}
  assert all(state[key].shape == () and state[key].dtype == np.int64 for key in counters)
  arrays = [value for key, value in state.items() if key not in counters]
  assert all(x.flags.c_contiguous and x.flags.owndata and x.dtype == np.float32 for x in arrays)


def test_each_kind_of_array_turns_as_pytorch_lays_it(drawn):
  variables = drawn("resnet18")
  state, params = pretrained.to_torch("resnet18", variables), variables["params"]
  kernel = params["layer2-0"]["conv1"]["kernel"]
  assert state["layer2.0.conv1.weight"].shape == (128, 64, 3, 3)
  assert state["layer2.0.conv1.weight"][5, 7, 0, 2] == kernel[0, 2, 7, 5]
  assert state["fc.weight"][1, 30] == params["fc"]["kernel"][30, 1]
  np.testing.assert_array_equal(state["bn1.weight"], params["bn1"]["scale"])
  np.testing.assert_array_equal(state["bn1.running_var"], variables["batch_stats"]["bn1"]["var"])


def test_googlenets_auxiliary_heads_leave_with_it(drawn):
  """What sees a grid counts it (row, column, channel) here and (channel, row, column) there."""
  variables = drawn("googlenet", aux=True)
  state = pretrained.to_torch("googlenet", variables)
  kernel = variables["params"]["aux1"]["fc1"]["kernel"].reshape(4, 4, 128, 1024)
  weight = state["aux1.fc1.weight"].reshape(1024, 128, 4, 4)
  assert weight[900, 100, 3, 1] == kernel[3, 1, 100, 900]
  assert {key.split(".")[0] for key in state} >= {"aux1", "aux2", "conv1"}


def test_a_trained_backbone_may_lack_what_its_model_leaves_out(drawn):
  variables = drawn("inception_resnet_v2")
  for tree in variables.values():
    tree.pop("conv2d_7b")
  variables["params"].pop("classif")
  state = pretrained.to_torch("inception_resnet_v2", variables)
  assert "block8.conv2d.weight" in state
  assert not [key for key in state if key.startswith(("conv2d_7b", "classif"))]


def test_to_torch_refuses_what_does_not_fit(drawn):
  variables = drawn("resnet18")
  params = variables["params"]
  del params["layer1-0"]["conv2"]
  params["layer9"] = {"kernel": np.zeros(3)}
  params["conv1"]["kernel"] = params["conv1"]["kernel"][:3, :3]  # of the small stem
  with pytest.raises(UserError) as error:
    pretrained.to_torch("resnet18", variables)
  missing, unknown, misshapen = str(error.value).split("; ")
  assert "layer1-0/conv2/kernel" in missing and "layer9/kernel" in unknown
  assert "conv1/kernel (3, 3, 3, 64)" in misshapen
  with pytest.raises(UserError, match="constants; accepted: params and batch_stats"):
    pretrained.to_torch("resnet18", {"constants": {}, **variables})


def test_a_head_of_another_size_is_left_out_and_that_is_said(drawn, capsys):
  state = pretrained.to_torch("resnet18", drawn("resnet18"))
  with_head = pretrained.from_torch("resnet18", state, num_classes=2)
  assert "fc" in with_head["params"] and not capsys.readouterr().err
  without = pretrained.from_torch("resnet18", state, num_classes=5)
  assert "head is of 2 classes, not 5: left out" in capsys.readouterr().err
  assert set(with_head["params"]) - set(without["params"]) == {"fc"}


def test_other_peoples_names(drawn, constants):
  """timm's VGG writes its dense layers as convolutions; Cadene calls every head last_linear."""
  state = constants("vgg16")
  timm = {key.replace("classifier.0", "pre_logits.fc1").replace("classifier.3", "pre_logits.fc2")
          .replace("classifier.6", "head.fc"): value for key, value in state.items()}
  for layer, grid in (("fc1", (512, 7, 7)), ("fc2", (4096, 1, 1))):
    key = f"pre_logits.{layer}.weight"
    timm[key] = np.broadcast_to(timm[key].flat[0], (4096, *grid))
  assert equal(*(pretrained.from_torch("vgg16", one) for one in (state, timm)))
  state = pretrained.to_torch("resnet18", drawn("resnet18"))
  cadene = {key.replace("fc.", "last_linear."): value for key, value in state.items()}
  assert equal(*(pretrained.from_torch("resnet18", one) for one in (state, cadene)))
  with pytest.raises(UserError, match=r"fc.bias and last_linear.bias are two names"):
    pretrained.from_torch("resnet18", {**state, "last_linear.bias": np.zeros(2)})


def test_a_dense_layer_over_a_grid_is_the_convolution_over_it():
  """[out, c, h, w] and its flat form make the same kernel, which sees (row, column, channel)."""
  rng = np.random.default_rng(0)
  weight = rng.random((5, 2, 3, 4), np.float32)
  kernel = pretrained._ours(weight, (24, 5), (2, 3, 4))
  np.testing.assert_array_equal(pretrained._ours(weight.reshape(5, 24), (24, 5), (2, 3, 4)), kernel)
  x = rng.random((2, 3, 4), np.float32)
  np.testing.assert_allclose(
    x.transpose(1, 2, 0).reshape(-1) @ kernel, np.einsum("ochw,chw->o", weight, x), rtol=1e-6)
  np.testing.assert_array_equal(pretrained._theirs(kernel, (2, 3, 4)), weight.reshape(5, 24))


def test_halves_are_widened_and_integers_refused(drawn):
  state = pretrained.to_torch("resnet18", drawn("resnet18"))
  exact = {key: value.astype(jnp.bfloat16) if value.ndim else value for key, value in state.items()}
  found = pretrained.from_torch("resnet18", exact)["params"]["conv1"]["kernel"]
  assert found.dtype == np.float32
  np.testing.assert_array_equal(
    found.transpose(3, 2, 0, 1), exact["conv1.weight"].astype(np.float32))
  quantised = {**state, "layer1.0.conv1.weight": np.zeros((64, 64, 3, 3), np.int8)}
  with pytest.raises(UserError, match=r"not of floats: layer1\.0\.conv1\.weight"):
    pretrained.from_torch("resnet18", quantised)
