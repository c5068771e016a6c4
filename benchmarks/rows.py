"""How benchmarks say what they found: one JSON object a line, a table, one line for a bad flag."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

FIGURES = (".png", ".pdf", ".svg")


def stop(benchmark: str, why: object) -> NoReturn:
  """One line on stderr, and the status of a user's error."""
  print(f"benchmarks.{benchmark}: error: {why}", file=sys.stderr)
  sys.exit(2)


def count(text: str) -> int:
  """A flag's whole number above zero."""
  if not (text.isascii() and text.isdigit() and int(text)):
    raise argparse.ArgumentTypeError(f"{text!r}; accepted: a whole number above zero")
  return int(text)


def above_zero(text: str) -> float:
  """A flag's number above zero."""
  try:
    if 0 < (number := float(text)) < math.inf:
      return number
  except ValueError:
    pass
  raise argparse.ArgumentTypeError(f"{text!r}; accepted: a number above zero")


def written(text: str) -> pathlib.Path:
  """A flag's file that can be written: found out before anything is measured."""
  path = pathlib.Path(text)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    there = path.exists()
    path.open("ab").close()
    if not there:
      path.unlink()
  except OSError as error:
    raise argparse.ArgumentTypeError(
      f"{text}: {(error.strerror or str(error)).lower()}; accepted: a file that can be written"
    ) from None
  return path


def drawn(text: str) -> pathlib.Path:
  """`written`, of a figure."""
  if not text.lower().endswith(FIGURES):
    raise argparse.ArgumentTypeError(f"{text}; accepted: a name that ends in {', '.join(FIGURES)}")
  return written(text)


def parsed(
  parser: argparse.ArgumentParser, sizes: Mapping[str, Mapping[str, Any]], usual: str = "small"
) -> argparse.Namespace:
  """The flags, --size, --plot and --json among them; one not given has its size's value."""
  parser.add_argument("--size", choices=sizes, default=usual,
                      help=f"defaults of the others; {usual} by default")
  parser.add_argument("--plot", type=drawn, help="a file for the figure")
  parser.add_argument("--json", action="store_true", help="the JSON lines alone")
  flags = parser.parse_args()
  for name, value in sizes[flags.size].items():
    if getattr(flags, name) is None:
      setattr(flags, name, value)
  return flags


def row(
  name: str, *, config: Mapping[str, Any], devices: int, device_kind: str | None,
  batch: int | None, dtype: str | None,
  compile_seconds: float | None = None, milliseconds: Sequence[float] = (), images: int = 0,
  flops: float | None = None, mfu: float | None = None, memory: int | None = None,
  input_bound: bool | None = None, **more: Any,
) -> dict[str, Any]:
  """A line of the contract; `more` follows it.

  Args:
    device_kind, batch, dtype: None where nothing was measured.
    batch: of the page: patients of pairs, else images, over all devices.
    milliseconds: of each step or round of steps; () where none was run.
    images: of a step, over all devices; images_per_second are those of the fastest.
    flops: of a step, over all devices.
    mfu: share of the devices' measured matmul ceiling; None on a CPU.
  """
  fastest = min(milliseconds, default=None)
  return {
    "name": name, "config": dict(config), "devices": devices, "device_kind": device_kind,
    "batch": batch, "dtype": dtype, "compile_seconds": rounded(compile_seconds),
    "step_ms": spread(milliseconds),
    "images_per_second": rounded(1000 * images / fastest) if fastest else None,
    "flops_per_step": flops, "mfu": rounded(mfu), "peak_memory_bytes": memory,
    "input_bound": input_bound, **more}


def spread(values: Sequence[float]) -> dict[str, float] | None:
  if not values:
    return None
  return {"min": rounded(min(values)), "median": rounded(statistics.median(values)),
          "max": rounded(max(values))}


def rounded(value: float | None, digits: int = 4) -> float | None:
  """To so many significant digits."""
  return None if value is None else float(f"{value:.{digits}g}")


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
  """Columns as wide as they need be; the first to the left, None as a dash."""
  cells = [list(heads), *([shown(cell) for cell in line] for line in lines)]
  widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
  return "\n".join(
    "  ".join(cell.rjust(width) if place else cell.ljust(width)
              for place, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
    for line in cells)


def shown(value: Any) -> str:
  """A cell: numbers to three or four digits."""
  if value is None:
    return "–"
  if not isinstance(value, float):
    return str(value)
  if abs(value) >= 1000:
    return f"{value:.0f}"
  return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def say(rows: Iterable[Mapping[str, Any]], text: str, only_json: bool) -> None:
  """The text, unless the lines alone are wanted, and the lines."""
  if not only_json:
    print(text)
  for one in rows:
    print(json.dumps(one, allow_nan=False), flush=True)


def figure(path: pathlib.Path, width: float, height: float, *draw: Any) -> None:
  """A figure of a panel for each draw(panel), side by side."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  chart, panels = pyplot.subplots(
    1, len(draw), squeeze=False, figsize=(width, height), layout="constrained")
  for own, panel in zip(draw, panels[0], strict=True):
    own(panel)
    panel.spines[["top", "right"]].set_visible(False)
  path.parent.mkdir(parents=True, exist_ok=True)
  chart.savefig(path, dpi=150)
  pyplot.close(chart)
