"""What one example of every data set holds, whatever its source. Knows no TensorFlow.

One example is one patient: one or two photographs, in the order left, right where that is known.
A patient with more photographs gives several examples of the same patient id, so that sets are
split, and statistics drawn, by patient. In sets of single photographs every example has one.
"""

from __future__ import annotations

import re
from typing import Any

# The kinds of lesion a box may have; a box stores the index.
TYPES = (
  "microaneurysm",
  "haemorrhage",
  "hard_exudate",
  "cotton_wool_spot",
  "neovascularisation",
)
LEVELS = 5  # of a retina: 0 none, 1 mild, 2 moderate, 3 severe, 4 proliferative
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one character a level: int(digit, 36)
MAX_CLASSES = len(DIGITS)
EYES = ("left", "right")
SPLITS = ("train", "validation", "test")
VERSION = "1.0.0"
FILE_FORMAT = "array_record"
_SIDED = re.compile(r"(.+?)[_\- ](left|right)", re.IGNORECASE)


def side_of(stem: str) -> tuple[str, str] | None:
  """(patient, eye) of a file named NN_left, "NN-left" or "NN left"; None for any other name.

  One rule for training data and for `predict`.
  """
  found = _SIDED.fullmatch(stem)
  return (found[1], found[2].lower()) if found else None


def features(full_size: int, channels: int = 3, encoding: str = "jpeg") -> Any:
  """The TFDS features of a set whose photographs are stored at `full_size`² pixels.

  Lists of one patient: images (uint8, of 1 or 3 channels, encoded as "jpeg" or "png"), image_ids,
  eyes ("left", "right" or ""), levels.
  boxes: eye indexes images, type indexes TYPES, box is (y0, x0, y1, x1) in stored pixels.
  """
  from medattn_jax.data.backend import np, tfds

  f = tfds.features
  return f.FeaturesDict({
    "patient": f.Text(),
    "images": f.Sequence(
      f.Image(shape=(full_size, full_size, channels), encoding_format=encoding)
    ),
    "image_ids": f.Sequence(f.Text()),
    "eyes": f.Sequence(f.Text()),
    "levels": f.Sequence(np.int64),
    "boxes": f.Sequence({
      "eye": np.int64,
      "type": np.int64,
      "box": f.Tensor(shape=(4,), dtype=np.float32),
    }),
  })
