"""Lesions of drawn eyes, and the harmless things that look like them in a small view.

A Mark is a handful of shapes in UNIT (see synthetic_eye): polygons that absorb light, polygons of
hard exudate, and soft spots below and above the vessels.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from medattn_jax.data.schema import TYPES
from medattn_jax.data.synthetic_eye import UNIT, normals

MICROANEURYSM, HAEMORRHAGE, HARD_EXUDATE, COTTON_WOOL_SPOT, NEOVASCULARISATION = range(len(TYPES))


@dataclasses.dataclass
class Mark:
  """Something on the retina, to be painted: a lesion of a type, or a harmless thing (None)."""

  type: int | None
  extent: np.ndarray  # [n, 3] of x, y, reach: the box encloses these circles
  under: list = dataclasses.field(default_factory=list)  # soft spots below the vessels
  over: list = dataclasses.field(default_factory=list)  # soft spots above the vessels
  dark: list = dataclasses.field(default_factory=list)  # polygons that absorb light
  light: list = dataclasses.field(default_factory=list)  # polygons of hard exudate

  @property
  def box(self):
    """(y0, x0, y1, x1) in UNIT."""
    x, y, r = self.extent.T
    return (y - r).min(), (x - r).min(), (y + r).max(), (x + r).max()


def draw_lesions(rng, anatomy, level: int) -> list[Mark]:
  """Lesions that make an eye of this level; every box lies in the field of view."""
  marks = []
  if level == 0:
    return marks
  few = int(rng.integers(2, 11)) if level == 1 else int(rng.integers(3, 18))
  foci = _foci(rng, anatomy, 2)
  marks += [_somewhere(rng, anatomy, _microaneurysm, 4, foci=foci) for _ in range(few)]
  if level == 2:
    marks += _moderate(rng, anatomy)
  elif level == 3:
    marks += _severe(rng, anatomy)
  elif level == 4:
    around = rng.choice(3, p=[0.2, 0.55, 0.25])
    marks += (lambda *_: [], _moderate, _severe)[around](rng, anatomy)
    for _ in range(1 + int(rng.integers(3))):
      marks += _new_vessels(rng, anatomy)
  return marks


def _moderate(rng, anatomy):
  """More than microaneurysms, less than severe: at most 42 haemorrhages in the whole eye."""
  kind = rng.choice(3, p=[0.45, 0.25, 0.3])  # mostly blood, mostly exudate, both
  count = int(rng.integers(2, 8)) if kind == 1 else int(rng.integers(8, 41))
  foci = _foci(rng, anatomy, 2)
  marks = [_somewhere(rng, anatomy, _haemorrhage, 10, foci=foci) for _ in range(count)]
  if kind > 0:
    for _ in range(int(rng.integers(2, 6))):
      marks.append(_somewhere(rng, anatomy, _exudates, 25, foci=foci))
  if rng.uniform() < 0.35:
    for _ in range(int(rng.integers(1, 5))):
      marks.append(_somewhere(rng, anatomy, _cotton_wool, 30, foci=foci))
  if rng.uniform() < 0.35:  # a large pale blot: in the small view like a tangle of new vessels
    for _ in range(int(rng.integers(1, 3))):
      marks.append(_somewhere(rng, anatomy, _large_blot, 40))
  return marks


def _severe(rng, anatomy):
  """More than 20 haemorrhages in each quadrant: 21 to 33, about a focus of each."""
  small = functools.partial(_haemorrhage, largest=15)
  marks = []
  for quadrant in ((False, False), (False, True), (True, False), (True, True)):
    foci = _foci(rng, anatomy, 1, quadrant)
    for _ in range(21 + int(rng.integers(0, 13))):
      marks.append(_somewhere(rng, anatomy, small, 10, quadrant, foci))
  for _ in range(int(rng.integers(0, 4))):
    marks.append(_somewhere(rng, anatomy, _exudates, 25))
  for _ in range(int(rng.integers(0, 6))):
    marks.append(_somewhere(rng, anatomy, _cotton_wool, 30))
  return marks


def _foci(rng, anatomy, number, quadrant=None):
  """Places [number, 3] of x, y and spread about which lesions lie: retinopathy is patchy."""
  margin = 150  # so that most of what lies about a focus is in the field
  places = [_place(rng, anatomy, margin, quadrant) for _ in range(number)]
  return np.array([(*place, rng.uniform(65, 95)) for place in places])


def _somewhere(rng, anatomy, make, margin, quadrant=None, foci=None):
  """A mark of `make(rng, x, y)`, its box in the field and its centre in the quadrant.

  With `foci` it lies about one of them, seven times in eight.
  """
  while True:
    place = _place(rng, anatomy, margin, quadrant)
    if foci is not None and rng.uniform() < 7 / 8:
      x, y, spread = foci[rng.integers(len(foci))]
      place = (x, y) + spread * rng.normal(size=2)
      if not anatomy.inside(*place, margin + 8):
        continue
    mark = make(rng, *place)
    if _fits(anatomy, mark) and quadrant in (None, _quadrant(anatomy, mark)):
      return mark


def _fits(anatomy, mark):
  y0, x0, y1, x1 = mark.box
  return anatomy.inside(np.array([x0, x1, x0, x1]), np.array([y0, y0, y1, y1]), 3).all()


def _quadrant(anatomy, mark):
  """(below, right) of the fovea; None near a border, so that the count hangs on no rounding."""
  y0, x0, y1, x1 = mark.box
  dx, dy = (x0 + x1) / 2 - anatomy.fovea[0], (y0 + y1) / 2 - anatomy.fovea[1]
  return None if min(abs(dx), abs(dy)) < 4 else (dy > 0, dx > 0)


def _place(rng, anatomy, margin, quadrant=None):
  """A point in the field, `margin` from its rim, off the disc and the fovea's centre."""
  fovea, disc = anatomy.fovea, anatomy.disc
  while True:
    x, y = (np.array(anatomy.centre) + rng.uniform(-1, 1, (48, 2)) * anatomy.radius).T
    dx, dy = x - fovea[0], y - fovea[1]
    good = anatomy.inside(x, y, margin + 8) & (dx * dx + dy * dy > 55**2)
    good &= np.hypot(x - disc[0], y - disc[1]) > anatomy.disc_radius + margin
    if quadrant is not None:
      below, right = quadrant
      good &= ((dy > 0) == below) & ((dx > 0) == right)
    if good.any():
      return float(x[good.argmax()]), float(y[good.argmax()])


