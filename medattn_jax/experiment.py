"""From a config to mesh, model, state and compiled steps: the one place that assembles."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from medattn_jax import initial, models, optim, processes, sharding
from medattn_jax.errors import UserError, nearest
from medattn_jax.step import State, make_eval_step, make_train_step

STOPS = ("y_M", "y_A", "y_C", "G", "boxes")


class Experiment:
  """One phase of a config on a mesh. Steps compile at their first call, state is born sharded.

  Attributes:
    config, phase: what was built; `page` is the phase's own part of the config.
    mesh: a sharding.mesh over the devices.
    model: the linen module.
    begins: the run's step at which the phase begins; `ends` the one before which it ends.
    train_step: (state, batch) → (state, metrics), see step.make_train_step.
    eval_step: (variables, image) → {"logits", "y_M", …}, see step.make_eval_step.
  """

  def __init__(self, config: ml_collections.ConfigDict, phase: str, devices: Sequence[Any] | None):
    self.config, self.phase, self.page = config, phase, config.phases[phase]
    self.mesh = sharding.mesh(devices)
    self.model = models.build(config)
    table = models.PHASES[config.model.name]
    self.trained = table[phase]
    order = phases(config)
    before = order[: order.index(phase)]
    self.begins = sum(config.phases[name].steps for name in before)
    self.ends = self.begins + self.page.steps
    earlier = {b for name in before if config.phases[name].steps for b in table[name]}
    self.optimizer = optim.build(self.page, earlier)
    self.learning_rate = optim.schedule(self.page)
    apply = functools.partial(self.model.apply, phase=phase)
    self.train_step = make_train_step(
        apply,
        self.optimizer,
        self.mesh,
        seed=config.seed,
        trained=self.trained,
        answers=models.GRADED[config.model.name][phase],
        loss=config.loss.to_dict(),
        augmentation=config.augment.to_dict(),
        ema=self.page.ema,
        begins=self.begins,
    )
    self.eval_step = make_eval_step(apply, self.mesh, STOPS)

  def initial(self) -> State:
    """The state at step 0 of the run, at the mesh; abstract on a compile-only topology."""
    if self._compile_only:
      return self._abstract
    values = initial.evaluate(self._traced, jax.random.key(self.config.seed))
    return sharding.everywhere(values, self.mesh)

  @functools.cached_property
  def state(self) -> State:
    """The initial state; made when first asked for."""
    return self.initial()

  @property
  def abstract_state(self) -> State:
    """The state's shapes, dtypes and shardings: what a checkpoint is restored into."""
    return self._abstract

  def enter(self, state: State) -> State:
    """The state of the phase before, made ready for this one: a new optimiser state and average.

    A phase that ended with an average hands on the averaged params.
    """

    def ready(params, batch_stats, step):
      before = {"params": params, "batch_stats": batch_stats}
      begun = models.hand_on(self.config, self.phase, before)
      return self._phase_state(step, begun["params"], begun["batch_stats"])

    params = state.params if state.ema is None else state.ema
    enter = jax.jit(ready, out_shardings=sharding.replicated(self.mesh))
    return enter(params, state.batch_stats, state.step)

  def variables(self, state: State) -> dict[str, Any]:
    """{"params", "batch_stats"} to answer with: the averaged params where the phase keeps them."""
    params = state.params if state.ema is None else state.ema
    return {"params": params, "batch_stats": state.batch_stats}

  def put_train(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, jax.Array]:
    """One update's small batches of a host, stacked and on the mesh."""
    stacked = {k: np.stack([b[k] for b in batches]) for k in ("image", "level", "mask")}
    return sharding.put(stacked, sharding.batched(self.mesh, axis=1))

  def put_eval(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
    """A host batch's images on the mesh; the number of patients must divide over the devices."""
    return sharding.put({"image": batch["image"]}, sharding.batched(self.mesh))["image"]

  def lower_train_step(self) -> jax.stages.Lowered:
    """The train step lowered for this mesh, nothing allocated: read its compiled program."""
    data, eyes = self.config.data, (self.page.accumulation, self.config.data.batch_size, 2)
    split = sharding.batched(self.mesh, axis=1)
    batch = {
        "image": jax.ShapeDtypeStruct((*eyes, data.full_size, data.full_size, 3), jnp.uint8),
        "level": jax.ShapeDtypeStruct(eyes, jnp.int32),
        "mask": jax.ShapeDtypeStruct(eyes, jnp.float32),
    }
    batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=split) for k, v in batch.items()}
    return self.train_step.lower(self._abstract, batch)

  @property
  def _compile_only(self) -> bool:
    device = self.mesh.devices.flat[0]
    try:
      return device not in jax.devices(device.platform)
    except RuntimeError:  # no such platform on this host
      return True

  @functools.cached_property
  def _abstract(self) -> State:
    put, shapes = sharding.replicated(self.mesh), self._traced.out_info
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), shapes)

  @functools.cached_property
  def _traced(self) -> jax.stages.Traced:
    key = jax.eval_shape(lambda: jax.random.key(0))  # the shape of one: no device is needed
    return jax.jit(self._init).trace(key)

  def _init(self, key: jax.Array) -> State:
    size = self.config.data.full_size
    image = jnp.zeros((1, 2, size, size, 3), jnp.uint8)
    last = phases(self.config)[-1]
    variables = self.model.init(key, image, phase=last, train=False)
    return self._phase_state(
        jnp.zeros((), jnp.int32), variables["params"], variables.get("batch_stats", {})
    )

  def _phase_state(self, step, params, batch_stats) -> State:
    trained = {name: params[name] for name in self.trained}
    ema = jax.tree.map(jnp.copy, params) if self.page.ema else None
    return State(step, params, batch_stats, self.optimizer.init(trained), ema)


