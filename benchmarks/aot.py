"""What does a page's step cost a chip that is not here? Read from the program compiled for it.

`python -m benchmarks.aot --config=FILE [--phase=P,…] --target=v5e:2x4,h200:8 [--config.KEY=VALUE …]
[--by-scope=N] [--depth=3] [--plot=FILE] [--save=FILE] [--against=FILE] [--text=DIR]
[--account=FILE] [--json]`

Compiles the train step for each target (a process each; v5e, v5p, v6e, h100, h200, alone or with a
topology; cpu:8 and here are JAX's own) and prints what the program tells: operations, bytes,
memory, collectives, donated buffers, a TPU compiler's cycles; and the time that the chip's data
sheet makes of them. THE TIMES ARE A MODEL, nothing runs: they compare two programs on one chip, and
a real step is slower. --by-scope=N shows where the cycles go (the bytes, where a compiler counts no
cycles) by place in the model, --depth modules deep, and the N dearest instructions; --plot draws
it. --account writes all of it as Markdown: like instructions of like modules together, as many as
hold four fifths of the cost and of the bytes, and the rest by kind, with the bytes that XLA counts.
--save keeps the figures; --against, a file kept before, shows before, after and their ratio.
Exits with 1 where a program has no room on its chip.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rows import count, drawn, written
from medattn_jax.errors import UserError

MODEL = ("a model from data sheets, not a measurement: it compares programs; real steps are slower")
# Figure, its unit, and where in a row it is.
FIGURES = (
  ("FLOPs", "G", 1e9, ("flops_per_step",)),
  ("bytes accessed", "GB", 1e9, ("bytes_accessed",)),
  ("  of the chip's memory", "GB", 1e9, ("hbm_bytes",)),
  ("peak memory", "GB", 1e9, ("peak_memory_bytes",)),
  ("temporaries", "GB", 1e9, ("temporaries",)),
  ("collectives", "", 1, ("count",)),
  ("  synchronous", "", 1, ("synchronous",)),
  ("  in a loop or branch", "", 1, ("inside",)),
  ("  bytes", "MB", 1e6, ("wire",)),
  ("donated buffers", "", 1, ("donated",)),
  ("  of the state's", "", 1, ("leaves",)),
  ("  which it never reads", "", 1, ("unread",)),
  ("lowering", "s", 1, ("lower_seconds",)),
  ("compiling", "s", 1, ("compile_seconds",)),
  ("compiler's cycles", "M", 1e6, ("cycles",)),
  ("compiler's estimate", "ms", 1, ("compiler_ms",)),
  ("model: arithmetic", "ms", 1, ("model", "arithmetic_ms")),
  ("model: memory", "ms", 1, ("model", "memory_ms")),
  ("model: collectives", "ms", 1, ("model", "collectives_ms")),
  ("model: step", "ms", 1, ("model", "step_ms")),
  ("model: images/s a chip", "", 1, ("model", "images_per_second_per_chip")),
)
COLOURS = {"forward": "C0", "backward": "C1", "rest": "C2"}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], allow_abbrev=False,
    epilog="--config.KEY=VALUE changes a key of the page")
  parser.add_argument("--config", required=True, metavar="FILE")
  parser.add_argument("--phase", help="with commas between; the page's last by default")
  parser.add_argument("--target", required=True, help="with commas between")
  parser.add_argument("--by-scope", type=int, default=0, metavar="N", help="how many instructions")
  parser.add_argument("--depth", type=count, default=3, help="of the modules' path in --by-scope")
  parser.add_argument("--plot", type=drawn, metavar="FILE")
  parser.add_argument("--save", type=written, metavar="FILE", help="the figures as JSON")
  parser.add_argument("--against", type=pathlib.Path, metavar="FILE", help="what --save kept")
  parser.add_argument("--text", type=pathlib.Path, metavar="DIR", help="for the programs' texts")
  parser.add_argument("--account", type=written, metavar="FILE", help="Markdown, of all of it")
  parser.add_argument("--json", action="store_true", help="the JSON lines alone")
  flags, rest = parser.parse_known_args()
  try:
    before = load(flags.against) if flags.against else None
    with tempfile.TemporaryDirectory() as folder:
      if flags.account:
        flags.text = flags.text or pathlib.Path(folder)
      rows = measure(flags, rest)
      if flags.account:
        flags.account.parent.mkdir(parents=True, exist_ok=True)
        texts = [(row, kept(flags.text, row["phase"], row["target"])) for row in rows]
        flags.account.write_text("\n".join(  # one that does not fit has no text
          account(row, text.read_text()) for row, text in texts if text.exists()))
  except UserError as error:
    print(f"benchmarks.aot: {error}", file=sys.stderr)
    sys.exit(2)
  if not flags.json:
    print(table(rows, before))
    for row in rows:
      if row.get("places"):
        print(f"\n{name(row)}\n{scopes(row['places'])}")
  for row in rows:
    print(json.dumps({key: value for key, value in row.items() if key != "places"},
                     allow_nan=False))
  if flags.save:
    flags.save.parent.mkdir(parents=True, exist_ok=True)
    flags.save.write_text(json.dumps(rows, indent=1, allow_nan=False))
  if flags.plot:
    plot(rows, flags.plot)
  sys.exit(not all(row["fits"] for row in rows))


def measure(flags: argparse.Namespace, rest: Sequence[str]) -> list[dict[str, Any]]:
  """A row for each phase and target. Raises UserError before anything is compiled, or for a
  compiler that fails."""
  from medattn_jax import cli, config, experiment, forecast
  from medattn_jax.programs import chips

  page = config.load_page(flags.config, cli.overrides(rest))
  experiment.check(page)
  known = experiment.phases(page)
  asked = flags.phase.split(",") if flags.phase else [known[-1]]
  for phase in asked:
    if phase not in known:
      raise UserError(f"--phase={phase}; accepted for {page.model.name}: {', '.join(known)}")
  targets = [chips.target(text) for text in flags.target.split(",")]
  for target in targets:
    if reason := chips.missing(target):
      raise UserError(f"--target={target}: {reason}")
  largest = max(flags.by_scope, 1 if flags.plot else 0)
  rows = []
  for phase in asked:
    for target in targets:
      print(f"compiling {phase} for {target} …", file=sys.stderr, flush=True)
      keep = None
      if flags.text:
        flags.text.mkdir(parents=True, exist_ok=True)
        keep = str(kept(flags.text, phase, str(target)))
      found = forecast.of(page, phase, target, flags.depth, largest, keep)
      row = {"name": "aot", "config": {"file": flags.config, "overrides": list(rest)}}
      row |= found.row()
      if found.places:
        row["places"] = {
          "unit": found.places.unit, "total": found.places.total,
          "shares": [one._asdict() for one in found.places.shares],
          "singles": [one._asdict() for one in found.places.singles]}
      rows.append(row)
  return rows


def kept(folder: pathlib.Path, phase: str, target: str) -> pathlib.Path:
  """The file of a program's text."""
  chip, _, topology = target.partition(":")
  return folder / f"{phase}_{chip}_{topology or 1}.txt"


