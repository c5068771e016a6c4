"""What do the devices say to each other in a step? Counted in the programs compiled for 1, 2, 8.

`python -m benchmarks.collectives [--config=FILE [--phases=P,…] [--config.KEY=VALUE …]]
[--devices=1,2,8] [--json]`

Compiles the train step of every phase for so many devices of a CPU (a process for each phase) and
counts: collectives, their kinds and bytes, those in a loop or a branch, the donated buffers of the
state, temporaries. Without --config: tiny networks of the shipped pages, every model and phase
(Zoom-in-Net m, a, c; M-Net; global attention joint, frozen). Exits with 1 where a step holds more
than one all-reduce of gradients and one of the map, another kind, one in a loop, or where a leaf of
the state that the step reads is not donated. The bytes are a CPU's: TPUs and GPUs may carry
gradients in other dtypes (benchmarks.aot tells).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

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
  parser.add_argument("--json", action="store_true", help="the JSON lines alone")
  flags, rest = parser.parse_known_args()
  try:
    rows = measure(flags, rest)
  except UserError as error:
    print(f"benchmarks.collectives: {error}", file=sys.stderr)
    sys.exit(2)
  if not flags.json:
    print(table(rows))
  for row in rows:
    print(json.dumps(row, allow_nan=False))
  broken = [line for row in rows for line in faults(row)]
  for line in broken:
    print(line, file=sys.stderr)
  sys.exit(bool(broken))


def measure(flags: argparse.Namespace, rest: Sequence[str]) -> list[dict[str, Any]]:
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
  rows = []
  for name, page in pages:
    experiment.check(page, counts[-1])
    known = experiment.phases(page)
    phases = flags.phases.split(",") if flags.phases else known
    for phase in phases:
      if phase not in known:
        raise UserError(f"--phases={phase}; accepted for {page.model.name}: {', '.join(known)}")
      print(f"compiling {name} {phase} …", file=sys.stderr, flush=True)
      target = chips.target(f"cpu:{counts[-1]}")
      for found in apart.run(compiled, config.to_dict(page), phase, counts, target=target):
        rows.append({"name": "collectives", "config": name, "model": page.model.name, **found})
  return rows


def compiled(values: Mapping[str, Any], phase: str, counts: Sequence[int]) -> list[dict[str, Any]]:
  """In a process of its own: what the step of a phase holds, for each number of devices."""
  import jax

  from medattn_jax import config, experiment, forecast
  from medattn_jax.programs import chips

  page, rows = config.from_dict(values), []
  for count in counts:
    devices = jax.devices()[:count]
    row = forecast.here(page, phase, chips.Target(chips.CPU, str(count)), devices).row()
    common = experiment.build(page, phase, devices).common
    rows.append({
      "phase": phase, "devices": count, "batch": row["batch"],
      # The map is summed over the devices where its pixels' classifier is spread over them.
      "allowed": 2 if common and common.reads else 1,
      **{key: row[key] for key in ("collectives", "inside", "wire_bytes", "donated", "leaves",
                                   "unread", "temporaries", "compile_seconds")}})
  return rows


def faults(row: Mapping[str, Any]) -> list[str]:
  """What of a row must not be, in words."""
  where = f"{row['config']}, phase {row['phase']}, {row['devices']} devices"
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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  wide = max(len(row["config"]) for row in rows)
  lines = [f"{'page':{wide}}  phase   devices  collectives{'bytes':>22}  in a loop      donated"
           "  temporaries"]
  for row in rows:
    kinds = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "none"
    sizes = ", ".join(f"{n:,} {kind}" for kind, n in row["wire_bytes"].items())
    lines.append(
      f"{row['config']:{wide}}  {row['phase']:6}  {row['devices']:7}  {kinds:13}{sizes:>20}"
      f"{row['inside']:11}  {row['donated']:>4} of {row['leaves'] - row['unread']:<4}"
      f"  {row['temporaries'] / 1e6:8.2f} MB")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
