"""The canvas on which drawn eyes are painted, at any size; lengths are in UNIT (synthetic_eye)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from medattn_jax.data.synthetic_eye import UNIT, Anatomy, Camera

GRID = 205  # smooth things are painted on this grid and enlarged


def smooth_noise(rng, cells, size=GRID):
  """Noise of about `cells` bumps across the frame, float32 [size, size], deviation near 1."""
  coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32) * np.float32(1.35))
  return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def background(rng, anatomy: Anatomy, camera: Camera):
  """Fundus, macula and disc without vessels, and the light that falls on them.

  Returns:
    (background, light): float32 [3, GRID, GRID] in 0..255, already lit, and float32 [GRID, GRID].
  """
  x = (np.arange(GRID, dtype=np.float32) + 0.5) * np.float32(UNIT / GRID)
  y = x[:, None]
  slow, mid, fine, grain = (smooth_noise(rng, n) for n in (6, 22, 70, 180))
  texture = 0.03 * slow + 0.02 * mid + 0.016 * fine + 0.021 * grain
  texture += camera.tigroid * (np.exp(-((smooth_noise(rng, 26) / 0.35) ** 2)) - 0.5)

  far = np.sqrt((x - anatomy.fovea[0]) ** 2 + ((y - anatomy.fovea[1]) * 1.1) ** 2)
  macula = 0.24 * np.exp(-((far / 115) ** 2)) + 0.17 * np.exp(-((far / 42) ** 2))
  reflex = 1 + 0.10 * rng.uniform(0, 1) * np.exp(-(((far - 9) / 6) ** 2))

  dx, dy = x - anatomy.disc[0], y - anatomy.disc[1]
  out = np.sqrt(dx * dx + dy * dy) + 1e-3
  sine, cosine = dy / out, dx / out
  rho = np.sqrt((dx * rng.uniform(1.0, 1.12)) ** 2 + dy * dy) / anatomy.disc_radius
  # The nerve fibres' sheen, brightest above and below on the way to the macula.
  knots = rng.uniform(0, 1, 97).astype(np.float32)
  streak = knots[((np.arctan2(dy, dx) + np.pi) * np.float32(15.27)).astype(np.int32)]
  sheen = np.exp(-((rho / 3.2) ** 2)) * (0.5 + 0.5 * np.abs(sine)) * (0.6 + 0.6 * streak)
  ring = rng.uniform(0, 1) ** 2 * np.exp(-(((rho - 1.1) / 0.14) ** 2)) * (0.5 + 0.5 * cosine)

  cup = rng.uniform(0.35, 0.62)
  deep = np.sqrt((dx - 0.1 * anatomy.disc_radius) ** 2 + dy * dy) / (anatomy.disc_radius * cup)
  inside = 0.94 * _ramp(1.0 - rho, 0.15)
  hollow = 0.7 * _ramp(1.0 - deep, 0.4)
  tone = 1 + 0.06 * mid + 0.05 * cosine * _ramp(rho - 0.5, 1.0)

  cx, cy = (x - anatomy.centre[0]) / anatomy.radius, (y - anatomy.centre[1]) / anatomy.radius
  tilt = [rng.uniform(-0.09, 0.09) for _ in range(2)]
  square = cx * cx + cy * cy
  light = 1 - camera.vignette * square * np.sqrt(square) + tilt[0] * cx + tilt[1] * cy
  light += 0.03 * smooth_noise(rng, 5)
  light = np.clip(light, 0.3, 1.3)
  where = rng.uniform(0, 2 * np.pi)
  crescent = np.clip(cx * math.cos(where) + cy * math.sin(where) - 0.62, 0, 1)
  crescent *= np.sqrt(crescent) * np.float32(camera.haze * 1.6)

  planes = []
  for c, colour in enumerate(camera.colour):
    plane = colour * (1 + texture * (0.6, 1, 1.1)[c])
    plane *= reflex - macula * (0.42, 1.05, 1.1)[c]
    plane += sheen * (8, 20, 17)[c]
    plane *= 1 - ring * (0.3, 0.35, 0.35)[c]
    rim, pale = colour * 0.45 + (140, 112, 62)[c], (252, 224, 158)[c]
    plane += inside * ((rim + hollow * (pale - rim)) * tone - plane)
    plane += crescent * (60, 70, 80)[c]
    planes.append(plane * light)
  return np.stack(planes), light


def _ramp(value, width):
  ramp = np.clip(value / width + 0.5, 0, 1)
  return ramp * ramp * (3 - 2 * ramp)


def enlarge(plane, size):
  """float32 [n, n] → [size, size], smooth."""
  how = Image.Resampling.BICUBIC if size > GRID else Image.Resampling.BOX
  return np.asarray(Image.fromarray(plane).resize((size, size), how))


class Canvas:
  """A photograph of `size` pixels being painted; lengths are given in UNIT.

  The colours are separate planes, float32 [3, size, size]: numpy is several times faster on them
  than on pixels of three values.
  """

  def __init__(self, ground, light, size):
    self.planes = np.empty((3, size, size), np.float32)
    for plane, small in zip(self.planes, ground, strict=True):
      plane[:] = enlarge(small, size)
    self.light = light
    self.size = size
    self.scale = size / UNIT

  def soft(self, x, y, radius_x, radius_y, angle, colour, opacity):
    """Blends a Gaussian spot of `colour`; the radii are where it has fallen to 1/e."""
    s = self.scale
    reach = 2.2 * max(radius_x, radius_y) * s + 1
    x0, x1 = max(int(x * s - reach), 0), min(int(x * s + reach) + 1, self.size)
    y0, y1 = max(int(y * s - reach), 0), min(int(y * s + reach) + 1, self.size)
    if x0 >= x1 or y0 >= y1:
      return
    dx = np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - x * s)
    dy = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - y * s))[:, None]
    # The pixel's own width adds to the spot's, so that its mass does not depend on the size.
    rx, ry = (math.sqrt((r * s) ** 2 + 0.17) for r in (radius_x, radius_y))
    mass = radius_x * radius_y * s * s / (rx * ry)
    c, n = math.cos(angle), math.sin(angle)
    u, v = dx * (c / rx) + dy * (n / rx), dy * (c / ry) - dx * (n / ry)
    alpha = float(opacity * mass) * np.exp(-(u * u + v * v))
    cell = np.clip(int(y * GRID / UNIT), 0, GRID - 1), np.clip(int(x * GRID / UNIT), 0, GRID - 1)
    lit = np.array(colour, np.float32) * self.light[cell]
    patch = self.planes[:, y0:y1, x0:x1]
    patch += alpha * (lit[:, None, None] - patch)

  def cover(self, polygons, colour):
    """Covers with `colour` where the polygons (points [k,2], opacity 0..255) are."""
    opacity = np.asarray(self._shapes(polygons, "L"), np.float32) * np.float32(1 / 255)
    light = enlarge(self.light, self.size)
    for plane, value in zip(self.planes, colour, strict=True):
      plane += opacity * (light * value - plane)

  def absorb(self, polygons, contrast):
    """Takes away what the polygons (points [k,2], absorption rgb 0..255) absorb."""
    absorption = np.asarray(self._shapes(polygons, "RGB"))
    for c, plane in enumerate(self.planes):
      through = np.multiply(absorption[..., c], np.float32(-contrast / 255), dtype=np.float32)
      through += 1
      plane *= through

  def _shapes(self, polygons, mode):
    """Antialiased coverage × fill of polygons (points [k,2], fill), later ones on top."""
    factor = 3 if self.size <= 800 else 2
    sheet = Image.new(mode, (self.size * factor,) * 2)
    draw = ImageDraw.Draw(sheet)
    scale = self.scale * factor
    for points, fill in polygons:
      if factor == 3 and len(points) > 24:
        points = points[::2]  # of a vessel, half of them are enough in a small photograph
      draw.polygon((points * scale).astype(np.float32), fill=fill)
    return sheet.reduce(factor)

  def photograph(self, rng, anatomy: Anatomy, camera: Camera):
    """Blur, the black rim and noise: the finished uint8 [size, size, 3].

    In bands of rows, so that what is worked on stays in the processor's cache.
    """
    size = self.size
    out = np.empty((size, size, 3), np.uint8)
    kernel = _blur_kernel(camera.blur * self.scale)
    grain = np.float32(camera.noise * 12**0.5 / 256)
    height = max(2**15 // size, 8)
    for top in range(0, size, height):
      rows = np.arange(top, min(top + height, size))
      band = self._blurred(rows, kernel)
      band *= self._field(anatomy, rows)
      count = 2 * len(rows) * size
      noise = rng.integers(0, 2**64, -(-count // 8), np.uint64).view(np.int8)[:count]
      noise = (noise.reshape(2, len(rows), size) + np.float32(0.5)) * grain
      noise *= np.minimum(band[1] * np.float32(0.8 / 40), np.float32(0.8)) + np.float32(0.2)
      band[1] += noise[0] * np.float32(1.5)
      noise[1] *= np.float32(0.5)
      noise[0] += noise[1]
      band[::2] += noise[0]
      band += np.float32([2.5, 1.5, 2.0])[:, None, None]
      np.clip(band, 0, 255, out=band)
      for c in range(3):
        out[top : top + len(rows), :, c] = band[c]
    return out

  def _blurred(self, rows, kernel):
    """These rows of all planes, blurred by a kernel's half: float32 [3, rows, size], a copy."""
    r = len(kernel) - 1
    if r == 0:
      return self.planes[:, rows]
    padded = np.arange(rows[0] - r, rows[-1] + r + 1).clip(0, self.size - 1)
    band = _weighted(self.planes[:, padded], kernel, 1)
    wide = np.empty((3, len(rows), self.size + 2 * r), np.float32)
    wide[..., r:-r] = band
    wide[..., :r], wide[..., -r:] = band[..., :1], band[..., -1:]
    return _weighted(wide, kernel, 2)

  def _field(self, anatomy, rows):
    """The field of view in these rows, float32 [rows, size] in 0..1."""
    s = self.scale
    at = (np.arange(self.size, dtype=np.float32) + 0.5) / np.float32(s)
    dx, dy = at - np.float32(anatomy.centre[0]), (at[rows] - np.float32(anatomy.centre[1]))[:, None]
    edge = np.sqrt(dx * dx + dy * dy)
    np.subtract(anatomy.radius, edge, out=edge)
    np.minimum(edge, anatomy.half_height - np.abs(dy), out=edge)
    if anatomy.notch:
      along = (dx - dy) * np.float32(np.sqrt(0.5)) - anatomy.radius
      across = np.abs(dx + dy) * np.float32(np.sqrt(0.5))
      np.maximum(edge, np.minimum(33 - np.abs(along), 30 - across), out=edge)
    edge *= np.float32(s / 1.6)
    edge += np.float32(0.5)
    return np.clip(edge, 0, 1, out=edge)


def _blur_kernel(sigma):
  """Half of a Gaussian's kernel, the middle first, less the pixels' own width; [1] is none."""
  variance = sigma**2 - 0.12
  if variance < 0.09:
    return np.ones(1, np.float32)
  if variance < 0.5:  # three weights of just this variance
    return np.float32([1 - variance, variance / 2])
  half = np.exp(-(np.arange(int(2.5 * variance**0.5) + 2) ** 2) / (2 * variance))
  return (half / (2 * half.sum() - 1)).astype(np.float32)


def _weighted(band, kernel, axis):
  """`band` weighted by a kernel's half along an axis, which loses its ends."""
  r = len(kernel) - 1
  n = band.shape[axis] - 2 * r
  cut = [np.s_[:]] * 3

  def shifted(k):
    cut[axis] = np.s_[r + k : r + k + n]
    return band[tuple(cut)]

  result = shifted(0) * kernel[0]
  pair = np.empty_like(result)
  for k in range(1, r + 1):
    np.add(shifted(-k), shifted(k), out=pair)
    pair *= kernel[k]
    result += pair
  return result
