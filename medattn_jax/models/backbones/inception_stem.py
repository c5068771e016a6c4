"""The stem that Inception-v3 and Inception-ResNet-v2 share: 492² of 3 channels → 59² of 192."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtyping import Float

from medattn_jax.models.blocks import Blocks
from medattn_jax.models.norm import Array
from medattn_jax.models.pooling import max_pool


def stem(
  unit: Callable, part: Callable, names: Sequence[str], x: Float[Array, "b h w 3"] | Blocks,
) -> Float[Array, "b h2 w2 192"]:
  """Five convolutions without padding but for the third, and two maxima; two parts (see `remat`).

  Args:
    unit: constructor of a convolution with normalisation and ReLU.
    part: as remat.parts gives it.
    names: of the five.
  """
  one, two, three, four, five = names

  def first(x, train):
    x = unit(32, (3, 3), 2, (0, 0), name=one)(x, train)
    x = unit(32, (3, 3), 1, (0, 0), name=two)(x, train)
    return unit(64, (3, 3), name=three)(x, train, max_pool)

  def second(x, train):
    x = unit(80, name=four)(x, train)
    return unit(192, (3, 3), 1, (0, 0), name=five)(x, train, max_pool)

  return part(second, part(first, x))
