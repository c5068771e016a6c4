"""import-weights: from a file to answers that are the published network's, with its input."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import medattn_jax
from medattn_jax import config, experiment, import_weights, models
from medattn_jax.errors import UserError
from medattn_jax.models import pretrained, weights

ROOT = pathlib.Path(__file__).parents[1]
PAGE = str(ROOT / "tests" / "pages" / "tiny_map.py")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESNET = [("model.backbone", "resnet18"), ("model.stem", "full"), ("model.mean", str(MEAN)),
          ("model.std", str(STD)), ("attention.source", "none")]


@pytest.fixture(scope="module")
def state():
  """A ResNet-18 of two classes as PyTorch has it, drawn so that its answers vary."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1] in ("scale", "var"):
      return rng.uniform(0.8, 1.2, leaf.shape).astype(np.float32)
    size = np.sqrt(2 / np.prod(leaf.shape[:-1])) if path[-1] == "kernel" else 0.1
    return np.float32(size) * rng.standard_normal(leaf.shape, np.float32)

  flat = {path: draw(path, leaf) for path, leaf in pretrained.layout("resnet18", 2).items()}
  return pretrained.to_torch("resnet18", traverse_util.unflatten_dict(flat))


@pytest.fixture(scope="module")
def source(state, tmp_path_factory):
  """The state dict as a file, with DataParallel's prefix and an auxiliary head."""
  path = tmp_path_factory.mktemp("source") / "resnet18.safetensors"
  more = {"aux1.fc2.bias": np.zeros(2, np.float32)}
  path.write_bytes(safetensors.numpy.save(
    {f"module.{name}": value for name, value in {**state, **more}.items()}))
  return path


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
  """What the command makes of it. Not to be changed."""
  out = tmp_path_factory.mktemp("imported") / "new" / "resnet18"
  import_weights.run("resnet18", str(source), str(out))
  return out


def test_the_folder_holds_the_network_and_where_it_came_from(folder, source, state):
  found = weights.read(str(folder), "model.init_from")
  expected = traverse_util.flatten_dict(pretrained.from_torch("resnet18", state))
  assert found.variables.keys() == expected.keys()
  assert all(np.array_equal(found.variables[path], expected[path]) for path in expected)
  assert (found.model, found.num_classes, found.mean, found.std) == ("resnet18", 2, MEAN, STD)
  about = json.loads((folder / "manifest.json").read_text())
  assert about["source"]["file"] == source.name and len(about["source"]["sha256"]) == 64


def test_what_to_put_into_a_page_is_printed_and_what_is_left_is_said(source, tmp_path, capsys):
  out = str(tmp_path / "out")
  import_weights.run("resnet18", str(source), out, "0.1,0.2,0.3", "(0.4, 0.5, 0.6)")
  said = capsys.readouterr()
  assert "left behind, of training alone: aux1" in said.err
  for flag in (f"init_from={out}", "mean='(0.1, 0.2, 0.3)'", "std='(0.4, 0.5, 0.6)'"):
    assert f"--config.model.{flag}\n" in said.out
  found = weights.read(out, "model.init_from")
  assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_step_answers_as_the_published_network_with_its_input(folder, state):
  """Gray images, too, are normalised as the weights ask for each of their three channels."""
  page = config.load_page(PAGE, [
    *RESNET, ("model.init_from", str(folder)), ("phases.joint.ema", "0.9")])
  now = experiment.build(page, "joint", jax.devices()[:1])
  begun = now.initial()
  assert jax.tree.all(jax.tree.map(np.array_equal, begun.params, begun.ema))
  images = np.random.default_rng(0).integers(0, 256, (8, 1, 24, 24, 1), np.uint8)
  answers = now.eval_step(now.variables(begun), now.put_eval({"image": images}))["logits"]
  net = models.backbone("resnet18", 2)
  seen = (np.repeat(images[:, 0], 3, axis=-1) / 255 - np.array(MEAN)) / np.array(STD)
  apply = jax.jit(lambda variables, x: net.apply(variables, x, train=False)[0])
  expected = apply(pretrained.from_torch("resnet18", state), seen.astype(np.float32))
  assert np.ptp(expected, axis=0).min() > 0.1
  np.testing.assert_allclose(answers[:, 0], expected, atol=1e-4)


