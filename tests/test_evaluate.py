"""evaluate: numbers that can be recomputed, every photograph once, thresholds not from test."""

import csv
import io
import json
import shutil
import types

import jax
import numpy as np
import pytest
from sklearn import metrics as sk

from medattn_jax import evaluate, experiment, metrics
from medattn_jax.errors import UserError


def fake_table(n=120, seed=0, boxes=True):
  rng = np.random.default_rng(seed)
  level = rng.integers(0, 5, n).astype(np.int32)
  clue = lambda noise: (
    -np.abs(np.arange(5) - level[:, None] - rng.normal(0, noise, (n, 1)))).astype(np.float32)
  table = {
    "image": np.array([f"{i // 2:03d}_{('left', 'right')[i % 2]}" for i in range(n)], object),
    "patient": np.array([f"{i // 2:03d}" for i in range(n)], object),
    "eye": np.array([("left", "right")[i % 2] for i in range(n)], object),
    "level": level, "y_M": clue(2), "y_A": clue(1.5), "y_C": clue(0.5),
    "boxes": np.tile(np.array([[0, 0, 40, 40], [0, 60, 40, 100], [60, 0, 100, 40],
                               [60, 60, 100, 100]], np.int32), (n, 1, 1)),
    "true_boxes": [np.array([[5, 5, 15, 15], [45, 45, 55, 55]], np.float32)[:k % 3]
                   for k in range(n)] if boxes else [np.zeros((0, 4))] * n,
  }
  table["logits"] = table["y_M"] + table["y_A"] + table["y_C"]
  return table


def fake_model(thresholds=(0.5, 1.5, 2.5, 3.5), name="zoom_in_net"):
  space = types.SimpleNamespace
  return space(
    thresholds=np.array(thresholds), thresholds_from="the checkpoint's validation",
    config=space(seed=0, model=space(name=name, num_classes=5, crop_size=40),
                 data=space(full_size=100), evaluation=space(bootstrap=20)))


def summary(table, tuned_on=None, thresholds=(0.5, 1.5, 2.5, 3.5)):
  model = fake_model(thresholds)
  return evaluate.summarise(table, (tuned_on, "validation", model.thresholds), model)


def test_metrics_are_recomputed_from_predictions_csv():
  """What a reader of predictions.csv computes with scikit-learn is what metrics.json says."""
  table = fake_table()
  found = summary(table, tuned_on=fake_table(seed=1))
  text = evaluate.predictions_csv(table, found["thresholds"])
  assert text.splitlines()[0] == "image,patient,eye,level,grade,score,p0,p1,p2,p3,p4"
  rows = list(csv.DictReader(io.StringIO(text)))
  level, grade = (np.array([int(row[key]) for row in rows]) for key in ("level", "grade"))
  p = np.array([[float(row[f"p{k}"]) for k in range(5)] for row in rows])
  assert found["quadratic_weighted_kappa"] == pytest.approx(
    sk.cohen_kappa_score(level, grade, weights="quadratic"), abs=1e-9)
  assert found["kappa_argmax"] == pytest.approx(
    sk.cohen_kappa_score(level, p.argmax(1), weights="quadratic"), abs=1e-9)
  assert found["confusion_matrix"] == sk.confusion_matrix(level, grade).tolist()
  assert found["accuracy"] == pytest.approx((level == grade).mean())
  for score in (p[:, 2] + p[:, 3] + p[:, 4], 1 - p[:, 0] - p[:, 1], p[:, 4] + (p[:, 3] + p[:, 2])):
    assert found["auc_referable"] == pytest.approx(sk.roc_auc_score(level >= 2, score), abs=1e-12)
  assert found["auc_any"] == pytest.approx(sk.roc_auc_score(level >= 1, 1 - p[:, 0]), abs=1e-12)
  score = np.array([float(row["score"]) for row in rows])
  np.testing.assert_array_equal(score, p @ np.arange(5))
  np.testing.assert_array_equal(np.digitize(score, found["thresholds"]), grade)
  assert [row["image"] for row in rows] == table["image"].tolist()


