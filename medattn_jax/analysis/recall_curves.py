"""Figures of lesion coverage: arrays in, matplotlib figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from medattn_jax.analysis.figures import BLUE, GREEN, GREY, INK, ORANGE

# Name of a curve → its colour and line.
STYLES = {
  "regions": (BLUE, "-"), "maps": (ORANGE, "-"), "random": (GREY, (0, (4, 3))),
  "maps_random": ("#f6ad55", (0, (1, 1.5))), "best": (GREEN, (0, (4, 3)))}


def recall(
  curves: Mapping[str, Mapping[str, Sequence[float]]], labels: Mapping[str, str], *,
  intervals: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], marked: int,
  paper: Mapping[str, float], iom: float, title: str,
) -> Figure:
  """Recall per box and per image against the number of boxes, two panels.

  Args:
    curves: {name: {"box": [N], "image": [N]}}, the names those of STYLES.
    labels: of the curves, for the legend.
    intervals: the like, [N, 2], of those that have one; drawn as a band.
    marked: the number of boxes the model itself looks into.
    paper: {"boxes", "box", "image"}; what the paper reports, on other photographs.
    iom: the overlap that finds.
    title: above it all.
  """
  figure = Figure(figsize=(10.6, 5.4), layout="constrained")
  panels = figure.subplots(1, 2, sharey=True)
  words = {"box": "lesions found", "image": "photographs with a lesion found"}
  for axes, (kind, word) in zip(panels, words.items(), strict=True):
    axes.axvline(marked, color=GREY, linewidth=0.8, linestyle=":")
    for name, curve in curves.items():
      values = np.asarray(curve[kind])
      number = np.arange(1, len(values) + 1)
      colour, line = STYLES[name]
      if name in intervals:
        axes.fill_between(number, *np.transpose(intervals[name][kind]), color=colour, alpha=0.13,
                          linewidth=0)
      axes.plot(number, values, color=colour, linestyle=line, linewidth=2, label=labels[name])
      if name in ("regions", "maps"):
        axes.plot(marked, values[marked - 1], "o", color=colour, markersize=6)
        axes.annotate(
          f"{values[marked - 1]:.2f}", (marked, values[marked - 1]), xytext=(8, -14),
          textcoords="offset points", fontsize=9, color=colour, zorder=6,
          bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none",
                "alpha": 0.85})
    axes.plot(paper["boxes"], paper[kind], "D", markerfacecolor="white", markeredgecolor=INK,
              markersize=7, zorder=5, label="the paper, on its own 182 photographs")
    axes.annotate(f"{paper[kind]:.2f}", (paper["boxes"], paper[kind]), xytext=(-9, 5),
                  textcoords="offset points", ha="right", fontsize=9, color=INK)
    axes.set(xlim=(0.5, len(values) + 0.5), ylim=(0, 1.02), xlabel="boxes a photograph")
    axes.set_title(f"{word} (overlap ≥ {iom:g})", fontsize=10.5, color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    _plain(axes)
  handles, names = panels[0].get_legend_handles_labels()
  figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
  return figure


def by_type(
  recalls: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], labels: Mapping[str, str],
  *, boxes: int, iom: float, title: str,
) -> Figure:
  """Bars: the recall of each type of lesion by `boxes` boxes.

  Args:
    recalls: {type: {curve's name: recall}}.
    counts: lesions of each type.
    labels: of the curves, for the legend.
    boxes, iom: of the recalls.
    title: above it all.
  """
  names = list(next(iter(recalls.values())))
  figure = Figure(figsize=(max(6.4, 1.7 * len(recalls) + 1), 4.6), layout="constrained")
  axes = figure.add_subplot()
  width = 0.84 / len(names)
  for at, name in enumerate(names):
    colour, _ = STYLES[name]
    place = np.arange(len(recalls)) + (at - (len(names) - 1) / 2) * width
    values = [recalls[kind][name] for kind in recalls]
    axes.bar(place, values, width * 0.92, color=colour, label=labels[name])
    for x, value in zip(place, values, strict=True):
      axes.text(x, value + 0.012, f"{value:.2f}".removeprefix("0"), ha="center", fontsize=7.5,
                color=INK)
  axes.set_xticks(range(len(recalls)),
                  [f"{kind.replace('_', ' ')}\n{counts[kind]:,}" for kind in recalls], fontsize=9)
  axes.set(ylim=(0, 1.08), ylabel=f"found by {boxes} boxes (overlap ≥ {iom:g})")
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.set_title(title, fontsize=11, color=INK, parse_math=False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  _plain(axes)
  return figure


def _plain(axes) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(GREY)
  axes.tick_params(colors="#4a5568")
  axes.set_axisbelow(True)
