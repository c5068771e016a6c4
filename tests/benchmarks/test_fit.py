"""The search for the largest batch: exact whatever the peaks, and in few compilations."""

import json
import pathlib
import sys
import types

import pytest

from benchmarks import fit

PAGE = str(pathlib.Path(__file__).parents[1] / "pages" / "tiny_map.py")
ROOM = 1_000_000


def searched(peak, unit=1, most=4096, room=ROOM, told=True):
  """What was tried where `peak(images)` bytes are needed; `told`: also of what does not fit."""

  def attempt(images):
    fits = peak(images) <= ROOM
    return fit.Try(images, fits, peak(images) if fits or told else None)

  tried = fit.search(attempt, unit, most, room)
  assert len({one.images for one in tried}) == len(tried)  # nothing twice
  return max((one.images for one in tried if one.fits), default=0), len(tried)


def true(peak, unit, most):
  return max((n for n in range(unit, most + 1, unit) if peak(n) <= ROOM), default=0)


SHAPES = {
  "a line": lambda n: 5000 + 3001 * n, "a steep line": lambda n: 100_000 + 90_000 * n,
  "a flat line": lambda n: 900_000 + 31 * n, "steps": lambda n: 20_000 * (n // 7 + 1) + 800 * n,
  "that bends up": lambda n: 1000 * n + 9 * n * n, "that bends down": lambda n: int(9e4 * n**0.5),
  "no more at first": lambda n: max(300_000, 2000 * n), "nothing": lambda n: 2_000_000,
  "one": lambda n: 600_000 * n, "all": lambda n: 10 * n,
  # What a compiler does near its limit: it computes twice, and needs less for a while.
  "spared": lambda n: 4000 * n if n < 240 else max(970_000, 3300 * n)}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("unit", [1, 2, 6])
@pytest.mark.parametrize("name", SHAPES)
def test_it_finds_the_largest_that_fits(name, unit, told):
  peak = SHAPES[name]
  found, count = searched(peak, unit, told=told)
  assert found == true(peak, unit, 4096)
  assert count <= 24


@pytest.mark.parametrize("room", [ROOM, None])
def test_a_line_is_found_in_few_compilations(room):
  found, count = searched(SHAPES["a line"], room=room)
  assert found == 331
  assert count <= (5 if room else 20)


def test_it_stops_where_it_is_told_to():
  assert searched(SHAPES["all"], unit=4, most=30)[0] == 28
  assert searched(SHAPES["all"], unit=40, most=30) == (0, 0)


def row(**changed):
  return {"phase": "m", "target": "h200:8", "remat": "blocks", "images_per_chip": 6, "unit": 2,
          "batch_size": 24, "devices": 8, "accepted_bytes": 139e9, "more_may_fit": False,
          "tried": [{"images": 6, "fits": True, "needs": 130e9},
                    {"images": 8, "fits": False, "needs": None}], **changed}


def test_the_answer_names_the_key_of_the_page():
  assert fit.words(row()).splitlines()[0] == (
    "m on h200:8, remat blocks: 6 images a chip: data.batch_size = 24 on 8 of them")
  assert "perhaps more (--most)" in fit.words(row(more_may_fit=True))
  assert "not even 2 images fit" in fit.words(row(images_per_chip=0))


def call(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["fit", f"--config={PAGE}", *words])
  with pytest.raises(SystemExit) as ended:
    fit.main()
  return ended.value.code


@pytest.mark.parametrize(("words", "said"), [
  (["--target=here"], "a chip's name, or cpu:N"), (["--target=v5e:9"], "topology '9'"),
  (["--target=cpu:2", "--phase=a"], "--phase=a; accepted for global_attention: joint, frozen"),
  (["--target=cpu:2", "--remat=none,block"],
   "--remat=block (did you mean blocks?); accepted: none, elementwise, blocks"),
  (["--target=cpu:2", "--most=1"], "--most=1; accepted: at least 2")])
def test_a_mistake_is_one_line(words, said, monkeypatch, capsys):
  assert call(monkeypatch, *words) == 2
  error = capsys.readouterr().err
  assert said in error and error.startswith("benchmarks.fit: ") and error.count("\n") == 1


@pytest.mark.slow
def test_batches_are_compiled_as_the_page_has_them(monkeypatch, capsys):
  """Two images a device are the least that the page's group allows; two devices have four."""
  assert call(monkeypatch, "--target=cpu:2", "--most=2", "--json") == 0
  (found,) = map(json.loads, capsys.readouterr().out.splitlines())
  assert (found["images_per_chip"], found["batch_size"], found["unit"]) == (2, 4, 2)
  assert found["more_may_fit"] and found["tried"][0]["needs"] > 1000


def test_each_way_to_keep_activations_is_searched(monkeypatch, capsys):
  """With the page's own where none is named; the compiler is told which."""
  from medattn_jax import forecast

  asked = []

  def of(page, phase, target):
    mode, images = page.phases[phase].remat, page.data.batch_size // target.count
    asked.append(mode)
    needs = images * {"none": 4, "elementwise": 2, "blocks": 1}[mode]
    return types.SimpleNamespace(fits=needs <= 40, needs=needs, kind="cpu", memory=40)

  monkeypatch.setattr(forecast, "of", of)
  assert call(monkeypatch, "--target=cpu:2", "--remat=blocks,none", "--json") == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [(row["remat"], row["images_per_chip"]) for row in rows] == [("blocks", 40), ("none", 10)]
  asked.clear()
  assert call(monkeypatch, "--target=cpu:2", "--config.phases.frozen.remat=elementwise") == 0
  assert set(asked) == {"elementwise"}
  assert "frozen on cpu:2, remat elementwise: 20 images a chip" in capsys.readouterr().out


@pytest.mark.slow
def test_a_tpus_compiler_decides(monkeypatch, capsys):
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from medattn_jax.programs import chips

  if reason := chips.missing(chips.target("v5e")):
    pytest.skip(reason)
  large = [f"--config.data.{side}=96" for side in ("image_size", "full_size")]
  call_it = ("--target=v5e", "--json", "--most=65536", "--config.norm.group_size=8192", *large)
  assert call(monkeypatch, *call_it) == 0
  (found,) = map(json.loads, capsys.readouterr().out.splitlines())
  fits = {one["images"]: one["fits"] for one in found["tried"]}
  assert fits[found["images_per_chip"]] and not fits[found["images_per_chip"] + 8192]


def test_what_was_tried_is_drawn(tmp_path):
  tried = [{"images": 8 * n, "fits": n < 3, "needs": n * 10**9 if n < 3 else None}
           for n in (1, 2, 3)]
  row = {"target": "v5e", "remat": "none", "tried": tried, "accepted_bytes": 2 * 10**9,
         "config": {"file": "page.py"}, "phase": "c"}
  fit.plot([row, {**row, "accepted_bytes": None}], tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 5000
