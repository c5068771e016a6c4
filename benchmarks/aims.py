"""Does this machine reach what docs/performance.md aims at? All of it in one command.

`python -m benchmarks.aims [--size=small|full] [--models=inception_resnet_v2,…] [--minutes=30]
[--check] [--json] [--plot=FILE]`

benchmarks.versus_torch measures one model after another, small for two cores, full for a card, the
aims that matter most first; what it says is held against them. When the minutes are over, what was
not measured is said to be so: a card that is lent for a quarter of an hour answers what it can.
--check exits with 1 unless all was measured and reached.

Needs what benchmarks.versus_torch needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import rows, versus_torch


class Aim(NamedTuple):
  """A figure of a line of versus_torch, and what it is to be: `at_least`, or at most, `bound`."""

  side: str
  figure: str
  bound: float
  at_least: bool = True

  def __str__(self) -> str:
    what = {"ours_over_it": f"over PyTorch ({self.side})", "mfu": "MFU",
            "step_over_roofline": "step over its roofline"}[self.figure]
    return f"{what} {'≥' if self.at_least else '≤'} {self.bound:g}"


_NEAR = Aim("ours", "step_over_roofline", 1.25, at_least=False)
# Of a size: by model, what versus_torch is told besides, and what is aimed at.
AIMS = {
  "small": {
    "demo": ([], (Aim("best", "ours_over_it", 1.0), Aim("users", "ours_over_it", 1.0))),
    "resnet_small": ([], (Aim("torch", "ours_over_it", 1.0),)),
    "resnet18": ([], (Aim("torch", "ours_over_it", 1.0),)),
  },
  "full": {
    # At 32 its kernels are too small to fill a card; as a whole PyTorch compiles it for minutes.
    "inception_resnet_v2": (["--batch=128", "--torch-compile=parts"], (
      Aim("torch", "ours_over_it", 1.25), Aim("ours", "mfu", 0.25), _NEAR)),
    "zoom_in_net": (["--torch-compile=parts"], (
      Aim("users", "ours_over_it", 2.0), Aim("best", "ours_over_it", 1.3), _NEAR)),
    "resnet50": ([], (Aim("torch", "ours_over_it", 1.15), _NEAR)),
    "vgg16": ([], (Aim("ours", "mfu", 0.5), _NEAR)),
  },
}
_ROUNDS = {"small": [], "full": ["--seconds=1", "--rounds=5"]}  # of a card 20 steps or more


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", help="with commas between; all of the size by default")
  parser.add_argument("--minutes", type=rows.above_zero, default=30.0,
                      help="after these nothing is measured")
  parser.add_argument("--check", action="store_true", help="exit with 1 where an aim is missed")
  flags = rows.parsed(parser, {size: {} for size in AIMS})
  known = AIMS[flags.size]
  models = flags.models.split(",") if flags.models else list(known)
  for model in models:
    if model not in known:
      rows.stop("aims", f"--models: {model}; accepted at --size={flags.size}: {', '.join(known)}")
  versus_torch.need("aims")
  end, found, lines = time.monotonic() + 60 * flags.minutes, [], []
  for model in models:
    told, aims = known[model]
    told = [f"--size={flags.size}", *_ROUNDS[flags.size], *told]
    here, why = measured(model, told, end - time.monotonic())
    for one in here:
      print(json.dumps(one) if flags.json else versus_torch.line(one), flush=True)
    found += judged(model, aims, here, why)
    lines += here
  if not flags.json:
    rows.say(lines, "\n" + table(found), False)
  rows.say(found, "", True)
  if flags.plot:
    plot(found, flags.plot)
  if flags.check and not all(one["reached"] for one in found):
    sys.exit(1)


def measured(
  model: str, told: Sequence[str], seconds: float
) -> tuple[list[dict[str, Any]], str | None]:
  """versus_torch's lines of a model, and why there are none: no time was left, or it failed."""
  if seconds <= 0:
    return [], "no time was left"
  # On many cores both sides compile beside each other; on few one disturbs the other.
  many = [f"--at-once={2 if (os.cpu_count() or 1) >= 8 else 1}"]
  child = subprocess.Popen(
    [sys.executable, "-m", "benchmarks.versus_torch", f"--models={model}", "--json", *many, *told],
    stdout=subprocess.PIPE, text=True, start_new_session=True)
  try:
    said, _ = child.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    return [], f"not done within {seconds:.0f} s"
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(child.pid, signal.SIGKILL)  # and the sides with it
    child.wait()
  if child.returncode:
    return [], f"versus_torch ended with {child.returncode}"
  return [json.loads(line) for line in said.splitlines()], None


def judged(
  model: str, aims: Iterable[Aim], lines: Iterable[Mapping[str, Any]], why: str | None
) -> list[dict[str, Any]]:
  """A line for each aim, that of its side and what it is held against.

  `found` and `reached` are None where nothing was measured.

  Raises:
    KeyError: versus_torch has no such side.
  """
  sides = {line["config"]["side"]: line for line in lines}
  nothing = rows.row("aims", config={"model": model}, devices=1, device_kind=None, batch=None,
                     dtype=None)
  told = []
  for aim in aims:
    line = sides[aim.side] if sides else nothing
    found = line.get(aim.figure)
    reached = operator.ge if aim.at_least else operator.le
    told.append({
      **line, "name": "aims", "asked": model, "aim": str(aim), "bound": aim.bound, "found": found,
      "reached": None if found is None else reached(found, aim.bound),
      "over_bound": None if found is None else rows.rounded(
        found / aim.bound if aim.at_least else aim.bound / found),
      "same_losses": all(one["same_losses"] for one in sides.values()) if sides else None,
      "why": why})
  return told


def table(found: Iterable[Mapping[str, Any]]) -> str:
  words = {True: "yes", False: "NO"}
  return rows.table(("model", "aim", "found", "reached", "same losses"), [
    (one["asked"], one["aim"], one["found"],
     words.get(one["reached"], f"not measured: {one['why'] or 'a CPU has none'}"),
     words.get(one["same_losses"])) for one in found])


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Each figure over its bound, or its bound over it where less is better: 1 reaches the aim."""
  known = [one for one in found if one["found"] is not None][::-1]

  def draw(panel):
    names = [f"{one['asked']}: {one['aim']}" for one in known]
    colours = ["#54a24b" if one["reached"] else "#e45756" for one in known]
    bars = panel.barh(names, [one["over_bound"] for one in known], height=0.6, color=colours)
    panel.bar_label(bars, [rows.shown(one["found"]) for one in known], padding=3)
    panel.axvline(1, color="0.3", linewidth=1, linestyle="--")
    panel.set_xlabel("found over aimed at (inverted where less is better)")
    panel.margins(x=0.12)

  rows.figure(path, 8.0, 0.4 * len(known) + 1.2, draw)


if __name__ == "__main__":
  main()
