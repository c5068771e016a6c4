"""studies.answers: what evaluate finds, read back whole; no file is believed."""

import csv
import io
import types

import numpy as np
import pytest

from medattn_jax import evaluate, metrics, trained
from medattn_jax.errors import UserError
from medattn_jax.studies import answers


def changed(path, tmp_path, row, column, value):
  """A copy of a predictions.csv with one value of it changed, or (value None) its column gone."""
  rows = list(csv.reader(path.read_text().splitlines()))
  at = rows[0].index(column)
  for number, cells in enumerate(rows):
    if value is None:
      del cells[at]
    elif number == row:
      cells[at] = value
  text = io.StringIO()
  csv.writer(text).writerows(rows)
  (tmp_path / "changed.csv").write_text(text.getvalue())
  return tmp_path / "changed.csv"


def test_a_file_is_read_as_it_was_written(make_predictions):
  path = make_predictions(20)
  found = answers.of_predictions(path)
  rows = list(csv.DictReader(path.read_text().splitlines()))
  assert found.image.tolist() == [row["image"] for row in rows]
  assert found.patient.tolist() == [row["patient"] for row in rows]
  assert found.eye.tolist() == [row["eye"] for row in rows]
  assert found.level.tolist() == [int(row["level"]) for row in rows]
  assert found.grade.tolist() == [int(row["grade"]) for row in rows]
  assert found.probabilities.tolist() == [[float(row[f"p{k}"]) for k in range(5)] for row in rows]
  assert found.probabilities.dtype == np.float64 and found.level.dtype == np.int64


@pytest.mark.parametrize(("column", "value", "words"), [
  ("p3", "nan", "p3 of 0-1_left = 'nan'; accepted: 0 to 1"),
  ("p3", "inf", "p3 of 0-1_left"), ("p3", "-0.1", "p3 of 0-1_left"), ("p3", "", "p3 of 0-1_left"),
  ("p0", "0.123", "the probabilities of 0-1_left sum to"),
  ("level", "5", "level of 0-1_left = '5'; accepted: 0–4"), ("level", "-1", "level of 0-1_left"),
  ("level", "1.0", "level of 0-1_left"), ("grade", "", "grade of 0-1_left"),
  ("image", "0-0_left", "image 0-0_left is there 2 times"), ("image", "", "row 4 has no image"),
  ("patient", "", "row 4 has no patient"), ("level", None, "has no column level"),
  ("p1", None, "has no column p1"), ("p2", None, "has no column p2"),
])
def test_damage_is_named(make_predictions, tmp_path, column, value, words):
  path = changed(make_predictions(20), tmp_path, 3, column, value)
  with pytest.raises(UserError, match=words):
    answers.of_predictions(path)


@pytest.mark.parametrize(("content", "words"), [
  (None, "no such file"), (b"", "no column image"), (b"\xff\xfe\x00", "no CSV in UTF-8"),
  (b"image,patient,eye,level,grade,p0,p1\n", "has no photographs"),
  (b"image,patient,eye,level,grade,p0,p1\na,b,left,0\n", "row 2 has 4 values"),
  (b"image,image,patient,eye,level,grade,p0,p1\n", "two column image"),
  (b'image,patient,eye,level,grade,p0,p1\n"a', "no CSV"), (b"<html>", "no column image"),
])
def test_files_that_are_no_predictions(tmp_path, content, words):
  if content is not None:
    (tmp_path / "f.csv").write_bytes(content)
  with pytest.raises(UserError, match=words):
    answers.of_predictions(tmp_path / "f.csv")


def test_a_file_too_large_is_not_read(make_predictions, monkeypatch):
  monkeypatch.setattr(answers, "_MAX_BYTES", 1 << 10)
  with pytest.raises(UserError, match="larger than"):
    answers.of_predictions(make_predictions(20))


def test_together_joins_by_image(make_predictions):
  first = answers.of_predictions(make_predictions(20))
  turned = answers.of_predictions(make_predictions(20, chance=2, order=-1))
  here, there = answers.together([first, turned])
  assert here is first and there.image.tolist() == first.image.tolist()
  assert there.probabilities.tolist() == turned.probabilities[::-1].tolist()
  assert there.name == turned.name


def test_together_names_what_does_not_fit(make_predictions, tmp_path):
  path = make_predictions(20)
  first = answers.of_predictions(path)
  short = first.take(np.arange(len(first.image)) != 2)._replace(name="short")
  for runs in ([first, short], [short, first]):
    with pytest.raises(UserError, match=r"^short: lacks 1 images .* 0-1_left"):
      answers.together(runs)
  level = str((first.level[2] + 1) % 5)
  other = answers.of_predictions(changed(path, tmp_path, 3, "level", level))
  with pytest.raises(UserError, match=rf"changed.csv: 0-1_left has level {level} where"):
    answers.together([first, other])
  other = answers.of_predictions(changed(path, tmp_path, 3, "patient", "z"))
  with pytest.raises(UserError, match="0-1_left has patient z where"):
    answers.together([first, other])
  with pytest.raises(UserError, match="has 3 classes where"):
    answers.together([first, answers.of_predictions(make_predictions(20, classes=3))])


