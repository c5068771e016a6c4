"""Whether a config goes on with the run that a workdir holds, or would begin another one in it."""

from __future__ import annotations

import pathlib

import ml_collections

from medattn_jax import config as pages
from medattn_jax import experiment
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.errors import UserError
from medattn_jax.workdir import Workdir

# What may be changed when a run goes on; the rest decides what it computes.
FREE = ("data.dir", "checkpoint.", "evaluation.", "logging.", "attention.kept")


def refuse_strangers(
    directory: Workdir, config: ml_collections.ConfigDict, checkpoints: Checkpoints
) -> None:
  """Raises UserError where work is in the workdir that another config began."""
  asked = pages.to_dict(config)
  if checkpoints.any():
    done = checkpoints.newest_meta()
    held = done["config"] if done else directory.read_config()
    pages.from_dict(held, source=f"{directory.path}, config of the run that is there")
    refuse_other_run(directory.path, asked, held, done["step"] if done else 0)


def refuse_other_run(path: pathlib.Path, asked: dict, held: dict, step: int) -> None:
  """Raises UserError naming the first key in which `asked` would begin another run than `held`.

  Free to change: where the data lies; how often is saved, validated and logged; what is computed
  twice to save memory; the pages of phases that have not begun; the steps of a phase whose schedule
  does not depend on them.
  """
  old, new = pages.flatten(pages.completed(held)), pages.flatten(asked)
  same_phases = held["phases"].keys() == asked["phases"].keys()
  free = free_keys(held, asked, step) if same_phases else FREE
  for key in sorted(old.keys() | new.keys()):
    if old.get(key) == new.get(key) or key.startswith(free):
      continue
    raise UserError(
        f"{path}: holds a run of {step} steps with {key} = {old.get(key)!r}, not "
        f"{new.get(key)!r}; accepted: the same value, or another --workdir"
    )


def free_keys(held: dict, asked: dict, step: int) -> tuple[str, ...]:
  """Prefixes of the keys that may change at `step`: they decide nothing that is done already."""
  config = pages.from_dict(held)
  free, begins = FREE, 0
  for name in experiment.phases(config):
    page = config.phases[name]
    free += (f"phases.{name}.remat",)  # the same numbers
    if begins >= step:
      free += (f"phases.{name}.",)
    ends = begins + page.steps
    goes_on = begins < step <= ends and begins + asked["phases"][name]["steps"] >= step
    if goes_on and page.schedule != "cosine":
      free += (f"phases.{name}.steps",)  # more steps: the rates so far stay what they were
    begins = ends
  return free
