"""Figures of a global attention map: alone, over images, class by class, and as it came to be.

A map A is float [H, W]. Its colours run from 0 to 1 in every figure, whatever the map. The line is
the edge of {A > 0.5}, along the edges of the pixels themselves; a dashed line is the edge of the
region that is known to decide (bool [H, W]), where one is known. Images are uint8 or float, 0 to
255, [H, W], [H, W, 1] or [H, W, 3]; one of another size than the map is drawn in the map's frame.
Arrays only.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from PIL import Image

from medattn_jax.analysis.figures import BLUE, GREY, INK, ORANGE

HALF = 0.5  # attended is what lies above
HEAT = "inferno"
OPACITY = 0.42  # of the map over an image: black where nothing is attended, gold where all is
EDGE, TRUTH = "#4cc9f0", "#ffffff"
SIDE = 480  # pixels of an image as drawn; more would not be seen
SHARP = 64  # up to this side pixels are drawn as squares
PANEL = 112  # points that the text at a small panel may take
MOMENTS, SAMPLES, COLUMNS = 12, 24, 6
FRAME = (3.6, 3.7)  # inches, at 100 dots
UNIT = {"extent": (0, 1, 1, 0)}  # every image is drawn in one frame, whatever its pixels


class Sample(NamedTuple):
  """An image to draw, with its name and, where known, its true and its given class."""

  image: np.ndarray
  name: str
  true: int | str | None = None
  given: int | str | None = None


def iou(attention: np.ndarray, region: np.ndarray) -> float | None:
  """Intersection over union of {A > 0.5} and a region; None where both are empty."""
  attended, region = _map(attention) > HALF, np.asarray(region, bool)
  _same(attended, region)
  union = int((attended | region).sum())
  return int((attended & region).sum()) / union if union else None


def alone(
  attention: np.ndarray, *, region: np.ndarray | None = None, title: str = "attention A"
) -> Figure:
  """The map by itself, on its scale."""
  return _single(None, attention, region, title)


def over(
  image: np.ndarray, attention: np.ndarray, *, region: np.ndarray | None = None,
  title: str = "attention A over the image",
) -> Figure:
  """The map as heat over one image in grey."""
  return _single(image, attention, region, title)


def page(
  attention: np.ndarray, mean: np.ndarray, samples: Sequence[Sample] = (), *,
  region: np.ndarray | None = None, title: str = "global attention",
) -> Figure:
  """The map alone, over the mean image, and over the first 24 samples."""
  samples = list(samples)[:SAMPLES]
  rows, (height, width) = -(-len(samples) // COLUMNS), _map(attention).shape
  labels = [_label(sample.true, sample.given) for sample in samples]
  text = 0.58 if any("\n" in label["xlabel"] for label in labels) else 0.42
  inches = [3.2 * height / width + 0.3, rows * (1.64 * height / width + text)][:1 + bool(rows)]
  figure = Figure(figsize=(10.4, sum(inches) + 0.75), layout="constrained")
  figure.suptitle(_titled(title, attention, region, area=True), fontsize=12, color=INK,
                  parse_math=False)
  parts = figure.add_gridspec(len(inches), 1, height_ratios=inches)
  above = parts[0].subgridspec(1, 3)
  top = [figure.add_subplot(above[column]) for column in range(3)]
  _draw(top[0], None, attention, region, "attention A")
  _draw_plain(top[1], mean, attention, region, "mean image")
  _draw(top[2], mean, attention, region, "A over the mean image")
  _bar(figure, top)
  if rows:
    below = parts[1].subgridspec(rows, COLUMNS)
    for index, sample in enumerate(samples):
      axes = figure.add_subplot(below[divmod(index, COLUMNS)])
      _draw(axes, sample.image, attention, region, _fitted(sample.name, 9), small=True)
      axes.set_xlabel(**labels[index])
  _legend(figure, region)
  return figure


def evolution(
  maps: Sequence[np.ndarray], steps: Sequence[int], *, region: np.ndarray | None = None,
  title: str = "attention A in the course of the training",
) -> Figure:
  """At most 12 moments of a training, evenly chosen, the first and the last among them."""
  _as_many(maps, steps)
  chosen = moments(len(maps))
  columns = min(len(chosen), COLUMNS)
  rows = -(-len(chosen) // columns)
  figure = Figure(figsize=_size(maps[0], columns, rows, 0.25, bar=0.9), layout="constrained")
  figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes in panels[len(chosen):]:
    axes.set_axis_off()
  for axes, index in zip(panels, chosen, strict=False):
    _draw(axes, None, maps[index], region, _titled(f"step {steps[index]:,}", maps[index], region),
          small=True)
  _bar(figure, list(panels))
  _legend(figure, region)
  return figure


def animation(
  maps: Sequence[np.ndarray], steps: Sequence[int], *, region: np.ndarray | None = None
) -> bytes:
  """A GIF of a frame a map, about eight seconds long, on one scale and one palette."""
  _as_many(maps, steps)
  frames = (_indexed(frame) for frame in _frames(maps, steps, region))
  each = int(np.clip(8000 / len(maps), 60, 600)) // 10 * 10
  written = io.BytesIO()
  next(frames).save(
    written, format="GIF", save_all=True, append_images=frames, loop=0, optimize=False,
    duration=[each] * (len(maps) - 1) + [2000])
  return written.getvalue()


def class_means(
  means: Sequence[np.ndarray], counts: Sequence[int], attention: np.ndarray, *,
  names: Sequence[str] | None = None, region: np.ndarray | None = None,
  title: str = "mean image of each class",
) -> Figure:
  """The mean image of each class, with the edge of what is attended.

  Args:
    means: [C, H, W(, 3)]; whatever is in a class without images is not looked at.
    counts: how many images each class has.
    attention, region: see above.
    names: of the classes; their numbers by default.
    title: above it all.
  """
  _as_many(means, counts)
  classes, columns = len(means), min(len(means), COLUMNS)
  rows = -(-classes // columns)
  figure = Figure(figsize=_size(attention, columns, rows, 0.42), layout="constrained")
  figure.suptitle(_titled(title, attention, region), fontsize=11, color=INK, parse_math=False)
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  for axes in panels[classes:]:
    axes.set_axis_off()
  for index, (axes, mean, count) in enumerate(zip(panels, means, counts, strict=False)):
    name = _fitted(names[index], 9) if names is not None else f"class {index}"
    image = mean if count else np.full(_map(attention).shape, 255, np.uint8)
    told = f"{name}\n{count:,} image{'' if count == 1 else 's'}"
    _draw_plain(axes, image, attention, region, told, small=True)
  _legend(figure, region)
  return figure


def moments(count: int, at_most: int = MOMENTS) -> list[int]:
  """At most so many of 0 … count - 1, evenly apart, with both ends."""
  return np.unique(np.linspace(0, count - 1, min(count, at_most)).round().astype(int)).tolist()


def outlines(mask: np.ndarray) -> list[np.ndarray]:
  """The edge of a mask bool [H, W] along its pixels' edges.

  Returns:
    Closed lines, int [n, 2] of (x, y) corners, the first one repeated at the end; pixel (row,
    column) is the square from (column, row) to (column + 1, row + 1). The mask lies to the right of
    the way. Pixels that touch at a corner only are apart.
  """
  padded = np.pad(np.asarray(mask, bool), 1)
  inside = padded[1:-1, 1:-1]
  sides = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
  leaving: dict[tuple[int, int], set[int]] = {}  # a corner → the ways that an edge leaves it
  # Over a pixel rightwards (0), right of it down (1), below it leftwards (2), left of it up (3).
  for way, (beside, corner) in enumerate(zip(sides, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True)):
    for row, column in np.argwhere(inside & ~beside).tolist():
      leaving.setdefault((column + corner[0], row + corner[1]), set()).add(way)
  # In this order each line begins at a corner of its own.
  starts = [(column, row) for row, column in np.argwhere(inside & ~sides[0]).tolist()]
  return [_walk(leaving, start) for start in starts if 0 in leaving[start]]


def _walk(leaving: dict[tuple[int, int], set[int]], start: tuple[int, int]) -> np.ndarray:
  """The line that leaves `start` rightwards; its edges are taken out of `leaving`."""
  corners, taken = [start], []
  (x, y), way = start, 0
  while True:
    taken.append(((x, y), way))
    x, y = x + (1, 0, -1, 0)[way], y + (0, 1, 0, -1)[way]
    ways = leaving[x, y]
    turn = next(t for t in (1, 0, 3) if (way + t) % 4 in ways)  # right before straight on
    way = (way + turn) % 4
    if turn:
      corners.append((x, y))
    if ((x, y), way) == (start, 0):
      break
  for corner, gone in taken:
    leaving[corner].remove(gone)
  return np.array(corners)


def _single(image, attention, region, title: str) -> Figure:
  figure = Figure(figsize=(5.4, 5.1), layout="constrained")
  axes = figure.add_subplot()
  _draw(axes, image, attention, region, _titled(title, attention, region))
  _bar(figure, [axes])
  _legend(figure, region)
  return figure


def _frames(maps, steps, region) -> Iterator[np.ndarray]:
  """uint8 [h, w, 3] of each map; the frames differ in what is drawn, never in where."""
  figure = Figure(figsize=FRAME, dpi=100)
  canvas = FigureCanvasAgg(figure)
  height = 0.76 * FRAME[0] / FRAME[1]
  _scale(figure, cax=figure.add_axes((0.84, 0.05, 0.045, height)))
  said = [figure.text(0.04, 0.94, "", fontsize=12, color=INK, weight="bold", va="center"),
          figure.text(0.04, 0.865, "", fontsize=10, color=INK, va="center")]
  for attention, step in zip(maps, steps, strict=True):
    axes = figure.add_axes((0.04, 0.05, 0.76, height))
    _draw(axes, None, attention, region, "")
    said[0].set_text(f"step {step:,}")
    said[1].set_text(_titled("", attention, region, area=True))
    canvas.draw()
    yield np.asarray(canvas.buffer_rgba())[..., :3].copy()
    axes.remove()


@functools.cache
def _palette() -> np.ndarray:
  """uint8 [256, 3]: the scale's colours, greys, and the line's into black and white."""
  edge = np.array([int(EDGE[at:at + 2], 16) for at in (1, 3, 5)]) / 255
  shares = np.linspace(0, 1, 17)[1:, None]
  colours = np.concatenate([
    colormaps[HEAT](np.linspace(0, 1, 176))[:, :3], np.linspace(0, 1, 48)[:, None].repeat(3, 1),
    edge * shares, edge * shares + 1 - shares])
  return (colours * 255).round().astype(np.uint8)


def _indexed(frame: np.ndarray) -> Image.Image:
  """A frame in the nearest colours of the palette, which all frames share."""
  packed = frame.astype(np.int32) @ [1 << 16, 1 << 8, 1]
  seen, where = np.unique(packed, return_inverse=True)
  seen = np.stack([seen >> 16, seen >> 8 & 255, seen & 255], -1)
  apart = ((seen[:, None] - _palette().astype(np.int32)) ** 2).sum(-1)
  image = Image.fromarray(apart.argmin(1).astype(np.uint8)[where].reshape(packed.shape))
  image.putpalette(_palette().tobytes())
  return image


def _draw(axes, image, attention, region, title: str, *, small: bool = False):
  """A panel: the map, over an image in grey where there is one, and the lines."""
  shown = _reduced(_map(attention))
  if image is not None:
    grey = _reduced(_grey(image))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation=_pixels(grey), **UNIT)
  axes.imshow(
    shown, cmap=HEAT, vmin=0, vmax=1, alpha=None if image is None else OPACITY,
    interpolation=_pixels(shown), **UNIT)
  _finish(axes, attention, region, title, small)


def _draw_plain(axes, image, attention, region, title: str, *, small: bool = False):
  """A panel: an image in its own colours, and the lines."""
  image = np.asarray(image)
  if image.ndim == 3 and image.shape[-1] == 3:
    planes = np.stack([_reduced(image[..., i].astype(np.float32)) for i in range(3)], -1)
    shown = np.clip(planes.round(), 0, 255).astype(np.uint8)
  else:
    shown = _reduced(_grey(image))
  axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation=_pixels(shown), **UNIT)
  _finish(axes, attention, region, title, small)


def _finish(axes, attention, region, title: str, small: bool) -> None:
  attention = _map(attention)
  height, across = attention.shape
  axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), aspect=height / across)
  axes.spines[:].set(color=GREY, linewidth=0.6)
  axes.set_title(title, fontsize=9 if small else 11, color=INK, parse_math=False)
  width, finest = (1.3, 96) if small else (1.8, 192)
  _line(axes, attention > HALF, EDGE, width, finest, dashed=False)
  if region is not None:
    _same(attention, np.asarray(region))
    _line(axes, np.asarray(region, bool), TRUTH, width, finest, dashed=True)


def _line(axes, mask: np.ndarray, colour: str, width: float, finest: int, *, dashed: bool) -> None:
  """The edge of a mask, itself dark-edged: legible on whatever lies under it.

  Of a mask of more than `finest` pixels a side, the edge of the blocks that it holds the most of:
  finer raggedness would be a blot. A long edge is drawn thinner for the same reason.
  """
  shown = _reduced(mask.astype(np.float32), finest) > 0.5
  lines = outlines(shown)
  length = sum(np.abs(np.diff(line, axis=0)).sum() for line in lines) / sum(shown.shape)
  width *= np.clip(1.5 / max(length, 1), 0.3, 1)
  more = min(1.6, width)
  # Between dashes there is nothing: a line that lies below is seen there.
  on, off = 3 * width, 2.2 * width
  styles = [(0, (on / width, off / width)),
            (0.5 / (width + more), ((on + 1) / (width + more), (off - 1) / (width + more)))]
  for shade, wide, style in (("#000000", width + more, styles[1]), (colour, width, styles[0])):
    axes.add_collection(LineCollection(
      [line / shown.shape[::-1] for line in lines], colors=shade, linewidths=wide,
      linestyles=[style if dashed else "solid"], zorder=3, clip_on=False))


def _size(attention, columns: int, rows: int, title: float, bar: float = 0) -> tuple[float, float]:
  """Inches of a figure of small panels in the map's shape, each below a title."""
  height, width = _map(attention).shape
  return 1.7 * max(columns, 3) + bar, rows * (1.64 * height / width + title) + 0.8


