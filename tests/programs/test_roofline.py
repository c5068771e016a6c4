"""The model of a step's time: the longest part, and the collectives of one host or several."""

import pytest

from medattn_jax.programs import chips, roofline

V5E, H200 = chips.CHIPS["v5e"], chips.CHIPS["h200"]


def test_the_longest_part_bounds_a_step():
  of = lambda *parts, **more: roofline.bound(*parts, 1, 1, V5E, **more)
  arithmetic = of(197e12, 819e6, 0)
  assert (arithmetic.by, arithmetic.seconds) == ("arithmetic", pytest.approx(1.0))
  memory = of(197e9, 819e9, 0)
  assert (memory.by, memory.seconds) == ("memory", pytest.approx(1.0))
  within = of(197e9, 819e9, 0, compiler=1.5)
  assert (within.by, within.seconds) == ("on-chip work", pytest.approx(1.5))


def test_a_ring_sends_each_byte_twice_but_for_its_own_share():
  assert roofline.reduced(90e9, 2, V5E) == pytest.approx(1.0)
  assert roofline.reduced(90e9, 8, V5E) == pytest.approx(2 * 7 / 8)
  assert roofline.reduced(90e9, 1, V5E) == 0


def test_between_hosts_each_chip_sends_its_share_over_the_network():
  """Eight GPUs of a host have an eighth each to settle with those of the other hosts."""
  count = 1e9
  inside = roofline.reduced(count, 8, H200)
  for hosts in (2, 4, 32):
    outside = 2 * (hosts - 1) / hosts * count / 8 / 50e9
    assert roofline.reduced(count, 8 * hosts, H200, hosts) == pytest.approx(inside + outside)
  assert roofline.reduced(count, 2, H200, 2) == pytest.approx(count / 50e9)


def test_many_small_collectives_cost_more_than_one_of_their_size():
  one = roofline.bound(1e12, 1e9, 1e6, 1, 8, H200)
  many = roofline.bound(1e12, 1e9, 1e6, 100, 8, H200)
  assert many.collectives - one.collectives == pytest.approx(99 * roofline.LAUNCH)
  assert (one.by, many.by) == ("arithmetic", "arithmetic")
  assert roofline.bound(1e12, 1e9, 1e6, 1000, 8, H200).by == "collectives"
  assert roofline.bound(1e12, 1e9, 1e6, 1000, 1, H200).collectives == 0
