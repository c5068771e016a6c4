"""medattn study tta: the views are a plain loop of rot90 and flips, and their mean is the mean."""

import csv
import json

import jax
import numpy as np
import pytest

from medattn_jax import augment, evaluate, metrics, predictor, trained
from medattn_jax.data import synthetic
from medattn_jax.errors import UserError
from medattn_jax.studies import tta

# Of tta.NAMES.
PLAIN = {
  "as it is": lambda x: x, "mirrored": lambda x: x[:, ::-1], "upside down": lambda x: x[::-1],
  "half turn": lambda x: np.rot90(x, 2), "transposed": lambda x: x.swapaxes(0, 1),
  "quarter turn left": np.rot90, "quarter turn right": lambda x: np.rot90(x, -1),
  "transposed, half turn": lambda x: np.rot90(x, 2).swapaxes(0, 1)}


def test_views_are_what_they_are_called():
  image = np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8)
  turned = np.asarray(augment.dihedral(np.repeat(image[None], 8, 0), augment.VIEWS))
  assert tuple(PLAIN) == tta.NAMES
  for view, move in zip(turned, PLAIN.values(), strict=True):
    np.testing.assert_array_equal(view, move(image))


@pytest.fixture(scope="module")
def step(opened):
  """The one compiled step of this file, of two patients."""
  return tta.step_of(opened, 8)


def test_the_views_answers_are_a_plain_loop_through_the_predictor(opened, step):
  eyes = [eye.image for number in range(3)
          for eye in synthetic.draw_patient(3, number, 128).eyes][:2]
  image = np.stack([np.stack([eye, eye]) for eye in eyes])  # each its own fellow, as there
  out = step(opened.variables, image)
  found = metrics.probabilities_of(out["views"])
  model = predictor.Model(opened)
  for number, move in enumerate(PLAIN.values()):
    loop = model.predict(np.stack([move(eye) for eye in eyes])).probabilities
    np.testing.assert_allclose(found[:, 0, number], loop, atol=2e-5)
    np.testing.assert_allclose(found[:, 1, number], loop, atol=2e-5)
  np.testing.assert_array_equal(out["logits"], out["views"][:, :, 0])
  assert np.ptp(found[:, 0], axis=1).max() > 1e-3  # turning it does change the answer


def test_of_a_symmetric_photograph_all_views_are_one(opened, step):
  drawn = np.random.default_rng(1).integers(0, 32, (2, 2, 128, 128, 3), np.uint8)
  image = sum(np.stack([np.stack([move(eye) for eye in pair]) for pair in drawn])
              for move in PLAIN.values()).astype(np.uint8)
  views = metrics.probabilities_of(step(opened.variables, image)["views"])
  np.testing.assert_allclose(views, np.repeat(views[:, :, :1], 8, axis=2), atol=1e-7)
  np.testing.assert_allclose(views.mean(2), views[:, :, 0], atol=1e-7)


def test_a_global_attention_is_turned_after_its_map(untrained_map):
  """With a map of ones: a plain loop. With its own: the weighed photographs are turned."""
  opened = trained.open_workdir(untrained_map, devices=jax.devices()[:1])
  side = opened.config.data.full_size
  image = np.random.default_rng(0).integers(0, 255, (3, 1, side, side, 1), np.uint8)
  answer, single = tta.step_of(opened, 8), opened.experiment.eval_step
  ones = {**opened.variables, "constants": {"map": np.ones((side, side), np.float32)}}
  views = np.asarray(answer(ones, image)["views"])
  for number, move in enumerate(PLAIN.values()):
    loop = single(ones, np.stack([move(one[0])[None] for one in image]))["logits"]
    np.testing.assert_allclose(views[:, :, number], loop, atol=1e-4)
  weights = np.zeros((side, side), np.float32)
  weights[: side // 2, : side // 3] = 1  # exactly what a photograph is multiplied by
  masked = {**opened.variables, "constants": {"map": weights}}
  before = (image * weights[..., None].astype(np.uint8)).astype(np.uint8)
  moved = np.asarray(answer(masked, image)["views"])
  assert np.abs(moved - views).max() > 1e-3
  for number in (0, 5):  # what the map left out plays no part, whichever way it is turned
    np.testing.assert_allclose(
      moved[:, :, number], np.asarray(answer(masked, before)["views"])[:, :, number], atol=1e-5)


def test_a_split_is_graded_and_the_gain_said(opened, untrained, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trained, "open_workdir", lambda *_: opened)
  found = tta.run(str(untrained), out=str(tmp_path), views=2)
  assert json.loads((tmp_path / "tta.json").read_text()) == found
  now = opened.experiment
  dataset = evaluate.open_data(opened.config, None)
  table = evaluate.graded(now, opened.variables, dataset, "test", opened.config)
  mirrored = lambda: (batch | {"image": batch["image"][:, :, :, ::-1]}
                      for batch in evaluate.batches_of(dataset, "test", opened.config))
  other = evaluate.collect(now, opened.variables, mirrored())
  mean = (metrics.probabilities_of(table["logits"]) + metrics.probabilities_of(
    other["logits"])) / 2
  rows = list(csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines()))
  assert [row["image"] for row in rows] == table["image"].tolist()
  np.testing.assert_allclose(
    [[float(row[f"p{k}"]) for k in range(5)] for row in rows], mean, atol=2e-5)
  alone = metrics.quadratic_weighted_kappa(
    table["level"], metrics.probabilities_of(table["logits"]).argmax(1))
  assert found["answers"]["as it is"]["kappa_argmax"] == pytest.approx(alone, abs=1e-9)
  whole = found["answers"]["mean of 2 views"]
  gain = found["gain"]["over_best"]
  assert gain["kappa"] == pytest.approx(
    whole["kappa"] - found["answers"]["as it is"]["kappa"], abs=1e-12)
  assert found["thresholds_from"] == "validation" and found["views"] == 2
  assert "2 views name the same class" in capsys.readouterr().out


def test_how_many_views_a_run_has_seen(smoke_config, map_config):
  turned = smoke_config.copy_and_resolve_references()
  assert tta._trained_with(turned, "w") == 8
  turned.augment.update({"dihedral": False, "mirror": True})
  assert tta._trained_with(turned, "w") == 2
  with pytest.raises(UserError, match=r"no turned photograph; .* --views=2"):
    tta._trained_with(map_config, "w")


def test_mistakes_write_nothing(untrained, untrained_map, tmp_path):
  for workdir, views, words in ((untrained, 3, "--views=3"), (untrained_map, None, "no turned")):
    with pytest.raises(UserError, match=words):
      tta.run(str(workdir), out=str(tmp_path / "out"), views=views)
  assert not list(tmp_path.iterdir())