def phases(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The run's phases in order: the model's own order, whatever the page's."""
  return tuple(models.PHASES[config.model.name])


def phase_at(config: ml_collections.ConfigDict, step: int) -> str:
  """The phase that step number `step` (from 0) belongs to; the last one at the run's end."""
  ends = 0
  for name in phases(config):
    ends += config.phases[name].steps
    if step < ends:
      return name
  return phases(config)[-1]


def total_steps(config: ml_collections.ConfigDict) -> int:
  return sum(config.phases[name].steps for name in phases(config))


def check(config: ml_collections.ConfigDict, devices: int | None = None) -> None:
  """Raises UserError unless model, backbones and phases are known and the batch divides.

  `devices`: over how many the training batch is to be split; None where none is trained.
  """
  known = models.PHASES
  name = config.model.name
  if name not in known:
    raise UserError(
        f"model.name = {name!r}{nearest(name, list(known))}; accepted: {', '.join(known)}"
    )
  for key in ("backbone", "crop_backbone"):
    if config.model[key] not in models.BACKBONES:
      raise UserError(
          f"model.{key} = {config.model[key]!r}"
          f"{nearest(config.model[key], list(models.BACKBONES))}; "
          f"accepted: {', '.join(models.BACKBONES)}"
      )
  for key, size in (("backbone", "data.image_size"), ("crop_backbone", "model.crop_size")):
    least = models.SMALLEST.get(config.model[key], 1)
    group, _, member = size.partition(".")
    if config[group][member] < least:
      raise UserError(
          f"{size} = {config[group][member]}: too small for model.{key} = {config.model[key]}; "
          f"accepted: at least {least}"
      )
  trunk, crop = config.model.backbone, config.model.crop_backbone
  begins_alike = name == "zoom_in_net" and config.model.crop_init == "m_net"
  if begins_alike and not models.of_one_kind(trunk, crop):
    raise UserError(
        f"model.crop_init = m_net: model.backbone = {trunk} and model.crop_backbone = {crop} have "
        "no layers in common; accepted: random, or backbones of one kind"
    )
  if set(config.phases) != set(known[name]):
    raise UserError(
        f"phases has {', '.join(config.phases)}; accepted for model.name = {name}: "
        f"{', '.join(known[name])}"
    )
  if devices is None:
    return
  batch, group = config.data.batch_size, config.norm.group_size
  if batch % devices:
    raise UserError(
        f"data.batch_size = {batch} patients does not divide over {devices} devices; "
        f"accepted: a multiple of {devices}"
    )
  if 2 * batch // devices % group:
    raise UserError(
        f"norm.group_size = {group} does not divide a device's {2 * batch // devices} images "
        f"(data.batch_size = {batch} patients over {devices} devices); accepted: a divisor of it"
    )
  # Two updates are uploaded ahead; whoever asks for more than there is would be killed wordlessly.
  small = 6 * config.data.full_size**2 * batch // jax.process_count()
  for phase in phases(config):
    update = small * config.phases[phase].accumulation
    if update > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
      raise UserError(
          f"data.batch_size = {batch}, data.full_size = {config.data.full_size} and phases.{phase}."
          f"accumulation = {config.phases[phase].accumulation}: the photographs of one update take "
          f"{update >> 30} GiB, this host has {memory >> 30}; accepted: smaller ones"
      )


def build(
    config: ml_collections.ConfigDict,
    phase: str | None = None,
    devices: Sequence[Any] | None = None,
) -> Experiment:
  """Builds one phase of `config` (the last by default) on `devices` (all by default).

  The devices may be those of a compile-only topology: then nothing is allocated and `state` is
  abstract.
  """
  check(config)
  order = phases(config)
  if phase is not None and phase not in order:
    raise UserError(f"phase {phase!r}; accepted for {config.model.name}: {', '.join(order)}")
  return Experiment(config, phase or order[-1], devices)


def predictions(
    experiment: Experiment,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    wanted: Sequence[str] = ("logits", *STOPS),
) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]]:
  """Yields (batch, the answers that are wanted), padded rows included.

  Both are over all processes' patients, in the order of one process alone; the images stay where
  they are. A batch is padded here to a multiple of the devices and cut again. The next batch is
  dispatched before the last one's answers are read, so the devices do not wait for the host.
  """
  local = len(experiment.mesh.local_devices)
  waiting = None
  for batch in batches:
    rows = len(batch["image"])
    image = batch["image"]
    if rows % local:
      image = np.concatenate([image, np.zeros_like(image[:1]).repeat(-rows % local, axis=0)])
    answers = experiment.eval_step(variables, experiment.put_eval({"image": image}))
    if waiting is not None:
      yield _collect(*waiting)
    answers = {name: answers[name] for name in wanted if name in answers}
    waiting = (batch, answers, rows)
  if waiting is not None:
    yield _collect(*waiting)


def _collect(batch, answers, rows):
  answers = {k: sharding.local_rows(v)[:rows] for k, v in answers.items()}
  if jax.process_count() == 1:
    return batch, answers
  small = {k: v for k, v in batch.items() if k != "image"}
  joined = processes.gather_rows({**small, **{f"answer {k}": v for k, v in answers.items()}})
  return {k: joined[k] for k in small}, {k: joined[f"answer {k}"] for k in answers}
