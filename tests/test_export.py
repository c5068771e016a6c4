"""export: a bundle answers as the model does without this package, and holds no training image."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import medattn_jax
from medattn_jax import experiment, export, trained
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.data import planted, preprocess, synthetic
from medattn_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = {"README.md", "config.json", "model.json", "model.safetensors", "model.stablehlo"}
# Nothing of ours, and nothing it is made with, can be imported after this.
ALONE = "import sys\nfor name in ('medattn_jax', 'flax', 'orbax', 'tensorflow', 'optax', 'clu'):\n"
ALONE += "  sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def bundle(untrained, tmp_path_factory):
  """The bundle of the smoke page's phase c, as the command writes it. Not to be changed."""
  out = tmp_path_factory.mktemp("bundle") / "new" / "bundle"
  export.run(str(untrained), str(out))
  return out


@pytest.fixture(scope="module")
def small(untrained_m_net, tmp_path_factory):
  """The bundle of M-Net alone. Not to be changed."""
  out = tmp_path_factory.mktemp("bundle") / "m_net"
  export.run(str(untrained_m_net), str(out), 12)
  return out


@pytest.fixture(scope="module")
def photographs():
  """uint8 [4, 128, 128, 3], as the network takes them."""
  eyes = [eye.image for i in range(4) for eye in synthetic.draw_patient(3, i, 128).eyes]
  return np.stack(eyes[:4])


def python(code, folder):
  """Runs `code` in a process of its own, in `folder`, where only JAX and safetensors are."""
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", ALONE + code], cwd=folder, env=environment,
    capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


def opened(folder):
  """(program, weights) of a bundle."""
  blob = bytearray((folder / "model.stablehlo").read_bytes())
  return jax.export.deserialize(blob), safetensors.numpy.load_file(folder / "model.safetensors")


def about(folder):
  return json.loads((folder / "model.json").read_text())


