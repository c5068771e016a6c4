"""The published backbones: two stems, stages that can be changed, dropout, auxiliary heads."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax import models
from medattn_jax.errors import UserError
from medattn_jax.models import zoom_in_net
from medattn_jax.models.dropout import dropout

NAMES = ("googlenet", "vgg16", "vgg16_bn", "resnet18", "resnet50", "densenet121")
# Fewer layers where there are many alike.
SHORT = {
  "resnet18": {"blocks": (1, 1, 1, 1)}, "resnet50": {"blocks": (1, 1, 1, 1)},
  "densenet121": {"blocks": (2, 2, 2, 2)}}
# Side of the features with the small stem at 28, 32, 48 and 64 pixels.
SIDES = {
  "googlenet": (4, 4, 6, 8), "vgg16": (1, 2, 3, 4), "vgg16_bn": (1, 2, 3, 4),
  "resnet18": (4, 4, 6, 8), "resnet50": (4, 4, 6, 8), "densenet121": (3, 4, 6, 8)}


def shape(size):
  return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def images(batch, size):
  return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def keys(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


@pytest.mark.parametrize("name", NAMES)
def test_the_small_stem(name):
  """28 to 64 pixels leave a grid; the numbers are bfloat16 inside and float32 at the end."""
  net = models.backbone(name, 3, stem="small", dtype=jnp.bfloat16, **SHORT.get(name, {}))
  variables = jax.eval_shape(net.init, jax.random.key(0), shape(32))
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  first = "features-conv0" if name == "densenet121" else "features-0" if "vgg" in name else "conv1"
  kernel = variables["params"][first]
  assert kernel.get("conv", kernel)["kernel"].shape == (3, 3, 3, 64)
  for size, side in zip((28, 32, 48, 64), SIDES[name], strict=True):
    logits, out = jax.eval_shape(net.apply, variables, shape(size))
    assert out["features"].shape[:3] == (1, side, side)
    assert out["features"].dtype == jnp.bfloat16
    assert (logits.shape, out["pooled"].shape) == ((1, 3), (1, out["features"].shape[-1]))
    assert logits.dtype == out["pooled"].dtype == jnp.float32


@pytest.mark.parametrize("name", SIDES)
def test_a_share_of_the_width(name):
  """Every layer has that share of its channels, and no layer is gone; the head's classes stay."""
  options = {"aux": True} if name == "googlenet" else {}
  whole, half = (
    jax.eval_shape(models.backbone(name, 3, width=width, **options, **SHORT.get(name, {})).init,
                   jax.random.key(0), shape(64))["params"] for width in (1.0, 0.5))
  assert jax.tree.structure(whole) == jax.tree.structure(half)
  for path, wide in jax.tree.leaves_with_path(whole):
    narrow = half
    for key in path:
      narrow = narrow[key.key]
    wide, narrow = np.array(wide.shape), np.array(narrow.shape)
    same = (wide <= 7) | (wide == narrow) & (wide == 3)  # windows, the image's channels, classes
    assert np.all(same | (narrow * 2 == wide)), path


def test_an_unknown_stem_is_refused():
  with pytest.raises(UserError, match="'tiny': one of full, small"):
    models.backbone("resnet18", stem="tiny").init(jax.random.key(0), shape(32))


@pytest.mark.parametrize("stem", ["full", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_is_a_stop(name, stem):
  """All of STAGES, in order, once each; the last leaves the features."""
  net = models.backbone(name, stem=stem, **SHORT.get(name, {}))
  seen = []

  def stage(name, x):
    seen.append((name, x * 1))
    return seen[-1][1]

  def trace(key, x):
    (logits, out), _ = net.init_with_output(key, x, stage=stage)
    assert logits is None
    assert out["features"] is seen[-1][1]
    return out

  jax.eval_shape(trace, jax.random.key(0), shape(40))
  assert tuple(name for name, _ in seen) == net.STAGES
  assert len(set(net.STAGES)) == len(net.STAGES) >= 5
  sides = [x.shape[1] for _, x in seen]
  assert sides == sorted(sides, reverse=True)


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "resnet50", "densenet121"])
def test_every_stage_is_felt(name, draw_variables):
  """(GoogLeNet's: `test_each_head_sees_the_stages_before_it`.)"""
  net = models.backbone(name, 3, stem="small", **SHORT.get(name, {}))
  x = images(1, 28)
  variables = draw_variables(net, x)

  @jax.jit
  def answers(variables, factors):
    factor = dict(zip(net.STAGES, factors, strict=True))
    return net.apply(variables, x, stage=lambda name, x: x * factor[name])[0]

  factors = np.ones(len(net.STAGES), np.float32)
  plain = answers(variables, factors)
  for i, stage in enumerate(net.STAGES):
    halved = answers(variables, np.where(np.arange(len(factors)) == i, factors / 2, factors))
    assert np.abs(halved - plain).max() > 0.01 * np.abs(plain).max(), stage


