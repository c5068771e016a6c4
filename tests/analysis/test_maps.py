"""analysis.maps: the lines enclose what they say, one scale for all, and every frame is there."""

import io
import time
import tracemalloc

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.path import Path
from PIL import Image

from medattn_jax.analysis import figures, maps


def pixels(figure):
  return np.asarray(Image.open(io.BytesIO(figures.png(figure, dpi=100))).convert("RGB"))


def frames(gif):
  """uint8 [n, h, w, 3] of a GIF, and the milliseconds of each frame."""
  shown, times = [], []
  with Image.open(io.BytesIO(gif)) as image:
    for number in range(image.n_frames):
      image.seek(number)
      shown.append(np.asarray(image.convert("RGB")))
      times.append(image.info["duration"])
  return np.stack(shown), times


def panels(figure):
  """The axes with images in them, in the order in which they were drawn."""
  return [axes for axes in figure.axes if axes.get_images()]


def enclosed(lines, shape):
  """bool [H, W]: the pixels whose middles lie within an odd number of closed lines."""
  rows, columns = np.mgrid[:shape[0], :shape[1]]
  middles = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], -1)
  inside = np.zeros(len(middles), bool)
  for line in lines:
    np.testing.assert_array_equal(line[0], line[-1])
    inside ^= Path(line).contains_points(middles)
  return inside.reshape(shape)


def drawn_lines(axes, shape):
  """[mask enclosed by each kind of line] of a panel, by the line's colour."""
  found = {}
  for lines in axes.collections:
    colour = tuple(np.round(lines.get_colors()[0][:3], 3))
    found[colour] = enclosed([path.vertices * shape[::-1] for path in lines.get_paths()], shape)
  return found


def rgb(colour):
  return tuple(np.round(to_rgb(colour), 3))


def disc(side, row=0.5, column=0.5, radius=0.25):
  y, x = (np.mgrid[:side, :side] + 0.5) / side
  return (y - row) ** 2 + (x - column) ** 2 < radius**2


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 5), (20, 20)])
def test_outlines_enclose_the_mask_and_nothing_else(share, shape):
  """Holes, islands in holes, corners that touch, edges of the image."""
  for seed in range(4):
    mask = np.random.default_rng(seed).random(shape) < share
    lines = maps.outlines(mask)
    np.testing.assert_array_equal(enclosed(lines, shape), mask)
    # Each edge between inside and outside is walked once, with the mask to the right of the way.
    padded = np.pad(mask, 1).astype(int)
    edges = np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    assert sum(np.abs(np.diff(line, axis=0)).sum() for line in lines) == edges
    area = sum((line[:-1, 0] * line[1:, 1] - line[1:, 0] * line[:-1, 1]).sum() for line in lines)
    assert area / 2 == mask.sum()
    for line in lines:  # only corners, none twice on one side
      steps = np.diff(line, axis=0)
      assert ((steps == 0).sum(1) == 1).all()
      assert ((steps[1:] == 0) != (steps[:-1] == 0)).all()


def test_pixels_that_touch_at_a_corner_are_apart():
  assert len(maps.outlines(np.eye(3, dtype=bool))) == 3
  assert maps.outlines(np.zeros((4, 4), bool)) == []


def test_iou_by_hand():
  attention = np.array([[0.9, 0.9, 0.1], [0.6, 0.5, 0.0]])  # 0.5 is not above 0.5
  region = np.array([[1, 0, 0], [1, 1, 1]], bool)
  assert maps.iou(attention, region) == pytest.approx(2 / 5)
  assert maps.iou(attention, attention > 0.5) == 1 and maps.iou(attention, ~region) == 1 / 4
  assert maps.iou(np.zeros((2, 2)), np.zeros((2, 2), bool)) is None
  with pytest.raises(ValueError, match=r"\[2, 3\].*\[3, 2\]"):
    maps.iou(attention, region.T)