def test_a_process_without_this_package_answers_as_the_model(
    bundle, untrained, photographs, tmp_path):
  """Three photographs that are their own fellows, and a pair, as the predictor grades files."""
  for name, image in zip(("0", "1", "7_left", "7_right"), photographs, strict=True):
    Image.fromarray(image).save(tmp_path / f"{name}.png")
  prepared = np.stack([preprocess.prepare_photograph(image, 128) for image in photographs])
  np.save(tmp_path / "images.npy", prepared[[[0, 0], [1, 1], [2, 3]]])
  python(f"""
import jax, jax.export, numpy as np
from safetensors.numpy import load_file
program = jax.export.deserialize(bytearray(open({str(bundle / "model.stablehlo")!r}, "rb").read()))
weights = load_file({str(bundle / "model.safetensors")!r})
np.savez("answers.npz", **program.call(weights, np.load("images.npy")))
assert sys.modules["medattn_jax"] is None
""", tmp_path)
  answers = np.load(tmp_path / "answers.npz")
  model = medattn_jax.load(untrained, devices=jax.devices()[:1])
  expected = model.predict(str(tmp_path))
  assert [pathlib.Path(name).stem for name in expected.images] == ["0", "1", "7_left", "7_right"]
  assert np.ptp(expected.score) > 1e-2  # or all would agree whatever is answered
  for name in ("probabilities", "score", "grade", "boxes"):
    found, wanted = answers[name], getattr(expected, name)
    np.testing.assert_allclose(found[2], wanted[2:], rtol=0, atol=1e-5)
    for eye in range(2):
      np.testing.assert_allclose(found[:2, eye], wanted[:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("phase", ["m", "a"])
def test_every_phase(phase, untrained, photographs):
  """A checkpoint of an earlier phase answers with what there is by then."""
  model = trained.open_workdir(untrained, devices=jax.devices()[:1])
  now = experiment.build(model.config, phase, jax.devices()[:1])
  model = model._replace(phase=phase, experiment=now)
  weights = export.leaving(model.variables)
  program = export.program(model, weights)
  answers = program.call(weights, photographs[None, 2:])
  given = experiment.predictions(now, model.variables, [{"image": photographs[None, 2:]}])
  _, expected = next(given)
  np.testing.assert_allclose(
    answers["probabilities"], jax.nn.softmax(expected["logits"]), rtol=0, atol=1e-5)
  assert ("boxes" in answers) == (phase == "a")
  if phase == "a":
    np.testing.assert_array_equal(answers["boxes"], expected["boxes"])


def test_m_net_with_batches_of_any_size(small, untrained_m_net, photographs):
  program, weights = opened(small)
  expected = medattn_jax.load(untrained_m_net, devices=jax.devices()[:1]).predict(photographs)
  for count in (1, 3):
    answers = program.call(weights, np.stack([photographs[:count]] * 2, axis=1))
    assert answers.keys() == {"probabilities", "score", "grade"}
    np.testing.assert_allclose(
      answers["probabilities"][:, 1], expected.probabilities[:count], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(answers["grade"][:, 0], expected.grade[:count])


def test_one_artifact_for_three_platforms(bundle):
  """Each is lowered from the artifact alone, on a host of CPUs."""
  program, weights = opened(bundle)
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert tuple(about(bundle)["program"]["platforms"]) == program.platforms
  image = jax.ShapeDtypeStruct((2, *program.in_avals[-1].shape[1:]), jnp.uint8)
  main = {}
  for platform in program.platforms:
    traced = jax.jit(program.call).trace(weights, image)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Every branch within depends on what this one answers: the platform's place in the artifact.
    main[platform] = re.search(r'"stablehlo.case"\(%c\) \(\{\s+%c_0 = .*dense<(\d)>', text)[1]
  assert main == {"cpu": "0", "cuda": "1", "tpu": "2"}
  whole = program.mlir_module()
  assert "stablehlo.case" in whole and "_platform_index" in whole
  with pytest.raises(ValueError, match="rocm"):
    jax.jit(program.call).trace(weights, image).lower(lowering_platforms=("rocm",))


def test_the_arrays_are_the_checkpoints_and_in_the_order_that_is_told(small, untrained_m_net):
  program, weights = opened(small)
  model = trained.open_workdir(untrained_m_net)
  names = [path for path, _ in jax.tree_util.tree_leaves_with_path(model.variables)]
  names = sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path in names)
  told = about(small)["program"]["arguments"]
  assert [one["name"] for one in told] == [*names, "image"] and sorted(weights) == names
  assert len(told) == len(program.in_avals) == len(program.module_kept_var_idx)
  for one, aval in zip(told, program.in_avals, strict=True):
    assert (one["dtype"], [str(n) for n in one["shape"]]) == (
      str(aval.dtype), [str(n) for n in aval.shape])
  for name, array in weights.items():
    tree = model.variables
    for part in name.split("/"):
      tree = tree[part]
    np.testing.assert_array_equal(array, tree)
  # The weights are arguments: what the program answers follows them, and it is smaller than they.
  doubled = {name: array * (2 if name.endswith("head/kernel") else 1)
             for name, array in weights.items()}
  image = np.full((1, 2, 128, 128, 3), 90, np.uint8)
  assert np.abs(program.call(weights, image)["score"] - program.call(doubled, image)["score"]).max()
  assert (small / "model.stablehlo").stat().st_size < (small / "model.safetensors").stat().st_size


def test_the_readmes_snippet_runs_as_it_stands(small):
  (code,) = re.findall(r"```python\n(.*?)```", (small / "README.md").read_text(), re.DOTALL)
  assert code.rstrip() == about(small)["run"].rstrip()
  said = python(code, small)
  for name in ("probabilities", "score", "grade"):
    assert re.search(rf"^{name} \[", said, re.MULTILINE)


def test_model_json_and_card_say_what_it_is(bundle, untrained):
  found, card = about(bundle), (bundle / "README.md").read_text()
  assert {path.name for path in bundle.iterdir()} == FILES
  assert (found["step"], found["phase"], found["model"]) == (12, "c", "zoom_in_net")
  assert found["thresholds"] == [0.6, 1.4, 2.4, 3.4]
  assert found["thresholds_from"] == "the checkpoint's validation"
  assert found["input"]["shape"] == ["b", 2, 128, 128, 3] and found["program"]["batch"] == "any"
  assert found["classes"][4] == "4: proliferative" and len(found["classes"]) == 5
  shapes = {one["name"]: (one["dtype"], one["shape"]) for one in found["outputs"]}
  assert shapes == {
    "probabilities": ("float32", ["b", 2, 5]), "score": ("float32", ["b", 2]),
    "grade": ("int32", ["b", 2]), "boxes": ("int32", ["b", 2, 4, 4])}
  for words in ("Not a medical device, for research only", "no evaluation", "0.600, 1.400",
                "8 examples drawn by a program", "Black border".lower()):
    assert words in card
  config = json.loads((bundle / "config.json").read_text())
  assert config == json.loads((untrained / "config.json").read_text())
  for name, facts in found["files"].items():
    assert (bundle / name).stat().st_size == facts["bytes"]
  for path in bundle.iterdir():  # of this machine's files, none is named but the page's own
    assert str(ROOT).encode() not in path.read_bytes()


def test_no_image_of_the_training_data_leaves(bundle, untrained, smoke_config):
  """Every file is read back and accounted for, byte by byte where it is no text."""
  assert {path.name for path in bundle.rglob("*")} == FILES
  # The weights are those of the checkpoint (see above), and there is no room for more.
  stored, weights = (bundle / "model.safetensors").read_bytes(), opened(bundle)[1]
  header = int.from_bytes(stored[:8], "little")
  names = json.loads(stored[8:8 + header])
  assert names.keys() == weights.keys()
  assert len(stored) == 8 + header + sum(array.nbytes for array in weights.values())
  for name, array in weights.items():
    assert array.dtype == np.float32 and name.startswith(("params/", "batch_stats/"))
  # The program is the same whatever was learned: it is made of the code alone.
  model = trained.open_workdir(untrained, devices=jax.devices()[:1])
  others = {name: np.zeros_like(array) for name, array in weights.items()}
  program = bytes(export.program(model, others).serialize())
  assert program == (bundle / "model.stablehlo").read_bytes()
  for name in ("README.md", "model.json", "config.json"):
    text = (bundle / name).read_text(encoding="utf-8")
    assert len(text) < 100_000 and all(c.isprintable() or c == "\n" for c in text)
    assert not re.search(r"[0-9A-Za-z+/]{80}|(\d+[, ]+){40}", text)  # nothing coded, no arrays
  # And no photograph is found: neither its bytes, nor as floats, nor one channel of it.
  data = smoke_config.data
  drawn = [eye.image for patient in range(data.synthetic.train) for eye in
           synthetic.draw_patient(data.synthetic.seed, patient, data.full_size).eyes]
  runs = {np.ascontiguousarray(part).tobytes()
          for image in drawn for kind in (image, image / np.float32(255))
          for part in (kind[64, 60:68], kind[64, 50:74, 1])}
  assert len(runs) == 4 * len(drawn) >= 4 * data.synthetic.train
  whole = b"".join(path.read_bytes() for path in bundle.iterdir())
  assert not [run for run in runs if run in whole]


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


def test_the_map_leaves_and_the_bank_stays(attending, tmp_path, capsys):
  """One image an example, one channel; attention.npy and .png beside the rest."""
  model = attending()
  export.bundle(model, tmp_path / "out")
  there = {path.name for path in (tmp_path / "out").iterdir()}
  assert there == FILES | {"attention.npy", "attention.png"}
  assert "not exported: constants/bank" in capsys.readouterr().err
  program, weights = opened(tmp_path / "out")
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
  told, bank = about(tmp_path / "out"), model.variables["constants"]["bank"]
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
    of_map, untrained_map, trained_on):
  """The map is the checkpoint's, bit by bit; no array is like any image the map was made of."""
  weights = opened(of_map)[1]
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


def test_a_real_map_answers_without_this_package(of_map, untrained_map, trained_on, tmp_path):
  np.save(tmp_path / "images.npy", trained_on[:5, None, :, :, None])
  python(f"""
import jax, jax.export, numpy as np
from safetensors.numpy import load_file
program = jax.export.deserialize(bytearray(open({str(of_map / "model.stablehlo")!r}, "rb").read()))
weights = load_file({str(of_map / "model.safetensors")!r})
np.savez("answers.npz", **program.call(weights, np.load("images.npy")))
""", tmp_path)
  answers = np.load(tmp_path / "answers.npz")
  expected = medattn_jax.load(untrained_map, devices=jax.devices()[:1]).predict(trained_on[:5])
  for name in ("probabilities", "score", "grade"):
    np.testing.assert_allclose(answers[name][:, 0], getattr(expected, name), rtol=0, atol=1e-5)
  told, card = about(of_map), (of_map / "README.md").read_text()
  assert told["input"]["shape"] == ["b", 1, 24, 24, 1] and told["program"]["batch"] == "any"
  assert told["thresholds"] is None and "largest probability" in told["decision"]
  for words in ("Global spatial attention", "class of the largest probability",
                "40 examples drawn by a program"):
    assert words in card


def test_a_model_that_needs_a_size_gets_one_and_it_is_said(attending, tmp_path, capsys):
  model = attending(stubborn=True)
  with model.config.unlocked():
    model.config.evaluation.batch_size = 2
  model.variables["params"]["later"] = np.ones(3, np.float32)  # a branch that this phase has not
  export.bundle(model, tmp_path / "out")
  assert "takes batches of 2 alone" in capsys.readouterr().err
  program, weights = opened(tmp_path / "out")
  told = about(tmp_path / "out")
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


def test_figures_are_quoted_of_these_weights_alone(untrained_m_net, tmp_path, capsys):
  """An evaluation of another checkpoint, or one that is damaged, is not in the card."""
  workdir = tmp_path / "run"
  shutil.copytree(untrained_m_net, workdir)
  model = trained.open_workdir(workdir, devices=jax.devices()[:1])
  found = {
    "step": 12, "checkpoint_sha256": model.fingerprint, "data": "some|set`", "split": "test",
    "images": 40, "patients": 21, "quadratic_weighted_kappa": 0.8125, "kappa_ci": [0.75, 0.875],
    "accuracy": "a lot", "auc_any": None, "auc_referable": 0.9375,
    "attention": {"area": 0.25, "iou": 0.625}}
  (workdir / "evaluation").mkdir()
  path = workdir / "evaluation" / "metrics.json"
  card = lambda: "\n".join(export._figures(export._measured(model)))
  assert "Nothing" in card()
  path.write_text(json.dumps(found))
  assert "| quadratic weighted kappa | 0.812 | 0.750–0.875 |" in card()
  assert "| attended region against the true one, IoU | 0.625 |" in card()
  assert "40 images of 21 patients" in card() and "`someset`" in card()
  assert "accuracy" not in card() and "AUC, any" not in card() and "| AUC, referable" in card()
  for other in (found | {"step": 11}, found | {"checkpoint_sha256": "0"}):
    path.write_text(json.dumps(other))
    assert "Nothing" in card() and "other weights" in capsys.readouterr().err
  for text in ("", "[]", "{", '{"step": 12}', "[" * 100000):
    path.write_text(text)
    assert "Nothing" in card()


def test_only_a_new_or_empty_folder_is_written_to(untrained_m_net, tmp_path, monkeypatch):
  """Whatever is refused is refused before any work, and stays as it was."""
  monkeypatch.setattr(trained, "open_workdir", lambda *_: pytest.fail("work was begun"))
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("mine")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "empty").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "empty")
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  for name in ("full", "file", "link", "dangling", "file/below", str(untrained_m_net), ""):
    with pytest.raises(UserError, match="accepted: a"):
      export.run(str(untrained_m_net), str(tmp_path / name) if name else "")
  monkeypatch.chdir(tmp_path / "empty")
  with pytest.raises(UserError, match="in use"):
    export.run(str(untrained_m_net), ".")
  assert sorted(p.name for p in tmp_path.rglob("*")) == [
    "dangling", "empty", "file", "full", "link", "mine.txt"]


def test_whole_or_not_there(attending, tmp_path, monkeypatch):
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
  assert {p.name for p in (tmp_path / "empty").iterdir()} > FILES


def test_the_card_says_what_the_training_began_with(smoke_config):
  page = smoke_config.copy_and_resolve_references()
  assert "began" not in export._trained_on(page)
  page.model.init_from, page.model.crop_init = "weights/irv2|<b>", "weights/inception_v3/"
  assert export._trained_on(page).endswith(
    "It began with published weights, imported as `irv2b`, `inception_v3`.")