def test_contract_keys_in_strict_json():
  found = json.loads(json.dumps(summary(fake_table()), allow_nan=False))
  assert found.keys() >= {
    "images", "patients", "accuracy", "quadratic_weighted_kappa", "kappa_argmax",
    "kappa_thresholds", "thresholds", "kappa_ci", "confusion_matrix", "auc_referable",
    "auc_referable_ci", "auc_any", "sensitivity_at_specificity_50_any",
    "sensitivity_at_specificity_50_referable", "expected_calibration_error", "lesion_recall"}
  assert found["images"] == 120 and found["patients"] == 60


def test_branches_are_the_sums_of_the_papers():
  table = fake_table()
  found = summary(table, tuned_on=table)
  assert list(found["branches"]) == ["m_net", "m_a", "zoom_in_net"]
  score = metrics.expected_grade(metrics.probabilities_of(table["y_M"] + table["y_A"]))
  branch = found["branches"]["m_a"]
  assert branch["quadratic_weighted_kappa"] == metrics.quadratic_weighted_kappa(
    table["level"], metrics.decide(score, branch["thresholds"]))
  assert branch["thresholds"] == metrics.tune_thresholds(score, table["level"]).tolist()
  whole = found["branches"]["zoom_in_net"]
  assert whole["quadratic_weighted_kappa"] == found["quadratic_weighted_kappa"]
  assert whole["quadratic_weighted_kappa"] > found["branches"]["m_net"]["quadratic_weighted_kappa"]


def test_a_phase_without_crops_has_no_zoom_in_net_branch():
  table = {name: rows for name, rows in fake_table().items() if name not in ("y_C", "boxes")}
  found = summary(table)
  assert list(found["branches"]) == ["m_net", "m_a"] and "lesion_recall" not in found


def test_thresholds_come_from_the_rows_given_and_never_from_the_rows_graded():
  """Another test set under the same validation set: the same thresholds."""
  validation = fake_table(seed=1)
  one, other = (summary(fake_table(seed=seed), validation)["thresholds"] for seed in (2, 3))
  assert one == other != summary(fake_table(seed=2), fake_table(seed=4))["thresholds"]
  assert summary(fake_table(), None, (0.4, 1.4, 2.4, 3.4))["thresholds"] == [0.4, 1.4, 2.4, 3.4]


def test_lesion_recall_by_hand():
  found = summary(fake_table(n=12))["lesion_recall"]
  # Photographs have 0, 1, 2, 0, … lesions; the first is always inside a region, the second never
  # (the regions leave the middle free but for its corners).
  assert found["lesions"] == 12 and found["images"] == 8 and found["boxes_per_image"] == 4
  assert found["box"] == pytest.approx(8 / 12) and found["image"] == 1 and found["iom"] == 0.3
  assert found["best_box"] == 1 and 0 < found["random_box"] < 1
  assert "lesion_recall" not in summary(fake_table(boxes=False))


def batches(copies=1):
  """Three patients, one of them with one eye, and padding."""
  for first in range(copies):
    yield {
      "patient": np.array([f"p{first}", f"q{first}", ""], object),
      "image_id": np.array([["a", "b"], ["c", ""], ["", ""]], object),
      "eye": np.array([["left", "right"], ["left", ""], ["", ""]], object),
      "level": np.array([[0, 1], [2, 2], [0, 0]], np.int32),
      "mask": np.array([[1, 1], [1, 0], [0, 0]], np.float32),
      "boxes": np.arange(3 * 2 * 2 * 4, dtype=np.float32).reshape(3, 2, 2, 4),
      "box_type": np.array([[[1, -1], [-1, -1]], [[0, 2], [3, 3]], [[-1, -1]] * 2], np.int32)}


def answer(value=0.0):
  logits = np.full((3, 2, 5), value, np.float32)
  logits[..., 0] = np.arange(6).reshape(3, 2)
  return {"logits": logits, "boxes": np.zeros((3, 2, 4, 4), np.int32)}


def test_collect_takes_what_counts_once(monkeypatch):
  monkeypatch.setattr(
    experiment, "predictions", lambda now, variables, given, *_: ((b, answer()) for b in given))
  table = evaluate.collect(None, None, batches())
  assert table["image"].tolist() == ["a", "b", "c"]
  assert table["patient"].tolist() == ["p0", "p0", "q0"]
  assert table["level"].tolist() == [0, 1, 2]
  assert table["logits"][:, 0].tolist() == [0, 1, 2]
  assert [len(own) for own in table["true_boxes"]] == [1, 0, 2]
  assert table["true_boxes"][2].tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]


