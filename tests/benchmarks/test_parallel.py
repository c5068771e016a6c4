"""Four ways to spread a step over devices, and one result."""

import jax
import numpy as np
import pytest

from benchmarks import pages, parallel, steps
from medattn_jax.errors import UserError


@pytest.fixture(scope="module")
def now():
  page = pages.named("cnn")
  page = pages.adapted(page, devices=2, batch=8, precision="float32", image_size=16)
  page.augment.brightness = 0.2  # each example draws its own, wherever it lies
  return steps.build(page, "joint", jax.devices()[:2])


@pytest.mark.slow
def test_all_ways_take_the_same_two_steps(now):
  after = {}
  for way in parallel.WAYS:
    spread = parallel.spread(now, way)
    state, metrics = spread.state(jax.device_get(now.initial())), None
    for seed in range(2):
      state, metrics = spread.step(state, spread.batch(steps.host_batches(now, seed)))
    loss = np.asarray(metrics["loss"]).ravel()[0]
    after[way] = (spread.host(state), loss)
  (state, loss), start = after["shard_map"], jax.device_get(now.initial())
  moved = [np.abs(a - b).max() for a, b in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(start.params), strict=True)]
  assert max(moved) > 1e-4
  for way in parallel.WAYS[1:]:
    other, other_loss = after[way]
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_another_way_is_named(now):
  with pytest.raises(UserError, match="accepted: shard_map, vector, jit, pmap"):
    parallel.spread(now, "xmap")
