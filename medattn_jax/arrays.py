"""Trees of device arrays, to nested dictionaries of the host's arrays and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from medattn_jax import processes

Tree = Any


class Mismatch(Exception):
  """Stored arrays are not those of a target; the message names the first that differs."""


def to_host(tree: Tree) -> dict:
  """A nested dict of numpy arrays of the host's own, keyed by field name or index.

  Containers without leaves stay as {}, and None stays. Collective where arrays are spread over
  processes. Raises TypeError or ValueError for what cannot be stored.
  """

  def is_hollow(x):
    return x is None or (isinstance(x, Mapping | tuple | list) and not x)

  paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hollow)
  for _, leaf in paths:
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("a checkpoint holds plain arrays, no PRNG keys")
      leaf.copy_to_host_async()
  nested: dict = {}
  for path, leaf in paths:
    *parents, last = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
    if any("/" in name for name in (*parents, last)):
      raise ValueError(f"{_name(path)}: a name within a checkpoint has no slash")
    place = nested
    for name in parents:
      place = place.setdefault(name, {})
    place[last] = leaf if leaf is None else {} if is_hollow(leaf) else _array(leaf, _name(path))
  return nested


def _array(leaf: Any, name: str) -> np.ndarray:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    if leaf.is_fully_replicated:
      leaf = leaf.addressable_data(0)
    else:  # split along its first axis
      shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
      own = np.concatenate([np.asarray(shard.data) for shard in shards])
      leaf = processes.gather_rows({name: own})[name]
  # A copy: on CPU devices numpy would see the very buffer that the next step is given to overwrite.
  array = np.array(leaf)
  if array.dtype.hasobject or not array.size:
    raise TypeError(f"{name}: cannot store an array of {array.dtype} with shape {array.shape}")
  return array


def place(stored: dict, target: Tree) -> Tree:
  """Puts arrays of the host into the containers and onto the shardings of `target`.

  Args:
    stored: what `to_host` made.
    target: jax.ShapeDtypeStruct leaves; one without a sharding goes to the default device.

  Raises:
    Mismatch: a name, shape or dtype differs.
  """
  paths, structure = jax.tree_util.tree_flatten_with_path(target)
  wanted = {_name(path): leaf for path, leaf in paths}
  found = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
  for name in sorted(wanted.keys() | found.keys()):
    here = _kind(found[name]) if name in found else "nothing"
    there = _kind(wanted[name]) if name in wanted else "nothing"
    if here != there:
      raise Mismatch(f"holds {here} at {name} where this configuration has {there}")
  leaves = [_put(found[name], leaf) for name, leaf in wanted.items()]
  return jax.tree_util.tree_unflatten(structure, leaves)


def _put(value: np.ndarray, leaf: Any) -> jax.Array:
  sharding = getattr(leaf, "sharding", None)
  if sharding is None:
    return jax.device_put(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _kind(leaf: Any) -> str:
  return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
