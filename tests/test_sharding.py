"""Batches reach the mesh in order, ahead of their use, and come back in order."""

import jax
import numpy as np
import pytest

from medattn_jax import sharding
from medattn_jax.errors import UserError


def test_rows_lie_where_they_should_and_come_back():
  mesh = sharding.mesh()
  rows = np.arange(32).reshape(16, 2)
  put = sharding.put({"x": rows}, sharding.batched(mesh))["x"]
  assert [s.data.shape for s in put.addressable_shards] == [(2, 2)] * 8
  np.testing.assert_array_equal(sharding.local_rows(put), rows)


@pytest.mark.parametrize("devices", [[], "", ["cpu"], 1])
def test_devices_that_are_none_are_refused_by_name(devices):
  with pytest.raises(UserError, match=r"devices = .*accepted"):
    sharding.mesh(devices)


def test_second_axis_is_split():
  mesh = sharding.mesh()
  put = sharding.put({"x": np.zeros((3, 8))}, sharding.batched(mesh, axis=1))["x"]
  assert put.addressable_shards[0].data.shape == (3, 1)


def test_prefetch_keeps_order_and_stays_two_ahead():
  log = []

  def numbers():
    for n in range(5):
      log.append(n)
      yield n

  got = []
  for value in sharding.prefetch(numbers(), lambda n: n * 10, ahead=2):
    got.append((value, len(log)))
  assert got == [(0, 2), (10, 3), (20, 4), (30, 5), (40, 5)]


def test_gathering_one_process_is_the_identity():
  rows = {"name": np.array([["ö", ""], ["b,c", "日本"]], object), "n": np.arange(2)}
  back = sharding.gather(rows)
  assert back["name"].tolist() == rows["name"].tolist()
  np.testing.assert_array_equal(back["n"], rows["n"])


def test_a_platform_that_is_not_there_is_the_users_error(monkeypatch):
  def no_devices():
    raise RuntimeError("Unknown backend\n'nope'")

  monkeypatch.setattr(jax, "devices", no_devices)
  words = r"no device can be used: Unknown backend 'nope'; accepted"
  with pytest.raises(sharding.UserError, match=words):
    sharding.devices()
