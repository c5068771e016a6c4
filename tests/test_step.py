"""The step on a small two-branch model: one all-reduce, the same numbers on any device count."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medattn_jax import augment, joining, sharding
from medattn_jax import step as steps
from medattn_jax.step import State, make_eval_step, make_train_step

LOSS = {"name": "cross_entropy", "class_weights": (), "auxiliary": 0.3, "focal_gamma": 2.0,
        "ordinal": 0.0}
STILL = {"dihedral": False, "mirror": False, "shift": 0.0, "brightness": 0.0, "contrast": 0.0,
         "colour": 0.0}
MOVING = {"dihedral": True, "mirror": False, "shift": 0.25, "brightness": 0.1, "contrast": 0.2,
          "colour": 0.1}


class Branch(nn.Module):
  """A convolution with running statistics of its own examples, and a head."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
    if train:
      mean.value = 0.9 * mean.value + 0.1 * x.mean((0, 1, 2))
    return nn.Dense(5)(x.mean((1, 2)))


class Two(nn.Module):
  @nn.compact
  def __call__(self, image, *, drawn=None, train=False):
    eyes = image.shape[:2]
    x = augment.move(image.reshape(-1, *image.shape[2:]), drawn)
    x = augment.normalise(x, drawn, (0.0,) * 3, (1.0,) * 3, jnp.float32)
    y, z = (Branch(name=n)(x, train).reshape(*eyes, 5) for n in ("first", "second"))
    return y + z, {"y": y, "z": z}


def batch(accumulation=1, patients=8, seed=0):
  rng = np.random.default_rng(seed)
  mask = np.ones((accumulation, patients, 2), np.float32)
  mask[:, 0, 1] = 0
  return {
      "image": rng.integers(0, 256, (accumulation, patients, 2, 8, 8, 3), np.uint8),
      "level": rng.integers(0, 5, (accumulation, patients, 2)).astype(np.int32),
      "mask": mask,
  }


def make(devices, *, trained=("first", "second"), augmentation=MOVING, ema=0.0, rate=0.1, **more):
  mesh = sharding.mesh(jax.devices()[:devices])
  model, optimizer = Two(), optax.sgd(rate, momentum=0.9)
  variables = model.init(jax.random.key(0), np.zeros((1, 2, 8, 8, 3), np.uint8))
  params, stats = variables["params"], variables["batch_stats"]
  opt_state = optimizer.init({name: params[name] for name in trained})
  average = jax.tree.map(jnp.copy, params) if ema else None
  state = State(jnp.zeros((), jnp.int32), params, stats, {}, opt_state, average)
  step = make_train_step(
      model.apply, optimizer, mesh, state=state, seed=7, trained=trained,
      answers=("logits", "y", "z"), loss=LOSS, augmentation=augmentation, ema=ema, **more,
  )  # fmt: skip
  return step, jax.device_put(state, sharding.replicated(mesh)), mesh


def run(devices, batches, **options):
  step, state, mesh = make(devices, **options)
  losses = []
  for host in batches:
    state, metrics = step(state, sharding.put(host, sharding.batched(mesh, axis=1)))
    losses.append(float(metrics["loss"]))
  return jax.device_get(state), losses


def assert_close(a, b, **tolerance):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_any_device_count_gives_the_same_numbers(devices):
  batches = [batch(seed=s) for s in range(3)]
  one, one_losses = run(1, batches)
  many, many_losses = run(devices, batches)
  np.testing.assert_allclose(one_losses, many_losses, rtol=1e-6)
  assert_close(one, many, rtol=1e-5, atol=1e-6)


def test_accumulated_microbatches_equal_one_batch():
  small = batch(accumulation=4, patients=2)
  whole = {k: v.reshape(1, 8, *v.shape[2:]) for k, v in small.items()}
  accumulated, losses = run(1, [small])
  at_once, loss = run(1, [whole])
  np.testing.assert_allclose(losses, loss, rtol=1e-6)
  assert_close(accumulated.params, at_once.params, rtol=1e-5, atol=1e-7)


