"""Photographs come into a model's frame one way: prepared, graded and predicted."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from medattn_jax import evaluate, experiment, predictor
from medattn_jax.data import pipeline, prepare, preprocess
from medattn_jax.errors import UserError


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
  """A folder of six gray pictures 80x60, each bright within a black border of its own."""
  folder = tmp_path_factory.mktemp("camera")
  rng = np.random.default_rng(0)
  names = [f"{number}.png" for number in range(6)]
  for number, name in enumerate(names):
    picture = np.zeros((60, 80), np.uint8)
    coarse = Image.fromarray(rng.integers(90, 250, (6, 6), np.uint8))
    picture[2 + number : 50, 4 : 70 - number] = coarse.resize((66 - number, 48 - number))
    Image.fromarray(picture).save(folder / name)
  with open(folder / "labels.csv", "w", newline="") as file:
    csv.writer(file).writerows(
      [("image", "level", "split"), *((name, i % 2, "test") for i, name in enumerate(names))])
  return folder


@pytest.fixture(scope="module")
def sets(camera, map_config, tmp_path_factory):
  """{frame: the data set made of the folder}, twice the page's size: it is halved when read."""
  folders = {frame: tmp_path_factory.mktemp(frame) for frame in ("cropped", "whole")}
  for frame, folder in folders.items():
    prepare.prepare("csv", camera, folder, full_size=2 * map_config.data.full_size, frame=frame)
  return folders


@pytest.mark.parametrize("frame", ["cropped", "whole"])
def test_predict_sees_what_the_set_holds(frame, camera, sets, map_config, untrained_map):
  config = map_config.copy_and_resolve_references()
  config.data.frame = frame
  dataset = evaluate.open_data(config, str(sets[frame]))
  batch = next(evaluate.batches_of(dataset, "test", config))
  model = predictor.load(untrained_map)
  model._frame = experiment.frame(config)
  for name, stored in zip(batch["image_id"][:, 0], batch["image"][:, 0], strict=True):
    if name:
      photograph = preprocess.load_photograph(camera / name)
      own = model._prepared(photograph)
      assert own.shape == stored.shape and own.dtype == np.uint8
      np.testing.assert_array_equal(model._prepared(photograph[..., 0]), own)  # gray as it is
      assert np.abs(own.astype(int) - stored).mean() < 5  # one JPEG and one resize between
      model._frame = {"cropped": "whole", "whole": "cropped"}[frame]
      assert np.abs(model._prepared(photograph).astype(int) - stored).mean() > 20
      model._frame = frame


def test_what_is_stretched_is_said(camera, tmp_path, capsys):
  prepare.prepare("csv", camera, tmp_path, full_size=32, frame="whole")
  assert "6 photographs are no squares and were stretched" in capsys.readouterr().err
  prepare.prepare("csv", camera, tmp_path, full_size=32, frame="whole")
  assert "nothing to do" in capsys.readouterr().err
  prepare.prepare("csv", camera, tmp_path, full_size=32)
  assert "were stretched" not in capsys.readouterr().err
  assert pipeline.open_dataset("csv", tmp_path, full_size=32).frame == "cropped"


def test_another_frame_is_refused(camera, sets, map_config, smoke_config, tmp_path, capsys):
  with pytest.raises(UserError, match=r"data\.frame is 'whole'; accepted: data\.frame = 'cropped'"):
    evaluate.open_data(map_config, str(sets["cropped"]))
  with pytest.raises(UserError, match="--frame=middle; accepted for csv: cropped, whole"):
    prepare.prepare("csv", camera, tmp_path, frame="middle")
  (tmp_path / "set.npz").write_bytes(b"")
  with pytest.raises(UserError, match="--frame=cropped; accepted for npz: whole"):
    prepare.prepare("npz", tmp_path / "set.npz", tmp_path, frame="cropped")
  evaluate.open_data(smoke_config, str(sets["whole"]))
  assert "crops those it is given to predict" in capsys.readouterr().err
