"""Zoom-in-Net: the paper's shapes, the phases, the pair, and what each branch is given."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax import augment, config, models
from medattn_jax.models.backbones.resnet_small import ResNetSmall
from medattn_jax.models.zoom_in_net import MNet, ZoomInNet

TINY = functools.partial(ResNetSmall, widths=(8, 12, 16), blocks=(0, 0, 1))
SMALL = {
  "backbone": TINY, "crop_backbone": TINY, "neck_features": 16, "attention_features": 8,
  "image_size": 48, "crop_size": 37, "mask_size": 19, "group_size": 4}


def network(**options):
  return ZoomInNet(**{**SMALL, **options})


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  return {"image": rng.integers(0, 256, (4, 2, 120, 120, 3)).astype(np.uint8),
          "gain": rng.uniform(0.8, 1.2, (4, 2, 3)).astype(np.float32),
          "bias": rng.uniform(-0.1, 0.1, (4, 2, 3)).astype(np.float32)}


def given(batch):
  """The call's arguments: the image, and an augmentation that only shades."""
  gain, bias = (batch[name].reshape(-1, 3) for name in ("gain", "bias"))
  return {"image": batch["image"], "drawn": augment.Draw(None, None, gain, bias, None)}


@pytest.fixture(scope="module")
def variables(batch, draw_variables):
  return draw_variables(network(), batch["image"])


