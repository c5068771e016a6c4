"""medattn study ensemble: the mean of runs, thresholds from validation, rows joined by name."""

import json

import numpy as np
import pytest

from medattn_jax import metrics
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, ensemble


def files(make, count, decided=False, **options):
  """Predictions of `count` models on one test and one validation set."""
  made = [[make(n, seed=seed, chance=10 * seed + at, name=f"{seed}.csv", **options)
           for at in range(count)] for n, seed in ((90, 1), (60, 2))]
  for path in [*made[0], *made[1]] if decided else ():
    rows = [row.split(",") for row in path.read_text().splitlines()]
    rows[1][4] = str((int(rows[1][4]) + 1) % 5)  # a decision that is not the likeliest class
    path.write_text("\n".join(map(",".join, rows)))
  return [list(map(str, paths)) for paths in made]


def test_the_mean_and_its_thresholds(make_predictions, tmp_path):
  test, validation = files(make_predictions, 3, decided=True)
  found = ensemble.run(predictions=test, tune=validation, out=str(tmp_path))
  assert json.loads((tmp_path / "ensemble.json").read_text()) == found
  runs, others = ([answers.of_predictions(path) for path in paths] for paths in (test, validation))
  mean, tuned_on = (sum(run.probabilities for run in of) / 3 for of in (runs, others))
  tuned = metrics.tune_thresholds(metrics.expected_grade(tuned_on), others[0].level)
  assert found["thresholds"][ensemble.WHOLE] == tuned.tolist() and found["decision"] == "thresholds"
  kappa = metrics.quadratic_weighted_kappa(runs[0].level, metrics.grades(mean, tuned))
  assert found["answers"][ensemble.WHOLE]["kappa"] == pytest.approx(kappa, abs=1e-12)
  for run, other in zip(runs, others, strict=True):
    own = metrics.tune_thresholds(metrics.expected_grade(other.probabilities), other.level)
    assert found["thresholds"][run.name] == own.tolist()
  best = max(others, key=lambda other: metrics.quadratic_weighted_kappa(other.level, metrics.grades(
    other.probabilities, found["thresholds"][runs[others.index(other)].name])))
  assert found["best_single"] == runs[others.index(best)].name
  assert found["best_chosen_on"] == "validation"
  written = answers.of_predictions(tmp_path / "predictions.csv")  # what the next study may be given
  np.testing.assert_array_equal(written.grade, metrics.grades(mean, tuned))
  np.testing.assert_allclose(written.probabilities, mean, atol=1e-15)
  assert (tmp_path / "gain.png").stat().st_size > 10_000


def test_order_of_runs_and_of_rows_does_not_matter(make_predictions, tmp_path):
  test, validation = files(make_predictions, 2)
  backwards, _ = files(make_predictions, 2, order=-1)
  one = ensemble.run(predictions=test, tune=validation, out=str(tmp_path / "1"))
  other = ensemble.run(predictions=[test[1], backwards[0]], tune=validation[::-1],
                       out=str(tmp_path / "2"))
  assert one["answers"][ensemble.WHOLE] == other["answers"][ensemble.WHOLE]
  for figure, gain in one["gain"]["over_mean"].items():
    assert gain == pytest.approx(other["gain"]["over_mean"][figure], abs=1e-12)
  first, second = ((tmp_path / n / "predictions.csv").read_bytes() for n in "12")
  assert first == second


def test_runs_that_decide_by_the_likeliest_class(make_predictions, tmp_path, capsys):
  test, validation = files(make_predictions, 2)
  tuned = ensemble.run(predictions=test, tune=validation, out=str(tmp_path / "1"))
  assert tuned["decision"] == "argmax" and tuned["thresholds"][ensemble.WHOLE] is None
  assert tuned["best_chosen_on"] == "validation" and not capsys.readouterr().err
  alone = ensemble.run(predictions=test, out=str(tmp_path / "2"))
  assert alone["best_chosen_on"] == "the graded split" and alone["validation"] is None
  assert "without answers to a validation split" in capsys.readouterr().err
  assert alone["answers"] == tuned["answers"]


def test_mistakes_write_nothing(make_predictions, tmp_path):
  (one, other), (tune, _) = files(make_predictions, 2)
  fewer = str(make_predictions(40, seed=1))
  classes = str(make_predictions(90, seed=1, classes=3))
  for given, words in (
    ({"predictions": [one]}, "1 runs were given"), ({"predictions": [one, one]}, "2 times"),
    ({"predictions": [one, other], "tune": [tune]}, "one --tune for each"),
    ({"predictions": [one, fewer]}, "lacks 100 images"),
    ({"predictions": [one, classes]}, "3 classes"),
    ({"predictions": [one, other], "tune": [one, other]}, "share 180 images"),
    ({"predictions": [one, other], "data": "eyes"}, "--data=eyes"),
    ({"predictions": [one], "workdir": [str(tmp_path / "w")]}, "no such folder")):
    with pytest.raises(UserError, match=words):
      ensemble.run(**given, out=str(tmp_path / "out"))
  assert not list(tmp_path.iterdir())
