"""The training loop: WHEN things happen. How they happen is step.py's and experiment.py's.

All phases run in one workdir. A run is resumed from its newest intact checkpoint and ends
bit-equal to one that was never stopped, on the same devices.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import ml_collections

from medattn_jax import (
  compilation_cache,
  console,
  continuation,
  evaluate,
  experiment,
  fill_bank,
  heap,
  models,
  processes,
  sharding,
)
from medattn_jax import config as pages
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.compiling import Compiling
from medattn_jax.data import datasets
from medattn_jax.errors import UserError
from medattn_jax.experiment import Experiment
from medattn_jax.models import weights
from medattn_jax.signals import Signals, Stopped
from medattn_jax.step import State
from medattn_jax.workdir import MetricsLog, Workdir

if TYPE_CHECKING:
  from medattn_jax.data.stored import DataSet


class Run(NamedTuple):
  """What the loop works with, opened once."""

  config: ml_collections.ConfigDict
  directory: Workdir
  dataset: DataSet
  checkpoints: Checkpoints
  log: Log
  signals: Signals
  compiling: Compiling
  ahead: Experiment | None  # see begin_compiling


def run(config: ml_collections.ConfigDict, path: str) -> None:
  """Trains or resumes all phases of `config` in the workdir `path`, then evaluates.

  Raises:
    UserError: the workdir holds another run, another training works there, the batch does not
      divide over the devices, the loss is not finite, the disk is full.
    Stopped: by a signal, after a checkpoint at the current step.
  """
  heap.run_in_caller()
  sharding.devices()
  experiment.check(config, jax.device_count())
  experiment.check_host(config)
  if not experiment.total_steps(config):
    raise UserError("phases: steps is 0 in every phase; accepted: at least one step to train")
  asked = pages.flatten(pages.to_dict(config))
  del asked["data.dir"]  # each machine may have its own
  processes.same("config", asked)
  with Signals() as signals, contextlib.ExitStack() as stack:
    directory = Workdir(path)
    if jax.process_index() == 0:  # for all processes of the run
      stack.enter_context(directory.lock())
    processes.meet()
    checkpoints = Checkpoints(directory.checkpoints, keep=config.checkpoint.keep)
    continuation.refuse_strangers(directory, config, checkpoints)
    if not checkpoints.any():
      processes.same("weights to begin from", weights.check(config))
    kept = directory.path / compilation_cache.NAME
    if jax.process_index() == 0:
      compilation_cache.drop_damaged(kept)
    processes.meet()  # before others read there
    compilation_cache.use(kept)
    compiling = stack.enter_context(Compiling())
    ahead = begin_compiling(config, checkpoints, compiling)
    dataset = evaluate.open_data(config, None)
    graded = check_splits(dataset, config.model.num_classes)
    fill_bank.check(config, dataset)
    evaluate.check_same(dataset)
    log = stack.enter_context(Log(directory.path, config))
    work = Run(config, directory, dataset, checkpoints, log, signals, compiling, ahead)
    try:
      begun = resume(work)
      processes.meet()  # all have looked before it changes
      if jax.process_index() == 0:  # not before all that may refuse a run
        directory.write_config(pages.to_dict(config))
      train(work, *begun)
    except Stopped:
      checkpoints.wait(together=False)  # between two phases the last one's may be under way
      raise
    checkpoints.wait()
    if graded:
      evaluate.run(path, step="best", once=True)
    if log.lines and log.rates:
      print(log.rates_in_words())


def begin_compiling(
    config: ml_collections.ConfigDict, checkpoints: Checkpoints, compiling: Compiling
) -> Experiment | None:
  """The phase that a run goes on with, its step traced and being compiled.

  Meanwhile TensorFlow is imported, the data set opened and the state restored. None where nothing
  is left to train; where a map is learnt, as the state then depends on the data set; on GPUs,
  where XLA times kernels, which what is restored would mislead; and for a first start: that may be
  refused still, and is then to leave nothing behind.

  Raises UserError where there is no such data set.
  """
  datasets.located(config.data.name, config.data.dir)
  done = checkpoints.newest_meta()
  if not done or done["step"] >= experiment.total_steps(config):
    return None
  learns_map = any(models.common(config, phase) for phase in experiment.phases(config))
  if learns_map or jax.default_backend() == "gpu":
    return None
  now = experiment.build(config, experiment.phase_at(config, done["step"]))
  compiling.begin(now)
  return now


def train(work: Run, now: Experiment, state: State) -> State:
  """Runs what is left of the phases from `state` on."""
  order = experiment.phases(work.config)
  later = [build(work, phase) for phase in order[order.index(now.phase) + 1 :]]
  if jax.default_backend() != "gpu":  # there XLA times kernels, which steps beside it would mislead
    work.compiling.ask(*(each for each in [now, *later] if int(state.step) < each.ends))
  for each in [now, *later]:
    if each is not now:
      state = each.enter(state)
    if int(state.step) < each.ends:
      state = run_phase(work, each, state)
  return state


def run_phase(work: Run, now: Experiment, state: State) -> State:
  """Steps to the end of the phase; checkpoints and validates when due."""
  every, step, alone = work.config, int(state.step), jax.process_count() == 1
  updates = sharding.prefetch(host_batches(work, now, step), now.put_train)
  work.compiling.ask(now)
  updates = itertools.chain([next(updates)], updates)  # the pipeline warms up while XLA works
  compiled, seconds = work.compiling.step(now)
  console.say(f"phase {now.phase}: step compiled in {seconds:.1f} s")
  processes.meet()  # who ended while compiling is missed here and not within a step
  work.log.begin(now, step)
  while step < now.ends:
    work.signals.waits = True
    state, metrics = compiled(state, next(updates))
    step += 1
    validates = step % every.evaluation.every == 0 or step == now.ends
    stops = asked_to_stop(work) if step % every.logging.every == 0 or alone else 0
    saves = validates or stops or step % every.checkpoint.every == 0
    work.log.step(step, metrics, read_now=saves)  # else read one step late: dispatch never waits
    if map_is_due(now, step) and jax.process_index() == 0:
      work.directory.keep_map(step, state.constants["map"])
    if saves:
      save(work, now, state, step, validates and not stops)
    if stops:
      work.checkpoints.wait()
      raise Stopped(stops)
  work.signals.waits = False
  if stops := asked_to_stop(work):  # one that came while the last step was saved
    raise Stopped(stops)
  return state


def save(
    work: Run, now: Experiment, state: State, step: int, validates: bool, replace: bool = False
) -> None:
  """Validates when asked to, and writes the checkpoint; stopped while validating, it still is."""
  meta = {
      "step": step,
      "phase": now.phase,
      "phase_index": experiment.phases(work.config).index(now.phase),
      "config": pages.to_dict(work.config),
      "validated": False,
      "kappa": None,
      "thresholds": None,
      "bank": now.bank.checksum if now.bank else None,
  }
  score = None
  try:
    if validates:
      found = validate(work, now, state, step)
      meta |= {"validated": True} | {k: found.get(k) for k in ("kappa", "thresholds")}
      score = found.get("score")
  except Stopped:
    work.checkpoints.save(step, as_tree(state), meta)  # where it is there already, it stays
    work.checkpoints.wait()
    raise
  work.checkpoints.save(step, as_tree(state), meta, score=score, replace=replace)


def validate(work: Run, now: Experiment, state: State, step: int) -> dict[str, Any]:
  """Figures of the validation split, logged; empty where there is no such split."""
  if "validation" not in work.dataset.splits:
    return {}

  def between() -> None:
    if number := asked_to_stop(work):
      raise Stopped(number)

  # Nothing is lost here: a signal ends it at once, or between two batches on all processes.
  work.signals.waits = jax.process_count() > 1
  between()
  found = evaluate.validate(now, now.variables(state), work.dataset, work.config, between)
  work.signals.waits = True
  work.log.validation(step, found)
  return found


def resume(work: Run) -> tuple[Experiment, State]:
  """The newest intact checkpoint's phase and state, or the beginning."""

  def restore(step):
    meta = work.checkpoints.meta(step)
    now = build(work, meta["phase"])
    tree, meta = work.checkpoints.restore(step, as_tree(now.abstract_state))
    if now.bank and meta["bank"] != now.bank.checksum:
      raise UserError(
          f"data set {work.dataset.name}: its training images are not those that the run in "
          f"{work.directory.path} began with (attention.source = {work.config.attention.source}); "
          "accepted: the same images in the same order, or another --workdir"
      )
    return now, State(**tree), meta

  found = work.checkpoints.newest_intact(restore)
  if found is None:
    now = build(work, experiment.phase_at(work.config, 0))
    work.compiling.ask(now)
    truncate_after(work, 0)
    return now, now.initial()
  now, state, meta = found
  step = int(state.step)
  due = step == now.ends or step % work.config.evaluation.every == 0
  again = due and not meta["validated"]  # it was stopped while validating
  truncate_after(work, step, validated=not again)
  if step < experiment.total_steps(work.config):
    console.say(f"resuming at step {step} of phase {now.phase}")
  else:
    console.say(f"all {step} steps are done: nothing to train")
  if again:
    work.log.begin(now, step)
    save(work, now, state, step, validates=True, replace=True)
    work.signals.waits = False
    work.signals.check()
  return now, state


