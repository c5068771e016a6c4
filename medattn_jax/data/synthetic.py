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

from medattn_jax.data import synthetic_eye as eye_
from medattn_jax.data.schema import TYPES
from medattn_jax.data.synthetic_eye import UNIT

MICROANEURYSM, HAEMORRHAGE, HARD_EXUDATE, COTTON_WOOL_SPOT, NEOVASCULARISATION = range(len(TYPES))

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


@dataclasses.dataclass
class Mark:
  """Something on the retina, to be painted: a lesion of a type, or a harmless thing (None)."""

  type: int | None
  extent: list  # of (x, y, reach): the box encloses these circles
  under: list = dataclasses.field(default_factory=list)  # soft spots below the vessels
  over: list = dataclasses.field(default_factory=list)  # soft spots above the vessels
  dark: list = dataclasses.field(default_factory=list)  # polygons that absorb light
  light: list = dataclasses.field(default_factory=list)  # polygons of hard exudate

  @property
  def box(self):
    """(y0, x0, y1, x1) in UNIT."""
    x, y, r = np.array(self.extent, np.float64).reshape(-1, 3).T
    return (y - r).min(), (x - r).min(), (y + r).max(), (x + r).max()


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


def draw_patient(seed: int, patient: int, size: int) -> Patient:
  """Draws a patient's photographs, size × size pixels; the same on every machine and process."""
  rng = np.random.default_rng([seed, patient])
  severity = rng.normal()
  one_eyed = rng.uniform() < ONE_EYED
  missing = int(rng.integers(2)) if one_eyed else None
  camera = eye_.draw_camera(rng)
  habit = _draw_habit(rng)
  eyes = []
  for i, name in enumerate(("left", "right")):
    if i == missing:
      continue
    chance = [np.random.default_rng([seed, patient, i, k]) for k in range(4)]
    noise = chance[0].normal() * EYE_NOISE
    level = int(np.searchsorted(LEVEL_STARTS, (severity + noise) / np.hypot(1, EYE_NOISE)))
    anatomy = eye_.draw_anatomy(chance[0])
    marks = draw_lesions(chance[1], anatomy, level) + _draw_harmless(chance[2], anatomy, habit)
    image = paint(anatomy, camera, marks, size, [seed, patient, i, 4])
    eyes.append(_finish(image, anatomy, marks, name, f"{patient:05d}_{name}"))
  return Patient(f"{patient:05d}", tuple(eyes))


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


def paint(anatomy, camera, marks, size, entropy) -> np.ndarray:
  """The photograph of a (left) eye with these marks, uint8 [size, size, 3].

  The chance of `entropy` makes texture, light and noise; it does not depend on the marks, so the
  same eye can be painted with a lesion and without.
  """
  rng = np.random.default_rng(entropy)
  ground, light = eye_.background(rng, anatomy, camera)
  canvas = eye_.Canvas(ground, size)
  for mark in marks:
    for spot in mark.under:
      canvas.soft(*spot)
  polygons = [shape for mark in marks for shape in mark.light]
  if polygons:
    cover = canvas.shapes(polygons, channels=1)[..., None]
    canvas.image += cover * (np.float32([255, 232, 150]) - canvas.image)
  dark = anatomy.vessels + [shape for mark in marks for shape in mark.dark]
  canvas.image *= 1 - canvas.shapes(dark) * np.float32(camera.contrast)
  for mark in marks:
    for spot in mark.over:
      canvas.soft(*spot)
  return canvas.photograph(rng, anatomy, camera, light)


# --- lesions -----------------------------------------------------------------------------------


def draw_lesions(rng, anatomy, level: int) -> list[Mark]:
  """Lesions that make an eye of this level."""
  marks = []
  if level == 0:
    return marks
  few = int(rng.integers(2, 11)) if level == 1 else int(rng.integers(3, 18))
  if level == 2:
    marks += _moderate(rng, anatomy)
  elif level == 3:
    marks += _severe(rng, anatomy)
  elif level == 4:
    around = rng.choice(3, p=[0.3, 0.5, 0.2])
    marks += (lambda *_: [], _moderate, _severe)[around](rng, anatomy)
    for _ in range(1 + int(rng.integers(3))):
      marks += _new_vessels(rng, anatomy)
  return [_microaneurysm(rng, *_place(rng, anatomy, 6)) for _ in range(few)] + marks


