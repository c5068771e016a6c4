"""Grades photographs with a trained model: files, folders or arrays. Needs no TensorFlow."""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import dataclasses
import io
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from medattn_jax import console, experiment, files, metrics, trained
from medattn_jax.data import preprocess, schema
from medattn_jax.data.preprocess import SUFFIXES
from medattn_jax.errors import UserError

_ACCEPTED = {  # whether the model takes pairs → in words
  True: "a uint8 array [N, H, W, 3] with N > 0, a sequence of uint8 arrays [H, W, 3], or paths of "
        "image files and folders",
  False: "a uint8 array [N, H, W], [N, H, W, 1] or [N, H, W, 3] with N > 0, a sequence of uint8 "
         "arrays [H, W], [H, W, 1] or [H, W, 3], or paths of image files and folders"}


@dataclasses.dataclass(frozen=True)
class Result:
  """Answers for N photographs, in the order they were given.

  Attributes:
    images: names; the paths of files, "0", "1", … for arrays.
    probabilities: float64 [N, C].
    score: float64 [N]; the expected grade.
    grade: int64 [N]; the decision: score through the model's thresholds, or the likeliest class.
    boxes: int32 [N, num, 4]; y0, x0, y1, x1 of the regions, strongest first, in pixels of the
      prepared photograph (config.data.full_size square). None where the model has no regions.
    attention: float32 [N, h, w, C], gated attention maps; of a global attention [H, W], the one
      map of all. None where the model has none.
    rejected: (name, reason) of the photographs that could not be graded; they have no row.
  """

  images: tuple[str, ...]
  probabilities: np.ndarray
  score: np.ndarray
  grade: np.ndarray
  boxes: np.ndarray | None
  attention: np.ndarray | None
  rejected: tuple[tuple[str, str], ...]