def _bar(figure: Figure, axes: list) -> None:
  _scale(figure, ax=axes, shrink=0.9, aspect=24, pad=0.015)


def _scale(figure: Figure, **where) -> None:
  bar = figure.colorbar(ScalarMappable(Normalize(0, 1), HEAT), ticks=(0, 0.25, 0.5, 0.75, 1),
                        **where)
  bar.ax.tick_params(labelsize=8, length=2, colors="#4a5568")
  for colour, width in (("#000000", 3.2), (EDGE, 1.6)):
    bar.ax.axhline(HALF, color=colour, linewidth=width)
  bar.outline.set_visible(False)


def _legend(figure: Figure, region) -> None:
  """The lines as they are drawn: the coloured one on the dark one."""
  under = Line2D([], [], color="#000000", linewidth=3.6)
  drawn = {"edge of {A > 0.5}": (under, Line2D([], [], color=EDGE, linewidth=2))}
  if region is not None:
    dashed = Line2D([], [], color=TRUTH, linewidth=2, linestyle=(0, (3, 2.2)))
    drawn["true region"] = (under, dashed)
  figure.legend(
    list(drawn.values()), list(drawn), handler_map={tuple: HandlerTuple(ndivide=1)},
    loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=2.6)


def _label(true, given) -> dict[str, Any]:
  """The classes under a sample; a wrong one is in another colour and another weight."""
  wrong = None not in (true, given) and true != given
  weight = "bold" if wrong else "normal"
  told = [f"{word} {_fitted(str(value), 8, PANEL - 30, weight)}"
          for word, value in (("true", true), ("given", given)) if value is not None]
  line = ", ".join(told)
  return {
    "xlabel": line if _fitted(line, 8, PANEL, weight) == line else "\n".join(told), "fontsize": 8,
    "labelpad": 2, "color": ORANGE if wrong else BLUE, "weight": weight, "parse_math": False}


