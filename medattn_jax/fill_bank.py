"""The bank of a run, filled from the training split of its data set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import ml_collections
import numpy as np

from medattn_jax import bank, console, experiment, models, sharding

if TYPE_CHECKING:
  from medattn_jax.data.stored import DataSet


def check(config: ml_collections.ConfigDict, dataset: DataSet) -> None:
  """Raises UserError unless the run's bank, if it has one, can be made and fits the devices."""
  for phase in experiment.phases(config):
    if _reads_bank(config, phase):
      _numbers(config, dataset)


def of_phase(
  config: ml_collections.ConfigDict, phase: str, dataset: DataSet
) -> bank.Bank | None:
  """The bank that a phase trains with, on all devices; None where it reads none.

  Raises:
    UserError: as `check`, and where the data set is damaged.
  """
  if not _reads_bank(config, phase):
    return None
  start = time.monotonic()
  numbers, rows = _numbers(config, dataset)
  data, mesh = config.data, sharding.mesh()
  if config.attention.source == "stats":
    levels = dataset.photo_levels("train")[numbers]
    made = bank.class_statistics(
      _photographs(config, dataset, numbers), levels, config.model.num_classes, rows, mesh)
  else:
    own = bank.own_images(rows, len(numbers), data.channels)
    made = bank.fill(
      _photographs(config, dataset, numbers[own.start : own.stop]), rows, len(numbers),
      data.full_size, data.channels, mesh)
  console.say(f"bank of {len(numbers)} images: {made.arrays['images'].nbytes / 2**20:.1f} MiB over "
              f"{mesh.size} devices, made in {time.monotonic() - start:.1f} s")
  return made


def _reads_bank(config: ml_collections.ConfigDict, phase: str) -> bool:
  common = models.common(config, phase)
  return bool(common and config.phases[phase].steps and "bank" in common.reads)


def _numbers(
  config: ml_collections.ConfigDict, dataset: DataSet
) -> tuple[np.ndarray, int]:
  """Which photographs of the training split the bank holds, and its rows."""
  source, data = config.attention.source, config.data
  numbers = bank.choose(source, dataset.photo_levels("train"), config.seed)
  rows = experiment.bank_rows(config, len(numbers))
  bank.check_fits(source, rows, data.full_size, data.channels, sharding.mesh())
  return numbers, rows


def _photographs(
  config: ml_collections.ConfigDict, dataset: DataSet, numbers: np.ndarray
) -> Iterator[np.ndarray]:
  from medattn_jax.data import pipeline  # imports TensorFlow

  return pipeline.photographs(
    dataset, "train", numbers, full_size=config.data.full_size, channels=config.data.channels)
