"""Several processes of one run: how they join, agree, exchange rows, and end together.

What processes tell one another goes through the key-value store of JAX's coordination service and
never through the devices. A link between devices carries what is sent in the order it is sent: two
collectives under way at once, or issued in another order by another process, take each other's
bytes. So the devices run one collective, the all-reduce of the train step, each ordered by the
state it hands to the next; and no agreement waits for the steps under way, on any platform.

Every process must make the same calls here, in the same order, from its main thread.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX has no other door to its key-value store

from medattn_jax import console
from medattn_jax.errors import UserError
from medattn_jax.signals import Stopped

PATIENCE = 3600  # seconds for what one process does while others wait: drawing, writing
ENDING = 60  # seconds the others have to end by themselves once one has left
LEAVING = 3  # seconds one that leaves waits for the others to leave with it

_calls = itertools.count()
_left: list[dict[str, Any]] = []  # the process that left, why, and its exit status


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
  """Joins a run of several processes; nothing where no flag asks for it. Touches no device.

  Args:
    coordinator: HOST:PORT on which process 0 listens, or "auto": the cluster (TPU, Slurm, Open MPI,
      Kubernetes) says all three.
    processes: how many there are.
    process: the number of this one, from 0.

  Raises:
    UserError: flags that make no run, or the others cannot be reached.
  """
  if coordinator is None:
    if processes not in (None, 1) or process not in (None, 0):
      raise UserError(
        "--processes and --process need --coordinator; accepted: HOST:PORT of process 0, or auto"
      )
    return
  given = {}
  if coordinator != "auto":
    if not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
      raise UserError(f"--coordinator={coordinator}: accepted: HOST:PORT of process 0, or auto")
    if processes is None or processes < 1:
      raise UserError(f"--processes={processes}: accepted: how many there are, from 1")
    if process is None or not 0 <= process < processes:
      raise UserError(
        f"--process={process}: accepted: this process's number, 0 to {processes - 1}"
      )
    given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
  elif processes is not None or process is not None:
    raise UserError("--coordinator=auto: accepted: without --processes and --process")
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours, see signals.py
  # Said by each: who waits here for one that never comes is aborted by JAX after five minutes.
  console.say(f"joining the other processes ({coordinator})")
  try:
    jax.distributed.initialize(**given)
  except ValueError as error:
    raise UserError(
      f"--coordinator={coordinator}: no cluster is found that JAX knows (TPU pod, Slurm, Open MPI, "
      "Kubernetes); accepted: HOST:PORT of process 0, with --processes and --process"
    ) from error
  except RuntimeError as error:
    why = " ".join(str(error).split())[:300]
    raise UserError(
      f"--coordinator={coordinator}: no run of several processes begins: {why}; accepted: an "
      "address that process 0 can listen on and all others reach"
    ) from error
  state = distributed.global_state
  if state.process_id:
    console.only_warnings()
  threading.Thread(target=_watch, args=(state.client, state.process_id), daemon=True).start()


def gather(value: Any) -> list[Any]:
  """Every process's `value`, which is JSON, in the order of processes."""
  return [json.loads(found) for found in _exchange(json.dumps(value).encode())]


