"""Which instructions take a step's time, by the device's own clock?

`python -m benchmarks.kernels [--size=small|full] [--models=resnet50,m_net:vgg16,zoom_in_net,…]
[--phase=P] [--batch=N] [--image-size=N] [--steps=4] [--rows=30] [--json] [--plot=FILE]`

A step runs under JAX's profiler. What each kernel took, on a CPU each operation, is booked to the
instruction of the compiled program that it is of, and so to a kind and to a place in the model;
beside it stand the bytes that the instruction moves by the program's text, and how fast that is.
Kernels that are alike are one, under the name of the first; libraries' own within a command buffer
say no more than their kind. On a CPU an operation's time is that of the thread which begins it:
several run at once, and of XLA's own convolutions, which other threads compute, hardly anything is
seen (but most are oneDNN's, see medattn_jax/onednn.py).

Models and batches as benchmarks.step; one device. Needs neither TensorFlow nor config pages.
"""

from __future__ import annotations

import argparse
import collections
import math
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import pages, rows
from medattn_jax.errors import UserError

SIZES = {
  "small": {"models": "resnet_small,demo", "steps": 4, "rows": 12},
  "full": {"models": "resnet50,inception_resnet_v2,zoom_in_net", "steps": 8, "rows": 40},
}
KINDS = ("convolution", "matrix product", "reduction", "elementwise", "copy", "collective", "other")
# Of libraries' kernels, which bear no instruction's name.
_LIBRARY = (
  ("convolution", re.compile(r"fprop|dgrad|wgrad|conv(?!ert)|implicit")),
  ("collective", re.compile(r"nccl", re.IGNORECASE)),
  ("matrix product", re.compile(r"gemm|nvjet|cutlass|xmma")),
  ("copy", re.compile(r"memcpy|memset|transpose", re.IGNORECASE)))
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


class Event(NamedTuple):
  """Of the profile: what ran on a line (a stream, a thread) for so many nanoseconds."""

  line: str
  name: str
  operation: str | None
  start: float
  length: float


class Booked(NamedTuple):
  """All of a step's kernels of one instruction, or of others like it; `moved`: bytes or None."""

  name: str
  kind: str
  direction: str
  place: str
  what: str
  calls: float
  milliseconds: float
  moved: float | None


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", help="with commas between")
  parser.add_argument("--phase", help="of models that have m, a, c; c by default")
  parser.add_argument("--batch", type=rows.count, help="patients of pairs, else images")
  parser.add_argument("--image-size", type=rows.count, help="pixels a side")
  parser.add_argument("--steps", type=rows.count, help="under the profiler")
  parser.add_argument("--rows", type=rows.count, help="instructions to list")
  flags = rows.parsed(parser, SIZES)
  found, texts = [], []
  try:
    for model in flags.models.split(","):
      row, text = measure(model, flags)
      found.append(row)
      texts.append(text)
      print(f"{model}: {row['step_ms']['min']:.1f} ms", file=sys.stderr)
  except UserError as error:
    rows.stop("kernels", error)
  rows.say(found, "\n\n".join(texts), flags.json)
  if flags.plot:
    plot(found, flags.plot)


def measure(model: str, flags: argparse.Namespace) -> tuple[dict[str, Any], str]:
  """A model's line, and its tables."""
  import jax

  from benchmarks import parallel, steps
  from medattn_jax import heap

  heap.run_in_caller()
  batch, size = pages.shape(model, flags.size)
  page = pages.adapted(
    pages.named(model), batch=flags.batch or batch, image_size=flags.image_size or size,
    precision=pages.dtype_here(), accumulation=1)
  known = pages.phases(page)
  phase = flags.phase or known[-1]
  if phase not in known:
    raise UserError(f"--phase={phase}; accepted for {model}: {', '.join(known)}")
  now = steps.build(page, phase, jax.devices()[:1])
  spread = parallel.spread(now, "shard_map")
  state, given = spread.state(jax.device_get(now.initial())), spread.batch(steps.host_batches(now))
  compiled, seconds = steps.compiled(lambda: spread.step.lower(state, given))
  running = steps.Running(compiled, state, given)
  running.run(2)
  times = [running.run(flags.steps) for _ in range(3)]
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      running.run(flags.steps)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    seen = events(path)
  text = compiled.as_text()
  booked = book(seen, text, flags.steps)
  operations, held = steps.flops(page, phase), steps.ceilings_here(page.precision)
  near = steps.efficiency(min(times), operations, steps.moved(text), 1, held)
  row = rows.row(
    "kernels", config=pages.describe(page, phase), devices=1,
    device_kind=jax.devices()[0].device_kind, batch=page.data.batch_size, dtype=page.precision,
    compile_seconds=seconds, milliseconds=times, images=now.images, flops=operations,
    mfu=near.pop("mfu"), asked=model, busy_ms=rows.rounded(sum(b.milliseconds for b in booked)),
    kernels=rows.rounded(sum(b.calls for b in booked)), kinds=shares(booked, "kind"),
    places=shares(booked, "direction", "place"), largest=[
      _rounded(one) for one in booked[: flags.rows]], **near)
  return row, words(row)


