"""The optimiser of a phase: schedule, clipping, update rule, from its page of plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medattn_jax import platforms

if TYPE_CHECKING:
  import ml_collections


def schedule(phase: ml_collections.ConfigDict) -> optax.Schedule:
  """Learning rate by the phase's own step: linear warm-up, then constant, step or cosine."""
  peak, warmup = phase.learning_rate, phase.warmup_steps
  rest = max(phase.steps - warmup, 1)
  if phase.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, rest)
  elif phase.schedule == "step":
    after = optax.exponential_decay(peak, phase.decay_every, phase.decay_rate, staircase=True)
  else:
    after = optax.constant_schedule(peak)
  if not warmup:
    return after
  rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
  return optax.join_schedules([rise, after], [warmup])


def rates(phase: ml_collections.ConfigDict) -> np.ndarray:
  """The learning rate at each step of the phase, float32 [steps].

  On the host, and by one program: asked for step by step, it would wait for the step under way.
  """
  return np.asarray(jax.jit(jax.vmap(schedule(phase)))(np.arange(phase.steps)), np.float32)


def build(
    phase: ml_collections.ConfigDict, earlier: Collection[str] = ()
) -> optax.GradientTransformation:
  """SGD with momentum (the paper's) or AdamW; weight decay spares biases and norms.

  Args:
    earlier: the branches (top-level names of the params) that a phase before this one trained:
      their updates are scaled by `phase.earlier_rate`.
  """
  chain = [_clip(phase.clip_norm)] if phase.clip_norm else []
  rate = schedule(phase)

  def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)

  if phase.optimizer == "adamw":
    chain += [optax.adamw(rate, weight_decay=phase.weight_decay, mask=kernels)]
  else:
    if phase.weight_decay:
      chain += [optax.add_decayed_weights(phase.weight_decay, mask=kernels)]
    chain += [optax.sgd(rate, momentum=phase.momentum or None)]
  if earlier and phase.earlier_rate != 1:
    chain += [_scale_branches(earlier, phase.earlier_rate)]
  return optax.chain(*chain)


def apart(
    main: optax.GradientTransformation, rates: Mapping[str, float]
) -> optax.GradientTransformation:
  """`main` for all branches but those of `rates`, which have an Adam of their own at that rate.

  Adam works number by number, so a branch may be spread over devices; clipping and decay do not
  reach it.
  """
  own = {name: optax.adam(rate) for name, rate in rates.items()}
  labels = lambda params: {name: name if name in own else "" for name in params}
  return optax.partition({"": main, **own}, labels)


def shared(number: Any) -> jax.Array:
  """The same number, float32, with which the same is going to be done to many leaves.

  Of what is done to leaves of one shape a GPU's compiler makes one kernel where they all read one
  vector, but neither where they read nothing together nor where that is a single number; and a
  network has hundreds of leaves.
  """
  read = lambda x: jax.lax.optimization_barrier(jnp.full(2, x))[0]
  return platforms.dependent(jnp.float32(number), cuda=read, default=lambda x: x)


def divided(gradients: Any, weight: jax.Array) -> Any:
  """Sums of gradients, divided by the sum of their weights (by 1e-8 where that is none)."""
  def plain(tree, weight):  # each its maximum: one for all a CPU fuses, and rounds, otherwise
    return jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-8), tree)

  def on_cuda(tree, weight):
    weight = shared(jnp.maximum(weight, 1e-8))
    return jax.tree.map(lambda g: g / weight, tree)

  return platforms.dependent(gradients, weight, cuda=on_cuda, default=plain)


def norm(tree: Any) -> jax.Array:
  """The root of the sum of a tree's squares, float32."""
  return platforms.dependent(tree, cuda=_norm_by_parts, default=optax.tree.norm)


_PARTS, _FEW = 256, 16


# A leaf's sum takes a GPU two kernels, of which the second does little but begin and end, and a
# network has hundreds of leaves. Here all have it together.
def _norm_by_parts(tree):
  total, one = jnp.zeros(_PARTS), shared(1)
  for leaf in jax.tree.leaves(tree):
    squares = jnp.square(leaf.astype(jnp.float32).ravel() * one)
    rows = len(squares) // _PARTS
    whole, rest = squares[:rows * _PARTS], squares[rows * _PARTS:]
    if rows > _FEW:
      total += whole.reshape(_PARTS, rows).sum(1)
    else:
      total += sum(whole[i * _PARTS:(i + 1) * _PARTS] for i in range(rows))
    if rest.size:
      total += jnp.pad(rest, (0, _PARTS - rest.size))
  return jnp.sqrt(total.sum())


def _clip(most: float) -> optax.GradientTransformation:
  """As optax.clip_by_global_norm, by the norm above."""
  def clip(updates, params=None):
    length = norm(updates)
    shorter = lambda u: jnp.where(length < most, u, u / length.astype(u.dtype) * most)
    return jax.tree.map(shorter, updates)

  return optax.stateless(clip)


def _scale_branches(names: Collection[str], factor: float) -> optax.GradientTransformation:
  def scale(updates, params=None):
    slower = lambda tree: jax.tree.map(lambda u: u * factor, tree)
    return {name: slower(tree) if name in names else tree for name, tree in updates.items()}

  return optax.stateless(scale)
