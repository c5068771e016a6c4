"""A workdir that holds a trained model, opened to answer: config, verified weights, thresholds.

No compiled program is read from the workdir: JAX's compilation cache holds native code, and the
workdir may be a stranger's.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from medattn_jax import config as pages
from medattn_jax import experiment, files, manifest, metrics, sharding
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.errors import UserError
from medattn_jax.workdir import Workdir

# What config.json and the checkpoint's own config must agree on: it decides the answers.
_DECISIVE = (
  "model", "norm", "data.image_size", "data.full_size", "data.channels", "data.frame",
  "attention.source")
_MAX_METRICS_BYTES = 16 << 20
ROUNDING = "rounding, none were tuned"
LIKELIEST = "none: the likeliest class decides"


class Trained(NamedTuple):
  """A model that can answer.

  Attributes:
    workdir: where it came from.
    config: the run's.
    step, phase: of the checkpoint.
    experiment: of that phase on the mesh.
    variables: what answers (experiment.answering), on the mesh.
    thresholds: float64 [C-1]; the decision rule. None where the likeliest class is taken.
    thresholds_from: where they come from, in words.
    fingerprint: SHA-256 of the checkpoint's manifest: which weights these are.
  """

  workdir: pathlib.Path
  config: ml_collections.ConfigDict
  step: int
  phase: str
  experiment: experiment.Experiment
  variables: dict[str, Any]
  thresholds: np.ndarray | None
  thresholds_from: str
  fingerprint: str


def open_workdir(
  workdir: str | os.PathLike, step: str | int = "best", devices: Sequence[Any] | None = None
) -> Trained:
  """Opens the checkpoint `step` ("best", "last" or a number) of `workdir` on any devices.

  Every file of the checkpoint is compared with its checksum before its numbers are used.

  Raises:
    UserError: no workdir, no such checkpoint, one that is damaged, or one that does not fit
      config.json.
  """
  if not isinstance(workdir, str | os.PathLike) or not os.fspath(workdir):
    raise UserError(f"workdir = {workdir!r}; accepted: the path of a folder `medattn train` made")
  place = Workdir(workdir)
  config = pages.from_dict(place.read_config(), source=str(place.config))
  experiment.check(config)
  sharding.devices()  # before anything else asks JAX for them
  checkpoints = Checkpoints(place.checkpoints)
  number = checkpoints.resolve(step)
  tree, meta = checkpoints.load(number)
  where = place.checkpoints / str(number)
  _agree(config, meta, where)
  now = experiment.build(config, meta.get("phase"), devices)
  variables = experiment.answering(tree)
  _fits(variables, now, where)
  variables = sharding.everywhere(variables, now.mesh)
  fingerprint = files.sha256(where / manifest.NAME)
  if config.evaluation.decision == "argmax":
    thresholds, source = None, LIKELIEST
  else:
    thresholds, source = _thresholds(meta, place, fingerprint, config.model.num_classes)
  return Trained(
    place.path, config, number, now.phase, now, variables, thresholds, source, fingerprint)


def _agree(config: ml_collections.ConfigDict, meta: dict, where: pathlib.Path) -> None:
  """Raises UserError naming the first decisive key in which config.json is not the checkpoint's."""
  both = pages.to_dict(config), pages.completed(meta["config"])
  here, there = (pages.flatten(values) for values in both)
  for key in sorted(here.keys() | there.keys()):
    if key.startswith(_DECISIVE) and here.get(key) != there.get(key):
      raise UserError(
        f"config.json has {key} = {here.get(key)!r} where {where} was trained with "
        f"{there.get(key)!r}; accepted: the config.json of that training")


def _fits(variables: dict[str, Any], now: experiment.Experiment, where: pathlib.Path) -> None:
  """Raises UserError unless the weights are those of the config's model, name by name."""
  wanted = now.variables(now.abstract_state)
  shapes = [
    {jax.tree_util.keystr(path): tuple(leaf.shape)
     for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (variables, wanted)
  ]
  for name in sorted(shapes[0].keys() | shapes[1].keys()):
    held, needed = (found.get(name, "nothing") for found in shapes)
    if held != needed:
      raise UserError(
        f"{where}: holds {held} at {name} where the model of config.json has {needed}")


def _thresholds(
  meta: dict, place: Workdir, fingerprint: str, num_classes: int
) -> tuple[np.ndarray, str]:
  """The decision rule of a step: tuned at its validation, or in its evaluation, or the start.

  The evaluation must be of these very weights, on the run's own data set.
  """
  if (found := _valid(meta.get("thresholds"), num_classes)) is not None:
    return found, "the checkpoint's validation"
  try:
    path = place.evaluation / "metrics.json"
    evaluation = json.loads(files.read_bytes(path, _MAX_METRICS_BYTES))
    found = _valid(evaluation["thresholds"], num_classes)
    these = evaluation["checkpoint_sha256"] == fingerprint and evaluation["own_data"] is True
    if these and found is not None:
      tuned = evaluation.get("thresholds_from") != ROUNDING
      return found, "the workdir's evaluation" if tuned else ROUNDING
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    pass  # None there, or not one that can be believed.
  return metrics.start_thresholds(num_classes), ROUNDING


def _valid(thresholds: Any, num_classes: int) -> np.ndarray | None:
  try:
    found = np.asarray(thresholds, np.float64)
  except (TypeError, ValueError):
    return None
  ascends = found.shape == (num_classes - 1,) and np.isfinite(found).all()
  return found if ascends and (np.diff(found) >= 0).all() else None
