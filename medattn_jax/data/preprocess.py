"""From any photograph file to the square picture the models see. numpy and PIL alone.

One way for training data and for `predict`: load_photograph, then prepare_photograph, or, for
images of an aligned set, which have a frame of their own, fit_aligned. A file is believed nothing:
it is opened only if it is a plain file, and decoded only if its size and what its header declares
are within limits. A picture that cannot be used raises BadImage, whose text is the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000  # 8000 x 8000; the largest fundus cameras have 50 million
MIN_SIDE = 32
MAX_ASPECT = 4
MAX_SCANS = 200  # of a JPEG: a few bytes more each, and a whole decoding pass
MAX_PARTS = 10_000  # of a JPEG: tables, scans, and profiles and the like in 64 KiB each
# Raster formats alone: PIL would run another program for EPS.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
SUFFIXES = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm",
  ".pgm", ".pnm", ".jp2", ".j2k",
)  # fmt: skip
_SCAN = b"\xff\xda"
# What begins a part of a JPEG that has its length behind it. In a scan's data 0 is behind 255.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xda-\xfe]")
NO_MEMORY = "needs more memory than there is"
BLACK = 8  # below this a pixel is black whatever else the picture shows
_PLAIN = {"L", "RGB", "CMYK", "YCbCr"}
_KINDS = (
  (stat.S_ISDIR, "a folder"),
  (stat.S_ISFIFO, "a pipe"),
  (stat.S_ISSOCK, "a socket"),
  (stat.S_ISCHR, "a device"),
  (stat.S_ISBLK, "a device"),
)


class BadImage(ValueError):
  """A picture that cannot be used; the text says why, and follows the file's name."""


def resolve(path: str | os.PathLike, root: str | os.PathLike) -> pathlib.Path:
  """The real place of `path`, a file somewhere below the folder `root`.

  Raises BadImage where it is missing, or a link that dangles, loops or leaves `root`.
  """
  path, root = pathlib.Path(path), pathlib.Path(root).resolve()
  linked = path.is_symlink()
  try:
    real = path.resolve(strict=True)
  except FileNotFoundError:
    raise BadImage("is a link to nothing" if linked else "is missing") from None
  except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
    raise BadImage("is a link in a loop" if linked else "cannot be reached") from None
  if not real.is_relative_to(root):
    raise BadImage(f"is a link to outside of {root.name}" if linked else "lies outside")
  return real


@contextlib.contextmanager
def plain_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """Opens a plain file for reading. Never waits; raises BadImage for anything else."""
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
  except OSError as error:
    kind = _kind(path)
    raise BadImage(f"is {kind}" if kind else f"cannot be opened: {error.strerror}") from None
  try:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
      raise BadImage(f"is {_kind(path) or 'no plain file'}")
    with open(descriptor, "rb", closefd=False) as file:
      yield file
  finally:
    os.close(descriptor)


def read_bytes(path: str | os.PathLike) -> bytes:
  """The bytes of a plain file of sensible size. Never waits; raises BadImage for anything else."""
  with plain_file(path) as file:
    try:
      size = os.fstat(file.fileno()).st_size
      if size > MAX_BYTES:
        raise BadImage(f"has {size} bytes, more than {MAX_BYTES}")
      content = file.read(MAX_BYTES)
    except OSError as error:
      raise BadImage(f"cannot be read: {error.strerror}") from None
  if not content:
    raise BadImage("is empty (0 bytes)")
  return content


def load_photograph(path: str | os.PathLike, least: int = MIN_SIDE) -> np.ndarray:
  """The photograph in the file `path`, upright.

  Args:
    least: the shortest side that is accepted, in pixels.

  Returns:
    uint8 [h, w, 3], RGB. Gray, palette, CMYK and 16-bit pictures are converted, transparent ones
    laid on black; of several frames the first is taken.

  Raises:
    BadImage: no picture, a damaged one, or one beyond the limits above.
  """
  return decode_photograph(read_bytes(path), least)