def events(path: pathlib.Path) -> list[Event]:
  """What a profile says of its first device: a GPU's streams, a TPU's operations, or a CPU's."""
  import jax

  planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(path)).planes}
  device = min((name for name in planes if re.fullmatch(r"/device:(GPU|TPU):\d+", name)),
               default=None)
  wanted = ("Stream", "XLA Ops") if device else ("",)
  found = []
  for line in planes[device or "/host:CPU"].lines:
    if not line.name.startswith(wanted):
      continue
    for event in line.events:
      operation = dict(event.stats).get("hlo_op")
      if device or operation:
        found.append(Event(line.name, event.name, operation, event.start_ns, event.duration_ns))
  return found


def alone(events: Iterable[Event]) -> list[Event]:
  """The events less what others on their line take within them, as a loop's body does."""
  found = []
  for line in _by(events, lambda one: one.line).values():
    open_ = []  # places in `found` of those that are under way
    for one in sorted(line, key=lambda one: (one.start, -one.length)):
      while open_ and one.start >= open_[-1][1]:
        open_.pop()
      if open_:
        place = open_[-1][0]
        found[place] = found[place]._replace(length=found[place].length - one.length)
      open_.append((len(found), one.start + one.length))
      found.append(one)
  return found


def book(events: Iterable[Event], text: str, steps: int) -> list[Booked]:
  """A step's kernels by the instruction that they are of, the dearest first.

  Args:
    text: of the compiled program.
    steps: so many ran.
  """
  from medattn_jax.programs import places, report, traffic

  program, entry = traffic.parse(text)
  ran = {one.name: (inside, one) for inside, one, _ in traffic.run(program, entry, 1)}
  kernels = {re.sub(r"[.\-]", "_", name): name for name in ran}

  def owner(event):
    """An instruction; or a library's kernel, by its own name."""
    bare = event.name.split(" ")[0].lstrip("%")
    # (What XLA's CPU does by a library of its own has its name behind the instruction's.)
    names = (bare, kernels.get(bare), event.operation, bare.partition("__")[0])
    return next((name for name in names if name in ran), event.name)

  found = []
  for name, some in _by(alone(events), owner).items():
    calls = len(some) / steps
    milliseconds = sum(one.length for one in some) / 1e6 / steps
    if name not in ran:
      kind = next((kind for kind, words in _LIBRARY if words.search(name)), "other")
      found.append(Booked(name, kind, places.REST, "–", "", calls, milliseconds, None))
      continue
    inside, one = ran[name]
    scope = report.scope(one, program)
    direction, place = places.place(scope, 2)
    moved = calls * traffic.bytes_of(program, inside, one).total()
    found.append(Booked(
      name, _kind(program, one), direction, place, scope.rpartition(")/")[2][-60:], calls,
      milliseconds, moved))
  return sorted(found, key=lambda one: -one.milliseconds)


