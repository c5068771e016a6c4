"""`medattn study screening`: who is to be referred, by the Messidor protocol (papers §1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from medattn_jax import console, metrics
from medattn_jax.analysis import screening
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, writing

QUESTIONS = {"referable": "referable: levels 0 and 1 against the rest",
             "any": "abnormal: level 0 against the rest"}
MACHINES = {"svm": "SVM on the probabilities", "direct": "the probability itself"}


def run(
  workdir: str | None = None, predictions: str | None = None, data: str | None = None,
  split: str | None = None, step: str | int = "best", out: str | None = None,
  train_workdir: str | None = None, train_data: str | None = None, train_split: str | None = None,
  train_predictions: str | None = None,
) -> dict[str, Any]:
  """Screening by an SVM on the probabilities, beside the model's own probability.

  Referable is told by 10-fold cross-validation over patients. Abnormal is told by an SVM that was
  trained on another set, where one is given; else by cross-validation too, which is said.

  Args:
    workdir: of the run; or
    predictions: a predictions.csv.
    data, split, step: what is graded, as in evaluate.run.
    out: the folder for the files; WORKDIR/studies/screening by default.
    train_workdir, train_data, train_split: another set to train on: by default the same run, its
      own data set, split train. Or
    train_predictions: a predictions.csv.

  Returns:
    What screening.json holds.

  Raises:
    UserError: nothing was written.
  """
  place = answers.folder("screening", [workdir] if workdir else [], out)
  asked, trained_on = _graded(
    workdir, predictions, data, split, step, train_workdir, train_data, train_split,
    train_predictions)
  if trained_on is None:
    console.say("no set to train on (--train-data, --train-split, --train-predictions): abnormal "
                "is told by cross-validation as well")
  questions, curves = {}, {}
  for question, least in (("referable", 2), ("any", 1)):
    other = trained_on if question == "any" else None
    questions[question], curves[question] = _ask(question, least, asked, other)
  if all(found["svm"]["auc"] is None for found in questions.values()):
    raise UserError(f"{asked.name}: has too few patients of one kind to tell ill from well; "
                    "accepted: two or more with level 0 and two or more with another")
  found = {
    "run": asked.source, "trained_on": None if trained_on is None else trained_on.source,
    "images": len(asked.level), "patients": len(np.unique(asked.patient.astype(str))),
    "resamples": screening.RESAMPLES, **questions}
  columns = {f"{question}\n{short}": questions[question][name] for question in questions
             for name, short in (("svm", "SVM"), ("direct", "probability"))}
  rows = []
  for name in ("auc", "accuracy", *(screening.point_name(*point) for point in screening.POINTS)):
    values = [_value(column, name) for column in columns.values()]
    rows += [(name.replace("_", " "), *(writing.shown(value) for value, _ in values)),
             ("  95 % interval", *(writing.interval(edges) for _, edges in values))]
  return writing.finish(
    "screening", place, found, {"roc.png": _figure(questions, curves, asked)},
    title=writing.about(asked.source), header=("", *columns), rows=rows,
    notes=[f"{question}: {questions[question]['protocol']}" for question in questions])


def _value(figures: dict[str, Any], name: str) -> tuple[float | None, list[float] | None]:
  """A figure and its interval."""
  found = figures[name]
  return (found["value"], found["interval"]) if isinstance(found, dict) else (
    found, figures[f"{name}_ci"])


def _graded(
  workdir: str | None, predictions: str | None, data: str | None, split: str | None,
  step: str | int, train_workdir: str | None, train_data: str | None, train_split: str | None,
  train_predictions: str | None,
) -> tuple[answers.Answers, answers.Answers | None]:
  """(what is asked about, what is trained on or None)."""
  answers.one(workdir, predictions)
  answers.only_predictions([workdir] if workdir else [], data, split, step)
  given = {"--train-workdir": train_workdir, "--train-data": train_data,
           "--train-split": train_split}
  flags = [flag for flag, value in given.items() if value is not None]
  if flags and train_predictions:
    raise UserError(f"{flags[0]} and --train-predictions={train_predictions}: accepted is one way "
                    "to name the set to train on")
  grader = train_workdir or workdir
  if flags and not grader:
    raise UserError(f"{flags[0]}: needs a model; accepted: with --workdir or --train-workdir")
  if workdir:
    from medattn_jax import trained  # imports JAX

    model = trained.open_workdir(workdir, step)
    asked, _ = answers.of_model(model, str(workdir), data, split)
  else:
    asked = answers.of_predictions(predictions)
  if train_predictions:
    other = answers.of_predictions(train_predictions)
  elif flags and grader == workdir:
    other, _ = answers.of_model(model, str(workdir), train_data, train_split or "train")
  elif flags:
    other = answers.of_workdir(grader, train_data, train_split or "train", step)
  else:
    return asked, None
  answers.check_apart(other, asked)
  return asked, other


def _ask(
  question: str, least: int, asked: answers.Answers, other: answers.Answers | None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The figures of one question, by the SVM and by the probability alone; and their curves."""
  positive = asked.level >= least
  if other is None:
    scored = screening.cross_validated(asked.probabilities, positive, asked.patient)
    folds = 0 if scored is None else len(scored.settings)
    protocol = f"cross-validation over patients, {folds} folds"
    if scored is not None and folds < screening.FOLDS:
      console.warn(f"{question}: {folds} folds, for want of patients of one kind")
  else:
    scored = screening.transferred(
      other.probabilities, other.level >= least, other.patient, asked.probabilities)
    protocol = f"trained on {writing.about(other.source)} ({len(other.level):,} photographs)"
  if scored is None:
    console.warn(f"{question}: too few patients of one kind to train on: not defined")
    protocol = "not defined: too few patients of one kind to train on"
  direct = asked.probabilities[:, least:].sum(1)
  scores = {"svm": (None, None) if scored is None else (scored.score, scored.score > 0),
            "direct": (direct, direct >= 0.5)}
  found: dict[str, Any] = {
    "protocol": protocol, "settings": None if scored is None else scored.settings}
  curves = {}
  for name, (score, called) in scores.items():
    none = score is None
    found[name] = screening.of_scores(
      np.zeros(0) if none else positive, np.zeros(0) if none else score,
      np.zeros(0) if none else asked.patient, np.zeros(0) if none else called)
    curves[name] = None if none else metrics.roc(positive, score)
  return found, curves


def _figure(
  questions: dict[str, Any], curves: dict[str, Any], asked: answers.Answers
) -> bytes:
  from medattn_jax.analysis import curves as drawing  # imports matplotlib
  from medattn_jax.analysis import figures

  titles = {QUESTIONS[question]: question for question in questions}
  labels = {
    title: {name: f"{MACHINES[name]}: AUC {writing.both(found['auc'], found['auc_ci'])}"
            for name, found in questions[question].items() if name in MACHINES}
    for title, question in titles.items()}
  points = {}
  for title, question in titles.items():
    points[title] = []
    for kind, at in screening.POINTS:
      value = questions[question]["svm"][screening.point_name(kind, at)]["value"]
      if value is not None:
        place = (at, value) if kind == "sensitivity" else (value, at)
        other = "specificity" if kind == "sensitivity" else "sensitivity"
        points[title].append((*place, f"{kind} {value:.3f} at {other} {at}"))
  return figures.png(drawing.operating(
    {title: curves[question] for title, question in titles.items()}, labels, points,
    title=writing.about(asked.source)))
