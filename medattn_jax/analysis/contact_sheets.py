"""Small pictures side by side: the members of a group, and one of each group. Arrays only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from medattn_jax.analysis.overlays import FAINT, PAGE, PAPER, REGIONS

TILE = 120  # pixels of a picture as drawn
GAP = 8
_DPI = 100


def sheet(
  pictures: np.ndarray, captions: Sequence[str], below: Sequence[str], *, title: str, about: str,
  columns: int = 8, framed: int | None = 0,
) -> Figure:
  """A page of pictures in rows, each with two lines below it.

  Args:
    pictures: uint8 [n, s, s, 3], n ≥ 1.
    captions, below: n lines each; of long ones the middle is left out.
    title, about: two lines above them all.
    columns: at most.
    framed: which picture stands for all; None for none.
  """
  columns = min(columns, len(pictures))
  rows = math.ceil(len(pictures) / columns)
  height, width = TILE + GAP + 26, TILE + GAP
  # Never narrower than the lines above need.
  across = max(columns * width + GAP, 11 * len(title) + 2 * GAP, 7 * len(about) + 2 * GAP)
  down = rows * height + 68
  page = Figure(figsize=(across / _DPI, down / _DPI), dpi=_DPI, facecolor=PAGE)
  axes = page.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  axes.text(GAP, 20, title, fontsize=13, weight="bold", color=PAPER, va="center", parse_math=False)
  axes.text(GAP, 43, about, fontsize=9.5, color=FAINT, va="center", parse_math=False)
  for number, (picture, *lines) in enumerate(zip(pictures, captions, below, strict=True)):
    row, column = divmod(number, columns)
    top, left = 62 + row * height, GAP + column * width
    drawn = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(drawn), extent=(left, left + TILE, top + TILE, top), zorder=1,
                interpolation="none")
    for at, (line, colour) in enumerate(zip(lines, (PAPER, FAINT), strict=True)):
      axes.text(left + TILE / 2, top + TILE + 9 + 12 * at, _short(line.replace("_", " ")),
                fontsize=7.5, color=colour, ha="center", va="center", parse_math=False)
    if number == framed:
      axes.add_patch(Rectangle((left, top), TILE, TILE, fill=False, linewidth=3, zorder=2,
                               edgecolor=REGIONS[0]))
  axes.set(xlim=(0, across), ylim=(down, 0), aspect="auto")
  return page


def _short(text: str, most: int = 24) -> str:
  return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
