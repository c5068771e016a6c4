"""Drawn gray images whose class is told in one region alone: the ground truth for an attention map.

`draw(seed, number, size, num_classes)` is a function of its arguments. All images of a seed show
one anatomy, aligned, and in the same region, whose shape, place and size come from the seed, each
has a small grating whose direction is its class. Outside of the region there are more such
gratings, alike in everything, with directions drawn by chance. What varies besides is the same
inside and outside: the tissue's shade (softly, and otherwise in each image), exposure and noise.

Everything is drawn in the unit square, so an image is the same at every size but for the noise.
Knows no TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np

from medattn_jax.data import pixels

AREA = (0.1, 0.18)  # of the region: what is aimed at
SHAPES = ("ellipse", "rectangle", "crescent", "blob")
MARGIN = 0.05  # between the region and the frame
RADIUS = 0.08  # of a grating: it ends there, so none is partly inside
WAVELENGTH = 0.085
DISTRACTORS = (3, 5)
CONTRAST = (0.16, 0.26)  # of a grating, of full scale
TISSUE = 0.05  # deviation of the tissue's shade
NOISE = 0.05
_GRID = 64  # places are chosen on it


def draw(seed: int, number: int, size: int, num_classes: int = 2) -> tuple[np.ndarray, int]:
  """Image `number` of a seed: uint8 [size, size], and its class."""
  chance = np.random.default_rng([seed, number, 2])
  level = int(chance.integers(num_classes))
  plan = _plan(seed)
  centres = [plan.inside[chance.integers(len(plan.inside))]]
  centres += _apart(chance, plan.outside, chance.integers(DISTRACTORS[0], DISTRACTORS[1] + 1))
  classes = [level, *chance.integers(num_classes, size=len(centres) - 1)]
  image = _anatomy(seed, size) + TISSUE * _soft(chance.normal(size=(7, 7)), size)
  for centre, kind in zip(centres, classes, strict=True):
    angle = np.pi * (kind + 0.5) / num_classes + chance.normal(0, 0.12)
    phase, strength = chance.uniform(0, 2 * np.pi), chance.uniform(*CONTRAST)
    _grating(image, centre, angle, phase, strength)
  image = (image - 0.5) * chance.uniform(0.85, 1.15) + 0.5 + chance.normal(0, 0.05)
  image += chance.normal(0, NOISE, (size, size))
  return (image.clip(0, 1) * 255).round().astype(np.uint8), level


def draw_example(seed: int, number: int, size: int, num_classes: int = 2) -> dict:
  """Image `number` as an example of data/schema.py, a PNG."""
  image, level = draw(seed, number, size, num_classes)
  return pixels.example(f"{number:05d}", level, image, size)


def region(seed: int, size: int) -> np.ndarray:
  """bool [size, size]: where the class is told, in every image of the seed. 5 to 20 % of it."""
  return _plan(seed).contains(*_frame(size))


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What the images of a seed have in common besides the anatomy."""

  contains: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (y, x in the unit square) → bool
  inside: np.ndarray  # float [n, 2]: the centres of gratings that are wholly inside
  outside: np.ndarray  # and of those that are wholly outside


@functools.lru_cache(8)
def _plan(seed: int) -> _Plan:
  """The first region drawn from the seed that gratings can fill."""
  y, x = _frame(_GRID)
  points = np.stack(np.broadcast_arrays(y, x), -1)
  framed = (points.min(-1) > RADIUS) & (points.max(-1) < 1 - RADIUS)
  for attempt in itertools.count():
    contains = _shape(np.random.default_rng([seed, attempt, 1]))
    there = contains(y, x)
    edge = there & ~(
      np.roll(there, 1, 0) & np.roll(there, -1, 0) & np.roll(there, 1, 1) & np.roll(there, -1, 1)
    )
    reach = RADIUS + 1 / _GRID
    near = _distance(points, points[edge]) < reach
    inside = points[there & ~near]
    if len(inside) and (_distance(points[there], inside) < reach).mean() > 0.85:
      return _Plan(contains, inside, points[framed & ~there & ~near])


def _distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
  """From each of points [..., 2] to the nearest of others [n, 2]."""
  return np.sqrt(((points[..., None, :] - others) ** 2).sum(-1).min(-1))


