"""A global attention's train step: one all-reduce of gradients, one of the map, on any devices."""

import pathlib
import re

import jax
import numpy as np
import pytest

from medattn_jax import bank, config, experiment
from medattn_jax.errors import UserError

PAGE = pathlib.Path(__file__).resolve().parents[1] / "configs" / "planted_region.py"
SIZE, IMAGES, BATCH = 16, 70, 16

SLOW = pytest.mark.slow


def page(**overrides):
  values = {
    "data.full_size": SIZE, "data.image_size": SIZE, "data.batch_size": BATCH,
    "data.synthetic.train": IMAGES, "norm.group_size": 2, "phases.joint.steps": 6,
    "phases.frozen.steps": 4, "phases.joint.warmup_steps": 0, **overrides}
  return config.load_page(str(PAGE), [(key, str(value)) for key, value in values.items()])


def data(seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (IMAGES, SIZE, SIZE, 1), np.uint8)
  return images, rng.integers(0, 2, IMAGES).astype(np.int32)


def bank_of(settings, mesh):
  source = settings.attention.source
  images, levels = data()
  rows = experiment.bank_rows(settings, IMAGES)
  if source == "stats":
    return bank.class_statistics(images, levels, 2, rows, mesh)
  if bank.kind(source) != "bank":
    return None
  return bank.fill(images, rows, IMAGES, SIZE, 1, mesh)


def begin(settings, devices, phase="joint"):
  from medattn_jax import sharding

  chosen = jax.devices()[:devices]
  return experiment.build(settings, phase, chosen, bank_of(settings, sharding.mesh(chosen)))


def batch(number):
  images, levels = data()
  rows = np.random.default_rng(number).choice(IMAGES, BATCH, replace=False)
  return {"image": images[rows][:, None], "level": levels[rows][:, None],
          "mask": np.ones((BATCH, 1), np.float32)}


def run(settings, devices, steps=3):
  now = begin(settings, devices)
  state, losses = now.initial(), []
  for number in range(steps):
    state, metrics = now.train_step(state, now.put_train([batch(number)]))
    losses.append(float(metrics["loss"]))
  return now, state, losses


@pytest.mark.parametrize("source, classifier", [
  ("bank", "linear"), ("bank", "conv"),
  *(pytest.param(source, "linear", marks=SLOW) for source in ("batch", "stats", "free", "none"))])