def test_a_panel_has_the_map_on_its_scale_and_both_lines():
  """Whatever the map, its colours run from 0 to 1; the lines are those of the two masks."""
  region = disc(28, 0.4)
  for attention in (disc(28) * 0.9, np.full((28, 28), 0.25), np.zeros((28, 28)),
                    np.random.default_rng(0).random((28, 28)) * 0.01 + 0.495):
    figure = maps.over(np.full((28, 28, 1), 200, np.uint8), attention, region=region)
    axes = panels(figure)[0]
    image, heat = axes.get_images()
    assert heat.get_clim() == (0, 1) and image.get_clim() == (0, 255)
    np.testing.assert_array_equal(heat.get_array(), attention.astype(np.float32))
    lines = drawn_lines(axes, (28, 28))
    if (attention > 0.5).any():
      np.testing.assert_array_equal(lines[rgb(maps.EDGE)], attention > 0.5)
    np.testing.assert_array_equal(lines[rgb(maps.TRUTH)], region)
    found = maps.iou(attention, region)
    assert axes.get_title().endswith(f"IoU {found:.2f}")
    (bar,) = [axes for axes in figure.axes if not axes.get_images() and axes.get_ylim() == (0, 1)]
    assert [label.get_text() for label in bar.get_yticklabels()] == [
      "0.00", "0.25", "0.50", "0.75", "1.00"]


def test_the_truth_is_drawn_where_it_is_known_only():
  attention = disc(28) * 0.8
  figure = maps.alone(attention)
  assert rgb(maps.TRUTH) not in drawn_lines(panels(figure)[0], (28, 28))
  assert "IoU" not in panels(figure)[0].get_title()
  said = lambda figure: [text.get_text() for text in figure.legends[0].get_texts()]
  assert said(figure) == ["edge of {A > 0.5}"]
  figure = maps.alone(attention, region=disc(28))
  dashed = [lines for lines in panels(figure)[0].collections if lines.get_linestyle()[0][1]]
  assert len(dashed) == 2 and said(figure) == ["edge of {A > 0.5}", "true region"]


def test_small_pixels_are_squares():
  """A checkerboard of 28² is drawn in its own two colours, and nothing in between."""
  board = np.indices((28, 28)).sum(0) % 2 * 255
  figure = maps.page(np.zeros((28, 28)), board, [maps.Sample(board.astype(np.uint8), "n")])
  image = pixels(figure)
  for axes in panels(figure):
    box = axes.get_window_extent()
    left, right = int(box.x0) + 3, int(box.x1) - 3
    top, bottom = int(image.shape[0] - box.y1) + 3, int(image.shape[0] - box.y0) - 3
    colours, counts = np.unique(
      image[top:bottom, left:right].reshape(-1, 3), axis=0, return_counts=True)
    black = axes is panels(figure)[0]  # the map alone
    assert len(colours) == (1 if black else 2)
    assert black or 0.8 < counts[0] / counts[1] < 1.25


def test_a_page_shows_names_classes_and_at_most_two_dozen():
  rng = np.random.default_rng(0)
  attention, region = disc(28) * 0.9, disc(28, 0.45)
  names = ["plain", "a $\\frac{$ b", "視網膜 é", "x" * 300, "line\nbreak"]
  samples = [maps.Sample(rng.integers(0, 255, (28, 28), np.uint8), names[i % 5], i % 3, 1)
             for i in range(30)]
  figure = maps.page(attention, np.full((28, 28), 128.0), samples, region=region, title="set")
  drawn = panels(figure)
  assert len(drawn) == 3 + 24
  assert figure.get_suptitle() == (
    f"set · {(attention > 0.5).mean():.0%} attended · IoU {maps.iou(attention, region):.2f}")
  below = [axes.get_xlabel() for axes in drawn[3:]]
  assert below[:3] == ["true 0, given 1", "true 1, given 1", "true 2, given 1"]
  assert len({axes.xaxis.label.get_color() for axes in drawn[3:5]}) == 2  # wrong and right
  for axes in drawn:
    np.testing.assert_array_equal(drawn_lines(axes, (28, 28))[rgb(maps.EDGE)], attention > 0.5)
    assert len(axes.get_title()) < 40 and "\n" not in axes.get_title()
  assert drawn[3].get_title() == "plain" and drawn[4].get_title() == names[1]
  assert pixels(figure).shape[2] == 3
  unknown = maps.page(attention, np.zeros((28, 28)), [maps.Sample(np.zeros((28, 28)), "n")])
  assert panels(unknown)[3].get_xlabel() == ""
  assert len(panels(maps.page(attention, np.zeros((28, 28))))) == 3