def account(row: Mapping[str, Any], text: str, share: float = 0.8) -> str:
  """Markdown: what like instructions cost together, dearest first, and all by kind.

  share: of the cost, and of the bytes moved, that the instructions listed are to hold.
  """
  from medattn_jax.programs import account, places

  found = places.of(text, 1, sys.maxsize)
  every = account.alike(found.singles)
  listed = account.covering(every, share)
  by = account.kinds(text, found.singles)
  unit = found.unit if found.unit == "cycles" else "bytes"
  line = lambda *cells: f"| {' | '.join(cells)} |"
  figures = lambda *ones: [
    *(f"{sum(getattr(one, name) for one in ones) / 1e6:,.2f}" for name in ("cost", "moved", "hbm"))]
  listed_rest = set(every) - set(listed)
  lines = [
    f"## {name(row)}", "",
    f"{sum(one.number for one in every):,} instructions cost {unit} or move bytes, {len(every)} "
    f"with those alike as one. The {len(listed)} listed hold {100 * share:.0f} % of the {unit} and "
    "of the bytes moved.", "",
    line("number", f"M {unit}", "MB moved", "of HBM", "direction", "place: what", "largest result"),
    "|---|---|---|---|---|---|---|"]
  for one in listed:
    lines.append(line(str(one.number), *figures(one), one.direction,
                      f"{one.path}: {one.kind}".replace("|", "/"), one.shape))
  lines += [line(f"{sum(one.number for one in listed_rest)}", *figures(*listed_rest), "",
                 f"{len(listed_rest)} others", ""),
            line(f"{sum(one.number for one in every)}", *figures(*every), "", "all", ""), "",
            line("kind", "number", f"M {unit}", "MB moved", "of HBM", "MB by XLA's rule"),
            "|---|---|---|---|---|---|"]
  lines += [line(one.kind, f"{one.number:,}", *figures(one), f"{one.counted / 1e6:,.0f}")
            for one in by if max(one.counted, one.moved) >= 1e6]
  counted = sum(one.counted for one in by)
  lines.append(line("all", f"{sum(one.number for one in by):,}", *figures(*by),
                    f"{counted / 1e6:,.0f}"))
  if row["bytes_accessed"]:
    lines += ["", f"XLA itself says {row['bytes_accessed'] / 1e6:,.0f} MB."]
  return "\n".join(lines) + "\n"


