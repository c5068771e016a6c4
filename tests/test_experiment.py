"""What is assembled: the compiled programs, the phases, and answers on any device count."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax import config, experiment
from medattn_jax.errors import UserError
from medattn_jax.models import remat
from medattn_jax.programs import report

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SGD = [(f"phases.{p}.optimizer", "sgd") for p in "mac"]
LARGE = "1.0"  # a learning rate: what it moves is compared, not the last bits of the params


def smoke(*overrides):
  return config.load_page(str(CONFIGS / "smoke.py"), [*overrides, *SGD])


def batch(page, seed=0):
  rng = np.random.default_rng(seed)
  size, patients = page.data.full_size, page.data.batch_size
  return {
      "image": rng.integers(0, 256, (patients, 2, size, size, 3), np.uint8),
      "level": rng.integers(0, 5, (patients, 2)).astype(np.int32),
      "mask": np.ones((patients, 2), np.float32),
  }


def test_one_device_and_eight_take_the_same_step():
  page = smoke(("phases.c.learning_rate", LARGE))
  after = []
  for devices in (1, 8):
    now = experiment.build(page, phase="c", devices=jax.devices()[:devices])
    before = jax.device_get(now.initial().params)
    state, metrics = now.train_step(now.initial(), now.put_train([batch(page)]))
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), before)
    after.append((float(metrics["loss"]), moved, jax.device_get(state.batch_stats)))
  (loss, moved, stats), (other_loss, other_moved, other_stats) = after
  assert loss == pytest.approx(other_loss, rel=1e-5)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved))
  for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(other_moved), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)
  for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(other_stats), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_small_batch_alone_is_not_copied_for_a_cpu():
  page = smoke()
  now, host = experiment.build(page, phase="m", devices=jax.devices()[:1]), batch(page)
  flat = np.empty(host["image"].nbytes + 64, np.uint8)
  start = -flat.ctypes.data % 64
  image = flat[start : start + host["image"].nbytes].reshape(host["image"].shape)
  image[:] = host["image"]
  alone = now.put_train([host | {"image": image}])["image"]
  assert alone.unsafe_buffer_pointer() == image.ctypes.data
  np.testing.assert_array_equal(alone, image[None])
  several = now.put_train([host, host])["image"]
  np.testing.assert_array_equal(several, np.stack([image, image]))


@pytest.mark.parametrize("phase", ["c", pytest.param("m", marks=pytest.mark.slow)])
def test_a_step_that_computes_parts_twice_is_the_same_step(phase):
  """On eight devices, with one all-reduce and every leaf of the state donated."""
  after = []
  for mode in remat.MODES:
    page = smoke((f"phases.{phase}.remat", mode), (f"phases.{phase}.learning_rate", LARGE))
    now = experiment.build(page, phase=phase)
    small, before = now.put_train([batch(page)]), jax.device_get(now.initial().params)
    compiled = now.train_step.lower(now.initial(), small).compile()
    told = report.read(compiled)
    assert told.counts == {"all-reduce": 1} and not told.collectives[0].inside
    assert told.donated == len(jax.tree.leaves(now.abstract_state))
    state, metrics = compiled(now.initial(), small)
    moved = jax.tree.map(lambda a, b: a - b, jax.device_get(state.params), before)
    after.append((moved, jax.device_get(state.batch_stats), jax.device_get(metrics), told.flops))
  (moved, *rest, flops), *others = after
  scale = max(np.abs(x).max() for x in jax.tree.leaves(moved))
  for other, *other_rest, _ in others:
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
    for a, b in zip(jax.tree.leaves(rest), jax.tree.leaves(other_rest), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
  assert flops < others[0][-1] < others[1][-1]  # it does compute them twice


def test_a_fixed_m_net_is_bit_equal_after_phase_a_and_a_net_is_not():
  page = smoke()
  now = experiment.build(page, phase="a", devices=jax.devices()[:1])
  before = jax.device_get(now.initial())
  state = now.initial()
  for seed in range(2):
    state, _ = now.train_step(state, now.put_train([batch(page, seed)]))
  after = jax.device_get(state)
  for tree, held in ((after.params, before.params), (after.batch_stats, before.batch_stats)):
    for name in ("m_net", "c_net"):
      assert jax.tree.all(jax.tree.map(np.array_equal, tree[name], held[name]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, tree["a_net"], held["a_net"]))


def test_a_new_phase_begins_from_the_averaged_params():
  page = smoke(("phases.m.ema", "0.9"))
  first = experiment.build(page, phase="m", devices=jax.devices()[:1])
  state, _ = first.train_step(first.initial(), first.put_train([batch(page)]))
  average = jax.device_get(state.ema)
  second = experiment.build(page, phase="a", devices=jax.devices()[:1])
  entered = second.enter(state)
  assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(entered.params), average))
  assert int(entered.step) == 1 and entered.ema is None
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), entered)
  assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), second.abstract_state)


def test_c_net_begins_with_m_nets_layers_where_the_page_says_so():
  page = smoke(("model.crop_init", "m_net"))
  now = experiment.build(page, phase="c", devices=jax.devices()[:1])
  before = now.initial()
  entered = jax.device_get(now.enter(before))
  for tree in (entered.params, entered.batch_stats):
    same = jax.tree.map(np.array_equal, tree["c_net"]["backbone"], tree["m_net"]["backbone"])
    assert jax.tree.all(same)
  now.train_step(now.enter(before), now.put_train([batch(page)]))  # no buffer twice
  local = experiment.build(
      smoke(("model.crop_init", "m_net"), ("model.crop_backbone", "resnet_small")), phase="c")
  params = local.enter(local.initial()).params
  own, given = params["c_net"]["backbone"], params["m_net"]["backbone"]
  assert set(own) - set(given) == {"stage2_0_1", "stage2_0_2"}
  assert jax.tree.all(jax.tree.map(np.array_equal, {k: own[k] for k in given}, given))


def test_answers_do_not_depend_on_the_device_count():
  page = smoke()
  batches = [batch(page, 0), {k: v[:3] for k, v in batch(page, 1).items()}]
  answers = []
  for devices in (1, 8):
    now = experiment.build(page, devices=jax.devices()[:devices])
    found = list(experiment.predictions(now, now.variables(now.initial()), batches))
    assert [len(out["logits"]) for _, out in found] == [page.data.batch_size, 3]
    answers.append(np.concatenate([out["logits"] for _, out in found]))
  np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)


def test_phases_follow_the_model_and_divide_the_steps():
  page = smoke(("phases.m.steps", "3"), ("phases.a.steps", "0"), ("phases.c.steps", "2"))
  assert experiment.phases(page) == ("m", "a", "c")
  assert [experiment.phase_at(page, step) for step in range(6)] == list("mmmccc")
  assert experiment.total_steps(page) == 5
  now = experiment.build(page, phase="c")
  assert (now.begins, now.ends) == (3, 5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (("model.name", "zoom_in"), "did you mean zoom_in_net"),
        (("model.backbone", "resnet_smal"), "did you mean resnet_small"),
        (("model.name", "m_net"), "accepted for model.name = m_net: joint"),
        (("data.batch_size", "12"), "a multiple of 8"),
        (("norm.group_size", "3"), "norm.group_size"),
        (("model.backbone", "inception_v3"), r"data.image_size = 64.*at least 75"),
        (("model.crop_backbone", "inception_v3"), r"model.crop_size = 40.*at least 75"),
    ],
)
def test_what_cannot_be_assembled_is_named(override, words):
  with pytest.raises(UserError, match=words):
    experiment.check(smoke(override), devices=8)


def test_c_net_cannot_begin_with_layers_it_does_not_have():
  unlike = smoke(("model.crop_backbone", "inception_v3"), ("model.crop_size", "96"))
  with pytest.raises(UserError, match=r"crop_init = m_net.*no layers in common"):
    experiment.check(unlike, devices=8)


def test_a_batch_beyond_the_memory_is_refused_in_words():
  huge = smoke(("data.batch_size", "65536"), ("data.full_size", "8000"))
  with pytest.raises(UserError, match=r"data\.batch_size = 65536.*take \d+ GiB, this host has"):
    experiment.check_host(huge)
  experiment.check(huge, devices=8)  # planned here, it may train elsewhere


def test_images_of_an_update(smoke_config, map_config):
  """Both eyes of a pair count, and every small batch of an accumulated update."""
  smoke_config = smoke_config.copy_and_resolve_references()
  smoke_config.phases.m.accumulation = 3
  pairs, single = experiment.build(smoke_config, "m"), experiment.build(map_config, "joint")
  assert pairs.images == 2 * 3 * smoke_config.data.batch_size
  assert single.images == map_config.data.batch_size
