"""How does a training step scale over devices, and what would it cost on many more?

`python -m benchmarks.scaling [--size=small|full] [--model=demo] [--phase=c] [--devices=1,2,4,8]
[--batch=N] [--image-size=N] [--dtype=float32|bfloat16] [--chip=v5e|v5p|v6e|h100|h200]
[--step-ms=T] [--most=256] [--json] [--plot=FILE]`

Weak: each device has --batch; strong: the largest of the weak runs' batches is shared out. On
accelerators both are timed. On a CPU, whose devices are one processor's, nothing is timed: the
programs (compiled with the least effort, as they never run) tell what a device computes, moves and
gives to collectives. "By FLOPs" is one device's FLOPs an image over those of so many.

Then a model, not a measurement, up to --most chips: the time that one chip needs (--step-ms, from
benchmarks.step or benchmarks.aot; else the FLOPs at the data sheet's rate, which is less than any
step takes) and the all-reduce at the data sheet's bandwidths, nothing of it hidden; GPUs in hosts
of eight, between which there is the network alone.

Needs JAX, flax and optax: neither TensorFlow nor config pages.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import pages, rows
from medattn_jax.errors import UserError
from medattn_jax.programs import chips, roofline

SIZES = {"small": {"model": "demo", "batch": 1, "image_size": 64, "rounds": 1, "steps": 1},
         "full": {"model": "zoom_in_net", "batch": None, "image_size": None, "rounds": 10,
                  "steps": 5}}
HOST = 8  # GPUs of a host


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", help="see benchmarks.step")
  parser.add_argument("--phase", help="the last by default")
  parser.add_argument("--devices", default="1,2,4,8", help="as many of these as there are")
  parser.add_argument("--batch", type=rows.count, help="a device's patients of pairs, else images")
  parser.add_argument("--image-size", type=rows.count, help="pixels a side")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 but on a CPU")
  parser.add_argument("--chip", default="v5e", help=f"of the model: {', '.join(chips.CHIPS)}")
  parser.add_argument("--step-ms", type=rows.above_zero, help="that one such chip takes a --batch")
  parser.add_argument("--most", type=rows.count, default=256, help="chips of the model")
  parser.add_argument("--rounds", type=rows.count)
  parser.add_argument("--steps", type=rows.count, help="of a round")
  flags = rows.parsed(parser, SIZES)
  try:
    wanted = chips.target(flags.chip)
    if wanted.sheet is None or wanted.topology:
      raise UserError(f"--chip={flags.chip}; accepted: {', '.join(chips.CHIPS)}")
    found = measure(flags)
    found += modelled(found, flags, wanted)
  except UserError as error:
    rows.stop("scaling", error)
  rows.say(found, table(found), flags.json)
  if flags.plot:
    plot(found, flags.plot)


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
  """A line for each number of devices, weak and strong."""
  from benchmarks import steps

  try:
    counts = sorted({int(one) for one in flags.devices.split(",")})
  except ValueError:
    counts = [0]
  if counts[0] < 1:
    raise UserError(f"--devices={flags.devices}; accepted: numbers with commas between")
  import jax

  steps.split(counts[-1])
  there = len(jax.devices())
  counts = steps.devices(",".join(str(one) for one in counts if one <= there) or "1")
  page = pages.named(flags.model)
  batch, image_size = pages.shape(flags.model, flags.size)
  batch = flags.batch or batch
  found, done = [], {}
  for kind in ("weak", "strong"):
    for count in counts:
      total = batch * (count if kind == "weak" else counts[-1])
      if (count, total) not in done:
        own = pages.adapted(
          page, devices=count, batch=total, accumulation=1,
          image_size=flags.image_size or image_size, precision=flags.dtype or pages.dtype_here())
        done[count, total] = one_of(own, count, flags)
      found.append({**done[count, total], "scaling": kind})
  timed = found[0]["step_ms"] is not None
  for one in found:
    first = next(other for other in found if other["scaling"] == one["scaling"])
    one["efficiency"] = rows.rounded(
      one["images_per_second"] / one["devices"]
      / (first["images_per_second"] / first["devices"])) if timed else None
    one["flops_efficiency"] = rows.rounded(
      first["flops_per_step"] / first["batch"] / (one["flops_per_step"] / one["batch"]))
  return found


def one_of(page: pages.Page, count: int, flags: argparse.Namespace) -> dict[str, Any]:
  import jax

  from benchmarks import steps
  from medattn_jax.programs import report

  now = steps.build(page, flags.phase, jax.devices()[:count])
  timed = jax.devices()[0].platform != "cpu"
  compiled, seconds = steps.compiled(now.lower_train_step, run=timed)
  read, times = report.read(compiled), []
  if timed:
    running = steps.Running(compiled, now.initial(), now.put_train(steps.host_batches(now)))
    running.run(3)
    times = [running.run(flags.steps) for _ in range(flags.rounds)]
  flops, held = steps.flops(page, now.phase, count), None
  if times:
    held = steps.efficiency(min(times), flops, None, count, steps.ceilings_here(page.precision))
  return rows.row(
    "scaling", config=pages.describe(page, now.phase), devices=count,
    device_kind=jax.devices()[0].device_kind, batch=page.data.batch_size, dtype=page.precision,
    compile_seconds=seconds, milliseconds=times, images=now.images, flops=flops,
    mfu=held and held["mfu"], memory=read.peak, collectives=read.counts, wire_bytes=read.wire,
    synchronous=sum(one.synchronous for one in read.collectives),
    vector_bytes=vector_bytes(now), flops_per_device=flops / count,
    bytes_per_device=steps.moved(compiled.as_text()))


def vector_bytes(now: Any) -> int:
  """Bytes of the one vector that the devices join in a step, were there more than one."""
  import jax

  state = now.abstract_state
  trees = [(state.params[name], state.batch_stats.get(name, {})) for name in now.trained]
  sums = 4  # of the loss, its weight, the hits and the images
  return 4 * (sum(x.size for x in jax.tree.leaves(trees)) + sums)


def modelled(
  found: Sequence[Mapping[str, Any]], flags: argparse.Namespace, wanted: chips.Target
) -> list[dict[str, Any]]:
  """A line for each power of two of chips, each with the batch of a device: a model."""
  own = [one for one in found if one["scaling"] == "weak"]
  largest, chip = own[-1], wanted.sheet
  each = largest["flops_per_step"] / largest["devices"]
  alone = flags.step_ms / 1000 if flags.step_ms else each / chip.flops
  images = largest["batch"] // largest["devices"]
  images *= 2 if largest["config"]["model"] != "global_attention" else 1
  wire, lines, count = largest["vector_bytes"], [], 1
  while count <= flags.most:
    hosts = max(1, count // HOST) if wanted.gpu else 1
    joined = roofline.reduced(wire, count, chip, hosts) + (roofline.LAUNCH if count > 1 else 0.0)
    seconds = alone + joined
    lines.append({
      **rows.row(
        "scaling_model", config=largest["config"], devices=count, device_kind=wanted.chip,
        batch=count * largest["batch"] // largest["devices"], dtype=largest["dtype"],
        flops=count * each),
      "images_per_second": rows.rounded(images * count / seconds),
      "chip": wanted.chip, "model": True, "step_ms_of_one": rows.rounded(1000 * alone),
      "one_from": "--step-ms" if flags.step_ms else "FLOPs at the data sheet's rate",
      "all_reduce_ms": rows.rounded(1000 * joined), "wire_bytes": wire,
      "efficiency": rows.rounded(alone / seconds)})
    count *= 2
  return lines


def table(found: Sequence[Mapping[str, Any]]) -> str:
  measured = [one for one in found if one["name"] == "scaling"]
  first, config = measured[0], measured[0]["config"]
  lines = []
  for one in measured:
    counts = ", ".join(f"{count} {kind}" for kind, count in one["collectives"].items()) or "none"
    moved = one["bytes_per_device"]
    lines.append((
      one["scaling"], one["devices"], one["batch"], one["step_ms"] and one["step_ms"]["min"],
      one["images_per_second"], one["efficiency"], one["flops_efficiency"], counts,
      sum(one["wire_bytes"].values()) / 1e6, one["flops_per_device"] / 1e9,
      None if moved is None else moved / 1e9, one["peak_memory_bytes"] / 2**20))
  text = (f"{config['model']} {config['backbone']} {config['image_size']}², phase "
          f"{config['phase']}, {first['dtype']}, {first['device_kind']}\n" + rows.table(
            ("scaling", "devices", "batch", "ms", "images/s", "efficiency", "by FLOPs",
             "collectives", "MB given", "GFLOP a device", "GB a device", "peak MiB"), lines))
  if first["step_ms"] is None:
    text += "\nA CPU's devices share its cores, so nothing is timed: read from the programs alone."
  modelled = [one for one in found if one["name"] == "scaling_model"]
  if modelled:
    one = modelled[0]
    text += (f"\n\nA MODEL of {one['chip']}, not measured: one chip needs {one['step_ms_of_one']} "
             f"ms ({one['one_from']}), nothing of the all-reduce hidden\n" + rows.table(
               ("scaling", "chips", "batch", "all-reduce ms", "images/s", "efficiency"),
               [("weak", line["devices"], line["batch"], line["all_reduce_ms"],
                 line["images_per_second"], line["efficiency"]) for line in modelled]))
    if modelled[-1]["efficiency"] < 0.5:
      text += ("\nIn a step as short as this the all-reduce is all there is: take a real one, by "
               "--size=full or --step-ms.")
  return text


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Efficiency by devices: measured where it was, else by FLOPs alone, and the model."""
  by, how = (("flops_efficiency", "by FLOPs alone") if found[0]["step_ms"] is None else
             ("efficiency", "measured"))

  def draw(panel):
    for kind, colour in (("weak", "#4c78a8"), ("strong", "#54a24b")):
      own = [one for one in found if one.get("scaling") == kind]
      panel.plot([one["devices"] for one in own], [one[by] for one in own], "o-", color=colour,
                 label=f"{kind}, {how}")
    lines = [one for one in found if one["name"] == "scaling_model"]
    if lines:
      panel.plot([one["devices"] for one in lines], [one["efficiency"] for one in lines], "o--",
                 color="#f58518", label=f"weak, a model of {lines[0]['chip']},\n"
               f"{rows.shown(lines[0]['step_ms_of_one'])} ms a step alone")
    panel.set(xscale="log", xlabel="devices", ylabel="efficiency of a device, over one alone")
    panel.set_xscale("log", base=2)
    ticks = sorted({one["devices"] for one in found})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_ylim(0, 1.05)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    config = found[0]["config"]
    panel.set_title(f"{config['backbone']} {config['image_size']}², phase {config['phase']}",
                    fontsize=10)

  rows.figure(path, 6.8, 3.4, draw)


if __name__ == "__main__":
  main()
