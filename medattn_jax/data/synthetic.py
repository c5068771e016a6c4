"""Drawn fundus photographs with known lesions: the data set that needs no download.

`draw_patient(seed, patient, size)` draws both eyes of a patient, a function of its arguments
alone. Lesions are drawn first as shapes in the 1230-pixel frame (synthetic_eye.UNIT), then
painted at any size; the level of an eye is never drawn but follows from its lesions by the rule
of the international scale (`grade`).

The photographs hold what makes real ones hard (papers.md §1 answers it with zooming): the
smallest lesions, microaneurysms of 6 to 10 pixels at 1230, nearly vanish in the 2.5 times smaller
view; and things without a box look like lesions there: drusen like hard exudates, pigment and
dust like haemorrhages and microaneurysms, a pale large blot like a tangle of new vessels.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import Image

from medattn_jax.data import synthetic_canvas as canvas_
from medattn_jax.data import synthetic_eye as eye_
from medattn_jax.data import synthetic_lesions as lesions_
from medattn_jax.data.schema import TYPES
from medattn_jax.data.synthetic_eye import UNIT
from medattn_jax.data.synthetic_lesions import HAEMORRHAGE, MICROANEURYSM, NEOVASCULARISATION

__all__ = ["TYPES", "Eye", "Patient", "as_camera", "draw_example", "draw_levels", "draw_patient"]
__all__ += ["grade", "paint"]

# Where the levels 1–4 begin in the severity of an eye, as quantiles: about 38, 16, 22, 12, 12 %.
LEVEL_STARTS = (-0.305, 0.100, 0.706, 1.175)
EYE_NOISE = 0.35  # deviation of an eye's severity from its patient's
ONE_EYED = 0.065


@dataclasses.dataclass(frozen=True)
class Eye:
  """One photograph and what is known of it."""

  image: np.ndarray  # uint8 [S, S, 3]
  eye: str  # "left" or "right"
  image_id: str
  level: int  # 0–4
  boxes: np.ndarray  # float32 [K, 4]: y0, x0, y1, x1 in pixels of the image
  types: np.ndarray  # int32 [K], index into TYPES
  fovea: tuple[float, float]  # y, x in pixels of the image


@dataclasses.dataclass(frozen=True)
class Patient:
  """The photographs of one patient, the left eye first; some patients have one only."""

  patient: str
  eyes: tuple[Eye, ...]


def grade(types, boxes, fovea) -> int:
  """The level of an eye by the international scale, from its lesions alone.

  4: any neovascularisation. 3: more than 20 haemorrhages in each of the four quadrants centred
  on the fovea (of the 4-2-1 rule this is the part that is drawn; a haemorrhage belongs to the
  quadrant of its box's centre). 2: any haemorrhage, hard exudate or cotton-wool spot besides.
  1: microaneurysms only. 0: nothing.

  Args:
    types: int [K], indices into TYPES.
    boxes: float [K, 4], y0, x0, y1, x1 in any frame.
    fovea: (y, x) in the same frame.
  """
  types = np.asarray(types, np.int64).reshape(-1)
  boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
  if (types == NEOVASCULARISATION).any():
    return 4
  blood = boxes[types == HAEMORRHAGE]
  below = blood[:, 0] + blood[:, 2] > 2 * fovea[0]
  right = blood[:, 1] + blood[:, 3] > 2 * fovea[1]
  quadrants = np.bincount(2 * below.astype(np.int64) + right, minlength=4)
  if quadrants.min() > 20:
    return 3
  if (types > MICROANEURYSM).any():
    return 2
  return int(types.size > 0)


def draw_levels(seed: int, patient: int) -> tuple[int | None, int | None]:
  """The levels of a patient's left and right eye; None where there is no photograph."""
  rng = _chance(seed, patient, 0)
  one_eyed, missing = rng.uniform() < ONE_EYED, int(rng.integers(2))
  severity = (rng.normal() + EYE_NOISE * rng.normal(size=2)) / np.hypot(1, EYE_NOISE)
  levels = [int(np.searchsorted(LEVEL_STARTS, one)) for one in severity]
  if one_eyed:
    levels[missing] = None
  return levels[0], levels[1]


def draw_patient(seed: int, patient: int, size: int) -> Patient:
  """Draws a patient's photographs, size × size pixels; the same on every machine and process."""
  rng = _chance(seed, patient, 1)
  camera = eye_.draw_camera(rng)
  habit = lesions_.draw_habit(rng)
  eyes = []
  for i, (name, level) in enumerate(
    zip(("left", "right"), draw_levels(seed, patient), strict=True)
  ):
    if level is None:
      continue
    rngs = [_chance(seed, patient, 10 * (i + 1) + k) for k in range(4)]
    anatomy = eye_.draw_anatomy(rngs[0])
    marks = lesions_.draw_lesions(rngs[1], anatomy, level)
    marks += lesions_.draw_harmless(rngs[2], anatomy, habit)
    image = paint(anatomy, camera, marks, size, rngs[3])
    eyes.append(_finish(image, anatomy, marks, name, f"{patient:05d}_{name}"))
  return Patient(f"{patient:05d}", tuple(eyes))


def _chance(seed, patient, what):
  # The last number must not be 0: numpy takes [a, b] and [a, b, 0] for the same seed.
  return np.random.default_rng([seed, patient, what + 1])


def draw_example(seed: int, patient: int, size: int, quality: int = 92) -> dict:
  """A patient as an example of data/schema.py, the photographs as JPEG (without subsampling)."""
  drawn = draw_patient(seed, patient, size)
  images = []
  for one in drawn.eyes:
    buffer = io.BytesIO()
    Image.fromarray(one.image).save(buffer, "JPEG", quality=quality, subsampling=0)
    images.append(buffer.getvalue())
  return {
    "patient": drawn.patient,
    "images": images,
    "image_ids": [one.image_id for one in drawn.eyes],
    "eyes": [one.eye for one in drawn.eyes],
    "levels": [one.level for one in drawn.eyes],
    "boxes": [
      {"eye": i, "type": int(type_), "box": box}
      for i, one in enumerate(drawn.eyes)
      for type_, box in zip(one.types, one.boxes, strict=True)
    ],
  }


def _finish(image, anatomy, marks, name, image_id) -> Eye:
  """Mirrors a right eye, and grades it by the boxes in pixels."""
  size = image.shape[0]
  lesions = [mark for mark in marks if mark.type is not None]
  boxes = np.array([mark.box for mark in lesions], np.float32).reshape(-1, 4) * (size / UNIT)
  types = np.array([mark.type for mark in lesions], np.int32)
  fovea = np.array(anatomy.fovea[::-1]) * (size / UNIT)
  if name == "right":
    image = np.ascontiguousarray(image[:, ::-1])
    boxes[:, 1::2] = size - boxes[:, 3::-2]
    fovea[1] = size - fovea[1]
  level = grade(types, boxes, fovea)
  return Eye(image, name, image_id, level, boxes, types, tuple(fovea))


def paint(anatomy, camera, marks, size, rng) -> np.ndarray:
  """The photograph of a (left) eye with these marks, uint8 [size, size, 3].

  `rng` makes texture, light and noise; what it gives does not depend on the marks, so the same
  eye can be painted with a lesion and without.
  """
  ground, light = canvas_.background(rng, anatomy, camera)
  canvas = canvas_.Canvas(ground, light, size)
  for mark in marks:
    for spot in mark.under:
      canvas.soft(*spot)
  exudates = [shape for mark in marks for shape in mark.light]
  if exudates:
    canvas.cover(exudates, (255, 232, 150))
  canvas.absorb(anatomy.vessels + [s for mark in marks for s in mark.dark], camera.contrast)
  for mark in marks:
    for spot in mark.over:
      canvas.soft(*spot)
  return canvas.photograph(rng, anatomy, camera)


def as_camera(image, rng) -> np.ndarray:
  """A drawn photograph as a camera stores it: 4:3, black at the sides, of varying width.

  Args:
    image: uint8 [S, S, 3].
    rng: a numpy Generator.

  Returns:
    uint8 [h, w, 3] with w > h; the field of view keeps its size and may lose a little of its top
    and bottom, as the frames of some cameras do.
  """
  size = image.shape[0]
  height = int(size * (rng.uniform(0.93, 0.99) if rng.uniform() < 0.3 else rng.uniform(1, 1.2)))
  width = max(round(height * rng.uniform(1.3, 1.55)), size)
  frame = np.abs(rng.normal(1.0, 1.0, (height, width, 3))).clip(0, 6).astype(np.uint8)
  left = int((width - size) * rng.uniform(0.3, 0.7))
  top = (height - size) // 2
  y0, y1 = max(top, 0), min(top + size, height)
  frame[y0:y1, left : left + size] = image[y0 - top : y1 - top]
  return frame
