"""`medattn prepare`: a raw data set becomes a TFDS data set, whole or not there.

Photographs are cropped and encoded by all cores into a folder beside the set, one file each, so a
run that is ended anyhow goes on where it was; then they are written as one set and put in place by
one rename. A second run over the same input does nothing, over changed input it makes a new set of
what changed and what did not. Pixels that are ready (sources.Arrays) are written at once, as PNG.
TensorFlow is imported once the input is known to be usable.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from medattn_jax import console, files
from medattn_jax.data import datasets, photographs, pixels, schema
from medattn_jax.data.sources import Arrays, Labelled, Photograph
from medattn_jax.errors import UserError, nearest

SOURCES = datasets.PREPARED
FULL_SIZE = 1230  # of photographs; pixels that are ready keep their size
REJECTED = "rejected.csv"
FILES = "photographs.json"  # within a set: the file names its photographs had while prepared
SIDES = ((16, 8000), (32, 8000))  # of pixels that are ready, and of photographs
MAX_COLUMNS = 12  # of the table: with more classes each has a row


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a set holds: levels is {split: [images of level 0, of level 1, …]}."""

  folder: pathlib.Path
  patients: dict[str, int]
  levels: dict[str, list[int]]
  rejected: int


def prepare(
  source: str,
  input_dir: str | os.PathLike,
  data_dir: str | os.PathLike,
  *,
  full_size: int | None = None,
  frame: str | None = None,
  workers: int | None = None,
  seed: int = 0,
  quality: int = 95,
) -> Summary:
  """Makes the data set `source` in `data_dir` from the raw one that `input_dir` is or holds.

  Writes data_dir/<source>/<version> and data_dir/rejected.csv (`file,reason`, the header alone
  when nothing is rejected), and prints a table.

  Args:
    source: one of SOURCES.
    full_size: side of the stored photographs in pixels; by default FULL_SIZE for photographs, and
      their own for pixels that are ready.
    frame: "cropped", each photograph by its own black border and padded to a square (the default
      of photographs), or "whole", as images that are aligned are to be (that of pixels that are
      ready; they accept no other): the image as it is becomes the square.
    workers: processes; by default as many as there are cores. Pixels that are ready need but one.
    seed: of the split by patients, where none is stated.
    quality: of the stored JPEGs.

  Raises:
    UserError: no usable input, or a place that cannot be written; nothing is left half done.
  """
  input_dir, data_dir = pathlib.Path(input_dir), pathlib.Path(data_dir)
  _check(source, input_dir, data_dir, full_size, frame, workers, quality)
  store = data_dir / f".prepare-{source}"
  skip = [data_dir / source, store, data_dir / f".building-{source}"]
  if data_dir.resolve() != input_dir.resolve():
    skip.append(data_dir)
  read = importlib.import_module(f"medattn_jax.data.sources.{source}").read
  found: Labelled | Arrays = read(input_dir, seed, skip)
  for note in found.notes:
    console.say(note)
  for line in found.splits if isinstance(found, Labelled) else ():
    print(line)
  from medattn_jax.data.datasets import prepared

  try:
    data_dir.mkdir(parents=True, exist_ok=True)
    with prepared.exclusive(data_dir / f".{source}.lock", wait=False):
      if isinstance(found, Arrays):
        return _prepare_arrays(source, found, data_dir, full_size or found.size)
      full_size = full_size or FULL_SIZE
      frame = frame or "cropped"
      return _prepare(source, found, data_dir, store, full_size, frame, workers, seed, quality)
  except BlockingIOError:
    raise UserError(f"{data_dir}: another prepare is writing there") from None
  except OSError as error:
    raise UserError(f"{error.filename or data_dir}: {error.strerror or error}") from None


def _check(source, input_dir, data_dir, full_size, frame, workers, quality) -> None:
  if source not in SOURCES:
    hint = nearest(source, SOURCES)
    raise UserError(f"source {source!r} is unknown, known: {', '.join(SOURCES)}{hint}")
  if source not in datasets.ARRAYS and not input_dir.is_dir():
    raise UserError(f"--input={input_dir} is no folder")
  if not input_dir.exists():
    raise UserError(f"--input={input_dir} is neither a folder nor a file")
  if data_dir.exists() and not data_dir.is_dir():
    raise UserError(f"--data-dir={data_dir} is no folder")
  frames = ("whole",) if source in datasets.ARRAYS else ("cropped", "whole")
  if frame is not None and frame not in frames:
    raise UserError(f"--frame={frame}; accepted for {source}: {', '.join(frames)}")
  sides = SIDES[source not in datasets.ARRAYS]
  for flag, value, low, high in (
    ("--full-size", FULL_SIZE if full_size is None else full_size, *sides),
    ("--workers", 1 if workers is None else workers, 1, 1024),
    ("quality", quality, 1, 100),
  ):
    if not low <= value <= high:
      raise UserError(f"{flag}={value}: {low} to {high} are accepted")


