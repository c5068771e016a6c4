"""VGG-16 (Simonyan and Zisserman 2015), with and without normalisation: backbones of papers.md §2.

Layout, names and numbers are those of torchvision's published weights: a layer's name is its number
in the chain of convolutions, normalisations, ReLUs and pools. The rows of the first dense kernel
are (row, column, channel), the published ones (channel, row, column).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float, Key

from medattn_jax.models import remat
from medattn_jax.models.backbones.stages import Stage, is_small, scaled, unchanged
from medattn_jax.models.dropout import dropout
from medattn_jax.models.norm import Array, Conv, GroupBatchNorm, conv_bn
from medattn_jax.models.pooling import adaptive_average, maximum

# Features and number of the convolutions of each block.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
  """224² → features 7² × 512 → pooled 4096; small stem: 32² → 2² × 512 → pooled 512.

  Attributes:
    num_classes: of the last dense layer `classifier-6`; None leaves it out (logits are None).
    norm: normalises after each convolution.
    hidden: of the two dense layers before the last; None leaves them out, and pooled is the mean
      of the features.
    stem: "full", as published; "small", for 28 to 64 pixels: the first pool and the two dense
      layers are left out.
    width: share of the published channels that each layer has.
    group_size, momentum: of the normalisation.
    remat: what training computes twice (see `remat`).
  """

  STAGES: ClassVar[tuple[str, ...]] = ("block1", "block2", "block3", "block4", "block5")

  num_classes: int | None = None
  norm: bool = False
  hidden: int | None = 4096
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
      chance: of the dropout, in training, after each of the two dense layers; None for none.
        "pooled" is the last layer's input before it.
      stage: called once with each of STAGES, in order; see `Stage`.
    """
    stage = stage or unchanged
    chance = chance if train else None
    small = is_small(self.stem)
    number = 0
    part = remat.parts(self, self.remat, train)

    def chain(x, train, *, number, features, layers, pool):
      for left in reversed(range(layers)):
        conv = Conv(features, (3, 3), use_bias=True, dtype=self.dtype, name=f"features-{number}")
        greatest = functools.partial(maximum, size=2) if pool and not left else None
        if self.norm:
          number += 1
          norm = GroupBatchNorm(self.group_size, self.momentum, name=f"features-{number}")
          x = conv_bn(conv, norm, x, train, greatest, relu=True)
        else:
          x = remat.relu(conv(x))
          x = greatest(x) if greatest else x
        number += 2
      return x

    for block, (features, layers) in zip(self.STAGES, BLOCKS, strict=True):
      own = functools.partial(
        chain, number=number, features=scaled(features, self.width), layers=layers,
        pool=not small or block != "block1")
      x = stage(block, part(own, x))
      number += (3 if self.norm else 2) * layers + 1

    if small or self.hidden is None:
      y = pooled = x.astype(jnp.float32).mean((1, 2))
    else:
      y = adaptive_average(x, 7).reshape(x.shape[0], -1)
      for place, name in enumerate(("classifier-0", "classifier-3")):
        # Not norm.kernel_init, which draws up to four times the first kernel's hundred million.
        dense = nn.Dense(
          scaled(self.hidden, self.width), dtype=self.dtype,
          kernel_init=nn.initializers.he_normal(), name=name)
        pooled = nn.relu(dense(y))
        y = dropout(pooled, 0.5, chance, place)
      y, pooled = y.astype(jnp.float32), pooled.astype(jnp.float32)
    logits = (
      None if self.num_classes is None else nn.Dense(self.num_classes, name="classifier-6")(y))
    return logits, {"features": x, "pooled": pooled}
