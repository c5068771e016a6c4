"""The pipeline's numbers follow from what was timed."""

import argparse
import sys

import pytest

from benchmarks import pipeline


def row(**changes):
  flags = {"image_size": 400, "threads": None, "rounds": 3, "batch": 4, "steps": 10,
           "device_rate": None, "decoded": False} | changes
  rounds = [((2.0, 3.0), (1.6, 2.5), (1.6, 2.0)), ((1.0, 2.0), (1.0, 2.0), (0.8, 1.0)),
            ((2.0, 2.0), (2.5, 1.6), (2.5, 1.6))]
  return pipeline.found(rounds, 80, argparse.Namespace(**flags), 1234.4)


def test_rates_are_of_the_clock_and_of_a_core():
  found = row()
  assert found["images_per_second"] == 40 and found["bare"] == 50
  assert found["images_per_second_per_core"] == 40 and found["bare_per_core"] == 40
  assert found["cost_over_bare"] == {"min": 0.8, "median": 1.0, "max": 1.25}
  assert found["processor_cost_over_bare"] == 1.2
  assert found["decoder"] == found["decoder_per_core"] == 50
  assert found["cost_over_decoder"] == {"min": 0.8, "median": 1.25, "max": 1.25}
  assert found["processor_cost_over_decoder"] == 1.5
  assert found["step_ms"] == {"min": 100, "median": 200, "max": 200}
  assert found["input_bound"] is None and "accelerator" not in pipeline.table(found)


@pytest.mark.parametrize(
  ("rate", "bound", "cores"), [(39, False, 1), (41, True, 2), (400, True, 10)])
def test_an_accelerator_asks_for_cores(rate, bound, cores):
  found = row(device_rate=rate)
  assert found["input_bound"] is bound and found["cores_for_device_rate"] == cores
  words = f"one accelerator at {rate} images/s needs {cores} such cores; "
  assert words + ("the input" if bound else "the step") in pipeline.table(found)


def test_what_is_kept_decoded_is_named():
  assert "kept decoded" in pipeline.table(row(decoded=True))
  assert "kept decoded" not in pipeline.table(row())


def test_a_rate_of_nothing_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["pipeline", "--device-rate=0"])
  with pytest.raises(SystemExit) as left:
    pipeline.main()
  assert left.value.code == 2 and "accepted: a number above zero" in capsys.readouterr().err