class Model:
  """A trained model that grades. Made by `load`.

  Attributes:
    variables: {"params", "batch_stats"} as arrays; of a global attention also {"constants"}.
    config: the run's ConfigDict.
    step: of the checkpoint.
    thresholds: float64 [C-1]; the decision on the expected grade. None: the likeliest class.
  """

  def __init__(self, opened: trained.Trained):
    self.variables, self.config, self.step = opened.variables, opened.config, opened.step
    self.thresholds = opened.thresholds
    self._experiment = opened.experiment
    layout = experiment.layout(self.config)
    self._paired, self._channels = layout["pairs"], layout["channels"]
    self._frame = experiment.frame(self.config)

  def predict(self, images: Any) -> Result:
    """Grades photographs.

    A network of fundus photographs: an array that is [full_size, full_size, 3] already is taken as
    it is; any other, and every file, is prepared as the training data were: black border cropped,
    padded to a square, resized. The network sees both eyes of a patient. Files of one folder named
    NN_left and NN_right (or with a hyphen or a blank) are a pair; any other photograph, and every
    array, is its own fellow, as in training where an eye is missing.

    A global attention, whose images share one frame: each image is by itself; one that is not
    [full_size, full_size, data.channels] is made gray or RGB and resized as a whole, or, with
    data.frame = "cropped", prepared as a fundus photograph is.

    Args:
      images: uint8 [N, H, W, 3] or a sequence of uint8 [H, W, 3] (for a global attention gray ones
        too, without the last axis or with 1 in its place); or one path or a sequence of paths of
        files and folders. Folders are searched to the bottom.

    Returns:
      A Result. What could not be read is in `rejected`, and said on stderr.

    Raises:
      UserError: an argument that is none of these, a path that is not there, or nothing that can
        be graded.
    """
    paths = _paths(images, _ACCEPTED[self._paired])
    if paths is not None:
      found, rejected = _expand(paths)
      least = preprocess.MIN_SIDE if self._paired else min(self._side, preprocess.MIN_SIDE)
      framed = []

      def read(i: int) -> np.ndarray:
        content = preprocess.read_bytes(found[i])
        photograph = self._prepared(preprocess.decode_photograph(content, least))
        if preprocess.has_more_frames(content):
          framed.append(found[i])
        return photograph

      rows = _pairs(found) if self._paired else [(i,) for i in range(len(found))]
      result = self._grade(found, read, rows, rejected)
      for name in sorted(framed):
        console.warn(f"{name} has several pages or frames, of which the first is graded")
      return result
    arrays = _arrays(images, self._paired)
    whole = (self._side, self._side, self._channels)
    read = lambda i: arrays[i] if arrays[i].shape == whole else self._prepared(arrays[i])
    each = range(len(arrays))
    rows = [(i, i) if self._paired else (i,) for i in each]
    return self._grade([str(i) for i in each], read, rows, [])

  @property
  def _side(self) -> int:
    return self.config.data.full_size

  def _prepared(self, photograph: np.ndarray) -> np.ndarray:
    """As the network takes it. Raises BadImage."""
    if self._frame == "cropped":
      height, width, *_ = photograph.shape
      photograph = np.broadcast_to(photograph.reshape(height, width, -1), (height, width, 3))
      photograph = preprocess.prepare_photograph(photograph, self._side)
    return preprocess.fit_aligned(photograph, self._side, self._channels)

  def _attention(self, gated: np.ndarray | None) -> np.ndarray | None:
    """The map of a global attention, or each photograph's gated maps, or None."""
    if "constants" in self.variables:
      return np.asarray(self.variables["constants"]["map"], np.float32)
    return gated

  def _grade(
    self, names: Sequence[str], read: Callable[[int], np.ndarray],
    examples: Sequence[tuple[int, ...]], rejected: list[tuple[str, str]],
  ) -> Result:
    """Grades what `read` (an index → the prepared photograph, or BadImage) gives, by examples."""
    bad: dict[int, str] = {}
    answers: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
    # Rounded up to a power of two: a few compiled sizes serve every number of photographs.
    batch = min(self.config.evaluation.batch_size, 1 << (len(examples) - 1).bit_length())
    shape = (batch, len(examples[0]), self._side, self._side, self._channels)
    batches = _batches(examples, read, shape, bad)
    for given, out in experiment.predictions(self._experiment, self.variables, batches):
      for row, own in enumerate(given["examples"]):
        for eye, index in enumerate(own):
          if index is not None:
            for name in ("logits", "boxes", "G"):
              if name in out:
                answers[name][index] = out[name][row, eye]
    rejected = rejected + [(names[index], bad[index]) for index in sorted(bad)]
    graded = sorted(answers["logits"])
    if graded or rejected[1:]:  # else the error says it
      for name, reason in rejected:
        console.warn(f"{name} {reason}; not graded")
    if not graded:
      name, reason = rejected[0]
      others = f" (and {len(rejected) - 1} more that cannot be graded)" if rejected[1:] else ""
      raise UserError(f"{console.plain(name)} {reason}{others}; accepted: photographs as "
                      f"{', '.join(SUFFIXES)}")
    column = lambda name: np.stack([answers[name][i] for i in graded]) if answers[name] else None
    logits = column("logits")
    if not np.isfinite(logits).all():
      raise UserError(f"step {self.step}: the model's answers are not finite numbers; accepted: a "
                      "checkpoint of a training that did not diverge")
    probabilities = metrics.probabilities_of(logits)
    score = metrics.expected_grade(probabilities)
    return Result(
      tuple(names[i] for i in graded), probabilities, score,
      metrics.grades(probabilities, self.thresholds), column("boxes"),
      self._attention(column("G")), tuple(rejected))


def load(
  workdir: str | os.PathLike, step: str | int = "best", devices: Sequence[Any] | None = None
) -> Model:
  """Opens the trained model of a workdir, on any number of devices.

  Args:
    workdir: a folder `medattn train` made.
    step: "best", "last" or a number.
    devices: where to answer; all by default.

  Raises:
    UserError: no workdir, no such checkpoint, or a damaged one.
  """
  opened = trained.open_workdir(workdir, step, devices)
  if opened.thresholds_from == trained.ROUNDING:
    console.say("no thresholds were tuned for this checkpoint: grades are rounded scores")
  return Model(opened)


