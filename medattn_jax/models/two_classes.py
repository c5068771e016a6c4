"""The pixels' own split into two classes: where in a map the important ones begin.

How large a weight is, is nobody's business: a backbone takes up any common factor, so the loss is
content once important pixels weigh more than others, be it .4 and .1 or 1 and .25. The boundary is
therefore asked of the weights themselves, by the rule that a common factor does not change either:
Li's minimum cross entropy (Li and Lee 1993), the logarithmic mean of the two classes' means. The
map is then stretched, in its logarithm, so that the boundary comes to lie at one half. Drawn once,
when the map is frozen: drawn in training it feeds back, and the upper class shrinks. [choice]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The means of the classes come to lie at σ(∓SLOPE/2): .05 and .95.
SLOPE = 6.0
_ROUNDS = 100  # of the fixed point's iteration; some twenty suffice
_LEAST = 0.1  # between the logarithms of the means: what is as alike as that is not torn in two
_ZERO = 1e-12


def split(weights: Float[Array, "h w"]) -> Float[Array, "h w"]:
  """The map with its two classes on either side of one half; the order of the pixels stays.

  A map without two classes, of equal weights for one, is returned as it is.
  """
  weights = jnp.maximum(weights, _ZERO)

  def logarithms(boundary):
    upper = (weights > boundary).astype(jnp.float32)
    average = lambda belongs: (belongs * weights).sum() / jnp.maximum(belongs.sum(), 1)
    return tuple(jnp.log(jnp.maximum(average(own), _ZERO)) for own in (1 - upper, upper))

  def closer(_, boundary):
    low, high = logarithms(boundary)
    apart = high - low
    return jnp.where(apart > 0, (jnp.exp(high) - jnp.exp(low)) / apart, boundary)

  boundary = jax.lax.fori_loop(0, _ROUNDS, closer, weights.mean())
  low, high = logarithms(boundary)
  apart = high - low
  stretched = SLOPE * (jnp.log(weights) - jnp.log(boundary)) / jnp.maximum(apart, _LEAST)
  alike = (apart < _LEAST) | (weights.max() - weights.min() < _ZERO)
  return jnp.where(alike, weights, jax.nn.sigmoid(stretched))
