"""analysis.figures and overlays: what is drawn is what was given."""

import io

import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from medattn_jax.analysis import figures, overlays


def pixels(figure):
  return np.asarray(Image.open(io.BytesIO(figures.png(figure, dpi=100))).convert("RGB")) / 255


def has_colour(image, colour, least=50):
  near = np.abs(image - np.array(matplotlib.colors.to_rgb(colour))).max(-1) < 0.06
  return near.sum() >= least


def test_confusion_shows_every_count():
  matrix = np.arange(25).reshape(5, 5) * 1000
  (axes, _) = figures.confusion(matrix, title="set").axes
  shown = [text.get_text().split("\n")[0] for text in axes.texts]
  assert shown == [f"{count:,}" for count in matrix.ravel()]


def test_roc_says_what_is_not_defined():
  figure = figures.roc({"any": None, "referable": (np.array([0, 1]), np.array([0, 1]))},
                       {"any": None, "referable": 0.5}, {"referable": [0.25, 0.75]}, title="set")
  labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
  assert labels == ["any: not defined (one class only)", "referable: AUC 0.500 (0.250–0.750)"]
  assert pixels(figure).shape[2] == 3


def test_training_curves_take_what_there_is():
  records = [{"step": 1, "phase": "m", "loss": 2.0}, {"step": 2, "phase": "m", "loss": None},
             {"step": 2, "phase": "m", "validation_kappa": 0.5},
             {"step": 3, "phase": "c", "loss": 1.0, "learning_rate": 1e-3}]
  assert figures.series(records, "loss")[0].tolist() == [1, 3]
  figure = figures.training_curves(records, title="run")
  assert [text.get_text() for text in figure.axes[0].texts] == ["phase m", "phase c"]
  for some in ([], records[:1]):
    assert pixels(figures.training_curves(some, title="run")).any()


@pytest.mark.parametrize("name", ["plain", "a $\\frac{$ b", "視網膜 é", "x" * 300])
def test_names_are_drawn_as_they_are(name):
  """No mathematics, no warning, no failure, whatever an image is called."""
  page = overlays.explanation(
    np.zeros((64, 64, 3), np.uint8), np.zeros((3, 3, 5), np.float32),
    np.array([[0, 0, 20, 20]] * 4), np.eye(5)[0], name=name, grade=0)
  assert pixels(page).shape == (860, 1760, 3)
  assert pixels(figures.training_curves([], title=name)).any()


def page(**changed):
  rng = np.random.default_rng(0)
  photograph = rng.integers(0, 255, (100, 100, 3), np.uint8)
  photograph[40:60, 20:40] = (0, 255, 0)
  given = {
    "photograph": photograph, "gated": rng.normal(size=(4, 4, 5)).astype(np.float32),
    "boxes": np.array([[40, 20, 60, 40], [0, 0, 30, 30], [70, 70, 100, 100], [0, 60, 30, 90]]),
    "probabilities": np.array([0.1, 0.2, 0.4, 0.2, 0.1]), "name": "n", "grade": 2, "level": 3}
  return overlays.explanation(**(given | changed))


def test_page_holds_the_crops_and_numbers():
  figure = page()
  crops = [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()][-4:]
  assert [crop.shape for crop in crops] == [(20, 20, 3), (30, 30, 3), (30, 30, 3), (30, 30, 3)]
  np.testing.assert_array_equal(crops[0], np.broadcast_to([0, 255, 0], (20, 20, 3)))
  texts = {text.get_text() for axes in figure.axes for text in axes.texts}
  assert {"1", "2", "3", "4", "0.400", "grade", "truth"} <= texts
  assert any("true level 3 (severe)" in text.get_text() for text in figure.texts)
  image = pixels(figure)
  for colour in overlays.REGIONS:
    assert has_colour(image, colour), colour


def test_true_lesions_only_where_known():
  boxes, names = np.array([[10, 10, 14, 14], [50, 50, 70, 90]]), ["dot", "big_blot"]
  with_truth = page(true_boxes=boxes, true_types=[0, 1], type_names=names)
  photo = with_truth.axes[0]
  assert [text.get_text() for text in photo.get_legend().get_texts()] == ["dot (1)", "big blot (1)"]
  assert page().axes[0].get_legend() is None
  assert page(true_boxes=boxes[:0]).axes[0].get_legend() is None


def test_all_maps_share_one_scale():
  """A level that responds less is drawn darker; a map of one value draws too."""
  gated = np.zeros((4, 4, 5), np.float32)
  gated[..., 1], gated[..., 3], gated[..., 0] = 1.0, 0.2, 50.0
  figure = page(gated=gated, photograph=np.zeros((100, 100, 3), np.uint8))
  maps = [axes.get_images()[0].get_array() for axes in figure.axes if axes.get_images()][1:5]
  brightness = [float(np.mean(shown)) for shown in maps]
  assert brightness[0] > 2 * brightness[2] > 2 * brightness[1] and brightness[1] == brightness[3]
  page(gated=np.zeros((4, 4, 5), np.float32))
