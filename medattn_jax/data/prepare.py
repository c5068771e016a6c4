"""`medattn prepare`: a raw data set becomes a TFDS data set, whole or not there.

Photographs are cropped and encoded by all cores into a folder beside the set, one file each, so a
run that is ended anyhow goes on where it was; then they are written as one set and put in place by
one rename. A second run over the same input does nothing, over changed input it makes a new set of
what changed and what did not. Pixels that are ready (sources.Arrays) are written at once, as PNG.
TensorFlow is imported once the input is known to be usable.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from medattn_jax import console, files
from medattn_jax.data import datasets, duplicates, photographs, pixels, schema, tally
from medattn_jax.data.sources import Arrays, Labelled, Photograph
from medattn_jax.errors import UserError, nearest

SOURCES = datasets.PREPARED
FULL_SIZE, FRAME = 1230, "cropped"  # of photographs; pixels that are ready keep their own
REJECTED = "rejected.csv"
FILES = "photographs.json"  # within a set: the file names its photographs had while prepared
SIDES = ((16, 8000), (32, 8000))  # of pixels that are ready, and of photographs


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
  drop_duplicates: bool = False,
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
    drop_duplicates: of photographs that are the same under several names one is kept: see
      duplicates. Pixels that are ready keep the splits they were published with.

  Raises:
    UserError: no usable input, the same photograph in two splits, or a place that cannot be
      written; nothing is left half done.
  """
  input_dir, data_dir = pathlib.Path(input_dir), pathlib.Path(data_dir)
  found = read_raw(
    source, input_dir, data_dir, full_size=full_size, frame=frame, workers=workers, seed=seed,
    quality=quality, drop_duplicates=drop_duplicates)
  store = data_dir / f".prepare-{source}"
  from medattn_jax.data.datasets import prepared

  try:
    data_dir.mkdir(parents=True, exist_ok=True)
    with prepared.exclusive(data_dir / f".{source}.lock", wait=False):
      if isinstance(found, Arrays):
        return _prepare_arrays(source, found, data_dir, full_size or found.size)
      full_size = full_size or FULL_SIZE
      frame = frame or FRAME
      return _prepare(source, found, data_dir, store, full_size, frame, workers, seed, quality,
                      drop_duplicates)
  except BlockingIOError:
    raise UserError(f"{data_dir}: another prepare is writing there") from None
  except OSError as error:
    raise UserError(f"{error.filename or data_dir}: {error.strerror or error}") from None


