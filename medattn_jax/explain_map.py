"""Why all images of an aligned set were graded as they were: the one map of a global attention."""

from __future__ import annotations

import io
import itertools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from medattn_jax import bank, console, evaluate, experiment, files, metrics, models, trained
from medattn_jax.analysis import figures, maps
from medattn_jax.data import pipeline, preprocess
from medattn_jax.errors import UserError
from medattn_jax.workdir import Workdir

AVERAGED = 2000  # at most so many photographs are averaged; more look no different


class Means(NamedTuple):
  """The averages of a split.

  Attributes:
    whole: float32 [H, W, C]; of all that were taken.
    classes: float32 [classes, H, W, C]; counts: int64 [classes], of each class.
    told: which photographs, in words.
  """

  whole: np.ndarray
  classes: np.ndarray
  counts: np.ndarray
  told: str


def write(
  model: trained.Trained, place: pathlib.Path, data: str | None, split: str | None, limit: int
) -> None:
  """Draws the map of a global attention: `medattn explain` for that model.

  Writes attention.png, attention.npy (float32 [H, W]), class_means.png, and, where the workdir
  kept maps of the training, evolution.png and evolution.gif.

  Args:
    place: the folder for the files.
    data, split, limit: as of explain.run; the averages are of the training split.

  Raises:
    UserError: a model without a map, or a data set that does not serve; nothing was written.
  """
  if "constants" not in model.variables:
    raise UserError(
      f"{model.workdir}: attention.source = {model.config.attention.source}: the model has no map; "
      "accepted: a global_attention with another source")
  attention = np.asarray(model.variables["constants"]["map"], np.float32)
  dataset = evaluate.open_data(model.config, data)
  split = evaluate.choose_split(dataset, split)
  samples = _samples(model, dataset, split, limit)
  averages = means(dataset, model, "train" if dataset.splits.get("train") else split)
  region, step = dataset.region, f"step {model.step:,}"
  stored = io.BytesIO()
  np.save(stored, attention, allow_pickle=False)
  contents = {
    "attention.npy": stored.getvalue(),
    "attention.png": figures.png(maps.page(
      attention, averages.whole, samples, region=region,
      title=f"global attention, {dataset.name}, {step}")),
    "class_means.png": figures.png(maps.class_means(
      averages.classes, averages.counts, attention, region=region,
      title=f"mean image of each class: {averages.told}")),
    **_evolution(model, attention, region),
  }
  place.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    files.write_bytes(place / name, content)
  print(f"the attention of {step} explained in {place}: {', '.join(contents)}")


def means(dataset: pipeline.DataSet, model: trained.Trained, split: str) -> Means:
  """The mean image of a split and of each of its classes.

  Where it has more than AVERAGED photographs, of so many, each class keeping its share.

  Raises:
    UserError: a level that the model has not, or damage.
  """
  config, levels = model.config, dataset.photo_levels(split)
  classes, channels = config.model.num_classes, config.data.channels
  if levels.max(initial=0) >= classes:
    raise UserError(f"data set {dataset.name}: split {split} has level {levels.max()}; accepted by "
                    f"this model: 0–{classes - 1}")
  told = f"all {len(levels):,} of {split}"
  numbers = np.arange(len(levels))
  if len(levels) > AVERAGED:
    numbers = bank.choose(f"bank:{AVERAGED}", levels, config.seed)
    told = f"{AVERAGED:,} of the {len(levels):,} of {split}"
    console.say(f"mean images are of {told}")
  size = config.data.full_size
  # Whole numbers below 2²⁴: float32 adds them exactly.
  sums = np.zeros((classes, size, size, channels), np.float32)
  images = pipeline.photographs(dataset, split, numbers, full_size=size, channels=channels)
  for level, image in zip(levels[numbers], images, strict=True):
    sums[level] += image
  counts = np.bincount(levels[numbers], minlength=classes)
  whole = sums.sum(0) / len(numbers)
  sums /= np.maximum(counts, 1)[:, None, None, None]
  return Means(whole, sums, counts, told)


def kept_maps(model: trained.Trained) -> dict[int, np.ndarray]:
  """The maps of the training up to the checkpoint's step, as the workdir kept them, in order.

  Raises:
    ValueError: one of them is not what was written; the text says which and why.
  """
  shape = model.variables["constants"]["map"].shape
  found = {}
  for step, path in Workdir(model.workdir).kept_maps().items():
    if step > model.step:
      continue
    try:
      one = np.load(io.BytesIO(preprocess.read_bytes(path)), allow_pickle=False)
    except preprocess.BadImage as reason:
      raise ValueError(f"{path} {reason}") from None
    except Exception:  # whatever NumPy makes of bytes that are no array
      raise ValueError(f"{path} is damaged") from None
    if not isinstance(one, np.ndarray) or (one.dtype, one.shape) != (np.float32, shape):
      raise ValueError(f"{path} is no map of this model")
    if not ((one >= 0) & (one <= 1)).all():
      raise ValueError(f"{path} has weights that are not from 0 to 1")
    found[step] = one
  return found


def _evolution(
  model: trained.Trained, attention: np.ndarray, region: np.ndarray | None
) -> dict[str, bytes]:
  """The maps of the training as a strip and as an animation, the checkpoint's own the last.

  How large the weights are drifts while the map is trained, since the backbone takes up any common
  factor. So before a frozen map each other one is drawn as it would have been frozen.
  """
  try:
    kept = kept_maps(model)
  except ValueError as error:
    console.warn(f"{error}: the evolution is left out")
    return {}
  if not kept:
    console.warn(f"{Workdir(model.workdir).maps} holds no map up to step {model.step} "
                 "(attention.kept says how many are kept): the evolution is left out")
    return {}
  title = "attention A in the course of the training"
  if model.phase == "frozen":
    freeze = jax.jit(lambda one: models.hand_on(
      model.config, "frozen", {"constants": {"map": one}})["constants"]["map"])
    kept = {step: np.asarray(freeze(one)) for step, one in kept.items()}
    title += ", each map as it would have been frozen"
  kept[model.step] = attention
  steps, drawn = list(kept), list(kept.values())
  return {
    "evolution.png": figures.png(maps.evolution(drawn, steps, region=region, title=title)),
    "evolution.gif": maps.animation(drawn, steps, region=region)}


def _samples(
  model: trained.Trained, dataset: pipeline.DataSet, split: str, limit: int
) -> list[maps.Sample]:
  """The split's first photographs, with the true and the given class."""
  if limit > maps.SAMPLES:
    console.say(f"--limit={limit}: the page has room for {maps.SAMPLES} photographs")
  count = min(limit, maps.SAMPLES)
  found = list(itertools.islice(_graded(model, dataset, split, count), count))
  if not found:
    raise UserError(f"data set {dataset.name}: split {split} has no photographs")
  return found


def _graded(
  model: trained.Trained, dataset: pipeline.DataSet, split: str, count: int
) -> Iterator[maps.Sample]:
  batches = evaluate.batches_of(dataset, split, model.config, at_most=count)
  answered = experiment.predictions(model.experiment, model.variables, batches, ("logits",))
  for batch, out in answered:
    given = metrics.grades(
      metrics.probabilities_of(out["logits"].reshape(-1, out["logits"].shape[-1])),
      model.thresholds).reshape(batch["level"].shape)
    for at in zip(*np.nonzero(batch["mask"] > 0), strict=True):
      yield maps.Sample(
        batch["image"][at].copy(), batch["image_id"][at], int(batch["level"][at]), int(given[at]))