@pytest.fixture(scope="module")
def vgg(draw_variables):
  """(variables, answer(x, train, chance)) of VGG with narrow dense layers."""
  net = models.backbone("vgg16", 3, hidden=16)
  variables = draw_variables(net, images(1, 32))
  apply = jax.jit(net.apply, static_argnames="train")
  return variables, functools.partial(apply, variables)


def test_vggs_dropout_belongs_to_the_example(vgg):
  _, answer = vgg
  x, chance = images(4, 32), keys(4)
  logits, _ = answer(x, train=True, chance=chance)
  swapped, _ = answer(x[::-1], train=True, chance=chance[::-1])
  np.testing.assert_allclose(swapped[::-1], logits, rtol=1e-4, atol=1e-4)
  assert np.abs(logits - answer(x, train=True, chance=keys(4, 1))[0]).max() > 0.1


def test_vgg_drops_after_both_dense_layers(vgg):
  variables, answer = vgg
  x, chance = images(4, 32), keys(4)
  logits, out = answer(x, train=True, chance=chance)
  _, plain = answer(x)
  assert np.abs(out["pooled"] - plain["pooled"]).max() > 0.1, "the first is not felt"
  head = variables["params"]["classifier-6"]
  wanted = dropout(out["pooled"], 0.5, chance, 1) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


def test_there_is_no_dropout_without_keys_or_in_evaluation():
  """VGG, which normalises nothing, is then one and the same program."""
  net, x = models.backbone("vgg16", 3, hidden=16), shape(32)
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  program = lambda **given: str(jax.make_jaxpr(functools.partial(net.apply, **given))(variables, x))
  assert program() == program(train=True) == program(train=False, chance=keys(1))
  assert program() != program(train=True, chance=keys(1))


def test_vgg_as_a_trunk_ends_in_features():
  net = models.backbone("vgg16_bn", hidden=None)
  (logits, out), variables = jax.eval_shape(net.init_with_output, jax.random.key(0), shape(64))
  assert logits is None
  assert (out["features"].shape, out["pooled"].shape) == ((1, 2, 2, 512), (1, 512))
  assert not [name for name in variables["params"] if name.startswith("classifier")]


def test_c_net_begins_with_m_nets_vgg_that_has_no_statistics():
  layer = lambda value: {"backbone": {"features-0": {"kernel": np.full((3, 3, 3, 64), value)}}}
  before = {"params": {"m_net": layer(1.0), "c_net": layer(2.0)},
            "batch_stats": {"m_net": {"neck": np.ones(3)}, "a_net": {}}}
  after = zoom_in_net.hand_on(before, "c", "m_net")
  assert after["batch_stats"] == before["batch_stats"]
  assert after["params"]["c_net"]["backbone"]["features-0"]["kernel"].max() == 1


@pytest.fixture(scope="module")
def googlenet(draw_variables):
  """(network, variables, train(x, chance, bends)) of GoogLeNet with auxiliary heads.

  `bends` [number of stages]: x + bend · x² takes a stage's place; normalisation does not undo it.
  """
  net = models.backbone("googlenet", 3, aux=True, stem="small", group_size=2)
  variables = draw_variables(net, images(2, 28))

  @jax.jit
  def train(variables, x, chance, bends):
    bend = dict(zip(net.STAGES, bends, strict=True))
    (logits, out), _ = net.apply(
      variables, x, train=True, chance=chance, mutable=["batch_stats"],
      stage=lambda name, x: x + bend[name] * jnp.square(x))
    return {"logits": logits, **out}

  return net, variables, functools.partial(train, variables)


