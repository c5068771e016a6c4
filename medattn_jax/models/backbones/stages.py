"""What the backbones published for 224² have in common here: two stems, stages that are stops,
any share of the published channels."""

from __future__ import annotations

from collections.abc import Callable

from medattn_jax.errors import UserError
from medattn_jax.models.norm import Array

# (a stage's name, its activations [B, h, w, c]) → the activations with which the network goes on.
Stage = Callable[[str, Array], Array]

STEMS = ("full", "small")


def unchanged(name: str, x: Array) -> Array:
  """The stage function of a network that nobody looks into."""
  del name
  return x


def scaled(channels: int, width: float) -> int:
  """So many published channels at a share `width` of them; one at least."""
  return max(1, round(channels * width))


def is_small(stem: str) -> bool:
  """Whether the stem is the one for images of 28 to 64 pixels.

  Raises:
    UserError: an unknown stem.
  """
  if stem not in STEMS:
    raise UserError(f"model.stem={stem!r}: one of {', '.join(STEMS)}")
  return stem == "small"