def test_gradient_is_that_of_the_mean_loss_of_what_counts():
  host = batch()
  state, _ = run(1, [host], augmentation=STILL, rate=1.0)
  first = make(1, augmentation=STILL)[1]

  def mean_loss(params):
    variables = {"params": params, "batch_stats": first.batch_stats}
    logits, out = Two().apply(variables, host["image"][0])
    counts = host["mask"][0]
    loss = 0
    for weight, answer in ((1, logits), (0.3, out["y"]), (0.3, out["z"])):
      each = optax.softmax_cross_entropy_with_integer_labels(answer, host["level"][0])
      loss += weight * (each * counts).sum() / counts.sum()
    return loss

  expected = jax.tree.map(lambda p, g: p - g, first.params, jax.grad(mean_loss)(first.params))
  assert_close(state.params, expected, rtol=1e-4, atol=1e-6)


def test_masked_examples_change_nothing():
  host, other = batch(), batch()
  other["level"][:, 0, 1] = (other["level"][:, 0, 1] + 1) % 5
  other["image"][:, 0, 1] = 0
  (a, loss), (b, other_loss) = (run(1, [h], augmentation=STILL) for h in (host, other))
  assert loss == other_loss
  assert_close(a.params, b.params, rtol=0)


def test_a_fixed_branch_stays_bit_equal():
  _, state, _ = make(8, trained=("second",))
  after, _ = run(8, [batch(seed=s) for s in range(3)], trained=("second",))
  assert_close(after.params["first"], state.params["first"], rtol=0)
  assert_close(after.batch_stats["first"], state.batch_stats["first"], rtol=0)
  assert not np.array_equal(
      after.params["second"]["Conv_0"]["kernel"], state.params["second"]["Conv_0"]["kernel"]
  )
  assert "first" not in after.opt_state[0].trace


def test_the_average_follows_the_params():
  after, _ = run(1, [batch(seed=s) for s in range(3)], ema=0.9)
  start = make(1, ema=0.9)[1]
  mean, p = start.params, start.params
  step, state, mesh = make(1, ema=0.9)
  for age, seed in enumerate(range(3)):
    state, _ = step(state, sharding.put(batch(seed=seed), sharding.batched(mesh, axis=1)))
    p, decay = jax.device_get(state.params), min(0.9, (1 + age) / (10 + age))
    mean = jax.tree.map(lambda m, q, d=decay: d * m + (1 - d) * q, mean, p)
  assert_close(after.ema, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_compiled_program_has_one_all_reduce_outside_loops_and_donates_its_state(accumulation):
  step, state, mesh = make(8, ema=0.9)
  put = sharding.put(batch(accumulation), sharding.batched(mesh, axis=1))
  text = step.lower(state, put).compile().as_text()
  found = re.findall(r" (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", text)
  assert found == ["all-reduce"]
  entry = text[text.index("\nENTRY") :]
  assert " all-reduce(" in entry or " all-reduce-start(" in entry
  aliases = len(re.findall(r"(?:may|must)-alias\)", text[: text.index("\n")]))
  assert aliases == len(jax.tree.leaves(state))


def test_kernels_summed_as_they_lie_give_the_same_numbers(summed):
  """As on a TPU: beside the vector of all else, each of the four kernels by itself, in float32."""
  batches = [batch(seed=s) for s in range(2)]
  together, losses = run(8, batches)
  apart, apart_losses = run(8, batches, joined="kernels")
  np.testing.assert_allclose(losses, apart_losses, rtol=1e-6)
  assert_close(together, apart, rtol=1e-6, atol=1e-7)
  found = []
  for joined in ("vector", "kernels"):
    step, state, mesh = make(8, joined=joined)
    put = sharding.put(batch(), sharding.batched(mesh, axis=1))
    found.append(summed(step.lower(state, put)))
  (vector,), apart = found
  kernels = sorted(["3x3x3x4", "4x5"] * 2)
  assert sorted(shape for shape in apart if "x" in shape) == kernels
  (rest,) = (shape for shape in apart if "x" not in shape)
  assert int(rest) == int(vector) - 2 * (3 * 3 * 3 * 4 + 4 * 5)


def test_gradients_in_parts_give_the_same_numbers(monkeypatch, summed):
  """As on a GPU: summed on their way, and last the kernel whose gradient is made last."""
  batches = [batch(seed=s) for s in range(2)]
  together, losses = run(8, batches)
  monkeypatch.setattr(joining, "_LEAST", 400)
  apart, apart_losses = run(8, batches, joined="parts")
  np.testing.assert_allclose(losses, apart_losses, rtol=1e-6)
  assert_close(together, apart, rtol=1e-6, atol=1e-7)
  step, state, mesh = make(8, joined="parts")
  put = sharding.put(batch(), sharding.batched(mesh, axis=1))
  # Two branches of 25 numbers in a head, 4 + 108 in a convolution, 4 statistics; four metrics.
  sizes = [int(shape) for shape in summed(step.lower(state, put))]
  assert sizes == [2 * (25 + 4) + 108 + 2 * 4 + 4, 108]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpus_kernels_are_the_same_numbers(dtype):
  """In another layout at once instead of in each layer; with their gradients."""
  conv, dense = nn.Conv(4, (3, 3), dtype=dtype, use_bias=False), nn.Dense(5, dtype=dtype)
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  apply = lambda variables, x: dense.apply(
    {"params": variables["params"]["dense"]},
    nn.relu(conv.apply({"params": variables["params"]["conv"]}, x)).mean((1, 2)))
  params = {"conv": conv.init(jax.random.key(0), x)["params"],
            "dense": dense.init(jax.random.key(1), np.zeros((1, 4)))["params"]}
  loss = lambda params, apply: jnp.sum(jnp.sin(apply({"params": params}, x).astype(jnp.float32)))
  both = [jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, way)
          for way in (apply, steps.with_kernels_together(apply, dtype))]
  assert_close(*both, rtol=1e-6, atol=1e-6)
  text = jax.jit(steps.with_kernels_together(apply, dtype)).lower({"params": params}, x).as_text()
  held = [line for line in text.splitlines() if "optimization_barrier" in line and "108x" in line]
  assert len(held) == 1 and ("bf16" in held[0]) == (dtype == jnp.bfloat16)