def test_nothing_overlaps():
  """Titles, labels, legend and panels of a full page lie beside one another, inside the page."""
  region = disc(40, 0.45)
  samples = [maps.Sample(np.zeros((40, 40)), "m" * 40, "class-number-one", "class-number-two")] * 24
  for figure in (
    maps.page(disc(40) * 0.9, np.zeros((40, 40)), samples, region=region),
    maps.class_means([np.zeros((40, 40))] * 8, [1] * 8, disc(40), names=["m" * 40] * 8),
    maps.evolution([disc(40)] * 12, [10**6 + i for i in range(12)], region=region)):
    pixels(figure)
    boxes = [figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()]
    for axes in panels(figure):
      boxes += [axes.get_window_extent().expanded(0.99, 0.99)]
      boxes += [text.get_window_extent() for text in (axes.title, axes.xaxis.label)
                if text.get_text()]
    for index, one in enumerate(boxes):
      assert figure.bbox.x0 <= one.x0 and one.x1 <= figure.bbox.x1
      assert figure.bbox.y0 <= one.y0 and one.y1 <= figure.bbox.y1
      for other in boxes[index + 1:]:
        assert not one.overlaps(other), (one, other)


def test_moments_are_even_with_both_ends():
  assert maps.moments(1) == [0] and maps.moments(5) == [0, 1, 2, 3, 4]
  assert maps.moments(12) == list(range(12))
  found = maps.moments(1000)
  assert len(found) == 12 and (found[0], found[-1]) == (0, 999)
  assert np.ptp(np.diff(found)) <= 1


def test_evolution_shows_the_moments_with_their_steps():
  several = [disc(28, radius=0.5 - 0.4 * t) * 0.9 for t in np.linspace(0, 1, 30)]
  steps, region = [100 * i for i in range(30)], disc(28, radius=0.2)
  figure = maps.evolution(several, steps, region=region)
  chosen = maps.moments(30)
  assert [axes.get_title() for axes in panels(figure)] == [
    f"step {steps[i]:,} · IoU {maps.iou(several[i], region):.2f}" for i in chosen]
  for axes, index in zip(panels(figure), chosen, strict=True):
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), several[index].astype("f4"))
    assert axes.get_images()[0].get_clim() == (0, 1)
  assert len(panels(maps.evolution(several[:1], [0]))) == 1
  for wrong in ((several, steps[1:]), ([], [])):
    with pytest.raises(ValueError, match="as many"):
      maps.evolution(*wrong)
    with pytest.raises(ValueError, match="as many"):
      maps.animation(*wrong)


