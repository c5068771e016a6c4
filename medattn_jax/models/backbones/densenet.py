"""DenseNet (Huang et al. 2017) of 121 layers, one of the backbones of papers.md §2.

Layout, names and numbers are those of torchvision's published weights: normalisation and ReLU come
before each convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from medattn_jax.models import remat
from medattn_jax.models.backbones.stages import Stage, is_small, scaled, unchanged
from medattn_jax.models.moments import Moments
from medattn_jax.models.norm import Array, Conv, GroupBatchNorm, conv_bn, statistics
from medattn_jax.models.pooling import maximum


class Piece(NamedTuple):
  """Features, and in training their statistics: each layer after them normalises them anew."""

  features: Float[Array, "b h w c"]
  known: Moments | None


class DenseLayer(nn.Module):
  """All features so far, in pieces → `growth` more, by a 1×1 convolution to 4·growth and a 3×3."""

  conv: Callable
  norm: Callable
  growth: int

  @nn.compact
  def __call__(self, pieces: Sequence[Piece], train: bool) -> Float[Array, "b h w growth"]:
    x = joined(pieces)  # here: whoever computes it twice keeps the pieces alone
    y = self.norm(name="norm1")(x.features, train, relu=True, known=x.known)
    y = self.conv(4 * self.growth, name="conv1")(y)
    y = self.norm(name="norm2")(y, train, relu=True)
    return self.conv(self.growth, (3, 3), name="conv2")(y)


def joined(pieces: Sequence[Piece]) -> Piece:
  """Their channels side by side."""
  return jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *pieces)


class Transition(nn.Module):
  """Halves the channels, by a 1×1 convolution, and the grid."""

  conv: Callable
  norm: Callable

  @nn.compact
  def __call__(self, x: Piece, train: bool) -> Float[Array, "b h2 w2 d"]:
    y = self.norm(name="norm")(x.features, train, relu=True, known=x.known)
    y = self.conv(y.shape[-1] // 2, name="conv")(y)
    return nn.avg_pool(y, (2, 2), (2, 2))


class DenseNet(nn.Module):
  """224² → features 7² × 1024; small stem: 32² → 4² × 1024.

  The last stage is what the head pools: after the last normalisation and ReLU. The others are the
  blocks as they are, before the transition.

  Attributes:
    num_classes: of the dense head `classifier`; None leaves it out (logits are None).
    blocks: layers of each dense block.
    growth: features that a layer adds.
    stem: "full", as published; "small", for 28 to 64 pixels: 3×3 at stride 1, no pool.
    width: share of the published channels that each layer has.
    group_size, momentum: of the normalisation.
    remat: what training computes twice (see `remat`).
  """

  STAGES: ClassVar[tuple[str, ...]] = (
    "stem", "denseblock1", "denseblock2", "denseblock3", "denseblock4")

  num_classes: int | None = None
  blocks: tuple[int, ...] = (6, 12, 24, 16)
  growth: int = 32
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

    Args:
      chance: not used: there is no dropout.
      stage: called once with each of STAGES, in order; see `Stage`.
    """
    del chance
    stage = stage or unchanged
    conv = functools.partial(Conv, dtype=self.dtype)
    norm = functools.partial(GroupBatchNorm, self.group_size, self.momentum)
    small = is_small(self.stem)
    size, stride = (3, 1) if small else (7, 2)
    part = remat.parts(self, self.remat, train)
    growth = scaled(self.growth, self.width)
    pool = functools.partial(maximum, size=3, around=((1, 1), (1, 1)))

    def stem(x, train):
      conv0 = conv(2 * growth, (size, size), stride, name="features-conv0")
      norm0 = norm(name="features-norm0")
      return conv_bn(conv0, norm0, x, train, None if small else pool, relu=True)

    def last(x, train):
      return norm(name="features-norm5")(x.features, train, relu=True, known=x.known)

    def piece(features):
      return Piece(features, statistics(features, self.group_size) if train else None)

    x = stage("stem", part(stem, x))
    for number, layers in enumerate(self.blocks, 1):
      block, pieces = f"denseblock{number}", (piece(x),)
      for i in range(1, layers + 1):
        layer = DenseLayer(conv, norm, growth, name=f"features-{block}-denselayer{i}")
        pieces += (piece(part(layer, pieces)),)
      x = joined(pieces)
      if number < len(self.blocks):
        features = stage(block, x.features)
        x = x if features is x.features else Piece(features, None)
        x = part(Transition(conv, norm, name=f"features-transition{number}"), x)
      else:
        x = stage(block, part(last, x))
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = (
      None if self.num_classes is None else nn.Dense(self.num_classes, name="classifier")(pooled))
    return logits, {"features": x, "pooled": pooled}
