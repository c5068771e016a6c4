"""Variables of any module without compiling its initialisation."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def draw_variables():
  """(module, *inputs) → variables of plausible size, with no zeros to hide behind."""
  def draw(module, *inputs):
    rng = np.random.default_rng(1)

    def one(path, leaf):
      name = path[-1].key
      if name in ("scale", "var"):
        return rng.uniform(0.8, 1.2, leaf.shape).astype(np.float32)
      size = np.sqrt(2 / np.prod(leaf.shape[:-1])) if name == "kernel" else 0.1
      return (size * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return {name: jax.tree_util.tree_map_with_path(one, shapes.get(name, {}))
            for name in ("params", "batch_stats")}

  return draw