def _titled(title: str, attention, region, *, area: bool = False) -> str:
  """A title, the share of {A > 0.5} where asked for, and the IoU where the truth is known."""
  parts = [title] if title else []
  if area:
    parts.append(f"{(_map(attention) > HALF).mean():.0%} attended")
  if region is not None:
    found = iou(attention, region)
    parts.append("IoU not defined" if found is None else f"IoU {found:.2f}")
  return " · ".join(parts)


def _map(attention: np.ndarray) -> np.ndarray:
  attention = np.asarray(attention, np.float32)
  if attention.ndim != 2 or not attention.size:
    raise ValueError(f"an attention map is [H, W], not {list(attention.shape)}")
  return attention


def _grey(image: np.ndarray) -> np.ndarray:
  """float32 [H, W], 0 to 255."""
  image = np.asarray(image)
  if image.ndim == 2:
    return image.astype(np.float32)
  if image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise ValueError(f"an image is [H, W], [H, W, 1] or [H, W, 3], not {list(image.shape)}")
  weights = (1,) if image.shape[-1] == 1 else (0.299, 0.587, 0.114)
  return sum(np.float32(w) * image[..., i] for i, w in enumerate(weights))


def _reduced(values: np.ndarray, side: int = SIDE) -> np.ndarray:
  """float32 [h, w] of at most `side` a side: the means of blocks; a smaller array as it is."""
  height, width = values.shape
  share = min(1, side / max(height, width))
  if share == 1:
    return values
  size = max(1, round(width * share)), max(1, round(height * share))
  return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))


def _pixels(shown: np.ndarray) -> str:
  return "nearest" if max(shown.shape[:2]) <= SHARP else "auto"


def _fitted(text: str, size: int, points: float = PANEL, weight: str = "normal") -> str:
  """`text` on one line of at most so many points in letters of `size`; its middle makes room."""
  text = "".join(c if c.isprintable() else " " for c in text)
  font, cut = FontProperties(size=size, weight=weight), text
  with warnings.catch_warnings():  # as figures.png: a letter that the font lacks is a box
    warnings.filterwarnings("ignore", message=".*[Gg]lyph")
    for left in range(min(len(text), 60), 1, -1):
      cut = text if left == len(text) else f"{text[:left // 2]}…{text[len(text) - left // 2:]}"
      if text_to_path.get_text_width_height_descent(cut, font, False)[0] <= points:
        break
  return cut


def _same(one: np.ndarray, other: np.ndarray) -> None:
  if one.shape != other.shape:
    raise ValueError(f"a map of {list(one.shape)} and a region of {list(other.shape)}")


def _as_many(one: Sequence, other: Sequence) -> None:
  if len(one) != len(other) or not len(one):
    raise ValueError(f"{len(one)} and {len(other)}: as many of both are needed, and one at least")