def _blob(rng, x, y, radius, points=14, rough=0.15, stretch=1.0, angle=0.0):
  """A closed outline [points, 2] around (x, y), rough by low harmonics."""
  t, cosine, sine = _circle(points)
  r = np.ones(points)
  for k in (2, 3, 5):
    r += rough * rng.normal() / math.sqrt(k) * np.cos(k * t + rng.uniform(0, 6.3))
  r = radius * np.minimum(np.maximum(r, 0.45), 1.6)
  u, v = r * cosine * stretch, r * sine / stretch
  c, s = math.cos(angle), math.sin(angle)
  outline = np.empty((points, 2))
  outline[:, 0] = x + c * u - s * v
  outline[:, 1] = y + s * u + c * v
  return outline


@functools.lru_cache
def _circle(points):
  t = np.linspace(0, 2 * np.pi, points, endpoint=False)
  return t, np.cos(t), np.sin(t)


def _extent(*outlines, margin=1.0):
  points = np.concatenate(outlines)
  return np.concatenate([points, np.full((len(points), 1), margin)], 1)


def _microaneurysm(rng, x, y):
  radius = rng.uniform(3.0, 5.0)
  outline = _blob(rng, x, y, radius, points=10, rough=0.03)
  strength = rng.uniform(0.8, 1.1)
  fill = tuple(int(c * strength) for c in (62, 136, 112))
  return Mark(MICROANEURYSM, np.array([[x, y, radius * 1.05]]), dark=[(outline, fill)])


