"""What a run answered of graded photographs: from its workdir, or from a predictions.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medattn_jax import console, files, metrics
from medattn_jax.errors import UserError

COLUMNS = ("image", "patient", "eye", "level", "grade")
_SHARES = tuple(f"p{level}" for level in range(1000))
_MAX_BYTES = 256 << 20  # some millions of photographs


class Answers(NamedTuple):
  """One row a photograph, each once.

  Attributes:
    name: of the run, as the user gave it.
    image, patient, eye: object [n].
    level: int64 [n] in 0..C-1.
    probabilities: float64 [n, C], rows that sum to one.
    grade: int64 [n]; the run's own decision.
    source: where all this comes from, for strict JSON.
  """

  name: str
  image: np.ndarray
  patient: np.ndarray
  eye: np.ndarray
  level: np.ndarray
  probabilities: np.ndarray
  grade: np.ndarray
  source: dict[str, Any]

  def take(self, rows: np.ndarray) -> Answers:
    """The rows int [m] or bool [n]."""
    columns = (value[rows] if isinstance(value, np.ndarray) else value for value in self)
    return Answers(*columns)


def of_workdir(
  workdir: str, data: str | None = None, split: str | None = None, step: str | int = "best"
) -> Answers:
  """What `medattn evaluate` finds: the same model, split, probabilities and decision.

  Raises:
    UserError: as evaluate.run.
  """
  from medattn_jax import trained  # imports JAX

  return of_model(trained.open_workdir(workdir, step), str(workdir), data, split)[0]


def with_validation(
  workdir: str, data: str | None = None, split: str | None = None, step: str | int = "best"
) -> tuple[Answers, Answers | None]:
  """`of_workdir`, and the same run on the data set's validation split, None where there is none.

  Both are the same where the split is the validation split itself.
  """
  from medattn_jax import trained  # imports JAX

  return of_model(
    trained.open_workdir(workdir, step), str(workdir), data, split, validation=True)


def of_model(
  model: Any, name: str, data: str | None = None, split: str | None = None, *,
  validation: bool = False,
) -> tuple[Answers, Answers | None]:
  """`of_workdir` and, if asked for, the validation split too, of a trained.Trained that is open."""
  from medattn_jax import evaluate  # imports JAX

  dataset = evaluate.open_data(model.config, data)
  split = evaluate.choose_split(dataset, split)
  table = evaluate.graded(model.experiment, model.variables, dataset, split, model.config)
  tuning = evaluate.tuning_of(model, dataset, split, table)
  thresholds = evaluate.rule(["logits"], tuning, model.config.model.num_classes)

  def answers(rows: Mapping[str, Any], split: str) -> Answers:
    probabilities = metrics.probabilities_of(rows["logits"])
    source = {"workdir": name, "data": dataset.name, "split": split, "step": model.step,
              "checkpoint_sha256": model.fingerprint}
    return Answers(
      name, rows["image"], rows["patient"], rows["eye"], rows["level"].astype(np.int64),
      probabilities, metrics.grades(probabilities, thresholds), source)

  found = answers(table, split)
  if not validation or split == "validation":
    return found, found if validation else None
  rows = tuning[0]
  if rows is None and dataset.splits.get("validation"):  # a model that decides without thresholds
    rows = evaluate.graded(
      model.experiment, model.variables, dataset, "validation", model.config)
  return found, None if rows is None else answers(rows, "validation")


def with_tuning(
  workdir: str | None, predictions: str | None, data: str | None, split: str | None,
  step: str | int, tune: str | None,
) -> tuple[Answers, Answers | None]:
  """One run, and its answers on what is to be tuned on: the validation split, or the file `tune`.

  None for that where there is none, which is said.

  Raises:
    UserError: not one run, flags that do not go together, or images that are in both.
  """
  one(workdir, predictions)
  if workdir:
    if tune:
      raise UserError(f"--tune={tune}: a workdir's own validation split is graded; accepted: "
                      "--tune with --predictions")
    graded, validation = with_validation(workdir, data, split, step)
    if validation is None:
      console.say(f"data set {graded.source['data']} has no validation split: nothing is tuned")
    return graded, validation
  only_predictions([], data, split, step)
  graded = of_predictions(predictions)
  if not tune:
    console.say("no --tune=F.csv of a validation split: nothing is tuned")
    return graded, None
  validation = of_predictions(tune)
  check_apart(validation, graded)
  return graded, validation


def of_predictions(path: str | os.PathLike) -> Answers:
  """Reads a predictions.csv: image, patient, eye, level, grade and p0, p1, …; more is passed over.

  Raises:
    UserError: not such a file; a number that is none, is not finite or out of range; probabilities
      that do not sum to one within 1e-6; a photograph without a name or a patient, or there twice.
  """
  try:
    content = files.read_bytes(path, _MAX_BYTES)
    rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    fingerprint = hashlib.sha256(content).hexdigest()
  except OSError as error:
    raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; accepted: a "
                    "predictions.csv as `medattn evaluate` writes it") from None
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f"{path}: is no CSV in UTF-8 ({error})") from None
  header, rows = (rows[0], rows[1:]) if rows else ([], [])
  classes = max([1, *(_SHARES.index(name) for name in header if name in _SHARES)]) + 1
  wanted = [*COLUMNS, *_SHARES[:classes]]
  for name in wanted:
    if header.count(name) != 1:
      raise UserError(f"{path}: has {'no' if name not in header else 'two'} column {name}; "
                      f"accepted: {','.join(COLUMNS)},p0,p1,… as `medattn evaluate` writes them")
  if not rows:
    raise UserError(f"{path}: has no photographs")
  for line, row in enumerate(rows, start=2):
    if len(row) != len(header):
      raise UserError(
        f"{path}: row {line} has {len(row)} values where the header has {len(header)}")
  column = {name: [row[header.index(name)] for row in rows] for name in wanted}
  names = {name: np.array(column[name], object) for name in ("image", "patient", "eye")}
  _check_names(path, names)
  level, grade = (_whole(path, name, column, classes) for name in ("level", "grade"))
  probabilities = np.stack([_shares(path, name, column) for name in wanted[len(COLUMNS):]], axis=1)
  off = np.abs(probabilities.sum(1) - 1)
  if (off > 1e-6).any():
    worst = int(off.argmax())
    raise UserError(f"{path}: the probabilities of {names['image'][worst]} sum to "
                    f"{probabilities[worst].sum():.9g}; accepted: 1 within 1e-6")
  source = {"predictions": str(path), "sha256": fingerprint}
  return Answers(str(path), *names.values(), level, probabilities, grade, source)


def _check_names(path: str | os.PathLike, names: Mapping[str, np.ndarray]) -> None:
  for name in ("image", "patient"):
    if "" in names[name]:
      row = int(np.flatnonzero(names[name] == "")[0]) + 2
      raise UserError(f"{path}: row {row} has no {name}")
  found, count = np.unique(names["image"].astype(str), return_counts=True)
  if (count > 1).any():
    raise UserError(f"{path}: image {found[count > 1][0]} is there {count[count > 1][0]} times; "
                    "accepted: each once")


def _whole(
  path: str | os.PathLike, name: str, column: Mapping[str, Sequence[str]], classes: int
) -> np.ndarray:
  known = {str(level): level for level in range(classes)}
  for image, value in zip(column["image"], column[name], strict=True):
    if value not in known:
      raise UserError(
        f"{path}: {name} of {image} = {value[:40]!r}; accepted: 0–{classes - 1}")
  return np.array([known[value] for value in column[name]], np.int64)


def _shares(
  path: str | os.PathLike, name: str, column: Mapping[str, Sequence[str]]
) -> np.ndarray:
  found = []
  for image, value in zip(column["image"], column[name], strict=True):
    try:
      number = float(value)
    except ValueError:
      number = float("nan")
    if not 0 <= number <= 1:
      raise UserError(f"{path}: {name} of {image} = {value[:40]!r}; accepted: 0 to 1")
    found.append(number)
  return np.array(found, np.float64)


def gather(
  workdirs: Sequence[str], predictions: Sequence[str], data: str | None = None,
  split: str | None = None, step: str | int = "best", *, least: int = 1, most: int | None = None,
) -> list[Answers]:
  """The runs a study was given, workdirs first.

  Raises:
    UserError: fewer than `least` or more than `most` of them, or the like of `of_workdir`.
  """
  count = len(workdirs) + len(predictions)
  if count < least or (most is not None and count > most):
    wanted = str(least) if least == most else f"{least} or more"
    raise UserError(f"{count} runs were given with --workdir=D and --predictions=F.csv; accepted: "
                    f"{wanted}")
  only_predictions(workdirs, data, split, step)
  return [of_workdir(place, data, split, step) for place in workdirs] + [
    of_predictions(path) for path in predictions]


def only_predictions(
  workdirs: Sequence[str], data: str | None, split: str | None, step: str | int
) -> None:
  """Raises UserError for flags that say what to grade where there is no workdir to grade it."""
  given = {"--data": data, "--split": split, "--step": None if step == "best" else step}
  for flag, value in given.items():
    if value is not None and not workdirs:
      raise UserError(f"{flag}={value}: a predictions.csv is graded already; accepted: {flag} with "
                      "--workdir")


def one(workdir: str | None, predictions: str | None) -> None:
  """Raises UserError unless one run was given."""
  if bool(workdir) == bool(predictions):
    raise UserError("--workdir=D or --predictions=F.csv: accepted is one of them")


def together(runs: Sequence[Answers]) -> list[Answers]:
  """The runs with their rows joined by image, in the order of the first.

  Raises:
    UserError: an image that one of them lacks, or of which it has another level, patient or eye; a
      run of other classes.
  """
  first = runs[0]
  joined = [first]
  place = {image: row for row, image in enumerate(first.image)}
  for run in runs[1:]:
    if run.probabilities.shape[1] != first.probabilities.shape[1]:
      raise UserError(f"{run.name}: has {run.probabilities.shape[1]} classes where {first.name} "
                      f"has {first.probabilities.shape[1]}")
    own = {image: row for row, image in enumerate(run.image)}
    for here, there, name in ((place, own, run.name), (own, place, first.name)):
      if lacking := [image for image in here if image not in there]:
        raise UserError(f"{name}: lacks {len(lacking)} images of the other run, {lacking[0]} the "
                        "first; accepted: runs that graded the same images")
    run = run.take(np.array([own[image] for image in first.image]))
    for column in ("level", "patient", "eye"):
      here, there = getattr(first, column), getattr(run, column)
      if (other := np.flatnonzero(here != there)).size:
        row = other[0]
        raise UserError(f"{run.name}: {first.image[row]} has {column} {there[row]} where "
                        f"{first.name} has {here[row]}; accepted: runs of the same images")
    joined.append(run)
  return joined


def check_apart(fitted: Answers, asked: Answers) -> None:
  """Raises UserError where what is fitted on one set would be tested on its own images.

  Images of two data sets may go by one name; of files it is not known which set they are of, so
  there name and patient are compared. Runs of other classes do not go together either.
  """
  if (classes := fitted.probabilities.shape[1]) != asked.probabilities.shape[1]:
    raise UserError(f"{fitted.name}: has {classes} classes where {asked.name} has "
                    f"{asked.probabilities.shape[1]}")
  if fitted.source.get("data") != asked.source.get("data"):
    return
  names = [set(zip(run.image, run.patient, strict=True)) for run in (fitted, asked)]
  if both := names[0] & names[1]:
    raise UserError(f"{fitted.name} and {asked.name}: share {len(both)} images, {min(both)[0]} the "
                    "first; accepted: a set to fit on that has none of those to test on")


def folder(study: str, workdirs: Sequence[str], out: str | None) -> pathlib.Path:
  """Where a study writes: `out`, or WORKDIR/studies/STUDY of the first workdir. Touches nothing.

  Raises:
    UserError: nowhere to write to.
  """
  if not out and not workdirs:
    raise UserError("--out=DIR: is needed where there is no --workdir")
  place = pathlib.Path(out) if out else pathlib.Path(workdirs[0]) / "studies" / study
  files.check_folder(place)
  return place