def test_a_gif_has_a_frame_a_map_on_one_scale():
  """A level map has the scale's own colour at its middle, whatever was before and comes after."""
  levels = [0.0, 0.1, 0.3, 0.3, 0.6, 0.8, 1.0]
  shown, times = frames(maps.animation([np.full((28, 28), v) for v in levels], range(7)))
  assert len(shown) == len(times) == 7
  for one, level in zip(shown, levels, strict=True):
    wanted = np.array(colormaps[maps.HEAT](level)[:3]) * 255
    assert np.abs(one[250, 150] - wanted).max() <= 4, level
  assert (shown[1:] != shown[:-1]).any((1, 2, 3)).all()  # the same map at another step too
  background = shown[:, 360:, 200:230]
  assert (background == 255).all()
  bar = shown[:, 100:330, 310:315]  # the scale itself stands still
  assert (bar == bar[0]).all() and len(np.unique(bar[0].reshape(-1, 3), axis=0)) > 100
  assert times[-1] == 2000 and len(set(times[:-1])) == 1
  shrunk, _ = frames(maps.animation([np.ones((4, 4)), np.zeros((4, 4))], [0, 1]))
  line = shrunk[:, :, :290, 2].astype(int) - shrunk[:, :, :290, 0] > 80  # as blue as the edge alone
  assert line[0].sum() > 500 and not line[1].any()  # nothing of it stays
  region = disc(28)
  (alone,), _ = frames(maps.animation([disc(28) * 0.9], [5], region=region))
  assert np.abs(alone.astype(int) - [round(255 * c) for c in to_rgb(maps.EDGE)]).sum(-1).min() <= 9
  many, times = frames(maps.animation([np.eye(4)] * 20, range(20)))
  assert len(many) == 20 and 8000 < sum(times) < 12000


def test_class_means_show_their_own_pixels_and_say_how_many():
  means = [np.full((28, 28, 3), (250.4, 20, 30)), np.full((28, 28, 3), np.nan)]
  figure = maps.class_means(means, [1200, 0], disc(28), names=["ill", "never seen"])
  first, second = panels(figure)
  assert first.get_images()[0].get_array()[5, 5].tolist() == [250, 20, 30]
  assert (second.get_images()[0].get_array() == 255).all()
  assert (first.get_title(), second.get_title()) == ("ill\n1,200 images", "never seen\n0 images")
  for axes in (first, second):
    np.testing.assert_array_equal(drawn_lines(axes, (28, 28))[rgb(maps.EDGE)], disc(28))
  grey = maps.class_means([np.full((28, 28), 7.0)] * 9, [1] * 9, disc(28), region=disc(28))
  assert [axes.get_title() for axes in panels(grey)] == [f"class {i}\n1 image" for i in range(9)]
  assert grey.get_suptitle().endswith("IoU 1.00")
  assert np.allclose(panels(grey)[0].get_images()[0].get_array(), 7)


def test_other_shapes_and_sizes():
  """A map that is no square, an image of another size than the map, and images that are none."""
  attention = np.linspace(0, 1, 20 * 40).reshape(20, 40)
  axes = panels(maps.over(np.zeros((60, 120, 3), np.uint8), attention))[0]
  np.testing.assert_array_equal(drawn_lines(axes, (20, 40))[rgb(maps.EDGE)], attention > 0.5)
  assert axes.get_aspect() == 0.5
  assert [image.get_extent() for image in axes.get_images()] == [[0, 1, 1, 0]] * 2
  for wrong in (np.zeros((28, 28, 4)), np.zeros(28), np.zeros((2, 28, 28, 3))):
    with pytest.raises(ValueError, match="an image is"):
      maps.over(wrong, attention)
  for wrong in (np.zeros((28, 28, 1)), np.zeros((0, 28)), np.zeros(3)):
    with pytest.raises(ValueError, match="an attention map is"):
      maps.alone(wrong)
  with pytest.raises(ValueError, match="a region"):
    maps.alone(attention, region=np.zeros((28, 28), bool))


def test_large_noise_is_bounded_in_memory_and_time():
  """The raggedest of maps on the largest of images: megabytes and seconds."""
  rng = np.random.default_rng(0)
  attention, photograph = rng.random((1230, 1230), np.float32), np.zeros((1230, 1230, 3), np.uint8)
  tracemalloc.start()
  begin = time.process_time()
  figure = maps.over(photograph, attention, region=attention > 0.7)
  seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 100 * 2**20 and seconds < 10
  assert all(max(image.get_array().shape) <= maps.SIDE for image in panels(figure)[0].get_images())
