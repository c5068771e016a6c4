"""How long does a training step take, and how near is it to what the machine can do?

`python -m benchmarks.step [--size=small|full] [--models=resnet50,m_net:vgg16,zoom_in_net,…]
[--phases=m,a,c] [--dtypes=float32,bfloat16] [--batch=N] [--image-size=N] [--devices=1,2]
[--parallel=shard_map,vector,jit,pmap] [--json] [--plot=FILE]`

A model is a backbone (a classifier of single images), m_net:BACKBONE, or a page by its name (demo,
zoom_in_net, zoom_in_net_fast) with its phases. Batches are those of a device. The ways of
--parallel take turns in one run. FLOPs are XLA's count of the lowered program; bytes are read off
the compiled one. The roofline is the longer of the FLOPs at the rate of this device's own matrix
products and the bytes at the rate of its own copies, both measured here: a step cannot be faster
than its program's roofline, but where caches spare it bytes, and on a CPU where oneDNN, which it
calls, multiplies faster than the products measured here. mfu is the FLOPs' share of that matmul
ceiling (null on a CPU); data_sheet_share of the chip's data sheet.

Needs JAX, flax and optax: neither TensorFlow nor config pages.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import pages, rows
from medattn_jax.errors import UserError

SIZES = {
  "small": {"models": "resnet_small,demo", "rounds": 3, "steps": 1},
  "full": {"models": "resnet50,inception_resnet_v2,inception_v3,densenet121,vgg16,"
                     "m_net:inception_resnet_v2,zoom_in_net", "rounds": 20, "steps": 5},
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", help="with commas between")
  parser.add_argument("--phases", default="m,a,c", help="of models that have them")
  parser.add_argument("--dtypes", help="float32, bfloat16; bfloat16 but on a CPU")
  parser.add_argument("--batch", type=rows.count, help="a device's patients of pairs, else images")
  parser.add_argument("--image-size", type=rows.count, help="pixels a side")
  parser.add_argument("--accumulation", type=rows.count, default=1, help="small batches of a step")
  parser.add_argument("--devices", help="how many, with commas between; all of an accelerator's")
  parser.add_argument("--parallel", default="shard_map", help="shard_map, vector, jit, pmap")
  parser.add_argument("--rounds", type=rows.count)
  parser.add_argument("--steps", type=rows.count, help="of a round")
  flags = rows.parsed(parser, SIZES)
  from benchmarks import steps

  found = []
  try:
    flags.devices = steps.devices(flags.devices)
    for case in cases(flags):
      own = measure(*case, flags)
      found += own
      print(f"{case[0]} {case[2]}: {own[0]['step_ms']['min']:.1f} ms", file=sys.stderr)
  except UserError as error:
    rows.stop("step", error)
  rows.say(found, table(found), flags.json)
  if flags.plot:
    plot(found, flags.plot)


def cases(flags: argparse.Namespace) -> Iterator[tuple[str, pages.Page, str, int]]:
  """(model, page, phase, devices) of each measurement."""
  phases = flags.phases.split(",")
  if strange := set(phases) - {"m", "a", "c"}:
    raise UserError(f"--phases: {', '.join(sorted(strange))}; accepted: m, a, c")
  for model in flags.models.split(","):
    page, (batch, image_size) = pages.named(model), pages.shape(model, flags.size)
    for precision in (flags.dtypes or pages.dtype_here()).split(","):
      if precision not in ("float32", "bfloat16"):
        raise UserError(f"--dtypes: {precision}; accepted: float32, bfloat16")
      for count in flags.devices:
        own = pages.adapted(
          page, devices=count, batch=count * (flags.batch or batch), precision=precision,
          image_size=flags.image_size or image_size, accumulation=flags.accumulation)
        for phase in ("joint",) if "joint" in page.phases else phases:
          yield model, own, phase, count


def measure(
  model: str, page: pages.Page, phase: str, count: int, flags: argparse.Namespace
) -> list[dict[str, Any]]:
  """A line for each way of --parallel; they take turns."""
  import jax

  from benchmarks import parallel, steps
  from medattn_jax.programs import report

  now = steps.build(page, phase, jax.devices()[:count])
  start, batches = jax.device_get(now.initial()), steps.host_batches(now)
  running, programs = {}, {}
  for way in flags.parallel.split(","):
    spread = parallel.spread(now, way)
    state, batch = spread.state(start), spread.batch(batches)
    compiled, seconds = steps.compiled(
      lambda: spread.step.lower(state, batch), alone=way != "jit")  # noqa: B023
    programs[way] = (compiled, seconds)
    running[way] = steps.Running(compiled, state, batch)
    running[way].run(2)
  times = {way: [] for way in running}
  for _ in range(flags.rounds):
    for way, one in running.items():
      times[way].append(one.run(flags.steps))
  operations, held = steps.flops(page, phase, count), steps.ceilings_here(page.precision)
  found = []
  for way, (compiled, seconds) in programs.items():
    read = report.read(compiled)
    near = steps.efficiency(
      min(times[way]), operations, steps.moved(compiled.as_text()), count, held)
    found.append(rows.row(
      "step", config={**pages.describe(page, phase), "parallel": way}, devices=count,
      device_kind=jax.devices()[0].device_kind, batch=page.data.batch_size, dtype=page.precision,
      compile_seconds=seconds, milliseconds=times[way], images=now.images, flops=operations,
      mfu=near.pop("mfu"), memory=read.peak, asked=model, steps=flags.rounds * flags.steps,
      collectives=read.counts, **near))
  return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
  first = found[0]
  lines = []
  for one in found:
    config = one["config"]
    lines.append((
      f"{one['asked']} {config['image_size']}²", config["phase"], one["dtype"], one["devices"],
      one["batch"], config["parallel"], one["compile_seconds"], one["step_ms"]["min"],
      one["step_ms"]["median"], one["images_per_second"], one["flops_per_step"] / 1e9,
      None if one["bytes_per_device"] is None else one["bytes_per_device"] / 1e9,
      100 * one["ceiling_share"],
      None if one["data_sheet_share"] is None else 100 * one["data_sheet_share"],
      one["roofline_ms"], one["step_over_roofline"], one["peak_memory_bytes"] / 2**30))
  return (
    f"{first['device_kind']}: matrix products {first['matmul_flops_per_second'] / 1e12:.3g} "
    f"TFLOP/s, copies {first['copy_bytes_per_second'] / 1e9:.3g} GB/s, both measured\n"
    + rows.table(
      ("model", "phase", "dtype", "devices", "batch", "parallel", "compile s", "ms", "median",
       "images/s", "GFLOP", "GB a device", "% of matmul", "% of sheet", "roofline ms",
       "over it", "GiB"), lines))


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Milliseconds of each step beside its program's roofline, and where it lies under the roof."""
  colours = [f"C{place % 10}" for place in range(len(found))]

  def times(panel):
    names = [f"{number}. {one['asked']}, phase {one['config']['phase']}\n"
             f"{one['config']['parallel']}, {one['dtype']}, {one['devices']} "
             f"device{'s' * (one['devices'] > 1)} × {one['batch'] // one['devices']}"
             for number, one in enumerate(found, 1)]
    panel.barh(names, [one["step_ms"]["min"] for one in found], height=0.6, color=colours)
    panel.barh(names, [one["roofline_ms"] for one in found], height=0.2, color="0.15",
               label="its roofline, % of the time")
    for place, one in enumerate(found):
      panel.annotate(f"{rows.shown(one['images_per_second'])} images/s, "
                     f"{100 * one['roofline_ms'] / one['step_ms']['min']:.0f} %",
                     (max(one["step_ms"]["min"], one["roofline_ms"]), place), (4, 0),
                     textcoords="offset points", va="center", fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("ms a step")
    panel.margins(x=0.35)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_title(found[0]["device_kind"], fontsize=10, loc="left")
    panel.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))

  def roof(panel):
    from matplotlib import ticker

    places, heights = [], []
    for number, (one, colour) in enumerate(zip(found, colours, strict=True), 1):
      share, moved = one["flops_per_step"] / one["devices"], one["bytes_per_device"]
      if not moved:
        continue
      reached, bound = (share / ms / 1e9 for ms in (one["step_ms"]["min"], one["roofline_ms"]))
      panel.plot([share / moved] * 2, [reached, bound], ":", color=colour, linewidth=1)
      panel.plot(share / moved, reached, "o", color=colour)
      panel.annotate(number, (share / moved, reached), (5, -8), textcoords="offset points",
                     fontsize=8, color=colour)
      places.append(share / moved)
      heights.append(reached)
    roofs = {(one["matmul_flops_per_second"], one["copy_bytes_per_second"]) for one in found}
    for top, slope in sorted(roofs):
      ends = min([top / slope, *places]) / 2, max([top / slope, *places]) * 2
      heights += [ends[0] * slope / 1e12, top / 1e12]
      panel.plot([ends[0], top / slope, ends[1]], [heights[-2], heights[-1], heights[-1]],
                 color="0.15", linewidth=1.2,
                 label=f"products {top / 1e12:.3g} TFLOP/s, copies {slope / 1e9:,.0f} GB/s")
    panel.set(xscale="log", yscale="log", ylim=(min(heights) / 2, max(heights) * 1.5))
    for axis in (panel.xaxis, panel.yaxis):
      axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
      axis.set_minor_locator(ticker.NullLocator())
    panel.set_xlabel("floating-point operations a byte moved")
    panel.set_ylabel("TFLOP/s of a device")
    panel.legend(frameon=False, fontsize=8, loc="lower right")
    panel.set_title("under the roof of this device's measured rates", fontsize=10)

  rows.figure(path, 11.5, max(3.6, 1.2 + 0.5 * len(found)), times, roof)


if __name__ == "__main__":
  main()
