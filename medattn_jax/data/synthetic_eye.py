"""A healthy drawn eye: its anatomy, and the camera that takes it.

All lengths are in the 1230-pixel frame of a photograph (UNIT), x to the right and y down, and all
chance is drawn before the size of the image is known: one eye looks the same at every size. Every
eye is drawn as a left one (disc left of the macula); a right one is mirrored when it is finished.
"""

from __future__ import annotations

import dataclasses

import numpy as np

UNIT = 1230.0  # the frame in which all sizes are given
STEP = 11.0  # length of one step of a growing vessel


@dataclasses.dataclass(frozen=True)
class Anatomy:
  """What an eye and its photograph have before any lesion; points are (x, y) in UNIT."""

  centre: tuple[float, float]  # of the field of view
  radius: float
  half_height: float  # of the field: smaller than its radius where the camera cuts it
  notch: bool  # the small tab at the rim that tells up from down
  fovea: tuple[float, float]
  disc: tuple[float, float]
  disc_radius: float
  vessels: list  # (polygon [k,2], absorption rgb 0..255), the lowest first

  def inside(self, x, y, margin=0.0):
    """Whether points lie in the field of view, `margin` from its rim."""
    dx, dy = x - self.centre[0], y - self.centre[1]
    return (dx * dx + dy * dy < (self.radius - margin) ** 2) & (
      np.abs(dy) < self.half_height - margin
    )


@dataclasses.dataclass(frozen=True)
class Camera:
  """What both photographs of a patient share: the fundus's colour and the camera's faults."""

  colour: tuple[float, float, float]
  contrast: float  # of the vessels
  tigroid: float  # how far the choroid's vessels show through
  blur: float  # in UNIT
  noise: float  # grey levels
  vignette: float
  haze: float


def draw_camera(rng) -> Camera:
  """The colour and the camera of one patient."""
  red = rng.uniform(178, 232)
  green = red * rng.uniform(0.36, 0.50)
  blue = green * rng.uniform(0.45, 0.72)
  return Camera(
    colour=(red, green, blue),
    contrast=rng.uniform(0.78, 1.05),
    tigroid=rng.uniform(0, 1) ** 2 * 0.13,
    blur=rng.uniform(0.9, 2.0),
    noise=rng.uniform(1.2, 3.0),
    vignette=rng.uniform(0.05, 0.3),
    haze=rng.uniform(0, 1) ** 2,
  )


def draw_anatomy(rng) -> Anatomy:
  """The field of view, disc, fovea and vessel tree of one eye."""
  radius = rng.uniform(0.46, 0.497) * UNIT
  slack = UNIT / 2 - radius
  centre = tuple(UNIT / 2 + rng.uniform(-0.7, 0.7, 2) * slack)
  cut = rng.uniform(0.82, 0.95) if rng.uniform() < 0.35 else 1.0
  fovea = np.array([UNIT / 2 + rng.uniform(-5, 95), UNIT / 2 + rng.uniform(-35, 35)])
  disc = fovea + [-rng.uniform(395, 450), -rng.uniform(5, 55)]
  disc_radius = rng.uniform(70, 90)
  return Anatomy(
    centre=tuple(map(float, centre)),
    radius=radius,
    half_height=cut * radius,
    notch=bool(rng.uniform() < 0.3),
    fovea=tuple(map(float, fovea)),
    disc=tuple(map(float, disc)),
    disc_radius=disc_radius,
    vessels=_vessels(rng, disc, fovea, disc_radius, centre, radius),
  )


# --- vessels -----------------------------------------------------------------------------------


