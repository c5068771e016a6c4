"""Our weights under PyTorch's names and in its shapes, for benchmarks.versus_torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import pages


def drawn(tree: Any) -> Any:
  """A tree of weights with noise on what begins as zeros or ones, that every part is felt."""
  from flax import traverse_util

  def one(path, value):
    rng = np.random.default_rng([len(path), value.size])
    noise = rng.standard_normal(value.shape).astype(np.float32) / 10
    if path[-1] == "var":
      return 1 + np.abs(noise)
    if path[-1] == "kernel" and np.abs(value).max() > 0.1:
      return value
    return value + noise / (value.shape[-2] ** 0.5 if value.ndim > 1 else 1)

  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict({path: one(path, x) for path, x in flat.items()})


def named(page: pages.Page, params: Mapping, stats: Mapping) -> dict[str, np.ndarray]:
  """Our variables under PyTorch's names and in its shapes (see torch_side)."""
  model, found = page.model, {}
  if model.name == "global_attention":
    return _of_backbone(model.backbone, params["backbone"], stats.get("backbone", {}))
  for branch, own in params.items():
    apart = lambda tree: {name: x for name, x in tree.items() if name != "backbone"}
    below = stats.get(branch, {})
    parts = {"": _flat({"params": apart(own), "batch_stats": apart(below)})}
    if "backbone" in own:
      name = model.backbone if branch == "m_net" else model.crop_backbone
      parts["backbone."] = _of_backbone(name, own["backbone"], below.get("backbone", {}))
    found |= {f"{branch}.{part}{name}": x for part, all_ in parts.items()
              for name, x in all_.items()}
  return found


def _of_backbone(name: str, params: Mapping, stats: Mapping) -> dict[str, np.ndarray]:
  from medattn_jax.models import pretrained

  variables = {"params": params, "batch_stats": stats}
  return pretrained.to_torch(name, variables) if name in pretrained.HEADS else _flat(variables)


def _flat(variables: Mapping) -> dict[str, np.ndarray]:
  """Of parts that are named alike on both sides."""
  from flax import traverse_util

  flat = traverse_util.flatten_dict(dict(variables))
  return {".".join([*parts, _LEAVES[leaf]]): _turned(parts, np.asarray(value))
          for (_, *parts, leaf), value in flat.items()}


_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
           "var": "running_var"}


def _turned(parts: Sequence[str], value: np.ndarray) -> np.ndarray:
  """A leaf in PyTorch's order; a halving of the small network as the convolution that it is."""
  block = next((part for part in parts if part.startswith("down")), None)
  if block and value.ndim == 4:
    side = 4 if block == "down0" else 2
    value = value.reshape(side, side, -1, value.shape[-1])
  if value.ndim == 4:
    return value.transpose(3, 2, 0, 1).copy()
  return value.T.copy()