def decode_photograph(content: bytes, least: int = MIN_SIDE) -> np.ndarray:
  """load_photograph of a file's bytes."""
  return _decoded(content, least, _upright_rgb)


def decode_mask(content: bytes) -> np.ndarray:
  """bool [h, w]: where the picture of a file's bytes is bright, as the file has it, not turned.

  Bright is more than half as bright as its brightest pixel: a mask may be of 0 and 1, 0 and 255, or
  of black and a colour. Raises BadImage as load_photograph does.
  """
  gray = _decoded(content, MIN_SIDE, lambda image: np.asarray(image.convert("L")))
  return gray > gray.max() // 2


def _decoded(
  content: bytes, least: int, pixels: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
  """`pixels` of the picture of these bytes, opened with care, and loaded."""
  with warnings.catch_warnings():
    # PIL warns of oddities that either do not matter or end in an error below.
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
      image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
      raise BadImage(f"declares more than {MAX_PIXELS} pixels") from None
    except MemoryError:
      raise BadImage(NO_MEMORY) from None
    except Exception as error:
      raise BadImage(_unknown(content, error)) from None
    _check_size(*image.size, least)
    if image.format in ("JPEG", "MPO"):
      _check_scans(content)
    try:
      image.load()
      return pixels(image)
    except BadImage:
      raise
    except MemoryError:
      raise BadImage(NO_MEMORY) from None
    except Exception as error:
      text = " ".join(str(error).split())[:120]
      raise BadImage(f"is damaged ({text or type(error).__name__})") from None


def prepare_photograph(
  image: np.ndarray, full_size: int, edges: tuple[int, int, int, int] | None = None
) -> np.ndarray:
  """Crops the black border, pads to a square with black, and resizes (papers: §1, data path).

  Args:
    image: uint8 [h, w, 3].
    full_size: S, the side of the result in pixels.
    edges: the image's field_of_view, where that is known already.

  Returns:
    uint8 [S, S, 3]. A picture that is cropped already keeps its pixels.

  Raises:
    BadImage: nothing but black, or nothing but a small spot.
  """
  y0, y1, x0, x1 = edges or field_of_view(image)
  image = image[y0:y1, x0:x1]
  height, width = image.shape[:2]
  side = max(height, width)
  if height != width:
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    image = square
  if side == full_size:
    return np.ascontiguousarray(image)
  resized = Image.fromarray(np.ascontiguousarray(image)).resize(
    (full_size, full_size), Image.Resampling.LANCZOS, reducing_gap=3.0
  )
  return np.array(resized)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where a photograph's pixels went: turned upright, cropped, padded and resized.

  Attributes:
    orientation: EXIF's number of the turn, 1 (none) to 8. height, width: of the upright picture.
    y0, y1, x0, x1: the part of it that is kept.
    padded: to a square, as by prepare_photograph; or stretched to one, as by fit_aligned.
  """

  orientation: int
  height: int
  width: int
  y0: int
  y1: int
  x0: int
  x1: int
  padded: bool

  def __str__(self) -> str:
    return "-".join(str(int(value)) for value in dataclasses.astuple(self))

  @classmethod
  def parse(cls, text: str) -> Placement:
    """What str() was made of."""
    *numbers, padded = map(int, text.split("-"))
    return cls(*numbers, bool(padded))

  def place(self, boxes: np.ndarray, full_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes that were drawn on the file's own pixels, on those of the prepared photograph.

    Args:
      boxes: [n, 4] of y0, x0, y1, x1 in pixels as the file has them, before EXIF's turn.
      full_size: S, the side of the prepared photograph.

    Returns:
      float32 [n, 4], y0, x0, y1, x1 in the prepared photograph; and bool [n], false for a box that
      lies in the border that was cut off.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    y, x = boxes[:, ::2], boxes[:, 1::2]
    swapped = self.orientation >= 5
    rows, columns = (self.width, self.height) if swapped else (self.height, self.width)
    if self.orientation in (3, 4, 6, 7):
      y = rows - y[:, ::-1]
    if self.orientation in (2, 3, 7, 8):
      x = columns - x[:, ::-1]
    if swapped:
      y, x = x, y
    y, x = np.clip(y, self.y0, self.y1) - self.y0, np.clip(x, self.x0, self.x1) - self.x0
    inside = (y[:, 0] < y[:, 1]) & (x[:, 0] < x[:, 1])
    tall, wide = self.y1 - self.y0, self.x1 - self.x0
    if self.padded:
      side = max(tall, wide)
      y, x = y + (side - tall) // 2, x + (side - wide) // 2  # the black beside it
      tall = wide = side
    y, x = y * (full_size / tall), x * (full_size / wide)
    placed = np.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], axis=1)
    return placed.astype(np.float32), inside


def orientation(content: bytes) -> int:
  """EXIF's number of the turn that decode_photograph gives the picture of these bytes, 1 to 8."""
  with warnings.catch_warnings(), contextlib.suppress(Exception):
    warnings.simplefilter("ignore")
    # Before it is loaded: a TIFF is turned, and forgets that it was, while it loads.
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
      number = image.getexif().get(ExifTags.Base.Orientation, 1)
    return number if number in range(1, 9) else 1
  return 1  # as there: EXIF that cannot be read turns nothing


def has_more_frames(content: bytes) -> bool:
  """Whether a picture follows the one that decode_photograph takes: pages, or an animation.

  The previews that cameras put behind a JPEG are none.
  """
  with warnings.catch_warnings(), contextlib.suppress(Exception):
    warnings.simplefilter("ignore")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
      if image.format in ("TIFF", "GIF", "PNG", "WEBP"):
        image.seek(1)  # EOFError where there is none; n_frames would count a million of them
        return True
  return False


def fit_aligned(image: np.ndarray, size: int, channels: int) -> np.ndarray:
  """An image of an aligned set in the set's frame: resized as a whole where it has another size.

  Nothing is cropped or padded, since that would move what the map weighs.

  Args:
    image: uint8 [h, w], [h, w, 1] or [h, w, 3].
    size: S, the side of the result in pixels.
    channels: C, of the result: 1 (gray, of RGB by PIL's weights) or 3.

  Returns:
    uint8 [S, S, C]. An image that is so already keeps its pixels.

  Raises:
    BadImage: too small or too thin.
  """
  height, width = image.shape[:2]
  _check_size(width, height, min(size, MIN_SIDE))
  if image.shape[2:] == (1,):
    image = image[..., 0]
  wanted = "L" if channels == 1 else "RGB"
  picture = Image.fromarray(np.ascontiguousarray(image))
  if picture.mode != wanted:
    picture = picture.convert(wanted)
  if picture.size != (size, size):
    picture = picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
  return np.array(picture).reshape(size, size, channels)


def field_of_view(image: np.ndarray) -> tuple[int, int, int, int]:
  """Rows y0:y1 and columns x0:x1 of what is not black border.

  A row counts where more than 1 % of it is brighter than 8 % of the picture's bright parts, so that
  noise, specks and a dark picture mislead it little. An axis with less than 1 % to cut stays whole.
  """
  height, width = image.shape[:2]
  stride = max(1, min(height, width) // 512)
  red, green, blue = np.moveaxis(image[::stride, ::stride], 2, 0)
  bright = np.maximum(np.maximum(red, green), blue)  # many times faster than max(axis=2)
  level = np.percentile(bright, 99)
  if level < BLACK:
    raise BadImage("is wholly black")
  lit = bright > max(BLACK, 0.08 * level)
  edges = []
  for axis, length in ((1, height), (0, width)):
    there = np.flatnonzero(lit.mean(axis=axis) > 0.01)
    if not len(there):
      raise BadImage("is black but for specks")
    low, high = there[0] * stride, min((there[-1] + 1) * stride, length)
    if low + length - high < 0.01 * length:
      low, high = 0, length
    edges += [int(low), int(high)]
  if min(edges[1] - edges[0], edges[3] - edges[2]) < MIN_SIDE // 2:
    raise BadImage(f"is black but for a spot of {edges[3] - edges[2]}x{edges[1] - edges[0]} pixels")
  return tuple(edges)


def _check_size(width: int, height: int, least: int) -> None:
  size = f"{width}x{height} pixels"
  if width * height > MAX_PIXELS:
    raise BadImage(f"declares {size}, more than {MAX_PIXELS}")
  if min(width, height) < least:
    raise BadImage(f"has {size}: at least {least} a side are needed")
  if max(width, height) > MAX_ASPECT * min(width, height):
    raise BadImage(f"has {size}: too thin for a photograph (at most {MAX_ASPECT} to 1)")


def _check_scans(content: bytes) -> None:
  """Raises BadImage for a JPEG of too many scans, or parts to look for them in.

  What looks like a scan within a profile, a preview or a comment is none.
  """
  if content.count(_SCAN) <= MAX_SCANS:
    return
  scans = parts = place = 0
  while marker := _MARKER.search(content, place):
    scans, parts, place = scans + (marker[0] == _SCAN), parts + 1, marker.end()
    if scans > MAX_SCANS:
      raise BadImage(f"has more than {MAX_SCANS} scans")
    if parts > MAX_PARTS:
      raise BadImage(f"has more than {MAX_PARTS} parts")
    if marker[0] != _SCAN:  # of that one the length is small, and what follows is data
      place += int.from_bytes(content[place : place + 2], "big")


def _upright_rgb(image: Image.Image) -> np.ndarray:
  """uint8 [h, w, 3] of a loaded picture of any mode."""
  with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
    image = ImageOps.exif_transpose(image)
  if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
    return _from_16_bit(np.asarray(image))
  if image.mode == "CMYK" and image.info.get("icc_profile"):
    image = _from_profile(image)
  if image.mode in ("1", "P", "LA", "PA", "RGBA", "RGBX", "La", "RGBa") or (
    image.mode in _PLAIN and image.has_transparency_data
  ):
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
  elif image.mode not in _PLAIN:
    raise BadImage(f"has pixels of kind {image.mode}: 8 or 16 bits gray or colour are read")
  return np.array(image.convert("RGB"))


def _from_16_bit(gray: np.ndarray) -> np.ndarray:
  """uint8 RGB of 16-bit gray: scaled, not clipped."""
  if gray.min() < 0 or gray.max() > 65535:
    raise BadImage("has 32-bit pixels: 8 or 16 bits gray or colour are read")
  scaled = ((gray.astype(np.uint32) + 128) // 257).astype(np.uint8)
  return np.repeat(scaled[:, :, None], 3, axis=2)


def _from_profile(image: Image.Image) -> Image.Image:
  """A CMYK picture in sRGB by its own ink profile; unchanged where that cannot be read."""
  try:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    srgb = ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
  except (ImageCms.PyCMSError, OSError):
    return image


def _kind(path: str | os.PathLike) -> str | None:
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return None
  return next((name for test, name in _KINDS if test(mode)), None)


def _unknown(content: bytes, error: Exception) -> str:
  start = content[:512].lstrip().lower()
  if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
    return "is no picture but a web page or XML"
  if content[128:132] == b"DICM":
    return "is DICOM, which is not read: export it as PNG or TIFF"
  if isinstance(error, Image.UnidentifiedImageError):
    return f"is no picture of a known format ({', '.join(FORMATS)})"
  return f"is damaged ({' '.join(str(error).split())[:120] or type(error).__name__})"
