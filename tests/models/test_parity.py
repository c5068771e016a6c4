"""At any size the backbones answer as torchvision's and timm's, and their gradients are slopes."""

import functools
import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from benchmarks import parity
from medattn_jax import models
from medattn_jax.models import pretrained

NAMES = tuple(pretrained.HEADS)
# Two sizes of which no grid divides evenly; benchmarks.parity asks all four of each.
SIZES = {
  "inception_resnet_v2": (203, 492), "inception_v3": (197, 384), "googlenet": (197, 492),
  "vgg16": (203, 384), "vgg16_bn": (197, 492), "resnet18": (203, 384), "resnet50": (197, 492),
  "densenet121": (203, 384)}


@pytest.fixture(scope="module")
def torch():
  """PyTorch, where it, torchvision and timm are installed."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in parity.TORCH:
      pytest.importorskip(library, reason=f"{library} is not installed (the parity extra)")
  return importlib.import_module("torch")


def deviation(case):
  """The largest difference, as a share of the range of the reference's logits."""
  variables = pretrained.from_torch(case.name, case.state)
  net = models.backbone(case.name, case.logits.shape[1])
  logits, _ = jax.jit(functools.partial(net.apply, train=False))(variables, case.images)
  assert np.ptp(case.logits) > 0.1
  return np.abs(logits - case.logits).max() / np.ptp(case.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes(name, torch):
  for case in parity.of_torch(name, SIZES[name]):
    found = deviation(case)
    print(f"{name} {case.images.shape[1]}²: {found:.1e} of the logits' range")
    assert found < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [
  ("inception_v3", 203), ("vgg16", 224), ("resnet18", 197), ("densenet121", 203)])
def test_timms_own(name, size, torch):
  """(timm's VGG sees a larger grid otherwise than torchvision's: at 224² they are one.)"""
  case, = parity.of_torch(name, [size], timm=True)
  assert deviation(case) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_to_torch_is_what_the_published_network_takes(name, torch):
  module = parity.torch_model(name, classes=3)
  before = {key: value.numpy().copy() for key, value in module.state_dict().items()}
  drawn = parity.draw({key: value.shape for key, value in before.items()}, seed=1)
  state = pretrained.to_torch(name, pretrained.from_torch(name, drawn))
  module.load_state_dict({key: torch.as_tensor(x) for key, x in state.items()}, strict=True)
  for key, value in module.state_dict().items():
    np.testing.assert_array_equal(value.numpy(), drawn[key], err_msg=key)
    assert value.numpy().dtype == before[key].dtype


# A leaf that is wholly wrong is more than this of its group's slope, whatever the network.
TOLERANCE = 0.01
# Shares of the function's value: where neither its kinks nor float32's rounding weigh much.
STEPS = tuple(np.linspace(6e-3, 16e-3, 16))


def errors(value_and_gradient, params, groups):
  """How far the slopes found by steps both ways are from the gradient, for `groups` of leaves.

  Along a direction in which each leaf of the group has an equal share of the slope; as a share of
  it. One line through all STEPS, by least squares, so that float32's rounding averages out. Leaves
  without a slope (a bias before a normalisation) are left out.
  """
  value, gradient = value_and_gradient(params)
  alone = jax.jit(lambda params: value_and_gradient(params)[0])
  flat, slopes = (traverse_util.flatten_dict(jax.device_get(tree)) for tree in (params, gradient))
  felt = {path: np.linalg.norm(slopes[path]) * np.linalg.norm(flat[path]) for path in flat}
  dead = {path for path in flat if felt[path] < 1e-6 * np.median(list(felt.values()))}
  paths, found = sorted(flat.keys() - dead), []
  for own in (paths[i::groups] for i in range(min(groups, len(paths)))):
    step = {path: slopes[path] / np.square(slopes[path], dtype=np.float64).sum() for path in own}

    rises, wanted = [], []
    for share in STEPS:
      far = share * max(1, abs(float(value))) / len(own)
      moved = [{path: (flat[path] + sign * far * step[path]).astype(np.float32) for path in own}
               for sign in (1, -1)]
      up, down = (float(alone(traverse_util.unflatten_dict({**flat, **one}))) for one in moved)
      rises.append(up - down)
      wanted.append(sum(
        np.vdot(slopes[path].astype(np.float64), moved[0][path].astype(np.float64) - moved[1][path])
        for path in own))
    found.append(np.dot(rises, wanted) / np.dot(wanted, wanted) - 1)
  return np.array(found), dead


