"""From a config to mesh, model, state and compiled steps: the one place that assembles."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from medattn_jax import bank as banks
from medattn_jax import initial, models, optim, processes, sharding
from medattn_jax.bank import Bank
from medattn_jax.errors import UserError, nearest
from medattn_jax.models import weights
from medattn_jax.step import State, make_eval_step, make_train_step, with_kernels_together

if TYPE_CHECKING:  # any page of attributes will do: steps run where ml_collections is not installed
  import ml_collections

STOPS = ("y_M", "y_A", "y_C", "G", "boxes")


class Experiment:
  """One phase of a config on a mesh. Steps compile at their first call, state is born sharded.

  Attributes:
    config, phase: what was built; `page` is the phase's own part of the config.
    mesh: a sharding.mesh over the devices.
    model: the linen module; `apply` is its own, bound to the phase.
    begins: the run's step at which the phase begins; `ends` the one before which it ends.
    images: of one update, over all devices; both eyes of a pair count.
    bank: of a global attention, where one is at hand; `rows` of its pixel classifier's first layer.
    eval_step: (variables, image) → {"logits", "y_M", …}, see step.make_eval_step.
  """

  def __init__(
      self,
      config: ml_collections.ConfigDict,
      phase: str,
      devices: Sequence[Any] | None,
      bank: Bank | None,
      rows: int,
  ):
    self.config, self.phase, self.page = config, phase, config.phases[phase]
    self.mesh = sharding.mesh(devices)
    platform = self.mesh.devices.flat[0].platform
    self.model = models.build(config, platform, remat=self.page.remat)
    self.common = models.common(config, phase)
    self.bank, self.rows = bank, rows
    table = models.PHASES[config.model.name]
    self.trained = models.trained(config, phase)
    order = phases(config)
    before = order[: order.index(phase)]
    self.begins = sum(config.phases[name].steps for name in before)
    self.ends = self.begins + self.page.steps
    each = models.IMAGES[config.model.name]
    self.images = each * config.data.batch_size * self.page.accumulation
    earlier = {b for name in before if config.phases[name].steps for b in table[name]}
    self.optimizer = optim.build(self.page, earlier)
    if self.common:
      own = {self.common.branch: config.attention.learning_rate}
      self.optimizer = optim.apart(self.optimizer, own)
    self.apply = functools.partial(self.model.apply, phase=phase)
    if platform == "gpu":
      self.apply = with_kernels_together(self.apply, self.model.dtype)
    self.eval_step = make_eval_step(self.apply, self.mesh, STOPS)

  @functools.cached_property
  def train_step(self) -> Callable[[State, Any], tuple[State, dict[str, jax.Array]]]:
    """(state, batch) → (state, metrics), see step.make_train_step."""
    return make_train_step(
        self.apply, self.optimizer, self.mesh, state=self._abstract, **self.step_options)

  @functools.cached_property
  def learning_rates(self) -> np.ndarray:
    """Of each step of the phase, float32 [steps]."""
    return optim.rates(self.page)

  @property
  def step_options(self) -> dict[str, Any]:
    """What step.local_step is to know besides model, optimiser and devices."""
    return {
        "seed": self.config.seed,
        "trained": self.trained,
        "answers": models.graded(self.config, self.phase),
        "loss": self.config.loss.to_dict(),
        "augmentation": self.config.augment.to_dict(),
        "ema": self.page.ema,
        "begins": self.begins,
        "common": self.common,
    }

  def initial(self) -> State:
    """The state at step 0 of the run, at the mesh; abstract on a compile-only topology.

    Raises UserError for weights to begin from (model.init_from) that are not what they should be.
    """
    if self._compile_only:
      return self._abstract
    values = initial.evaluate(self._traced, jax.random.key(self.config.seed))
    drawn = {"params": values.params, "batch_stats": values.batch_stats}
    begun = weights.begin(self.config, drawn)
    ema = None if values.ema is None else jax.tree.map(np.copy, begun["params"])
    values = values.replace(ema=ema, **begun)
    return sharding.place(values, jax.tree.map(lambda x: x.sharding, self._abstract))

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

    def ready(params, batch_stats, constants, step):
      before = {"params": params, "batch_stats": batch_stats, "constants": constants}
      begun = models.hand_on(self.config, self.phase, before)
      return self._phase_state(step, begun["params"], begun["batch_stats"], begun["constants"])

    params = state.params if state.ema is None else state.ema
    where = jax.tree.map(lambda x: x.sharding, self._abstract)
    return jax.jit(ready, out_shardings=where)(
        params, state.batch_stats, state.constants, state.step)

  def variables(self, state: State) -> dict[str, Any]:
    """What to answer with: {"params", "batch_stats"}, and "constants" where the model has any.

    The averaged params where the phase keeps them; without what serves training alone.
    """
    return answering(
        {name: getattr(state, name) for name in ("params", "ema", "batch_stats", "constants")})

  def put_train(self, batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, jax.Array]:
    """One update's small batches of a host, stacked and on the mesh."""
    joined = np.stack if len(batches) > 1 else lambda arrays: arrays[0][None]  # no copy of one
    stacked = {k: joined([b[k] for b in batches]) for k in ("image", "level", "mask")}
    batch = sharding.put(stacked, sharding.batched(self.mesh, axis=1))
    if self.mesh.devices.flat[0].platform == "cpu":
      jax.block_until_ready(batch)  # for the step to run in this thread (heap.py)
    return batch | self._shared_inputs(self.bank)

  def _shared_inputs(self, bank: Bank | None) -> dict[str, Any]:
    reads = self.common.reads if self.common else ()
    return {"bank": bank.arrays} if "bank" in reads else {}

  def put_eval(self, batch: Mapping[str, np.ndarray]) -> jax.Array:
    """A host batch's images on the mesh; the number of patients must divide over the devices."""
    return sharding.put({"image": batch["image"]}, sharding.batched(self.mesh))["image"]

  def lower_train_step(self) -> jax.stages.Lowered:
    """The train step lowered for this mesh, nothing allocated: read its compiled program."""
    each, *image = models.image_shape(self.config)
    images = (self.page.accumulation, self.config.data.batch_size, each)
    split = sharding.batched(self.mesh, axis=1)
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=split)
    batch = {
        "image": shape((*images, *image), jnp.uint8),
        "level": shape(images, jnp.int32),
        "mask": shape(images, jnp.float32),
    }
    source = self.config.attention.source if self.common else ""
    shapes = banks.abstract(source, self.rows, image[0], image[2], self.mesh)
    return self.train_step.lower(self._abstract, batch | self._shared_inputs(shapes))

  def lower_eval_step(self) -> jax.stages.Lowered:
    """The eval step lowered for this mesh and a batch of the config's evaluation."""
    image = (self.config.evaluation.batch_size, *models.image_shape(self.config))
    image = (math.ceil(image[0] / self.mesh.size) * self.mesh.size, *image[1:])
    batch = jax.ShapeDtypeStruct(image, jnp.uint8, sharding=sharding.batched(self.mesh))
    return self.eval_step.lower(self.variables(self._abstract), batch)

  @property
  def _compile_only(self) -> bool:
    device = self.mesh.devices.flat[0]
    try:
      return device not in jax.devices(device.platform)
    except RuntimeError:  # no such platform on this host
      return True

  @functools.cached_property
  def _abstract(self) -> State:
    shapes = self._traced.out_info
    where = sharding.on(self.mesh, sharding.placed(shapes))
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(put, shapes, where)

  @functools.cached_property
  def _traced(self) -> jax.stages.Traced:
    key = jax.eval_shape(lambda: jax.random.key(0))  # the shape of one: no device is needed
    return jax.jit(self._init).trace(key)

  def _init(self, key: jax.Array) -> State:
    image = jnp.zeros((1, *models.image_shape(self.config)), jnp.uint8)
    last = phases(self.config)[-1]
    variables = self.model.init(key, image, phase=last, train=False)
    own = models.draw_classifier(self.config, jax.random.fold_in(key, 1), self.rows)
    return self._phase_state(
        jnp.zeros((), jnp.int32),
        {**variables["params"], **own},
        variables.get("batch_stats", {}),
        variables.get("constants", {}),
    )

  def _phase_state(self, step, params, batch_stats, constants) -> State:
    trained = {name: params[name] for name in self.trained}
    ema = jax.tree.map(jnp.copy, params) if self.page.ema else None
    return State(step, params, batch_stats, constants, self.optimizer.init(trained), ema)


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


