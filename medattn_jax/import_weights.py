"""A backbone's published PyTorch weights, made ready for a page's `model.init_from`."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from medattn_jax import console, files
from medattn_jax.errors import UserError
from medattn_jax.models import pretrained, state_dicts, weights


def run(
  model: str, source: str, out: str, mean: str | None = None, std: str | None = None
) -> None:
  """`medattn import-weights`: reads a file of weights and writes the folder `out`.

  Args:
    model: the backbone, one of pretrained.HEADS.
    source: a .safetensors, .pth, .pt or .bin file (see state_dicts.read).
    out: the folder to make; one that is there has to be empty.
    mean, std: "R,G,B" of the input that the weights were trained with, of values from 0 to 1;
      as usual for the published weights of the model where they are not given.

  Raises:
    UserError: nothing was written.
  """
  pretrained.known(model, "--model")
  convention = _convention(model, mean, std)
  place = files.check_new_folder(out)
  tensors = state_dicts.read(source)
  try:
    variables = pretrained.from_torch(model, tensors)
  except UserError as error:
    raise UserError(f"{source}: {error}") from None
  _check(variables, source)
  origin = {"file": pathlib.Path(source).name, "sha256": files.sha256(source)}
  weights.write(place, model, variables, convention, {"source": origin})
  arrays = jax.tree.leaves(variables)
  if left := pretrained.left_behind(tensors):
    console.say(f"left behind, of training alone: {', '.join(left)}")
  print(f"{len(arrays)} arrays of {model}, {sum(x.size for x in arrays):,} numbers, written to "
        f"{out}. A page that begins from them has")
  print(f"  --config.model.init_from={out}")
  for key, values in zip(("mean", "std"), convention, strict=True):
    print(f"  --config.model.{key}='({', '.join(f'{x:g}' for x in values)})'")


def _convention(model: str, mean: str | None, std: str | None) -> tuple:
  """(mean, std) of the input: as given, or as is usual for the model; both or neither."""
  if (mean is None) != (std is None):
    raise UserError("--mean and --std: one is given without the other; accepted: both or neither")
  if mean is None:
    return weights.CONVENTIONS[model]
  return _numbers("--mean", mean, lambda x: True), _numbers("--std", std, lambda x: x > 0)


def _numbers(flag: str, text: str, accepts: Any) -> tuple[float, ...]:
  try:
    found = tuple(float(part) for part in text.strip("() ").split(","))
  except ValueError:
    found = ()
  if len(found) != 3 or not all(math.isfinite(x) and accepts(x) for x in found):
    raise UserError(f"{flag}={text}: accepted: three numbers of R, G and B such as "
                    "0.485,0.456,0.406; --std above zero")
  return found


def _check(variables: Mapping[str, Any], source: str) -> None:
  """Raises UserError naming the arrays that no training can have left."""
  sound = lambda path, x: np.isfinite(x).all() and not (path[-1].key == "var" and (x < 0).any())
  bad = {"/".join(key.key for key in path[1:])
         for path, x in jax.tree.leaves_with_path(variables) if not sound(path, x)}
  pretrained.refuse(source, {"not finite, or variances below zero": bad})
