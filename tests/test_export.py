"""export: a bundle answers as the model does without this package, and holds no training image."""

import json
import pathlib
import re
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import medattn_jax
from medattn_jax import experiment, export, trained
from medattn_jax.data import preprocess, synthetic
from medattn_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


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


def test_a_process_without_this_package_answers_as_the_model(
    bundle, untrained, photographs, tmp_path, bundles):
  """Three photographs that are their own fellows, and a pair, as the predictor grades files."""
  for name, image in zip(("0", "1", "7_left", "7_right"), photographs, strict=True):
    Image.fromarray(image).save(tmp_path / f"{name}.png")
  prepared = np.stack([preprocess.prepare_photograph(image, 128) for image in photographs])
  answers = bundles.answers(bundle, prepared[[[0, 0], [1, 1], [2, 3]]], tmp_path)
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


def test_m_net_with_batches_of_any_size(small, untrained_m_net, photographs, bundles):
  program, weights = bundles.opened(small)
  expected = medattn_jax.load(untrained_m_net, devices=jax.devices()[:1]).predict(photographs)
  for count in (1, 3):
    answers = program.call(weights, np.stack([photographs[:count]] * 2, axis=1))
    assert answers.keys() == {"probabilities", "score", "grade"}
    np.testing.assert_allclose(
      answers["probabilities"][:, 1], expected.probabilities[:count], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(answers["grade"][:, 0], expected.grade[:count])


def test_one_artifact_for_three_platforms(bundle, bundles):
  """Each is lowered from the artifact alone, on a host of CPUs."""
  program, weights = bundles.opened(bundle)
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert tuple(bundles.about(bundle)["program"]["platforms"]) == program.platforms
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


def test_the_arrays_are_the_checkpoints_and_in_the_order_that_is_told(
    small, untrained_m_net, bundles):
  program, weights = bundles.opened(small)
  model = trained.open_workdir(untrained_m_net)
  names = [path for path, _ in jax.tree_util.tree_leaves_with_path(model.variables)]
  names = sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path in names)
  told = bundles.about(small)["program"]["arguments"]
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


def test_the_readmes_snippet_runs_as_it_stands(small, bundles):
  (code,) = re.findall(r"```python\n(.*?)```", (small / "README.md").read_text(), re.DOTALL)
  assert code.rstrip() == bundles.about(small)["run"].rstrip()
  said = bundles.python(code, small)
  for name in ("probabilities", "score", "grade"):
    assert re.search(rf"^{name} \[", said, re.MULTILINE)


def test_model_json_and_card_say_what_it_is(bundle, untrained, bundles):
  found, card = bundles.about(bundle), (bundle / "README.md").read_text()
  assert {path.name for path in bundle.iterdir()} == bundles.FILES
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


def test_no_image_of_the_training_data_leaves(bundle, untrained, smoke_config, bundles):
  """Every file is read back and accounted for, byte by byte where it is no text."""
  assert {path.name for path in bundle.rglob("*")} == bundles.FILES
  # The weights are those of the checkpoint (see above), and there is no room for more.
  stored, weights = (bundle / "model.safetensors").read_bytes(), bundles.opened(bundle)[1]
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
  inside = str(untrained_m_net / "checkpoints" / "9")  # where it would be taken for a checkpoint
  for name in ("full", "file", "link", "dangling", "file/below", str(untrained_m_net), inside, ""):
    with pytest.raises(UserError, match="accepted: a"):
      export.run(str(untrained_m_net), str(tmp_path / name) if name else "")
  monkeypatch.chdir(tmp_path / "empty")
  with pytest.raises(UserError, match="in use"):
    export.run(str(untrained_m_net), ".")
  assert sorted(p.name for p in tmp_path.rglob("*")) == [
    "dangling", "empty", "file", "full", "link", "mine.txt"]


def test_the_card_says_what_the_training_began_with(smoke_config):
  page = smoke_config.copy_and_resolve_references()
  assert "began" not in export._trained_on(page)
  page.model.init_from, page.model.crop_init = "weights/irv2|<b>", "weights/inception_v3/"
  assert export._trained_on(page).endswith(
    "It began with published weights, imported as `irv2b`, `inception_v3`.")
