"""What was measured is held against the aims, and what was not is said to be so."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import aims, rows, versus_torch

ROOT = pathlib.Path(__file__).parents[2]
OVER = aims.Aim("torch", "ours_over_it", 1.25)
NEAR = aims.Aim("ours", "step_over_roofline", 1.25, at_least=False)


def lines(over=1.3, near=1.2, same=True):
  return [{"config": {"side": "ours"}, "step_over_roofline": near, "same_losses": True},
          {"config": {"side": "torch"}, "ours_over_it": over, "same_losses": same}]


@pytest.mark.parametrize(("over", "near", "reached"), [
  (1.3, 1.2, [True, True]), (1.25, 1.25, [True, True]), (1.24, 1.26, [False, False])])
def test_more_or_less_than_the_bound(over, near, reached):
  found = aims.judged("resnet50", [OVER, NEAR], lines(over, near), None)
  assert [one["reached"] for one in found] == reached
  assert [one["found"] for one in found] == [over, near]
  assert all((one["over_bound"] >= 1) is one["reached"] for one in found)


def test_other_losses_are_said():
  found = aims.judged("resnet50", [OVER], lines(same=False), None)
  assert "NO" in aims.table(found).splitlines()[1]


def test_what_was_not_measured_is_neither_reached_nor_missed():
  found = aims.judged("resnet50", [OVER, NEAR], *aims.measured("resnet50", [], seconds=0))
  assert [(one["found"], one["reached"]) for one in found] == [(None, None)] * 2
  assert aims.table(found).count("not measured: no time was left") == 2
  empty = rows.row("aims", config={}, devices=1, device_kind=None, batch=None, dtype=None)
  assert all(json.dumps(one) and one.keys() >= empty.keys() for one in found)


@pytest.mark.parametrize("size", aims.AIMS)
def test_aims_are_of_what_versus_torch_measures(size):
  for model, (_, wanted) in aims.AIMS[size].items():
    assert {aim.side for aim in wanted} <= set(versus_torch.ways(model))
    assert len({str(aim) for aim in wanted}) == len(wanted)
    for aim in wanted:
      assert (aim.figure == "ours_over_it") is (aim.side != "ours")


def test_a_figure_of_what_was_measured(tmp_path):
  pytest.importorskip("matplotlib")
  found = aims.judged("a", [OVER, NEAR], lines(), None) + aims.judged("b", [OVER], [], "why")
  aims.plot(found, tmp_path / "aims.png")
  assert (tmp_path / "aims.png").stat().st_size > 1000


def run(*flags):
  return subprocess.run([sys.executable, "-m", "benchmarks.aims", *flags], cwd=ROOT,
                        capture_output=True, text=True, check=False)


def test_an_unknown_model_ends_it():
  done = run("--models=resnet18,vgg16")
  assert done.returncode == 2 and not done.stdout
  assert done.stderr == ("benchmarks.aims: error: --models: vgg16; accepted at --size=small: demo, "
                         "resnet_small, resnet18\n")


@pytest.mark.slow
def test_a_model_is_measured_until_the_time_is_over():
  pytest.importorskip("torchvision")
  done = run("--models=resnet_small,demo", "--minutes=0.75", "--json")
  assert done.returncode == 0, done.stderr
  said = [json.loads(line) for line in done.stdout.splitlines()]
  judged = {one["asked"]: one for one in said if one["name"] == "aims"}
  assert judged["resnet_small"]["found"] > 0 and judged["resnet_small"]["same_losses"]
  assert judged["demo"]["found"] is None and "not done within" in judged["demo"]["why"]
