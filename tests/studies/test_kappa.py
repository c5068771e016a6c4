"""medattn study kappa: what a reader recomputes with scikit-learn; thresholds never from test."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax import cli, metrics
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, kappa


def test_every_rule_is_scikit_learns(make_predictions, tmp_path, capsys):
  path, tune = make_predictions(150), make_predictions(80, seed=1, chance=3)
  found = kappa.run(predictions=str(path), tune=str(tune), out=str(tmp_path / "out"))
  assert json.loads((tmp_path / "out" / "kappa.json").read_text()) == found
  assert {file.name for file in (tmp_path / "out").iterdir()} == {
    "kappa.json", "confusion_matrix.png"}
  rows, others = answers.of_predictions(path), answers.of_predictions(tune)
  score = rows.probabilities @ np.arange(5)
  tuned = metrics.tune_thresholds(others.probabilities @ np.arange(5), others.level)
  assert found["thresholds"] == tuned.tolist()
  grades = {"argmax": rows.probabilities.argmax(1), "rounding": np.floor(score + 0.5).astype(int),
            "thresholds": np.digitize(score, tuned), "decision": rows.grade}
  assert list(found["rules"]) == list(grades)
  for name, grade in grades.items():
    rule = found["rules"][name]
    assert rule["kappa"] == pytest.approx(
      sk.cohen_kappa_score(rows.level, grade, weights="quadratic"), abs=1e-9)
    assert rule["accuracy"] == pytest.approx(sk.accuracy_score(rows.level, grade), abs=1e-12)
    assert rule["kappa_ci"][0] < rule["kappa"] < rule["kappa_ci"][1]
    assert rule["accuracy_ci"][0] < rule["accuracy"] < rule["accuracy_ci"][1]
  assert found["confusion_matrix"] == sk.confusion_matrix(rows.level, grades["thresholds"]).tolist()
  printed = capsys.readouterr().out
  assert f"{found['rules']['argmax']['kappa']:.3f}" in printed and "150 patients" in printed


def test_without_a_validation_split_no_thresholds(make_predictions, tmp_path, capsys):
  found = kappa.run(predictions=str(make_predictions(30)), out=str(tmp_path))
  assert "thresholds" not in found["rules"] and found["thresholds"] is None
  assert "nothing is tuned" in capsys.readouterr().err


def test_one_level_alone_is_null(make_predictions, tmp_path):
  path = make_predictions(4)
  rows = path.read_text().splitlines()
  level = rows[1].split(",")[3]
  alone = [row for row in rows[1:] if row.split(",")[3:5] == [level, level]]
  (tmp_path / "alone.csv").write_text("\n".join([rows[0], *alone]))
  found = kappa.run(predictions=str(tmp_path / "alone.csv"), out=str(tmp_path / "out"))
  rule = found["rules"]["decision"]
  assert (rule["kappa"], rule["kappa_ci"], rule["accuracy"]) == (None, None, 1.0)
  assert 0 < rule["accuracy_ci"][0] < rule["accuracy_ci"][1] == 1


def test_mistakes_write_nothing(make_predictions, tmp_path):
  path = str(make_predictions(30))
  out = {"out": str(tmp_path / "out")}
  for given, words in (
    (out, "accepted is one of them"), ({}, "--out"),
    (out | {"workdir": "w", "predictions": path}, "accepted is one of them"),
    (out | {"predictions": path, "tune": path}, "share 60 images"),
    (out | {"predictions": path, "data": "eyes"}, "--data=eyes"), ({"predictions": path}, "--out"),
    (out | {"workdir": "w", "tune": path}, "--tune"),
    (out | {"workdir": str(tmp_path / "w")}, "no such folder")):
    with pytest.raises(UserError, match=words):
      kappa.run(**given)
  assert list(tmp_path.iterdir()) == []


def test_the_command_takes_the_flags_of_the_table(make_predictions, tmp_path, monkeypatch):
  given = {}
  monkeypatch.setattr(kappa, "run", lambda **flags: given.update(flags))
  monkeypatch.setattr(cli, "leave", lambda status, why="": None)
  monkeypatch.setattr(cli, "lasting_streams", lambda: None)
  monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
  cli.main(["study", "kappa", "--predictions=f.csv", "--out", "o"])
  assert given == {"workdir": None, "predictions": "f.csv", "data": None, "split": None,
                   "step": "best", "out": "o", "tune": None}