def test_auxiliary_heads_are_of_training_alone(googlenet):
  net, variables, _ = googlenet
  assert {"aux1", "aux2"} < set(variables["params"]), "initialised as in evaluation"
  net = net.clone(group_size=None)
  stops = lambda net, train: jax.eval_shape(
    functools.partial(net.apply, train=train, mutable=["batch_stats"]), variables, shape(28))[0][1]
  found = stops(net, True)
  assert set(found) == {"features", "pooled", "aux1", "aux2"}
  assert (found["aux1"].shape, found["aux2"].dtype) == ((1, 3), jnp.float32)
  assert set(stops(net, False)) == {"features", "pooled"}
  assert set(stops(net.clone(num_classes=None), True)) == {"features", "pooled"}
  bare = jax.eval_shape(net.clone(aux=False).init, jax.random.key(0), shape(28))
  assert set(variables["params"]) - set(bare["params"]) == {"aux1", "aux2"}


def test_each_head_sees_the_stages_before_it(googlenet):
  net, _, train = googlenet
  x, count = images(4, 28), len(net.STAGES)
  plain = train(x, keys(4), np.zeros(count, np.float32))
  sees = {"aux1": 1 + net.STAGES.index("inception4a"), "aux2": 1 + net.STAGES.index("inception4d"),
          "logits": count}
  for i, stage in enumerate(net.STAGES):
    bent = train(x, keys(4), np.where(np.arange(count) == i, 0.5, 0).astype(np.float32))
    for head, end in sees.items():
      change = np.abs(bent[head] - plain[head]).max() / np.abs(plain[head]).max()
      assert change > 1e-2 if i < end else change < 1e-5, (stage, head)


def test_an_answer_depends_on_its_group_and_its_keys_alone(googlenet):
  """Not on the place in the batch, nor on the other groups: so not on the devices."""
  net, variables, train = googlenet
  x, chance, bends = images(6, 28), keys(6), np.zeros(len(net.STAGES), np.float32)
  out = train(x[:4], chance[:4], bends)
  later = train(x[2:], chance[2:], bends)
  for stop in out:
    np.testing.assert_allclose(out[stop][2:], later[stop][:2], rtol=1e-3, atol=1e-3, err_msg=stop)
  head = variables["params"]["fc"]
  wanted = dropout(out["pooled"], 0.2, chance[:4]) @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(out["logits"], wanted, rtol=1e-4, atol=1e-4)
  others = train(x[:4], keys(4, 1), bends)
  for stop in ("logits", "aux1", "aux2"):
    assert np.abs(others[stop] - out[stop]).max() > 0.01
  np.testing.assert_array_equal(others["pooled"], out["pooled"])


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_gpus_ways_give_the_same_numbers(name, a_gpus_ways):
  """Of what is computed otherwise there: the first convolution, maxima, sums, ReLU's gradient."""
  net = models.backbone(name, 3, group_size=2, **SHORT[name])
  x = images(2, 65)
  variables = net.init(jax.random.key(0), x)

  def loss(params, x):
    (logits, _), left = net.apply(
      {**variables, "params": params}, x, True, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(logits)), left

  run = lambda: jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)
  wanted = run()
  asked = a_gpus_ways()
  found = run()
  assert asked.count("cuda") >= 10
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, np.abs(b).max()))


def test_a_dense_block_sums_each_feature_once(draw_variables):
  """And not once for each layer that normalises it: sums grow as the layers do."""
  x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

  def summed(layers):
    net = models.BACKBONES["densenet121"](blocks=(layers,), stem="small", group_size=2)
    variables = draw_variables(net, x)
    run = jax.jit(lambda x: net.apply(variables, x, train=True, mutable=["batch_stats"]))
    found = re.findall(r"reduce\(.*across dimensions = \[1, 2\] : \(tensor<([\dx]+)xf32>",
                       run.lower(x).as_text())
    return sum(math.prod(map(int, shape.split("x"))) for shape in found)

  two, four, eight = (summed(layers) for layers in (2, 4, 8))
  assert eight - four == 2 * (four - two) > 0


def test_a_changed_dense_block_is_normalised_by_its_own_statistics(draw_variables):
  x = images(2, 32)
  net = models.BACKBONES["densenet121"](blocks=(2, 2), stem="small")
  variables = draw_variables(net, x)
  before = variables["batch_stats"]["features-transition1"]["norm"]["mean"]

  def moved(stage):
    _, left = net.apply(variables, x, train=True, stage=stage, mutable=["batch_stats"])
    return left["batch_stats"]["features-transition1"]["norm"]["mean"] - 0.9 * before

  twice = moved(lambda name, x: 2 * x if name == "denseblock1" else x)
  np.testing.assert_allclose(twice, 2 * moved(None), rtol=1e-4, atol=1e-6)
