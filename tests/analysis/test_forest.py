"""analysis.forest: a point for every figure that is defined, an interval where there is one."""

from medattn_jax.analysis import figures, forest


def test_points_and_intervals_are_the_figures():
  own = lambda kappa, area: {
    "kappa": kappa, "kappa_ci": [kappa - 0.1, kappa + 0.05], "auc_referable": area,
    "auc_referable_ci": None}
  answers = {"runs/" + "x" * 50: own(0.8, None), "mean": own(0.85, 0.99)}
  page = forest.forest(answers, {"gain": own(-0.05, 0.01)}, whole="mean",
                       figures=["kappa", "auc_referable"], title="two $")
  words = [[text.get_text() for text in axes.texts] for axes in page.axes]
  assert words == [["0.800", "0.850"], ["0.990"], ["-0.050"], ["+0.010"]]
  lines = [list(line.get_xdata()) for line in page.axes[0].get_lines()]
  assert lines == [[0.8 - 0.1, 0.8 + 0.05], [0.8], [0.85 - 0.1, 0.85 + 0.05], [0.85]]
  named = [label.get_text() for label in page.axes[0].get_yticklabels()]
  assert named == ["…" + "x" * 33, "mean"]
  assert len(figures.png(page)) > 5_000
