"""Pure steps: (state, batch) → (state, metrics), and variables, batch → answers. Names no model.

A train step runs per device under `shard_map`: each device sums gradients, batch statistics and
metrics of its own examples over the microbatches, and ONE all-reduce of one float32 vector joins
them, outside any loop (design.md, throughput), or a few where that is cheaper (joining.py). Sums
are divided by the summed weight afterwards, so the mean is exact whatever the device count and
however many examples are masked.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from medattn_jax import augment, joining, losses, optim, platforms, sharding

# XLA's options for a step, by platform. A CPU's convolutions are left to Eigen: YNNPACK runs one of
# up to 64 features on one core alone. A GPU's products are left to cuBLAS, which adds to them what
# is there already, a bias and ReLU: Triton's were no faster, and took most of the time to compile.
_OPTIONS = {
  "cpu": {"xla_cpu_experimental_ynn_fusion_type":
          "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"},
  "gpu": {"xla_gpu_enable_triton_gemm": False},
}

Tree = Any
Batch = Mapping[str, jax.Array]


@flax.struct.dataclass
class State:
  """All that a run carries from step to step; everything else is config or data."""

  step: jax.Array  # int32, counted over all phases
  params: Tree
  batch_stats: Tree
  constants: Tree  # what all images share and no optimiser moves: the map of a global attention
  opt_state: Tree  # of the branches trained in this phase only
  ema: Tree  # of all params, or None where the phase keeps none


class Common(Protocol):
  """What all images of an update share, computed once an update: its constants.

  Where it is made from what is spread over the devices, each gives a summand and one all-reduce
  joins them; the constants' gradient rides with the parameters' own.
  """

  branch: str  # of the params, of which it is made; those below a key "rows" are spread
  reads: Mapping[str, Any]  # what of the batch besides images and levels, as PartitionSpecs

  def partial(self, params: Tree, batch: Batch) -> Tree:
    """A device's summand; only `params` has a gradient."""

  def finish(self, total: Tree, params: Tree) -> Tree:
    """The constants from the sum."""

  def penalty(self, constants: Tree) -> jax.Array:
    """A term of the loss that depends on the constants alone."""

  def keep(self, old: Tree, new: Tree, age: jax.Array) -> Tree:
    """The constants to answer with after this update. `age`: of the phase, in steps."""