def _vessels(rng, disc, fovea, disc_radius, centre, radius):
  """Arterioles and venules: trunks along the arcades, then three orders of branches.

  Only what lies in the field of view is given.
  """
  trunks, widths, veins = _trunks(rng, disc, fovea, disc_radius)
  orders = [(trunks, widths, veins, np.full(len(trunks), trunks.shape[1]))]
  for count, length, width in ((46, (170, 430), 0.55), (90, (80, 230), 0.6), (110, (40, 120), 0.7)):
    orders.append(_branches(rng, orders[-1], count, length, width, disc, fovea))
  polygons = []
  for order, (paths, widths, veins, lengths) in reversed(list(enumerate(orders))):
    left, right = _strips(paths, widths)
    seen = np.hypot(*np.moveaxis(paths - centre, -1, 0)) < radius + 3 * STEP
    seen &= np.arange(paths.shape[1]) < lengths[:, None]
    first, last = seen.argmax(1), paths.shape[1] - seen[:, ::-1].argmax(1)
    for i in np.argsort(~veins, kind="stable"):  # arterioles cross above the venules
      if not seen[i].any():
        continue
      part = slice(first[i], max(last[i], first[i] + 2))
      faint = min(max(widths[i, 0] / 7, 0.35), 1.0)
      colour = (58, 150, 112) if veins[i] else (26, 122, 92)
      fill = tuple(int(c * faint) for c in colour)
      polygons.append((np.concatenate([left[i, part], right[i, part][::-1]]), fill))
      if order == 0:  # the light reflex along the middle of a trunk
        bright = tuple(int(c * (0.86 if veins[i] else 0.62)) for c in colour)
        inner = paths[i, part]
        side = (left[i, part] - inner) * 0.24
        polygons.append((np.concatenate([inner + side, (inner - side)[::-1]]), bright))
  return polygons


# Width, waviness and waypoints of the trunks, from the disc's centre; x in distances from the disc
# to the fovea, y in heights of the arcade, away from the midline.
TRUNKS = (
  (1.00, 1.0, [(0, 0.03), (0.07, 0.42), (0.34, 0.84), (0.88, 1.0), (1.55, 0.95), (2.5, 0.75)]),
  (0.56, 1.0, [(0, 0.03), (0.08, 0.5), (0.24, 1.0), (0.62, 1.4), (1.3, 1.55), (2.3, 1.5)]),
  (0.72, 0.8, [(0, 0.03), (-0.06, 0.4), (-0.2, 0.85), (-0.42, 1.3), (-0.7, 1.7), (-0.95, 2.1)]),
  (0.34, 0.5, [(0, 0.02), (-0.2, 0.1), (-0.45, 0.16), (-0.7, 0.2), (-1.0, 0.24), (-1.3, 0.3)]),
  (0.30, 0.3, [(0, 0.02), (0.2, 0.12), (0.4, 0.2), (0.55, 0.23), (0.68, 0.21), (0.78, 0.15)]),
)


def _trunks(rng, disc, fovea, disc_radius):
  """An arteriole and a venule along each arcade, and some straight ones to the nose."""
  d = fovea[0] - disc[0]
  up, down = rng.uniform(0.62, 0.84, 2) * d
  points, width, veins, calm = [], [], [], []
  for size, wave, way in TRUNKS:
    for sign, height in ((-1, up), (1, down)):
      shared = rng.normal(0, 1, (6, 2)) * 0.05
      apart = rng.normal(0.07, 0.05) * np.array([-1, 1])
      for vein in (True, False):
        wobble = shared + rng.normal(0, 1, (6, 2)) * [0.03, 0.05]
        course = np.array(way) + wobble * np.linspace(0.15, 1.3, 6)[:, None] * min(2 * size, 1)
        points.append(disc + course * (1 + apart[int(vein)]) * [d, sign * height])
        width.append(size * (rng.uniform(15, 18.5) if vein else rng.uniform(11, 14)))
        veins.append(vein)
        calm.append(wave)
  points, width, veins = np.array(points), np.array(width), np.array(veins)
  t = np.linspace(0, 5, 90)
  paths = _catmull_rom(points, t)
  # Slow waves across the path, growing from nothing at the disc.
  phase = rng.uniform(0, 2 * np.pi, (len(paths), 3, 1))
  speed = rng.uniform(1.2, 4.5, (len(paths), 3, 1))
  wave = (np.sin(phase + speed * t * 2) * [[[7.0], [5.0], [3.5]]]).sum(1) * np.minimum(t, 1)
  paths = paths + normals(paths) * (wave * np.array(calm)[:, None])[..., None]
  taper = np.linspace(1, 0.42, paths.shape[1]) ** 0.9
  return paths, width[:, None] * taper, veins