def _moderate(rng, anatomy):
  """More than microaneurysms, less than severe: never 20 haemorrhages in all four quadrants."""
  kind = rng.choice(3, p=[0.45, 0.25, 0.3])  # mostly blood, mostly exudate, both
  count = int(rng.integers(2, 8)) if kind == 1 else int(rng.integers(5, 41))
  marks = [_haemorrhage(rng, *_place(rng, anatomy, 30)) for _ in range(count)]
  if kind > 0:
    for _ in range(int(rng.integers(1, 5))):
      marks.append(_exudates(rng, anatomy, *_place(rng, anatomy, 60)))
  if rng.uniform() < 0.35:
    for _ in range(int(rng.integers(1, 5))):
      marks.append(_cotton_wool(rng, *_place(rng, anatomy, 70)))
  if rng.uniform() < 0.35:  # a large pale blot: in the small view like a tangle of new vessels
    for _ in range(int(rng.integers(1, 3))):
      marks.append(_large_blot(rng, *_place(rng, anatomy, 80)))
  return marks


def _severe(rng, anatomy):
  """More than 20 haemorrhages in each quadrant."""
  marks = []
  for below in (False, True):
    for right in (False, True):
      for _ in range(21 + int(rng.integers(0, 13))):
        spot = _place(rng, anatomy, 20, quadrant=(below, right))
        marks.append(_haemorrhage(rng, *spot, largest=15))
  for _ in range(int(rng.integers(0, 4))):
    marks.append(_exudates(rng, anatomy, *_place(rng, anatomy, 60)))
  for _ in range(int(rng.integers(0, 6))):
    marks.append(_cotton_wool(rng, *_place(rng, anatomy, 70)))
  return marks


def _place(rng, anatomy, margin, quadrant=None):
  """A point in the field, `margin` from its rim, off the disc and the fovea's centre."""
  while True:
    spread = rng.uniform(-1, 1, 2) * anatomy.radius
    x, y = anatomy.centre + spread
    dx, dy = x - anatomy.fovea[0], y - anatomy.fovea[1]
    off_disc = np.hypot(x - anatomy.disc[0], y - anatomy.disc[1]) - anatomy.disc_radius
    if not anatomy.inside(x, y, margin + 8) or dx * dx + dy * dy < 55**2 or off_disc < margin:
      continue
    if quadrant is None:
      return float(x), float(y)
    # Well inside its quadrant, so that the count does not hang on a rounding.
    if min(abs(dx), abs(dy)) > 8 and (dy > 0, dx > 0) == quadrant:
      return float(x), float(y)


def _blob(rng, x, y, radius, points=14, rough=0.15, stretch=1.0, angle=0.0):
  """A closed outline [points, 2] around (x, y), rough by low harmonics."""
  t = np.linspace(0, 2 * np.pi, points, endpoint=False)
  r = np.ones(points)
  for k in (2, 3, 5):
    r += rough * rng.normal() / np.sqrt(k) * np.cos(k * t + rng.uniform(0, 6.3))
  r = radius * np.clip(r, 0.45, 1.6)
  u, v = r * np.cos(t) * stretch, r * np.sin(t) / stretch
  c, s = np.cos(angle), np.sin(angle)
  return np.stack([x + c * u - s * v, y + s * u + c * v], 1)


def _extent(*outlines, margin=1.0):
  return [(x, y, margin) for outline in outlines for x, y in outline]


def _microaneurysm(rng, x, y):
  radius = rng.uniform(3.0, 5.0)
  outline = _blob(rng, x, y, radius, points=10, rough=0.03)
  strength = rng.uniform(0.8, 1.1)
  fill = tuple(int(c * strength) for c in (62, 136, 112))
  return Mark(MICROANEURYSM, [(x, y, radius * 1.05)], dark=[(outline, fill)])


def _haemorrhage(rng, x, y, largest=24):
  """A dot, a blot, or a flame along the nerve fibres."""
  kind = rng.uniform()
  strength = rng.uniform(0.75, 1.05)
  core, rim = ([int(c * strength * k) for c in (104, 205, 180)] for k in (1.0, 0.62))
  if kind < 0.75:
    radius = rng.uniform(7, 11) if kind < 0.35 else rng.uniform(10, largest)
    outline = _blob(rng, x, y, radius, rough=0.16, stretch=rng.uniform(1, 1.25), angle=kind * 40)
  else:
    radius = rng.uniform(9, 0.8 * largest)
    angle = np.arctan2(y - UNIT / 2, x - 200) + rng.normal() * 0.3
    outline = _blob(rng, x, y, radius, points=22, rough=0.3, stretch=rng.uniform(1.5, 2), angle=angle)
  inner = (outline - [x, y]) * 0.8 + [x, y]
  return Mark(HAEMORRHAGE, _extent(outline), dark=[(outline, tuple(rim)), (inner, tuple(core))])


