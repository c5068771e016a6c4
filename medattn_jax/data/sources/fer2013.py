"""`--source=fer2013`: facial expressions as one sheet of pixels, fer2013.csv.

Columns `emotion` (0-6), `pixels` (48 · 48 gray values, separated by blanks) and `Usage` (Training,
PublicTest, PrivateTest), in any order. The sheet is read row by row, and again for each split.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Collection, Iterator
from typing import BinaryIO

import numpy as np

from medattn_jax.data import preprocess, schema, sources
from medattn_jax.errors import UserError

SHEET = "fer2013.csv"
SIZE = 48
EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")  # 0-6
USAGES = {"training": "train", "publictest": "validation", "privatetest": "test"}
COLUMNS = ("emotion", "pixels", "usage")
MAX_ROW = 2**16  # bytes; a row of 48 · 48 pixels has at most 9,300
WHAT = f"a {SHEET} with the columns emotion,pixels,Usage"
_EMOTION = re.compile(rb"([0-6])(\.0*)?")


def read(place: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Arrays:
  """The photographs of the sheet that `place` is or holds; splits are its `Usage`.

  Raises UserError where the sheet as a whole cannot be used. A row that cannot is in `rejected`.
  """
  del seed, skip  # nothing is drawn by chance, and no folder looked into
  file = sources.find_file(place, lambda name: name.lower() == SHEET, WHAT)
  counts = dict.fromkeys(schema.SPLITS, 0)
  rejected = []
  for line, cells in _rows(file):
    try:
      split = _split(cells)
      _level(cells)
      _image(cells)
      counts[split] += 1
    except preprocess.BadImage as error:
      rejected.append((f"{file.path.name} line {line}", str(error)))
  if not rejected and not any(counts.values()):
    raise UserError(f"{file.path} has a header but no rows: one row an image is needed")

  def images(wanted: str) -> Iterator[tuple[str, int, np.ndarray]]:
    for row, (_, cells) in enumerate(_rows(file)):
      try:
        if _split(cells) == wanted:
          level, image = _level(cells), _image(cells)
          yield f"{wanted}_{row:05}", level, image
      except preprocess.BadImage:
        continue  # it is in `rejected`

  return sources.Arrays(
    file=file,
    size=SIZE,
    channels=1,
    num_classes=len(EMOTIONS),
    counts={split: count for split, count in counts.items() if count},
    read=images,
    rejected=rejected,
    notes=[],
  )


def _rows(file: sources.RawFile) -> Iterator[tuple[int, dict[str, bytes] | str]]:
  """(line, cells by column) of every row that is not blank; a text, why there are no cells."""
  with file.open() as opened:
    header: list[str] | None = None
    for line, content in _lines(opened):
      if content is not None and not content.strip():
        continue
      if header is None:
        header = _header(file.path, content)
      elif content is None:
        yield line, f"has more than {MAX_ROW} characters"
      else:
        cells = [cell.strip().strip(b'"').strip() for cell in content.split(b",")]
        if len(cells) == len(header):
          yield line, dict(zip(header, cells, strict=True))
        else:
          yield line, f"has {len(cells)} cells where the header has {len(header)}"
    if header is None:
      raise UserError(f"{file.path} is empty; accepted: {WHAT}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
  """(number from 1, content) of every line, None for one that is too long."""
  line = 0
  while content := file.readline(MAX_ROW + 2):
    line += 1
    if len(content.rstrip(b"\r\n")) <= MAX_ROW:
      yield line, content
      continue
    while content and not content.endswith(b"\n"):
      content = file.readline(MAX_ROW)
    yield line, None


def _header(path: pathlib.Path, content: bytes | None) -> list[str]:
  text = (content or b"").decode("utf-8-sig", "replace")
  header = [cell.strip().strip('"').strip().lower() for cell in text.split(",")]
  missing = [name for name in COLUMNS if header.count(name) != 1]
  if missing:
    raise UserError(f"{path} has no column {' and '.join(missing)}: its header, separated by "
                    f"commas, begins {text.strip()[:60]!r}; accepted: {WHAT}")
  return header


def _cell(cells: dict[str, bytes] | str, name: str) -> bytes:
  if isinstance(cells, str):
    raise preprocess.BadImage(cells)
  return cells[name]


def _shown(value: bytes) -> str:
  return repr(value[:20].decode("utf-8", "replace"))


def _split(cells: dict[str, bytes] | str) -> str:
  usage = _cell(cells, "usage")
  split = USAGES.get(usage.decode("ascii", "replace").lower())
  if split is None:
    raise preprocess.BadImage(f"has Usage {_shown(usage)}: Training, PublicTest and PrivateTest "
                              "are accepted")
  return split


def _level(cells: dict[str, bytes] | str) -> int:
  emotion = _cell(cells, "emotion")
  found = _EMOTION.fullmatch(emotion)
  if found is None:
    raise preprocess.BadImage(f"has emotion {_shown(emotion)}: 0-6 are accepted")
  return int(found[1])


def _image(cells: dict[str, bytes] | str) -> np.ndarray:
  """uint8 [48, 48]."""
  text = _cell(cells, "pixels")
  values = text.split()
  if len(values) != SIZE * SIZE:
    raise preprocess.BadImage(f"has {len(values)} pixels: {SIZE * SIZE} are accepted")
  plain = not text.translate(None, b"0123456789 ")  # int() would also read "1_0" and "+1"
  try:
    pixels = bytes(map(int, values)) if plain else None
  except ValueError:  # above 255
    pixels = None
  if pixels is None:
    strange = next(v for v in values if not (v.isdigit() and len(v) < 10 and int(v) < 256))
    raise preprocess.BadImage(f"has a pixel {_shown(strange)}: 0-255 are accepted")
  return np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE)
