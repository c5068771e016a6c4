"""medattn study compare: the second less the first, on the same images whatever their order."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax.errors import UserError
from medattn_jax.studies import answers, compare


def test_differences_are_of_the_second_less_the_first(make_predictions, tmp_path, capsys):
  worse, better = make_predictions(150, skill=0.6), make_predictions(150, chance=2, order=-1)
  found = compare.run(predictions=[str(worse), str(better)], out=str(tmp_path / "out"))
  assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
  assert {file.name for file in (tmp_path / "out").iterdir()} == {
    "compare.json", "differences.png"}
  runs = [answers.of_predictions(path) for path in (worse, better)]
  for key, least in (("auc_referable", 2), ("auc_any", 1)):
    expected = [sk.roc_auc_score(run.level >= least, run.probabilities[:, least:].sum(1))
                for run in runs]
    np.testing.assert_allclose(found[key]["areas"], expected, atol=1e-9)
    assert found[key]["clustered"]["difference"] == pytest.approx(expected[1] - expected[0])
  expected = [sk.cohen_kappa_score(run.level, run.grade, weights="quadratic") for run in runs]
  np.testing.assert_allclose(found["kappa"]["kappas"], expected, atol=1e-9)
  assert found["kappa"]["difference"]["interval"][0] > 0
  printed = capsys.readouterr().out
  assert f"{expected[1] - expected[0]:+.3f}" in printed and "eyes of a patient as one" in printed


def test_a_run_with_itself_differs_by_nothing(make_predictions, tmp_path):
  path = str(make_predictions(30))
  found = compare.run(predictions=[path, path], out=str(tmp_path))
  assert found["auc_any"]["clustered"] == {
    "difference": 0.0, "interval": None, "z": None, "p": None}
  assert found["kappa"]["difference"]["difference"] == 0


def test_two_classes_have_no_referable(make_predictions, tmp_path):
  paths = [str(make_predictions(30, classes=2, chance=chance)) for chance in (1, 2)]
  found = compare.run(predictions=paths, out=str(tmp_path))
  assert found["auc_referable"]["areas"] is None and found["auc_any"]["areas"] is not None


def test_mistakes_write_nothing(make_predictions, tmp_path):
  path, other = str(make_predictions(30)), str(make_predictions(30, seed=1))
  for given, words in (([path], "accepted: 2"), ([path] * 3, "accepted: 2"),
                       ([path, other], "lacks 60 images")):
    with pytest.raises(UserError, match=words):
      compare.run(predictions=given, out=str(tmp_path / "out"))
  assert list(tmp_path.iterdir()) == []
