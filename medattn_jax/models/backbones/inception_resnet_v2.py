"""Inception-ResNet-v2 (Szegedy et al. 2017), M-Net's backbone in the paper (papers.md §1).

Layout, names and numbers are those of the published PyTorch weights (timm, after Cadene), so that
`pretrained.from_torch` converts them: a stem without padding, BatchNorm with gamma and ε = 1e-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medattn_jax.models import blocks, remat
from medattn_jax.models.backbones.inception_stem import stem
from medattn_jax.models.norm import Array, Conv, ConvBN, joined, together
from medattn_jax.models.pooling import max_pool


def chain(
  unit: Callable, name: str, x: Array, train: bool, layers: Sequence[tuple], first: int = 0,
) -> Array:
  """Applies units `name`-first, … of the arguments in `layers`."""
  for i, layer in enumerate(layers, first):
    x = unit(*layer, name=f"{name}-{i}")(x, train)
  return x


def side_by_side(
  unit: Callable, x: Array, train: bool, branches: Sequence, *more: ConvBN,
) -> list[Array]:
  """Each branch's answer to `x`; their first units, all 1×1, are computed as one.

  Units are named branch<i>-<j>, a branch's only one branch<i>.

  Args:
    more: branches of one unit each, named already; the last ones.
  """
  names = [f"branch{i}-0" if len(b) > 1 else f"branch{i}" for i, b in enumerate(branches)]
  firsts = together(
    [*(unit(*b[0], name=name) for b, name in zip(branches, names, strict=True)), *more], x, train)
  return [
    chain(unit, f"branch{i}", y, train, b[1:], first=1)
    for i, (b, y) in enumerate(zip(branches, firsts, strict=False))] + firsts[len(branches):]


def abreast(unit: Callable, x: Array, train: bool, branches: Sequence) -> Array:
  """side_by_side's answers in one array, the layers of one depth computed as one.

  Each depth reads all that the one before has made. Layers of one depth have one kernel size.
  """
  reads, parts = [slice(0, x.shape[-1])] * len(branches), [None] * len(branches)
  for depth in range(max(map(len, branches))):
    deep = [i for i, branch in enumerate(branches) if len(branch) > depth]
    names = [f"branch{i}-{depth}" if len(branches[i]) > 1 else f"branch{i}" for i in deep]
    units = [unit(*branches[i][depth], name=name) for i, name in zip(deep, names, strict=True)]
    x = joined(units, x, train, [reads[i] for i in deep])
    ends = np.cumsum([one.features for one in units])
    for i, one, end in zip(deep, units, ends, strict=True):
      reads[i] = slice(int(end) - one.features, int(end))
      parts[i] = x[..., reads[i]]
  return jnp.concatenate(parts, -1)


class Block(nn.Module):
  """Inception-ResNet block: x + scale · conv2d(branch0 ‖ branch1 ‖ …), ReLU.

  Attributes:
    unit: constructor of a convolution with normalisation and ReLU.
    branches: (features, kernel size) of the layers of each branch; the first is 1×1.
    relu: the last block of the network has none.
    as_one: computes its branches as one (see `abreast`).
  """

  unit: Callable
  branches: tuple
  scale: float
  relu: bool = True
  as_one: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    if self.as_one:
      y = abreast(self.unit, x, train, self.branches)
    else:
      y = jnp.concatenate(side_by_side(self.unit, x, train, self.branches), -1)
    last = Conv(x.shape[-1], use_bias=True, dtype=x.dtype, name="conv2d")
    x = last.onto(x, y, self.scale)
    return remat.last_relu(x) if self.relu else x


class Stem(nn.Module):
  """`mixed_5b`: 192 → 320 channels."""

  unit: Callable

  @nn.compact
  def __call__(self, x, train):
    # Border cells average the cells inside alone.
    mean = functools.partial(
      nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1)),
      count_include_pad=False)
    branches = (((96,),), ((48,), (64, (5, 5))), ((64,), (96, (3, 3)), (96, (3, 3))))
    pooled = self.unit(64, name="branch3-1", mean=mean)
    return jnp.concatenate(side_by_side(self.unit, x, train, branches, pooled), -1)


class Reduction(nn.Module):
  """`mixed_6a` (320 → 1088) and `mixed_7a` (1088 → 2080): halves the grid, without padding.

  Attributes:
    branches: (features, kernel size) of each branch's layers; the last one strides. A branch of
      one layer has no number in its name.
  """

  unit: Callable
  branches: tuple

  @nn.compact
  def __call__(self, x, train):
    branches = [(*before, (*last, 2, (0, 0))) for *before, last in self.branches]
    if len(branches[0]) == 1:
      parts = [self.unit(*branches[0][0], name="branch0")(x, train)]
      parts += [chain(self.unit, f"branch{i}", x, train, b) for i, b in enumerate(branches[1:], 1)]
    else:
      parts = side_by_side(self.unit, x, train, branches)
    return jnp.concatenate([*parts, max_pool(x)], -1)


class InceptionResNetV2(nn.Module):
  """492² → features 14² × 2080 (before `conv2d_7b`), or × 1536 with it.

  Attributes:
    num_classes: of the dense head `classif`; None leaves it out (logits are None).
    final_conv: ends with the 1×1 convolution `conv2d_7b`, as published. M-Net ends before it.
    group_size, momentum: of the normalisation.
    blocks: computes the stem in blocks of pixels (see `blocks`), and the narrow branches of a
      block as one: for a TPU.
    remat: what training computes twice (see `remat`).
  """

  num_classes: int | None = None
  final_conv: bool = True
  group_size: int | None = None
  momentum: float = 0.9
  dtype: Any = jnp.float32
  blocks: bool = False
  remat: str = "none"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"], train: bool = False):
    """Returns (logits [B, classes] float32 or None, {"features", "pooled"})."""
    unit = functools.partial(
      ConvBN, group_size=self.group_size, momentum=self.momentum, epsilon=1e-3, dtype=self.dtype,
      apart=self.blocks)
    part = remat.parts(self, self.remat, train)
    x = x.astype(self.dtype)
    x = blocks.split(x, 4) if self.blocks else x
    x = stem(unit, part, ("conv2d_1a", "conv2d_2a", "conv2d_2b", "conv2d_3b", "conv2d_4a"), x)
    x = part(Stem(unit, name="mixed_5b"), x)
    thirty_five = (
      ((32,),), ((32,), (32, (3, 3))), ((32,), (48, (3, 3)), (64, (3, 3))))
    for i in range(10):
      x = part(Block(unit, thirty_five, 0.17, as_one=self.blocks, name=f"repeat-{i}"), x)
    x = part(Reduction(unit, (
      ((384, (3, 3)),), ((256,), (256, (3, 3)), (384, (3, 3)))), name="mixed_6a"), x)
    seventeen = (((192,),), ((128,), (160, (1, 7)), (192, (7, 1))))
    for i in range(20):
      x = part(Block(unit, seventeen, 0.10, name=f"repeat_1-{i}"), x)
    x = part(Reduction(unit, (
      ((256,), (384, (3, 3))), ((256,), (288, (3, 3))),
      ((256,), (288, (3, 3)), (320, (3, 3)))), name="mixed_7a"), x)
    eight = (((192,),), ((192,), (224, (1, 3)), (256, (3, 1))))
    for i in range(9):
      x = part(Block(unit, eight, 0.20, name=f"repeat_2-{i}"), x)
    x = part(Block(unit, eight, 1.0, relu=False, name="block8"), x)
    if self.final_conv:
      x = unit(1536, name="conv2d_7b")(x, train)
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = (
      None if self.num_classes is None else nn.Dense(self.num_classes, name="classif")(pooled))
    return logits, {"features": x, "pooled": pooled}