def read_raw(
  source: str,
  input_dir: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  full_size: int | None = None,
  frame: str | None,
  workers: int | None,
  seed: int,
  quality: int = 95,
  drop_duplicates: bool,
) -> Labelled | Arrays:
  """What the source finds in `input_dir`; what is to be said of it is said, nothing is written.

  The arguments are those of `prepare`, and checked. What is prepared in `data_dir` is no input.
  """
  _check(source, input_dir, data_dir, full_size, frame, workers, quality)
  if source in datasets.ARRAYS and drop_duplicates:
    others = ", ".join(name for name in SOURCES if name not in datasets.ARRAYS)
    raise UserError(f"--drop-duplicates: --source={source} keeps the splits it was published with; "
                    f"accepted with photographs: {others}")
  store = data_dir / f".prepare-{source}"
  skip = [data_dir / source, store, data_dir / f".building-{source}"]
  if data_dir.resolve() != input_dir.resolve():
    skip.append(data_dir)
  read = importlib.import_module(f"medattn_jax.data.sources.{source}").read
  found: Labelled | Arrays = read(input_dir, seed, skip)
  if isinstance(found, Arrays) and (workers or seed):
    console.say(f"--workers and --seed do nothing with --source={source}: its pixels are ready and "
                "its splits its own")
  for note in found.notes:
    console.say(note)
  for line in found.splits if isinstance(found, Labelled) else ():
    print(line)
  return found


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
  source, labelled, data_dir, store, full_size, frame, workers, seed, quality, drop
) -> Summary:
  from medattn_jax.data.datasets import prepared

  rejected = list(labelled.rejected)
  jobs = photographs.jobs_of(
    labelled.photographs, rejected, store, full_size, quality, frame)
  identity = [source, photographs.METHOD, full_size, frame, quality, seed, rejected, [
    [p.image_id, jobs[p.image_id].key, p.level, p.patient, p.eye, p.split, *p.boxes]
    for p in labelled.photographs if p.image_id in jobs
  ], *["without duplicates"] * drop]
  identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
  final = data_dir / source / schema.VERSION
  old = _index(final)
  same = old is not None and old["about"].get("identity") == identity
  if same and not _mended(old["about"]["rejected"], jobs, workers):
    _write_rejected(data_dir, old["about"]["rejected"])
    console.say(f"{final} is made of this input already: nothing to do")
    return _report(final, data_dir)
  if store.is_symlink():  # what it leads to is not ours
    raise UserError(f"{store} is a link; accepted: a folder that prepare made, or none")
  store.mkdir(exist_ok=True)
  if old:
    console.say("photographs that could not be read can be by now: it is made anew" if same else
                f"the input is not what {final} was made of: it is made anew")
    _recover(final, {job.key for job in jobs.values()}, store)
  done = photographs.work(list(jobs.values()), workers)
  settled = sorted_out(labelled.photographs, jobs, done, rejected, drop)
  kept = settled.kept
  _say_oddities(kept, full_size)
  if not kept:
    _write_rejected(data_dir, rejected)
    shutil.rmtree(store, ignore_errors=True)
    raise UserError(f"{unusable(rejected)}; see {data_dir / REJECTED}")
  if settled.fault:
    raise UserError(settled.fault)
  examples = tally.examples(kept)
  about = {
    "source": source,
    "identity": identity,
    "quality": quality,
    "rejected": rejected,
    "patients": tally.patients(examples),
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


def _mended(
  rejected: Sequence[Sequence[str]], jobs: Mapping[str, photographs.Job], workers: int | None
) -> bool:
  """Whether one that was rejected for what may pass can be used now."""
  again = [jobs[name] for name, reason in rejected
           if name in jobs and reason.startswith(photographs.PASSING)]
  done = photographs.work(again, workers, photographs.look)
  return any(not result.reason for result in done.values())


def sorted_out(
  found: Sequence[Photograph],
  jobs: Mapping[str, photographs.Job],
  done: Mapping[str, photographs.Done],
  rejected: list[tuple[str, str]],
  drop: bool,
) -> duplicates.Settled:
  """The photographs that can be used, duplicates settled and spoken of; others join `rejected`."""
  kept = []
  for photograph in found:
    if photograph.image_id in jobs:
      result = done[jobs[photograph.image_id].key]
      if result.reason:
        rejected.append((photograph.image_id, result.reason))
      else:
        kept.append((photograph, result))
  settled = duplicates.settle(kept, drop)
  rejected += settled.rejected
  for note in settled.notes:
    console.warn(note)
  return settled


def unusable(rejected: Sequence[tuple[str, str]]) -> str:
  """What is said where nothing is left."""
  first = f", the first, {rejected[0][0]}, because it {rejected[0][1]}" if rejected else ""
  return f"no photograph is usable: {len(rejected)} are rejected{first}"


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
    raise UserError(f"{unusable(arrays.rejected)}; see {data_dir / REJECTED}")
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
  if frames := count(photographs.FRAMES):
    console.warn(f"{frames} photographs have several pages or frames, of which the first is taken")
  drawn = sum(len(photograph.boxes) for photograph, _ in kept)
  lost = drawn - sum(len(_boxes(*entry, full_size)) for entry in kept)
  if lost:
    console.warn(f"{lost} of {drawn} lesions lie in the black border that is cut off and are left "
                 "out")


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
  tally.show(patients, levels)
  print(f"{rejected} rejected: {data_dir / REJECTED}")
  return Summary(folder, patients, levels, rejected)
