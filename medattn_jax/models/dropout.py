"""Dropout whose chance belongs to the example, not to its place in the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from medattn_jax.models.norm import Array


def dropout(
  x: Float[Array, "b ..."], rate: float, chance: Key[Array, " b"] | None, place: int = 0,
) -> Float[Array, "b ..."]:
  """Sets each number to 0 with probability `rate`, and divides the others by 1 - rate.

  An example's mask is drawn from its own key alone: it is the same wherever the example lies, in
  the batch or on the devices.

  Args:
    x: any float dtype, which the result has.
    chance: a key for each example; None leaves `x` as it is.
    place: which of a network's dropouts this is: each draws masks of its own from the same keys.
  """
  if chance is None:
    return x
  keep = 1 - rate
  draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), keep, x.shape[1:])
  return jnp.where(jax.vmap(draw)(chance), x.astype(jnp.float32) / keep, 0).astype(x.dtype)
