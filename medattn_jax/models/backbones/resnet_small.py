"""A small residual network for demonstrations and tests on a CPU.

Not from a paper. It is made of what every backend does well and a CPU does fast: each
downsampling is a space-to-depth and a matrix product, each 3×3 convolution has stride 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from medattn_jax import apart, platforms
from medattn_jax.models import remat
from medattn_jax.models.backbones.stages import scaled
from medattn_jax.models.norm import Array, ConvBN


def space_to_depth(x: Float[Array, "b h w c"], block: int) -> Float[Array, "b h2 w2 d"]:
  """Folds block×block pixels into channels; a ragged edge is first filled with zeros."""
  rows, columns = -x.shape[1] % block, -x.shape[2] % block
  x = jnp.pad(x, ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2),
                  (0, 0)))

  def folded(x):
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // block, block, width // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(
      batch, height // block, width // block, block * block * channels)

  if x.shape[-1] > 3:
    return folded(x)
  return platforms.dependent(
    x, cpu=functools.partial(apart.call, folded), default=folded)


class ResNetSmall(nn.Module):
  """Stages of 3×3 residual blocks at strides 4, 8, 16: 160² gives 10² features.

  With the small stem, for images of 28 to 64 pixels, at strides 2, 4, 8.

  Without blocks in the last stage ("resnet_local") a feature sees 48² pixels, not 112². Attention
  needs that: features that see the whole image say no longer *where*.

  Attributes:
    num_classes: of the dense head `fc`; None leaves it out (logits are None).
    stem: "full" or "small".
    widths, blocks: channels and residual blocks of each stage.
    width: share of the channels that each layer has.
    group_size, momentum: of the normalisation.
    remat: what training computes twice (see `remat`).
  """

  STAGES: ClassVar = ("stage0", "stage1", "stage2")

  num_classes: int | None = None
  stem: str = "full"
  widths: tuple[int, ...] = (32, 64, 128)
  blocks: tuple[int, ...] = (0, 1, 1)
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
    first = 2 if self.stem == "small" else 4
    part = remat.parts(self, self.remat, train)

    def down(x, train, *, number, width):
      x = space_to_depth(x, 2 if number else first)
      return unit(width, name=f"down{number}")(x, train)

    def residual(x, train, *, name, width):
      y = unit(width, (3, 3), name=f"{name}_1")(x, train)
      # A gamma of zero: every block starts as the identity.
      y = unit(width, (3, 3), relu=False, scale_init=nn.initializers.zeros, name=f"{name}_2")(
        y, train)
      return remat.last_relu(x + y)

    for number, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
      width = scaled(width, self.width)
      x = part(functools.partial(down, number=number, width=width), x)
      for block in range(blocks):
        x = part(functools.partial(residual, name=f"stage{number}_{block}", width=width), x)
      if stage is not None:
        x = stage(self.STAGES[number], x)
    pooled = x.astype(jnp.float32).mean((1, 2))
    logits = None if self.num_classes is None else nn.Dense(self.num_classes, name="fc")(pooled)
    return logits, {"features": x, "pooled": pooled}
