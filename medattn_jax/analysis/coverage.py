"""Recall of lesions against the number of boxes shown, beside chance and the best possible.

papers.md §1, "Lesions". Boxes are y0, x0, y1, x1 in pixels of one frame, ends excluded. What the
first n of a photograph's boxes find is kept as bool [N, k]: row n - 1 says of each of its k lesions
whether one of n boxes finds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medattn_jax import metrics
from medattn_jax.analysis import lesions

PAPER = {"boxes": 4, "box": 0.76, "image": 0.83}  # at an overlap of .3, on 182 photographs
DRAWS = 20  # of random boxes


class Curve(NamedTuple):
  """float64 [N] each: recall of 1, 2, … N boxes. Per image: photographs with a lesion found."""

  box: np.ndarray
  image: np.ndarray


def found(
  true: np.ndarray, proposed: np.ndarray, number: int, threshold: float = 0.3
) -> np.ndarray:
  """bool [number, k]: which of the lesions [k, 4] the first 1, 2, … boxes of [m, 4] find.

  Where fewer than `number` are proposed, more of them find no more.
  """
  seen = np.zeros((number, len(true)), bool)
  each = lesions.iom(proposed[:number], true) >= threshold
  seen[: len(each)] = each
  return np.logical_or.accumulate(seen, axis=0)


def found_by_best(
  true: np.ndarray, number: int, size: int, full_size: int, threshold: float = 0.3
) -> np.ndarray:
  """The same of the best 1, 2, … squares of `size` (lesions.best_sequence)."""
  if not len(true):
    return np.zeros((number, 0), bool)
  sequence = lesions.best_sequence(true, number, size, full_size, threshold)
  return np.stack([(lesions.iom(true, boxes) >= threshold).any(1) for boxes in sequence])


def curve(founds: Sequence[np.ndarray]) -> Curve | None:
  """Recall over photographs, of `found` of each; those without a lesion do not count.

  Returns:
    None without any lesion.
  """
  founds = [own for own in founds if own.shape[1]]
  if not founds:
    return None
  return Curve(np.concatenate(founds, axis=1).mean(1),
               np.stack([own.any(1) for own in founds]).mean(0))


def of_type(
  founds: Sequence[np.ndarray], types: Sequence[np.ndarray], kind: int
) -> list[np.ndarray]:
  """What is found of the lesions of one type alone: int [k] types of each photograph."""
  return [own[:, which == kind] for own, which in zip(founds, types, strict=True)]


def mean_curve(curves: Sequence[Curve | None]) -> Curve | None:
  """The mean of several draws' curves; None where they are."""
  if curves[0] is None:
    return None
  return Curve(*(np.mean(column, axis=0) for column in zip(*curves, strict=True)))


def interval(
  founds: Sequence[np.ndarray], patient: Sequence[str], *, resamples: int, seed: int,
  coverage: float = 0.95,
) -> Curve | None:
  """Percentile intervals of `curve` for each number of boxes, resampling whole patients.

  Returns:
    A Curve of float64 [N, 2], (low, high); None without lesions or resamples.
  """
  there = [at for at, own in enumerate(founds) if own.shape[1]]
  if not there or not resamples:
    return None
  share = lambda of, out_of: lambda weight: (weight @ of) / (weight @ out_of)
  lesions_found = np.array([founds[at].sum(1) for at in there], np.float64)
  hit = np.array([founds[at].any(1) for at in there], np.float64)
  count = np.array([founds[at].shape[1] for at in there], np.float64)
  statistics = [share(own, count) for own in lesions_found.T]
  statistics += [share(own, np.ones(len(there))) for own in hit.T]
  drawn = metrics.resampled(np.asarray(patient)[there], statistics, resamples, seed)
  edges = np.quantile(drawn, [(1 - coverage) / 2, (1 + coverage) / 2], axis=1).T
  return Curve(edges[: len(edges) // 2], edges[len(edges) // 2 :])


def scattered(rng: np.random.Generator, boxes: np.ndarray, full_size: int) -> np.ndarray:
  """int64 [n, 4]: boxes of the same sides, each uniform over the places inside the image."""
  boxes = np.asarray(boxes, np.int64).reshape(-1, 4)
  sides = np.minimum(boxes[:, 2:] - boxes[:, :2], full_size)
  corner = rng.integers(0, full_size - sides + 1)
  return np.concatenate([corner, corner + sides], axis=1)


def peaks(
  gated: np.ndarray, rows: np.ndarray, columns: np.ndarray, number: int, *, share: float = 0.5
) -> np.ndarray:
  """Boxes that the gated maps of one photograph draw by themselves, strongest first. [choice]

  A peak is a cell above zero, of a level that is not 0, which none of its eight neighbours exceeds.
  Its box holds the cells from which the steepest way up leads to it and that reach `share` of its
  height: where the map of its level glows around it. The strongest peak over all levels comes
  first; one that lies where a stronger one glows, in whatever level, is the same finding and left
  out.

  Args:
    gated: float [h, w, C].
    rows, columns: float [h + 1] and [w + 1]; where the cells begin and end in the image.
    number: of boxes at most.
    share: of the peak's height.

  Returns:
    int64 [m, 4], m ≤ number; whole pixels, rounded outwards.
  """
  maps = np.moveaxis(np.asarray(gated, np.float64), -1, 0)[1:]
  levels, height, width = maps.shape
  summits, values = _summits(maps), maps.reshape(levels, -1)
  which, places = np.nonzero((summits == np.arange(height * width)) & (values > 0))
  glowing = np.zeros(height * width, bool)
  boxes = []
  for at in np.argsort(-values[which, places], kind="stable"):
    level, place = which[at], places[at]
    if glowing[place]:
      continue
    own = (summits[level] == place) & (values[level] >= share * values[level, place])
    glowing |= own
    down, along = np.divmod(np.flatnonzero(own), width)
    boxes.append([np.floor(rows[down.min()]), np.floor(columns[along.min()]),
                  np.ceil(rows[down.max() + 1]), np.ceil(columns[along.max() + 1])])
    if len(boxes) == number:
      break
  return np.array(boxes, np.int64).reshape(-1, 4)


def _summits(maps: np.ndarray) -> np.ndarray:
  """int64 [L, h·w]: where the steepest way up, of steps to one of eight neighbours, ends."""
  levels, height, width = maps.shape
  moves = sorted(itertools.product((-1, 0, 1), repeat=2), key=lambda move: move != (0, 0))
  edged = np.pad(maps, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
  near = np.stack([
    edged[:, 1 + down : 1 + down + height, 1 + along : 1 + along + width] for down, along in moves])
  steps = np.array([down * width + along for down, along in moves])[near.argmax(0)]
  up = np.arange(height * width) + steps.reshape(levels, -1)
  while not np.array_equal(further := np.take_along_axis(up, up, axis=1), up):
    up = further
  return up


def covered(boxes: np.ndarray, number: int, full_size: int) -> np.ndarray:
  """float64 [number]: the share of the image inside the first 1, 2, … boxes [m, 4]."""
  boxes = np.clip(np.asarray(boxes, np.float64).reshape(-1, 4)[:number], 0, full_size)
  rows, columns = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])
  areas = np.diff(rows)[:, None] * np.diff(columns)
  inside = np.zeros(areas.shape, bool)
  shares = np.zeros(number)
  for at, (top, left, bottom, right) in enumerate(boxes):
    inside |= (((top <= rows[:-1]) & (rows[:-1] < bottom))[:, None]
               & ((left <= columns[:-1]) & (columns[:-1] < right)))
    shares[at:] = areas[inside].sum() / full_size**2
  return shares
