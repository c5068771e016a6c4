"""Figure of what averaging gains: every answer's figures with intervals, and the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medattn_jax.analysis.figures import BLUE, GREEN, GREY, INK, ORANGE

WORDS = {
  "kappa": "quadratic weighted kappa", "kappa_argmax": "kappa of the likeliest class",
  "accuracy": "accuracy", "accuracy_argmax": "accuracy of the likeliest class",
  "auc_referable": "AUC, referable"}


def forest(
  answers: Mapping[str, Mapping[str, object]], gains: Mapping[str, Mapping[str, object]], *,
  whole: str, figures: Sequence[str], title: str,
) -> Figure:
  """Points with 95 % intervals: above, each way of answering; below, what `whole` gains.

  Args:
    answers: {name: {figure: value, figure_ci: [low, high]}}, drawn from top to bottom; `whole` in
      another colour. A name longer than 34 characters loses its beginning.
    gains: the like, by what it is a gain over.
    whole: the name of the mean.
    figures: those to draw, a column each; undefined ones are left empty.
    title: above it all.
  """
  heights = (len(answers) + 0.8, len(gains) + 0.8)
  figure = Figure(figsize=(3.1 * len(figures) + 2.4, 0.3 * sum(heights) + 1.7),
                  layout="constrained")
  panels = figure.subplots(2, len(figures), sharey="row", height_ratios=heights, squeeze=False)
  for row, table in enumerate((answers, gains)):
    for axes, key in zip(panels[row], figures, strict=True):
      for place, (name, own) in enumerate(table.items()):
        value, interval = own[key], own[f"{key}_ci"]
        if value is None:
          continue
        colour = GREEN if row else ORANGE if name == whole else BLUE
        if interval:
          axes.plot(interval, (place, place), color=colour, linewidth=2, alpha=0.55,
                    solid_capstyle="butt")
        axes.plot(value, place, "o", color=colour, markersize=6)
        axes.annotate(f"{value:+.3f}" if row else f"{value:.3f}", (value, place), xytext=(0, 6),
                      textcoords="offset points", ha="center", fontsize=8, color=INK)
      if row:
        axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel(f"gain in {WORDS[key].removeprefix('quadratic weighted ')}", fontsize=9)
      else:
        axes.set_title(WORDS[key], fontsize=10, color=INK)
      axes.set_yticks(range(len(table)), [short(name) for name in table], fontsize=9,
                      parse_math=False)
      axes.set_ylim(len(table) - 0.5, -0.75)
      axes.xaxis.set_major_locator(MaxNLocator(5))
      axes.spines[["top", "right", "left"]].set_visible(False)
      axes.spines["bottom"].set_color(GREY)
      axes.tick_params(axis="y", length=0)
      axes.tick_params(colors="#4a5568")
      axes.margins(x=0.12)
  figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
  return figure


def short(name: str, most: int = 34) -> str:
  """A name's end, which tells paths apart."""
  return name if len(name) <= most else f"…{name[-(most - 1) :]}"