def run(workdir: str, images: Sequence[str], out: str | None = None) -> None:
  """`medattn predict`: writes `image,grade,score,p0,…` to `out`, or to stdout.

  Raises:
    UserError: nothing could be graded; nothing was written.
  """
  if out is not None:
    _check_out(pathlib.Path(out), images)
  _are_folders(images)  # A path that is not there is said before the model is loaded.
  result = load(workdir).predict(list(images))
  text = predictions_csv(result).encode("utf-8", "backslashreplace")
  if out is not None:
    files.write_bytes(out, text)
  else:
    try:
      sys.stdout.buffer.write(text)
      sys.stdout.flush()
    except BrokenPipeError:  # `medattn predict … | head` has read what it wanted.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  console.say(f"{len(result.images)} graded, {len(result.rejected)} not"
              + (f"; written to {out}" if out is not None else ""))


def predictions_csv(result: Result) -> str:
  """`image,grade,score,p0,…`, a row a photograph; numbers read back exactly."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["image", "grade", "score"]
                  + [f"p{level}" for level in range(result.probabilities.shape[1])])
  writer.writerows(
    [name, grade, repr(float(score)), *(repr(float(p)) for p in row)]
    for name, grade, score, row in zip(
      result.images, result.grade, result.score, result.probabilities, strict=True))
  return text.getvalue()


def _check_out(out: pathlib.Path, images: Sequence[str]) -> None:
  parent = out.absolute().parent
  if out.is_dir() or not parent.is_dir():
    raise UserError(f"--out={out}: {'is a folder' if out.is_dir() else f'no folder {parent}'}; "
                    "accepted: a file to write, in a folder that is there")
  if out.is_symlink() or (out.exists() and not out.is_file()):
    raise UserError(f"--out={out}: is a link or a device; accepted: a file to write, or no --out "
                    "for standard output")
  if not os.access(parent, os.W_OK | os.X_OK):
    raise UserError(f"--out={out}: {parent} cannot be written to; accepted: a file to write")
  if out.suffix.lower() in SUFFIXES or any(out.resolve() == pathlib.Path(i).resolve()
                                           for i in images):
    raise UserError(f"--out={out}: would be written over a photograph; accepted: such as out.csv")


def _paths(images: Any, accepted: str) -> list[str] | None:
  """`images` as paths, or None where they are no paths. Raises UserError for a mixture."""
  if isinstance(images, str | os.PathLike):
    images = [images]
  if not isinstance(images, list | tuple):
    return None
  if not images:
    raise UserError(f"predict() got nothing to grade; accepted: {accepted}")
  are = [isinstance(image, str | os.PathLike) for image in images]
  if not any(are):
    return None
  if not all(are):
    raise UserError(f"predict() got paths and something else; accepted: {accepted}")
  return [os.fsdecode(image) for image in images]


def _arrays(images: Any, paired: bool) -> Sequence[np.ndarray]:
  """`images` as uint8 arrays [H, W, 3]; those of aligned images [H, W] or [H, W, 1] too.

  Raises UserError for anything else.
  """
  accepted = _ACCEPTED[paired]
  if isinstance(images, list | tuple):
    arrays: Sequence[np.ndarray] = [_array(image, accepted) for image in images]
  else:
    arrays = _array(images, accepted)
    # [N, H, W] whose last axis might be channels is more likely one image without the N.
    gray = not paired and arrays.ndim == 3 and arrays.shape[-1] not in (1, 3)
    if arrays.ndim != 4 and not gray:
      raise _unlike(arrays, accepted)
  if len(arrays) == 0:
    raise UserError(f"predict() got nothing to grade; accepted: {accepted}")
  channels = {(3,)} if paired else {(3,), (1,), ()}
  for array in arrays:
    pixels = array.dtype == np.uint8 and array.ndim >= 2 and array.size
    if not pixels or array.shape[2:] not in channels:
      raise _unlike(array, accepted)
  return arrays


def _array(image: Any, accepted: str) -> np.ndarray:
  if not hasattr(image, "__array__"):
    raise UserError(f"predict() got {type(image).__name__}; accepted: {accepted}")
  return np.asarray(image)


def _unlike(array: np.ndarray, accepted: str) -> UserError:
  return UserError(
    f"predict() got an array {array.dtype}{list(array.shape)}; accepted: {accepted}")


def _expand(paths: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """The candidate files, each once, and (name, reason) of what is not to be opened.

  Raises:
    UserError: there is no candidate.
  """
  found: list[str] = []
  rejected: list[tuple[str, str]] = []
  for path, is_folder in zip(paths, _are_folders(paths), strict=True):
    if is_folder:
      _search(path, found, rejected)
    else:
      found.append(path)
  if not found:
    name, reason = rejected[0] if rejected else (paths[0], "holds no photograph")
    raise UserError(f"{console.plain(name)} {reason}; accepted: {', '.join(SUFFIXES)}")
  once: dict[str, str] = {}
  for path in found:
    once.setdefault(os.path.abspath(path), path)
  return list(once.values()), rejected


def _are_folders(paths: Sequence[str]) -> list[bool]:
  """Whether each path is a folder. Raises UserError naming the first that is not there."""
  folders = []
  for path in paths:
    try:
      folders.append(stat.S_ISDIR(os.stat(path).st_mode))
    except (OSError, ValueError) as error:
      why = getattr(error, "strerror", None) or str(error)
      raise UserError(f"{console.plain(path) or repr(path)}: {why.lower()}; accepted: image files "
                      "and folders that are there") from None
  return folders


def _search(folder: str, found: list[str], rejected: list[tuple[str, str]]) -> None:
  """Adds the image files below `folder`, in the order of their names; no link leads out of it."""
  others = []

  def unreadable(error: OSError) -> None:
    rejected.append((str(error.filename), f"cannot be read: {(error.strerror or '').lower()}"))

  for inside, below, names in os.walk(folder, onerror=unreadable):
    below.sort()
    for name in sorted(names + [name for name in below if os.path.islink(f"{inside}/{name}")]):
      path = os.path.join(inside, name)
      try:
        if preprocess.resolve(path, folder).is_dir():
          rejected.append((path, "is a link to a folder"))
        elif os.path.splitext(name)[1].lower() in SUFFIXES:
          found.append(path)
        else:
          others.append(name)
      except preprocess.BadImage as reason:
        rejected.append((path, str(reason)))
  if others:
    told = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
    console.say(f"{folder}: {len(others)} files that are no photographs by their names are passed "
                f"over ({told})")


def _pairs(paths: Sequence[str]) -> list[tuple[int, int]]:
  """Patients as pairs of file numbers (left, right), or (own, own) without a fellow."""
  sides: dict[tuple[str, str], dict[str, list[int]]] = {}
  for index, path in enumerate(paths):
    if sided := schema.side_of(pathlib.Path(path).stem):
      patient, eye = sided
      key = (os.path.abspath(os.path.dirname(path)), patient)
      sides.setdefault(key, {"left": [], "right": []})[eye].append(index)
  fellow = {}
  for eyes in sides.values():
    for left, right in zip(eyes["left"], eyes["right"], strict=False):
      fellow[left] = fellow[right] = (left, right)
  return list(dict.fromkeys(fellow.get(index, (index, index)) for index in range(len(paths))))


def _batches(
  examples: Sequence[tuple[int, ...]], read: Callable[[int], np.ndarray],
  shape: tuple[int, int, int, int, int], bad: dict[int, str],
) -> Iterator[dict[str, Any]]:
  """Batches of `shape` [size, E, S, S, C]: image uint8, and their examples.

  An example names the photograph of each eye, None for a copy of the fellow. Photographs that
  cannot be read go to `bad` with the reason. A batch is read when it is asked for, by a few
  threads.
  """
  size, eyes, *_ = shape

  def attempt(index: int) -> np.ndarray | str:
    try:
      return read(index)
    except preprocess.BadImage as reason:
      return str(reason)

  with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
    for begin in range(0, len(examples), size):
      chunk = examples[begin : begin + size]
      wanted = sorted({index for example in chunk for index in example})
      ready = {}
      for index, image in zip(wanted, pool.map(attempt, wanted), strict=True):
        (bad if isinstance(image, str) else ready)[index] = image
      images = np.zeros(shape, np.uint8)
      named = []
      for example in chunk:
        if good := [index for index in dict.fromkeys(example) if index in ready]:
          images[len(named)] = [ready[index] for index in (good * eyes)[:eyes]]
          named.append((*good, *[None] * (eyes - len(good))))
      if named:
        yield {"image": images, "examples": named}
