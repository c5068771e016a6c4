"""What a device reaches, by a clock that is known."""

import jax
import pytest

from medattn_jax.programs import ceilings


@pytest.fixture
def clock(monkeypatch):
  """Each look takes 10 ms: before the one call, after it, and at the end."""
  looks = iter(range(10**6))
  monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(looks) * 0.01)
  monkeypatch.setattr(ceilings, "_SECONDS", 0.04)


def test_a_product_is_a_multiplication_and_an_addition(clock):
  rate = ceilings.matmul_rate(jax.devices()[0], "float32")
  assert rate == pytest.approx(2 * 256**3 / 0.02)


def test_a_copy_is_read_and_written(clock):
  assert ceilings.copy_rate(jax.devices()[0]) == pytest.approx(2 * 2**28 / 0.02)