def load(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    rows = json.loads(path.read_text())
    return [{**row, "key": name(row)} for row in rows]
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(f"--against={path}: {error}; accepted: a file that --save wrote") from error


def name(row: Mapping[str, Any]) -> str:
  return f"{row['phase']} {row['target']}"


def value(row: Mapping[str, Any], path: Sequence[str]) -> float | None:
  """A figure of a row; None where the compiler did not tell."""
  if path == ("count",):
    return sum(row["collectives"].values()) if "collectives" in row else None
  if path == ("wire",):
    return sum(row["wire_bytes"].values()) if "wire_bytes" in row else None
  for key in path:
    row = (row or {}).get(key)
  return row


def table(rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None) -> str:
  """A line for each figure; a column for each program, or three where it has one to be held
  against."""
  old = {one["key"]: one for one in before or ()}
  heads, columns = [""], [[label + (f", {unit}" if unit else "") for label, unit, *_ in FIGURES]]
  for row in rows:
    now = [value(row, path) for *_, path in FIGURES]
    if other := old.get(name(row)):
      then = [value(other, path) for *_, path in FIGURES]
      ratios = [f"{a / b:.3f}" if a is not None and b else "" for a, b in
                zip(now, then, strict=True)]
      heads += [f"{name(row)} before", "after", "ratio"]
      columns += [_written(then), _written(now), ratios]
    else:
      heads.append(name(row))
      columns.append(_written(now))
  wide = [max(map(len, [head, *column])) for head, column in zip(heads, columns, strict=True)]
  lines = ["  ".join(f"{head:>{n}}" if at else f"{head:{n}}"
                     for at, (head, n) in enumerate(zip(heads, wide, strict=True)))]
  for cells in zip(*columns, strict=True):
    if any(cells[1:]):
      lines.append("  ".join(f"{cell:>{n}}" if at else f"{cell:{n}}"
                             for at, (cell, n) in enumerate(zip(cells, wide, strict=True))))
  return "\n".join(lines + [words(row) for row in rows] + [f"The model's lines are {MODEL}."])


def words(row: Mapping[str, Any]) -> str:
  """What of a program no number says."""
  said = [f"{row['batch']} images on {row['devices']} × {row['device_kind']}, {row['dtype']}"]
  if row.get("collectives"):
    kinds = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items())
    sizes = ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in row["wire_bytes"].items())
    said.append(f"{kinds} ({sizes})")
  if row.get("model"):
    said.append(f"bound by {row['model']['by']}")
  if not row["fits"]:
    of = f" of {row['memory_bytes'] / 1e9:.1f}" if row["memory_bytes"] else ""
    said.append(f"DOES NOT FIT: {_plain((row['peak_memory_bytes'] or 0) / 1e9)}{of} GB")
  return f"{name(row)}: {'; '.join(said)}"


