"""medattn study calibration: a temperature from validation alone."""

import json

import numpy as np
import pytest

from medattn_jax import metrics
from medattn_jax.analysis import calibration as heat
from medattn_jax.studies import answers, calibration


def test_the_temperature_is_the_validation_splits(make_predictions, tmp_path, capsys):
  path, tune = make_predictions(150), make_predictions(80, seed=1, chance=3)
  found = calibration.run(predictions=str(path), tune=str(tune), out=str(tmp_path / "out"))
  assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == found
  assert {file.name for file in (tmp_path / "out").iterdir()} == {
    "calibration.json", "reliability.png"}
  rows, others = answers.of_predictions(path), answers.of_predictions(tune)
  assert found["temperature"] == heat.temperature(others.probabilities, others.level)
  assert found["temperature"] != heat.temperature(rows.probabilities, rows.level)
  cooled = heat.cooled(rows.probabilities, found["temperature"])
  for side, probabilities in (("before", rows.probabilities), ("after", cooled)):
    assert found[side]["expected_calibration_error"] == pytest.approx(
      metrics.expected_calibration_error(probabilities, rows.level), abs=1e-12)
    assert sum(found[side]["curve"]["images"]) == found["images"] == 300
  assert found["before"]["accuracy"] == found["after"]["accuracy"]
  printed = capsys.readouterr().out
  assert f"at temperature {found['temperature']:.3f}" in printed and "160 photographs" in printed


def test_without_validation_there_is_no_after(make_predictions, tmp_path, capsys):
  found = calibration.run(predictions=str(make_predictions(30)), out=str(tmp_path))
  assert found["temperature"] is None and found["after"] is None
  assert "nothing is tuned" in capsys.readouterr().err


def test_a_temperature_beyond_the_range_is_said(make_predictions, tmp_path, capsys):
  """A validation split on which the model is always right, and shy."""
  path = make_predictions(30, seed=2)
  rows = [row.split(",") for row in path.read_text().splitlines()]
  for row in rows[1:]:
    row[6:] = np.where(np.arange(5) == int(row[3]), "0.6", "0.1").tolist()
  (tmp_path / "right.csv").write_text("\n".join(map(",".join, rows)))
  found = calibration.run(predictions=str(make_predictions(30)), out=str(tmp_path / "out"),
                          tune=str(tmp_path / "right.csv"))
  assert found["temperature"] == 0.05
  assert "lies beyond 0.05" in capsys.readouterr().err
