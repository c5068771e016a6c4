"""Inception-ResNet-v2 (Szegedy et al. 2017), M-Net's backbone in the paper (papers.md §1).

Layout, names and numbers are those of the published PyTorch weights (timm, after Cadene), so that
`pretrained.from_torch` converts them: a stem without padding, BatchNorm with gamma and ε = 1e-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from medattn_jax.models.norm import Array, Conv, ConvBN


def max_pool(x: Array) -> Array:
  return nn.max_pool(x, (3, 3), (2, 2))


def chain(unit: Callable, name: str, x: Array, train: bool, *layers: tuple) -> Array:
  """Applies units `name`-0, `name`-1, … of the arguments in `layers`."""
  for i, layer in enumerate(layers):
    x = unit(*layer, name=f"{name}-{i}")(x, train)
  return x


class Block(nn.Module):
  """Inception-ResNet block: x + scale · conv2d(branch0 ‖ branch1 ‖ …), ReLU.

  Attributes:
    unit: constructor of a convolution with normalisation and ReLU.
    branches: (features, kernel size) of the layers of each branch.
    relu: the last block of the network has none.
  """

  unit: Callable
  branches: tuple
  scale: float
  relu: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
    unit = self.unit
    first, *others = self.branches
    parts = [unit(*first, name="branch0")(x, train)]
    parts += [chain(unit, f"branch{i}", x, train, *b) for i, b in enumerate(others, 1)]
    y = Conv(x.shape[-1], use_bias=True, dtype=x.dtype, name="conv2d")(jnp.concatenate(parts, -1))
    x = x + y * self.scale
    return nn.relu(x) if self.relu else x


class Stem(nn.Module):
  """`mixed_5b`: 192 → 320 channels."""

  unit: Callable

  @nn.compact
  def __call__(self, x, train):
    # Border cells average the cells inside alone.
    mean = nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)
    return jnp.concatenate([
      self.unit(96, name="branch0")(x, train),
      chain(self.unit, "branch1", x, train, (48,), (64, (5, 5))),
      chain(self.unit, "branch2", x, train, (64,), (96, (3, 3)), (96, (3, 3))),
      self.unit(64, name="branch3-1")(mean, train)], -1)


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
    parts = []
    for i, branch in enumerate(self.branches):
      *before, (features, kernel) = branch
      layers = (*before, (features, kernel, 2, (0, 0)))
      if len(layers) == 1:
        parts.append(self.unit(*layers[0], name=f"branch{i}")(x, train))
      else:
        parts.append(chain(self.unit, f"branch{i}", x, train, *layers))
    return jnp.concatenate([*parts, max_pool(x)], -1)


class InceptionResNetV2(nn.Module):
  """492² → features 14² × 2080 (before `conv2d_7b`), or × 1536 with it.

  Attributes:
    num_classes: of the dense head `classif`; None leaves it out (logits are None).
    final_conv: ends with the 1×1 convolution `conv2d_7b`, as published. M-Net ends before it.
    group_size, momentum: of the normalisation.
  """

  num_classes: int | None = None
  final_conv: bool = True
  group_size: int | None = None
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b h w 3"], train: bool = False):
    """Returns (logits [B, classes] float32 or None, {"features", "pooled"})."""
    unit = functools.partial(
      ConvBN, group_size=self.group_size, momentum=self.momentum, epsilon=1e-3, dtype=self.dtype)
    x = x.astype(self.dtype)
    x = unit(32, (3, 3), 2, (0, 0), name="conv2d_1a")(x, train)
    x = unit(32, (3, 3), 1, (0, 0), name="conv2d_2a")(x, train)
    x = unit(64, (3, 3), name="conv2d_2b")(x, train)
    x = max_pool(x)
    x = unit(80, name="conv2d_3b")(x, train)
    x = unit(192, (3, 3), 1, (0, 0), name="conv2d_4a")(x, train)
    x = max_pool(x)
    x = Stem(unit, name="mixed_5b")(x, train)
    thirty_five = (
      (32,), ((32,), (32, (3, 3))), ((32,), (48, (3, 3)), (64, (3, 3))))
    for i in range(10):
      x = Block(unit, thirty_five, 0.17, name=f"repeat-{i}")(x, train)
    x = Reduction(unit, (
      ((384, (3, 3)),), ((256,), (256, (3, 3)), (384, (3, 3)))), name="mixed_6a")(x, train)
    seventeen = ((192,), ((128,), (160, (1, 7)), (192, (7, 1))))
    for i in range(20):
      x = Block(unit, seventeen, 0.10, name=f"repeat_1-{i}")(x, train)
    x = Reduction(unit, (
      ((256,), (384, (3, 3))), ((256,), (288, (3, 3))),
      ((256,), (288, (3, 3)), (320, (3, 3)))), name="mixed_7a")(x, train)
    eight = ((192,), ((192,), (224, (1, 3)), (256, (3, 1))))
    for i in range(9):
      x = Block(unit, eight, 0.20, name=f"repeat_2-{i}")(x, train)
    x = Block(unit, eight, 1.0, relu=False, name="block8")(x, train)
    if self.final_conv:
      x = unit(1536, name="conv2d_7b")(x, train)
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = (
      None if self.num_classes is None else nn.Dense(self.num_classes, name="classif")(pooled))
    return logits, {"features": x, "pooled": pooled}
