"""The count of collectives: what a step of a real page holds, and what is told of one that breaks
the rule."""

import json
import pathlib
import sys

import pytest

from benchmarks import collectives
from medattn_jax import config

PAGE = str(pathlib.Path(__file__).parents[1] / "pages" / "tiny_map.py")


@pytest.fixture(scope="module")
def rows():
  """The phase that learns the map, on four devices."""
  page = config.to_dict(config.load_page(PAGE, []))
  return collectives.compiled("tiny_map", page, ["joint"], [4])


def test_gradients_are_reduced_once_and_the_map_once(rows):
  (four,) = rows
  assert (four["devices"], four["batch"]) == (4, 16)
  assert four["collectives"] == {"all-reduce": 2} and four["allowed"] == 2
  # Nobody reads the map of the step before: it is no input that could be donated.
  assert four["unread"] == 1 and four["donated"] == four["leaves"] - 1
  assert collectives.faults(four) == []
  text = collectives.table(rows)
  assert "2 all-reduce" in text and "global" not in text


@pytest.mark.parametrize(("changed", "said"), [
  ({"collectives": {"all-reduce": 3}}, "3 all-reduces, 2 accepted"),
  ({"collectives": {"all-reduce": 2, "all-gather": 4}}, "4 all-gather"),
  ({"inside": 1}, "1 collectives in a loop"), ({"donated": 3}, "that it reads, 3 donated"),
  ({"unread": 0}, "donated")])
def test_what_must_not_be_is_told(rows, changed, said):
  (line,) = collectives.faults({**rows[0], **changed})
  assert said in line and line.startswith("tiny_map, phase joint, 4 devices")


def call(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["collectives", *words])
  with pytest.raises(SystemExit) as ended:
    collectives.main()
  return ended.value.code


@pytest.mark.parametrize(("words", "said"), [
  (["--devices=1,x"], "--devices=1,x"), (["--phases=m"], "--phases: accepted with --config"),
  (["--config.seed=1"], "--config.seed=1: accepted with --config"),
  ([f"--config={PAGE}", "--phases=m"], "--phases=m; accepted for global_attention"),
  ([f"--config={PAGE}", "--devices=3"], "does not divide over 3 devices")])
def test_a_mistake_is_one_line(words, said, monkeypatch, capsys):
  assert call(monkeypatch, *words) == 2
  error = capsys.readouterr().err
  assert said in error and error.startswith("benchmarks.collectives: ") and error.count("\n") == 1


@pytest.mark.slow
def test_every_model_keeps_the_rule(monkeypatch, capsys):
  assert call(monkeypatch, "--json") == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert len(rows) == 18 and all(row["images_per_second"] is None for row in rows)
  assert {(row["config"]["page"], row["config"]["phase"]) for row in rows} == {
    ("zoom_in_net", "m"), ("zoom_in_net", "a"), ("zoom_in_net", "c"), ("m_net", "joint"),
    ("global_attention", "joint"), ("global_attention", "frozen")}


def test_what_is_summed_is_drawn(tmp_path):
  rows = [{"config": {"page": "m_net", "phase": "joint"}, "devices": n,
           "collectives": {"all-reduce": 1} if n > 1 else {}, "wire_bytes": {"f32": 4000}}
          for n in (1, 2, 8)]
  collectives.plot(rows, tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 5000
