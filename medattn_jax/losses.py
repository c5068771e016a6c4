"""Losses of graded images: sums over the examples that count, with the weight they sum to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def graded(
    logits: Float[Array, "*b c"],
    level: Int[Array, "*b"],
    mask: Float[Array, "*b"],
    *,
    name: str = "cross_entropy",
    class_weights: tuple[float, ...] = (),
    focal_gamma: float = 2.0,
  ordinal: float = 0.0,
) -> Pair:
  """(sum of weighted losses, sum of weights), float32; their ratio is the mean loss.

  Left as two sums so that the mean over a batch spread over devices and microbatches is exact.

  Args:
    logits: any float; computed in float32.
    level: 0 … c-1; anything where `mask` is 0.
    mask: 1 where the example counts (a missing fellow eye does not).
    name: "cross_entropy"; "focal" (1-p)^gamma of it; "mse" on the expected grade.
    class_weights: one weight a level, or () for none.
    focal_gamma: the focal loss's exponent.
    ordinal: weight of the "mse" added to another loss: answers far off cost more, as in kappa.
  """
  logits = logits.astype(jnp.float32)
  weight = mask.astype(jnp.float32)
  if class_weights:
    weight = weight * jnp.asarray(class_weights, jnp.float32)[level]
  log_p = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(log_p, level[..., None], axis=-1)[..., 0]
  if name == "cross_entropy":
    loss = -own
  elif name == "focal":
    # The base is kept off zero: its power's gradient is infinite there for a gamma below one.
    loss = -own * jnp.maximum(-jnp.expm1(own), 1e-6) ** focal_gamma
  elif name == "mse":
    loss, ordinal = 0.0, 1.0
  else:
    raise ValueError(f"loss {name!r}: accepted: cross_entropy, focal, mse")
  if ordinal:
    grades = jnp.arange(logits.shape[-1], dtype=jnp.float32)
    loss = loss + ordinal * (jnp.exp(log_p) @ grades - level) ** 2
  return jnp.sum(loss * weight), jnp.sum(weight)