def check_splits(dataset: DataSet, num_classes: int) -> bool:
  """Whether there is a split to evaluate at the end; said where there is none.

  Raises UserError where there is none to train on, or levels that the model cannot answer.
  """
  if "train" not in dataset.splits:
    raise UserError(
        f"data set {dataset.name} in {dataset.folder} has no split train, only "
        f"{', '.join(dataset.splits)}; accepted: a set to train on"
    )
  datasets.check_levels(dataset, dataset.splits, num_classes)
  graded = not {"test", "validation"}.isdisjoint(dataset.splits)
  if not graded:
    console.warn(
        f"data set {dataset.name} has neither a test nor a validation split: nothing is evaluated"
    )
  return graded


def host_batches(work: Run, now: Experiment, step: int) -> Iterator[list[dict]]:
  """The small batches of each update from `step` on, in the run's one order over all phases."""
  from medattn_jax.data import pipeline  # imports TensorFlow

  accumulation = now.page.accumulation
  done = sum(
      work.config.phases[name].steps * work.config.phases[name].accumulation
      for name in itertools.takewhile(lambda n: n != now.phase, experiment.phases(work.config))
  )
  data = work.config.data
  batches = pipeline.train_batches(
      work.dataset,
      "train",
      batch_size=data.batch_size,
      full_size=data.full_size,
      seed=work.config.seed,
      start_step=done + (step - now.begins) * accumulation,
      balanced=data.balanced,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      **experiment.layout(work.config),
  )
  while True:
    yield list(itertools.islice(batches, accumulation))