def _large_blot(rng, x, y):
  """A large haemorrhage deep in the retina: paler, and soft at its rim."""
  radius = rng.uniform(26, 55)
  outline = _blob(rng, x, y, radius, points=26, rough=0.14)
  steps = [(outline - [x, y]) * k + [x, y] for k in (1.0, 0.93, 0.86, 0.76)]
  strength = rng.uniform(0.55, 0.8)
  dark = [
    (step, tuple(int(c * strength * k) for c in (80, 160, 135)))
    for step, k in zip(steps, (0.3, 0.55, 0.8, 1.0), strict=True)
  ]
  return Mark(HAEMORRHAGE, _extent(outline), dark=dark)


def _exudates(rng, anatomy, x, y):
  """A cluster or a ring of sharp yellow grains."""
  count, reach = int(rng.integers(8, 42)), rng.uniform(22, 55)
  angle = rng.uniform(0, 2 * np.pi, count)
  if rng.uniform() < 0.3:
    reach_each = reach * rng.normal(1, 0.1, count)
    angle = angle[0] + angle * 0.7
  else:
    reach_each = reach * np.abs(rng.normal(0, 0.5, count))
  reach_each = np.minimum(reach_each, 60)
  strength = rng.uniform(0.7, 0.95)
  light, outlines = [], []
  for a, r in zip(angle, reach_each, strict=True):
    radius = 2.6 + rng.exponential(2.0)
    outline = _blob(
      rng, x + r * np.cos(a), y + r * np.sin(a), min(radius, 9), points=9, rough=0.2
    )
    outlines.append(outline)
    light.append((outline, int(255 * strength * rng.uniform(0.8, 1))))
  return Mark(HARD_EXUDATE, _extent(*outlines), light=light)


def _cotton_wool(rng, x, y):
  """A white fluffy spot, above the vessels."""
  reach = rng.uniform(16, 34)
  opacity = rng.uniform(0.35, 0.55)
  over, extent = [], []
  for _ in range(int(rng.integers(4, 8))):
    px, py = x + rng.normal() * reach * 0.4, y + rng.normal() * reach * 0.3
    rx, ry = rng.uniform(0.35, 0.75, 2) * reach
    over.append((px, py, rx, ry, rng.uniform(0, 3.1), (248, 238, 212), opacity))
    extent.append((px, py, 1.1 * max(rx, ry)))
  return Mark(COTTON_WOOL_SPOT, extent, over=over)


def _new_vessels(rng, anatomy):
  """A tangle of fine loops, on the disc or elsewhere; sometimes with blood before the retina."""
  reach = rng.uniform(30, 88)
  if rng.uniform() < 0.3:
    a = rng.uniform(0, 2 * np.pi)
    x, y = np.array(anatomy.disc) + anatomy.disc_radius * 0.6 * np.array([np.cos(a), np.sin(a)])
    reach = min(reach, 75)
  else:
    x, y = _place(rng, anatomy, 95)
  dark, outlines = [], []
  wide = rng.uniform(2.6, 4.0)
  fill = tuple(int(c * rng.uniform(0.85, 1.1)) for c in (60, 150, 118))
  for _ in range(int(9 + reach / 6)):
    loop = _loop(rng, x, y, reach)
    dark += [(strip, fill) for strip in _ribbon(loop, wide * rng.uniform(0.7, 1.2))]
    outlines.append(loop)
  veil = (x, y, reach * 0.75, reach * 0.75, 0.0, (150, 60, 45), 0.22)
  marks = [Mark(NEOVASCULARISATION, _extent(*outlines, margin=2.0), under=[veil], dark=dark)]
  if rng.uniform() < 0.3:
    pool = _pool(rng, x, y + reach * 0.7, rng.uniform(40, 75))
    if anatomy.inside(pool[:, 0], pool[:, 1], 8).all():
      marks.append(Mark(HAEMORRHAGE, _extent(pool), dark=[(pool, (110, 212, 188))]))
  return marks