def _haemorrhage(rng, x, y, largest=24):
  """A dot, a blot, or a flame along the nerve fibres."""
  kind = rng.uniform()
  strength = rng.uniform(0.8, 1.05)
  core, rim = (tuple(int(c * strength * k) for c in (84, 184, 158)) for k in (1.0, 0.6))
  if kind < 0.75:
    radius = rng.uniform(7, 11) if kind < 0.35 else rng.uniform(10, largest)
    outline = _blob(rng, x, y, radius, rough=0.13, stretch=rng.uniform(1, 1.25), angle=kind * 40)
    inner = (outline - [x, y]) * 0.8 + [x, y]
    return Mark(HAEMORRHAGE, _extent(outline), dark=[(outline, rim), (inner, core)])
  long = rng.uniform(14, 1.5 * largest)
  angle = np.arctan2(y - UNIT / 2, x - 200) + rng.normal() * 0.3
  along, across = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
  strokes = []
  for offset in np.linspace(-1, 1, int(rng.integers(4, 8))):
    middle = [x, y] + along * rng.normal() * long * 0.2 + across * offset * long * 0.24
    half = along * long * rng.uniform(0.5, 1) * (1 - 0.4 * offset * offset)
    side = across * long * rng.uniform(0.07, 0.13)
    corners = [-half, side - half * 0.4, side + half * 0.3, half, half * 0.3 - side]
    strokes.append(middle + np.array(corners + [-side - half * 0.4]))
  return Mark(HAEMORRHAGE, _extent(*strokes), dark=[(stroke, core) for stroke in strokes])


def _large_blot(rng, x, y):
  """A large haemorrhage deep in the retina: pale, soft at its rim, below the vessels."""
  reach = rng.uniform(26, 52)
  opacity = rng.uniform(0.3, 0.45)
  under, extent = [], []
  for _ in range(int(rng.integers(4, 8))):
    px, py = [x, y] + rng.normal(0, 0.3, 2) * reach
    rx, ry = rng.uniform(0.45, 0.7, 2) * reach
    under.append((px, py, rx, ry, rng.uniform(0, 3.1), (138, 34, 28), opacity))
    extent.append((px, py, 0.9 * max(rx, ry)))
  return Mark(HAEMORRHAGE, np.array(extent), under=under)


def _exudates(rng, x, y):
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
    px, py = x + r * np.cos(a), y + r * np.sin(a)
    outline = _blob(rng, px, py, min(radius, 9), points=9, rough=0.2)
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
    over.append((px, py, rx, ry, rng.uniform(0, 3.1), (244, 230, 198), opacity))
    extent.append((px, py, 1.1 * max(rx, ry)))
  return Mark(COTTON_WOOL_SPOT, np.array(extent), over=over)


def _new_vessels(rng, anatomy):
  """A tangle of fine loops, on the disc or elsewhere; sometimes with blood before the retina."""
  if rng.uniform() < 0.3:  # on the disc
    while True:
      a = rng.uniform(0, 2 * np.pi)
      out = anatomy.disc_radius * 0.6
      x, y = anatomy.disc[0] + out * np.cos(a), anatomy.disc[1] + out * np.sin(a)
      tangle = _tangle(rng, x, y, largest=85, veil=0.05)
      if _fits(anatomy, tangle):
        break
  else:
    tangle = _somewhere(rng, anatomy, _tangle, 50)
  marks = [tangle]
  if rng.uniform() < 0.3:
    y0, x0, y1, x1 = tangle.box
    outline = _boat(rng, (x0 + x1) / 2, 0.2 * y0 + 0.8 * y1, rng.uniform(40, 75))
    blood = Mark(HAEMORRHAGE, _extent(outline), dark=[(outline, (96, 200, 172))])
    if _fits(anatomy, blood):
      marks.append(blood)
  return marks


def _tangle(rng, x, y, largest=112, veil=0.22):
  """New vessels of about 110 to 220 pixels: loops that start from (x, y), with a veil below them.

  The veil is reddish, or in most the greyish white of the fibrous tissue that grows with them.
  """
  reach = rng.uniform(58, largest)
  wide = rng.uniform(2.6, 3.8)
  fill = tuple(int(c * rng.uniform(0.85, 1.1)) for c in (52, 150, 116))
  dark, loops = [], []
  for k in range(int(8 + reach / 7)):
    loop = _loop(rng, x, y, reach, fan=k % 3 < 2)
    dark += [(strip, fill) for strip in _ribbon(loop, wide * rng.uniform(0.7, 1.2))]
    loops.append(loop)
  under = [(x, y, reach * 0.7, reach * 0.7, 0.0, (150, 60, 45), veil)]
  if rng.uniform() < 0.75:
    for _ in range(int(rng.integers(3, 6))):
      px, py = [x, y] + rng.normal(0, 0.28, 2) * reach
      rx, ry = rng.uniform(0.3, 0.6, 2) * reach
      under.append((px, py, rx, ry, rng.uniform(0, 3.1), (212, 190, 160), rng.uniform(0.3, 0.5)))
  return Mark(NEOVASCULARISATION, _extent(*loops, margin=2.0), under=under, dark=dark)