def test_fitting_on_what_is_tested_is_refused(make_predictions):
  first = answers.of_predictions(make_predictions(20))
  answers.check_apart(answers.of_predictions(make_predictions(20, seed=1)), first)
  with pytest.raises(UserError, match="share 1 images, 0-3_left the first"):
    answers.check_apart(first.take(np.array([6])), first)


def test_gather_takes_as_many_runs_as_the_study(make_predictions):
  path = make_predictions(20)
  assert len(answers.gather([], [path, path], least=2, most=2)) == 2
  with pytest.raises(UserError, match=r"1 runs were given.*accepted: 2$"):
    answers.gather([], [path], least=2, most=2)
  with pytest.raises(UserError, match=r"0 runs were given.*accepted: 1 or more$"):
    answers.gather([], [])
  with pytest.raises(UserError, match=r"--split=test: .* graded already"):
    answers.gather([], [path], split="test")


def table(n, seed):
  """What evaluate.graded gives for a split of n photographs, without a model."""
  rng = np.random.default_rng(seed)
  level = rng.integers(0, 5, n).astype(np.int32)
  seen = level + rng.normal(0, 1, n)
  logits = (-1.5 * np.abs(np.arange(5) - seen[:, None])).astype(np.float32)
  return {
    "image": np.array([f"{seed}-{i}" for i in range(n)], object),
    "patient": np.array([f"{seed}-{i // 2}" for i in range(n)], object),
    "eye": np.array([("left", "right")[i % 2] for i in range(n)], object),
    "level": level, "logits": logits, "y_M": logits, "true_boxes": []}


@pytest.fixture
def run(monkeypatch):
  """make(thresholds, *splits): a model that is open, whose data set has these splits."""
  space = types.SimpleNamespace

  def make(thresholds, *splits):
    tables = {split: table(40, seed) for seed, split in enumerate(splits)}
    dataset = space(name="eyes", splits=dict.fromkeys(splits, 40))
    monkeypatch.setattr(evaluate, "open_data", lambda config, data: dataset)
    monkeypatch.setattr(
      evaluate, "graded", lambda now, variables, data, split, config: tables[split])
    model = space(
      thresholds=thresholds, thresholds_from="elsewhere", step=7, fingerprint="f", experiment=None,
      variables=None, config=space(
        seed=0, model=space(name="m_net", num_classes=5), evaluation=space(bootstrap=0)))
    return model, dataset, tables

  return make


@pytest.mark.parametrize("thresholds", [np.array([0.5, 1.5, 2.5, 3.5]), None])
@pytest.mark.parametrize("splits", [("test", "validation"), ("validation",), ("test",)])
def test_a_run_answers_as_evaluate_writes(run, tmp_path, thresholds, splits):
  """The same photographs, probabilities and decision, bit by bit; and its validation split."""
  model, dataset, tables = run(thresholds, *splits)
  split = splits[0]
  summary = evaluate.summarise(
    tables[split], evaluate.tuning_of(model, dataset, split, tables[split]), model)
  text = evaluate.predictions_csv(tables[split], summary["thresholds"])
  (tmp_path / "predictions.csv").write_text(text)
  written = answers.of_predictions(tmp_path / "predictions.csv")
  found, validation = answers.of_model(model, "run", validation=True)
  for column in ("image", "patient", "eye", "level", "probabilities", "grade"):
    np.testing.assert_array_equal(getattr(found, column), getattr(written, column))
  assert found.source == {"workdir": "run", "data": "eyes", "split": split, "step": 7,
                          "checkpoint_sha256": "f"}
  if "validation" not in splits:
    assert validation is None
  else:
    assert validation.source["split"] == "validation"
    np.testing.assert_array_equal(validation.level, tables["validation"]["level"])
    tuned = metrics.tune_thresholds(
      metrics.expected_grade(validation.probabilities), validation.level)
    np.testing.assert_array_equal(
      found.grade, metrics.grades(found.probabilities, None if thresholds is None else tuned))
  assert answers.of_model(model, "run")[1] is None


@pytest.mark.slow
def test_a_workdir_is_opened_and_graded(untrained_m_net, tmp_path, monkeypatch):
  model = trained.open_workdir(untrained_m_net)
  monkeypatch.setattr(trained, "open_workdir", lambda *_: model)  # or it would be compiled twice
  evaluate.run(str(untrained_m_net), out=str(tmp_path))
  written = answers.of_predictions(tmp_path / "predictions.csv")
  found, validation = answers.with_validation(str(untrained_m_net))
  for column in ("image", "patient", "eye", "level", "probabilities", "grade"):
    np.testing.assert_array_equal(getattr(found, column), getattr(written, column))
  assert not set(found.image) & set(validation.image)


def test_a_folder_to_write_to(tmp_path):
  assert answers.folder("kappa", ["w"], None).as_posix() == "w/studies/kappa"
  assert answers.folder("kappa", ["w"], str(tmp_path)) == tmp_path
  with pytest.raises(UserError, match="--out=DIR: is needed"):
    answers.folder("kappa", [], None)
  (tmp_path / "file").write_text("mine")
  with pytest.raises(UserError, match="is a file"):
    answers.folder("kappa", [], str(tmp_path / "file"))