def _loop(rng, x, y, reach):
  """A closed wavy loop [40, 2] through the neighbourhood of (x, y), within `reach`."""
  t = np.linspace(0, 2 * np.pi, 41)
  out = rng.uniform(0.2, 0.62) * reach
  a = rng.uniform(0, 2 * np.pi)
  size = rng.uniform(0.2, 0.5) * reach
  r = size * (1 + 0.28 * np.cos(2 * t + rng.uniform(0, 6.3)) + 0.2 * np.cos(3 * t + rng.uniform(0, 6.3)))
  points = np.stack([x + out * np.cos(a) + r * np.cos(t), y + out * np.sin(a) + r * np.sin(t)], 1)
  far = np.hypot(points[:, 0] - x, points[:, 1] - y)[:, None]
  return [x, y] + (points - [x, y]) * np.minimum(1, reach / np.maximum(far, 1))


def _ribbon(path, width):
  """A path as short strips that overlap nowhere else than at their ends."""
  side = eye_.normals(path) * (width / 2)
  left, right = path + side, path - side
  cuts = range(0, len(path) - 1, 10)
  return [np.concatenate([left[c : c + 11], right[c : c + 11][::-1]]) for c in cuts]


def _pool(rng, x, y, radius):
  """A boat-shaped haemorrhage before the retina, level at the top."""
  t = np.linspace(0, np.pi, 24)
  deep = rng.uniform(0.35, 0.7)
  return np.stack([x + radius * np.cos(t), y + radius * deep * np.sin(t) ** 0.8], 1)


# --- harmless things, without a box ------------------------------------------------------------


def _draw_habit(rng):
  """What both eyes of a patient tend to have: numbers of drusen, pigment spots, dust."""
  return {
    "drusen": int(rng.integers(6, 45)) if rng.uniform() < 0.33 else 0,
    "pigment": int(rng.integers(2, 12)) if rng.uniform() < 0.35 else 0,
    "dust": int(rng.integers(2, 10)) if rng.uniform() < 0.5 else 0,
    "naevus": rng.uniform() < 0.1,
    "reflex": rng.uniform() < 0.25,
  }


def _draw_harmless(rng, anatomy, habit) -> list[Mark]:
  mark = Mark(None, [])
  for _ in range(rng.poisson(habit["drusen"])):
    x, y = anatomy.fovea + rng.normal(0, 1, 2) * [150, 120]
    if np.hypot(x - anatomy.disc[0], y - anatomy.disc[1]) > 110 and anatomy.inside(x, y, 20):
      r = rng.uniform(5, 13)
      mark.under.append((x, y, r, r, 0.0, (250, 214, 140), rng.uniform(0.25, 0.5)))
  for _ in range(rng.poisson(habit["pigment"])):
    x, y = _place(rng, anatomy, 25)
    rx, ry = rng.uniform(6, 17) * rng.uniform(0.8, 1.25, 2)
    mark.under.append((x, y, rx, ry, rng.uniform(0, 3), (62, 38, 32), rng.uniform(0.3, 0.6)))
  for _ in range(rng.poisson(habit["dust"])):
    x, y = _place(rng, anatomy, 10)
    speck = _blob(rng, x, y, rng.uniform(2.5, 4.2), points=7, rough=0.2, stretch=rng.uniform(1, 1.4))
    mark.dark.append((speck, (95, 95, 95)))
  if habit["naevus"] and rng.uniform() < 0.6:
    x, y = _place(rng, anatomy, 80)
    r = rng.uniform(25, 50)
    mark.under.append((x, y, r, r * 0.8, rng.uniform(0, 3), (92, 62, 60), rng.uniform(0.3, 0.5)))
  if habit["reflex"]:
    for _ in range(int(rng.integers(4, 12))):
      x, y = anatomy.fovea + rng.normal(0, 1, 2) * [160, 190]
      if anatomy.inside(x, y, 60):
        long, thin = rng.uniform(15, 55), rng.uniform(4, 9)
        angle = np.arctan2(y - anatomy.fovea[1], x - anatomy.fovea[0]) + 1.57 + rng.normal() * 0.3
        mark.over.append((x, y, long, thin, angle, (255, 225, 200), rng.uniform(0.06, 0.22)))
  return [mark]


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
  width = max(int(round(height * rng.uniform(1.3, 1.55))), size)
  frame = np.abs(rng.normal(1.0, 1.0, (height, width, 3))).clip(0, 6).astype(np.uint8)
  left = int((width - size) * rng.uniform(0.3, 0.7))
  top = (height - size) // 2
  y0, y1 = max(top, 0), min(top + size, height)
  frame[y0:y1, left : left + size] = image[y0 - top : y1 - top]
  return frame
