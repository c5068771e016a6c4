"""What is computed twice gives the numbers of what is kept, and the memory it was meant to save."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax import models
from medattn_jax.models import blocks, remat
from medattn_jax.models.backbones import googlenet, inception_resnet_v2, inception_v3
from medattn_jax.models.norm import ConvBN
from medattn_jax.models.pooling import max_pool


class Parts(nn.Module):
  """Of an Inception network one part of each kind, narrow."""

  family: str
  num_classes: int
  group_size: int
  remat: str

  @nn.compact
  def __call__(self, x, train=False):
    unit = functools.partial(ConvBN, group_size=self.group_size, epsilon=1e-3)
    part = remat.parts(self, self.remat, train)

    def stem(x, train):
      x = unit(8, (3, 3), 2, (0, 0), name="first")(x, train)
      return unit(8, (3, 3), name="second")(x, train, max_pool)

    if self.family == "inception_resnet_v2":
      x = part(stem, blocks.split(x, 4))
      x = part(inception_resnet_v2.Stem(unit, name="mixed"), x)
      branches = (((8,),), ((8,), (8, (3, 3))))
      x = part(inception_resnet_v2.Block(unit, branches, 0.17, name="block-0"), x)
      branches = (((16, (3, 3)),), ((8,), (8, (3, 3)), (8, (3, 3))))
      x = part(inception_resnet_v2.Reduction(unit, branches, name="halved"), x)
      x = part(inception_resnet_v2.Block(unit, (((8,),),), 1.0, relu=False, name="block-1"), x)
    elif self.family == "inception_v3":
      x = part(inception_v3.InceptionA(unit, 8, name="a"), part(stem, x))
      x = part(inception_v3.InceptionB(unit, name="b"), x)
      x = part(inception_v3.InceptionC(unit, 16, name="c"), x)
    else:
      x = part(googlenet.Inception(unit, (8, (4, 8), (4, 8), 8), name="a"), part(stem, x))
    return nn.Dense(self.num_classes)(x.mean((1, 2))), {}


# Of each family the smallest network that has every kind of part, and the side of its pictures.
NETS = {
  "cnn": (models.BACKBONES["cnn"], 32),
  "resnet_small": (models.BACKBONES["resnet_small"], 48),
  "resnet": (functools.partial(models.BACKBONES["resnet50"], blocks=(1, 2)), 32),
  "vgg16_bn": (functools.partial(models.BACKBONES["vgg16_bn"], stem="small"), 16),
  "densenet": (functools.partial(models.BACKBONES["densenet121"], blocks=(2, 3)), 32),
  "inception_resnet_v2": (functools.partial(Parts, "inception_resnet_v2"), 40),
  "inception_v3": (functools.partial(Parts, "inception_v3"), 40),
  "googlenet": (functools.partial(Parts, "googlenet"), 40),
}


def made(name, mode):
  kind, _ = NETS[name]
  return kind(num_classes=3, group_size=2, remat=mode)


def pictures(name, count=4):
  _, size = NETS[name]
  return np.random.default_rng(0).standard_normal((count, size, size, 3)).astype(np.float32)


def loss(net, x, params, batch_stats):
  variables = {"params": params, "batch_stats": batch_stats}
  (logits, _), updates = net.apply(variables, x, train=True, mutable=["batch_stats"])
  return jnp.square(logits - 1).mean(), updates


def learnt(net, x, variables):
  """(gradients, updated statistics) of a net's training, and the compiled program."""
  args = variables["params"], variables["batch_stats"]
  step = jax.jit(jax.grad(functools.partial(loss, net, x), has_aux=True))
  compiled = step.lower(*args).compile()
  return jax.device_get(compiled(*args)), compiled


def _long_ones_slow(names, *long):
  return [pytest.param(name, marks=pytest.mark.slow) if name in long else name for name in names]


@pytest.mark.parametrize("name", _long_ones_slow(models.BACKBONES, "inception_resnet_v2"))
def test_the_variables_are_the_same(name):
  """Paths and shapes, of the whole networks, even where they are made in training."""
  x = jax.ShapeDtypeStruct((2, 96, 96, 3), jnp.float32)
  nets = [models.backbone(name, 3, remat=mode) for mode in remat.MODES]
  trees = [
    jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), x) for net in nets]
  assert trees[0]["params"] and trees[0] == trees[1] == trees[2]