def asked_to_stop(work: Run) -> int:
  """The signal that has come to any process, or 0; all must ask, to stop at the same step."""
  return max(processes.gather(work.signals.number))


def build(work: Run, phase: str) -> Experiment:
  """The phase's experiment, with the bank that it trains with."""
  if work.ahead and work.ahead.phase == phase:
    return work.ahead
  bank = fill_bank.of_phase(work.config, phase, work.dataset)
  images = len(work.dataset.photo_levels("train"))
  return experiment.build(work.config, phase, bank=bank, images=images)


def map_is_due(now: Experiment, step: int) -> bool:
  """Whether the map of a global attention is kept after this step, for its evolution."""
  if not now.common or not now.config.attention.kept:
    return False
  every = max(1, now.page.steps // now.config.attention.kept)
  return (step - now.begins) % every == 0 or step in (now.begins + 1, now.ends)


def truncate_after(work: Run, step: int, validated: bool = True) -> None:
  """What was written of steps after `step`, or of its validation, goes: it is done again."""
  work.log.truncate_after(step, validated)
  if jax.process_index() == 0:
    work.directory.truncate_maps(step)


def as_tree(state: State) -> dict[str, Any]:
  return {name: getattr(state, name) for name in State.__dataclass_fields__}


class Log:
  """metrics.jsonl, TensorBoard events and the live line; watches that the loss is finite."""

  def __init__(self, path: pathlib.Path, config: ml_collections.ConfigDict):
    self.config, self.folder = config, path / "tensorboard"
    self.lines = MetricsLog(path / "metrics.jsonl") if jax.process_index() == 0 else None
    self.live = console.Live()
    self.late = self.events = None
    self.rates: dict[str, list[float]] = {}  # images a second, of each phase that ran

  def __enter__(self) -> Log:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    self.live.close()
    if self.lines:
      self.lines.close()
      # What ended the run already is told, not what follows from it.
      with contextlib.suppress(*[UserError] if kind else []), self.plain_errors():
        if self.events:
          self.events.close()

  @contextlib.contextmanager
  def plain_errors(self) -> Iterator[None]:
    """Turns TensorFlow's errors, of a full disk for one, into a UserError of one line."""
    try:
      yield
    except Exception as error:
      why = " ".join(str(error).split("}} ")[-1].split())[:200]
      raise UserError(f"{self.folder}: events cannot be written: {why}") from error

  def truncate_after(self, step: int, validated: bool) -> None:
    if self.lines:
      self.lines.truncate_after(step, validated)

  def begin(self, now: Experiment, step: int) -> None:
    if self.lines and not self.events:
      from clu import metric_writers  # imports TensorFlow

      with self.plain_errors():
        self.events = metric_writers.SummaryWriter(str(self.folder))
    self.now, self.late = now, None
    self.since, self.since_step = time.monotonic(), step

  def step(self, step: int, metrics: dict[str, jax.Array], *, read_now: bool) -> None:
    """Reads the step before this one; with `read_now` this one too."""
    if self.late:
      self._read(*self.late)
    self.late = (step, metrics)
    if read_now:
      self._read(*self.late)
      self.late = None

  def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
    values = {name: float(value) for name, value in metrics.items()}
    if not all(map(math.isfinite, values.values())):
      raise UserError(
          f"loss {values['loss']}, norm of the parameters {values['parameter_norm']} at step "
          f"{step} of phase {self.now.phase}: accepted: finite ones. Lower phases.{self.now.phase}."
          "learning_rate, or set its clip_norm, and begin in a new --workdir"
      )
    if step % self.config.logging.every and step != self.now.ends:
      return
    now, images = time.monotonic(), self.now.images
    rate = images * (step - self.since_step) / (now - self.since)
    self.since, self.since_step = now, step
    values["learning_rate"] = float(self.now.learning_rates[step - 1 - self.now.begins])
    self._write(step, values | {"images_per_second": rate})
    self.rates.setdefault(self.now.phase, []).append(rate)
    seconds = images * (self.now.ends - step) / rate
    self.live.show(
        f"phase {self.now.phase}  step {step}/{self.now.ends}  loss {values['loss']:.4f}  "
        f"accuracy {values['accuracy']:.3f}  {rate:.1f} images/s  "
        f"phase ends in {console.duration(seconds)}"
    )

  def validation(self, step: int, found: dict[str, Any]) -> None:
    scalars = {f"validation_{k}": v for k, v in found.items() if isinstance(v, float)}
    self._write(step, scalars)
    words = "  ".join(f"{k} {v:.3f}" for k, v in found.items() if isinstance(v, float))
    console.say(f"phase {self.now.phase}  step {step}  validation: {words}")
    self.since, self.since_step = time.monotonic(), step  # its time is not the steps'

  def rates_in_words(self) -> str:
    """The median images a second of each phase that ran, and on what."""
    shown = ", ".join(f"{name} {statistics.median(r):.1f}" for name, r in self.rates.items())
    device = jax.devices()[0].device_kind
    return f"images/s while training: {shown} on {jax.device_count()} × {device}"

  def _write(self, step: int, values: dict[str, float]) -> None:
    if self.lines:
      self.lines.write({"step": step, "phase": self.now.phase, **values})
      with self.plain_errors():
        self.events.write_scalars(step, values)
