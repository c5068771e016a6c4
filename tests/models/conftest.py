"""Variables of any module without compiling its initialisation, and the ways of a GPU on a CPU."""

import jax
import numpy as np
import pytest

from medattn_jax import platforms


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


@pytest.fixture
def a_gpus_ways(monkeypatch):
  """begin() → names: what is traced from then on goes a GPU's ways, and is added to the names."""

  def begin():
    asked = []

    def chosen(*given, default, **ways):
      asked.extend(ways)
      return ways.get("cuda", default)(*given)

    monkeypatch.setattr(platforms, "dependent", chosen)
    return asked

  return begin