def test_eight_devices_give_what_one_gives(source, classifier):
  settings = page(**{
    "attention.source": source, "attention.classifier": classifier, "attention.area": 0.1,
    "attention.total_variation": 0.1, "attention.binarisation": 0.1, "augment.dihedral": True,
    "phases.joint.optimizer": "sgd", "phases.joint.learning_rate": 0.05})
  _, one, one_losses = run(settings, 1)
  _, many, many_losses = run(settings, 8)
  np.testing.assert_allclose(one_losses, many_losses, rtol=2e-5)
  if source == "none":
    assert not many.constants and set(many.params) == {"backbone"}
    return
  np.testing.assert_allclose(one.constants["map"], many.constants["map"], atol=2e-4)
  assert np.ptp(np.asarray(many.constants["map"])) > 1e-4  # it has moved
  if source not in ("free", "none"):
    kernel = many.params["pixel_classifier"]["rows"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("data")


@SLOW
def test_the_gradient_of_the_map_is_that_of_the_whole_loss():
  """The split into summand, map and network is exact: against plain autodiff on one device."""
  import jax.numpy as jnp

  from medattn_jax import losses
  from medattn_jax.models.global_attention import smoothed

  settings = page(**{"augment.shift": 0.0, "attention.area": 0.3, "attention.learning_rate": 0.01})
  now = begin(settings, 1)
  state, host = now.initial(), batch(0)
  images, _ = data()
  features = images[..., 0].astype(np.float64)
  features = (features - features.mean(0)) / (features - features.mean(0)).std() / IMAGES**0.5

  def loss(kernel):
    scores = jnp.einsum("r,rhw->hw", kernel, features.astype(np.float32)) + 2.0
    weights = jax.nn.sigmoid(smoothed(scores, settings.attention.smoothing))
    (logits, _), _ = now.model.apply(
      {"params": {"backbone": state.params["backbone"]}, "batch_stats": state.batch_stats,
       "constants": {"map": weights}}, host["image"], train=True, mutable=["batch_stats"])
    total, weight = losses.graded(logits, host["level"], host["mask"])
    return total / weight + 0.3 * weights.mean()

  kernel = jnp.zeros(IMAGES)
  expected = jax.grad(loss)(kernel)
  after, metrics = now.train_step(now.initial(), now.put_train([host]))
  np.testing.assert_allclose(metrics["loss"], loss(kernel), rtol=1e-5)
  # Adam's first step is the rate against the gradient's sign; its memory is a tenth of it.
  memory = [m for path, m in jax.tree_util.tree_leaves_with_path(after.opt_state)
            if "rows" in str(path) and "mu" in str(path)]
  np.testing.assert_allclose(10 * memory[0][:IMAGES, 0], expected, rtol=2e-3, atol=1e-6)


def all_reduces(text):
  """Numbers reduced by each all-reduce of a compiled program."""
  found = []
  for line in text.splitlines():
    if re.search(r"= .*all-reduce(-start)?\(", line):
      shapes = re.findall(r"[a-z0-9]+\[([\d,]*)\]", line.split(" all-reduce")[0])
      found.append(sum(int(np.prod([int(d) for d in s.split(",") if d] or [1])) for s in shapes))
  return sorted(found)


@pytest.mark.parametrize("source, classifier, extra", [
  ("bank", "linear", [SIZE * SIZE]), ("batch", "linear", None),
  ("bank", "conv", [9 * 8 * SIZE * SIZE]), ("stats", "linear", [SIZE * SIZE]),
  ("free", "linear", [])])
def test_collectives_of_the_compiled_step(source, classifier, extra):
  settings = page(**{"attention.source": source, "attention.classifier": classifier})
  now = begin(settings, 8)
  compiled = now.lower_train_step().compile()
  text = compiled.as_text()
  reduced = all_reduces(text)
  network = sum(x.size for x in jax.tree.leaves(now.abstract_state.params["backbone"]))
  assert network + SIZE * SIZE <= max(reduced) < network + SIZE * SIZE + 600
  if extra is None:  # a batch's own statistics ride with its answers
    assert len(reduced) == 2 and reduced[0] <= 2 * SIZE * SIZE + 8
  else:
    assert reduced[:-1] == extra
  assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)


def test_the_step_overwrites_its_state():
  now = begin(page(), 8)
  text = now.lower_train_step().compile().as_text()
  aliases = re.findall(r"\{\d+[^}]*\}: \(\d+, \{\}, may-alias\)", text.split("\n", 1)[0])
  assert len(aliases) == len(jax.tree.leaves(now.abstract_state)) - 1  # the old map is not read


def test_a_frozen_map_stays_bit_for_bit_and_its_boundary_is_drawn_once():
  settings = page()
  _, state, _ = run(settings, 1, steps=6)
  soft = np.asarray(state.constants["map"])
  frozen = begin(settings, 1, "frozen")
  state = frozen.enter(state)
  drawn = np.asarray(state.constants["map"])
  classifier = jax.device_get(state.params["pixel_classifier"])
  backbone = jax.device_get(state.params["backbone"])
  for number in range(4):
    batched = frozen.put_train([batch(number)])
    assert "bank" not in batched  # the bank is of no use any more
    state, _ = frozen.train_step(state, batched)
  assert (np.asarray(state.constants["map"]) == drawn).all()
  jax.tree.map(np.testing.assert_array_equal, state.params["pixel_classifier"], classifier)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params["backbone"], backbone)
  assert max(jax.tree.leaves(moved)) > 0
  order = np.argsort(soft, axis=None)
  assert (np.diff(drawn.ravel()[order]) >= 0).all()


def test_a_fixed_boundary_freezes_the_map_as_it_is():
  settings = page(**{"attention.boundary": "fixed"})
  _, state, _ = run(settings, 1, steps=2)
  before = np.asarray(state.constants["map"])
  assert (np.asarray(begin(settings, 1, "frozen").enter(state).constants["map"]) == before).all()


def test_what_answers_holds_the_map_and_not_the_classifier():
  now, state, _ = run(page(), 1, steps=1)
  variables = now.variables(state)
  assert set(variables) == {"params", "batch_stats", "constants"}
  assert set(variables["params"]) == {"backbone"} and set(variables["constants"]) == {"map"}