def test_collect_refuses_answers_that_are_no_numbers(monkeypatch):
  monkeypatch.setattr(
    experiment, "predictions",
    lambda now, variables, given, *_: ((b, answer(np.nan)) for b in given))
  with pytest.raises(UserError, match="not finite"):
    evaluate.collect(None, None, batches())


def dataset(**splits):
  return types.SimpleNamespace(name="eyes", splits=splits)


def test_split_is_test_or_validation_or_refused_by_name(capsys):
  assert evaluate.choose_split(dataset(train=3, validation=2, test=1), None) == "test"
  assert evaluate.choose_split(dataset(train=3, validation=2), None) == "validation"
  assert "no test split" in capsys.readouterr().err
  with pytest.raises(UserError, match=r"--split=tests.*train \(3\), validation \(2\)"):
    evaluate.choose_split(dataset(train=3, validation=2), "tests")
  with pytest.raises(UserError, match=r"neither.*train \(3\)"):
    evaluate.choose_split(dataset(train=3), None)


FILES = {"metrics.json", "predictions.csv", "confusion_matrix.png", "roc.png", "reliability.png",
         "training_curves.png"}


@pytest.fixture(scope="module")
def evaluated(untrained, tmp_path_factory):
  """A folder that `evaluate` wrote for the untrained workdir, and what it returned."""
  out = tmp_path_factory.mktemp("evaluated") / "deep" / "er"
  return out, evaluate.run(str(untrained), out=str(out))


def strict(path):
  def refuse(constant):
    raise ValueError(constant)

  return json.loads(path.read_text(), parse_constant=refuse)


def test_the_command_writes_what_a_reader_can_recompute(evaluated, smoke_config):
  out, found = evaluated
  assert {path.name for path in out.iterdir()} == FILES
  assert strict(out / "metrics.json") == found
  assert (found["step"], found["split"], found["thresholds_from"]) == (12, "test", "validation")
  rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
  levels = evaluate.open_data(smoke_config, None).levels("test")
  assert len(rows) == len({row["image"] for row in rows}) == (levels >= 0).sum() == found["images"]
  assert found["patients"] == len(levels)
  level, grade = (np.array([int(row[key]) for row in rows]) for key in ("level", "grade"))
  np.testing.assert_array_equal(level, levels[levels >= 0])
  assert found["quadratic_weighted_kappa"] == pytest.approx(
    sk.cohen_kappa_score(level, grade, weights="quadratic", labels=range(5)), abs=1e-9)
  p = np.array([[float(row[f"p{k}"]) for k in range(5)] for row in rows])
  assert found["auc_any"] == pytest.approx(sk.roc_auc_score(level > 0, 1 - p[:, 0]), abs=1e-9)
  assert set(found["branches"]) == {"m_net", "m_a", "zoom_in_net"}
  assert 0 < found["lesion_recall"]["random_box"] < found["lesion_recall"]["best_box"] <= 1


def test_device_count_changes_nothing(untrained, evaluated, smoke_config, monkeypatch):
  """Three devices, which divide neither the batch nor the split."""
  from medattn_jax import trained

  _, found = evaluated
  model = trained.open_workdir(untrained, devices=jax.devices()[:3])
  data = evaluate.open_data(smoke_config, None)
  table = evaluate.graded(model.experiment, model.variables, data, "test", smoke_config)
  tuning = evaluate.tuning_of(model, data, "test", table)
  again = evaluate.summarise(table, tuning, model)
  assert again["confusion_matrix"] == found["confusion_matrix"]
  assert again["auc_any"] == pytest.approx(found["auc_any"], abs=1e-6)
  np.testing.assert_allclose(again["thresholds"], found["thresholds"], atol=1e-5)
  assert again["lesion_recall"] == found["lesion_recall"]


