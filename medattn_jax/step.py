"""Pure steps: (state, batch) → (state, metrics), and variables, batch → answers. Names no model.

A train step runs per device under `shard_map`: each device sums gradients, batch statistics and
metrics of its own examples over the microbatches, and ONE all-reduce of one float32 vector joins
them, outside any loop (design.md, throughput). Sums are divided by the summed weight afterwards,
so the mean is exact whatever the device count and however many examples are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from medattn_jax import augment, losses, sharding

Tree = Any
Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class State:
  """All that a run carries from step to step; everything else is config or data."""

  step: jax.Array  # int32, counted over all phases
  params: Tree
  batch_stats: Tree
  opt_state: Tree  # of the branches trained in this phase only
  ema: Tree  # of all params, or None where the phase keeps none


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    trained: Sequence[str],
    answers: Sequence[str],
    loss: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    ema: float,
    begins: int = 0,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """The jitted, sharded, donating train step.

  Args:
    apply: apply(variables, image, gain=, bias=, train=True, mutable=[...]) →
      ((logits, out), updates): a linen module's, bound to its phase.
    optimizer: of the params of the `trained` branches.
    mesh: one data axis.
    seed: of all chance; a draw depends on (seed, step, example) alone.
    trained: top-level names of the params that this phase trains; the others stay bit-equal.
    answers: what is graded: the first with weight one, the others with `loss["auxiliary"]`.
      "logits" or a name of `out`.
    loss: the page's `loss`.
    augmentation: the page's `augment`.
    ema: decay of the parameters' moving average, 0 for none; nearer to the present in the
      first steps, so that the initial values are soon forgotten.
    begins: the state's step at which this phase begins.

  Returns:
    step(state, batch): batch holds image uint8 [A, B, E, H, W, C], level int32 and mask float32
    [A, B, E] (A microbatches accumulated into one update, B patients, E eyes), split along B.
  """
  grading = {k: loss[k] for k in ("name", "class_weights", "focal_gamma", "ordinal")}
  weights = dict(zip(answers, [1.0] + [loss["auxiliary"]] * (len(answers) - 1), strict=True))
  devices = mesh.size

  def micro_loss(params, rest, batch_stats, batch, key, number):
    image, level, mask = batch["image"], batch["level"], batch["mask"]
    images = image.reshape(-1, *image.shape[2:])
    first = (number * devices + jax.lax.axis_index(sharding.AXIS)) * len(images)
    drawn = augment.draw(key, first + jnp.arange(len(images)), **augmentation)
    if augmentation["dihedral"]:
      images = augment.dihedral(images, drawn.flips)
    gain, bias = (x.reshape(*image.shape[:2], -1) for x in (drawn.gain, drawn.bias))
    (logits, out), updates = apply(
        {"params": {**rest, **params}, "batch_stats": batch_stats},
        images.reshape(image.shape),
        gain=gain,
        bias=bias,
        train=True,
        mutable=["batch_stats"],
    )
    graded = {"logits": logits, **out}
    terms = {name: losses.graded(graded[name], level, mask, **grading) for name in answers}
    total = sum(weights[name] * term for name, (term, _) in terms.items())
    hits = jnp.sum((graded[answers[0]].argmax(-1) == level) * mask)
    sums = {"loss": total, "weight": terms[answers[0]][1], "hits": hits, "images": mask.sum()}
    return total, ({**batch_stats, **updates.get("batch_stats", {})}, sums)

  def local(state: State, batch: Batch):
    accumulation = len(batch["level"])
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    params = {name: state.params[name] for name in trained}
    rest = {name: tree for name, tree in state.params.items() if name not in params}
    gradient = jax.grad(micro_loss, has_aux=True)

    def micro(carry, numbered):
      total, batch_stats, sums = carry
      number, small = numbered
      grads, (batch_stats, more) = gradient(params, rest, batch_stats, small, key, number)
      add = lambda a, b: jax.tree.map(jnp.add, a, b)
      return (add(total, grads), batch_stats, add(sums, more)), None

    zeros = {name: jnp.zeros(()) for name in ("loss", "weight", "hits", "images")}
    carry = (jax.tree.map(jnp.zeros_like, params), state.batch_stats, zeros)
    numbered = (jnp.arange(accumulation), batch)
    # No loop where none is needed: XLA fuses across what a loop would part, and on a CPU computes
    # the gradient of a convolution's kernel some 60 times slower inside one.
    if accumulation == 1:
      carry, _ = micro(carry, jax.tree.map(lambda x: x[0], numbered))
    else:
      carry, _ = jax.lax.scan(micro, carry, numbered)
    grads, batch_stats, sums = carry

    own_stats = {name: batch_stats[name] for name in trained if name in batch_stats}
    vector, unravel = ravel_pytree((grads, own_stats, sums))
    grads, own_stats, sums = unravel(jax.lax.psum(vector, sharding.AXIS))
    own_stats = jax.tree.map(lambda s: s / devices, own_stats)
    grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1e-8), grads)

    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    average = state.ema
    if ema:
      age = (state.step - begins).astype(jnp.float32)
      decay = jnp.minimum(ema, (1 + age) / (10 + age))
      moved = {name: average[name] for name in trained}
      moved = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, moved, params)
      average = {**average, **moved}
    images = jnp.maximum(sums["images"], 1)
    metrics = {
        "loss": sums["loss"] / jnp.maximum(sums["weight"], 1e-8),
        "accuracy": sums["hits"] / images,
        "gradient_norm": optax.tree.norm(grads),
        "parameter_norm": optax.tree.norm(params),
    }
    state = State(
        step=state.step + 1,
        params={**rest, **params},
        batch_stats={**state.batch_stats, **own_stats},
        opt_state=opt_state,
        ema=average,
    )
    return state, metrics

  mapped = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(), P(None, sharding.AXIS)),
      out_specs=P(),
      check_vma=False,
  )

  replicated = sharding.replicated(mesh)
  return jax.jit(
      mapped,
      in_shardings=(replicated, sharding.batched(mesh, axis=1)),
      out_shardings=(replicated, replicated),
      donate_argnums=0,
  )


def make_eval_step(
    apply: Callable[..., Any], mesh: Mesh, stops: Sequence[str]
) -> Callable[[Tree, jax.Array], dict[str, jax.Array]]:
  """The jitted, sharded eval step: (variables, image uint8 [B, E, H, W, C]) → answers.

  The answers are "logits" and the named `stops` that the model gives, each [B, …] split over the
  mesh. No collective: each device answers for its own patients.
  """

  def local(variables, image):
    logits, out = apply(variables, image, train=False)
    kept = {name: out[name] for name in stops if name in out}
    floats = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(floats, {"logits": logits, **kept})

  batched = sharding.batched(mesh)
  mapped = jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P(), P(sharding.AXIS)),
      out_specs=P(sharding.AXIS),
      check_vma=False,
  )
  return jax.jit(mapped, in_shardings=(sharding.replicated(mesh), batched), out_shardings=batched)
