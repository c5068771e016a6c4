"""Predictions of models that never were, as files; and one model, opened and compiled once."""

import csv

import numpy as np
import pytest


def _rows(patients, seed, skill, chance, classes):
  rng = np.random.default_rng(seed)
  level = np.repeat(rng.integers(0, classes, patients), 2)
  level = np.where(rng.random(2 * patients) < 0.7, level, rng.integers(0, classes, 2 * patients))
  seen = level + np.random.default_rng(chance).normal(0, 1 / skill, 2 * patients)
  logits = -np.abs(np.arange(classes) - seen[:, None]) * 1.5
  p = np.exp(logits)
  p = np.round(p / p.sum(1, keepdims=True) * 2**20)
  p[np.arange(len(p)), p.argmax(1)] += 2**20 - p.sum(1)
  return level, p / 2**20


@pytest.fixture(scope="session")
def make_predictions(tmp_path_factory):
  """make(patients, seed, skill): the path of a predictions.csv of both eyes of each patient.

  The levels, and the names, are a function of `seed`; what the model sees of them, of `chance`.
  """
  def make(patients=60, seed=0, skill=1.5, chance=1, classes=5, order=1, name="predictions.csv"):
    level, p = _rows(patients, seed, skill, chance, classes)
    path = tmp_path_factory.mktemp("answers") / name
    with open(path, "w", newline="") as file:
      table = csv.writer(file)
      table.writerow(["image", "patient", "eye", "level", "grade", "score",
                      *(f"p{k}" for k in range(classes))])
      for row in list(range(2 * patients))[::order]:
        patient, eye = f"{seed}-{row // 2}", ("left", "right")[row % 2]
        table.writerow([f"{patient}_{eye}", patient, eye, level[row], p[row].argmax(),
                        repr(float(p[row] @ np.arange(classes))), *map(repr, p[row].tolist())])
    return path

  return make


@pytest.fixture(scope="session")
def opened(untrained):
  """The untrained workdir, opened on one device."""
  import jax

  from medattn_jax import trained

  return trained.open_workdir(untrained, devices=jax.devices()[:1])
