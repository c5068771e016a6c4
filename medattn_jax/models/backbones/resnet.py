"""ResNet (He et al. 2016) of 18 and of 50 layers, one of the backbones of papers.md §2.

Layout, names and numbers are those of torchvision's published weights: a bottleneck strides in its
3×3 convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Key

from medattn_jax.models import remat
from medattn_jax.models.backbones.stages import Stage, is_small, scaled, unchanged
from medattn_jax.models.norm import Array, Conv, GroupBatchNorm, conv_bn
from medattn_jax.models.pooling import maximum


class Residual(nn.Module):
  """x + convolutions of x, ReLU; a projection of x (`downsample`) where its shape changes.

  Attributes:
    conv, norm: constructors of a convolution and of a normalisation.
    layers: (features, kernel size, stride) of the convolutions.
  """

  conv: Callable
  norm: Callable
  layers: tuple

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
    y = x
    for i, (features, size, stride) in enumerate(self.layers, 1):
      y = self.conv(features, (size, size), stride, name=f"conv{i}")(y)
      y = self.norm(name=f"bn{i}")(y, train, relu=i < len(self.layers))
    stride = math.prod(stride for _, _, stride in self.layers)
    if stride > 1 or x.shape[-1] != y.shape[-1]:
      x = self.conv(y.shape[-1], stride=stride, name="downsample-0")(x)
      x = self.norm(name="downsample-1")(x, train)
    return remat.last_relu(x + y)


class ResNet(nn.Module):
  """224² → features 7² × 512, or × 2048 with bottlenecks; small stem: 32² → 4².

  Attributes:
    num_classes: of the dense head `fc`; None leaves it out (logits are None).
    blocks: of each of the four layers.
    bottleneck: blocks of 1×1, 3×3, 1×1 convolutions, instead of two 3×3.
    stem: "full", as published; "small", for 28 to 64 pixels: 3×3 at stride 1, no pool.
    width: share of the published channels that each layer has.
    group_size, momentum: of the normalisation.
    remat: what training computes twice (see `remat`).
  """

  STAGES: ClassVar[tuple[str, ...]] = ("stem", "layer1", "layer2", "layer3", "layer4")

  num_classes: int | None = None
  blocks: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
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
    pool = functools.partial(maximum, size=3, around=((1, 1), (1, 1)))

    def stem(x, train):
      conv1 = conv(scaled(64, self.width), (size, size), stride, name="conv1")
      return conv_bn(conv1, norm(name="bn1"), x, train, None if small else pool, relu=True)

    x = stage("stem", part(stem, x))
    for number, blocks in enumerate(self.blocks, 1):
      width = scaled(32 << number, self.width)
      for block in range(blocks):
        stride = 2 if number > 1 and not block else 1
        layers = ((width, 3, stride), (width, 3, 1))
        if self.bottleneck:
          layers = ((width, 1, 1), (width, 3, stride), (4 * width, 1, 1))
        x = part(Residual(conv, norm, layers, name=f"layer{number}-{block}"), x)
      x = stage(f"layer{number}", x)
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = None if self.num_classes is None else nn.Dense(self.num_classes, name="fc")(pooled)
    return logits, {"features": x, "pooled": pooled}