def gather_rows(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The rows of all processes, joined in the order of processes; object arrays hold str."""
  if jax.process_count() == 1:
    return dict(rows)
  packed = io.BytesIO()
  texts = {name for name, value in rows.items() if value.dtype == object}
  plain = {name: rows[name].astype(str) if name in texts else rows[name] for name in rows}
  np.savez_compressed(packed, **plain)
  tables = [np.load(io.BytesIO(one), allow_pickle=False) for one in _exchange(packed.getvalue())]
  joined = {name: np.concatenate([table[name] for table in tables]) for name in rows}
  return {name: v.astype(object) if name in texts else v for name, v in joined.items()}


def agree(fine: bool) -> bool:
  """Whether all processes are fine."""
  return all(gather(fine))


def from_first(value: Any) -> Any:
  """Process 0's value, which is JSON, on every process; `value` is not looked at elsewhere."""
  if jax.process_count() == 1:
    return value
  return gather(value if jax.process_index() == 0 else None)[0]


def meet() -> None:
  """Waits until all are here. Raises what ended a process that is not."""
  gather(None)


def same(what: str, values: Mapping[str, Any]) -> None:
  """Raises UserError, on every process, where `values` (JSON) are not the same on all."""
  first, *others = gather(values)
  for number, other in enumerate(others, 1):
    for key in sorted(first.keys() | other.keys()):
      if first.get(key) != other.get(key):
        raise UserError(
          f"{what}: process {number} has {key} = {other.get(key)!r} where process 0 has "
          f"{first.get(key)!r}; accepted: the same for all processes"
        )


def end(status: int, why: str = "") -> None:
  """Leaves the run, with the others where they leave too; they hear why if `status` is not 0."""
  client = distributed.global_state.client
  if client is None:
    return
  if status and not _left:
    told = {"process": distributed.global_state.process_id, "status": status, "why": why}
    with contextlib.suppress(RuntimeError):  # another was first
      client.key_value_set("medattn/left", json.dumps(told))
  # Without this the service would end with process 0, and JAX abort who is not quite done.
  with contextlib.suppress(RuntimeError):
    client.wait_at_barrier("medattn/end", 1000 * (LEAVING if status else ENDING))
    jax.distributed.shutdown()


def why_lost(error: Exception) -> str | None:
  """Which process is gone, in words, where that is what `error` comes from."""
  if distributed.global_state.client is None:
    return None
  time.sleep(1)  # it may have said so in this moment
  if _left:
    return _in_words(_left[0])
  text = " ".join(str(error).split())
  if re.search("gloo|nccl|UNAVAILABLE", text, re.IGNORECASE):
    return f"another process of this run is gone or cannot be reached: {text[:200]}"
  return None


def _exchange(mine: bytes) -> list[bytes]:
  """What every process gives, in the order of processes: process 0 collects and hands on."""
  if jax.process_count() == 1:
    return [mine]
  client, call = distributed.global_state.client, next(_calls)
  own, joined = f"medattn/{call}/{jax.process_index()}", f"medattn/{call}/all"
  if jax.process_index():
    _give(client, own, mine)
    content = _wait_for(client, joined, 0)
  else:
    parts = [mine]
    for other in range(1, jax.process_count()):
      parts.append(_wait_for(client, f"medattn/{call}/{other}", other))
    content = np.array([len(part) for part in parts], "<i8").tobytes() + b"".join(parts)
    _give(client, joined, content)
    if call:  # who gives for this call has read the last one
      client.key_value_delete(f"medattn/{call - 1}")
  lengths = np.frombuffer(content[: 8 * jax.process_count()], "<i8")
  ends = np.cumsum([8 * len(lengths), *lengths])
  return [content[a:b] for a, b in itertools.pairwise(ends)]


def _give(client: Any, key: str, content: bytes) -> None:
  client.key_value_set_bytes(f"{key}/content", content)
  client.key_value_set(f"{key}/there", "")


def _wait_for(client: Any, key: str, process: int) -> bytes:
  for _ in range(PATIENCE):  # a second at a time: a signal is heard between two
    if _left:
      number = _left[0]["status"] - 128
      raise Stopped(number) if number > 0 else UserError(_in_words(_left[0]))
    try:
      client.blocking_key_value_get(f"{key}/there", 1000)
      return client.blocking_key_value_get_bytes(f"{key}/content", 1000 * PATIENCE)
    except RuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
  raise UserError(f"process {process} has not answered for {PATIENCE} s: see its log")


def _watch(client: Any, process: int) -> None:
  """Hears of a process that left; a main thread that waits for it on a device is ended."""
  while True:
    try:
      told = json.loads(client.blocking_key_value_get("medattn/left", 60_000))
    except RuntimeError as error:
      if "DEADLINE_EXCEEDED" in str(error):
        continue
      return  # the run is over
    if told["process"] == process:
      return
    _left.append(told)
    time.sleep(ENDING)
    print(f"medattn: error: {_in_words(told)}", file=sys.stderr, flush=True)
    os._exit(told["status"])


def _in_words(left: Mapping[str, Any]) -> str:
  return f"process {left['process']} ended: {left['why'] or 'its log says why'}"
