"""Is a training step here as fast as the same step in PyTorch? Both in one run, in turns.

`python -m benchmarks.versus_torch [--size=small|full] [--models=resnet50,…,zoom_in_net]
[--batch=N] [--image-size=N] [--dtype=float32|bfloat16] [--torch-compile=yes|parts|no]
[--cores=N] [--at-once=N] [--check] [--json] [--plot=FILE]`

Forward, backward and update by SGD with momentum; uint8 images, uploaded at each step and
normalised on the device; the same weights, so that the losses of the first steps must agree
(--check exits with 1 where they do not). PyTorch has torchvision's and timm's networks, channels
last, autocast and torch.compile (the latter two on a GPU; on a CPU where asked for). Of Zoom-in-Net
there are two: `users`, with two passes and crops cut by the host, and `best`, on the device in one.
No dropout, augmentation or auxiliary head on either side, and one group of normalisation, as
PyTorch has. Each side is a process of its own; they take turns, and the fastest round counts. The
sides of so many models as --at-once says compile beside one another, and wait for each other. On a
CPU the processor's time of a step is told as well: with --cores=1 it is fair on a machine that is
shared with others, on which threads that wait for one another are slowed most.

Of ours it is also told how near it comes to the machine: its FLOPs at the rate of large matrix
products, and its time over its program's roofline (as benchmarks.step).

Needs torch, torchvision and timm beside JAX; neither TensorFlow nor config pages.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import pages, rows, sides
from medattn_jax.errors import UserError

SIZES = {
  "small": {"models": "resnet_small,resnet18,demo", "rounds": 3, "seconds": 1.5},
  "full": {"models": "resnet50,inception_resnet_v2,inception_v3,densenet121,vgg16,zoom_in_net",
           "rounds": 5, "seconds": 3.0},
}
NEEDED = ("torch", "torchvision", "timm")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", help="with commas between")
  parser.add_argument("--batch", type=rows.count, help="patients of pairs, else images")
  parser.add_argument("--image-size", type=rows.count, help="pixels a side")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 but on a CPU")
  parser.add_argument("--torch-compile", choices=("yes", "parts", "no"),
                      help="as a whole, block by block or not; as a whole but on a CPU")
  parser.add_argument("--torch-layout", choices=("last", "first"), default="last",
                      help="where PyTorch keeps channels")
  parser.add_argument("--cores", type=rows.count, help="of the CPU, for each side; all by default")
  parser.add_argument("--at-once", type=rows.count, default=1, metavar="N",
                      help="models that have room beside one another: for a host of many cores")
  parser.add_argument("--rounds", type=rows.count)
  parser.add_argument("--seconds", type=rows.above_zero, help="of a round, about")
  parser.add_argument("--check", action="store_true", help="exit with 1 where losses differ")
  flags = rows.parsed(parser, SIZES)
  need("versus_torch")
  found = []
  models, many = flags.models.split(","), flags.at_once
  try:
    for first in range(0, len(models), many):
      for one in measure(models[first:first + many], flags):
        found.append(one)
        print(json.dumps(one, allow_nan=False) if flags.json else line(one), flush=True)
  except UserError as error:
    rows.stop("versus_torch", error)
  if not flags.json:
    rows.say(found, table(found), False)
  if flags.plot:
    plot(found, flags.plot)
  apart = [one for one in found if not one["same_losses"]]
  if flags.check and apart:
    sys.exit(1)


def need(benchmark: str) -> None:
  """Ends a benchmark that has no PyTorch to measure."""
  if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
    rows.stop(benchmark, f"{', '.join(missing)} would have to be installed; accepted: "
              "pip install 'medattn_jax[parity]'")


def ways(model: str) -> tuple[str, ...]:
  """What is measured of a model, ours first."""
  return ("ours", "best", "users") if model in pages.PAIRS else ("ours", "torch")


def measure(models: Sequence[str], flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """A line for each side of each model, in the order of `ways`."""
  named = [(model, adapted(model, flags)) for model in models]
  with contextlib.ExitStack() as every:
    started = []
    for model, page in named:
      own = every.enter_context(contextlib.ExitStack())
      scratch = own.enter_context(tempfile.TemporaryDirectory())
      there = {}
      for side in ways(model):  # ours first: it writes the weights that the others read
        there[side] = own.enter_context(child(model, side, page, flags, scratch))
        if flags.at_once == 1:
          there[side].ready  # noqa: B018 (waited for, before another disturbs it)
      started.append((model, page, own, there))
    for *_, there in started:
      for one in there.values():
        one.ready  # noqa: B018
    for model, page, own, there in started:
      with own:
        yield from compared(model, page, there, flags)


def adapted(model: str, flags: argparse.Namespace) -> pages.Page:
  batch, image_size = pages.shape(model, flags.size)
  if model.startswith("m_net"):
    raise UserError(f"--models: {model}; accepted: a backbone, demo, zoom_in_net")
  page = pages.adapted(
    pages.named(model), batch=flags.batch or batch, image_size=flags.image_size or image_size,
    precision=flags.dtype or dtype_here(), accumulation=1)
  return pages.plain(page)


def compared(
  model: str, page: pages.Page, there: Mapping[str, child], flags: argparse.Namespace
) -> Iterator[dict[str, Any]]:
  """The lines of a model whose sides are ready: they take turns."""
  counts = {side: max(1, min(200, math.ceil(flags.seconds / one.ready["step_seconds"])))
            for side, one in there.items()}
  times, worked = ({side: [] for side in there} for _ in range(2))
  for _ in range(flags.rounds):
    for side, one in there.items():
      answer = one.ask(counts[side])
      times[side].append(answer["milliseconds"])
      worked[side].append(answer["processor_ms"])
  held = {side: one.ask(0) for side, one in there.items()}
  memory = {side: one.pop("memory") for side, one in held.items()}
  ours = there["ours"].ready
  images = page.data.batch_size * (2 if model in pages.PAIRS else 1)
  for side, one in there.items():
    layout = {} if side == "ours" else {
      "compiled": one.ready["compiled"], "channels": flags.torch_layout}
    yield rows.row(
      "versus_torch", config={**pages.describe(page, sides.phase_of(page)), "side": side, **layout},
      devices=1, device_kind=one.ready["kind"], batch=page.data.batch_size, dtype=page.precision,
      compile_seconds=one.ready["compile_seconds"], milliseconds=times[side], images=images,
      flops=ours["flops"], mfu=held[side].pop("mfu", None), memory=memory[side], asked=model,
      losses=[rows.rounded(loss, 7) for loss in one.ready["losses"]],
      same_losses=agree(ours["losses"], one.ready["losses"], page.precision),
      ours_over_it=rows.rounded(min(times[side]) / min(times["ours"])),
      processor_ms=rows.spread(worked[side]),
      ours_over_it_in_processor_time=rows.rounded(min(worked[side]) / min(worked["ours"])),
      **held[side])


def agree(ours: Sequence[float], theirs: Sequence[float], precision: str) -> bool:
  """Whether the losses are those of the same work: the first exactly, the later ones nearly."""
  near = (1e-4, 1e-2) if precision == "float32" else (2e-2, 5e-2)
  return all(math.isclose(a, b, rel_tol=near[bool(number)])
             for number, (a, b) in enumerate(zip(ours, theirs, strict=True)))


class child:
  """One side in a process of its own: it is asked for rounds, one at a time."""

  def __init__(self, model: str, side: str, page: pages.Page, flags: Any, scratch: str):
    spec = {"model": model, "side": side, "page": page.to_dict(), "scratch": scratch,
            "compile": flags.torch_compile, "channels_last": flags.torch_layout == "last",
            "cores": flags.cores}
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false",
                       TF_CPP_MIN_LOG_LEVEL="3")
    self.side = side
    self.process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.sides", json.dumps(spec)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
      if side == "ours":
        self._answer()  # that the others find what they read
    except BaseException:
      self.__exit__()
      raise

  @functools.cached_property
  def ready(self) -> dict[str, Any]:
    """What it says when it is ready, waited for."""
    return self._answer()

  def _answer(self) -> dict[str, Any]:
    for text in self.process.stdout:
      if text.startswith("{"):
        return json.loads(text)
    raise UserError(f"{self.side}: its process ended ({self.process.wait()}); what it said is "
                    "above; accepted: a smaller --batch, perhaps")

  def ask(self, steps: int) -> dict[str, Any]:
    print(steps, file=self.process.stdin, flush=True)
    return self._answer()

  def __enter__(self) -> child:
    return self

  def __exit__(self, *_: Any) -> None:
    self.process.stdin.close()
    self.process.wait()
    self.process.stdout.close()


@functools.cache
def dtype_here() -> str:
  """bfloat16 where PyTorch sees a GPU; asked of a child, so that none is held here."""
  code = "import torch; print(torch.cuda.is_available())"
  said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  return "bfloat16" if said.stdout.strip() == "True" else "float32"


def line(one: Mapping[str, Any]) -> str:
  """A row for a reader who waits."""
  return (f"{one['asked']:20} {one['config']['side']:6} {one['images_per_second']:9.1f} images/s, "
          f"{one['step_ms']['min']:8.1f} ms a step, compiled in {one['compile_seconds']:.1f} s")


def table(found: Sequence[Mapping[str, Any]]) -> str:
  """Ours over each way of PyTorch: more than one is faster here."""
  lines = []
  for one in found:
    config = one["config"]
    lines.append((
      f"{one['asked']} {config['image_size']}²", config["side"], one["batch"], one["dtype"],
      one["images_per_second"], one["step_ms"]["min"], one["step_ms"]["median"],
      one["peak_memory_bytes"] / 2**30, one["compile_seconds"],
      *((None, None, 100 * one["ceiling_share"], one["step_over_roofline"])
        if config["side"] == "ours" else
        (one["ours_over_it"], one["ours_over_it_in_processor_time"], None, None)),
      "yes" if one["same_losses"] else "NO"))
  first = found[0]
  return "\n" + f"{first['device_kind']}; the fastest round of each\n" + rows.table(
    ("model", "side", "batch", "dtype", "images/s", "ms", "median", "GiB", "compile s",
     "ours over it", "by processor", "% of matmul", "over roofline", "same losses"), lines)


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Images a second of ours over each way of PyTorch."""
  others = [one for one in found if one["config"]["side"] != "ours"]

  def draw(panel):
    how = {"torch": "", "best": "\nall on the device,\nin one pass",
           "users": "\nas users write it,\ntwo passes"}
    names = [one["asked"] + how[one["config"]["side"]] for one in others]
    bars = panel.bar(names, [one["ours_over_it"] for one in others], width=0.6, color="#4c78a8")
    panel.bar_label(bars, fmt="%.2f", padding=2)
    panel.axhline(1, color="0.3", linewidth=1, linestyle="--")
    panel.annotate("as fast as PyTorch", (0.01, 1), (0, 3), textcoords="offset points",
                   xycoords=("axes fraction", "data"), fontsize=8, color="0.3")
    panel.set_ylabel("images/s here, over PyTorch's")
    compiled = {"yes": "compiled", "parts": "compiled block by block", "no": "not compiled"}[
      others[0]["config"]["compiled"]]
    panel.set_title(
      f"{found[0]['device_kind']}, {found[0]['dtype']}; PyTorch {compiled}", fontsize=10)
    panel.margins(y=0.15)
    panel.tick_params(axis="x", labelsize=8)

  rows.figure(path, max(4.0, 1.3 * len(others) + 1), 3.6, draw)


if __name__ == "__main__":
  main()