@functools.partial(jax.jit, static_argnums=(0, 3))
def train(net, variables, batch, phase):
  """(logits, out, new batch_stats, gradient) of a loss that every answer is part of."""
  def loss(params):
    (logits, out), new = net.apply(
      {**variables, "params": params}, **given(batch), phase=phase, train=True,
      mutable=["batch_stats"])
    value = -jax.nn.log_softmax(logits)[..., 1].sum() + jnp.square(out["y_M"]).sum()
    return value, (logits, out, new["batch_stats"])

  (_, (logits, out, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
  return logits, out, stats, gradient


@functools.partial(jax.jit, static_argnums=(0, 3))
def evaluate(net, variables, batch, phase="c"):
  return net.apply(variables, **given(batch), phase=phase)


def paper_config(name="zoom_in_net"):
  page = config.load_page(str(pathlib.Path(__file__).parents[2] / "configs" / "zoom_in_net.py"))
  page.model.name = name
  return page


def test_the_papers_shapes():
  """Of Inception-ResNet-v2 at 492 and Inception-v3 at 384, without computing anything."""
  net = models.build(paper_config())
  image = jax.ShapeDtypeStruct((1, 2, 1230, 1230, 3), jnp.uint8)
  (logits, out), variables = jax.eval_shape(net.init_with_output, jax.random.key(0), image)
  maps = (1, 2, 14, 14, 5)
  assert {name: x.shape for name, x in out.items()} == {
    "M": (1, 2, 14, 14, 1024), "S": maps, "A": maps, "G": maps, "y_M": (1, 2, 5),
    "y_A": (1, 2, 5), "y_C": (1, 2, 5), "boxes": (1, 2, 4, 4)}
  assert out.pop("M").dtype == jnp.bfloat16 and out.pop("boxes").dtype == jnp.int32
  assert {x.dtype for x in (logits, *out.values())} == {jnp.dtype("float32")}
  assert set(variables["params"]) == set(variables["batch_stats"]) == {"m_net", "a_net", "c_net"}
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  params = variables["params"]
  assert params["m_net"]["neck"]["conv"]["kernel"].shape == (1, 1, 2080, 1024)
  assert "conv2d_7b" not in params["m_net"]["backbone"]
  assert params["m_net"]["head"]["kernel"].shape == (2048, 5)
  assert params["c_net"]["head"]["kernel"].shape == (2048 + 2048, 5)


def test_inception_resnet_v2s_stages():
  """492 → 59²×320 → 29²×1088 → 14²×2080."""
  net = models.backbone("inception_resnet_v2", final_conv=False)
  _, state = jax.eval_shape(
    lambda key, x: net.apply(
      net.init(key, x), x, capture_intermediates=True, mutable=["intermediates"]),
    jax.random.key(0), jnp.zeros((1, 492, 492, 3)))
  shape = lambda name: state["intermediates"][name]["__call__"][0].shape
  assert shape("repeat-9") == (1, 59, 59, 320)
  assert shape("repeat_1-19") == (1, 29, 29, 1088)
  assert shape("block8") == (1, 14, 14, 2080)


def test_phases_train_their_branches_and_no_other(variables, batch):
  net = network()
  for phase, trained in models.PHASES["zoom_in_net"].items():
    _, _, stats, gradient = train(net, variables, batch, phase)
    for branch in ("m_net", "a_net", "c_net"):
      size = sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(gradient[branch]))
      moved = sum(float(jnp.abs(a - b).sum()) for a, b in zip(
        jax.tree.leaves(stats[branch]), jax.tree.leaves(variables["batch_stats"][branch]),
        strict=True))
      if branch in trained:
        assert size > 0 and moved > 0, (phase, branch)
      else:
        assert size == 0 and moved == 0, (phase, branch)


def test_answers_are_sums_of_the_branches_of_the_phase(variables, batch):
  net = network()
  for phase, names in (("m", "M"), ("a", "MA"), ("c", "MAC")):
    logits, out = evaluate(net, variables, batch, phase)
    np.testing.assert_allclose(logits, sum(out[f"y_{n}"] for n in names), rtol=1e-6)
    assert {name for name in out if name.startswith("y_")} == {f"y_{n}" for n in names}
    assert ("boxes" in out) == (phase != "m")


def test_a_fixed_m_net_answers_as_in_evaluation(variables, batch):
  net = network()
  _, out, _, _ = train(net, variables, batch, "a")
  np.testing.assert_allclose(out["y_M"], evaluate(net, variables, batch, "m")[0], atol=1e-5)


def test_the_joint_phase_begins_from_the_earlier_answers(batch):
  net = network()
  start = jax.jit(net.init)(jax.random.key(0), batch["image"][:1])
  logits, out = evaluate(net, start, batch, "c")
  np.testing.assert_array_equal(out["y_C"], np.zeros((4, 2, 5)))
  np.testing.assert_array_equal(logits, out["y_M"] + out["y_A"])
  assert np.abs(out["y_A"]).max() < 0.2


def test_swapping_the_eyes_swaps_the_answers(variables, batch):
  net = network()
  logits, out = evaluate(net, variables, batch)
  swapped, swapped_out = evaluate(net, variables, {k: v[:, ::-1] for k, v in batch.items()})
  np.testing.assert_allclose(swapped, logits[:, ::-1], atol=1e-4)
  np.testing.assert_array_equal(swapped_out["boxes"], out["boxes"][:, ::-1])
  assert np.abs(logits - logits[:, ::-1]).max() > 0.01


def test_an_answer_depends_on_the_fellow_eye_but_not_on_other_patients(variables, batch):
  net = network()
  logits, _ = evaluate(net, variables, batch)
  changed = {k: v.copy() for k, v in batch.items()}
  changed["image"][0, 1] = 255 - changed["image"][0, 1]
  after, _ = evaluate(net, variables, changed)
  assert np.abs(after - logits)[0, 0].max() > 1e-3
  np.testing.assert_allclose(after[1:], logits[1:], atol=1e-5)


@pytest.mark.slow
def test_slices_of_whole_groups_are_the_whole(variables, batch):
  """Results do not depend on how many devices a batch is spread over."""
  net = network()
  logits, out, stats, gradient = train(net, variables, batch, "c")
  halves = [train(net, variables, {k: v[i:i + 2] for k, v in batch.items()}, "c") for i in (0, 2)]
  np.testing.assert_allclose(np.concatenate([h[0] for h in halves]), logits, atol=1e-4)
  np.testing.assert_array_equal(np.concatenate([h[1]["boxes"] for h in halves]), out["boxes"])
  jax.tree.map(lambda a, b, c: np.testing.assert_allclose((a + b) / 2, c, rtol=1e-4, atol=1e-5),
               halves[0][2], halves[1][2], stats)
  close = lambda a, b, c: np.testing.assert_allclose(
    a + b, c, atol=1e-3 * float(jnp.abs(c).max()) + 1e-4)
  jax.tree.map(close, halves[0][3], halves[1][3], gradient)


class Witness(nn.Module):
  """A backbone that keeps what it is given and averages it."""

  group_size: int
  momentum: float
  dtype: type

  @nn.compact
  def __call__(self, x, train):
    self.sow("intermediates", "given", x)
    self.sow("intermediates", "group", self.group_size)
    self.param("unused", nn.initializers.zeros, (1,))
    return None, {"features": nn.avg_pool(x, (12, 12), (12, 12)), "pooled": x.mean((1, 2))}


def test_each_branch_sees_the_augmented_normalised_pixels(batch, draw_variables):
  mean, std = (0.4, 0.3, 0.2), (0.2, 0.3, 0.4)
  net = network(backbone=Witness, crop_backbone=Witness, mean=mean, std=std)
  variables = draw_variables(net, batch["image"])
  (_, out), state = jax.jit(
    lambda v, b: net.apply(v, **given(b), mutable=["intermediates"]))(variables, batch)
  out = jax.tree.map(np.asarray, out)
  spread = lambda a: a[:, :, None, None]
  full = (batch["image"] / 255 * spread(batch["gain"]) + spread(batch["bias"]) - mean) / std
  seen = {name: np.asarray(state["intermediates"][name]["backbone"]["given"][0])
           for name in ("m_net", "c_net")}

  wanted = jax.image.resize(full.reshape(8, 120, 120, 3), (8, 48, 48, 3), "linear")
  np.testing.assert_allclose(seen["m_net"], wanted, atol=1e-4)
  group = lambda name: state["intermediates"][name]["backbone"]["group"][0]
  assert group("m_net") == 4 and group("c_net") == 4 * 4, "the crops of 4 images belong together"
  crops = seen["c_net"].reshape(4, 2, 4, 37, 37, 3)
  for place in np.ndindex(4, 2, 4):
    top, left, bottom, right = out["boxes"][place]
    np.testing.assert_allclose(crops[place], full[place[:2]][top:bottom, left:right], atol=1e-5)


def test_c_net_takes_the_strongest_of_the_regions(batch, draw_variables):
  net = network(crop_backbone=Witness)
  variables = draw_variables(net, batch["image"])
  head = variables["params"]["c_net"]["head"]
  head["kernel"][:], head["bias"][:] = 0, 0
  head["kernel"][:3, :3] = np.eye(3)
  _, out = evaluate(net, variables, batch)
  out = jax.tree.map(np.asarray, out)
  image = (batch["image"] / 255 * batch["gain"][:, :, None, None]
           + batch["bias"][:, :, None, None] - 0.5) / 0.5
  for place in np.ndindex(4, 2):
    means = [image[place][a:c, b:d].mean((0, 1)) for a, b, c, d in out["boxes"][place]]
    np.testing.assert_allclose(out["y_C"][place][:3], np.max(means, 0), atol=1e-4)


@pytest.mark.slow
def test_bfloat16_is_finite_and_near(variables, batch):
  exact, _ = evaluate(network(), variables, batch, "m")
  logits, out, _, gradient = train(network(dtype=jnp.bfloat16), variables, batch, "c")
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((logits, out, gradient)))
  near, _ = evaluate(network(dtype=jnp.bfloat16), variables, batch, "m")
  assert np.abs(near - exact).max() < 0.05 * np.abs(exact).max()


def test_m_net_alone_is_the_first_phase(variables, batch):
  names = ("backbone", "neck_features", "image_size", "group_size")
  net = MNet(**{name: SMALL[name] for name in names})
  alone = {name: {"m_net": variables[name]["m_net"]} for name in variables}
  logits, out = net.apply(alone, **given(batch))
  np.testing.assert_allclose(
    logits, evaluate(network(), variables, batch, "m")[0], rtol=1e-4, atol=1e-5)
  assert set(out) == {"M", "y_M"}
  start = jax.eval_shape(net.init, jax.random.key(0), batch["image"])
  assert set(start["params"]) == {"m_net"}


def test_an_unknown_phase_is_refused(batch):
  with pytest.raises(ValueError, match="m, a, c"):
    network().init(jax.random.key(0), batch["image"], phase="joint")
