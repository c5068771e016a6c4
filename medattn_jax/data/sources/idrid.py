"""`--source=idrid`: the Indian Diabetic Retinopathy Image Dataset, graded, with lesions.

  B. Disease Grading/1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_001.jpg …
  B. Disease Grading/2. Groundtruths/{a,b}. IDRiD_Disease Grading_{Training,Testing} Labels.csv
      Image name, Retinopathy grade (0-4), Risk of macular edema: 413 and 103 photographs
  A. Segmentation/1. Original Images/{a. Training Set,b. Testing Set}/IDRiD_01.jpg …
  A. Segmentation/2. All Segmentation Groundtruths/{…}/1. Microaneurysms/IDRiD_01_MA.tif …
      masks of 54 and 27 photographs: MA, HE, EX, SE, and OD, the optic disc, which is no lesion

Each connected region of a mask is a lesion, corners counting as touching, and its box goes with
the photograph. IDRiD describes itself as 516 photographs, all graded, 81 of them with masks
(idrid.grand-challenge.org/Data), but no table says which 81: each part, and each split of the
graded, counts from 1, and A's IDRiD_01 need not be B's IDRiD_001. So they are joined by what they
show: a file of the same bytes, or, where the two parts were not saved alike, the one photograph
that is nearly the same and much nearer than any other. One that is none of the graded photographs
has no grade and cannot be in the set.

The splits are IDRiD's, which has no validation split; a photograph's is that of its grade. Who it
is of is not published: each counts as a patient of its own. C. Localization is not read.
"""

from __future__ import annotations

import collections
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from PIL import Image
from scipy import ndimage

from medattn_jax import console
from medattn_jax.data import preprocess, schema, sources
from medattn_jax.data.sources import labels, pictures, sheets
from medattn_jax.errors import UserError

COLUMNS = ("image name", "retinopathy grade")
TYPES = {
  "MA": schema.TYPES.index("microaneurysm"),
  "HE": schema.TYPES.index("haemorrhage"),
  "EX": schema.TYPES.index("hard_exudate"),
  "SE": schema.TYPES.index("cotton_wool_spot"),  # soft exudates
}
WHAT = ("a folder with \"B. Disease Grading\" and, for the lesions, \"A. Segmentation\", as they "
        "unpack")
MAX_SHARE = 0.5  # of a photograph that is lesion; more is a mask turned inside out
MAX_LESIONS = 20_000  # of one mask
LOOK = 32  # side of the gray pictures that photographs are compared by
ALIKE, APART = 2.0, 3.0  # gray levels that two of the same differ by; times to the next nearest
_PART = re.compile(r"(?:[abc]\.?[ _]*)?(segmentation|disease grading|localization)")
_SPLIT = re.compile(r"(?:[ab]\.?[ _]*)?(training|testing) set|.*(training|testing) labels.*\.csv")
_MASK = re.compile(r"(.+)_(MA|HE|EX|SE|OD)\.tiff?", re.IGNORECASE)


def read(folder: pathlib.Path, seed: int, skip: Collection[pathlib.Path] = ()) -> sources.Labelled:
  """The graded photographs of `folder`, with boxes; `skip` are folders that are not looked into.

  Raises UserError where there are no grades. A row, mask or photograph that cannot be used is in
  `rejected`, and so is a photograph without a grade.
  """
  del seed  # nothing is drawn by chance
  files = pictures.Pictures(folder, skip)
  parts = _Parts(folder, files.names)
  if not parts.sheets:
    raise UserError(f"--input={folder} has no grades (IDRiD_Disease Grading_Training Labels.csv); "
                    f"accepted: {WHAT}")
  notes = ["whose eyes the photographs show is not published: each counts as a patient of its own"]
  found: labels.Found = []
  rejected = list(files.closed)
  asked: set[str] = set()

  def photograph(cells: Mapping[str, str], split: str) -> sources.Photograph:
    image = cells[COLUMNS[0]]
    name = parts.graded.get((split, _key(image)))
    if name is None:
      raise preprocess.BadImage("is missing")
    asked.add(name)
    path = preprocess.resolve(folder / name, folder)
    level = labels.level(cells[COLUMNS[1]])
    image_id = f"{split}/{pictures.stem(image)}"
    return sources.Photograph(image_id, path, level, image_id, "", split)

  for split, name in parts.sheets:
    header, rows = sheets.read(folder / name, folder, COLUMNS, WHAT)
    make = lambda cells, split=split: photograph(cells, split)
    some, bad = labels.collect(folder / name, header, rows, COLUMNS[0], make, notes)
    found += some
    rejected += [(f"{split}/{image}", why) for image, why in bad]
  photographs, bad = labels.once(found, folder, notes)
  rejected += bad
  rejected += [(name, "has no grade in its sheet") for name in parts.graded.values()
               if name not in asked]
  rejected += [(name, "is not in one of IDRiD's folders") for name in parts.strange]
  if parts.localization:
    notes.append(f"{parts.localization} files of C. Localization are not read")
  if parts.masks:
    _add_lesions(folder, parts, photographs, rejected, notes)
  else:
    notes.append("there are no masks (A. Segmentation): no photograph has lesions")
  return sources.Labelled(photographs, rejected, notes, [
    f"splits are IDRiD's, which has no validation split: {labels.by_split(photographs)}"
  ])