def _kind(program: Any, one: Any) -> str:
  from medattn_jax.programs import report, traffic

  kinds = {one.kind}
  if one.kind == "fusion":
    kinds = {inner.kind for inner in traffic.called(program, one).values()}
  if one.kind == "custom-call":
    target = _TARGET.search(one.rest)
    kinds = {"convolution" if target and "conv" in target.group(1).lower() else "dot"}
  if "convolution" in kinds:
    return "convolution"
  if "dot" in kinds:
    return "matrix product"
  if kinds & {"reduce", "reduce-window", "select-and-scatter"}:
    return "reduction"
  if one.kind.removesuffix("-start").removesuffix("-done") in report.KINDS:
    return "collective"
  if one.kind in ("copy", "copy-start", "copy-done", "transpose", "slice", "concatenate"):
    return "copy"
  return "elementwise"


def _by(items: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
  found = collections.defaultdict(list)
  for one in items:
    found[key(one)].append(one)
  return found


def shares(booked: Sequence[Booked], *fields: str) -> list[dict[str, Any]]:
  """The same gathered by some of their fields, the dearest first."""
  found = []
  for key, some in _by(booked, lambda one: tuple(getattr(one, f) for f in fields)).items():
    known = [one.moved for one in some if one.moved is not None]
    found.append({
      **dict(zip(fields, key, strict=True)), "calls": rows.rounded(sum(one.calls for one in some)),
      "milliseconds": rows.rounded(math.fsum(one.milliseconds for one in some)),
      "moved": sum(known) if len(known) == len(some) else None})
  return sorted(found, key=lambda one: -one["milliseconds"])


def _rounded(one: Booked) -> dict[str, Any]:
  return one._asdict() | {"milliseconds": rows.rounded(one.milliseconds),
                          "calls": rows.rounded(one.calls)}


def words(row: Mapping[str, Any]) -> str:
  """Three tables: kinds, places, and the instructions that take most."""
  busy, copies = row["busy_ms"], row["copy_bytes_per_second"]

  def line(one, *names):
    moved, took = one["moved"], one["milliseconds"]
    rate = 1000 * moved / took if moved is not None and took else None
    return (*names, one["calls"], took, 100 * took / busy, None if moved is None else moved / 1e6,
            rate and rate / 1e9, rate and 100 * rate / copies)

  heads = ("calls", "ms", "%", "MB", "GB/s", "% of copies")
  config = row["config"]
  return "\n\n".join((
    f"{row['asked']} {config['image_size']}², phase {config['phase']}, batch {row['batch']}, "
    f"{row['dtype']} on {row['device_kind']}: a step of {row['step_ms']['min']:.1f} ms, its "
    f"{row['kernels']:.0f} kernels {busy:.1f} ms, its program's roofline "
    f"{row['roofline_ms']:.1f} ms ({row['bound_by']})",
    rows.table(("kind", *heads), [line(one, one["kind"]) for one in row["kinds"]]),
    rows.table(("place", "", *heads), [
      line(one, one["place"], one["direction"]) for one in row["places"][:16]]),
    rows.table(("instruction", "kind", *heads, "of"), [
      (*line(one, one["name"][:44], one["kind"]), f"{one['direction']} {one['what']}")
      for one in row["largest"]])))


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Each model's kernels' time as one bar, by kind."""

  def draw(panel):
    names = [f"{one['asked']}\nphase {one['config']['phase']}, batch {one['batch']}"
             for one in found]
    left = [0.0] * len(found)
    for number, kind in enumerate(KINDS):
      own = [next((k["milliseconds"] for k in one["kinds"] if k["kind"] == kind), 0.0)
             for one in found]
      panel.barh(names, own, left=left, height=0.6, label=kind, color=f"C{number}")
      left = [a + b for a, b in zip(left, own, strict=True)]
    ends = [[i + side for i in range(len(found))] for side in (-0.4, 0.4)]
    panel.vlines([one["step_ms"]["min"] for one in found], *ends, color="0.5", label="the step")
    panel.vlines([one["roofline_ms"] for one in found], *ends, color="black", linestyle="dashed",
                 label="its roofline")
    panel.invert_yaxis()
    panel.set_xlabel(f"milliseconds of a step's kernels, {found[0]['device_kind']}")
    panel.legend(frameon=False, fontsize=8)

  rows.figure(path, 8, 1.6 + 0.8 * len(found), draw)


if __name__ == "__main__":
  main()