def refused(words, model, source, out, *convention):
  with pytest.raises(UserError, match=words) as caught:
    import_weights.run(model, str(source), str(out), *convention)
  assert "\n" not in str(caught.value)


def test_what_cannot_be_imported_leaves_nothing(state, source, tmp_path):
  out = tmp_path / "out"
  refused("--model: 'resnet19' .*did you mean resnet18.*accepted: inception", "resnet19", source,
          out)
  refused(r"--model: 'cnn' is none of the backbones with published weights", "cnn", source, out)
  refused("vgg16.*missing: classifier.0.bias.* and 22 more; not known: bn1.bias", "vgg16", source,
          out)
  refused("no such file", "resnet18", tmp_path / "no.safetensors", out)
  path = tmp_path / "odd.safetensors"

  def store(**changed):
    path.write_bytes(safetensors.numpy.save({**state, **changed}))

  nan, below = state["conv1.weight"].copy(), state["bn1.running_var"].copy()
  nan[3, 2, 1, 0], below[7] = np.nan, -0.1
  store(**{"conv1.weight": nan, "bn1.running_var": below})
  refused("odd.safetensors: not finite, or variances below zero: bn1/var, conv1/kernel", "resnet18",
          path, out)
  store(**{"layer1.0.conv1.weight": np.zeros((64, 64, 5, 5), np.float32)})
  refused(r"another shape: layer1.0.conv1.weight \(64, 64, 5, 5\)", "resnet18", path, out)
  refused("--mean and --std: one is given without", "resnet18", source, out, "0.5,0.5,0.5")
  refused("--mean=0.5: accepted: three numbers", "resnet18", source, out, "0.5", "1,1,1")
  refused("--std=1,0,1: .*above zero", "resnet18", source, out, "0,0,0", "1,0,1")
  assert sorted(found.name for found in tmp_path.iterdir()) == [path.name]


def test_where_nothing_can_be_written(source, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("mine")
  (tmp_path / "link").symlink_to(tmp_path / "mine")
  refused("mine: is not empty", "resnet18", source, tmp_path / "mine")
  refused("link: is a link", "resnet18", source, tmp_path / "link")
  refused("notes.txt is a file", "resnet18", source, tmp_path / "mine" / "notes.txt" / "out")
  assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine"]


def medattn(*arguments):
  return subprocess.run([sys.executable, "-m", "medattn_jax", *map(str, arguments)], cwd=ROOT,
                        capture_output=True, text=True, check=False)


def train(workdir, data, *flags):
  pairs = [*RESNET, ("data.dir", data), ("phases.joint.schedule", "constant"),
           ("data.synthetic.train", 16), ("norm.group_size", 16)]
  return medattn("train", f"--config={PAGE}", f"--workdir={workdir}", *flags,
                 *(f"--config.{key}={value}" for key, value in pairs))


@pytest.mark.slow
def test_a_run_needs_the_weights_when_it_begins_and_never_again(folder, tmp_path):
  moved = tmp_path / "weights"
  shutil.copytree(folder, moved)
  work, data, begins = tmp_path / "run", tmp_path / "data", f"--config.model.init_from={moved}"
  wrong = train(work, data, begins + "x", "--config.phases.joint.steps=2")
  assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
  assert f"init_from = '{moved}x': no such folder" in wrong.stderr
  assert not data.exists() and not (work / "config.json").exists()

  frozen = "--config.phases.frozen.steps=0"
  done = train(work, data, begins, "--config.phases.joint.steps=2", frozen)
  assert done.returncode == 0, done.stderr
  assert f"model.init_from = {moved}: 102 arrays of resnet18" in done.stderr
  shutil.rmtree(moved)
  again = train(work, data, begins, "--config.phases.joint.steps=3", frozen)
  assert again.returncode == 0 and "resuming at step 2" in again.stderr, again.stderr
  assert "arrays of resnet18" not in again.stderr
  other = train(work, data, "--config.phases.joint.steps=3", frozen)
  assert other.returncode == 2 and "model.init_from" in other.stderr
  model = medattn_jax.load(work, "last", jax.devices()[:1])
  state = medattn_jax.to_torch("resnet18", {
    kind: tree["backbone"] for kind, tree in model.variables.items()})
  assert {"conv1.weight", "fc.bias", "bn1.num_batches_tracked"} < set(state)
