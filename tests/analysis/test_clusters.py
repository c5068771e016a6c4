"""analysis.clusters: planted groups are found again, and how well they agree is counted right."""

import numpy as np
import pytest

from medattn_jax.analysis import clusters


def planted(seed=0, sizes=(40, 25, 12), spread=0.08, features=16):
  """Points around some directions, of any length: (features, the group each came from)."""
  rng = np.random.default_rng(seed)
  directions, _ = np.linalg.qr(rng.normal(size=(features, len(sizes))))
  kind = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
  points = directions.T[kind] + rng.normal(0, spread, (len(kind), features))
  return points * rng.uniform(0.2, 9, (len(kind), 1)), kind


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(seed):
  points, kind = planted(seed)
  found = clusters.affinity(points, preference=0.1)
  assert found.converged and len(found.exemplars) == 3
  assert clusters.agreement(found.labels, kind)["adjusted_mutual_information"] == pytest.approx(1)
  assert np.bincount(found.labels).tolist() == [40, 25, 12]  # the largest first
  np.testing.assert_array_equal(found.labels[found.exemplars], [0, 1, 2])
  again = clusters.affinity(points, preference=0.1)
  np.testing.assert_array_equal(found.labels, again.labels)


def test_a_lower_preference_makes_fewer_groups():
  points, _ = planted(sizes=(30,) * 3, spread=0.6, features=4)
  counts = [len(clusters.affinity(points, preference=q).exemplars) for q in (0.05, 0.5, 0.95)]
  assert counts[0] < counts[1] < counts[2]


def test_not_settled_is_said():
  points, _ = planted()
  found = clusters.affinity(points, preference=0.1, rounds=18)
  assert not found.converged and found.iterations == 18 and len(found.labels) == len(points)
  nobody = clusters.affinity(points, preference=0.1, rounds=1)  # no point stands for itself yet
  assert not nobody.converged and set(nobody.labels) <= set(range(len(nobody.exemplars)))


@pytest.mark.parametrize("points", [np.ones((5, 3)), np.zeros((4, 3)), np.ones((1, 3))])
def test_points_that_nothing_tells_apart_are_one_group(points):
  found = clusters.affinity(points, preference=0.5)
  assert found.labels.tolist() == [0] * len(points) and len(found.exemplars) == 1


def test_agreement_by_hand():
  labels = np.array([0, 0, 0, 1, 1, 2])
  found = clusters.agreement(labels, ["a", "a", "b", "b", "b", "a"])
  assert found["purity"] == pytest.approx(5 / 6)
  rng = np.random.default_rng(0)
  many, kinds = rng.integers(0, 4, 4000), rng.integers(0, 2, 4000)
  chance = clusters.agreement(many, kinds)
  assert chance["purity"] == pytest.approx(chance["purity_by_chance"], abs=0.02)
  assert abs(chance["adjusted_mutual_information"]) < 0.01
  # A point to each group is pure, and says nothing.
  alone = clusters.agreement(np.arange(100), rng.integers(0, 2, 100))
  assert alone["purity"] == alone["purity_by_chance"] == 1


def test_nearest_first_begins_with_the_exemplar():
  points = np.array([[1, 0], [0, 5], [2, 0.1], [1, 1], [3, 0]], float)
  assert clusters.nearest_first(points, np.array([0, 2, 3, 4]), 2).tolist() == [2, 0, 4, 3]


def test_the_kind_under_a_patch_is_the_nearest_that_it_finds():
  patch = np.array([40, 40, 60, 60])
  boxes = np.array([[41, 41, 45, 45], [52, 52, 56, 56], [58, 49, 66, 51], [0, 0, 9, 9]])
  types = np.array([3, 1, 0, 4])
  assert clusters.kind_under(patch, boxes, types) == 1
  assert clusters.kind_under(patch, boxes[[0, 2, 3]], types[[0, 2, 3]]) == 3
  # The third is nearer than the first by its middle's row alone, but too little of it is inside.
  assert clusters.kind_under(patch, boxes[2:], types[2:]) is None
  assert clusters.kind_under(patch, boxes[:0], types[:0]) is None