def local_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    devices: int,
    axis: str | None,
    seed: int,
    trained: Sequence[str],
    answers: Sequence[str],
    loss: Mapping[str, Any],
    augmentation: Mapping[str, Any],
    ema: float,
    begins: int = 0,
    common: Common | None = None,
    joined: joining.Way = "vector",
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """What each of `devices` does in a train step, on its share of the batch; not compiled.

  Args:
    apply: apply(variables, image, drawn=, train=True, mutable=[...]) →
      ((logits, out), updates): a linen module's, bound to its phase.
    optimizer: of the params of the `trained` branches.
    axis: the name over which the devices' sums are joined. None: the whole batch is this one's
      share (`devices` is 1), and what lies where is the compiler's affair.
    seed: of all chance; a draw depends on (seed, step, example) alone.
    trained: top-level names of the params that this phase trains; the others stay bit-equal.
    answers: what is graded: the first with weight one, the others with `loss["auxiliary"]`.
      "logits" or a name of `out`.
    loss: the page's `loss`.
    augmentation: the page's `augment`.
    ema: decay of the parameters' moving average, 0 for none; nearer to the present in the
      first steps, so that the initial values are soon forgotten.
    begins: the state's step at which this phase begins.
    common: how the constants are made anew at each step; None: they stay as they are.
    joined: how the devices' sums are: see joining.py.

  Returns:
    step(state, batch): batch holds image uint8 [A, B, E, H, W, C], level int32 and mask float32
    [A, B, E] (A microbatches accumulated into one update, B patients, E eyes);
    and the bank that `common` reads, where it reads one.
  """
  grading = {k: loss[k] for k in ("name", "class_weights", "focal_gamma", "ordinal")}
  weights = dict(zip(answers, [1.0] + [loss["auxiliary"]] * (len(answers) - 1), strict=True))

  def place():
    return jax.lax.axis_index(axis) if axis else 0

  def micro_loss(params, made, state, batch_stats, batch, key, number):
    image, level, mask = batch["image"], batch["level"], batch["mask"]
    images = image.reshape(-1, *image.shape[2:])
    first = (number * devices + place()) * len(images)
    drawn = augment.draw(
        key, first + jnp.arange(len(images)), images.shape[-2], **augmentation)
    (logits, out), updates = apply(
        {"params": {**state.params, **params}, "batch_stats": batch_stats,
         "constants": {**state.constants, **made}},
        image,
        drawn=drawn,
        train=True,
        mutable=["batch_stats"],
    )
    graded = {"logits": logits, **out}
    terms = {n: losses.graded(graded[n], level, mask, **grading) for n in answers}
    total = sum(weights[name] * term for name, (term, _) in terms.items())
    hits = jnp.sum((graded[answers[0]].argmax(-1) == level) * mask)
    sums = {"loss": total, "weight": terms[answers[0]][1], "hits": hits, "images": mask.sum()}
    return total, ({**batch_stats, **updates.get("batch_stats", {})}, sums)

  def local(state: State, batch: Batch):
    accumulation = len(batch["level"])
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    age = state.step - begins
    whole = {name: state.params[name] for name in trained}
    params, made = dict(whole), {}  # made: the constants that this update makes anew
    if common:
      shared = params.pop(common.branch)
      part, pull_part = jax.vjp(lambda p: common.partial(p, batch), shared)
      total = jax.lax.psum(part, axis) if axis else part
      made, pull_finish = jax.vjp(common.finish, total, shared)
    gradient = jax.grad(micro_loss, argnums=(0, 1), has_aux=True)
    microbatches = {name: batch[name] for name in ("image", "level", "mask")}

    def micro(carry, numbered):
      total, batch_stats, sums = carry
      number, small = numbered
      grads, (batch_stats, more) = gradient(
          params, made, state, batch_stats, small, key, number)
      add = lambda a, b: jax.tree.map(jnp.add, a, b)
      return (add(total, grads), batch_stats, add(sums, more)), None

    numbered = (jnp.arange(accumulation), microbatches)
    order = None
    # No loop where none is needed: XLA fuses across what a loop would part.
    if accumulation == 1:
      number, small = jax.tree.map(lambda x: x[0], numbered)
      given = (params, made, state, state.batch_stats, small, key, number)
      if axis and joined == "parts":
        (grads, (batch_stats, sums)), order = joining.observed(gradient, *given)
      else:
        grads, (batch_stats, sums) = gradient(*given)
    else:
      zeros = {name: jnp.zeros(()) for name in ("loss", "weight", "hits", "images")}
      carry = (jax.tree.map(jnp.zeros_like, (params, made)), state.batch_stats, zeros)
      (grads, batch_stats, sums), _ = jax.lax.scan(micro, carry, numbered)

    own_stats = {name: batch_stats[name] for name in trained if name in batch_stats}
    if axis:
      grads, (own_stats, sums) = joining.total(grads, (own_stats, sums), axis, joined, order)
    count = optim.shared(devices)
    own_stats = jax.tree.map(lambda s: s / count, own_stats)
    grads, slope = optim.divided(grads, sums["weight"])
    if not axis or order is not None:
      grads = platforms.dependent(grads, cuda=_laid_out, default=lambda x: x)
    images = jnp.maximum(sums["images"], 1)
    metrics = {
        "loss": sums["loss"] / jnp.maximum(sums["weight"], 1e-8),
        "accuracy": sums["hits"] / images,
        "gradient_norm": optim.norm(grads),
        "parameter_norm": optim.norm(params),
    }
    constants = state.constants
    if common:
      term, own_slope = jax.value_and_grad(common.penalty)(made)
      metrics["loss"] += term
      back, own = pull_finish(jax.tree.map(jnp.add, slope, own_slope))
      (spread,) = pull_part(back)
      grads = {**grads, common.branch: jax.tree.map(jnp.add, own, spread)}
      constants = common.keep(constants, made, age)

    # A GPU's compiler else copies what it overwrites before the norm has read it.
    whole, metrics["parameter_norm"] = platforms.dependent(
      (whole, metrics["parameter_norm"]), cuda=jax.lax.optimization_barrier, default=lambda x: x)
    updates, opt_state = optimizer.update(grads, state.opt_state, whole)
    params = optax.apply_updates(whole, updates)
    average = state.ema
    if ema:
      age = age.astype(jnp.float32)
      decay = jnp.minimum(ema, (1 + age) / (10 + age))
      moved = {name: average[name] for name in trained}
      moved = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, moved, params)
      average = {**average, **moved}
    state = State(
        step=state.step + 1,
        params={**state.params, **params},
        batch_stats={**state.batch_stats, **own_stats},
        constants=constants,
        opt_state=opt_state,
        ema=average,
    )
    return state, metrics

  return local


