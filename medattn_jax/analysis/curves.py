"""The figures of the studies: arrays in, matplotlib figures out. Knows no model and no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medattn_jax.analysis.figures import BLUE, GREEN, GREY, INK, ORANGE, plain

FAINT = "#718096"


def operating(
  panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray] | None]],
  labels: Mapping[str, Mapping[str, str]],
  points: Mapping[str, Sequence[tuple[float, float, str]]], *, title: str,
) -> Figure:
  """ROC curves, a panel a question, with the points marked where a programme reads them.

  Args:
    panels: {question: {name: (false, true positive rates) or None}}; the first of a panel is drawn
      bold and carries the points.
    labels: {question: {name: what the legend says}}.
    points: {question: (specificity, sensitivity, what it is)}.
    title: above it all.
  """
  figure = Figure(figsize=(5.6 * len(panels), 6.0), layout="constrained")
  for axes, (question, curves) in zip(
      figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for number, (name, curve) in enumerate(curves.items()):
      label, colour = labels[question][name], (BLUE, ORANGE, GREEN)[number % 3]
      if curve is None:
        axes.plot([], [], color=colour, label=f"{label}: not defined")
      else:
        axes.plot(*curve, color=colour, linewidth=1.2 if number else 2.2, label=label)
    for marker, (specificity, sensitivity, what) in zip("os^D", points[question], strict=False):
      axes.plot(1 - specificity, sensitivity, marker, color=INK, markersize=7, markerfacecolor="w",
                markeredgewidth=1.6, linestyle="none", label=what, zorder=5, clip_on=False)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal",
             xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title(question, fontsize=11, color=INK, parse_math=False)
    axes.legend(loc="lower right", frameon=False, fontsize=8.5)
    plain(axes)
  figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
  return figure


def calibrated(
  panels: Mapping[str, Mapping[str, Sequence[float]]], labels: Mapping[str, str], *, title: str
) -> Figure:
  """Accuracy against confidence of the top grade, a panel before and one after.

  Args:
    panels: {name: {confidence, accuracy, images}}, each [bins].
    labels: {name: a line with its figures}.
    title: above it all.
  """
  figure = Figure(figsize=(5.2 * len(panels), 6.2), layout="constrained")
  rows = figure.subplots(
    2, len(panels), sharex=True, sharey="row", height_ratios=(4, 1), squeeze=False)
  for column, (name, curve) in enumerate(panels.items()):
    confidence, accuracy, count = (
      np.array(curve[key], np.float64) for key in ("confidence", "accuracy", "images"))
    bins, full = len(count), count > 0
    edges = np.linspace(0, 1, bins + 1)
    middle, width = (edges[1:] + edges[:-1]) / 2, 0.92 / bins
    axes, below = rows[:, column]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
    axes.bar(middle[full], accuracy[full], width, color=BLUE, alpha=0.8, label="accuracy")
    axes.plot(confidence[full], accuracy[full], "o", color=ORANGE, markersize=4,
              label="at the mean confidence")
    axes.vlines(confidence[full], np.minimum(confidence, accuracy)[full],
                np.maximum(confidence, accuracy)[full], color=ORANGE, linewidth=1.4)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{name}\n{labels[name]}", fontsize=10, color=INK, parse_math=False)
    below.bar(middle, count, width, color=GREY)
    below.set(xlabel="confidence (probability of the top grade)")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    plain(axes)
    plain(below)
  rows[0, 0].set(ylabel="accuracy")
  rows[1, 0].set(ylabel="images")
  rows[0, 0].legend(loc="upper left", frameon=False, fontsize=9)
  figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
  return figure


def differences(
  rows: Sequence[tuple[str, float | None, Sequence[float] | None, str]], *, title: str, below: str,
  sides: tuple[str, str],
) -> Figure:
  """Differences with their intervals, a line each, and the zero they may or may not hold.

  Args:
    rows: (name, difference, interval, what is written beside it).
    title: above it all.
    below: what the axis counts.
    sides: what it means to lie left of zero, and right of it.
  """
  figure = Figure(figsize=(9.2, 1.9 + 0.42 * len(rows)), layout="constrained")
  axes = figure.add_subplot()
  axes.axvline(0, color=GREY, linewidth=1.2)
  reach = [abs(edge) for _, value, interval, _ in rows if value is not None
           for edge in (value, *(interval or ()))]
  reach = 1.15 * max([*reach, 1e-3])
  for number, (_, value, interval, beside) in enumerate(rows):
    if value is not None:
      sure = interval is not None and (interval[0] > 0 or interval[1] < 0)
      colour = BLUE if sure else FAINT
      if interval is not None:
        axes.plot(interval, [number, number], color=colour, linewidth=2.4, solid_capstyle="butt")
      axes.plot(value, number, "o", color=colour, markersize=6)
    axes.text(1.02, number, beside, transform=axes.get_yaxis_transform(), va="center", fontsize=9,
              color=INK, parse_math=False)
  axes.set(xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.7), xlabel=below)
  axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
  for where, side, what in ((0, "left", f"← {sides[0]}"), (1, "right", f"{sides[1]} →")):
    axes.text(where, 1.0, what, transform=axes.transAxes, ha=side, va="bottom", fontsize=9,
              color=FAINT, parse_math=False)
  axes.set_title(f"{title}\n", fontsize=11, color=INK, parse_math=False)
  plain(axes)
  axes.spines["left"].set_visible(False)
  axes.tick_params(axis="y", length=0, colors=INK)
  return figure

