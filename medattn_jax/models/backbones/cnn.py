"""A plain convolutional network of three layers, for small images on a CPU. Not from a paper."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from medattn_jax.models import remat
from medattn_jax.models.backbones.stages import scaled
from medattn_jax.models.norm import Array, ConvBN


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Means of 2×2 pixels; an odd last row or column is left out. (A CPU's pooling has a gradient
  many times slower than this.)"""
  batch, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class CNN(nn.Module):
  """3×3 convolutions, each but the last followed by a 2×2 mean: 48² gives 12² features.

  Attributes:
    num_classes: of the dense head `fc`; None leaves it out (logits are None).
    stem: "small"; "full", for larger images, has a first stride of 4.
    widths: channels of the layers.
    width: share of them that each layer has.
    group_size, momentum: of the normalisation.
    remat: what training computes twice (see `remat`).
  """

  STAGES: ClassVar = ("layer1", "layer2", "layer3")

  num_classes: int | None = None
  stem: str = "full"
  widths: tuple[int, ...] = (16, 32, 64)
  width: float = 1.0
  group_size: int | None = None
  momentum: float = 0.9
  dtype: Any = jnp.float32
  remat: str = "none"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w 3"], train: bool = False, *, chance: Array | None = None,
    stage: Callable[[str, Array], Array] | None = None,
  ):
    """Returns (logits [B, classes] float32 or None, {"features", "pooled"}).

    `stage` may change the features of each of STAGES; `chance` is for networks with dropout.
    """
    del chance
    unit = functools.partial(
      ConvBN, group_size=self.group_size, momentum=self.momentum, dtype=self.dtype)
    x = x.astype(self.dtype)
    part = remat.parts(self, self.remat, train)

    def layer(x, train, *, number, name, width):
      x = halved(x) if number else x
      stride = 4 if self.stem == "full" and not number else 1
      return unit(width, (3, 3), stride, name=name)(x, train)

    for number, (name, width) in enumerate(zip(self.STAGES, self.widths, strict=True)):
      width = scaled(width, self.width)
      x = part(functools.partial(layer, number=number, name=name, width=width), x)
      if stage is not None:
        x = stage(name, x)
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = None if self.num_classes is None else nn.Dense(self.num_classes, name="fc")(pooled)
    return logits, {"features": x, "pooled": pooled}
