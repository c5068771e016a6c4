"""The plan of a page: what it would take, said as a model, and its one-line errors."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from medattn_jax import config, forecast, plan
from medattn_jax.errors import UserError
from medattn_jax.programs import chips, report, roofline

ROOT = pathlib.Path(__file__).parents[1]
PAGE = str(ROOT / "tests" / "pages" / "tiny_map.py")


def made(phase, seconds, **changed):
  """A phase of which a compiler said this much: 10 images a step on eight chips."""
  reduce = report.Collective("all-reduce", {"f32": 4_000_000}, False, False, 1_000_000)
  told = report.Report((reduce,), 1, 0, 0, 0, 0, 2 * 10**9, None, None, None, None)
  bound = roofline.Bound(0.1 * seconds, 0.9 * seconds, 0.1 * seconds, None)
  return forecast.Forecast(
    phase=phase, target=chips.target("v5e:2x4"), kind="TPU v5 lite", devices=8, images=10,
    dtype="bfloat16", leaves=1, unread=0, needs=2 * 10**9, memory=16 * 10**9, lowering=1.0,
    compiling=1.0, report=told, flops=1.0, accessed=1.0, hbm=1.0, cycles=None,
    seconds=None, bound=bound, places=None)._replace(**changed)


def page():
  return config.load_page(
    PAGE, [("phases.joint.steps", "3600"), ("phases.frozen.steps", "1800")])


def test_hours_are_steps_times_their_time():
  found = [made("joint", 2.0), made("frozen", 1.0)]
  assert plan.hours(page(), found[0]) == pytest.approx(2.0)
  (whole, *_) = plan.verdicts(page(), found, PAGE, chips.target("v5e:2x4"))
  assert whole.startswith("all phases: 2.50 hours, 54,000 images")


def test_what_does_not_fit_comes_with_the_way_to_what_does():
  refused = made("joint", 1.0, report=None, bound=None, needs=20 * 10**9)
  lines = plan.verdicts(page(), [refused, made("frozen", 1.0)], PAGE, chips.target("v5e:2x4"))
  (advice,) = [line for line in lines if "does not fit" in line]
  assert f"python -m benchmarks.fit --config={PAGE} --phase=joint --target=v5e " in advice
  assert "--remat=none,elementwise,blocks" in advice and "phases.joint.remat = none here" in advice
  assert not any("all phases" in line for line in lines)


def test_collectives_that_take_much_are_said():
  slow = made("joint", 1.0)._replace(bound=roofline.Bound(0.1, 0.5, 0.5, None))
  assert plan.share(slow) == pytest.approx(0.5)
  word = "more images a chip"
  of = lambda one: plan.verdicts(page(), [one], PAGE, chips.target("v5e:2x4"))
  assert any(word in line for line in of(slow))
  assert not any(word in line for line in of(made("joint", 1.0)))


def command(*words):
  return subprocess.run(
    [sys.executable, "-m", "medattn_jax", "plan", f"--config={PAGE}", *words], cwd=ROOT,
    capture_output=True, text=True, check=False,
    env={**os.environ, "COLUMNS": "160", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})


@pytest.mark.slow
def test_a_page_on_a_cpu_has_memory_and_collectives():
  run = command("--target=cpu:2", "--config.phases.joint.steps=0")
  assert run.returncode == 0, run.stderr
  assert re.search(r"frozen +4 +16 +[\d.]+ GB +yes +–", run.stdout), run.stdout
  assert "phase frozen: 1 all-reduce, 0.1 MB" in run.stdout
  assert "on 2 × cpu of" in run.stdout and "no data sheet of this device" in run.stdout
  assert "a model from data sheets, not a measurement" in run.stdout
  assert "joint" not in run.stdout and max(map(len, run.stdout.splitlines()[:8])) <= 100


@pytest.mark.parametrize(("words", "said"), [
  (["--target=v5f"], "target 'v5f' (did you mean v5"),
  (["--target=cpu:3"], "does not divide over 3 devices"),
  (["--target=cpu:2", "--config.phases.joint.stepz=1"], "did you mean phases.joint.steps")])
def test_a_mistake_is_one_line(words, said):
  run = command(*words)
  assert run.returncode == 2 and run.stdout == ""
  (line,) = [one for one in run.stderr.splitlines() if "compiling" not in one]
  assert line.startswith("medattn: error: ") and said in line


def test_a_run_without_steps_is_refused():
  none = [(f"phases.{phase}.steps", "0") for phase in ("joint", "frozen")]
  with pytest.raises(UserError, match=r"all phases\.<name>.steps are 0"):
    plan.run(PAGE, "cpu:2", none)


def test_a_plug_in_that_is_missing_is_said_with_what_to_install(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"--target=v5e:2x4: libtpu is not installed.*pip install"):
    plan.run(PAGE, "v5e:2x4", ())


@pytest.mark.slow
def test_a_page_on_tpus_has_hours():
  if reason := chips.missing(chips.target("v5e:2x4")):
    pytest.skip(reason)
  run = command("--target=v5e:2x4", "--config.phases.joint.steps=0")
  assert run.returncode == 0, run.stderr
  bounds = "memory|arithmetic|on-chip work|collectives"
  assert re.search(rf"frozen .* yes .*({bounds}).* ms ", run.stdout), run.stdout
  assert "all phases: 0.00 hours, 64 images" in run.stdout