def test_a_wrong_gradient_shows():
  """One leaf of eight, a tenth too long; and the same function with the right one."""

  @jax.custom_vjp
  def bent(x):
    return jnp.tanh(x)

  bent.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (1.1 * g / jnp.cosh(x) ** 2,))
  drawn = np.random.default_rng(0).normal(0, 0.5, (8, 40)).astype(np.float32)
  params = {"layer": {str(i): row for i, row in enumerate(drawn)}}

  def function(params, last):
    *rows, odd = params["layer"].values()
    return sum(jnp.tanh(row).sum() for row in rows) + last(odd).sum()

  for last, right in ((jnp.tanh, True), (bent, False)):
    slope = jax.jit(jax.value_and_grad(functools.partial(function, last=last)))
    found, dead = errors(slope, params, 1)
    assert not dead and (np.abs(found).max() < TOLERANCE) == right


# The smallest at which the last grid of each still has several cells to normalise over. (Of
# ResNet-50's 2×2 at 64² float32's rounding alone makes 1 to 2 %.)
SMALL = {"inception_resnet_v2": 107, "inception_v3": 107, "resnet50": 97, "vgg16": 48}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_slopes(name):
  """In training, by the groups' own statistics: the arithmetic of the gradient is norm.py's."""
  size, rng = SMALL.get(name, 64), np.random.default_rng(0)
  net = models.backbone(name, 3, group_size=2)
  shapes = {path: leaf.shape for path, leaf in pretrained.layout(name, 3).items()}
  scale = {"scale": (1, 0.1), "var": (1.5, 0.1), "bias": (0, 0.1), "mean": (0, 0.1)}

  def draw(path, shape):
    mean, deviation = scale.get(path[-1], (0, np.sqrt(2 / np.prod(shape[:-1]))))
    return (mean + deviation * rng.standard_normal(shape)).astype(np.float32)

  variables = {"batch_stats": {}} | traverse_util.unflatten_dict(
    {path: draw(path, shape) for path, shape in shapes.items()})
  images = rng.standard_normal((4, size, size, 3), np.float32)
  weights = rng.standard_normal((4, 3), np.float32)

  @jax.jit
  @jax.value_and_grad
  def function(params):
    (logits, _), _ = net.apply(
      {**variables, "params": params}, images, train=True, mutable=["batch_stats"])
    return (logits * weights).sum()

  found, dead = errors(function, variables["params"], 12)
  # A normalisation takes away what is the same for all pixels.
  every = {(*path[1:-1], "bias") for path, shape in shapes.items() if len(shape) == 4}
  assert dead == {"vgg16_bn": every, "inception_resnet_v2": {("block8", "conv2d", "bias")}}.get(
    name, set())
  print(f"{name}: slopes and gradients differ by {np.abs(found).max():.1e}")
  assert np.abs(found).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_answers_alike(name, shared):
  case = parity.of_golden(shared / "parity", name)
  found = parity.answer(case, pretrained.from_torch(name, case.state), jnp.bfloat16, 0)["logits"]
  drift = np.abs(found - case.logits).max() / np.ptp(case.logits)
  print(f"{name}: bfloat16 drifts by {drift:.1e} of the logits' range")
  np.testing.assert_array_equal(found.argmax(1), case.logits.argmax(1))
  assert 1e-5 < drift < 0.02