def test_the_first_variables_are_the_same():
  nets, x = [made("cnn", mode) for mode in remat.MODES], pictures("cnn")
  drawn = [jax.jit(functools.partial(net.init, train=True))(jax.random.key(0), x) for net in nets]
  for other in drawn[1:]:
    jax.tree.map(np.testing.assert_array_equal, drawn[0], other)


@pytest.mark.parametrize("name", _long_ones_slow(
  NETS, "vgg16_bn", "inception_v3", "inception_resnet_v2", "googlenet"))
def test_the_numbers_are_the_same(name, draw_variables):
  x = pictures(name)
  variables = draw_variables(made(name, "none"), x)
  expected, _ = learnt(made(name, "none"), x, variables)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(expected[0]))
  for mode in ("elementwise", "blocks"):
    found, _ = learnt(made(name, mode), x, variables)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale)


GIVEN = "from the argument|from a constant"  # parameters, pictures


def kept(kind, size, mode, capsys, aside=GIVEN):
  """(dtype, shape) of all that a network's backward pass is handed but what is `aside`: by JAX.
  (The peak of a CPU's program does not show it: its scheduler is after parallel work.)"""
  net = kind(num_classes=3, group_size=2, remat=mode)
  x = np.ones((4, size, size, 3), np.float32)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x)
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), {"batch_stats": {}, **shapes})
  own = lambda params: loss(net, x, params, zeros["batch_stats"])[0]
  jax.ad_checkpoint.print_saved_residuals(own, zeros["params"])
  lines = capsys.readouterr().out.splitlines()
  assert any("from the argument" in line for line in lines)
  found = [re.match(r"([a-z]+\d*)\[([\d,]*)\]", line) for line in lines
           if not re.search(aside, line)]
  return [(one[1], tuple(int(n) for n in one[2].split(",") if n)) for one in found]


def test_elementwise_keeps_convolutions_and_statistics_alone(capsys):
  """Of three bottlenecks, two of which project: three or four outputs each, and the stem's; the
  mean and variance of their groups; and what leaves the stem and each block."""
  found = kept(*NETS["resnet"], "elementwise", capsys)
  convolutions, blocks = 1 + 4 + 4 + 3, 3
  assert sum(len(shape) == 4 and shape[1] > 1 for _, shape in found) == convolutions + 1 + blocks
  assert sum(shape[:3] == (2, 1, 1) for _, shape in found) == 2 * convolutions
  assert {dtype for dtype, _ in found} == {"f32"}  # and no ReLU's mask


def test_what_a_normalisation_lets_through_is_not_kept(capsys):
  """Not behind a maximum either. (A residual Inception block's ReLU by itself keeps its mask.)"""
  masks = {name: [shape for dtype, shape in kept(*NETS[name], "none", capsys) if dtype == "bool"]
           for name in ("resnet", "inception_v3", "inception_resnet_v2")}
  assert masks == {"resnet": [], "inception_v3": [], "inception_resnet_v2": [(4, 10, 10, 32)]}


def test_blocks_keep_their_inputs_alone(capsys):
  found = kept(*NETS["resnet"], "blocks", capsys)
  assert [shape for _, shape in found if len(shape) == 4] == [
    (4, 8, 8, 64), (4, 8, 8, 256), (4, 4, 4, 512)]


@pytest.mark.parametrize("name", models.BACKBONES)
def test_bfloat16_keeps_no_map_in_float32(name, capsys):
  """One sum that leaves in float32 makes all that follows so, and doubles the step's bytes."""
  kind = functools.partial(models.BACKBONES[name], dtype=jnp.bfloat16)
  # Of a maximum that is normalised XLA computes what is left without its mean again.
  found = kept(kind, 96, "none", capsys, rf"{GIVEN}|output of sub .*\(conv_bn\)")
  maps = {(dtype, shape) for dtype, shape in found
          if len(shape) == 4 and shape[1] * shape[2] > 1 and math.prod(shape) > 1000}
  assert {"bf16"} <= {dtype for dtype, _ in maps} and not {one for one in maps if one[0] == "f32"}


def test_a_dense_blocks_memory_grows_as_its_layers(capsys):
  """Not as their square: the pieces are kept, and joined again in the backward pass."""
  def numbers(layers, mode):
    kind = functools.partial(models.BACKBONES["densenet121"], blocks=(layers,))
    return sum(math.prod(shape) for _, shape in kept(kind, 32, mode, capsys))

  for mode, straight in (("none", False), ("elementwise", True), ("blocks", True)):
    two, four, eight = (numbers(layers, mode) for layers in (2, 4, 8))
    assert (eight - four == pytest.approx(2 * (four - two), rel=0.01)) == straight
