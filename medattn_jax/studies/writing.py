"""How a study ends: its JSON and figures in a folder, each whole or not there; a table for eyes."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from medattn_jax import files


def finish(
  study: str, place: pathlib.Path, found: Mapping[str, Any], figures: Mapping[str, bytes], *,
  title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (),
) -> dict[str, Any]:
  """Writes PLACE/STUDY.json (strict, and last, so that it speaks of figures that are there).

  Args:
    study: its name.
    place: the folder.
    found: what JSON can hold, without NaN.
    figures: PNGs by file name.
    title: a line above the printed table.
    header: of its columns; the first is the row's name.
    rows: of the table.
    notes: lines below it.

  Returns:
    What the file holds: `found` with the key study.
  """
  found = {"study": study, **found}
  content = (json.dumps(found, indent=2, allow_nan=False) + "\n").encode()
  files.write_all(place, {**figures, f"{study}.json": content})
  # A log has no width, which rich would take for 80 columns.
  width = None if sys.stdout.isatty() else 120
  output = rich.console.Console(highlight=False, markup=False, soft_wrap=True, width=width)
  table = rich.table.Table(show_header=any(header))
  for number, name in enumerate(header):
    table.add_column(name, justify="right" if number else "left")
  for row in rows:
    table.add_row(*row)
  for line in (title, table, *notes, *(f"  {place / name}" for name in figures),
               f"  {place / study}.json"):
    output.print(line)
  return found


def shown(value: float | None) -> str:
  """A figure with three decimals; a dash where it is not defined."""
  return "–" if value is None else f"{value:.3f}"


def interval(edges: Sequence[float] | None) -> str:
  """low to high; a dash where it is not defined."""
  return "–" if edges is None else f"{edges[0]:.3f} to {edges[1]:.3f}"


def about(source: Mapping[str, Any]) -> str:
  """Of an Answers.source, in a line."""
  if "predictions" in source:
    return short(source["predictions"])
  return f"{source['data']}, {source['split']} split, step {source['step']}"


def short(name: str) -> str:
  """The end of a long path, where paths differ."""
  return name if len(name) <= 80 else f"…{name[-79:]}"


def both(value: float | None, edges: Sequence[float] | None) -> str:
  """A figure and its interval."""
  return shown(value) if edges is None else f"{shown(value)} ({edges[0]:.3f}–{edges[1]:.3f})"
