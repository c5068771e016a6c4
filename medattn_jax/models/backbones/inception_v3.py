"""Inception-v3 (Szegedy et al. 2016), C-Net's backbone in the paper (papers.md §1).

Layout, names and numbers are those of torchvision's published weights, without the auxiliary head
and without its input transform: BatchNorm's ε is 1e-3, average pools count the padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from medattn_jax.models import blocks, remat
from medattn_jax.models.backbones.inception_stem import stem
from medattn_jax.models.norm import Array, ConvBN, together
from medattn_jax.models.pooling import max_pool


def average(x: Array) -> Array:
  return nn.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=True)


def chain(unit: Callable, name: str, x: Array, train: bool, layers: Sequence[tuple]) -> Array:
  """Applies units `name`_2, `name`_3, … of the arguments in `layers`."""
  for i, layer in enumerate(layers, 2):
    x = unit(*layer, name=f"{name}_{i}")(x, train)
  return x


def side_by_side(
  unit: Callable, x: Array, train: bool, pool: int = 0, **branches: Sequence[tuple],
) -> list[Array]:
  """Each branch's answer to `x`; their first units, all 1×1, are computed as one.

  Units are named `branch`_1, `branch`_2, …, but for branch1x1, of which there is one.

  Args:
    pool: features of branch_pool, the last, one unit of the neighbours' means; 0 for none.
  """
  names = [name if name == "branch1x1" else f"{name}_1" for name in branches]
  units = [unit(*b[0], name=name) for name, b in zip(names, branches.values(), strict=True)]
  if pool:
    units.append(unit(pool, name="branch_pool", mean=average))
  firsts = together(units, x, train)
  return [
    chain(unit, name, y, train, b[1:])
    for y, (name, b) in zip(firsts, branches.items(), strict=False)] + firsts[len(branches):]


class InceptionA(nn.Module):
  """35² grid of a 299² image: 1×1, 5×5 and double 3×3."""

  unit: Callable
  pool_features: int

  @nn.compact
  def __call__(self, x, train):
    # The first one of 48 last: else another's 64 would lie across the edge of a TPU's 128 lanes.
    point, double, single, pooled = side_by_side(
      self.unit, x, train, self.pool_features, branch1x1=[(64,)],
      branch3x3dbl=[(64,), (96, (3, 3)), (96, (3, 3))], branch5x5=[(48,), (64, (5, 5))])
    return jnp.concatenate([point, single, double, pooled], -1)


class InceptionB(nn.Module):
  """Halves the grid, 288 → 768 channels."""

  unit: Callable

  @nn.compact
  def __call__(self, x, train):
    parts = side_by_side(
      self.unit, x, train, branch3x3dbl=[(64,), (96, (3, 3)), (96, (3, 3), 2, (0, 0))])
    return jnp.concatenate([
      self.unit(384, (3, 3), 2, (0, 0), name="branch3x3")(x, train), *parts, max_pool(x)], -1)


class InceptionC(nn.Module):
  """17² grid: 7×7 as 1×7 and 7×1. `width`: channels between."""

  unit: Callable
  width: int

  @nn.compact
  def __call__(self, x, train):
    c, row, column = self.width, (1, 7), (7, 1)
    parts = side_by_side(
      self.unit, x, train, 192, branch1x1=[(192,)], branch7x7=[(c,), (c, row), (192, column)],
      branch7x7dbl=[(c,), (c, column), (c, row), (c, column), (192, row)])
    return jnp.concatenate(parts, -1)


class InceptionD(nn.Module):
  """Halves the grid, 768 → 1280 channels."""

  unit: Callable

  @nn.compact
  def __call__(self, x, train):
    parts = side_by_side(
      self.unit, x, train, branch3x3=[(192,), (320, (3, 3), 2, (0, 0))],
      branch7x7x3=[(192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, (0, 0))])
    return jnp.concatenate([*parts, max_pool(x)], -1)


class InceptionE(nn.Module):
  """8² grid, → 2048 channels: 3×3 as a row and a column side by side."""

  unit: Callable

  @nn.compact
  def __call__(self, x, train):
    def split(name, y):
      return [self.unit(384, (1, 3), name=f"{name}a")(y, train),
              self.unit(384, (3, 1), name=f"{name}b")(y, train)]

    first, single, double, pooled = side_by_side(
      self.unit, x, train, 192, branch1x1=[(320,)], branch3x3=[(384,)],
      branch3x3dbl=[(448,), (384, (3, 3))])
    return jnp.concatenate([
      first, *split("branch3x3_2", single), *split("branch3x3dbl_3", double), pooled], -1)


class InceptionV3(nn.Module):
  """299² → features 8² × 2048; 384² → 10² × 2048.

  Attributes:
    num_classes: of the dense head `fc`; None leaves it out (logits are None).
    group_size, momentum: of the normalisation.
    blocks: computes the stem in blocks of pixels (see `blocks`): for a TPU.
    remat: what training computes twice (see `remat`).
  """

  num_classes: int | None = None
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
    x = stem(unit, part, (
      "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"), x)
    for name, features in (("b", 32), ("c", 64), ("d", 64)):
      x = part(InceptionA(unit, features, name=f"Mixed_5{name}"), x)
    x = part(InceptionB(unit, name="Mixed_6a"), x)
    for name, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
      x = part(InceptionC(unit, width, name=f"Mixed_6{name}"), x)
    x = part(InceptionD(unit, name="Mixed_7a"), x)
    x = part(InceptionE(unit, name="Mixed_7b"), x)
    x = part(InceptionE(unit, name="Mixed_7c"), x)
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = None if self.num_classes is None else nn.Dense(self.num_classes, name="fc")(pooled)
    return logits, {"features": x, "pooled": pooled}
