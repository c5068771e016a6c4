"""What the network looked at, on one page: photograph, regions, gated maps, crops. Arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

LEVELS = ("no retinopathy", "mild", "moderate", "severe", "proliferative")
REGIONS = ("#ffd166", "#06d6a0", "#4cc9f0", "#f78fb3")  # by strength, strongest first
# Of true lesions, by type: none is a colour of the retina.
KINDS = ("#ffffff", "#3d5afe", "#b2ff59", "#18ffff", "#e040fb")
PAGE, PAPER, FAINT = "#14171c", "#f4f5f7", "#9aa3af"
SIDE = 820  # pixels of the photograph as drawn; more would not be seen


def explanation(
  photograph: np.ndarray, gated: np.ndarray, boxes: np.ndarray, probabilities: np.ndarray, *,
  name: str, grade: int, level: int | None = None,
  region_levels: Sequence[int | None] | None = None,
  true_boxes: np.ndarray | None = None, true_types: Sequence[int] = (),
  type_names: Sequence[str] = (),
) -> Figure:
  """One page for one photograph.

  Args:
    photograph: uint8 [F, F, 3].
    gated: float [h, w, C]; the gated attention maps G of all levels. Level 0 is not drawn.
    boxes: int [N, 4]; the selected regions y0, x0, y1, x1 in the photograph, strongest first.
    probabilities: float [C].
    name: of the image.
    grade: the decision.
    level: the truth, None where unknown.
    region_levels: the level whose map chose each region, where known.
    true_boxes: float [K, 4]; lesions, where known.
    true_types: int [K]; index of `type_names`.
    type_names: for the legend.
  """
  size = len(photograph)
  small = _resized(photograph, min(SIDE, size))
  scale = len(small) / size
  regions, classes = len(boxes), gated.shape[-1]
  columns = max(regions, classes - 1)
  figure = Figure(figsize=(17.6, 8.6), facecolor=PAGE)
  outer = figure.add_gridspec(
    1, 2, width_ratios=(1, 1.32), left=0.012, right=0.988, bottom=0.04, top=0.885, wspace=0.03)
  right = outer[1].subgridspec(
    4, columns, height_ratios=(0.5, 1, 0.05, 1), hspace=0.16, wspace=0.05)

  _heading(figure, name, grade, level)
  photo = _bare(figure.add_subplot(outer[0]))
  photo.set_anchor("NW")
  photo.imshow(small, interpolation="none")
  _draw_truth(photo, true_boxes, true_types, type_names, scale)
  for rank, box in enumerate(boxes):
    _draw_region(photo, np.asarray(box) * scale, rank)
  photo.set_xlim(-0.5, len(small) - 0.5)
  photo.set_ylim(len(small) - 0.5, -0.5)
  _draw_probabilities(figure.add_subplot(right[0, :]), probabilities, grade, level)

  maps = np.asarray(gated, np.float32)[..., 1:]
  # What speaks against a level is left dark: regions are chosen by the largest responses.
  high = float(maps.max())
  low = 0.0 if high > 0 else float(maps.min())
  norm = Normalize(low, high if high > low else low + 1)
  backdrop = _resized(photograph, min(320, size))
  for index in range(classes - 1):
    axes = _bare(figure.add_subplot(right[1, index]))
    axes.imshow(_blend(backdrop, maps[..., index], norm), interpolation="none")
    shown = f"level {index + 1}"
    if classes == len(LEVELS):
      shown += f" · {LEVELS[index + 1]}"
    axes.set_title(shown, fontsize=10, color=PAPER, pad=4)
  strip = right[2, :].subgridspec(1, 2, width_ratios=(1.2, 2))
  bar = figure.colorbar(
    ScalarMappable(norm, "inferno"), cax=figure.add_subplot(strip[1]), orientation="horizontal")
  bar.ax.text(-0.02, 0.5, "gated attention G = S ⊗ A, one scale for all levels", fontsize=9,
              color=FAINT, ha="right", va="center", transform=bar.ax.transAxes)
  bar.ax.tick_params(colors=FAINT, labelsize=8, length=2, pad=1)
  bar.ax.locator_params(nbins=5)
  bar.outline.set_visible(False)

  for rank, box in enumerate(boxes):
    axes = figure.add_subplot(right[3, rank])
    top, left, bottom, end = (int(edge) for edge in box)
    axes.imshow(photograph[top:bottom, left:end], interpolation="bilinear")
    axes.set(xticks=[], yticks=[])
    colour = REGIONS[rank % len(REGIONS)]
    axes.spines[:].set(color=colour, linewidth=2.5)
    _badge(axes, 0.075, 0.925, rank, transform=axes.transAxes)
    if region_levels is not None and region_levels[rank] is not None:
      axes.set_xlabel(f"chosen by level {region_levels[rank]}", fontsize=9, color=FAINT)
  return figure


def _resized(image: np.ndarray, side: int) -> np.ndarray:
  return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def _blend(photograph: np.ndarray, values: np.ndarray, norm: Normalize) -> np.ndarray:
  """The grey photograph under the map: the stronger the response, the more of its colour."""
  side = photograph.shape[0]
  grown = Image.fromarray(values.astype(np.float32)).resize(
    (side, side), Image.Resampling.BILINEAR)
  strength = np.clip(norm(np.asarray(grown)).filled(0), 0, 1)
  grey = photograph.mean(-1, keepdims=True) / 255 * 0.8
  colour = colormaps["inferno"](strength)[..., :3]
  opacity = 0.85 * strength[..., None] ** 0.7
  return np.clip(grey * (1 - opacity) + colour * opacity, 0, 1)


def _heading(figure: Figure, name: str, grade: int, level: int | None) -> None:
  def named(value: int) -> str:
    return f"{value} ({LEVELS[value]})" if value < len(LEVELS) else str(value)

  shown = name if len(name) <= 60 else name[:28] + " … " + name[-28:]
  figure.text(0.012, 0.957, shown, fontsize=19, weight="bold", color=PAPER, va="center",
              parse_math=False)
  text = f"graded {named(grade)}"
  if level is not None:
    text += f"    true level {named(level)}    " + (
      "agrees" if level == grade else f"off by {abs(level - grade)}")
  figure.text(0.012, 0.914, text, fontsize=13, color=FAINT, va="center")


def _bare(axes):
  axes.set(xticks=[], yticks=[])
  axes.spines[:].set_visible(False)
  axes.set_facecolor("black")
  return axes


def _draw_region(axes, box: np.ndarray, rank: int) -> None:
  top, left, bottom, right = box
  colour = REGIONS[rank % len(REGIONS)]
  # A dark line under the coloured one keeps it legible on bright retina.
  for width, edge in ((4.5, "#000000aa"), (2.4, colour)):
    axes.add_patch(Rectangle(
      (left, top), right - left, bottom - top, fill=False, linewidth=width, edgecolor=edge,
      zorder=3 + 0.01 * rank, clip_on=False))
  inset = 0.034 * axes.get_images()[0].get_array().shape[0]
  # Each number in its own corner, so that regions that lie on one another keep all of them.
  row, column = divmod(rank % 4, 2)
  _badge(axes, (right - inset if column else left + inset),
         (bottom - inset if row else top + inset), rank)


def _badge(axes, x: float, y: float, rank: int, **where) -> None:
  colour = REGIONS[rank % len(REGIONS)]
  axes.text(x, y, str(rank + 1), fontsize=12, weight="bold", color="#101215", ha="center",
            va="center", zorder=6, bbox={"boxstyle": "circle,pad=0.25", "facecolor": colour,
                                         "edgecolor": "#101215", "linewidth": 1}, **where)


def _draw_truth(axes, boxes, kinds, names: Sequence[str], scale: float) -> None:
  if boxes is None or len(boxes) == 0:
    return
  counted: dict[int, int] = {}
  for box, kind in zip(np.asarray(boxes, np.float64) * scale, kinds, strict=True):
    counted[int(kind)] = counted.get(int(kind), 0) + 1
    top, left, bottom, right = box
    axes.add_patch(Rectangle(
      (left - 1, top - 1), right - left + 2, bottom - top + 2, fill=False, linewidth=0.9,
      edgecolor=KINDS[int(kind) % len(KINDS)], zorder=2))
  lines = [
    Line2D([], [], color=KINDS[kind % len(KINDS)], linewidth=1.6,
           label=f"{names[kind].replace('_', ' ')} ({count})")
    for kind, count in sorted(counted.items())
  ]
  legend = axes.legend(handles=lines, loc="lower left", fontsize=9, title="true lesions",
                       facecolor=PAGE, edgecolor="none", framealpha=0.8, labelcolor=PAPER)
  legend.get_title().set(color=FAINT, fontsize=9)
  legend.set_zorder(7)


def _draw_probabilities(axes, probabilities, grade: int, level: int | None) -> None:
  _bare(axes).set_facecolor(PAGE)
  classes = len(probabilities)
  colours = ["#4cc9f0" if index == grade else "#3b4454" for index in range(classes)]
  axes.barh(range(classes), 1, color="#1d222a", height=0.7)
  axes.barh(range(classes), probabilities, color=colours, height=0.7)
  for index, value in enumerate(probabilities):
    told = [word for word, here in (("grade", index == grade), ("truth", index == level)) if here]
    axes.text(1.015, index, f"{value:.3f}", va="center", fontsize=11,
              color=PAPER if told else FAINT)
    axes.text(1.10, index, "  ".join(told), va="center", fontsize=10, color="#4cc9f0")
    label = f"{index}  {LEVELS[index]}" if classes == len(LEVELS) else str(index)
    axes.text(-0.015, index, label, va="center", ha="right", fontsize=11,
              color=PAPER if told else FAINT)
  axes.set(xlim=(-0.24, 1.24), ylim=(classes - 0.4, -0.6))