def _catmull_rom(points, t):
  """Smooth curves [n, len(t), 2] through points [n, k, 2] at parameters t in 0..k-1."""
  padded = np.concatenate(
    [2 * points[:, :1] - points[:, 1:2], points, 2 * points[:, -1:] - points[:, -2:-1]], 1
  )
  k = np.minimum(t.astype(int), points.shape[1] - 2)
  u = (t - k)[None, :, None]
  a, b, c, e = (padded[:, k + j] for j in range(4))
  return 0.5 * (
    2 * b + (c - a) * u + (2 * a - 5 * b + 4 * c - e) * u**2 + (3 * b - a - 3 * c + e) * u**3
  )


def _branches(rng, parents, count, length, width, disc, fovea):
  """Vessels that leave `parents` sideways and grow towards the fovea or the rim."""
  paths, widths, veins, lengths = parents
  weight = lengths * widths[:, 0]
  parent = rng.choice(len(paths), count, p=weight / weight.sum())
  at = (rng.uniform(0.12, 0.97, count) * lengths[parent]).astype(int)
  at = np.minimum(at, lengths[parent] - 2)
  p = paths[parent, at]
  tangent = paths[parent, at + 1] - p
  side = rng.choice([-1.0, 1.0], count)
  heading = np.arctan2(tangent[:, 1], tangent[:, 0]) + side * rng.uniform(0.45, 1.15, count)
  steps = (rng.uniform(*length, count) / STEP).astype(int)
  total = int(length[1] / STEP) + 1
  bend, jitter = np.zeros(count), rng.normal(0, 0.05, (total, count))
  out = np.empty((total, 2, count))
  alive = np.ones(count, bool)
  ends = np.full(count, 2)
  px, py = p.T
  for k in range(total):
    out[k, 0], out[k, 1] = px, py
    ends[alive & (k < steps)] = k + 1
    fx, fy = fovea[0] - px, fovea[1] - py
    distance = np.sqrt(fx * fx + fy * fy)
    alive &= distance > 62  # the fovea itself has no vessels
    inner = distance < 270
    goal = np.arctan2(np.where(inner, fy, py - disc[1]), np.where(inner, fx, px - disc[0]))
    bend = 0.65 * bend + jitter[k]
    heading = heading + bend + np.where(inner, 0.06, 0.045) * np.sin(goal - heading)
    px = px + STEP * np.cos(heading)
    py = py + STEP * np.sin(heading)
  out = np.ascontiguousarray(out.transpose(2, 0, 1))
  start = np.clip(widths[parent, at] * width * rng.uniform(0.7, 1.1, count), 2.6, 9)
  along = np.arange(total)[None] / np.maximum(steps, 2)[:, None]
  taper = start[:, None] * (1 - 0.78 * np.clip(along, 0, 1))
  return out, taper, veins[parent], np.maximum(ends, 2)


def normals(paths):
  """Unit normals [..., n, 2] of curves [..., n, 2]."""
  along = np.empty_like(paths)
  along[..., 1:-1, :] = paths[..., 2:, :] - paths[..., :-2, :]
  along[..., 0, :] = paths[..., 1, :] - paths[..., 0, :]
  along[..., -1, :] = paths[..., -1, :] - paths[..., -2, :]
  x, y = along[..., 0], along[..., 1]
  length = np.sqrt(x * x + y * y) + 1e-9
  result = np.empty_like(paths)
  np.divide(-y, length, out=result[..., 0])
  np.divide(x, length, out=result[..., 1])
  return result


def _strips(paths, widths):
  offset = normals(paths) * widths[..., None] / 2
  return paths + offset, paths - offset
