"""`medattn study ensemble`: several runs that answer together: the mean of their probabilities."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from medattn_jax import console, metrics
from medattn_jax.analysis import ensemble
from medattn_jax.errors import UserError
from medattn_jax.studies import answers, gains

WHOLE = "mean of all"


def run(
  workdir: Sequence[str] = (), predictions: Sequence[str] = (), data: str | None = None,
  split: str | None = None, step: str | int = "best", out: str | None = None,
  tune: Sequence[str] = (),
) -> dict[str, Any]:
  """Ensembles (papers §1: "Ensemble of three"): the mean probability of several runs.

  Each run's thresholds are tuned on its own validation answers and those of the mean on the mean
  of them, never on the split graded; the best single run is the best on validation as well. Where
  the likeliest class decides in every run, it does here. Without validation answers of all it does
  too, and the best is the best of the graded split (said: its choice is then in its favour).

  Args:
    workdir, predictions: of the runs, two or more in all.
    data, split, step: what is graded, as in evaluate.run.
    out: the folder for the files; studies/ensemble of the first workdir by default.
    tune: predictions.csv of a validation split, one for each of `predictions`.

  Returns:
    What ensemble.json holds; predictions.csv of the mean is beside it.

  Raises:
    UserError: runs of different photographs or classes; nothing was written.
  """
  _check(workdir, predictions, tune)
  answers.only_predictions(workdir, data, split, step)
  place = answers.folder("ensemble", workdir, out)
  pairs = [answers.with_validation(one, data, split, step) for one in workdir]
  files = [(path, None) for path in predictions] if not tune else zip(
    predictions, tune, strict=True)
  pairs += [(answers.of_predictions(path), other and answers.of_predictions(other))
            for path, other in files]
  runs = answers.together([run for run, _ in pairs])
  others = [validation for _, validation in pairs]
  lacking = [run.name for run, validation in pairs if validation is None]
  others = [] if lacking else answers.together(others)
  names = [run.name for run in runs]
  if lacking:
    console.say(f"{', '.join(lacking)}: without answers to a validation split; the likeliest class "
                "decides, and the best run is chosen on the split that is graded")
  for run, other in zip(runs, others, strict=False):
    if _own_split(run, other):
      console.say(f"{run.name}: the thresholds are tuned on the validation split, which is what is "
                  "graded: its kappa is optimistic")
    else:
      answers.check_apart(other, run)
  likeliest = all((run.grade == run.probabilities.argmax(1)).all() for run in runs)
  tuned_on = [] if likeliest else others
  graded = members(names, runs, tuned_on)
  judged, level = graded, runs[0].level
  if others:
    judged, level = members(names, others, tuned_on), others[0].level
  best = ensemble.best_of(level, {name: judged[name] for name in names})
  chosen = "the graded split" if lacking else "validation"
  first = runs[0]
  return gains.finish(
    "ensemble", place,
    {"runs": [run.source for run in runs], "validation": [other.source for other in others] or None,
     "decision": "thresholds" if tuned_on else "argmax",
     "best_single": best, "best_chosen_on": chosen},
    {name: getattr(first, name) for name in ("image", "patient", "eye", "level")}, graded,
    whole=WHOLE, singles=names, best=best, seed=0,
    words=("gain over the best single", "gain over a single, mean"),
    title=f"{len(runs)} runs and the mean of their probabilities",
    notes=[f"{best} is the best single one on {chosen}"])


def members(
  names: Sequence[str], runs: Sequence[answers.Answers], tuned_on: Sequence[answers.Answers]
) -> dict[str, ensemble.Graded]:
  """The runs by name, and the mean of them; their thresholds from `tuned_on`, which may be none."""
  every = [run.probabilities for run in runs]
  others = [other.probabilities for other in tuned_on]
  graded = {}
  for number, name in enumerate([*names, WHOLE]):
    mine = lambda all, number=number: ensemble.mean(all) if number == len(runs) else all[number]
    thresholds = None
    if tuned_on:
      other = mine(others)
      thresholds = metrics.tune_thresholds(
        metrics.expected_grade(other), tuned_on[0].level, other.shape[1])
    graded[name] = ensemble.Graded(mine(every), thresholds)
  return graded


def _own_split(run: answers.Answers, other: answers.Answers) -> bool:
  return run.source.get("split") == "validation" and run.source == other.source


def _check(workdir: Sequence[str], predictions: Sequence[str], tune: Sequence[str]) -> None:
  count = len(workdir) + len(predictions)
  if count < 2:
    raise UserError(f"{count} runs were given with --workdir=D and --predictions=F.csv; accepted: "
                    "2 or more")
  for name, times in collections.Counter([*workdir, *predictions]).items():
    if times > 1:
      raise UserError(f"{name}: is given {times} times; accepted: each run once")
  if tune and len(tune) != len(predictions):
    raise UserError(f"--tune is given {len(tune)} times and --predictions {len(predictions)} times;"
                    " accepted: one --tune for each --predictions, in their order")
