"""The reader of programs for chips that are not here: its table, its files, its one-line errors."""

import json
import pathlib
import sys

import pytest

from benchmarks import aot
from medattn_jax.programs import chips

PAGE = str(pathlib.Path(__file__).parents[1] / "pages" / "tiny_map.py")


def call(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["aot", f"--config={PAGE}", *words])
  with pytest.raises(SystemExit) as ended:
    aot.main()
  return ended.value.code


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """One step compiled for two devices of a CPU: the folder of all that was written."""
  folder = tmp_path_factory.mktemp("aot")
  with pytest.MonkeyPatch.context() as patch:
    assert call(
      patch, "--phase=frozen", "--target=cpu:2", "--by-scope=5", "--depth=2",
      "--config.norm.group_size=4", f"--save={folder / 'before.json'}",
      f"--plot={folder / 'new' / 'figure.png'}", f"--text={folder / 'text'}",
      f"--account={folder / 'new' / 'account.md'}") == 0
  return folder


def test_everything_that_is_asked_for_is_written(saved):
  (row,) = json.loads((saved / "before.json").read_text())
  assert row["config"]["overrides"] == ["--config.norm.group_size=4"]
  assert row["collectives"] == {"all-reduce": 1} and row["donated"] == row["leaves"]
  assert len(row["places"]["singles"]) == 5
  assert all(one["place"].count("/") <= 1 for one in row["places"]["shares"])
  assert (saved / "new" / "figure.png").stat().st_size > 5000
  assert (saved / "text" / "frozen_cpu_2.txt").read_text().startswith("HloModule")


def test_before_and_after_stand_side_by_side(saved):
  (before,) = aot.load(saved / "before.json")
  after = {**before, "bytes_accessed": before["bytes_accessed"] / 2, "temporaries": None}
  lines = aot.table([after], [before]).splitlines()
  assert lines[0].split() == ["frozen", "cpu:2", "before", "after", "ratio"]
  cells = {line[:22].strip(" ,").split(",")[0]: line.split()[-1] for line in lines[1:]}
  assert cells["bytes accessed"] == "0.500" and cells["FLOPs"] == "1.000"
  assert cells["donated buffers"] == "1.000"
  (temporaries,) = [line for line in lines if line.startswith("temporaries")]
  assert len(temporaries.split()) == 3  # no ratio of what is not there
  assert "a model from data sheets, not a measurement" in lines[-1]
  other = {**after, "target": "cpu:8"}
  assert "ratio" not in aot.table([other], [before])


def test_places_add_up(saved):
  (row,) = aot.load(saved / "before.json")
  lines = aot.scopes(row["places"], shown=3).splitlines()
  percents = [float(line.split("%")[0]) for line in lines if "%" in line]
  assert sum(percents[:3]) == pytest.approx(100, abs=0.2)  # forward, backward, rest
  assert sum(percents[3:7]) == pytest.approx(100, abs=0.3)  # three places and the rest
  assert "instruction by instruction" in lines


def test_an_account_holds_everything(saved):
  (row,) = aot.load(saved / "before.json")
  written = (saved / "new" / "account.md").read_text()
  one_by_one, by_kind = written.split("| kind |")
  assert written.startswith("## frozen cpu:2")

  def cells(line):
    return [cell.strip().replace(",", "") for cell in line.strip("| ").split(" | ")]

  lines = [cells(line) for line in one_by_one.splitlines() if line.startswith("| ")]
  _, *listed, _, every = lines
  total = row["places"]["total"] / 1e6
  assert every[5] == "all" and float(every[1]) == pytest.approx(total, abs=0.01)
  assert sum(float(line[1]) for line in listed) >= 0.79 * total
  (last,) = [cells(line) for line in by_kind.splitlines() if line.startswith("| all |")]
  assert float(last[2]) == float(every[1])
  assert f"XLA itself says {row['bytes_accessed'] / 1e6:.0f} MB" in written.replace(",", "")


def test_what_does_not_fit_is_said(saved):
  (row,) = aot.load(saved / "before.json")
  refused = {key: value for key, value in row.items() if key not in (
    "collectives", "synchronous", "inside", "wire_bytes", "donated", "arguments", "temporaries")}
  refused |= {"fits": False, "peak_memory_bytes": 17_000_000_000, "memory_bytes": 16_911_433_728}
  text = aot.table([refused], None)
  assert "DOES NOT FIT: 17 of 16.9 GB" in text and "donated" not in text


@pytest.mark.parametrize(("words", "said"), [
  (["--target=v9"], "target 'v9'"), (["--target=cpu:2", "--phase=m"], "--phase=m; accepted for "),
  (["--target=cpu:2", "--config.data.bach_size=3"], "did you mean data.batch_size"),
  (["--target=cpu:2", "--what=3"], "unknown argument --what=3"),
  (["--target=cpu:2", "--against=gone.json"], "--against=gone.json"),
  (["--target=cpu:2", f"--against={PAGE}"], "a file that --save wrote")])
def test_a_mistake_is_one_line(words, said, monkeypatch, capsys):
  assert call(monkeypatch, *words) == 2
  error = capsys.readouterr().err
  assert said in error and error.startswith("benchmarks.aot: ") and error.count("\n") == 1


def test_a_plug_in_that_is_missing_is_said_before_anything_is_compiled(monkeypatch, capsys):
  real = chips.importlib.util.find_spec
  monkeypatch.setattr(
    chips.importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name))
  assert call(monkeypatch, "--target=cpu:2,v5e") == 2
  assert capsys.readouterr().err.startswith("benchmarks.aot: --target=v5e: libtpu is not installed")