@pytest.mark.slow
def test_a_device_alone_joins_nothing():
  """No all-reduce, and no vector of all gradients that one would need."""
  texts = []
  for devices in (8, 1):
    step, state, mesh = make(devices)
    put = sharding.put(batch(), sharding.batched(mesh, axis=1))
    texts.append(step.lower(state, put).compile().as_text())
  many, alone = texts
  (vector,) = re.findall(r"(f32\[\d+\])\S* all-reduce(?:-start)?\(", many)
  assert vector not in alone and " all-reduce" not in alone


def test_eval_step_gives_each_patient_its_answers_without_a_collective():
  mesh = sharding.mesh()
  model = Two()
  variables = model.init(jax.random.key(0), np.zeros((1, 2, 8, 8, 3), np.uint8))
  images = batch()["image"][0]
  step = make_eval_step(model.apply, mesh, ("y",))
  put = sharding.put({"x": images}, sharding.batched(mesh))["x"]
  answers = step(variables, put)
  logits, out = model.apply(variables, images)
  np.testing.assert_allclose(answers["logits"], logits, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(answers["y"], out["y"], rtol=1e-5, atol=1e-6)
  assert set(answers) == {"logits", "y"}
  assert "all-" not in step.lower(variables, put).compile().as_text().replace("all-true", "")


def test_options_are_those_that_the_compiler_knows_and_xla_flags_do_not_name(monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(steps, "_known", None)  # asks nothing where there is nothing to ask
    assert steps.compiler_options("tpu") == {}
  assert steps.compiler_options("cpu") == steps._OPTIONS["cpu"]
  assert steps.compiler_options("gpu") == {"xla_gpu_enable_triton_gemm": False}
  monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_enable_triton_gemm=true")
  assert steps.compiler_options("gpu") == {}
  monkeypatch.setitem(steps._OPTIONS, "cpu", {"xla_cpu_no_such_option": "1"})
  assert steps.compiler_options("cpu") == {}