class _Parts:
  """IDRiD's files by what they are; names are relative to the folder.

  Attributes:
    sheets: (split, name) of grades. graded, segmented: {(split, key): name} of photographs.
    masks: {key: {"MA": name, …}}, key being (split, key of the photograph).
    localization: how many files lie in C. Localization. strange: pictures that lie elsewhere.
  """

  def __init__(self, folder: pathlib.Path, names: Iterable[str]):
    self.sheets: list[tuple[str, str]] = []
    self.graded: dict[tuple[str, str], str] = {}
    self.segmented: dict[tuple[str, str], str] = {}
    self.masks: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    self.localization = 0
    self.strange: list[str] = []
    for name in names:
      # The folder may be one of the parts itself.
      *folders, file = pictures.folded(f"{folder.resolve().name}/{name}").split("/")
      part = next((found[1] for found in map(_PART.fullmatch, folders) if found), "")
      said = next((found for found in map(_SPLIT.fullmatch, (*folders, file)) if found), None)
      split = said and ("train" if "training" in said.groups() else "test")
      picture, mask = pictures.stem(file) != file, _MASK.fullmatch(file)
      if part == "localization":
        self.localization += 1
      elif part == "disease grading" and split and file.endswith(".csv"):
        self.sheets.append((split, name))
      elif part == "disease grading" and split and picture:
        self.graded.setdefault((split, _key(file)), name)
      elif part == "segmentation" and split and mask:
        self.masks[split, mask[1]][mask[2].upper()] = name
      elif part == "segmentation" and split and picture:
        self.segmented.setdefault((split, _key(file)), name)
      elif picture:
        self.strange.append(name)


def _key(image: str) -> str:
  return pictures.folded(pictures.stem(image))


def _add_lesions(
  folder: pathlib.Path,
  parts: _Parts,
  photographs: list[sources.Photograph],
  rejected: list[tuple[str, str]],
  notes: list[str],
) -> None:
  """Gives photographs the boxes of their masks; what cannot be used joins `rejected`."""
  owners = _owners(folder, parts, photographs, rejected, notes)
  counts = collections.Counter()
  live, done, total = console.Live(), 0, sum(len(kinds) for kinds in parts.masks.values())
  for key, kinds in parts.masks.items():
    owner = owners.get(key)
    boxes = []
    for kind, name in sorted(kinds.items()):
      done += 1
      live.show(f"medattn: {done} of {total} masks")
      if kind == "OD":
        counts["OD"] += 1
      elif owner is None:
        if key not in parts.segmented:  # of those that are there it is told already
          rejected.append((name, "is the mask of no photograph that is there"))
      else:
        try:
          boxes += [(TYPES[kind], *box) for box in _regions(folder, name, owner.path)]
        except preprocess.BadImage as error:
          rejected.append((name, f"{error}: its lesions are left out"))
    if boxes:
      owner.boxes = tuple(boxes)
      counts["photographs"] += 1
      counts.update(kind for kind, *_ in boxes)
  live.close()
  told = ", ".join(f"{counts[number]} {schema.TYPES[number]}" for number in TYPES.values())
  notes.append(f"{counts['photographs']} photographs have lesions: {told}")
  if counts["OD"]:
    notes.append(f"{counts['OD']} masks of the optic disc are not read: it is no lesion")


def _regions(
  folder: pathlib.Path, name: str, photograph: pathlib.Path
) -> list[tuple[int, int, int, int]]:
  """y0, x0, y1, x1 of the connected regions of a mask, in pixels of its photograph's file."""
  lit = preprocess.decode_mask(preprocess.read_bytes(preprocess.resolve(folder / name, folder)))
  size, own = lit.shape[::-1], _size(photograph)
  if size != own:
    raise preprocess.BadImage(f"has {size[0]}x{size[1]} pixels and its photograph "
                              f"{own[0]}x{own[1]}")
  rows, columns = (np.flatnonzero(lit.any(axis=axis)) for axis in (1, 0))
  if not rows.size:
    return []
  if lit.mean() > MAX_SHARE:
    raise preprocess.BadImage(f"marks {lit.mean():.0%} of its photograph")
  top, left = rows[0], columns[0]
  labels, count = ndimage.label(lit[top : rows[-1] + 1, left : columns[-1] + 1], np.ones((3, 3)))
  if count > MAX_LESIONS:
    raise preprocess.BadImage(f"has {count} regions, more than {MAX_LESIONS}")
  return [(int(y.start + top), int(x.start + left), int(y.stop + top), int(x.stop + left))
          for y, x in ndimage.find_objects(labels)]


