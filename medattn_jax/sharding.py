"""One mesh, one axis: which devices, what lies where, and how a host's batch gets there."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medattn_jax.errors import UserError

AXIS = "data"


def devices() -> list[jax.Device]:
  """All devices of the run.

  Raises:
    UserError: the platform asked for is not there, or not every process has as many devices.
  """
  try:
    found = jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter where a plug-in is not installed
    reason = " ".join(str(error).split()) or "its plug-in is not installed"
    raise UserError(
        f"JAX_PLATFORMS={jax.config.jax_platforms}: no device can be used: {reason}; "
        "accepted: a platform that is there, or the variable not set"
    ) from error
  held = collections.Counter(device.process_index for device in found)
  counts = [held[process] for process in range(jax.process_count())]
  if len(set(counts)) > 1:
    raise UserError(f"the processes hold {counts} devices; accepted: as many in each of them")
  return found


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-axis mesh over `devices`, all of them by default. Raises UserError for none."""
  devices = jax.devices() if devices is None else devices
  found = list(devices) if isinstance(devices, Iterable) else []
  if not found or not all(hasattr(device, "platform") for device in found):
    raise UserError(f"devices = {devices!r}; accepted: at least one of jax.devices(), None for all")
  # Explicit axis types break linen's modules: say Auto aloud.
  return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batched(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Split along `axis` over the devices."""
  return NamedSharding(mesh, P(*[None] * axis, AXIS))


def placed(tree: Any) -> Any:
  """What of a state lies where: whatever is below a key "rows" is split along its first axis over
  the devices, all else is on each of them. A tree of PartitionSpecs."""

  def spec(path, _):
    below = any(getattr(key, "key", getattr(key, "name", None)) == "rows" for key in path)
    return P(AXIS) if below else P()

  return jax.tree_util.tree_map_with_path(spec, tree)


def on(mesh: Mesh, specs: Any) -> Any:
  """The shardings over `mesh` of a tree of PartitionSpecs."""
  leaf = lambda x: isinstance(x, P)
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=leaf)


def put(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """A batch on the mesh: each process gives its own contiguous rows. Does not block."""
  return jax.tree.map(
      lambda array: jax.make_array_from_process_local_data(sharding, array), batch
  )


def place(tree: Any, shardings: Any) -> Any:
  """A tree of the host's arrays on the devices, as `shardings` (of the same structure) say.

  All processes must hold the same. (jax.device_put would compare them, array by array, between
  the processes.)
  """

  def put(value, sharding):
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  return jax.tree.map(put, tree, shardings)


def everywhere(tree: Any, mesh: Mesh) -> Any:
  """A tree of the host's arrays, the same in all processes, on every device."""
  return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def prefetch(batches: Iterable[Any], put: Callable[[Any], Any], ahead: int = 2) -> Iterator[Any]:
  """Yields `put(batch)` of each batch, `ahead` of them uploaded before they are asked for."""
  batches = iter(batches)
  waiting = collections.deque(put(b) for b in itertools.islice(batches, ahead))
  while waiting:
    yield waiting.popleft()
    waiting.extend(put(b) for b in itertools.islice(batches, 1))


def local_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of an array split along its first axis, in order."""
  if jax.process_count() == 1:
    return np.asarray(array)
  shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
  return np.concatenate([np.asarray(s.data) for s in shards])
