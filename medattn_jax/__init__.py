"""Zoom-in-Net and global spatial attention in JAX: what an image shows, and what decided it.

  model = medattn_jax.load("workdir")
  result = model.predict(["10_left.jpeg", "10_right.jpeg"])
  result.grade, result.probabilities, result.boxes

Names are imported when first asked for: `import medattn_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

# Name → (module, attribute); None: the module itself.
_WHERE = {
  "load": ("predictor", "load"),
  "backbone": ("models", "backbone"),
  "from_torch": ("models.pretrained", "from_torch"),
  "to_torch": ("models.pretrained", "to_torch"),
  "crops": ("crops", None),
  "experiment": ("experiment", None),
}
__all__ = ["backbone", "crops", "experiment", "from_torch", "load", "to_torch"]


def __getattr__(name: str) -> Any:
  if name not in _WHERE:
    raise AttributeError(f"module 'medattn_jax' has no attribute {name!r}")
  module, attribute = _WHERE[name]
  found = importlib.import_module(f"medattn_jax.{module}")
  found = found if attribute is None else getattr(found, attribute)
  globals()[name] = found
  return found


def __dir__() -> list[str]:
  return sorted(__all__)