def scopes(found: Mapping[str, Any], shown: int = 24) -> str:
  """Where the cycles or bytes go: by direction, by place, and the dearest instructions.

  Beside the cycles stand the bytes that are moved, and those of them that leave the chip.
  """
  total, cycles = found["total"], found["unit"] == "cycles"

  def part(*ones):
    cost, moved, hbm = (sum(one[key] for one in ones) for key in ("cost", "moved", "hbm"))
    if not cycles:
      return f"{100 * cost / total:5.1f} %  {cost / 1e6:11,.1f} MB"
    return (f"{100 * cost / total:5.1f} %  {cost / 1e3:9,.1f} k cycles  {moved / 1e6:9,.1f} MB  "
            f"{hbm / 1e6:8,.1f} MB HBM")

  lines = []
  for direction in COLOURS:
    lines.append(f"{part(*[one for one in found['shares'] if one['direction'] == direction])}  "
                 f"{direction}")
  lines.append("by place")
  lines += [f"{part(one)}  {one['direction']:8}  {one['place']}" for one in found["shares"][:shown]]
  if rest := found["shares"][shown:]:
    lines.append(f"{part(*rest)}  {len(rest)} more places")
  lines.append("instruction by instruction")
  for one in found["singles"]:
    shape = one["shape"] if len(one["shape"]) <= 72 else one["shape"][:71] + "…"
    lines.append(f"{part(one)}  {one['direction']:8}  {one['path']}: {one['kind']} "
                 f"{one['name']} {shape}")
  return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path, shown: int = 20) -> None:
  """A bar for each of the dearest places, a panel for each program."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  rows = [row for row in rows if row.get("places")]
  figure, panels = pyplot.subplots(
    1, max(1, len(rows)), squeeze=False, layout="constrained",
    figsize=(1 + 6.5 * max(1, len(rows)), 6))
  for panel, row in zip(panels[0], rows, strict=False):
    found, places = row["places"], {}
    for one in found["shares"]:
      places.setdefault(one["place"], dict.fromkeys(COLOURS, 0))[one["direction"]] += one["cost"]
    ordered = sorted(places.items(), key=lambda one: -sum(one[1].values()))
    if rest := ordered[shown:]:
      together = {way: sum(costs[way] for _, costs in rest) for way in COLOURS}
      ordered[shown:] = [(f"{len(rest)} more places", together)]
    ends = [0.0] * len(ordered)
    for way, colour in COLOURS.items():
      parts = [100 * costs[way] / found["total"] for _, costs in ordered]
      panel.barh(range(len(ordered)), parts, left=ends, color=colour, label=way)
      ends = [end + part for end, part in zip(ends, parts, strict=True)]
    labels = [place if place != "–" else "no module's" for place, _ in ordered]
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    what = {"cycles": "M cycles", "bytes": "MB"}[found["unit"]]
    panel.set_xlabel(f"% of {found['total'] / 1e6:,.1f} {what}")
    panel.set_title(f"{name(row)}, {row['batch']} images", fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(loc="lower right")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def _written(values: Sequence[float | None]) -> list[str]:
  return ["" if own is None else _plain(own / scale)
          for own, (_, _, scale, _) in zip(values, FIGURES, strict=True)]


def _plain(number: float) -> str:
  if number == round(number) and abs(number) < 1e6:
    return f"{number:.0f}"
  return f"{number:,.1f}" if abs(number) >= 100 else f"{number:.2f}" if abs(number) >= 1 else (
    f"{number:.4f}")


if __name__ == "__main__":
  main()
