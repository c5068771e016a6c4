"""The benchmarks of steps: they start where only JAX is, and their numbers fit one another."""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks import breakdown, pages, rows, scaling, step, steps
from medattn_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
# None in sys.modules: importing it fails as if it were not installed.
BARE = """
import runpy, sys
for name in ("tensorflow", "tensorflow_datasets", "clu", "ml_collections", "sklearn", "orbax"):
  sys.modules[name] = None
sys.argv[0] = "benchmarks.step"
runpy.run_module("benchmarks.step", run_name="__main__")
"""
KEYS = {"name", "config", "devices", "device_kind", "batch", "dtype", "compile_seconds", "step_ms",
        "images_per_second", "flops_per_step", "mfu", "peak_memory_bytes", "input_bound"}


def run(*words):
  return subprocess.run(
    [sys.executable, "-c", BARE, "--models=cnn", "--batch=2", "--image-size=16", "--rounds=2",
     "--devices=2", *words],
    cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_it_starts_where_only_jax_is(tmp_path):
  done = run("--json", f"--plot={tmp_path / 'step.png'}")
  assert done.returncode == 0, done.stderr
  (row,) = map(json.loads, done.stdout.splitlines())
  assert row.keys() >= KEYS and row["mfu"] is None and row["devices"] == 2
  assert row["step_ms"]["min"] <= row["step_ms"]["median"] <= row["step_ms"]["max"]
  assert row["images_per_second"] == pytest.approx(4000 / row["step_ms"]["min"], rel=1e-3)
  assert row["collectives"] == {"all-reduce": 1}
  bound = 1000 * max(row["flops_per_step"] / 2 / row["matmul_flops_per_second"],
                     row["bytes_per_device"] / row["copy_bytes_per_second"])
  assert row["roofline_ms"] == pytest.approx(bound, rel=1e-2)
  assert row["step_over_roofline"] == pytest.approx(row["step_ms"]["min"] / bound, rel=1e-2)
  assert (tmp_path / "step.png").stat().st_size > 1000


def test_operations_are_counted_on_the_hosts_cpu(monkeypatch):
  """Whatever the step's own devices are: a GPU's plug-in counts none."""
  page = pages.adapted(pages.named("cnn"), batch=2, image_size=16)
  there, wanted = jax.devices, steps.flops(page, "joint")
  monkeypatch.setattr(steps, "_COUNTED", {})
  monkeypatch.setattr(jax, "devices", lambda *which: there(*which) if which == ("cpu",) else [])
  assert steps.flops(page, "joint") == wanted > 0

  def hidden(*which):
    raise RuntimeError("no such platform")

  monkeypatch.setattr(steps, "_COUNTED", {})
  monkeypatch.setattr(jax, "devices", hidden)
  with pytest.raises(UserError, match="accepted: with cpu after a comma"):
    steps.flops(page, "joint")


@pytest.mark.parametrize("flag", ["--models=resnet5", "--phases=x", "--parallel=xmap",
                                  "--dtypes=int8"])
def test_a_bad_flag_is_one_line(flag, capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["step", "--models=cnn", "--image-size=16", flag])
  with pytest.raises(SystemExit) as left:
    step.main()
  said = capsys.readouterr().err
  assert left.value.code == 2 and said.count("\n") == 1 and "accepted: " in said


def test_flops_are_those_of_all_small_batches_on_all_devices():
  page = pages.adapted(
    pages.named("cnn"), devices=2, batch=4, image_size=16, precision="float32", accumulation=3)
  whole = steps.flops(page, "joint", 2)
  page.data.batch_size, page.phases.joint.accumulation = 2, 1
  assert whole == 6 * steps.flops(page, "joint")


def test_a_workspace_is_no_traffic():
  text = """HloModule m
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %c = (f32[8]{0}, u8[1000]{0}) custom-call(%a), custom_call_target="__cudnn$convForward"
  ROOT %r = f32[8]{0} get-tuple-element(%c), index=0
}
"""
  assert steps.moved(text) == 64


@pytest.mark.slow
def test_what_is_joined_is_what_the_program_gives():
  flags = argparse.Namespace(
    model="cnn", phase=None, devices="2", batch=2, image_size=16, dtype="float32", rounds=1,
    steps=1, size="small", chip="v5e", step_ms=10.0, most=4)
  found = scaling.measure(flags)
  assert [(one["scaling"], one["devices"], one["batch"]) for one in found] == [
    ("weak", 2, 4), ("strong", 2, 4)]
  assert found[1]["wire_bytes"] == {"f32": found[1]["vector_bytes"]}
  assert found[0]["step_ms"] is None and found[0]["efficiency"] is None
  lines = scaling.modelled(found, flags, scaling.chips.target("v5e"))
  assert [one["devices"] for one in lines] == [1, 2, 4]
  wire, link = found[1]["vector_bytes"], scaling.chips.CHIPS["v5e"].link
  assert lines[2]["all_reduce_ms"] == pytest.approx(
    1000 * (1.5 * wire / link + 10e-6), rel=1e-3)
  assert lines[2]["efficiency"] == pytest.approx(10 / (10 + lines[2]["all_reduce_ms"]), rel=1e-3)
  text = scaling.table([*found, *lines])
  assert "A MODEL of v5e" in text and "1 all-reduce" in text
  (gpus,) = [one for one in scaling.modelled(
    found, argparse.Namespace(**{**vars(flags), "most": 16}), scaling.chips.target("h100"))
    if one["devices"] == 16]
  assert gpus["all_reduce_ms"] == pytest.approx(
    1000 * (2 * 7 / 8 * wire / 450e9 + wire / 8 / 50e9 + 10e-6), rel=1e-3)


@pytest.mark.slow
def test_the_parts_are_those_of_the_step():
  flags = argparse.Namespace(
    model="demo", phase="a", devices=1, batch=1, image_size=32, dtype="float32", rounds=1, steps=1,
    size="small")
  found = {one["config"]["part"]: one for one in breakdown.measure(flags)}
  assert list(found) == ["view", "M-Net", "A-Net", "optimiser", "sum of the parts", "whole"]
  parts = list(found.values())[:-2]
  assert found["sum of the parts"]["step_ms"]["min"] == pytest.approx(
    sum(one["step_ms"]["min"] for one in parts), rel=1e-2)
  whole = found["whole"]["flops_per_step"]
  assert sum(one["flops_per_step"] for one in parts) == pytest.approx(whole, rel=0.1)
  assert "optimiser" in breakdown.table(list(found.values()))


@pytest.mark.slow
def test_the_parts_of_the_last_phase():
  """Crops come from where the selection says, and C-Net's gradient reaches M-Net's features."""
  page = pages.adapted(pages.named("demo"), batch=1, image_size=32, precision="float32")
  now = steps.build(page, "c", jax.devices()[:1])
  image = jax.numpy.asarray(steps.host_batches(now)[0]["image"])
  state = jax.device_get(now.initial())
  parts = {one.name: one for one in breakdown.parts(now, state, image)}
  assert list(parts) == ["view", "M-Net", "A-Net", "selection", "crops", "C-Net"]
  assert parts["crops"].given[1].shape == (2, 4, 2)
  assert [one.name for one in parts.values() if one.learns] == ["M-Net", "A-Net", "C-Net"]
  function, given = breakdown.differentiated(parts["C-Net"])
  (gradients,) = jax.eval_shape(function, (), given)[1][2]
  assert gradients[1].shape == parts["C-Net"].given[1].shape


def test_a_table_is_as_wide_as_its_cells():
  text = rows.table(("a", "long head"), [("x", 1234.5), ("yyyy", None), ("z", 0.12345)])
  assert text.splitlines() == [
    "a     long head", "x          1234", "yyyy          –", "z         0.123"]
  with pytest.raises(UserError, match="accepted: numbers with commas"):
    steps.devices("1,b")
