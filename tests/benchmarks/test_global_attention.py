"""The comparison of sources: its statistics, its table, what it runs and what it runs no more."""

import argparse
import json
import math
import pathlib
import stat
import sys

import numpy as np
import pytest

from benchmarks import global_attention as compare
from medattn_jax.errors import UserError


def row(accuracy, iou=None, auc=0.9, area=None):
  return {"accuracy": accuracy, "auc": auc, "iou": iou, "area": area}


# Three seeds that differ much more from each other than the sources do on any of them.
WITHOUT = {0: row(0.70), 1: row(0.80), 2: row(0.90)}
BANK = {0: row(0.72, 0.7), 1: row(0.82, 0.8), 2: row(0.93, 0.9)}


def cells(**sources):
  named = {name.replace("_", "-"): rows for name, rows in sources.items()}
  return compare.summarise({("cnn", name): rows for name, rows in named.items()})


def test_an_interval_is_students():
  # t(0.975, 2) = 4.3026527; the deviation of 1, 2, 3 is 1
  found = compare.interval([1.0, 2.0, 3.0])
  reach = 4.3026527297 / math.sqrt(3)
  assert found["count"] == 3
  np.testing.assert_allclose(
    [found["mean"], found["low"], found["high"]], [2, 2 - reach, 2 + reach], rtol=1e-9)


def test_an_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(0)
  found = [compare.interval(list(rng.normal(0.5, 0.1, 4))) for _ in range(2000)]
  assert abs(np.mean([one["low"] < 0.5 < one["high"] for one in found]) - 0.95) < 0.015


def test_one_value_has_no_interval_and_an_undefined_one_no_mean():
  assert compare.interval([0.3]) == {"mean": 0.3, "low": None, "high": None, "count": 1}
  for values in ([], [0.3, None]):
    assert compare.interval(values)["mean"] is None


def test_gains_are_paired_by_seed():
  without, bank = cells(none=WITHOUT, bank_linear=BANK)
  assert "gain" not in without
  gains = [0.02, 0.02, 0.03]
  assert bank["gain"] == pytest.approx(compare.interval(gains))
  assert bank["verdict"] == "better"
  # Were the seeds not paired, their spread would hide it.
  assert bank["accuracy"]["low"] < without["accuracy"]["mean"]


def test_pairs_are_of_the_same_seed_not_of_the_same_place():
  """Planted: the same accuracies, the other seeds. Paired by place the gain would be certain."""
  other = {2: BANK[0], 0: BANK[1], 1: BANK[2]}
  _, bank = cells(none=WITHOUT, bank_linear=other)
  assert bank["verdict"] == "no gain"
  assert bank["gain"]["low"] < 0 < bank["gain"]["high"]


@pytest.mark.parametrize(("shift", "said"), [
  ((0.02, 0.02, 0.03), "better"), ((0.05, -0.05, 0.01), "no gain"), ((0, 0, 0), "no gain"),
  ((-0.02, -0.02, -0.03), "worse")])
def test_the_table_says_whether_it_helps(shift, said):
  rows = {seed: row(one["accuracy"] + more, 0.5, area=0.2)
          for (seed, one), more in zip(WITHOUT.items(), shift, strict=True)}
  text = compare.table(cells(none=WITHOUT, free=rows))
  (line,) = (line for line in text.splitlines() if " free " in f"{line} ")
  assert line.endswith(said)
  assert "0.500 ± 0.000" in line


def test_each_backbone_has_its_own_without():
  found = compare.summarise({
    ("cnn", "none"): WITHOUT, ("cnn", "free"): BANK,
    ("vgg16", "none"): BANK, ("vgg16", "free"): WITHOUT})
  assert {(one["backbone"], one.get("verdict")) for one in found} == {
    ("cnn", None), ("cnn", "better"), ("vgg16", None), ("vgg16", "worse")}


def test_a_run_that_failed_is_told_and_takes_its_pair_along():
  broken = {**WITHOUT, 1: "exit status 2: no room"}
  found = cells(none=broken, bank_linear=BANK)
  text = compare.table(found)
  assert "2/3" in text and "(2 pairs)" in text
  assert found[1]["gain"]["count"] == 2
  assert compare.shortfalls(found, None, None) == ["cnn, none, seed 1: exit status 2: no room"]
  assert json.loads(json.dumps(found, allow_nan=False))[0]["failed"] == {"1": broken[1]}


