"""Each platform's own way is traced where it is known which it will be, and no other."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from medattn_jax import experiment, platforms, sharding


def ways(asked):
  """Of each platform a function that notes its name and adds a number of its own."""
  def way(name, number):
    def answer(x):
      asked.append(name)
      return x + number
    return answer

  names = {"cpu": 1.0, "cuda": 2.0, "tpu": 3.0, "default": 4.0}
  return {name: way(name, number) for name, number in names.items()}


def mesh_of(platform, kind):
  device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  return AbstractMesh((1,), (sharding.AXIS,), abstract_device=device)


def test_under_a_mesh_its_platforms_way_alone_is_traced():
  asked = []
  step = jax.shard_map(
    lambda x: platforms.dependent(x, **ways(asked)), mesh=sharding.mesh(jax.devices()[:2]),
    in_specs=P(sharding.AXIS), out_specs=P(sharding.AXIS))
  assert jax.jit(step)(jnp.zeros(2)).tolist() == [1, 1]
  assert asked and set(asked) == {"cpu"}


def test_without_a_mesh_all_are_and_the_lowering_chooses():
  asked = []
  assert jax.jit(lambda x: platforms.dependent(x, **ways(asked)))(0.0) == 1
  assert set(asked) == {"cpu", "cuda", "tpu", "default"}


@pytest.mark.parametrize("platform, kind, known", [
  ("cpu", "cpu", "cpu"),
  ("tpu", "TPU v5 lite", "tpu"),
  ("gpu", "NVIDIA H200", "cuda"),
  ("gpu", "H200", "cuda"),  # one that is not here
  ("gpu", "Tesla V100-SXM2-16GB", "cuda"),
  ("gpu", "AMD Instinct MI300X", None),
])
def test_which_platform_a_mesh_is_of(platform, kind, known):
  with jax.sharding.use_abstract_mesh(mesh_of(platform, kind)):
    assert platforms.traced_for() == known
  assert platforms.traced_for() is None


def test_a_function_traced_for_one_platform_is_traced_anew_for_the_next():
  asked = []
  inner = jax.jit(lambda x: platforms.dependent(x, **ways(asked)))
  for platform, kind in (("tpu", "TPU v6 lite"), ("gpu", "NVIDIA H100"), ("tpu", "TPU v6 lite")):
    with jax.sharding.use_abstract_mesh(mesh_of(platform, kind)):
      jax.eval_shape(inner, 0.0)
  assert asked == ["tpu", "cuda"]


def test_a_step_leaves_no_choice_to_its_lowering(smoke_config, map_config, monkeypatch):
  def refuse(*_, **ways):
    raise AssertionError(f"{sorted(ways)} are all traced")

  steps = [experiment.build(smoke_config, "c"), experiment.build(map_config, "joint")]
  for now in steps:
    assert now.abstract_state  # initial values are drawn under no mesh
  monkeypatch.setattr(jax.lax, "platform_dependent", refuse)
  for now in steps:
    now.lower_train_step()
    now.lower_eval_step()
