"""One side of benchmarks.versus_torch in a process of its own: `python -m benchmarks.sides SPEC`.

It says on a line when it is ready, and then, for each number that it is sent, how long so many
steps took; for 0, the memory it has held, and ours how near its fastest round was to the machine.
Ours also says before all that when its weights are written, which the others read.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks import pages, torch_weights

FIRST = 3  # steps whose losses are compared


def phase_of(page: pages.Page) -> str:
  return pages.phases(page)[-1]


def serve(spec: Mapping[str, Any]) -> None:
  """A side's process: says what is ready, then how long so many steps take; 0: what it held."""
  page = _page(spec["page"])
  if spec["cores"]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:spec["cores"]])
  make = ours if spec["side"] == "ours" else theirs
  for answer in make(page, spec, (int(text) for text in sys.stdin)):
    print(json.dumps(answer), flush=True)


def _page(values: Mapping[str, Any]) -> pages.Page:
  return pages.Page(
    {key: _page(value) if isinstance(value, dict) else value for key, value in values.items()})


def ours(page: pages.Page, spec: Mapping, asked: Iterator[int]) -> Iterator[dict[str, Any]]:
  import jax

  from benchmarks import steps
  from medattn_jax import heap, sharding
  from medattn_jax.step import make_train_step

  heap.run_in_caller()
  now = steps.build(page, phase_of(page), jax.devices()[:1])
  device = jax.devices()[0]
  hosts = [steps.host_batches(now, seed) for seed in range(2)]
  state = jax.device_get(now.initial())
  params, stats = torch_weights.drawn(state.params), torch_weights.drawn(state.batch_stats)
  scratch = pathlib.Path(spec["scratch"])
  np.savez(scratch / "weights.npz", **torch_weights.named(page, params, stats))
  flat = lambda x: x.reshape(-1, *x.shape[2:])  # the eyes of a pair beside each other
  for number, (host,) in enumerate(hosts):
    np.savez(scratch / f"batch{number}.npz", image=flat(host["image"]), level=flat(host["level"]))
  yield {"written": scratch.name}
  where = jax.tree.map(lambda x: x.sharding, now.abstract_state)
  state = sharding.place(state.replace(params=params, batch_stats=stats), where)

  def still(variables, image, *, drawn, **options):
    return now.apply(variables, image, drawn=drawn._replace(chance=None), **options)

  step = make_train_step(
    still, now.optimizer, now.mesh, state=now.abstract_state, **now.step_options)
  compiled, seconds = steps.compiled(lambda: step.lower(state, now.put_train(hosts[0])))
  program, compiled = compiled, heap.Kept(compiled)

  def run(state, count):
    """So many steps; batches are uploaded one ahead."""
    ahead, metrics = now.put_train(hosts[0]), None
    for number in range(count):
      batch, ahead = ahead, now.put_train(hosts[(number + 1) % 2])
      state, metrics = compiled(state, batch)
    return jax.block_until_ready((state, metrics))

  losses = []
  for number in range(FIRST):
    state, metrics = compiled(state, now.put_train(hosts[number % 2]))
    losses.append(float(metrics["loss"]))
  begin = time.perf_counter()
  state, _ = run(state, 2)
  flops, fastest = steps.flops(page, phase_of(page)), math.inf
  yield {"losses": losses, "compile_seconds": seconds, "kind": device.device_kind, "flops": flops,
         "step_seconds": (time.perf_counter() - begin) / 2}
  for count in asked:
    if not count:
      held = (device.memory_stats() or {}).get("peak_bytes_in_use")
      held = held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
      # (Read now: before the rounds it would part the heap in which a CPU's step is kept.)
      yield {"memory": held, **steps.efficiency(
        fastest, flops, steps.moved(program.as_text()), 1, steps.ceilings_here(page.precision))}
      continue
    watch = Watch()
    state, _ = run(state, count)
    took = watch.each(count)
    fastest = min(fastest, took["milliseconds"])
    yield took


def theirs(page: pages.Page, spec: Mapping, asked: Iterator[int]) -> Iterator[dict[str, Any]]:
  import torch

  from benchmarks import torch_side

  compiled = spec["compile"] or ("yes" if torch.cuda.is_available() else "no")
  read = {}
  for name in ("weights", "batch0", "batch1"):
    path = pathlib.Path(spec["scratch"]) / f"{name}.npz"
    with np.load(path, allow_pickle=False) as held:
      read[name] = dict(held)
  side = torch_side.Side(
    page, spec["side"], read["weights"], [read["batch0"], read["batch1"]], compiled=compiled,
    channels_last=spec["channels_last"])
  started = side.start(FIRST)
  begin = time.perf_counter()
  side.step(), side.step(), side.wait()
  yield {**started, "kind": side.kind, "compiled": compiled,
         "step_seconds": (time.perf_counter() - begin) / 2}
  for count in asked:
    if not count:
      yield {"memory": side.memory()}
      continue
    side.number = 0
    watch = Watch()
    for _ in range(count):
      side.step()
    side.wait()
    yield watch.each(count)


class Watch:
  """Milliseconds, by the clock and of this process's threads, since it was made."""

  def __init__(self):
    self.clock, self.worked = time.perf_counter(), time.process_time()

  def each(self, count: int) -> dict[str, float]:
    return {"milliseconds": (time.perf_counter() - self.clock) * 1000 / count,
            "processor_ms": (time.process_time() - self.worked) * 1000 / count}


if __name__ == "__main__":
  serve(json.loads(sys.argv[1]))
