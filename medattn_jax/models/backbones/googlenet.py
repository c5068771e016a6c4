"""GoogLeNet (Szegedy et al. 2015) with normalisation, one of the backbones of papers.md §2.

Layout, names and numbers are those of torchvision's published weights, without its input
transform: BatchNorm's ε is 1e-3, what the paper calls 5×5 is 3×3, pools keep ragged edges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from medattn_jax.models import remat
from medattn_jax.models.backbones.stages import Stage, is_small, scaled, unchanged
from medattn_jax.models.dropout import dropout
from medattn_jax.models.norm import Array, ConvBN, kernel_init
from medattn_jax.models.pooling import adaptive_average, ceil_max_pool, maximum

# Features of each block: 1×1; 1×1 and 3×3; 1×1 and 3×3 again; 1×1 after the pool.
BLOCKS = {
  "inception3a": (64, (96, 128), (16, 32), 32),
  "inception3b": (128, (128, 192), (32, 96), 64),
  "inception4a": (192, (96, 208), (16, 48), 64),
  "inception4b": (160, (112, 224), (24, 64), 64),
  "inception4c": (128, (128, 256), (24, 64), 64),
  "inception4d": (112, (144, 288), (32, 64), 64),
  "inception4e": (256, (160, 320), (32, 128), 128),
  "inception5a": (256, (160, 320), (32, 128), 128),
  "inception5b": (384, (192, 384), (48, 128), 128),
}
# The window of the pool that comes after a stage, at stride 2.
POOLS = {"stem": 3, "inception3b": 3, "inception4e": 2}
# The stages whose activations the auxiliary heads see.
AUXILIARY = {"inception4a": "aux1", "inception4d": "aux2"}


class Inception(nn.Module):
  """Four branches side by side.

  Attributes:
    unit: constructor of a convolution with normalisation and ReLU.
    features: see BLOCKS.
  """

  unit: Callable
  features: tuple

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w d"]:
    unit = self.unit
    one, *threes, pool = self.features
    parts = [unit(one, name="branch1")(x, train)]
    for number, (reduced, wide) in enumerate(threes, 2):
      y = unit(reduced, name=f"branch{number}-0")(x, train)
      parts.append(unit(wide, (3, 3), name=f"branch{number}-1")(y, train))
    greatest = maximum(x, 3, 1, ((1, 1), (1, 1)))
    parts.append(unit(pool, name="branch4-1")(greatest, train))
    return jnp.concatenate(parts, -1)


class Auxiliary(nn.Module):
  """A classifier of features half way, which training alone uses."""

  unit: Callable
  num_classes: int
  dtype: Any
  width: float = 1.0

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], train: bool, chance: Key[Array, " b"] | None, place: int,
  ) -> Float[Array, "b classes"]:
    """`chance`, `place`: of the dropout. The logits are float32."""
    x = self.unit(scaled(128, self.width), name="conv")(adaptive_average(x, 4), train)
    dense = nn.Dense(
      scaled(1024, self.width), dtype=self.dtype, kernel_init=kernel_init, name="fc1")
    x = nn.relu(dense(x.reshape(x.shape[0], -1)))
    x = dropout(x, 0.7, chance, place)
    return nn.Dense(self.num_classes, name="fc2")(x.astype(jnp.float32))


class GoogLeNet(nn.Module):
  """224² → features 7² × 1024; small stem: 32² → 4² × 1024.

  Attributes:
    num_classes: of the dense head `fc`; None leaves it out (logits are None).
    aux: with num_classes, has two auxiliary heads.
    stem: "full", as published; "small", for 28 to 64 pixels: begins with 3×3 at stride 1, without
      the first pool.
    width: share of the published channels that each layer has.
    group_size, momentum: of the normalisation.
    remat: what training computes twice (see `remat`).
  """

  STAGES: ClassVar[tuple[str, ...]] = ("stem", *BLOCKS)

  num_classes: int | None = None
  aux: bool = False
  stem: str = "full"
  width: float = 1.0
  group_size: int | None = None
  momentum: float = 0.9
  dtype: Any = jnp.float32
  remat: str = "none"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w 3"], train: bool = False, *,
    chance: Key[Array, " b"] | None = None, stage: Stage | None = None,
  ):
    """Returns (logits [B, classes] float32 or None, {"features", "pooled"}).

    In training with auxiliary heads there are "aux1" and "aux2" too: logits float32.

    Args:
      chance: of the dropout, in training, before each last dense layer; None for none. "pooled" is
        what it is before the dropout.
      stage: called once with each of STAGES, in order; see `Stage`.
    """
    stage = stage or unchanged
    chance = chance if train else None
    unit = functools.partial(
      ConvBN, group_size=self.group_size, momentum=self.momentum, epsilon=1e-3, dtype=self.dtype)
    small = is_small(self.stem)
    size, stride = (3, 1) if small else (7, 2)
    part = remat.parts(self, self.remat, train)
    of = functools.partial(scaled, width=self.width)

    def first(x, train):
      pool = None if small else functools.partial(ceil_max_pool, size=3)
      return unit(of(64), (size, size), stride, name="conv1")(x, train, pool)

    def second(x, train):
      x = unit(of(64), name="conv2")(x, train)
      return unit(of(192), (3, 3), name="conv3")(x, train)

    x = part(second, part(first, x.astype(self.dtype)))

    auxiliary = {}
    for name in self.STAGES:
      if name in BLOCKS:
        x = part(Inception(unit, jax.tree.map(of, BLOCKS[name]), name=name), x)
      x = stage(name, x)
      if name in AUXILIARY and self._has_auxiliary(train):
        head = AUXILIARY[name]
        auxiliary[head] = Auxiliary(unit, self.num_classes, self.dtype, self.width, name=head)(
          x, train, chance, 1 + len(auxiliary))
      if name in POOLS:
        x = ceil_max_pool(x, POOLS[name])
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = None
    if self.num_classes is not None:
      logits = nn.Dense(self.num_classes, name="fc")(dropout(pooled, 0.2, chance))
    return logits, {"features": x, "pooled": pooled, **(auxiliary if train else {})}

  def _has_auxiliary(self, train: bool) -> bool:
    """Whether to compute the auxiliary heads: in evaluation only for their parameters to be."""
    return self.aux and self.num_classes is not None and (train or self.is_initializing())