def _size(path: pathlib.Path) -> tuple[int, int]:
  """Width and height of a photograph as its file has it; (0, 0) where it cannot be read."""
  try:
    with preprocess.plain_file(path) as file, Image.open(file, formats=preprocess.FORMATS) as image:
      return image.size
  except Exception:  # whatever PIL makes of damage; it is rejected, with the reason, when decoded
    return 0, 0


def _owners(
  folder: pathlib.Path,
  parts: _Parts,
  photographs: list[sources.Photograph],
  rejected: list[tuple[str, str]],
  notes: list[str],
) -> dict[tuple[str, str], sources.Photograph]:
  """The graded photograph that each photograph of A. Segmentation is, by its key."""
  open_: dict[tuple[str, str], pathlib.Path] = {}
  for key, name in parts.segmented.items():
    try:
      open_[key] = preprocess.resolve(folder / name, folder)
    except preprocess.BadImage as error:
      rejected.append((name, str(error)))
  owners = _by_bytes(open_, photographs)
  same = len(owners)
  open_ = {key: path for key, path in open_.items() if key not in owners}
  if open_:
    taken = {owner.image_id for owner in owners.values()}
    owners |= _by_look(open_, [p for p in photographs if p.image_id not in taken])
  rejected += [(parts.segmented[key], "has lesions but no grade: it is none of the graded "
                "photographs") for key in open_ if key not in owners]
  notes.append(f"of {len(parts.segmented)} photographs with masks {same} are graded ones byte by "
               f"byte, {len(owners) - same} by what they show, and "
               f"{len(parts.segmented) - len(owners)} none")
  return owners


def _by_bytes(
  wanted: Mapping[tuple[str, str], pathlib.Path], photographs: Iterable[sources.Photograph]
) -> dict[tuple[str, str], sources.Photograph]:
  """The photograph whose file has the same bytes, for those of which there is one."""
  sizes = {os.path.getsize(path) for path in wanted.values()}
  by_digest = {}
  for photograph in photographs:
    if os.path.getsize(photograph.path) in sizes:  # or it is not worth reading
      by_digest.setdefault(_digest(photograph.path), photograph)
  owners = {key: by_digest.get(_digest(path)) for key, path in wanted.items()}
  return {key: owner for key, owner in owners.items() if owner}


def _digest(path: pathlib.Path) -> bytes:
  try:
    return hashlib.sha256(preprocess.read_bytes(path)).digest()
  except preprocess.BadImage:  # it is rejected, with the reason, when it is decoded
    return os.fsencode(path)


def _by_look(
  wanted: Mapping[tuple[str, str], pathlib.Path], photographs: list[sources.Photograph]
) -> dict[tuple[str, str], sources.Photograph]:
  """The photograph that shows the same, for those of which one alone does."""
  candidates = [(p, look) for p in photographs if (look := _look(p.path)) is not None]
  nearest: dict[str, list] = collections.defaultdict(list)
  for key, path in wanted.items():
    look = _look(path)
    if look is None or not candidates:
      continue
    distances = np.array([np.abs(look - other).mean() for _, other in candidates])
    first, *others = np.argsort(distances)[:2]
    alone = not others or distances[others[0]] > APART * max(distances[first], 0.5)
    photograph = candidates[first][0]
    if distances[first] < ALIKE and alone and _size(path) == _size(photograph.path):
      nearest[photograph.image_id].append((key, photograph))
  return {rows[0][0]: rows[0][1] for rows in nearest.values() if len(rows) == 1}


def _look(path: pathlib.Path) -> np.ndarray | None:
  """float32 [LOOK, LOOK]: the photograph in gray, very small; None where it cannot be read."""
  try:
    content = preprocess.read_bytes(path)
    with Image.open(io.BytesIO(content), formats=preprocess.FORMATS) as image:
      if image.width * image.height > preprocess.MAX_PIXELS:
        return None
      image.draft("L", (8 * LOOK, 8 * LOOK))  # a JPEG need not be decoded at its full size
      small = image.convert("L").resize((LOOK, LOOK), Image.Resampling.BOX)
  except Exception:  # whatever PIL makes of damage; it is rejected, with the reason, when decoded
    return None
  return np.asarray(small, np.float32)
