"""The figures of an evaluation: arrays in, matplotlib figures out. Knows no model and no data."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE, GREEN, GREY, INK = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0", "#1a202c"
PHASE_SHADES = ("#ebf4ff", "#fffaf0", "#f0fff4", "#faf5ff")


def png(figure: Figure, dpi: int = 120) -> bytes:
  """The figure as PNG. A name in a script that the font lacks shows boxes, without a warning."""
  written = io.BytesIO()
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*[Gg]lyph")
    figure.savefig(written, format="png", dpi=dpi, facecolor=figure.get_facecolor())
  return written.getvalue()


def confusion(matrix: np.ndarray, *, title: str) -> Figure:
  """Counts [C, C] (rows true), shaded by their share of the row."""
  matrix = np.asarray(matrix)
  classes = len(matrix)
  share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
  figure = Figure(figsize=(6.2, 5.4), layout="constrained")
  axes = figure.add_subplot()
  shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
  for row in range(classes):
    for column in range(classes):
      axes.text(
        column, row, f"{matrix[row, column]:,}\n{share[row, column]:.0%}", ha="center",
        va="center", fontsize=10, color="white" if share[row, column] > 0.55 else INK)
  axes.set(
    xticks=range(classes), yticks=range(classes), xlabel="grade given", ylabel="true level")
  axes.set_title(title, parse_math=False, fontsize=11, color=INK)
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  bar = figure.colorbar(shown, ax=axes, shrink=0.8, format=PercentFormatter(1))
  bar.set_label("share of the true level")
  bar.outline.set_visible(False)
  return figure


def roc(
  curves: Mapping[str, tuple[np.ndarray, np.ndarray] | None],
  areas: Mapping[str, float | None],
  intervals: Mapping[str, Sequence[float] | None],
  *, title: str,
) -> Figure:
  """ROC curves by name, with their areas and, where given, intervals; None = not defined."""
  figure = Figure(figsize=(5.6, 5.4), layout="constrained")
  axes = figure.add_subplot()
  axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
  axes.axvline(0.5, color=GREY, linewidth=0.8, linestyle=":")
  axes.text(0.51, 0.02, "specificity .5", fontsize=8, color="#718096")
  for colour, (name, curve) in zip((BLUE, ORANGE, GREEN), curves.items(), strict=False):
    if curve is None:
      axes.plot([], [], color=colour, label=f"{name}: not defined (one class only)")
      continue
    label = f"{name}: AUC {areas[name]:.3f}"
    if intervals.get(name):
      label += f" ({intervals[name][0]:.3f}–{intervals[name][1]:.3f})"
    axes.plot(*curve, color=colour, linewidth=2, label=label)
  axes.set(
    xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal",
    xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)")
  axes.set_title(title, parse_math=False, fontsize=11, color=INK)
  axes.legend(loc="lower right", bbox_to_anchor=(1, 0.06), frameon=False, fontsize=9)
  plain(axes)
  return figure


def reliability(
  confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray, *,
  error: float | None, title: str,
) -> Figure:
  """Accuracy against confidence of the top label in equal bins, and how full the bins are."""
  bins = len(count)
  edges = np.linspace(0, 1, bins + 1)
  middle, width, full = (edges[1:] + edges[:-1]) / 2, 1 / bins, count > 0
  figure = Figure(figsize=(5.6, 6.2), layout="constrained")
  axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
  axes.bar(middle[full], accuracy[full], width * 0.92, color=BLUE, alpha=0.8, label="accuracy")
  axes.plot(confidence[full], accuracy[full], "o", color=ORANGE, markersize=4,
            label="at the mean confidence")
  axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
  shown = "not defined" if error is None else f"{error:.3f}"
  axes.set_title(f"{title}\nexpected calibration error {shown}", parse_math=False, fontsize=11,
                 color=INK)
  axes.legend(loc="upper left", frameon=False, fontsize=9)
  below.bar(middle, count, width * 0.92, color=GREY)
  below.set(xlabel="confidence (probability of the top grade)", ylabel="images")
  below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
  plain(axes)
  plain(below)
  return figure


def training_curves(records: Sequence[Mapping[str, object]], *, title: str) -> Figure:
  """Loss and validation kappa over the steps, the phases shaded.

  Args:
    records: lines of metrics.jsonl; those with a finite `loss` make the upper curve, those with a
      `kappa` or `validation_kappa` the lower. Each has `step` and `phase`.
    title: above it all.
  """
  figure = Figure(figsize=(8.6, 5.6), layout="constrained")
  axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
  spans: dict[str, list[float]] = {}
  for record in records:
    step = float(record["step"])
    span = spans.setdefault(str(record.get("phase", "")), [step, step])
    span[0], span[1] = min(span[0], step), max(span[1], step)
  for shade, (phase, (low, high)) in zip(PHASE_SHADES, spans.items(), strict=False):
    for one in (axes, below):
      one.axvspan(low, max(high, low + 0.5), color=shade, zorder=0, linewidth=0)
    axes.text((low + high) / 2, 1.0, f"phase {phase}", transform=axes.get_xaxis_transform(),
              ha="center", va="bottom", fontsize=9, color="#718096", parse_math=False)
  step, loss = series(records, "loss")
  if step.size:
    axes.plot(step, loss, color=BLUE, linewidth=0.8, alpha=0.35)
    window = max(1, step.size // 40)
    kernel = np.ones(window) / window
    axes.plot(np.convolve(step, kernel, "valid"), np.convolve(loss, kernel, "valid"), color=BLUE,
              linewidth=2)
  for key in ("validation_kappa", "kappa"):
    step, kappa = series(records, key)
    if step.size:
      below.plot(step, kappa, color=GREEN, linewidth=1.6, marker="o", markersize=4)
      best = int(kappa.argmax())
      below.annotate(f"{kappa[best]:.3f}", (step[best], kappa[best]), xytext=(0, 6),
                     textcoords="offset points", ha="center", fontsize=9, color=GREEN)
      break
  else:
    below.text(0.5, 0.5, "no validation during this training", transform=below.transAxes,
               ha="center", va="center", color="#718096")
  axes.set(ylabel="training loss")
  below.set(xlabel="step", ylabel="validation kappa")
  below.margins(y=0.2)
  figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
  plain(axes)
  plain(below)
  return figure


def series(
  records: Sequence[Mapping[str, object]], key: str
) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of the records that hold a finite number under `key`; float64 both."""
  pairs = [
    (record["step"], record[key]) for record in records
    if isinstance(record.get(key), int | float) and np.isfinite(record[key])
  ]
  return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)


def plain(axes) -> None:
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(GREY)
  axes.tick_params(colors="#4a5568")
  axes.set_axisbelow(True)