def test_validate_finds_what_evaluate_finds(untrained, smoke_config, tmp_path, capsys):
  """The training loop's kappa and thresholds are those of an evaluation of the same weights."""
  from medattn_jax import trained

  found = evaluate.run(str(untrained), split="validation", out=str(tmp_path))
  assert "optimistic" in capsys.readouterr().err
  model = trained.open_workdir(untrained)
  data = evaluate.open_data(smoke_config, None)
  quick = evaluate.validate(model.experiment, model.variables, data, smoke_config)
  assert quick["kappa"] == pytest.approx(found["quadratic_weighted_kappa"], abs=1e-9)
  np.testing.assert_allclose(quick["thresholds"], found["thresholds"])
  assert quick["accuracy"] == found["accuracy"] and quick["auc_referable"] == found["auc_referable"]


def test_once_does_nothing_again_for_the_same_weights(untrained, evaluated, monkeypatch, capsys):
  out, found = evaluated
  before = (out / "predictions.csv").stat().st_mtime_ns
  monkeypatch.setattr(evaluate, "graded", None)  # grading again would fail
  assert evaluate.run(str(untrained), out=str(out), once=True) == found
  assert "evaluated already" in capsys.readouterr().err
  assert (out / "predictions.csv").stat().st_mtime_ns == before
  for damage in ("{", json.dumps(found | {"checkpoint_sha256": "another"})):
    (out.parent / "other").mkdir(exist_ok=True)
    (out.parent / "other" / "metrics.json").write_text(damage)
    with pytest.raises(TypeError):  # it does grade
      evaluate.run(str(untrained), out=str(out.parent / "other"), once=True)


def test_mistakes_write_nothing(untrained, tmp_path):
  out = tmp_path / "out"
  for given, words in (
    ({"split": "tests"}, r"--split=tests.*train.*validation.*test"), ({"step": "99"}, "99"),
    ({"data": str(tmp_path / "nowhere")}, "nowhere"), ({"step": "newest"}, "newest")):
    with pytest.raises(UserError, match=words):
      evaluate.run(str(untrained), out=str(out), **given)
  with pytest.raises(UserError, match="missing"):
    evaluate.run(str(tmp_path / "missing"))
  assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed_before_its_numbers_are_used(untrained, tmp_path):
  place = tmp_path / "run"
  shutil.copytree(untrained, place)
  meta = place / "checkpoints" / "12" / "meta.json"
  meta.write_text(meta.read_text().replace("0.6", "0.7"))
  with pytest.raises(UserError, match="damaged"):
    evaluate.run(str(place))
  assert not (place / "evaluation").exists()
  (place / "config.json").write_text("{")
  with pytest.raises(UserError, match=r"config\.json"):
    evaluate.run(str(place))


def test_no_validation_split_takes_the_checkpoints_thresholds(untrained, smoke_config, capsys):
  from medattn_jax import trained

  model = trained.open_workdir(untrained)
  rows, source, thresholds = evaluate.tuning_of(model, dataset(test=4), "test", {})
  assert rows is None and thresholds.tolist() == [0.6, 1.4, 2.4, 3.4]
  assert source == "the checkpoint's validation"
  assert "no validation split" in capsys.readouterr().err


def test_m_net_has_one_branch_and_no_lesions(untrained_m_net, tmp_path):
  found = evaluate.run(str(untrained_m_net), out=str(tmp_path))
  assert list(found["branches"]) == ["m_net"] and "lesion_recall" not in found
  kappas = {found["branches"]["m_net"]["quadratic_weighted_kappa"], found["kappa_thresholds"]}
  assert len(kappas) == 1


def test_levels_that_the_model_has_not_are_refused_before_one_is_graded(
  untrained, monkeypatch, tmp_path
):
  """Those of the split that is graded and of the one that tunes; another's do not matter."""
  levels = {"train": 9, "validation": 2, "test": 4}
  there = types.SimpleNamespace(
    name="d", splits=dict.fromkeys(levels, 1), levels=lambda split: np.array([levels[split]]))

  def begun(*_):
    raise RuntimeError("begun")

  monkeypatch.setattr(evaluate, "open_data", lambda *_: there)
  monkeypatch.setattr(evaluate, "check_same", begun)
  monkeypatch.setattr(evaluate, "graded", None)
  evaluated = lambda: evaluate.run(str(untrained), data="d", out=str(tmp_path))
  with pytest.raises(RuntimeError, match="begun"):
    evaluated()
  for split in ("test", "validation"):
    levels[split] = 5
    with pytest.raises(UserError, match=f"split {split}, has level 5; accepted: at least 6"):
      evaluated()
    levels[split] = 1
