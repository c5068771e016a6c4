"""A-Net, the attention network of Zoom-in-Net (papers.md §1)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from medattn_jax.models.norm import Array, Conv, ConvBN


class AttentionNet(nn.Module):
  """Score maps S gated by attention maps A: G = S ⊗ A, y_A = Σ over positions of G.

  Part I is a 1×1 convolution to a score map a class. Part II is two 3×3 convolutions with
  normalisation and ReLU, and a 1×1 convolution to a map a class, without a bias (the spatial
  softmax is blind to it). The last layer of each part starts small, so that y_A starts near
  nothing (the phase begins from M-Net's answers) with an even attention, while both parts
  have a gradient from the first step.

  Attributes:
    features, kernel: channels and kernel size of part II's hidden convolutions. The paper's 3×3
      suits cells that see far; where cells are few and local, 1×1 keeps the maps sharp.
    group_size, momentum: of the normalisation.
  """

  num_classes: int
  features: int = 1024
  kernel: int = 3
  group_size: int | None = None
  momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, m: Float[Array, "b h w c"], train: bool = False):
    """Returns (y_A [B, classes], {"S", "A", "G"} [B, h, w, classes]), all float32."""
    small = nn.initializers.normal(0.01)
    s = Conv(self.num_classes, use_bias=True, dtype=self.dtype, kernel_init=small,
             name="score")(m).astype(jnp.float32)
    x = m
    for i in range(2):
      x = ConvBN(self.features, (self.kernel, self.kernel), group_size=self.group_size,
                 momentum=self.momentum, dtype=self.dtype, name=f"conv{i}")(x, train)
    a = Conv(self.num_classes, dtype=self.dtype, kernel_init=small, name="attention")(x)
    a = jax.nn.softmax(a.astype(jnp.float32), axis=(1, 2))
    g = s * a
    return g.sum((1, 2)), {"S": s, "A": a, "G": g}