def _shape(chance: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """A region drawn by chance, as a function of y and x."""
  kind = SHAPES[chance.integers(len(SHAPES))]
  area, turn, aspect = chance.uniform(*AREA), chance.uniform(0, 2 * np.pi), chance.uniform(1, 1.7)
  waves = chance.normal(0, 1, (3, 2)) * np.array([[0.14], [0.1], [0.05]])

  def within(v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """In its own frame, where it is about 2 wide."""
    if kind == "ellipse":
      return u**2 / aspect + v**2 * aspect < 1
    if kind == "rectangle":  # with round corners
      return (u**2 / aspect) ** 2 + (v**2 * aspect) ** 2 < 1
    if kind == "crescent":
      return (u**2 + v**2 < 1) & ((u - 0.85) ** 2 + v**2 > 0.5)
    angle = np.arctan2(v, u)
    edge = 1 + sum(a * np.cos(k * angle) + b * np.sin(k * angle)
                   for k, (a, b) in enumerate(waves, start=2))
    return np.hypot(u, v) < edge

  # Its scale follows from its area; its middle is such that it keeps from the frame.
  cosine, sine = np.cos(turn), np.sin(turn)
  y, x = (np.mgrid[:200, :200] + 0.5) / 50 - 2
  there = within(y * cosine - x * sine, y * sine + x * cosine)
  scale = np.sqrt(area / (there.mean() * 16))
  extent = np.stack([y[there], x[there]]) * scale
  low, high = MARGIN - extent.min(1), 1 - MARGIN - extent.max(1)
  middle = chance.uniform(low, high)

  def contains(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y, x = (y - middle[0]) / scale, (x - middle[1]) / scale
    return within(y * cosine - x * sine, y * sine + x * cosine)

  return contains


def _apart(chance: np.random.Generator, places: np.ndarray, count: int) -> list[np.ndarray]:
  """`count` of the places, of which no two overlap, or fewer where there is no room."""
  found: list[np.ndarray] = []
  for _ in range(10 * count):
    place = places[chance.integers(len(places))]
    if all(np.hypot(*(place - other)) > 2 * RADIUS for other in found):
      found.append(place)
    if len(found) == count:
      break
  return found


def _grating(
  image: np.ndarray, centre: np.ndarray, angle: float, phase: float, strength: float
) -> None:
  """Adds a grating to the image, float [S, S]; nothing of it is beyond RADIUS."""
  size = len(image)
  first = np.ceil((centre - RADIUS) * size - 0.5).clip(0).astype(int)
  last = np.floor((centre + RADIUS) * size - 0.5).astype(int) + 1
  window = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
  dy, dx = (axis - c for axis, c in zip(np.ogrid[window], centre * size - 0.5, strict=True))
  far = np.sqrt(dy**2 + dx**2) / (RADIUS * size)
  wave = np.cos((dy * np.sin(angle) + dx * np.cos(angle)) * (2 * np.pi / WAVELENGTH / size) + phase)
  image[window] += strength * wave * np.where(far < 1, np.cos(np.pi / 2 * far) ** 2, 0)


@functools.lru_cache(8)
def _anatomy(seed: int, size: int) -> np.ndarray:
  """float [size, size]: what all images of the seed share, a chest of sorts."""
  chance = np.random.default_rng([seed, 3])
  y, x = _frame(size)
  image = 0.5 + 0.08 * _soft(chance.normal(size=(5, 5)), size)
  for side in (-1, 1):  # two lungs, darker
    cy, cx = np.array([0.5, 0.5 + 0.21 * side]) + chance.normal(0, 0.02, 2)
    d = ((y - cy) / 0.36) ** 2 + ((x - cx) / 0.17) ** 2
    image -= 0.12 / (1 + np.exp(12 * (d - 1)))
  bend, count = chance.uniform(0.2, 0.45), chance.uniform(5, 7)
  image += 0.035 * np.cos(2 * np.pi * count * (y + bend * (x - 0.5) ** 2) + chance.uniform(0, 6))
  image += 0.1 * np.exp(-(((x - 0.5) / 0.07) ** 2))  # the spine
  image.setflags(write=False)
  return image


def _frame(size: int) -> tuple[np.ndarray, np.ndarray]:
  """y [size, 1] and x [1, size] of the pixels' centres."""
  places = (np.arange(size) + 0.5) / size
  return places[:, None], places[None]


def _soft(knots: np.ndarray, size: int) -> np.ndarray:
  """float [size, size]: a soft surface through random knots (cubic B-spline), deviation near 1."""
  weights = _spline(len(knots), size)
  return weights @ knots @ weights.T


@functools.lru_cache(8)
def _spline(knots: int, size: int) -> np.ndarray:
  """float [size, knots]: the weights, scaled for a mean deviation of 1 over both axes."""
  place = (np.arange(size) + 0.5) / size * (knots - 3) + 1  # away from the ends
  t = np.abs(place[:, None] - np.arange(knots))
  near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t).clip(0) ** 3 / 6
  weights = np.where(t < 1, near, far)
  return weights / np.sqrt((weights**2).sum(1).mean())
