"""The first values: those of the one compiled program, without compiling it."""

import pathlib

import flax.linen as nn
import jax
import numpy as np
import pytest

from medattn_jax import config, experiment, initial
from medattn_jax.models import norm

SMOKE = pathlib.Path(__file__).parents[1] / "configs" / "smoke.py"
compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None)


@pytest.fixture(scope="module")
def now():
  tiny = [(f"model.{name}", "resnet_local") for name in ("backbone", "crop_backbone")]
  page = config.load_page(
    str(SMOKE), [*tiny, ("phases.c.optimizer", "adamw"), ("phases.c.ema", "0.9")])
  return experiment.build(page, "c", devices=jax.devices()[:1])


def test_the_state_is_that_of_the_compiled_initialisation(now):
  key = jax.random.key(now.config.seed)
  expected, found = jax.jit(now._init)(key), now.initial()
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, x), y in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    # One program may multiply two constants beforehand: the last bit.
    np.testing.assert_allclose(x, y, rtol=2e-7, atol=0, err_msg=jax.tree_util.keystr(path))


def test_few_programs_are_compiled_and_equal_seeds_agree_on_any_devices(now):
  jax.clear_caches()
  compiled.clear()
  states = [jax.device_get(now.initial())]
  assert 0 < len(compiled) <= 12 < len(jax.tree.leaves(states)) / 8, compiled
  states.append(jax.device_get(experiment.build(now.config, "c").initial()))
  assert jax.tree.all(jax.tree.map(np.array_equal, *states))
  assert experiment.build(now.config, "c").initial().step.sharding.num_devices == 8


@pytest.mark.parametrize("shape", [(1, 1, 4, 1), (3, 3, 3, 32), (1, 7, 160, 192), (5, 5, 48, 64)])
def test_a_kernel_is_drawn_as_linen_draws_it(shape):
  key = jax.random.key(7)
  linens = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")
  np.testing.assert_array_equal(norm.kernel_init(key, shape), linens(key, shape))


def test_what_is_not_needed_is_not_computed():
  def function(key, image):
    drawn = jax.random.normal(key, (3,))
    jax.debug.callback(lambda x: pytest.fail(f"ran: {x}"), image.sum())
    return {"drawn": drawn * 2, "ones": jax.numpy.ones((2, 2))}

  arguments = jax.random.key(0), np.ones((4, 4))
  found = initial.evaluate(jax.jit(function).trace(*arguments), *arguments)
  np.testing.assert_array_equal(found["ones"], np.ones((2, 2)))
  np.testing.assert_array_equal(found["drawn"], 2 * jax.random.normal(arguments[0], (3,)))
