"""One training step spread over devices in four ways, of the same local step.

shard_map is the product's: each device takes its share, and what a platform is good at joins them
(medattn_jax/joining.py). vector is the same with one all-reduce of one vector, wherever it runs.
jit leaves what lies where to the compiler; pmap is how it was done before meshes, and takes none of
XLA's options that the others' programs have (`compiler_options` in step.py). On a CPU oneDNN is not
called where the compiler shares out what devices do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from medattn_jax import sharding
from medattn_jax.errors import UserError
from medattn_jax.experiment import Experiment
from medattn_jax.step import State, compiler_options, local_step, make_train_step

WAYS = ("shard_map", "vector", "jit", "pmap")


class Spread(NamedTuple):
  """A step over the experiment's devices, not yet compiled.

  Attributes:
    step: (state, batch) → (state, metrics), jitted or pmapped; the state is given away.
    state: the host's state, brought to where the step wants it.
    batch: an update's small batches of the host, likewise.
    host: of a state that the step gave back, one copy on the host.
  """

  step: Callable
  state: Callable[[State], State]
  batch: Callable[[Sequence[Mapping[str, np.ndarray]]], Any]
  host: Callable[[State], State]


def spread(now: Experiment, way: str) -> Spread:
  """Raises UserError for another way, or one that a model's shared constants do not take."""
  if way not in WAYS:
    raise UserError(f"--parallel: {way}; accepted: {', '.join(WAYS)}")
  where = jax.tree.map(lambda x: x.sharding, now.abstract_state)
  place = lambda state: sharding.place(state, where)
  if way in ("shard_map", "vector"):
    step = now.train_step if way == "shard_map" else make_train_step(
      now.apply, now.optimizer, now.mesh, state=now.abstract_state, joined="vector",
      **now.step_options)
    return Spread(step, place, now.put_train, jax.device_get)
  if now.common:
    raise UserError(f"--parallel: {way}: the map of a global attention is made by shard_map alone; "
                    "accepted: shard_map, vector, or a model without a map")
  if way == "jit":
    step = jax.jit(
      local_step(now.apply, now.optimizer, devices=1, axis=None, **now.step_options),
      in_shardings=(where, sharding.batched(now.mesh, axis=1)),
      out_shardings=(where, sharding.replicated(now.mesh)), donate_argnums=0,
      compiler_options=compiler_options(now.mesh.devices.flat[0].platform))
    return Spread(step, place, now.put_train, jax.device_get)

  count, devices = now.mesh.size, list(now.mesh.devices.flat)
  local = local_step(
    now.apply, now.optimizer, devices=count, axis=sharding.AXIS, **now.step_options)
  each = sharding.batched(now.mesh)

  def copies(state):
    stacked = lambda x: np.broadcast_to(np.asarray(x), (count, *np.shape(x)))
    return sharding.put(jax.tree.map(stacked, state), each)

  def shares(batches):
    stacked = {key: np.stack([one[key] for one in batches]) for key in ("image", "level", "mask")}
    apart = lambda x: x.reshape(len(x), count, -1, *x.shape[2:]).swapaxes(0, 1)
    return sharding.put({key: np.ascontiguousarray(apart(x)) for key, x in stacked.items()}, each)

  step = jax.pmap(local, axis_name=sharding.AXIS, devices=devices, donate_argnums=0)
  first = lambda tree: jax.tree.map(lambda x: np.asarray(x)[0], tree)
  return Spread(step, copies, shares, first)
