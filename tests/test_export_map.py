"""export of one map for all images: the map leaves, the images it was made of do not.

What a bundle is refused for, and what its batches are, is tested on a stand-in with such a map.
"""

import errno
import os
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import medattn_jax
from medattn_jax import export, trained
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.data import planted
from medattn_jax.errors import UserError


class Attending(nn.Module):
  """A stand-in for a model with one map for all images: one image an example, one channel."""

  stubborn: bool = False

  @nn.compact
  def __call__(self, image, *, phase="frozen", train=False):
    if self.stubborn and image.shape[0] > 3:  # no size that is not a number answers this
      raise AssertionError("a batch of four")
    attended = self.get_variable("constants", "map")[..., None] * image.astype(jnp.float32)
    logits = nn.Dense(3, name="head")(attended.reshape(*image.shape[:2], -1) / 255)
    return logits, {}


@pytest.fixture
def attending(smoke_config, tmp_path):
  """make(stubborn): what open_workdir gives of such a model; its bank must not leave."""
  def make(stubborn=False):
    rng = np.random.default_rng(0)
    config = smoke_config.copy_and_resolve_references()
    config.model.name, config.model.num_classes = "global_attention", 3
    with config.unlocked():
      config.data.channels, config.data.full_size = 1, 28
    model = Attending(stubborn)
    ramp = np.linspace(0, 1, 28, dtype=np.float32)
    kernel = rng.normal(size=(784, 3)).astype(np.float32)
    variables = {
      "params": {"head": {"kernel": kernel, "bias": np.zeros(3, np.float32)}},
      "batch_stats": {},
      "constants": {"map": np.outer(ramp, ramp), "bank": rng.integers(0, 255, (9, 28, 28, 1))}}
    now = types.SimpleNamespace(model=model, phase="frozen")
    return trained.Trained(tmp_path, config, 7, "frozen", now, variables, None,
                           trained.LIKELIEST, "0" * 64)

  return make


def test_the_map_leaves_and_the_bank_stays(attending, tmp_path, capsys, bundles):
  """One image an example, one channel; attention.npy and .png beside the rest."""
  model = attending()
  export.bundle(model, tmp_path / "out")
  there = {path.name for path in (tmp_path / "out").iterdir()}
  assert there == bundles.FILES | {"attention.npy", "attention.png"}
  assert "not exported: constants/bank" in capsys.readouterr().err
  program, weights = bundles.opened(tmp_path / "out")
  assert sorted(weights) == ["constants/map", "params/head/bias", "params/head/kernel"]
  kept = np.load(tmp_path / "out" / "attention.npy", allow_pickle=False)
  assert kept.dtype == np.float32 and kept.shape == (28, 28)
  np.testing.assert_array_equal(kept, model.variables["constants"]["map"])
  with Image.open(tmp_path / "out" / "attention.png") as picture:
    assert picture.format == "PNG" and min(picture.size) > 300
  images = np.random.default_rng(1).integers(0, 255, (5, 1, 28, 28, 1), np.uint8)
  found = program.call(weights, images)
  expected = jax.nn.softmax((kept * images[..., 0] / 255).reshape(5, 1, 784)
                            @ weights["params/head/kernel"])
  np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)
  np.testing.assert_array_equal(found["grade"], expected.argmax(-1))  # there are no thresholds
  told, bank = bundles.about(tmp_path / "out"), model.variables["constants"]["bank"]
  assert told["classes"] == ["0", "1", "2"] and told["input"]["shape"] == ["b", 1, 28, 28, 1]
  assert "largest probability" in told["decision"]
  # Another bank makes the same bundle, to the last bit.
  bank[:] = 255 - bank
  export.bundle(model, tmp_path / "again")
  for path in (tmp_path / "out").iterdir():
    assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path


@pytest.fixture(scope="module")
def of_map(untrained_map, tmp_path_factory):
  """The bundle of a real global attention, as the command writes it. Not to be changed."""
  out = tmp_path_factory.mktemp("bundle") / "map"
  export.run(str(untrained_map), str(out))
  return out


@pytest.fixture(scope="module")
def trained_on(map_config):
  """The images of the bank, uint8 [40, 24, 24]: the training split, drawn anew."""
  drawn = map_config.data.synthetic
  return np.stack([planted.draw(drawn.seed, number, 24, 2)[0] for number in range(drawn.train)])


def resemblance(array, images):
  """The largest |correlation| of an image with as many neighbouring numbers of an array.

  The array is read along each axis last, the image in rows; 0 where it has fewer numbers.
  """
  images = images.reshape(len(images), -1) - images.mean((1, 2))[:, None]
  images = images / np.linalg.norm(images, axis=1, keepdims=True)
  most, count = 0.0, images.shape[1]
  for axis in range(array.ndim if array.size >= count else 0):
    numbers = np.moveaxis(array, axis, -1).astype(np.float64).ravel()
    numbers -= numbers.mean()
    total, square = (np.cumsum([0, *x]) for x in (numbers, numbers**2))
    total, square = (x[count:] - x[:-count] for x in (total, square))
    length = np.sqrt(np.maximum(square - total**2 / count, 1e-9))
    size = 1 << (len(numbers) + count).bit_length()
    spectrum = np.fft.rfft(numbers, size)
    for image in images:
      products = np.fft.irfft(spectrum * np.fft.rfft(image, size).conj(), size)[:len(length)]
      most = max(most, np.abs(products / length).max())
  return most


