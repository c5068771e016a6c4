"""How many lesions the selected regions find, beside chance and the best possible (papers §1).

Boxes are float or int [n, 4]: y0, x0, y1, x1 in pixels of one frame, ends excluded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def iom(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Intersection over the smaller area: float64 [n, m] of boxes [n, 4] and [m, 4].

  The paper's overlap: a small lesion wholly inside a large region counts as 1, where intersection
  over union would call it a miss. A box without area overlaps nothing.
  """
  a = np.asarray(a, np.float64).reshape(-1, 1, 4)
  b = np.asarray(b, np.float64).reshape(1, -1, 4)
  sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
  shared = np.prod(np.maximum(sides, 0), axis=-1)
  smaller = np.minimum(_area(a), _area(b))
  return np.where(smaller > 0, shared / np.where(smaller > 0, smaller, 1), 0.0)


def _area(boxes: np.ndarray) -> np.ndarray:
  return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def recall(
  true_boxes: Sequence[np.ndarray], proposed: Sequence[np.ndarray], threshold: float = 0.3
) -> tuple[float | None, float | None]:
  """Recall per box and per image at an overlap (iom) of at least `threshold`.

  Per box: the share of all true boxes that some proposed box finds. Per image: the share of the
  images with lesions in which at least one lesion is found [choice: the paper gives .76 and .83
  without a definition; with 306 boxes in 182 images "at least one" is the reading under which the
  second can exceed the first]. Images without lesions do not count.

  Args:
    true_boxes: one [k, 4] an image; k may be 0.
    proposed: one [n, 4] an image.
    threshold: the overlap that finds.

  Returns:
    (per box, per image); (None, None) without any true box.
  """
  found, total, hit, images = 0, 0, 0, 0
  for true, boxes in zip(true_boxes, proposed, strict=True):
    if len(true) == 0:
      continue
    seen = (iom(true, boxes) >= threshold).any(axis=1)
    found, total = found + int(seen.sum()), total + len(true)
    hit, images = hit + bool(seen.any()), images + 1
  return (found / total, hit / images) if images else (None, None)


def random_boxes(rng: np.random.Generator, n: int, size: int, full_size: int) -> np.ndarray:
  """int64 [n, 4]: n squares of `size`, each uniform over the places wholly inside the image."""
  size = min(size, full_size)
  corner = rng.integers(0, full_size - size + 1, (n, 2))
  return np.concatenate([corner, corner + size], axis=1)


def random_recall(
  true_boxes: Sequence[np.ndarray], n: int, size: int, full_size: int, *,
  threshold: float = 0.3, draws: int = 20, seed: int = 0,
) -> tuple[float | None, float | None]:
  """The mean recall (per box, per image) of n random squares an image, over `draws` draws."""
  rng = np.random.default_rng(seed)
  found = [
    recall(true_boxes, [random_boxes(rng, n, size, full_size) for _ in true_boxes], threshold)
    for _ in range(draws)
  ]
  if found[0][0] is None:
    return None, None
  return float(np.mean([box for box, _ in found])), float(np.mean([image for _, image in found]))


def best_boxes(
  true: np.ndarray, n: int, size: int, full_size: int, threshold: float = 0.3
) -> np.ndarray:
  """int64 [n, 4]: n squares of `size` inside the image that find as many lesions as can be had.

  See `best_sequence`, whose last it is.
  """
  return best_sequence(true, n, size, full_size, threshold)[-1]


def best_sequence(
  true: np.ndarray, n: int, size: int, full_size: int, threshold: float = 0.3
) -> list[np.ndarray]:
  """For 1, 2, … n squares of `size` inside the image: those that find most. int64 [i, 4] each.

  Maximum coverage is NP-hard, so this is a lower estimate of the best possible: to the squares of
  one fewer the one that finds most of the rest (at least 1 - 1/e of the best, as greed alone), then
  each square in turn taken back and placed anew while that finds more. None finds fewer than the
  one before. Candidate corners are a grid of at most 48 by 48 places and the places centred on, or
  just holding, each lesion. An image of 200 lesions takes tens of milliseconds for four squares.
  """
  size = min(size, full_size)
  last = full_size - size
  true = np.asarray(true, np.float64).reshape(-1, 4)
  grid = np.unique(np.linspace(0, last, min(48, last + 1)).round())
  held = [(true[:, :2] + true[:, 2:]) / 2 - size / 2, true[:, :2], true[:, 2:] - size]
  held = np.concatenate(held).round().clip(0, last)
  corners = np.concatenate([np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2),
                            held])

  def shared(starts: np.ndarray, axis: int) -> np.ndarray:
    """Lengths [n, k] that squares at `starts` share with the lesions along an axis."""
    begin = np.maximum(starts[:, None], true[:, axis])
    return np.maximum(np.minimum(starts[:, None] + size, true[:, axis + 2]) - begin, 0)

  # Row by column for the grid, which is most of them: no [n, k, 2] array is made.
  areas = np.concatenate([
    (shared(grid, 0)[:, None] * shared(grid, 1)[None]).reshape(-1, len(true)),
    shared(held[:, 0], 0) * shared(held[:, 1], 1)])
  smaller = np.minimum(_area(true), size**2)
  covers = (areas >= threshold * smaller) & (smaller > 0)

  def next_best(others: list[int]) -> int:
    left = ~covers[others].any(axis=0)
    # A float32 product runs in BLAS; counts up to 2²⁴ are exact in it.
    return int((covers32 @ left.astype(np.float32)).argmax())

  covers32 = covers.astype(np.float32)
  chosen: list[int] = []
  sequence = []
  for _ in range(n):
    chosen = [*chosen, next_best(chosen)]
    found, improved = int(covers[chosen].any(axis=0).sum()), True
    while improved and found < len(true):
      improved = False
      for which in range(len(chosen)):
        trial = [*chosen[:which], *chosen[which + 1 :]]
        trial.append(next_best(trial))
        now = int(covers[trial].any(axis=0).sum())
        if now > found:
          chosen, found, improved = trial, now, True
    sequence.append(np.concatenate([corners[chosen], corners[chosen] + size], 1).astype(np.int64))
  return sequence


def best_recall(
  true_boxes: Sequence[np.ndarray], n: int, size: int, full_size: int, *, threshold: float = 0.3
) -> tuple[float | None, float | None]:
  """Recall (per box, per image) of `best_boxes`: what n squares of this size could find."""
  none = np.zeros((0, 4), np.int64)
  proposed = [
    best_boxes(true, n, size, full_size, threshold) if len(true) else none for true in true_boxes
  ]
  return recall(true_boxes, proposed, threshold)