def test_all_runs_of_a_cell_may_fail(tmp_path):
  found = cells(none=WITHOUT, bank_linear={0: "exit status 1: gone", 1: "exit status 1: gone"})
  assert "not known" in compare.table(found)
  assert len(compare.shortfalls(found, 0.0, 0.5)) == 4
  compare.plot(found, tmp_path / "new" / "figure.png")
  assert (tmp_path / "new" / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(("gain", "iou", "missed"), [
  (None, None, 0), (0.0, 0.79, 0), (0.01, 0.79, 1), (0.0, 0.81, 1), (0.5, 0.99, 2)])
def test_thresholds_judge_the_lower_end_and_the_mean(gain, iou, missed):
  found = cells(none=WITHOUT, bank_linear=BANK, free=BANK)
  assert len(compare.shortfalls(found, gain, iou)) == missed


def test_one_seed_proves_no_gain():
  found = cells(none={0: row(0.5)}, bank_linear={0: row(0.99, 0.9)})
  assert len(compare.shortfalls(found, 0.0, None)) == 1


@pytest.mark.parametrize(("name", "source", "classifier"), [
  ("none", "none", "linear"), ("bank-conv", "bank", "conv"),
  ("bank:50-linear", "bank:50", "linear"), ("stats", "stats", "linear"),
  ("batch-conv", "batch", "conv")])
def test_the_names_of_sources(name, source, classifier):
  assert compare.keys_of(name) == {
    "attention.source": source, "attention.classifier": classifier}


def test_a_source_without_classifier_takes_none():
  with pytest.raises(UserError, match="free classifies no pixels"):
    compare.keys_of("free-conv")


PAGE = str(pathlib.Path(__file__).parents[2] / "configs" / "planted_region.py")


def flags(**changed):
  own = {"config": PAGE, "backbones": None, "sources": ["none", "bank:50-conv"], "seeds": [3, 5],
         "overrides": [("data.dir", "elsewhere")]}
  return argparse.Namespace(**own | changed)


def test_a_plan_holds_every_run_with_its_own_region():
  runs = compare.plan(flags())
  assert [(cell, seed) for cell, seed, *_ in runs] == [
    (("cnn", "none"), 3), (("cnn", "bank:50-conv"), 3),
    (("cnn", "none"), 5), (("cnn", "bank:50-conv"), 5)]
  *_, words, config = runs[-1]
  assert "--config.data.dir=elsewhere" in words and "--config.attention.source=bank:50" in words
  assert config["seed"] == config["data"]["synthetic"]["seed"] == 5
  assert config["attention"]["classifier"] == "conv"


@pytest.mark.parametrize(("changed", "said"), [
  ({"sources": ["bunk-linear"]}, "attention.source = 'bunk'"),
  ({"overrides": [("seeed", "3")]}, "seeed"), ({"config": "gone.py"}, "no such file")])
def test_a_plan_that_cannot_be_is_refused_before_anything_is_trained(changed, said, capsys):
  with pytest.raises(SystemExit) as left:
    compare.plan(flags(**changed))
  error = capsys.readouterr().err
  assert left.value.code == 2 and said in error and error.count("\n") == 1


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
  """Instead of training: counts the calls, fails for seed 1, writes metrics for the others."""
  metrics = {"accuracy": 0.75, "auc_any": 0.8, "attention": {"iou": 0.5, "area": 0.1}}
  program = tmp_path / "python"
  program.write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
for word in "$@"; do
  case $word in
    --workdir=*) folder=${{word#--workdir=}};;
    --config.seed=1) echo "medattn: the disk is full"; exit 2;;
  esac
done
mkdir -p "$folder/evaluation"
echo '{json.dumps(metrics)}' > "$folder/evaluation/metrics.json"
""")
  program.chmod(program.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setattr(sys, "executable", str(program))
  return tmp_path / "calls"


def test_what_is_done_is_not_done_again_and_a_failure_stops_nothing(
    fake_python, tmp_path, monkeypatch, capsys):
  def call(*words):
    monkeypatch.setattr(sys, "argv", [
      "compare", f"--config={PAGE}", "--sources=none,bank-linear", f"--workdir={tmp_path / 'runs'}",
      "--json", *words])
    with pytest.raises(SystemExit) as ended:
      compare.main()
    lines = capsys.readouterr().out.splitlines()
    return ended.value.code, [json.loads(line) for line in lines]

  status, (without, bank) = call("--seeds=0,1,2")
  assert status == 1  # seed 1 failed
  assert without["failed"] == {"1": "exit status 2: medattn: the disk is full"}
  assert bank["seeds"]["2"] == {"accuracy": 0.75, "auc": 0.8, "iou": 0.5, "area": 0.1}
  assert len(fake_python.read_text().splitlines()) == 6
  call("--seeds=0,1,2")
  assert len(fake_python.read_text().splitlines()) == 8  # the failed ones alone
  assert call("--seeds=0,2")[0] == 0
  assert len(fake_python.read_text().splitlines()) == 8
  call("--seeds=0,2", "--set", "phases.joint.steps=3", "data.batch_size=16")
  assert len(fake_python.read_text().splitlines()) == 12  # another page is another run
  assert call("--seeds=0,2", "--least-gain=0")[0] == 1  # no gain in equal figures
  assert bank["name"] == "global_attention" and bank["config"]["page"] == PAGE


def test_the_small_size_is_one_seed_of_few_steps(fake_python, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", [
    "compare", f"--config={PAGE}", "--size=small", f"--workdir={tmp_path / 'runs'}", "--json",
    "--set", "phases.frozen.steps=7"])
  with pytest.raises(SystemExit) as ended:
    compare.main()
  assert ended.value.code == 0
  found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [one["source"] for one in found] == ["none", "bank-linear"]
  calls = fake_python.read_text().splitlines()
  assert len(calls) == 2 and all("--config.phases.joint.steps=140" in call for call in calls)
  assert all(call.index("frozen.steps=40") < call.index("frozen.steps=7") for call in calls)
