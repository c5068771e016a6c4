"""The bank: which images, what of them is kept, and that it fits where it is to lie."""

import jax
import numpy as np
import pytest

from medattn_jax import bank, sharding
from medattn_jax.errors import UserError

LEVELS = np.repeat([0, 1, 2], [60, 30, 10])


def photographs(count, size=6, channels=1, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, size, size, channels), np.uint8)


def fill(images, mesh=None, **options):
  count, size, _, channels = images.shape
  rows = bank.rows_of("bank", count, channels, 2, 8)
  return bank.fill(images, rows, count, size, channels, mesh or sharding.mesh(), **options)


def test_a_bank_of_k_keeps_the_classes_shares():
  for wanted, shares in ((10, [6, 3, 1]), (20, [12, 6, 2]), (99, None), (3, [1, 1, 1])):
    chosen = bank.choose(f"bank:{wanted}", LEVELS, seed=0)
    assert len(set(chosen.tolist())) == wanted and (np.diff(chosen) > 0).all()
    if shares:
      assert np.bincount(LEVELS[chosen]).tolist() == shares
  assert (bank.choose("bank:10", LEVELS, 0) != bank.choose("bank:10", LEVELS, 1)).any()
  assert (bank.choose("bank", LEVELS, 0) == np.arange(100)).all()


@pytest.mark.parametrize("source, levels, said", [
  ("bank", np.array([], int), "has no images"), ("bank:200", LEVELS, "has 100 images")])
def test_a_bank_that_cannot_be_chosen(source, levels, said):
  with pytest.raises(UserError, match=said):
    bank.choose(source, levels, 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_kept_of_the_images(channels):
  images = photographs(70, channels=channels)
  made = fill(images)
  held = np.asarray(made.arrays["images"]).reshape(-1, channels, 6, 6)
  np.testing.assert_array_equal(held[:70].transpose(0, 2, 3, 1), images)
  assert len(held) == 128 and not held[70:].any()
  assert made.arrays["images"].dtype == np.uint8 and made.rows == 128 * channels
  assert np.asarray(made.arrays["valid"]).sum() == 70 * channels
  real = images.transpose(0, 3, 1, 2).astype(np.float64)
  np.testing.assert_allclose(made.arrays["mean"], real.mean(0), rtol=1e-6)
  deviation = (real - real.mean(0)).std() * np.sqrt(70 * channels)
  np.testing.assert_allclose(made.arrays["scale"], 1 / deviation, rtol=1e-6)


def test_each_device_holds_its_own_slice_alone():
  made = fill(photographs(70), sharding.mesh(jax.devices()[:8]))
  shards = made.arrays["images"].addressable_shards
  assert [shard.data.shape for shard in shards] == [(16, 6, 6)] * 8


def test_the_checksum_is_of_the_images_in_their_order():
  images = photographs(20)
  same, other = fill(images), images.copy()
  other[7, 0, 0, 0] ^= 1
  assert fill(images).checksum == same.checksum
  assert fill(other).checksum != same.checksum
  assert fill(images[::-1]).checksum != same.checksum
  assert fill(images, sharding.mesh(jax.devices()[:1])).checksum == same.checksum


def test_images_of_unequal_size_are_refused():
  images = [*photographs(3), *photographs(1, size=7)]
  with pytest.raises(UserError, match=r"image 3 .*\[7, 7, 1\]; accepted: \[6, 6, 1\]"):
    bank.fill(images, 64, 4, 6, 1, sharding.mesh())


def test_a_bank_that_does_not_fit_says_what_would(monkeypatch):
  monkeypatch.setattr(bank, "_room", lambda device: 10_000_000)
  mesh = sharding.mesh(jax.devices()[:2])
  rows = bank.rows_of("bank", 5000, 1, 2, 8)
  with pytest.raises(UserError) as error:
    bank.check_fits("bank", rows, 100, 1, mesh)
  said = str(error.value)
  assert f"{rows // 2 * 100 * 100:,} bytes" in said and "8,000,000" in said
  fits = int(said.rsplit("bank:", 1)[1])
  assert 1500 < fits <= 1600
  bank.check_fits(f"bank:{fits}", bank.rows_of("bank", fits, 1, 2, 8), 100, 1, mesh)
  more = bank.rows_of("bank", fits + 64, 1, 2, 8)
  with pytest.raises(UserError):
    bank.check_fits(f"bank:{fits + 64}", more, 100, 1, mesh)


def test_a_bank_divides_over_the_devices_or_says_so():
  with pytest.raises(UserError, match="3 devices"):
    bank.check_fits("bank", 64, 6, 1, sharding.mesh(jax.devices()[:3]))


def test_class_statistics_are_centred_over_the_classes():
  images = photographs(30, channels=3)
  levels = np.repeat([0, 1], 15)
  rows = bank.rows_of("stats", 30, 3, 2, 8)
  made = bank.class_statistics(images, levels, 2, rows, sharding.mesh())
  table = np.asarray(made.arrays["images"])[: 4 * 3].reshape(4, 3, 6, 6)
  real = images.transpose(0, 3, 1, 2).astype(np.float64)
  for place, statistic in ((0, np.mean), (2, np.std)):
    plain = np.stack([statistic(real[levels == level], axis=0) for level in (0, 1)])
    plain -= plain.mean(0)
    np.testing.assert_allclose(table[place : place + 2], plain / plain.std(), atol=1e-5)
  assert np.asarray(made.arrays["valid"]).sum() == 12
