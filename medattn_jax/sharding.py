"""One mesh, one axis: which devices, what lies where, and how a host's batch gets there."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medattn_jax.errors import UserError

AXIS = "data"


def devices() -> list[jax.Device]:
  """All devices of the run. Raises UserError where the platform asked for is not there."""
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter where a plug-in is not installed
    reason = " ".join(str(error).split()) or "its plug-in is not installed"
    raise UserError(
        f"JAX_PLATFORMS={jax.config.jax_platforms}: no device can be used: {reason}; "
        "accepted: a platform that is there, or the variable not set"
    ) from error


def any_process(flag: bool) -> bool:
  """Whether `flag` is set in any process; all of them must ask."""
  return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


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


def put(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """A batch on the mesh: each process gives its own contiguous rows. Does not block."""
  return jax.tree.map(
      lambda array: jax.make_array_from_process_local_data(sharding, array), batch
  )


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


def gather(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The rows of all processes, joined in the order of processes; texts travel as UTF-8 bytes."""
  joined = {}
  for name, value in rows.items():
    if value.dtype == object:
      joined[name] = _gather_texts(value)
    else:
      joined[name] = np.concatenate(multihost_utils.process_allgather(value))
  return joined


def _gather_texts(value: np.ndarray) -> np.ndarray:
  encoded = [str(text).encode() for text in value.ravel()]
  width = max(map(len, encoded), default=0)
  width = int(np.max(multihost_utils.process_allgather(np.int32(width)))) or 1
  packed = np.zeros((len(encoded), width), np.uint8)
  for row, text in zip(packed, encoded, strict=True):
    row[: len(text)] = np.frombuffer(text, np.uint8)
  packed = np.concatenate(multihost_utils.process_allgather(packed))
  texts = [bytes(row).rstrip(b"\0").decode() for row in packed]
  return np.array(texts, object).reshape(-1, *value.shape[1:])