def bank_rows(config: ml_collections.ConfigDict, images: int) -> int:
  """Rows of the pixel classifier's first layer, with `images` in the training split; 0 for none."""
  if config.model.name != "global_attention":
    return 0
  source = config.attention.source
  images = int(source.partition(":")[2] or images)
  return banks.rows_of(
      source, images, config.data.channels, config.model.num_classes, config.data.batch_size)


def layout(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What the pipeline is to know of the model: pairs of eyes or single images, of what channels."""
  each, *_, channels = models.image_shape(config)
  return {"pairs": each > 1, "channels": channels}


def frame(config: ml_collections.ConfigDict) -> str:
  """How photographs come into the model's frame: "cropped" one by one, or "whole", aligned."""
  return config.data.frame if config.model.name == "global_attention" else "cropped"


def answering(tree: Mapping[str, Any]) -> dict[str, Any]:
  """The variables to answer with, of a state's fields by name (params, ema, batch_stats, …)."""
  params = tree["params"] if tree.get("ema") is None else tree["ema"]
  kept = {name: own for name, own in params.items() if name not in models.TRAINING_ONLY}
  found = {"params": kept, "batch_stats": tree.get("batch_stats") or {}}
  return found | ({"constants": tree["constants"]} if tree.get("constants") else {})


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
  sizes = {"backbone": "data.image_size", "crop_backbone": "model.crop_size"}
  for key, size in sizes.items():
    if key not in config.model:
      continue
    if config.model[key] not in models.BACKBONES:
      raise UserError(
          f"model.{key} = {config.model[key]!r}"
          f"{nearest(config.model[key], list(models.BACKBONES))}; "
          f"accepted: {', '.join(models.BACKBONES)}"
      )
    small = name == "global_attention" and config.model.stem == "small"
    least = 16 if small else models.SMALLEST.get(config.model[key], 1)
    group, _, member = size.partition(".")
    if config[group][member] < least:
      raise UserError(
          f"{size} = {config[group][member]}: too small for model.{key} = {config.model[key]}; "
          f"accepted: at least {least}"
      )
  if name == "global_attention":
    _check_attention(config)
  elif name == "zoom_in_net" and config.model.crop_init == "m_net":
    trunk, crop = config.model.backbone, config.model.crop_backbone
    if not models.of_one_kind(trunk, crop):
      raise UserError(
          f"model.crop_init = m_net: model.backbone = {trunk} and model.crop_backbone = {crop} "
          "have no layers in common; accepted: random, or backbones of one kind"
      )
  if set(config.phases) != set(known[name]):
    raise UserError(
        f"phases has {', '.join(config.phases)}; accepted for model.name = {name}: "
        f"{', '.join(known[name])}"
    )
  if devices is None:
    return
  batch, group = config.data.batch_size, config.norm.group_size
  each = models.image_shape(config)[0]
  what = "patients" if each > 1 else "images"
  if batch % devices:
    raise UserError(
        f"data.batch_size = {batch} {what} does not divide over {devices} devices; "
        f"accepted: a multiple of {devices}"
    )
  if each * batch // devices % group:
    raise UserError(
        f"norm.group_size = {group} does not divide a device's {each * batch // devices} images "
        f"(data.batch_size = {batch} {what} over {devices} devices); accepted: a divisor of it"
    )


def check_host(config: ml_collections.ConfigDict) -> None:
  """Raises UserError unless this host, which is to train, has room for an update's photographs.

  Whoever asks for more than there is would be killed wordlessly.
  """
  batch = config.data.batch_size
  small = math.prod(models.image_shape(config)) * batch // jax.process_count()
  for phase in phases(config):
    update = small * config.phases[phase].accumulation
    if update > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
      raise UserError(
          f"data.batch_size = {batch}, data.full_size = {config.data.full_size} and phases.{phase}."
          f"accumulation = {config.phases[phase].accumulation}: the photographs of one update take "
          f"{update >> 30} GiB, this host has {memory >> 30}; accepted: smaller ones"
      )


def _check_attention(config: ml_collections.ConfigDict) -> None:
  model, data = config.model, config.data
  plain = config.attention.source == "none" and model.stem == "full" and model.width == 1
  if model.backbone not in models.attending() and not plain:
    raise UserError(
        f"model.backbone = {model.backbone}: has no named stages, stems and widths; accepted for "
        f"model.name = global_attention: {', '.join(models.attending())}; any backbone with "
        "attention.source = none, model.stem = full and model.width = 1"
    )
  stages = models.attending().get(model.backbone, ())
  if model.attend != "input" and model.attend not in stages:
    raise UserError(
        f"model.attend = {model.attend!r}; accepted for {model.backbone}: "
        f"{', '.join(('input', *stages))}"
    )
  if data.image_size != data.full_size:
    raise UserError(
        f"data.image_size = {data.image_size}, data.full_size = {data.full_size}: the map weighs "
        "the images as they are stored; accepted: the same number"
    )
  joint = config.phases.get("joint")
  if config.attention.source == "batch" and joint is not None and joint.accumulation != 1:
    raise UserError(
        f"phases.joint.accumulation = {joint.accumulation} with attention.source = batch: the "
        "pixel's features are one batch's; accepted: 1"
    )


def build(
    config: ml_collections.ConfigDict,
    phase: str | None = None,
    devices: Sequence[Any] | None = None,
    bank: Bank | None = None,
    images: int | None = None,
) -> Experiment:
  """Builds one phase of `config` (the last by default) on `devices` (all by default).

  The devices may be those of a compile-only topology: then nothing is allocated and `state` is
  abstract. A global attention whose source is a bank trains with the `bank` given (see bank.fill);
  a phase without one has its shapes all the same: those of a training split of so many `images`
  (by default data.synthetic.train).
  """
  check(config)
  order = phases(config)
  if phase is not None and phase not in order:
    raise UserError(f"phase {phase!r}; accepted for {config.model.name}: {', '.join(order)}")
  rows = bank.rows if bank else bank_rows(
      config, config.data.synthetic.train if images is None else images)
  return Experiment(config, phase or order[-1], devices, bank, rows)


def predictions(
    experiment: Experiment,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    wanted: Sequence[str] = ("logits", *STOPS),
    step: Callable[..., dict[str, jax.Array]] | None = None,
) -> Iterator[tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]]:
  """Yields (batch, the answers that are wanted), padded rows included.

  Both are over all processes' patients, in the order of one process alone; the images stay where
  they are. A batch is padded here to a multiple of the devices and cut again. The next batch is
  dispatched before the last one's answers are read, so the devices do not wait for the host.

  `step`: another of step.make_eval_step than the experiment's own.
  """
  step = step or experiment.eval_step
  local = len(experiment.mesh.local_devices)
  waiting = None
  for batch in batches:
    rows = len(batch["image"])
    image = batch["image"]
    if rows % local:
      image = np.concatenate([image, np.zeros_like(image[:1]).repeat(-rows % local, axis=0)])
    answers = step(variables, experiment.put_eval({"image": image}))
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
