"""`medattn decode`: the photographs of a page's data set, decoded once and kept beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from medattn_jax import config, console, evaluate, experiment
from medattn_jax.errors import UserError


def run(path: str, splits: str | None, overrides: Sequence[tuple[str, str]]) -> None:
  """Keeps what training and evaluation with a page read, split by split.

  Args:
    splits: with commas between; all of the set by default. What is kept already stays.

  Raises:
    UserError: for a page, set or split that is none, a damaged set, or a disk without room.
  """
  page = config.load_page(path, overrides)
  dataset = evaluate.open_data(page, None)
  from medattn_jax.data import decoded, pipeline  # imports TensorFlow

  size, channels = page.data.full_size, experiment.layout(page)["channels"]
  wanted = list(dataset.splits) if splits is None else splits.split(",")
  if strange := [split for split in wanted if split not in dataset.splits]:
    raise UserError(f"--splits: data set {dataset.name} has no {', '.join(strange)}; accepted: "
                    f"{', '.join(dataset.splits)}")
  for split in wanted:
    count = len(dataset.photo_levels(split))
    of = f"{split}: {count:,} photographs of {size}², {count * size**2 * channels / 1e9:.2f} GB"
    if decoded.find(dataset, split, size, channels):
      print(f"{of}, are there already")
      continue
    console.say(f"decoding {of}")
    start = time.monotonic()
    pipeline.keep_decoded(dataset, split, size, channels)
    print(f"{of}, decoded in {time.monotonic() - start:.1f} s")
  print(f"{dataset.folder / decoded.FOLDER}: is read from now on; remove it to go back")
