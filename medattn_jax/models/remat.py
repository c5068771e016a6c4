"""What a train step computes anew in its backward pass, to save the memory of having kept it.

A network names its parts, one after the other. Of each part nothing but the input is kept for the
backward pass ("blocks"), or also what is dear to compute: the outputs of convolutions, and the mean
and variance of each group ("elementwise"; normalisation, ReLU, concatenation and pools are computed
again). The numbers are those of a step that keeps all ("none"), and the variables are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from medattn_jax import platforms

_DEAR = "dear"
_POLICIES = {
  "elementwise": jax.checkpoint_policies.save_only_these_names(_DEAR),
  "blocks": jax.checkpoint_policies.nothing_saveable,
}
MODES = ("none", *_POLICIES)


def dear(tree: Any) -> Any:
  """The same; "elementwise" keeps it."""
  return jax.tree.map(lambda x: checkpoint_name(x, _DEAR), tree)


def parts(net: nn.Module, mode: str, train: bool) -> Callable[..., Any]:
  """part(layers, *inputs) → layers(*inputs, train), computed again in training as the mode says.

  `layers`: a module, or a function that makes modules of `net`'s own. They have the same names and
  variables in every mode. To be called in a compact method of `net`.

  Raises:
    KeyError: an unknown mode.
  """
  if mode == "none" or not train:
    return lambda layers, *inputs: layers(*inputs, train)
  policy = _POLICIES[mode]

  def part(layers, *inputs):
    if isinstance(layers, nn.Module):
      again = nn.remat(lambda own, *inputs: own(*inputs, train), policy=policy)
      return again(layers, *inputs)
    again = nn.remat(lambda net, *inputs: layers(*inputs, train), policy=policy)
    return again(net, *inputs)

  return part


def last_relu(x: jax.Array) -> jax.Array:
  """`relu` at the end of a part: the next part keeps it. By its input "elementwise" would keep, or
  compute again, all that was added up to it."""
  return relu(x, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def relu(x: jax.Array, kept: bool = False) -> jax.Array:
  """ReLU, whose gradient is read off its result: its input need not be there any more.

  Args:
    kept: "elementwise" keeps the result.
  """
  del kept
  return jnp.maximum(x, 0)


def _relu_forward(x, kept):
  y = relu(x, kept)
  y = dear(y) if kept else y
  return y, y


def _relu_backward(kept, y, gradient):
  # XLA sees that y is above zero where x is, and would keep x too; a GPU's then cannot make y in
  # the product or convolution that it is the end of.
  del kept
  y = platforms.dependent(y, cuda=jax.lax.optimization_barrier, default=lambda y: y)
  return (jnp.where(y > 0, gradient, 0),)


relu.defvjp(_relu_forward, _relu_backward)
