"""What do the devices say to each other in a step? Counted in the programs compiled for 1, 2, 8.

`python -m benchmarks.collectives [--config=FILE [--phases=P,…] [--config.KEY=VALUE …]]
[--devices=1,2,8] [--json] [--plot=FILE]`

Compiles the train step of every phase for so many devices of a CPU (a process for each page) and
counts: collectives, their kinds and bytes, those in a loop or a branch, the donated buffers of the
state, temporaries. Without --config: tiny networks of the shipped pages, every model and phase
(Zoom-in-Net m, a, c; M-Net; global attention joint, frozen). Exits with 1 where a step holds more
than one all-reduce of gradients and one of the map, another kind, one in a loop, or where a leaf of
the state that the step reads is not donated. The numbers are a CPU's: TPUs and GPUs join gradients
in a few all-reduces (medattn_jax/joining.py; benchmarks.aot tells). --size=small, and no other, is
what runs without --config: 18 programs in some 45 seconds of a processor. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import rows
from medattn_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
_SMALL = {
  "model.backbone": "resnet_local", "model.crop_backbone": "resnet_local",
  "model.neck_features": "8", "model.attention_features": "8", "model.crop_size": "32",
  "model.mask_size": "8", "data.full_size": "48", "data.image_size": "32", "data.batch_size": "8",
  "norm.group_size": "2"}
# Each a page and what of it is made small.
PAGES = (
  ("zoom_in_net", "smoke.py", {
    **_SMALL, "model.local_width": "0.0", "augment.dihedral": "False",
    **{f"phases.{phase}.{key}": value for phase in "mac"
       for key, value in (("optimizer", "sgd"), ("accumulation", "2" if phase == "a" else "1"))}}),
  ("m_net", "paper/eyepacs_m_net.py", {**_SMALL, "phases.joint.accumulation": "1"}),
  ("global_attention", "planted_region.py", {
    "data.full_size": "24", "data.image_size": "24", "data.batch_size": "16",
    "data.synthetic.train": "40", "norm.group_size": "2"}),
)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], allow_abbrev=False,
    epilog="--config.KEY=VALUE changes a key of the page")
  parser.add_argument("--config", metavar="FILE", help="tiny networks of the shipped pages without")
  parser.add_argument("--size", choices=["small"], default="small", help="without --config")
  parser.add_argument("--phases", help="of --config, with commas between; all by default")
  parser.add_argument("--devices", default="1,2,8", help="numbers, with commas between")
  parser.add_argument("--plot", type=rows.drawn, metavar="FILE", help="bytes that are summed")
  parser.add_argument("--json", action="store_true", help="the JSON lines alone")
  flags, rest = parser.parse_known_args()
  try:
    found = list(measure(flags, rest))
  except UserError as error:
    rows.stop("collectives", error)
  rows.say(found, table(found), flags.json)
  if flags.plot:
    plot(found, flags.plot)
  broken = [line for row in found for line in faults(row)]
  for line in broken:
    print(line, file=sys.stderr)
  sys.exit(bool(broken))


def measure(flags: argparse.Namespace, rest: Sequence[str]) -> Iterator[dict[str, Any]]:
  """A row for each page, phase and number of devices."""
  from medattn_jax import cli, config, experiment
  from medattn_jax.programs import apart, chips

  counts = flags.devices.split(",")
  if not all(word.isdecimal() and int(word) for word in counts):
    raise UserError(f"--devices={flags.devices}; accepted: numbers from 1 on, with commas")
  counts = sorted({int(word) for word in counts})
  if flags.config:
    pages = [(flags.config, config.load_page(flags.config, cli.overrides(rest)))]
  elif flags.phases or rest:
    raise UserError(f"{(flags.phases and '--phases') or rest[0]}: accepted with --config=FILE")
  else:
    pages = [(name, config.load_page(str(CONFIGS / file), list(changed.items())))
             for name, file, changed in PAGES]
  target = chips.target(f"cpu:{counts[-1]}")
  for name, page in pages:
    experiment.check(page, counts[-1])
    known = experiment.phases(page)
    phases = flags.phases.split(",") if flags.phases else known
    for phase in phases:
      if phase not in known:
        raise UserError(f"--phases={phase}; accepted for {page.model.name}: {', '.join(known)}")
    yield from apart.run(compiled, name, config.to_dict(page), phases, counts, target=target)


def compiled(
  name: str, values: Mapping[str, Any], phases: Sequence[str], counts: Sequence[int]
) -> list[dict[str, Any]]:
  """In a process of its own: what the steps of a page hold, a row for each number of devices."""
  import jax

  from medattn_jax import config, experiment, forecast
  from medattn_jax.programs import chips

  page, found = config.from_dict(values), []
  for phase in phases:
    print(f"compiling {name} {phase} …", file=sys.stderr, flush=True)
    for count in counts:
      devices = jax.devices()[:count]
      read = forecast.here(page, phase, chips.Target(chips.CPU, str(count)), devices)
      common, own = experiment.build(page, phase, devices).common, read.row()
      found.append(rows.row(
        "collectives", config={"page": name, "model": page.model.name, "phase": phase},
        devices=count, device_kind=read.kind, batch=page.data.batch_size, dtype=read.dtype,
        compile_seconds=read.lowering + read.compiling,
        flops=read.flops and count * read.flops, memory=read.needs,
        # The map is summed over the devices where its pixels' classifier is spread over them.
        allowed=2 if common and common.reads else 1,
        **{key: own[key] for key in (
          "collectives", "inside", "wire_bytes", "donated", "leaves", "unread", "temporaries")}))
  return found


def faults(row: Mapping[str, Any]) -> list[str]:
  """What of a row must not be, in words."""
  config = row["config"]
  where = f"{config['page']}, phase {config['phase']}, {row['devices']} devices"
  found = []
  reduces = row["collectives"].get("all-reduce", 0)
  if reduces > row["allowed"]:
    found.append(f"{where}: {reduces} all-reduces, {row['allowed']} accepted")
  others = {kind: n for kind, n in row["collectives"].items() if kind != "all-reduce"}
  if others:
    found.append(f"{where}: {', '.join(f'{n} {kind}' for kind, n in others.items())}")
  if row["inside"]:
    found.append(f"{where}: {row['inside']} collectives in a loop or a branch")
  read = row["leaves"] - row["unread"]
  if row["donated"] < read:
    found.append(f"{where}: of the state's {read} leaves that it reads, {row['donated']} donated")
  return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
  lines = []
  for row in found:
    kinds = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "none"
    sizes = ", ".join(f"{n:,} {kind}" for kind, n in row["wire_bytes"].items()) or None
    lines.append((
      row["config"]["page"], row["config"]["phase"], row["devices"], kinds, sizes, row["inside"],
      f"{row['donated']} of {row['leaves'] - row['unread']}", row["temporaries"] / 1e6,
      row["compile_seconds"]))
  return rows.table(
    ("page", "phase", "devices", "collectives", "bytes", "in a loop", "leaves donated",
     "temporaries MB", "compile s"), lines)


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Bytes that a device gives to the collectives of each step, and how many these are."""
  several = [row for row in found if row["devices"] > 1] or found

  def draw(panel):
    names = [f"{row['config']['page']}, {row['config']['phase']}, {row['devices']} devices"
             for row in several]
    sizes = [sum(row["wire_bytes"].values()) / 1e6 for row in several]
    bars = panel.barh(names, sizes, height=0.6, color="#4c78a8")
    kinds = [", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "none"
             for row in several]
    panel.bar_label(bars, kinds, padding=3, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.25)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_xlabel("MB that a device gives to a step's collectives")

  rows.figure(path, 7, 1 + 0.32 * len(several), draw)


if __name__ == "__main__":
  main()
