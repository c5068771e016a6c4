"""A flag that is none is told before anything is measured."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import rows


@pytest.mark.parametrize(
  ("kind", "good", "bad"),
  [
    (rows.count, "12", ("0", "-1", "x", "1.5", "²", "")),
    (rows.above_zero, ".5", ("0", "-1", "x", "nan", "inf", "")),
  ])
def test_numbers_are_above_zero(kind, good, bad):
  assert kind(good) == float(good)
  for text in bad:
    with pytest.raises(argparse.ArgumentTypeError, match=r"accepted: a .*number above zero"):
      kind(text)


def test_a_file_that_can_be_written_is_not_made_yet_and_none_is_lost(tmp_path):
  new, old = tmp_path / "new" / "figure.png", tmp_path / "old.json"
  old.write_text("{}")
  assert rows.drawn(str(new)) == new and not new.exists() and new.parent.is_dir()
  assert rows.written(str(old)) == old and old.read_text() == "{}"
  for text, why in ((old / "below.png", "exists|not a directory"), (tmp_path, "is a directory")):
    with pytest.raises(argparse.ArgumentTypeError, match=f"(?i){why}"):
      rows.written(str(text))
  with pytest.raises(argparse.ArgumentTypeError, match=r"ends in \.png"):
    rows.drawn(str(tmp_path / "figure.doc"))