def test_a_real_map_leaves_and_no_image_of_its_bank_does(
    of_map, untrained_map, trained_on, bundles):
  """The map is the checkpoint's, bit by bit; no array is like any image the map was made of."""
  weights = bundles.opened(of_map)[1]
  tree, _ = Checkpoints(untrained_map / "checkpoints").load(12)
  for kept in (weights["constants/map"], np.load(of_map / "attention.npy", allow_pickle=False)):
    assert kept.dtype == np.float32
    np.testing.assert_array_equal(
      kept.view(np.uint32), np.asarray(tree["constants"]["map"]).view(np.uint32))
  # The pixel classifier, which is as long as the bank, stays at home.
  assert tree["params"]["pixel_classifier"]["rows"]["kernel"].shape == (64, 1)
  assert {name.split("/")[1] for name in weights} == {"backbone", "map"}
  alike = {name: resemblance(array, trained_on) for name, array in weights.items()}
  assert max(alike.values()) < 0.7, alike
  assert sum(value > 0 for value in alike.values()) > 2  # those that had room for an image
  # An image would be found in any of them: whole, dimmed, turned over, and in noise.
  name = max(weights, key=lambda name: weights[name].size)
  for change in (lambda x: x, lambda x: 0.01 * x + 3, lambda x: -x,
                 lambda x: x + np.random.default_rng(0).normal(0, x.std() / 2, x.shape)):
    hidden = np.array(weights[name])
    hidden.reshape(-1)[100:100 + 576] = change(trained_on[7].ravel() / np.float32(255))
    assert resemblance(hidden, trained_on) > 0.8
  # Nor are its bytes in any file, in rows or as floats.
  whole = b"".join(path.read_bytes() for path in of_map.iterdir())
  for image in trained_on:
    assert image[12].tobytes() not in whole
    assert (image[12] / np.float32(255)).tobytes() not in whole


def test_a_real_map_answers_without_this_package(
    of_map, untrained_map, trained_on, tmp_path, bundles):
  answers = bundles.answers(of_map, trained_on[:5, None, :, :, None], tmp_path)
  expected = medattn_jax.load(untrained_map, devices=jax.devices()[:1]).predict(trained_on[:5])
  for name in ("probabilities", "score", "grade"):
    np.testing.assert_allclose(answers[name][:, 0], getattr(expected, name), rtol=0, atol=1e-5)
  told, card = bundles.about(of_map), (of_map / "README.md").read_text()
  assert told["input"]["shape"] == ["b", 1, 24, 24, 1] and told["program"]["batch"] == "any"
  assert told["thresholds"] is None and "largest probability" in told["decision"]
  for words in ("Global spatial attention", "class of the largest probability",
                "40 examples drawn by a program"):
    assert words in card


def test_a_model_that_needs_a_size_gets_one_and_it_is_said(attending, tmp_path, capsys, bundles):
  model = attending(stubborn=True)
  with model.config.unlocked():
    model.config.evaluation.batch_size = 2
  model.variables["params"]["later"] = np.ones(3, np.float32)  # a branch that this phase has not
  export.bundle(model, tmp_path / "out")
  assert "takes batches of 2 alone" in capsys.readouterr().err
  program, weights = bundles.opened(tmp_path / "out")
  told = bundles.about(tmp_path / "out")
  assert told["program"]["batch"] == 2 and told["input"]["shape"] == [2, 1, 28, 28, 1]
  assert program.call(weights, np.zeros((2, 1, 28, 28, 1), np.uint8))["score"].shape == (2, 1)
  # What is not used is an argument all the same: the order is that of the names.
  assert program.module_kept_var_idx == tuple(range(len(told["program"]["arguments"])))
  assert len(program.module_kept_var_idx) == 5
  assert "batches of 2:" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_wrong_whatever_the_batch_is_raised(attending, tmp_path):
  model = attending(stubborn=True)
  with model.config.unlocked():
    model.config.evaluation.batch_size = 5
  with pytest.raises(AssertionError, match="a batch of four"):
    export.bundle(model, tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.full(3, np.nan, np.float32), np.zeros(3, np.uint8)])
def test_arrays_that_are_no_weights_are_refused(attending, tmp_path, value):
  model = attending()
  model.variables["params"]["head"]["bias"] = value
  with pytest.raises(UserError, match=r"params/head/bias.*finite floats"):
    export.bundle(model, tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_whole_or_not_there(attending, tmp_path, monkeypatch, bundles):
  """A disk that fills at the last file leaves nothing; an empty folder is taken."""
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  model = attending()
  (tmp_path / "empty").mkdir()
  for name in ("new", "empty"):
    with monkeypatch.context() as patch:
      patch.setattr(export, "card", full)
      with pytest.raises(OSError, match="No space") as raised:
        export.bundle(model, tmp_path / name)
      assert raised.value.filename == str(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]
  export.bundle(model, tmp_path / "empty")
  assert [p.name for p in tmp_path.iterdir()] == ["empty"]
  with pytest.raises(OSError, match="not empty"):  # one that came into being in the meantime
    export.bundle(model, tmp_path / "empty")
  assert [p.name for p in tmp_path.iterdir()] == ["empty"]
  assert {p.name for p in (tmp_path / "empty").iterdir()} > bundles.FILES
