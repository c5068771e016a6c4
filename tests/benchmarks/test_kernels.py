"""A step's time by the instructions of its program: every nanosecond is booked, and once."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import kernels
from benchmarks.kernels import Event
from medattn_jax.programs import traffic


def call(monkeypatch, capsys, *words):
  monkeypatch.setattr(sys, "argv", [
    "kernels", "--models=cnn", "--batch=2", "--image-size=32", "--steps=2", *words])
  kernels.main()
  return capsys.readouterr().out


def test_a_step_on_a_cpu(monkeypatch, capsys, tmp_path):
  text = call(monkeypatch, capsys, "--rows=5", f"--plot={tmp_path / 'kernels.png'}")
  row = json.loads(text.splitlines()[-1])
  assert (row["name"], row["devices"], row["config"]["phase"]) == ("kernels", 1, "joint")
  assert len(row["largest"]) == 5 and row["busy_ms"] > 0
  for gathered in (row["kinds"], row["places"]):
    assert sum(one["milliseconds"] for one in gathered) == pytest.approx(row["busy_ms"], rel=1e-2)
    assert sum(one["calls"] for one in gathered) == pytest.approx(row["kernels"], rel=1e-2)
  assert {"convolution", "elementwise"} <= {one["kind"] for one in row["kinds"]} <= {
    *kernels.KINDS}
  assert {"forward", "backward", "rest"} == {one["direction"] for one in row["places"]}
  assert any(one["place"].startswith("backbone/") for one in row["places"])
  assert "% of copies" in text and row["largest"][0]["name"] in text
  assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_a_phase_that_is_not_there_is_one_line(monkeypatch, capsys):
  with pytest.raises(SystemExit) as ended:
    call(monkeypatch, capsys, "--phase=c")
  assert ended.value.code == 2
  assert "--phase=c; accepted for cnn: joint" in capsys.readouterr().err


def test_what_runs_within_another_is_not_counted_twice():
  """A loop's operation holds those of its body; another line's are its own."""
  given = [Event("a", "body", None, 2, 3), Event("a", "loop", None, 1, 10),
           Event("a", "body", None, 6, 4), Event("a", "inner", None, 7, 1),
           Event("a", "next", None, 11, 5), Event("b", "other", None, 3, 2)]
  found = {(one.name, one.start): one.length for one in kernels.alone(given)}
  assert found == {("loop", 1): 3, ("body", 2): 3, ("body", 6): 3, ("inner", 7): 1,
                   ("next", 11): 5, ("other", 3): 2}


def test_a_gpus_kernels_bear_their_instructions_names():
  """Dots and dashes become underscores; a command buffer hides the operation, and a library's
  kernels have names of their own."""
  text = jax.jit(lambda x: jnp.tanh(x) + 1).lower(jnp.ones((64, 64))).compile().as_text()
  program, entry = traffic.parse(text)
  (fusion,) = (one.name for _, one, _ in traffic.run(program, entry, 1) if one.kind == "fusion")
  bare = fusion.replace(".", "_").replace("-", "_")
  given = [Event("Stream #1", name, operation, 1e9 * place, length) for place, (
    name, operation, length) in enumerate([
      (bare, "command_buffer.1", 40e6), (bare, None, 20e6), ("nvjet_hsh_192x192", None, 10e6),
      ("sm90_xmma_fprop_implicit_gemm", "command_buffer.1", 6e6), ("MemcpyD2D", None, 4e6),
      ("ncclDevKernel_AllReduce", None, 2e6), ("wrapped_convert_77", None, 1e6)])]
  found = kernels.book(given, text, steps=2)
  assert [(one.kind, one.milliseconds, one.calls) for one in found] == [
    ("elementwise", 30, 1), ("matrix product", 5, 0.5), ("convolution", 3, 0.5), ("copy", 2, 0.5),
    ("collective", 1, 0.5), ("other", 0.5, 0.5)]
  assert found[0].name == fusion and found[0].moved == 2 * 4 * 64 * 64
  assert {one.moved for one in found[1:]} == {None}


def test_a_library_within_xla_has_its_name_behind_the_instructions():
  text = jax.jit(lambda x: jnp.tanh(x) + 1).lower(jnp.ones((64, 64))).compile().as_text()
  program, entry = traffic.parse(text)
  (fusion,) = (one.name for _, one, _ in traffic.run(program, entry, 1) if one.kind == "fusion")
  (found,) = kernels.book(
    [Event("a thread", f"{fusion}__onednn$matmul", f"{fusion}__onednn$matmul", 0, 2e6)], text, 2)
  assert (found.name, found.kind, found.milliseconds) == (fusion, "elementwise", 1)