def with_kernels_together(apply: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
  """apply(variables, …), for a GPU, of a model whose layers cast their float32 kernels to `dtype`.

  Convolutions read theirs as [out, height, width, in]. What each layer casts and turns by itself is
  a kernel of the GPU each; here those of one shape are one. The numbers are the same.
  """

  @jax.custom_vjp
  def read(kernel, one):
    turned = (kernel * one).astype(dtype).transpose(3, 0, 1, 2)
    turned = jax.lax.optimization_barrier(turned.ravel()).reshape(turned.shape)
    return turned.transpose(1, 2, 3, 0).astype(kernel.dtype)

  read.defvjp(lambda *given: (read(*given), None), lambda _, g: (g, jnp.zeros((), g.dtype)))

  def applied(variables, *args, **options):
    one = optim.shared(1)
    params = jax.tree.map(lambda p: read(p, one) if joining.taps(p) else p, variables["params"])
    return apply({**variables, "params": params}, *args, **options)

  return applied


def _laid_out(grads):
  """The same, each kernel's by itself: a GPU's compiler else turns a convolution's gradient as it
  updates the kernel, which then is not done in place, and copies what it has made."""
  one = optim.shared(1)
  hold = lambda g: jax.lax.optimization_barrier(g.ravel()).reshape(g.shape) * one
  return jax.tree.map(lambda g: hold(g) if joining.taps(g) else g, grads)


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    state: State,
    common: Common | None = None,
    **options: Any,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """The jitted, sharded, donating train step: `local_step` on each device of the mesh.

  Args:
    apply, optimizer, common, options: see `local_step`.
    mesh: one data axis.
    state: its shapes; what lies where (`sharding.placed`) is read off their names.

  Returns:
    step(state, batch), the batch split along B.
  """
  # Alone, a device has nothing to join: no vector is made of its gradients and taken apart again.
  axis = sharding.AXIS if mesh.size > 1 else None
  platform = mesh.devices.flat[0].platform
  options = {"joined": joining.way(platform), **options}
  local = local_step(apply, optimizer, devices=mesh.size, axis=axis, common=common, **options)
  where = sharding.placed(state)
  inputs = {name: P(None, sharding.AXIS) for name in ("image", "level", "mask")}
  if common:
    inputs |= common.reads
  mapped = jax.shard_map(
      local, mesh=mesh, in_specs=(where, inputs), out_specs=(where, P()), check_vma=False)
  on_mesh = lambda specs: sharding.on(mesh, specs)
  return jax.jit(
      mapped,
      in_shardings=(on_mesh(where), on_mesh(inputs)),
      out_shardings=(on_mesh(where), sharding.replicated(mesh)),
      donate_argnums=0,
      compiler_options=compiler_options(platform),
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
  return jax.jit(
      mapped,
      in_shardings=(sharding.replicated(mesh), batched),
      out_shardings=batched,
      compiler_options=compiler_options(mesh.devices.flat[0].platform),
  )


def compiler_options(platform: str) -> dict[str, Any]:
  """XLA's options for a step on `platform`, where XLA knows them and XLA_FLAGS names none."""
  options = _OPTIONS.get(platform, {})
  named = any(option in os.environ.get("XLA_FLAGS", "") for option in options)
  return options if options and not named and _known(tuple(options.items())) else {}


@functools.cache
def _known(options: tuple[tuple[str, Any], ...]) -> bool:
  try:
    jax.jit(lambda x: x).lower(0.0).compile(compiler_options=dict(options))
  except jax.errors.JaxRuntimeError:
    return False
  return True
