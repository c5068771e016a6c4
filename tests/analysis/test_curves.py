"""analysis.curves: what is drawn is what was given, and the undefined is said."""

import numpy as np
from matplotlib.colors import same_color

from medattn_jax.analysis import curves, figures


def texts(axes):
  return [text.get_text() for text in axes.texts]


def test_operating_points_lie_where_they_are_read():
  curve = (np.array([0, 0.1, 1]), np.array([0, 0.8, 1]))
  figure = curves.operating(
    {"referable": {"a": curve, "b": curve}, "any": {"a": None, "b": curve}},
    {"referable": {"a": "A 0.9", "b": "B"}, "any": {"a": "A", "b": "B"}},
    {"referable": [(0.9, 0.8, "here"), (0.7, 0.95, "there")], "any": []}, title="$\\frac{$")
  left, right = figure.axes
  marks = [(line.get_xdata(), line.get_ydata()) for line in left.lines if line.get_marker() in "os"]
  np.testing.assert_allclose(marks, [[[0.1], [0.8]], [[0.3], [0.95]]])
  legend = lambda axes: [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend(left) == ["A 0.9", "B", "here", "there"]
  assert legend(right) == ["A: not defined", "B"]
  assert figures.png(figure, dpi=40)


def test_calibration_has_a_panel_a_side():
  curve = {"confidence": [0, 0.4, 0.9], "accuracy": [0, 0.5, 0.7], "images": [0, 4, 6]}
  figure = curves.calibrated(
    {"before": curve, "after": curve}, {"before": "ECE 1", "after": "ECE 2"}, title="set")
  assert len(figure.axes) == 4
  assert [axes.get_title() for axes in figure.axes[:2]] == ["before\nECE 1", "after\nECE 2"]
  bars = [bar.get_height() for bar in figure.axes[0].patches]
  assert bars == [0.5, 0.7]  # an empty bin has no accuracy
  assert [bar.get_height() for bar in figure.axes[2].patches] == [0, 4, 6]
  assert figures.png(figure, dpi=40)


def test_differences_stand_out_where_zero_is_outside():
  figure = curves.differences(
    [("sure", 0.2, [0.1, 0.3], "p 0.001"), ("unsure", -0.1, [-0.3, 0.1], "p 0.4"),
     ("alone", 0.0, None, "–"), ("nothing", None, None, "not defined")],
    title="first\nsecond", below="difference", sides=("first", "second"))
  (axes,) = figure.axes
  drawn = [line for line in axes.lines if len(line.get_xdata()) == 2][1:]  # after the zero
  assert [tuple(line.get_xdata()) for line in drawn] == [(0.1, 0.3), (-0.3, 0.1)]
  assert [same_color(line.get_color(), figures.BLUE) for line in drawn] == [True, False]
  assert [label.get_text() for label in axes.get_yticklabels()] == [
    "sure", "unsure", "alone", "nothing"]
  assert texts(axes) == ["p 0.001", "p 0.4", "–", "not defined", "← first", "second →"]
  low, high = axes.get_xlim()
  assert low == -high and high > 0.3
  assert figures.png(figure, dpi=40)