def _loop(rng, x, y, reach, fan):
  """A closed wavy loop [41, 2] within `reach` of (x, y): out from there and back, or beside it."""
  t = np.linspace(0, 2 * np.pi, 41)
  a = rng.uniform(0, 2 * np.pi)
  wave = 0.25 * np.cos(2 * t + rng.uniform(0, 6.3)) + 0.22 * np.cos(3 * t + rng.uniform(0, 6.3))
  if fan:
    r = rng.uniform(0.55, 1.05) * reach * np.sin(t / 2) ** 0.8 * (1 + 0.6 * wave)
    turn = a + rng.uniform(0.3, 0.9) * np.sin(t) + 0.5 * wave * np.sin(t / 2)
    u, v = r * np.cos(turn), r * np.sin(turn)
  else:
    r = rng.uniform(0.1, 0.36) * reach * (1 + wave)
    out = rng.uniform(0.3, 0.72) * reach
    u, v = out * np.cos(a) + r * np.cos(t), out * np.sin(a) + r * np.sin(t)
  near = np.minimum(1, reach / np.maximum(np.hypot(u, v), 1))
  return np.stack([x + u * near, y + v * near], 1)


def _ribbon(path, width):
  """A path as short strips that overlap nowhere else than at their ends."""
  side = normals(path) * (width / 2)
  left, right = path + side, path - side
  cuts = range(0, len(path) - 1, 10)
  return [np.concatenate([left[c : c + 11], right[c : c + 11][::-1]]) for c in cuts]


def _boat(rng, x, y, radius):
  """The outline of a haemorrhage before the retina: level at the top, round below."""
  t = np.linspace(0, np.pi, 24)
  deep = rng.uniform(0.35, 0.7)
  return np.stack([x + radius * np.cos(t), y + radius * deep * np.sin(t) ** 0.8], 1)


# --- harmless things, without a box ------------------------------------------------------------


def draw_habit(rng):
  """What both eyes of a patient tend to have: numbers of drusen, pigment spots, dust."""
  return {
    "drusen": int(rng.integers(6, 45)) if rng.uniform() < 0.33 else 0,
    "pigment": int(rng.integers(2, 12)) if rng.uniform() < 0.35 else 0,
    "dust": int(rng.integers(2, 10)) if rng.uniform() < 0.5 else 0,
    "naevus": rng.uniform() < 0.1,
    "reflex": rng.uniform() < 0.25,
  }


def draw_harmless(rng, anatomy, habit) -> list[Mark]:
  mark = Mark(None, np.zeros((0, 3)))
  for _ in range(rng.poisson(habit["drusen"])):
    x, y = anatomy.fovea + rng.normal(0, 1, 2) * [150, 120]
    if np.hypot(x - anatomy.disc[0], y - anatomy.disc[1]) > 110 and anatomy.inside(x, y, 20):
      r = rng.uniform(5, 13)
      mark.under.append((x, y, r, r, 0.0, (246, 206, 124), rng.uniform(0.22, 0.45)))
  for _ in range(rng.poisson(habit["pigment"])):
    x, y = _place(rng, anatomy, 25)
    rx, ry = rng.uniform(6, 17) * rng.uniform(0.8, 1.25, 2)
    mark.under.append((x, y, rx, ry, rng.uniform(0, 3), (62, 38, 32), rng.uniform(0.3, 0.6)))
  for _ in range(rng.poisson(habit["dust"])):
    x, y = _place(rng, anatomy, 10)
    radius, long = rng.uniform(2.5, 4.2), rng.uniform(1, 1.4)
    speck = _blob(rng, x, y, radius, points=7, rough=0.2, stretch=long)
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