def _prepare(
  source, labelled, data_dir, store, full_size, frame, workers, seed, quality
) -> Summary:
  from medattn_jax.data.datasets import prepared

  rejected = list(labelled.rejected)
  jobs = photographs.jobs_of(
    labelled.photographs, rejected, store, full_size, quality, frame)
  identity = [source, photographs.METHOD, full_size, frame, quality, seed, rejected, [
    [p.image_id, jobs[p.image_id].key, p.level, p.patient, p.eye, p.split, *p.boxes]
    for p in labelled.photographs if p.image_id in jobs
  ]]
  identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
  final = data_dir / source / schema.VERSION
  old = _index(final)
  if old and old["about"].get("identity") == identity:
    _write_rejected(data_dir, old["about"]["rejected"])
    console.say(f"{final} is made of this input already: nothing to do")
    return _report(final, data_dir)
  store.mkdir(exist_ok=True)
  if old:
    console.say(f"the input is not what {final} was made of: it is made anew")
    _recover(final, {job.key for job in jobs.values()}, store)
  done = photographs.work(list(jobs.values()), workers or _cores())
  kept = []
  for photograph in labelled.photographs:
    if photograph.image_id in jobs:
      result = done[jobs[photograph.image_id].key]
      if result.reason:
        rejected.append((photograph.image_id, result.reason))
      else:
        kept.append((photograph, result))
  _say_oddities(kept, full_size)
  if not kept:
    _write_rejected(data_dir, rejected)
    shutil.rmtree(store, ignore_errors=True)
    why = f", the first because it {rejected[0][1]}" if rejected else ""
    raise UserError(f"no photograph is usable: {len(rejected)} are rejected{why}; see "
                    f"{data_dir / REJECTED}")
  examples = _examples(kept)
  about = {
    "source": source,
    "identity": identity,
    "quality": quality,
    "rejected": rejected,
    "patients": {split: len({e[0][0].patient for e in rows}) for split, rows in examples.items()},
  }
  names = {split: [[r.name for _, r in e] for e in rows] for split, rows in examples.items()}
  prepared.install(
    lambda directory: prepared.Prepared(
      source=source,
      full_size=full_size,
      frame=frame,
      examples={s: lambda rows=rows: _read(rows, store, full_size)
                for s, rows in examples.items()},
      data_dir=directory,
    ),
    data_dir,
    about,
    {FILES: names},
  )
  _write_rejected(data_dir, rejected)
  shutil.rmtree(store, ignore_errors=True)
  return _report(final, data_dir)


def _prepare_arrays(source: str, arrays: Arrays, data_dir: pathlib.Path, size: int) -> Summary:
  from medattn_jax.data.datasets import prepared

  identity = json.dumps([source, pixels.METHOD, arrays.file.digest, size])
  identity = hashlib.sha256(identity.encode()).hexdigest()
  final = data_dir / source / schema.VERSION
  old = _index(final)
  if old and old["about"].get("identity") == identity:
    _write_rejected(data_dir, arrays.rejected)
    console.say(f"{final} is made of this input already: nothing to do")
    return _report(final, data_dir)
  if not arrays.counts:
    _write_rejected(data_dir, arrays.rejected)
    name, why = arrays.rejected[0]
    raise UserError(f"no photograph is usable: {len(arrays.rejected)} are rejected, the first, "
                    f"{name}, because it {why}; see {data_dir / REJECTED}")
  if old:
    console.say(f"the input is not what {final} was made of: it is made anew")
  if size != arrays.size:
    console.say(f"photographs of {arrays.size} pixels are resized to {size}")
  about = {
    "source": source,
    "identity": identity,
    "rejected": arrays.rejected,
    "patients": arrays.counts,
  }
  census = pixels.Census(sum(arrays.counts.values()))
  prepared.install(
    lambda directory: prepared.Prepared(
      source=source,
      full_size=size,
      channels=arrays.channels,
      encoding="png",
      num_classes=arrays.num_classes,
      frame="whole",
      examples={s: functools.partial(pixels.examples, arrays, s, size, census)
                for s in arrays.counts},
      data_dir=directory,
    ),
    data_dir,
    about,
  )
  for remark in census.remarks():
    console.warn(remark)
  _write_rejected(data_dir, arrays.rejected)
  return _report(final, data_dir)


def _examples(kept) -> dict[str, list[list[tuple[Photograph, photographs.Done]]]]:
  """The examples of each split: one or two photographs of one patient, left before right.

  Lefts and rights are paired in order; two photographs are also paired where an eye is unknown.
  Whatever is left is an example by itself.
  """
  patients = collections.defaultdict(list)
  for entry in kept:
    patients[entry[0].split, entry[0].patient].append(entry)
  examples = collections.defaultdict(list)
  for split in schema.SPLITS:
    for (where, _), entries in patients.items():
      if where != split:
        continue
      eyes = {eye: [e for e in entries if e[0].eye == eye] for eye in ("left", "", "right")}
      if len(entries) == 2 and eyes[""]:
        examples[split].append(eyes["left"] + eyes[""] + eyes["right"])
        continue
      pairs = min(len(eyes["left"]), len(eyes["right"]))
      for number in range(pairs):
        examples[split].append([eyes["left"][number], eyes["right"][number]])
      rest = eyes["left"][pairs:] + eyes["right"][pairs:] + eyes[""]
      examples[split] += [[entry] for entry in rest]
  return dict(examples)


