"""A struck run ends as one nobody struck: the same params to the bit, the same log."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from medattn_jax import config, continuation
from medattn_jax import train as loop
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.compiling import Compiled
from medattn_jax.errors import UserError
from medattn_jax.signals import Signals, Stopped
from medattn_jax.workdir import Workdir

PAGE = str(pathlib.Path(__file__).parent / "pages" / "tiny.py")
PAGES = pathlib.Path(__file__).parents[1] / "configs"
STEPS = 12


@pytest.fixture(scope="module")
def data_dir(made_once):
  return made_once("tiny_data", pathlib.Path.mkdir)


def command(workdir, data_dir, *flags):
  return [
      sys.executable, "-m", "medattn_jax", "train", f"--config={PAGE}", f"--workdir={workdir}",
      f"--config.data.dir={data_dir}", *flags,
  ]  # fmt: skip


def start(workdir, data_dir, *flags, devices=1):
  environment = os.environ | {
      "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # as users train
  }  # fmt: skip
  return subprocess.Popen(
      command(workdir, data_dir, *flags),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
  )


def train(workdir, data_dir, *flags, devices=1):
  process = start(workdir, data_dir, *flags, devices=devices)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def finished(made_once, data_dir):
  def make(workdir):
    status, out, err = train(workdir, data_dir)
    assert status == 0, err
    assert "M-Net" in out and "images/s while training: joint" in out

  return made_once("tiny_run", make)


@pytest.fixture
def copy(finished, tmp_path):
  return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def logged(workdir, name="loss"):
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["phase"], line[name]) for line in lines if name in line]


def assert_same_run(workdir, other):
  (tree, meta), (expected, expected_meta) = (
      Checkpoints(w / "checkpoints").load(STEPS) for w in (workdir, other)
  )
  same = jax.tree.map(np.array_equal, tree, expected)
  assert jax.tree.all(same), [k for k, v in jax.tree.leaves_with_path(same) if not v]
  assert {k: meta[k] for k in ("kappa", "thresholds")} == {
      k: expected_meta[k] for k in ("kappa", "thresholds")
  }
  assert logged(workdir) == logged(other)
  assert logged(workdir, "validation_accuracy") == logged(other, "validation_accuracy")


def wait_for_step(process, workdir, step):
  while process.poll() is None and time.monotonic():
    log = workdir / "metrics.jsonl"
    if log.exists() and len(log.read_text().splitlines()) >= step:
      return
    time.sleep(0.01)
  raise AssertionError(process.communicate()[1])


def test_a_finished_run_holds_what_is_promised(finished):
  assert [step for step, _, _ in logged(finished)] == list(range(1, STEPS + 1))
  assert Checkpoints(finished / "checkpoints").steps()[-1] == STEPS
  assert json.loads((finished / "config.json").read_text())["model"]["name"] == "m_net"
  metrics = json.loads((finished / "evaluation" / "metrics.json").read_text())
  assert metrics["split"] == "test" and metrics["patients"] == 6
  assert list((finished / "tensorboard").iterdir())
  assert list((finished / "compilation_cache").iterdir())
  first = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
  assert {"step", "phase", "loss", "learning_rate", "images_per_second"} <= first.keys()


def test_stopped_and_then_killed_it_ends_bit_equal(finished, tmp_path, data_dir):
  workdir = tmp_path / "run"
  stop(workdir, data_dir, signal.SIGTERM, 143)
  process = start(workdir, data_dir)
  wait_for_step(process, workdir, 8)
  process.kill()
  process.communicate()
  torn = min((workdir / "compilation_cache").glob("jit_local-*-cache"))
  os.truncate(torn, torn.stat().st_size - 1)
  status, _, err = train(workdir, data_dir)
  assert status == 0 and "resuming at step" in err, err
  assert f"{torn}: damaged; removed, and compiled anew" in err and "UserWarning" not in err, err
  assert_same_run(workdir, finished)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 8])
def test_killed_at_any_moment_it_ends_bit_equal(finished, tmp_path, data_dir, step):
  workdir = tmp_path / "run"
  process = start(workdir, data_dir)
  wait_for_step(process, workdir, step)
  process.kill()
  process.communicate()
  status, _, err = train(workdir, data_dir)
  assert status == 0, err
  assert_same_run(workdir, finished)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_goes_on_where_it_is(finished, tmp_path, data_dir, number, status):
  workdir = tmp_path / "run"
  step = stop(workdir, data_dir, number, status)
  again, _, err = train(workdir, data_dir)
  assert again == 0 and f"resuming at step {step}" in err, err
  assert_same_run(workdir, finished)


def stop(workdir, data_dir, number, status):
  """The step at which a run is saved that is told to stop."""
  process = start(workdir, data_dir)
  wait_for_step(process, workdir, 4)
  process.send_signal(number)
  _, err = process.communicate(timeout=60)
  assert process.returncode == status, err
  assert "Traceback" not in err
  steps = Checkpoints(workdir / "checkpoints").steps()
  assert steps[-1] >= 4 and steps[-1] == logged(workdir)[-1][0]
  assert not (workdir / "evaluation").exists()
  return steps[-1]


def test_each_program_is_compiled_once(finished):
  """The first validation finds in the cache what was compiled for it while the steps ran."""
  programs = list((finished / "compilation_cache").glob("jit_local-*-cache"))
  assert len(programs) == 2, programs  # the step, and what answers


def test_a_signal_while_the_last_step_of_a_phase_is_saved_stops_before_the_next(monkeypatch):
  ready = Compiled(lambda state, update: (state, {}), 0.0)
  work = types.SimpleNamespace(
      config=config.load_page(PAGE), signals=Signals(), checkpoints=None,
      compiling=types.SimpleNamespace(ask=lambda now: None, step=lambda now: ready),
      log=types.SimpleNamespace(begin=lambda *_: None, step=lambda *_, **__: None),
  )  # fmt: skip
  now = types.SimpleNamespace(
      phase="joint", begins=0, ends=2, common=None, put_train=lambda batch: batch
  )
  saved = []

  def save(work, now, state, step, validates):
    saved.append(step)
    assert work.signals.waits  # or it would be lost half-way
    work.signals._caught(signal.SIGTERM, None)

  monkeypatch.setattr(loop, "host_batches", lambda *_: iter([1, 2, 3]))
  monkeypatch.setattr(loop, "save", save)
  with pytest.raises(Stopped):
    loop.run_phase(work, now, types.SimpleNamespace(step=0))
  assert saved == [2]


@pytest.mark.parametrize(
    ("name", "step", "phase"),
    [
        ("smoke", 0, None),  # a first start: it may be refused still
        ("smoke", 4, "m"),
        ("smoke", 5, "a"),
        ("smoke", 15, None),  # nothing is left to train
        ("planted_region", 4, None),  # its state is of as many images as the data set has,
        ("planted_region", 7, None),  # with the map fixed too
    ],
)
def test_a_second_start_compiles_before_there_is_a_data_set(monkeypatch, name, step, phase):
  page = config.load_page(str(PAGES / f"{name}.py"))
  for own in page.phases.values():
    own.steps = 5
  checkpoints = types.SimpleNamespace(newest_meta=lambda: {"step": step} if step else None)
  begun = []
  compiling = types.SimpleNamespace(begin=lambda now: begun.append(now.phase))
  ahead = loop.begin_compiling(page, checkpoints, compiling)
  assert begun == ([phase] if phase else [])
  assert (ahead and ahead.phase) == phase
  if ahead:  # as it was built, and no other
    work = types.SimpleNamespace(ahead=ahead)
    assert loop.build(work, phase) is ahead
  begun.clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert not loop.begin_compiling(page, checkpoints, compiling) and not begun


def test_a_second_start_without_its_data_set_is_refused_before_it_compiles(tmp_path):
  page = config.load_page(str(PAGES / "smoke.py"), [("data.name", "csv")])
  page.data.dir = str(tmp_path)
  with pytest.raises(UserError, match="no data set csv in"):
    loop.begin_compiling(page, None, None)


def test_a_map_is_kept_though_its_steps_validation_is_stopped(monkeypatch):
  """A resumed run validates that step again, and does not come by the map any more."""
  ready = Compiled(lambda state, update: (state, {}), 0.0)
  kept = []
  work = types.SimpleNamespace(
      config=config.load_page(PAGE), signals=Signals(),
      compiling=types.SimpleNamespace(ask=lambda now: None, step=lambda now: ready),
      log=types.SimpleNamespace(begin=lambda *_: None, step=lambda *_, **__: None),
      directory=types.SimpleNamespace(keep_map=lambda step, weights: kept.append(step)),
  )  # fmt: skip
  work.config.attention = types.SimpleNamespace(kept=1)
  now = types.SimpleNamespace(
      phase="joint", begins=0, ends=2, common=True, config=work.config, put_train=lambda x: x,
      page=types.SimpleNamespace(steps=2),
  )  # fmt: skip

  def stopped(*_):
    raise Stopped(signal.SIGTERM)

  monkeypatch.setattr(loop, "host_batches", lambda *_: iter([1, 2, 3]))
  monkeypatch.setattr(loop, "save", stopped)
  with pytest.raises(Stopped):
    loop.run_phase(work, now, types.SimpleNamespace(step=0, constants={"map": None}))
  assert kept == [1, 2]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_noticed_and_passed_over(finished, copy, data_dir):
  newest = max((copy / "checkpoints").iterdir(), key=lambda p: int(p.name))
  largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  shutil.rmtree(copy / "evaluation")
  status, _, err = train(copy, data_dir)
  assert status == 0 and "damaged" in err and f"checkpoints/{STEPS}" in err, err
  assert_same_run(copy, finished)


def test_run_again_when_done_trains_nothing(copy, data_dir):
  before = (copy / "metrics.jsonl").read_bytes()
  status, _, err = train(copy, data_dir)
  assert status == 0 and "nothing to train" in err
  assert (copy / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.backbone", "resnet_local"),
        ("phases.joint.learning_rate", "1"),
        ("model.name", "zoom_in_net"),
        ("data.name", "nowhere"),
    ],
)
def test_another_run_is_refused(copy, data_dir, monkeypatch, key, value):
  monkeypatch.setattr(loop.jax, "device_count", lambda: 1)
  page = config.load_page(PAGE, [("data.dir", str(data_dir)), (key, value)])
  before = files(copy)
  with pytest.raises(UserError, match=key):
    loop.run(page, copy)
  assert files(copy) == before


def test_another_run_is_refused_by_one_line_and_harms_nothing(copy, data_dir):
  before = files(copy)
  status, _, err = train(copy, data_dir, "--config.seed=3")
  assert status == 2 and "seed" in err and "Traceback" not in err, err
  assert err.strip().splitlines()[-1].startswith("medattn: error: ")
  assert files(copy) == before


def files(folder):
  return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_second_training_is_refused_and_harms_nothing(copy, data_dir):
  before = files(copy)
  with Workdir(copy).lock():
    status, _, err = train(copy, data_dir)
  assert status == 2 and "another training" in err
  assert files(copy) == before


def test_a_loss_that_is_not_finite_is_an_error_with_its_step(tmp_path):
  log = loop.Log(tmp_path, config.load_page(PAGE))
  log.begin(types.SimpleNamespace(phase="joint"), 0)
  metrics = {"loss": np.float32("nan"), "parameter_norm": np.float32(1)}
  log.step(1, metrics, read_now=False)
  with pytest.raises(UserError, match=r"loss nan.* at step 1 of phase joint.*learning_rate"):
    log.step(2, metrics, read_now=False)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path, data_dir):
  status, _, err = train(tmp_path / "run", data_dir, "--config.phases.joint.learning_rate=1e30")
  assert status == 2 and "at step" in err and "learning_rate" in err and "Traceback" not in err
  assert not Checkpoints(tmp_path / "run" / "checkpoints").steps()
  assert not (tmp_path / "run" / "evaluation").exists()


def test_a_log_that_cannot_be_written_is_one_line_and_hides_no_other_error(tmp_path, monkeypatch):
  def full(*_):
    raise RuntimeError("{{node x}} /somewhere/events; No space left on device\nmore")

  (tmp_path / "file").mkdir()
  (tmp_path / "file" / "tensorboard").write_text("")
  with pytest.raises(UserError, match="tensorboard: events cannot be written"):
    loop.Log(tmp_path / "file", None).begin(None, 0)
  log = loop.Log(tmp_path, None)
  log.begin(None, 0)
  monkeypatch.setattr(type(log.events), "close", full)
  with pytest.raises(UserError, match="cannot be written: /somewhere/events; No space"):
    log.__exit__(None, None, None)
  log.__exit__(ValueError, ValueError(), None)  # raises nothing


@pytest.mark.parametrize(
    ("workdir", "steps", "words"), [("", 12, "workdir = ''"), ("run", 0, "steps is 0 in every")]
)
def test_nothing_to_train_or_nowhere_is_refused(tmp_path, monkeypatch, workdir, steps, words):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(loop.jax, "device_count", lambda: 1)
  with pytest.raises(UserError, match=words):
    loop.run(config.load_page(PAGE, [("phases.joint.steps", str(steps))]), workdir)
  assert not list(tmp_path.iterdir())


def test_a_config_that_another_version_wrote_is_named(tmp_path):
  page = config.load_page(PAGE)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  checkpoints.save(1, {"w": np.zeros(2)}, {"step": 1, "config": {"seed": 0}})
  checkpoints.wait()
  with pytest.raises(UserError, match=r"the run that is there: phases is missing"):
    continuation.refuse_strangers(Workdir(tmp_path), page, checkpoints)
  assert not (tmp_path / "config.json").exists()


def test_levels_that_the_model_has_not_are_refused_before_the_first_step():
  levels = {"train": np.array([[1, -1]]), "test": np.array([[0, 3]]), "none": np.zeros((0, 2), int)}
  dataset = types.SimpleNamespace(name="d", splits=levels, levels=levels.get)
  assert loop.check_splits(dataset, 4)
  with pytest.raises(UserError, match=r"split test, has level 3; accepted: at least 4"):
    loop.check_splits(dataset, 3)


def test_a_set_without_a_split_to_train_on_is_refused_without_one_to_grade_it_is_said(capsys):
  some = types.SimpleNamespace(name="d", folder="f", levels=lambda split: np.zeros((1, 2), int))
  some.splits = {"validation": 1, "test": 1}
  with pytest.raises(UserError, match="d in f has no split train, only validation, test"):
    loop.check_splits(some, 5)
  some.splits = {"train": 1}
  assert not loop.check_splits(some, 5)
  assert "neither a test nor a validation split: nothing is evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.data.name=nowhere"], "nowhere"),
        (["--config.model.num_classes=2"], "model.num_classes = 2"),
    ],
)
def test_a_first_training_that_is_refused_leaves_no_trace(tmp_path, data_dir, flags, words):
  status, _, err = train(tmp_path / "runs" / "new", data_dir, *flags)
  assert status == 2 and words in err and "Traceback" not in err, err
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_device_count_goes_on(finished, tmp_path, data_dir):
  workdir = tmp_path / "run"
  process = start(workdir, data_dir)
  wait_for_step(process, workdir, 4)
  process.send_signal(signal.SIGTERM)
  process.communicate()
  status, _, err = train(workdir, data_dir, devices=2)
  assert status == 0 and "resuming" in err, err
  np.testing.assert_allclose(
      [loss for *_, loss in logged(workdir)], [loss for *_, loss in logged(finished)], rtol=1e-3
  )


def test_a_batch_that_does_not_divide_over_the_devices(tmp_path, data_dir):
  status, _, err = train(tmp_path / "run", data_dir, devices=3)
  assert status == 2 and "data.batch_size" in err and "a multiple of 3" in err
  assert not (tmp_path / "run").exists()
