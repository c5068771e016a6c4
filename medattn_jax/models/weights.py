"""Published weights that a training begins from: the folder `medattn import-weights` writes.

  weights.safetensors   the backbone's params and batch_stats, under flat names
  manifest.json         which backbone, how many classes, how its input is normalised, which file it
                        came from; size and checksum of the first

`model.init_from` (and Zoom-in-Net's `model.crop_init`) name such a folder. It is read when a run
begins and never again: what is trained lives in the checkpoints.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import traverse_util

from medattn_jax import console, files, manifest
from medattn_jax.errors import UserError
from medattn_jax.models import pretrained, state_dicts

FORMAT = 1
FILE = "weights.safetensors"
_ACCEPTED = "accepted: a folder that `medattn import-weights` wrote"

# How the published weights see RGB of 0 to 1: (mean, std). Those of Inception are of [-1, 1]:
# torchvision's GoogLeNet and Inception-v3 too, whose `transform_input` makes that of ImageNet's.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CONVENTIONS = {name: _IMAGENET for name in pretrained.HEADS} | dict.fromkeys(
  ("inception_resnet_v2", "inception_v3", "googlenet"), _SYMMETRIC)

# By model: the keys that name a folder, where in the model its backbone is, and the backbone's key.
_KEYS = {
  "zoom_in_net": {"init_from": (("m_net", "backbone"), "backbone"),
                  "crop_init": (("c_net", "backbone"), "crop_backbone")},
  "m_net": {"init_from": (("m_net", "backbone"), "backbone")},
  "global_attention": {"init_from": (("backbone",), "backbone")},
}
_WORDS = ("", "random", "m_net")  # which name no folder


class Weights(NamedTuple):
  """What such a folder holds.

  Attributes:
    model: the backbone's name.
    num_classes: of its head; None where it has none.
    mean, std: of the three channels of its input, RGB of 0 to 1.
    variables: {(collection, module, …, leaf): float32 array}.
    sha256: of the file of the arrays.
  """

  model: str
  num_classes: int | None
  mean: tuple[float, ...]
  std: tuple[float, ...]
  variables: dict[tuple[str, ...], np.ndarray]
  sha256: str


def write(
  place: pathlib.Path, name: str, variables: Mapping[str, Any], convention: tuple,
  facts: Mapping[str, Any],
) -> None:
  """Writes the folder, whole or not at all; nothing but an empty folder may be there.

  Args:
    variables: {"params", "batch_stats"} of `models.backbone(name)`.
    convention: (mean, std).
    facts: strict JSON to keep beside it: where the weights come from.
  """
  flat = traverse_util.flatten_dict(dict(variables))
  # The library writes memory as it lies, so it must lie in order.
  arrays = {"/".join(path): np.ascontiguousarray(value) for path, value in flat.items()}
  mean, std = convention
  classes = next((len(value) for path, value in flat.items()
                  if pretrained.is_head(name, path) and path[-1] == "bias"), None)
  with files.placing(place) as aside:
    (aside / FILE).write_bytes(safetensors.numpy.save(arrays))
    manifest.write(aside, {
      "format": FORMAT, "model": name, "num_classes": classes,
      "input": {"channels": "RGB", "range": [0, 1], "mean": list(mean), "std": list(std)}, **facts})


def read(folder: str, key: str) -> Weights:
  """Reads and examines a folder of weights.

  Args:
    key: that names it in the page, to be named in errors.

  Raises:
    UserError: no such folder, one of another kind, or anything in it is not as it was written.
  """
  place = pathlib.Path(folder)
  try:
    held = manifest.check(place, sums=False)["files"].get(FILE, {}).get("size", 0)
    if held > state_dicts.MAX_BYTES:
      raise manifest.Broken(f"{FILE} has {held >> 30} GiB")
    found = manifest.check(place)
    if found.get("format") != FORMAT:
      raise manifest.Broken(f"is of format {found.get('format')!r}, not {FORMAT}")
    name, classes = found["model"], found["num_classes"]
    mean, std = (_three(found["input"][part]) for part in ("mean", "std"))
    known = name in pretrained.HEADS and (classes is None or type(classes) is int)
    if not known or set(found["files"]) != {FILE} or not all(x > 0 for x in std):
      raise manifest.Broken(f"{manifest.NAME} is not of weights")
    sha256 = found["files"][FILE]["sha256"]
  except manifest.Broken as broken:
    raise UserError(f"{key} = {folder}: {broken}; {_ACCEPTED}") from None
  except (KeyError, TypeError, ValueError):
    raise UserError(
      f"{key} = {folder}: its {manifest.NAME} is not of weights; {_ACCEPTED}") from None
  flat = state_dicts.of_safetensors(place / FILE)
  variables = {tuple(path.split("/")): value for path, value in flat.items()}
  wanted = pretrained.layout(name, classes)
  kind = lambda leaf: (leaf.dtype, leaf.shape)
  _refuse(f"{key} = {folder}, weights of {name}", {
    "missing": wanted.keys() - variables.keys(), "not known": variables.keys() - wanted.keys(),
    "of another shape": {path for path in wanted.keys() & variables.keys()
                         if kind(wanted[path]) != kind(variables[path])}})
  return Weights(name, classes, mean, std, variables, sha256)


def folders(config: Any) -> list[str]:
  """The folders of weights that a run of this page begins from."""
  return [_folder(config, key) for key in _asked(config)]


def check(config: Any) -> dict[str, str]:
  """{key: checksum} of all weights that a run of this page begins from.

  Raises:
    UserError: they are damaged, of another backbone, or see their input otherwise than the page.
  """
  return {key: _of_page(config, key).sha256 for key in _asked(config)}


def begin(config: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
  """The first variables of a run: those drawn by chance, with the weights that the page names.

  A head of another size stays as it was drawn; what the model leaves out of its backbone is left
  out. Both are said.

  Args:
    variables: {"params", "batch_stats"}; not changed.

  Raises:
    UserError: as `check`.
  """
  for key, (branch, _) in _asked(config).items():
    variables = _put(variables, branch, _of_page(config, key), f"{key} = {_folder(config, key)}")
  return dict(variables)


def _asked(config: Any) -> dict[str, tuple]:
  """The keys that name folders in this page: {key: (branch, key of the backbone)}."""
  keys = {f"model.{key}": found for key, found in _KEYS[config.model.name].items()}
  return {key: found for key, found in keys.items() if _folder(config, key) not in _WORDS}


def _folder(config: Any, key: str) -> str:
  return config.model[key.removeprefix("model.")]


def _of_page(config: Any, key: str) -> Weights:
  """The weights that a key of the page names. Raises UserError unless they fit the page."""
  folder, (_, backbone) = _folder(config, key), _asked(config)[key]
  if not pathlib.Path(folder).is_dir():
    words = "random, m_net or" if key.endswith("crop_init") else '"" for none, or'
    raise UserError(f"{key} = {folder!r}: no such folder; accepted: {words} a folder that "
                    "`medattn import-weights` wrote")
  weights, model = read(folder, key), config.model
  if weights.model != model[backbone]:
    raise UserError(f"{key} = {folder}: weights of {weights.model} where model.{backbone} = "
                    f"{model[backbone]}; accepted: weights of that")
  for kind, published in (("stem", "full"), ("width", 1)):
    if model.get(kind, published) != published:
      raise UserError(f"{key} = {folder} with model.{kind} = {model[kind]}: published weights have "
                      f"{published}; accepted: model.{kind} = {published}, or no weights")
  pairs = zip((*model.mean, *model.std), (*weights.mean, *weights.std), strict=True)
  if not all(math.isclose(ours, theirs, abs_tol=1e-6) for ours, theirs in pairs):
    shown = lambda values: "(" + ", ".join(f"{x:g}" for x in values) + ")"
    raise UserError(
      f"{key} = {folder}: these weights see their input with mean {shown(weights.mean)} and std "
      f"{shown(weights.std)}, the page has model.mean = {shown(model.mean)} and model.std = "
      f"{shown(model.std)}; accepted: --config.model.mean='{shown(weights.mean)}' "
      f"--config.model.std='{shown(weights.std)}'")
  return weights


def _put(variables: Mapping, branch: tuple[str, ...], weights: Weights, what: str) -> dict:
  """The variables with the weights in the backbone at `branch`; says what is left out."""
  flat = traverse_util.flatten_dict(dict(variables), keep_empty_nodes=True)
  end, name, given = 1 + len(branch), weights.model, weights.variables
  own = {(path[0], *path[end:]): path for path, value in flat.items()
         if path[1:end] == branch and value is not traverse_util.empty_node}
  head = {path for path in own if pretrained.is_head(name, path)}
  fits = all(np.shape(flat[own[path]]) == np.shape(given.get(path)) for path in head)
  taken = {path for path in own.keys() & given.keys() if fits or path not in head}
  drawn, left = own.keys() - taken, given.keys() - taken
  _refuse(f"{what}: weights of {name}", {
    "missing": {path for path in drawn - head if not pretrained.is_auxiliary(name, path)},
    "not known": {path for path in left - pretrained.trunk_lacks(name)
                  if not pretrained.is_head(name, path)},
    "of another shape": {path for path in taken if given[path].shape != flat[own[path]].shape}})
  flat |= {own[path]: given[path] for path in taken}
  modules = lambda paths: ", ".join(sorted({path[1] for path in paths}))
  words = f"{what}: {len(taken)} arrays of {name}"
  if left:
    words += f"; left out: {modules(left)}"
    if not fits:
      words += f" (its head is of {weights.num_classes} classes)"
  console.say(words + (f"; drawn by chance: {modules(drawn)}" if drawn else ""))
  return traverse_util.unflatten_dict(flat)


def _three(values: Any) -> tuple[float, ...]:
  """Three finite numbers. Raises ValueError."""
  found = tuple(map(float, values))
  if len(found) != 3 or not all(map(math.isfinite, found)):
    raise ValueError(json.dumps(found))
  return found


def _refuse(what: str, problems: Mapping[str, set]) -> None:
  pretrained.refuse(what, {
    problem: {pretrained.shown(path) for path in paths} for problem, paths in problems.items()})
