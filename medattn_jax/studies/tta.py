"""`medattn study tta`: a photograph looked at in several turns, by the mean of the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from medattn_jax import augment, console, evaluate, metrics, trained
from medattn_jax import step as steps
from medattn_jax.analysis import ensemble
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, gains, writing

NUMBERS = (2, 4, 8)
# Of augment.VIEWS, in their order.
NAMES = ("as it is", "mirrored", "upside down", "half turn", "transposed", "quarter turn left",
         "quarter turn right", "transposed, half turn")


def run(
  workdir: str, data: str | None = None, split: str | None = None, step: str | int = "best",
  out: str | None = None, views: int | None = None,
) -> dict[str, Any]:
  """Test-time dihedral averaging: the mean probability over views of the same photographs.

  A view flips rows, columns, or both, and exchanges them (augment.VIEWS): 2 are the photograph and
  its mirror image, 4 all flips, 8 all turns and flips. Both eyes of a patient are moved alike.
  [choice] A model moves them where its training does: Zoom-in-Net before all else, regions and
  crops anew in each view; a global attention after its map has weighed the image. The thresholds
  are tuned on the validation split for each number of views.

  Args:
    workdir: of the run.
    data, split, step: what is graded, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/tta by default.
    views: 2, 4 or 8; by default as the run was trained: 8 with augment.dihedral, 2 with
      augment.mirror.

  Returns:
    What tta.json holds; predictions.csv of the mean is beside it.

  Raises:
    UserError: a wrong flag, or a model that has seen no moved photograph; nothing was written.
  """
  if views not in (None, *NUMBERS):
    raise UserError(f"--views={views}; accepted: {', '.join(map(str, NUMBERS))}")
  place = answers.folder("tta", [workdir], out)
  model = trained.open_workdir(workdir, step)
  views = views or _trained_with(model.config, workdir)
  dataset = evaluate.open_data(model.config, data)
  split = evaluate.choose_split(dataset, split)
  answer = step_of(model, views)
  begun = time.perf_counter()
  table = _graded(model, dataset, split, views, answer)
  seconds = time.perf_counter() - begun
  validation = None
  if model.thresholds is not None:
    if split == "validation":
      console.say("the thresholds are tuned on the validation split, which is what is evaluated: "
                  "its kappa is optimistic")
      validation = table
    elif dataset.splits.get("validation"):
      validation = _graded(model, dataset, "validation", views, answer)
    else:
      console.say(f"data set {dataset.name} has no validation split: all views are cut by the "
                  f"thresholds of {model.thresholds_from}")
  numbers = [number for number in NUMBERS if number <= views]
  chosen = {name: [at] for at, name in enumerate(NAMES[:views])}
  chosen |= {f"mean of {number} views": list(range(number)) for number in numbers}
  graded = {}
  for name, which in chosen.items():
    thresholds = model.thresholds
    if validation is not None:
      thresholds = metrics.tune_thresholds(
        metrics.expected_grade(_mean(validation, which)), validation["level"],
        model.config.model.num_classes)
    graded[name] = ensemble.Graded(_mean(table, which), thresholds)
  likeliest = table["views"].argmax(-1)
  agreed = float((likeliest == likeliest[:, :1]).all(1).mean())
  source = {"workdir": str(workdir), "data": dataset.name, "split": split, "step": model.step,
            "checkpoint_sha256": model.fingerprint}
  return gains.finish(
    "tta", place,
    {"run": source, "views": views, "thresholds_from": model.thresholds_from
     if validation is None else "validation", "all_views_agree": agreed, "seconds": seconds},
    table, graded, whole=f"mean of {views} views", singles=NAMES[:views], best=NAMES[0],
    words=("gain over one view, as it is", "gain over one view, mean"), seed=model.config.seed,
    title=f"{writing.about(source)}: the mean of {views} views",
    notes=[f"all {views} views name the same class for {agreed:.1%} of the photographs; "
           f"{views} answers each took {seconds:.1f} s, compiling included"])


def _mean(table: evaluate.Table, which: Sequence[int]) -> np.ndarray:
  """The mean probability [n, C] of some of the views."""
  return ensemble.mean([metrics.probabilities_of(table["views"][:, at]) for at in which])


def step_of(model: trained.Trained, views: int) -> Callable[..., dict[str, jax.Array]]:
  """An eval step that answers "views" too: logits float32 [B, E, views, C] of each, the first as
  the photograph is. The views are made on the device, of photographs sent there once."""
  flips = augment.VIEWS[:views]

  def apply(variables, image, train):
    patients, eyes = image.shape[:2]
    # A patient's views stand where patients do; both eyes of a view are moved alike.
    every = np.tile(np.repeat(flips, eyes, axis=0), (patients, 1))
    logits, _ = model.experiment.apply(
      variables, jnp.repeat(image, views, axis=0), drawn=augment.turned(jnp.asarray(every)),
      train=train)
    apart = jnp.swapaxes(logits.reshape(patients, views, eyes, -1), 1, 2)
    return apart[:, :, 0], {"views": apart}

  return steps.make_eval_step(apply, model.experiment.mesh, ["views"])


def _graded(
  model: trained.Trained, dataset: Any, split: str, views: int, answer: Callable[..., Any]
) -> evaluate.Table:
  # As many views at a time as an evaluation has photographs.
  size = max(1, model.config.evaluation.batch_size // views)
  return evaluate.graded(
    model.experiment, model.variables, dataset, split, model.config, wanted=("logits", "views"),
    step=answer, at_most=size)


def _trained_with(config: ml_collections.ConfigDict, workdir: str) -> int:
  if config.augment.dihedral:
    return 8
  if config.augment.mirror:
    return 2
  raise UserError(f"{workdir}: was trained with augment.dihedral = augment.mirror = False and has "
                  "seen no turned photograph; accepted: such a run, or --views=2, 4 or 8")
