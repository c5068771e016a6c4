"""medattn study screening: the Messidor protocol, on files."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax.analysis import screening as machines
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, screening


@pytest.fixture(autouse=True)
def one_setting(monkeypatch):
  """Nothing to search: the search has its own tests."""
  monkeypatch.setattr(machines, "COSTS", (1.0,))
  monkeypatch.setattr(machines, "WIDTHS", (0.1,))


def test_referable_by_folds_and_abnormal_by_another_set(make_predictions, tmp_path, capsys):
  path, other = make_predictions(60, skill=0.7), make_predictions(50, seed=1, chance=4, skill=0.7)
  found = screening.run(
    predictions=str(path), train_predictions=str(other), out=str(tmp_path / "out"))
  assert json.loads((tmp_path / "out" / "screening.json").read_text()) == found
  assert {file.name for file in (tmp_path / "out").iterdir()} == {"screening.json", "roc.png"}
  rows, trained_on = answers.of_predictions(path), answers.of_predictions(other)
  scored = machines.cross_validated(rows.probabilities, rows.level >= 2, rows.patient)
  assert found["referable"]["svm"]["auc"] == pytest.approx(
    sk.roc_auc_score(rows.level >= 2, scored.score), abs=1e-12)
  assert found["referable"]["protocol"] == "cross-validation over patients, 10 folds"
  assert len(found["referable"]["settings"]) == 10
  moved = machines.transferred(
    trained_on.probabilities, trained_on.level >= 1, trained_on.patient, rows.probabilities)
  assert found["any"]["svm"]["auc"] == pytest.approx(
    sk.roc_auc_score(rows.level >= 1, moved.score), abs=1e-12)
  assert found["any"]["svm"]["accuracy"] == pytest.approx(
    np.mean((moved.score > 0) == (rows.level >= 1)), abs=1e-12)
  assert found["trained_on"] == trained_on.source and len(found["any"]["settings"]) == 1
  assert found["any"]["direct"]["auc"] == pytest.approx(
    sk.roc_auc_score(rows.level >= 1, 1 - rows.probabilities[:, 0]), abs=1e-9)
  printed = capsys.readouterr().out
  assert f"{found['any']['svm']['auc']:.3f}" in printed
  assert "sensitivity at specificity 90" in printed


def test_without_another_set_both_are_cross_validated(make_predictions, tmp_path, capsys):
  found = screening.run(predictions=str(make_predictions(30)), out=str(tmp_path))
  assert found["trained_on"] is None
  assert found["any"]["protocol"].startswith("cross-validation")
  said = capsys.readouterr().err
  assert "abnormal is told by cross-validation as well" in said


def test_one_question_may_be_beyond_the_set(make_predictions, tmp_path, capsys):
  """No level above 1: null, a warning, and the other question as it is."""
  path = make_predictions(30, classes=2)
  found = screening.run(predictions=str(path), out=str(tmp_path))
  assert found["referable"]["svm"]["auc"] is None and found["any"]["svm"]["auc"] > 0.5
  assert "referable: too few patients of one kind" in capsys.readouterr().err
  rows = path.read_text().splitlines()
  (tmp_path / "well.csv").write_text(
    "\n".join([rows[0], *(row for row in rows[1:] if row.split(",")[3] == "0")]))
  with pytest.raises(UserError, match=r"well\.csv: has too few patients of one kind"):
    screening.run(predictions=str(tmp_path / "well.csv"), out=str(tmp_path / "none"))
  assert not (tmp_path / "none").exists()


def test_mistakes_write_nothing(make_predictions, tmp_path):
  path, out = str(make_predictions(30)), {"out": str(tmp_path / "out")}
  for given, words in (
    (out, "accepted is one of them"), ({"predictions": path}, "--out"),
    (out | {"predictions": path, "train_predictions": path}, "share 60 images"),
    (out | {"predictions": path, "train_data": "eyes"}, "--train-data: needs a model"),
    (out | {"predictions": path, "train_split": "train", "train_predictions": path}, "one way"),
    (out | {"predictions": path, "split": "test"}, "--split=test"),
    (out | {"predictions": path, "train_predictions": str(make_predictions(30, 5, classes=3))},
     "has 3 classes where"),
    (out | {"predictions": path, "train_workdir": str(tmp_path / "w")}, "no such folder")):
    with pytest.raises(UserError, match=words):
      screening.run(**given)
  assert list(tmp_path.iterdir()) == []