def _read(rows, store: pathlib.Path, full_size: int) -> Iterator[dict]:
  """The examples as schema.features wants them, their JPEGs checked once more."""
  for entries in rows:
    jpegs = [(store / result.name).read_bytes() for _, result in entries]
    for (_, result), jpeg in zip(entries, jpegs, strict=True):
      if photographs.checksum(jpeg) != result.name.split(".")[1]:
        raise UserError(f"{store / result.name} was changed while it was read: run prepare again")
    yield {
      "patient": entries[0][0].patient,
      "images": [io.BytesIO(jpeg) for jpeg in jpegs],
      "image_ids": [photograph.image_id for photograph, _ in entries],
      "eyes": [photograph.eye for photograph, _ in entries],
      "levels": [photograph.level for photograph, _ in entries],
      "boxes": [
        {"eye": eye, "type": kind, "box": box}
        for eye, entry in enumerate(entries) for kind, box in _boxes(*entry, full_size)
      ],
    }


def _boxes(
  photograph: Photograph, result: photographs.Done, full_size: int
) -> list[tuple[int, np.ndarray]]:
  """(type, box float32 [4] in the stored photograph) of the lesions within its field of view."""
  if not photograph.boxes:
    return []
  kinds = [kind for kind, *_ in photograph.boxes]
  placed, inside = result.placement.place([box for _, *box in photograph.boxes], full_size)
  return [(kind, box) for kind, box, there in zip(kinds, placed, inside, strict=True) if there]


def _index(folder: pathlib.Path) -> dict | None:
  """The index of the set in `folder`; None where there is none, or (said) a damaged one."""
  from medattn_jax.data.datasets import prepared

  if not (folder / prepared.INDEX).exists():
    return None
  try:
    return prepared.read_index(folder)
  except UserError as error:
    console.warn(f"{error}: this is done now")
    return None


def _recover(folder: pathlib.Path, wanted: set[str], store: pathlib.Path) -> None:
  """Takes the photographs of an older set that the new one wants too, instead of doing them."""
  from medattn_jax.data.datasets import prepared

  names = json.loads((folder / FILES).read_text())
  try:
    for split, rows in names.items():
      for row, images in zip(rows, prepared.photographs(folder, split), strict=True):
        for name, jpeg in zip(row, images, strict=True):
          if name.split(".")[0] in wanted and not (store / name).exists():
            files.write_bytes(store / name, jpeg)
  except UserError as error:
    console.warn(f"{error}: its photographs are done again")


def _say_oddities(kept: Sequence[tuple[Photograph, photographs.Done]], full_size: int) -> None:
  count = lambda oddity: sum(bool(result.oddities & oddity) for _, result in kept)
  if enlarged := count(photographs.ENLARGED):
    console.say(f"{enlarged} photographs are smaller than {full_size} pixels and were enlarged")
  if stretched := count(photographs.STRETCHED):
    console.warn(f"{stretched} photographs are no squares and were stretched: the frame is theirs "
                 "as a whole")
  drawn = sum(len(photograph.boxes) for photograph, _ in kept)
  lost = drawn - sum(len(_boxes(*entry, full_size)) for entry in kept)
  if lost:
    console.warn(f"{lost} of {drawn} lesions lie in the black border that is cut off and are left "
                 "out")
  same = collections.defaultdict(list)
  for photograph, result in kept:
    same[result.source].append(photograph.image_id)
  copies = [names for names in same.values() if len(names) > 1]
  if copies:
    console.warn(f"{len(copies)} files are there more than once under different names and are all "
                 f"kept, the first: {', '.join(copies[0][:3])}")


def _write_rejected(data_dir: pathlib.Path, rejected: Sequence[Sequence[str]]) -> None:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(("file", "reason"))
  writer.writerows(rejected)
  # A file name need not be valid text.
  files.write_bytes(data_dir / REJECTED, text.getvalue().encode("utf-8", "backslashreplace"))


def _report(folder: pathlib.Path, data_dir: pathlib.Path) -> Summary:
  """Prints and returns what the set in `folder` holds."""
  from medattn_jax.data.datasets import prepared

  index = prepared.read_index(folder)
  digits = schema.DIGITS[: index["classes"]]
  levels = {split: [words.count(d) for d in digits] for split, words in index["levels"].items()}
  patients, rejected = index["about"]["patients"], len(index["about"]["rejected"])
  print(f"{folder}: {index['full_size']} pixels")
  table = [["split", "patients", "images", *(f"level {level}" for level in range(len(digits)))]]
  table += [[split, patients[split], sum(n), *n] for split, n in levels.items()]
  wide = len(digits) > MAX_COLUMNS
  for first, *cells in zip(*table, strict=True) if wide else table:
    print(f"{first:<12}" + "".join(f"{cell:>{12 if wide else 9}}" for cell in cells))
  print(f"{rejected} rejected: {data_dir / REJECTED}")
  return Summary(folder, patients, levels, rejected)


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
