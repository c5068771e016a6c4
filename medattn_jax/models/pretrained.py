"""Published PyTorch weights, converted by name.

A backbone names its parts as the reference does, so one rule serves them all. A dot before an
index is a hyphen here (`repeat.0.branch1.1.conv.weight` is repeat-0/branch1-1/conv/kernel), kernels
turn from [out, in, h, w] to [h, w, in, out] and dense weights from [out, in] to [in, out]; the
rows of one that sees a grid of features go from (channel, row, column) to (row, column, channel).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from medattn_jax import models
from medattn_jax.errors import UserError

# The dense head of each backbone whose published weights are understood.
HEADS = {
  "inception_resnet_v2": "classif", "inception_v3": "fc", "googlenet": "fc",
  "vgg16": "classifier.6", "vgg16_bn": "classifier.6", "resnet18": "fc", "resnet50": "fc",
  "densenet121": "classifier"}
# Knowingly left behind: auxiliary heads (training only) and PyTorch's step counters.
_IGNORED = re.compile(r"^(AuxLogits|aux[12])\.|\.num_batches_tracked$")
# Dense weights that see a grid, and its (channels, rows, columns).
_GRIDS = {"classifier.0.weight": (512, 7, 7)}
# In the file of DenseNet's weights a name has a dot more than in torchvision's module.
_OLDER = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")
_LEAVES = {
  "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
  "var": "running_var"}


def from_torch(name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """Converts a reference state dict to {"params", "batch_stats"} of `models.backbone(name)`.

  Args:
    name: one of HEADS: "inception_resnet_v2" (timm, Cadene), the others torchvision's.
    state_dict: {tensor's name: array}; anything np.asarray takes, so CPU tensors too. The number
      of classes is the head's; without a head, the variables have none.

  Returns:
    float32 numpy arrays; "batch_stats" is empty where nothing is normalised.

  Raises:
    UserError: an unknown name; tensors missing, left over, or of another shape.
  """
  if name not in HEADS:
    raise UserError(f"from_torch({name!r}): one of {', '.join(HEADS)}")
  state_dict = {_OLDER.sub(r"\1", key): value for key, value in state_dict.items()}
  head = state_dict.get(f"{HEADS[name]}.weight")
  net = models.backbone(name, None if head is None else len(head))
  wanted = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3)), train=False))
  wanted = traverse_util.flatten_dict(dict(wanted))

  found, misshapen = {}, []
  for path, leaf in wanted.items():
    tensor = _torch_name(path)
    if tensor in state_dict:
      value = np.asarray(state_dict[tensor], np.float32)
      if value.ndim in (2, 4):
        value = _kernel(value, _GRIDS.get(tensor))
      if value.shape != leaf.shape:
        misshapen.append(f"{tensor} {tuple(np.shape(state_dict[tensor]))}")
      found[path] = value
  names = {_torch_name(path) for path in wanted}
  problems = {
    "missing": names - set(state_dict),
    "not known": {key for key in state_dict if key not in names and not _IGNORED.search(key)},
    "of another shape": misshapen}
  if any(problems.values()):
    raise UserError(f"from_torch({name!r}): " + "; ".join(
      f"{what}: {_some(tensors)}" for what, tensors in problems.items() if tensors))
  return {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(found)}


def _kernel(weight: np.ndarray, grid: tuple[int, int, int] | None) -> np.ndarray:
  """[out, in] → [in, out] or [out, in, h, w] → [h, w, in, out]; `grid`: what `in` counts."""
  if grid and weight.shape[1:] == (math.prod(grid),):
    return weight.reshape(-1, *grid).transpose(2, 3, 1, 0).reshape(weight.shape[::-1])
  return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def _torch_name(path: tuple[str, ...]) -> str:
  """The reference's name of a leaf: (collection, module, …, leaf)."""
  _, *parts, leaf = path
  return ".".join([*parts, _LEAVES[leaf]]).replace("-", ".")


def _some(names: Iterable[str], limit: int = 8) -> str:
  """At most `limit` of the names, sorted, and how many more there are."""
  names = sorted(names)
  rest = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + rest
