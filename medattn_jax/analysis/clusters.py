"""Groups of places that look alike to the network (papers.md §1, "Clustering"). Arrays only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sklearn import metrics as sk
from sklearn.cluster import affinity_propagation
from sklearn.exceptions import ConvergenceWarning

from medattn_jax.analysis import lesions


class Clusters(NamedTuple):
  """Groups of n points, the largest first.

  Attributes:
    labels: int64 [n]; the group of each point.
    exemplars: int64 [K]; the point that stands for each group.
    converged: whether the messages had settled; if not, the groups are those of the last round.
    iterations: rounds of messages.
  """

  labels: np.ndarray
  exemplars: np.ndarray
  converged: bool
  iterations: int


def affinity(
  features: np.ndarray, *, preference: float, damping: float = 0.9, rounds: int = 1000,
  seed: int = 0,
) -> Clusters:
  """Affinity Propagation on the features' squared distances, each feature vector of length one.

  [choice] The direction of a feature vector says what is seen, its length how much of it; so
  vectors are compared by their cosine.

  Args:
    features: float [n, d], n ≥ 1. Memory goes with n².
    preference: how readily a point stands for others, as a quantile of all similarities: 0.5 is
      Affinity Propagation's own default, towards 0 the groups become fewer.
    damping: of the messages, 0.5 to 1; the higher, the surer and the slower.
    rounds: of messages at most.
    seed: of the noise that breaks ties.
  """
  features = np.asarray(features, np.float64)
  lengths = np.linalg.norm(features, axis=1, keepdims=True)
  features = features / np.where(lengths > 0, lengths, 1)
  count = len(features)
  similar = np.minimum(2 * features @ features.T - np.square(features).sum(1)[:, None]
                       - np.square(features).sum(1), 0)
  similar = (similar + similar.T) / 2
  apart = similar[np.triu_indices(count, 1)]
  if not apart.size or np.ptp(apart) < 1e-12:  # nothing tells one point from another
    return Clusters(np.zeros(count, np.int64), np.zeros(1, np.int64), True, 0)
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always", ConvergenceWarning)
    centres, labels, iterations = affinity_propagation(
      similar, preference=float(np.quantile(apart, preference)), damping=damping,
      max_iter=rounds, random_state=seed, return_n_iter=True)
  converged = not any(issubclass(one.category, ConvergenceWarning) for one in told)
  if not len(centres):  # no point stood for itself when the rounds were over
    return Clusters(np.zeros(count, np.int64), np.zeros(1, np.int64), False, int(iterations))
  order = np.argsort(-np.bincount(labels, minlength=len(centres)), kind="stable")
  return Clusters(np.argsort(order)[labels], np.asarray(centres, np.int64)[order], converged,
                  int(iterations))


def kind_under(
  patch: np.ndarray, true_boxes: np.ndarray, types: np.ndarray, threshold: float = 0.3
) -> int | None:
  """The type of the lesion under a patch [4] whose middle is nearest to the patch's.

  Of those that the patch finds (lesions.iom), as boxes [k, 4] with types int [k]; None of none.
  """
  if not len(true_boxes):
    return None
  patch, true_boxes = np.asarray(patch, np.float64), np.asarray(true_boxes, np.float64)
  away = np.square((true_boxes[:, :2] + true_boxes[:, 2:] - patch[:2] - patch[2:]) / 2).sum(1)
  away[lesions.iom(patch[None], true_boxes)[0] < threshold] = np.inf
  nearest = int(away.argmin())
  return int(types[nearest]) if np.isfinite(away[nearest]) else None


def nearest_first(features: np.ndarray, members: np.ndarray, exemplar: int) -> np.ndarray:
  """`members` (numbers of points), the most like the exemplar first, itself at the head."""
  lengths = np.linalg.norm(features, axis=1)
  cosine = features[members] @ features[exemplar] / np.maximum(lengths[members], 1e-30)
  return members[np.lexsort((-cosine, members != exemplar))]


def agreement(
  labels: np.ndarray, kinds: Sequence[str], *, draws: int = 20, seed: int = 0
) -> dict[str, float]:
  """How well groups [n] agree with what is known to lie at the places, `kinds` [n].

  Returns:
    purity: the share of points that are of the commonest kind of their group; purity_by_chance:
    the mean where the kinds are shuffled (small groups are pure by chance); and
    adjusted_mutual_information, 0 by chance and 1 where groups are kinds.
  """
  names, kind = np.unique(np.asarray(kinds, str), return_inverse=True)

  def purity(kind: np.ndarray) -> float:
    table = np.zeros((labels.max() + 1, len(names)), np.int64)
    np.add.at(table, (labels, kind), 1)
    return float(table.max(1).sum() / len(labels))

  rng = np.random.default_rng(seed)
  return {
    "purity": purity(kind),
    "purity_by_chance": float(np.mean([purity(rng.permutation(kind)) for _ in range(draws)])),
    "adjusted_mutual_information": float(sk.adjusted_mutual_info_score(kind, labels))}
