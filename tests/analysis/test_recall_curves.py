"""analysis.recall_curves: the lines and bars are the numbers given."""

import numpy as np

from medattn_jax.analysis import figures, recall_curves

LABELS = {"regions": "C-Net", "maps": "A-Net", "random": "chance"}


def test_lines_are_the_curves_and_the_paper_is_marked():
  rng = np.random.default_rng(0)
  curves = {name: {kind: np.sort(rng.random(9)).tolist() for kind in ("box", "image")}
            for name in LABELS}
  wide = {kind: [[v - 0.1, v + 0.1] for v in curves["maps"][kind]] for kind in ("box", "image")}
  page = recall_curves.recall(
    curves, LABELS, intervals={"maps": wide}, marked=4,
    paper={"boxes": 4, "box": 0.76, "image": 0.83}, iom=0.3, title="set $x")
  for axes, kind in zip(page.axes, ("box", "image"), strict=True):
    drawn = {line.get_label(): line for line in axes.get_lines()}
    for name, label in LABELS.items():
      assert drawn[label].get_xdata().tolist() == list(range(1, 10))
      assert drawn[label].get_ydata().tolist() == curves[name][kind]
    words = {text.get_text() for text in axes.texts}
    assert words == {f"{curves['regions'][kind][3]:.2f}", f"{curves['maps'][kind][3]:.2f}",
                     {"box": "0.76", "image": "0.83"}[kind]}
  assert len(figures.png(page)) > 10_000


def test_bars_are_the_recalls_of_each_type():
  recalls = {
    "hard_exudate": {"regions": 0.5, "maps": 0.25}, "haemorrhage": {"regions": 1, "maps": 0}}
  page = recall_curves.by_type(
    recalls, {"hard_exudate": 12, "haemorrhage": 3456}, LABELS, boxes=4, iom=0.3, title="set")
  (axes,) = page.axes
  assert [bar.get_height() for bar in axes.patches] == [0.5, 1, 0.25, 0]
  assert [label.get_text() for label in axes.get_xticklabels()] == [
    "hard exudate\n12", "haemorrhage\n3,456"]
