"""medattn study table: ours beside the paper's, and nothing that is not so."""

import json

import pytest

from medattn_jax.errors import UserError
from medattn_jax.studies import table


def branch(kappa):
  return {"quadratic_weighted_kappa": kappa, "kappa_argmax": kappa, "accuracy": 0.5}


def evaluation(**changed):
  return {
    "data": "eyes", "split": "test", "step": 7, "images": 1234, "accuracy": 0.61,
    "quadratic_weighted_kappa": 0.8123, "kappa_ci": [0.79, 0.83], "auc_referable": 0.9,
    "auc_referable_ci": [0.88, 0.92], "auc_any": 0.7,
    "branches": {"m_net": branch(0.7011), "m_a": branch(0.75), "zoom_in_net": branch(0.8123)},
    "lesion_recall": {"box": 0.61, "image": 0.71, "iom": 0.3, "boxes_per_image": 4, "images": 99},
  } | changed


def machine(at):
  point = {"value": at + 0.02, "interval": [0.1, 0.9]}
  return {"svm": {"auc": at, "auc_ci": [0.2, 0.8], "accuracy": at + 0.01, "accuracy_ci": None,
                  "sensitivity_at_specificity_50": point}}


@pytest.fixture
def workdir(tmp_path):
  """make(files, model): a workdir with a config.json and these JSON files."""
  def make(files, folder="run", **model):
    place = tmp_path / folder
    config = {"model": {"name": "zoom_in_net", "backbone": "b"} | model,
              "attention": {"source": "bank:64"}}
    for path, content in {"config.json": config, **files}.items():
      (place / path).parent.mkdir(parents=True, exist_ok=True)
      (place / path).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(place)

  return make


def lines(found, method, figure):
  return [(row["paper"], row["ours"], row["interval"], row["split"]) for row in found["rows"]
          if (row["method"], row["figure"]) == (method, figure)]


def test_each_branch_is_beside_its_row_of_the_paper(workdir, tmp_path, capsys):
  run = workdir({"evaluation/metrics.json": evaluation(),
                 "validation/metrics.json": evaluation(split="validation", images=55)})
  found = table.run([run], out=str(tmp_path / "out"))
  assert lines(found, "M-Net", table.KAPPA) == [
    (0.825, 0.7011, None, "test"), (0.832, 0.7011, None, "validation")]
  assert lines(found, "M-Net + A-Net", table.KAPPA)[0] == (0.832, 0.75, None, "test")
  assert lines(found, "Zoom-in-Net", table.KAPPA)[0] == (0.849, 0.8123, [0.79, 0.83], "test")
  assert lines(found, "Zoom-in-Net", "lesions found by four regions")[0][:2] == (0.76, 0.61)
  assert lines(found, "Zoom-in-Net", "abnormal: AUC of the probability")[0][:2] == (None, 0.7)
  assert json.loads((tmp_path / "out" / "table.json").read_text()) == found
  text = (tmp_path / "out" / "table.md").read_text()
  assert capsys.readouterr().out == text
  cells = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines()]
  assert ["| Zoom-in-Net", table.KAPPA, "0.849 (EyePACS)", "0.812", "0.790 to 0.830", "eyes, test",
          "1,234", f"{run}: evaluation/metrics.json |"] in cells
  assert ["| ensemble of Zoom-in-Nets", table.KAPPA, "0.854 (EyePACS)", "–", "", "test", "", "|"
          ] in cells


def test_screening_is_the_papers_only_by_the_papers_protocol(workdir, tmp_path):
  screening = {
    "study": "screening", "run": {"data": "messidor", "split": "test"}, "images": 1187,
    "trained_on": {"data": "eyes"}, "referable": machine(0.95), "any": machine(0.9)}
  own = screening | {"trained_on": None, "run": {"predictions": "f.csv"}}
  found = table.run(
    [workdir({"studies/messidor/screening.json": screening, "studies/own/screening.json": own})],
    out=str(tmp_path / "out"))
  assert lines(found, "Zoom-in-Net", "referable: AUC")[0] == (0.957, 0.95, [0.2, 0.8], "test")
  assert lines(found, "Zoom-in-Net", "abnormal: AUC") == [(0.921, 0.9, [0.2, 0.8], "test")]
  assert lines(found, "Zoom-in-Net", "abnormal, cross-validated: AUC") == [
    (None, 0.9, [0.2, 0.8], "")]
  assert lines(found, "Zoom-in-Net", "abnormal: sensitivity at specificity .5")[0][:3] == (
    0.978, 0.92, [0.1, 0.9])


def test_ensembles_and_other_models_have_rows(workdir, tmp_path):
  ensemble = {"study": "ensemble", "runs": [{"data": "eyes", "split": "test"}], "images": 12,
              "mean": "mean of all",
              "answers": {"mean of all": {"kappa": 0.85, "kappa_ci": [0.84, 0.86]}}}
  zoom = workdir({"studies/ensemble/ensemble.json": ensemble, "studies/tta/tta.json":
                  {"study": "tta"}}, folder="zoom")
  plain = evaluation(branches={}, attention={"area": 0.4, "mean": 0.4, "iou": None})
  del plain["lesion_recall"]
  weighed = workdir({"evaluation/metrics.json": plain}, folder="weighed",
                    name="global_attention", backbone="resnet18")
  found = table.run([zoom, weighed], out=str(tmp_path / "out"))
  assert lines(found, table.ENSEMBLE, table.KAPPA) == [(0.854, 0.85, [0.84, 0.86], "test")]
  name = "resnet18, attention from bank:64"
  assert lines(found, name, "accuracy") == [(None, 0.61, None, "test")]
  assert lines(found, name, "share of the pixels attended")[0][1] == 0.4
  assert lines(found, name, "IoU with the true region") == []


def test_damaged_files_cost_only_themselves(workdir, tmp_path, capsys):
  bad = {f"bad{n}/metrics.json": content for n, content in enumerate((
    "{", "[]", "null", {"split": "test"}, evaluation(kappa_ci=0.5), evaluation(images="many"),
    evaluation(auc_any=float("nan")), evaluation(branches={"m_net": 3})))}
  found = table.run([workdir(bad | {"evaluation/metrics.json": evaluation()})],
                    out=str(tmp_path / "out"))
  assert {row["file"] for row in found["rows"]} == {"evaluation/metrics.json"}
  said = capsys.readouterr().err
  assert all(f"bad{n}/metrics.json: passed over" in said for n in range(len(bad)))


def test_mistakes_write_nothing(workdir, tmp_path):
  out = tmp_path / "out"
  empty = workdir({})
  for given, words in (([], "--workdir=D"), ([empty], "nothing is evaluated"),
                       ([str(tmp_path / "none")], "no such folder")):
    with pytest.raises(UserError, match=words):
      table.run(given, out=str(out))
  broken = workdir({"config.json": {"models": 1}}, "broken")
  with pytest.raises(UserError, match="names no model"):
    table.run([broken], out=str(out))
  assert not out.exists()


def test_names_do_not_break_the_table(workdir, tmp_path):
  found = workdir({"evaluation/metrics.json": evaluation(data="a|b")})
  text = table.markdown(table.rows_of(found))
  widths = {line.replace(r"\|", "").count("|") for line in text.splitlines() if line[:1] == "|"}
  assert widths == {9}