def test_attention_on_a_stages_features():
  settings = page(**{"model.attend": "layer2", "augment.dihedral": True})
  now = begin(settings, 1)
  variables = jax.device_get(now.variables(now.initial()))
  image = batch(0)["image"]
  whole, _ = now.model.apply(variables, image)
  shut = {**variables, "constants": {"map": np.zeros((SIZE, SIZE), np.float32)}}
  alike, _ = now.model.apply(shut, image)
  assert np.abs(whole - alike).max() > 1e-3
  np.testing.assert_allclose(alike, np.broadcast_to(alike[:1], alike.shape), atol=1e-6)


def test_geometry_comes_after_the_map_and_light_before_it():
  """Moving images that are weighted moves the weights with them."""
  import jax.numpy as jnp

  from medattn_jax import augment

  settings = page(**{"model.backbone": "resnet_small"})
  now = begin(settings, 1)
  variables = jax.device_get(now.variables(now.initial()))
  half = np.zeros((SIZE, SIZE), np.float32)
  half[:, : SIZE // 2] = 1
  variables["constants"] = {"map": half}
  image = batch(0)["image"][:4]
  flips = jnp.array([[False, True, False]] * 4)
  drawn = augment.Draw(flips, None, jnp.ones((4, 3)), jnp.zeros((4, 3)), None)
  turned, _ = now.model.apply(variables, image, drawn=drawn)
  mirrored = {**variables, "constants": {"map": half[:, ::-1]}}
  expected, _ = now.model.apply(mirrored, image[:, :, :, ::-1])
  np.testing.assert_allclose(turned, expected, atol=1e-5)


@pytest.mark.parametrize("overrides, said", [
  ({"model.backbone": "inception_v3", "data.full_size": 96, "data.image_size": 96},
   "has no named stages"),
  ({"model.backbone": "inception_v3", "model.width": 0.5, "model.stem": "full",
    "attention.source": "none", "data.full_size": 96, "data.image_size": 96}, "model.width = 1"),
  ({"model.attend": "layer9"}, "accepted for cnn: input, layer1"),
  ({"data.full_size": 32}, "the map weighs the images as they are stored"),
  ({"attention.source": "batch", "phases.joint.accumulation": 2}, "one batch's; accepted: 1")])
def test_a_page_that_cannot_be_built(overrides, said):
  with pytest.raises(UserError, match=said):
    experiment.build(page(**overrides))


@pytest.mark.parametrize("value", ["bank:0", "banks", "bank:", "all"])
def test_sources_that_there_are_not(value):
  with pytest.raises(UserError, match="none, bank, bank:K"):
    page(**{"attention.source": value})


@pytest.mark.parametrize("backbone, pixels, stem", [
  pytest.param("resnet18", 32, "small", marks=SLOW),
  pytest.param("resnet50", 32, "small", marks=SLOW),
  pytest.param("googlenet", 32, "small", marks=SLOW),
  pytest.param("densenet121", 32, "small", marks=SLOW),
  pytest.param("vgg16_bn", 32, "small", marks=SLOW),
  pytest.param("vgg16", 32, "small", marks=SLOW)])
def test_every_backbone_is_trained_alike_on_any_devices(backbone, pixels, stem):
  """With GoogLeNet's auxiliary heads and the dropouts, whose chance belongs to the example."""
  settings = page(**{
    "model.backbone": backbone, "model.stem": stem, "data.full_size": pixels,
    "data.image_size": pixels, "data.batch_size": 4, "data.synthetic.train": 8,
    "phases.joint.optimizer": "sgd", "phases.joint.learning_rate": 1e-3})
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (8, pixels, pixels, 1), np.uint8)
  small = {"image": images[:4, None], "level": np.array([[0], [1], [1], [0]], np.int32),
           "mask": np.ones((4, 1), np.float32)}
  losses = []
  for devices in (1, 2):
    from medattn_jax import sharding

    chosen = jax.devices()[:devices]
    held = bank.fill(images, 64, 8, pixels, 1, sharding.mesh(chosen))
    now = experiment.build(settings, "joint", chosen, held)
    state = now.initial()
    for _ in range(2):
      state, metrics = now.train_step(state, now.put_train([small]))
    losses.append(float(metrics["loss"]))
    assert np.isfinite(losses[-1])
  np.testing.assert_allclose(*losses, rtol=1e-4)
