"""A trained model as a bundle that others can run: JAX and safetensors are all it takes.

A bundle is a folder:

  model.safetensors   all variables, under flat names
  model.stablehlo     the program from weights and images to answers, for cpu, cuda and tpu
  model.json          what the two are: arrays, input, answers, classes, thresholds
  config.json         the page of the training
  README.md           the model card
  attention.npy, attention.png    the map, where the model has one for all images

Nothing of the training data is in it: of what a checkpoint holds, weights, statistics and the map
leave, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from medattn_jax import config as pages
from medattn_jax import console, doctor, files, sharding, trained
from medattn_jax.data import datasets
from medattn_jax.errors import UserError
from medattn_jax.models import weights as published
from medattn_jax.workdir import Workdir

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS, PROGRAM = "model.safetensors", "model.stablehlo"
MAP = "constants/map"
_MAX_METRICS_BYTES = 16 << 20
_NAMES = {
  "zoom_in_net": "Zoom-in-Net", "m_net": "M-Net", "global_attention": "Global spatial attention"}

PAIRS = (
  "Each photograph upright, RGB. Its black border is cut off: rows and columns of which no more "
  "than 1 % is brighter than 8 % of the picture's bright parts (the 99th percentile of the pixels' "
  "largest channel) and than 8. It is padded with black, evenly, to a square and resized to "
  "{side}×{side} (Lanczos). `medattn predict` prepares files so. image[i, 0] and image[i, 1] are "
  "the two eyes of patient i; a photograph without its fellow is given twice.")
ALIGNED = (
  "Each picture in the frame of the training pictures, with the same structure at the same place: "
  "{side}×{side}, {channels}. image[i, 0] is picture i. The attention map belongs to this frame, "
  "so a picture that is shifted, turned or mirrored is answered wrongly.")

SNIPPET = '''\
import pathlib

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file

bundle = pathlib.Path(".")  # this folder
program = jax.export.deserialize(bytearray((bundle / "model.stablehlo").read_bytes()))
weights = jax.device_put(load_file(bundle / "model.safetensors"))
answer = jax.jit(program.call)

images = np.zeros({shape}, np.uint8)  # yours go here, prepared as model.json says
answers = answer(weights, images)
for name, values in answers.items():
  print(name, np.asarray(values))
'''


def run(workdir: str, out: str, step: str | int = "best") -> None:
  """`medattn export`: writes the bundle of a checkpoint.

  Args:
    workdir: of the run.
    out: the folder to make; one that is there has to be empty.
    step: "best", "last" or a number.

  Raises:
    UserError: nothing was written.
  """
  place = files.check_new_folder(out)
  kept = Workdir(workdir).checkpoints.resolve()
  if kept in (place.resolve(), *place.resolve().parents):
    raise UserError(f"--out={out}: in {kept} lie the run's checkpoints alone; accepted: a new "
                    "folder elsewhere")
  model = trained.open_workdir(workdir, step, sharding.devices()[:1])
  bundle(model, place)
  size = sum(path.stat().st_size for path in place.iterdir())
  print(f"step {model.step} ({model.config.model.name}, phase {model.phase}) is in {place}, "
        f"{size / 2**20:.1f} MiB; how to run it: {place / 'README.md'}")


def bundle(model: trained.Trained, place: pathlib.Path) -> None:
  """Writes the bundle of an opened model to `place`, a new or empty folder: whole or not at all."""
  weights = leaving(model.variables)
  exported = program(model, weights)
  contents = {
    WEIGHTS: safetensors.numpy.save(weights),
    PROGRAM: bytes(exported.serialize()),
    "config.json": _json(pages.to_dict(model.config)),
  }
  if MAP in weights:
    contents |= _attention(weights[MAP])
  about = describe(model, weights, exported)
  with files.placing(place) as aside:
    for name, content in contents.items():
      (aside / name).write_bytes(content)
    about["files"] = {
      name: {"bytes": len(content), "sha256": files.sha256(aside / name)}
      for name, content in contents.items()}
    (aside / "model.json").write_bytes(_json(about))
    (aside / "README.md").write_text(card(model, about, _measured(model)), encoding="utf-8")


def leaving(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """{flat name: array} of what may leave the house, in the order of the names.

  These are params, batch_stats and the map. Other constants (a bank of training images, say) stay.

  Raises:
    UserError: an array is not of finite floats, as weights are.
  """
  flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
  staying = [name for name in flat if name != MAP and name.split("/")[0] not in
             ("params", "batch_stats")]
  if staying:
    console.say(f"not exported: {', '.join(sorted(staying))}")
  weights = {name: np.asarray(flat[name]) for name in sorted(flat.keys() - set(staying))}
  for name, array in weights.items():
    if not jnp.issubdtype(array.dtype, jnp.floating) or not np.isfinite(array).all():
      raise UserError(f"{name} of the checkpoint, {array.dtype}{list(array.shape)}, is not of "
                      "finite floats; accepted: a checkpoint of a training that did not diverge")
  return weights


def program(model: trained.Trained, weights: Mapping[str, np.ndarray]) -> jax.export.Exported:
  """The program (weights, image uint8 [b, E, F, F, C]) → answers, lowered for all PLATFORMS.

  The batch b is symbolic: any number of examples. Where the model cannot be traced so, it is the
  evaluation's batch size (said on stderr).

  Args:
    model: what answers.
    weights: by flat name, as `leaving` gives them; only their shapes are in the program.
  """
  now, classes = model.experiment, model.config.model.num_classes
  thresholds = None if model.thresholds is None else np.asarray(model.thresholds, np.float32)

  def answer(weights: dict[str, jax.Array], image: jax.Array) -> dict[str, jax.Array]:
    variables = flax.traverse_util.unflatten_dict(weights, sep="/")
    logits, out = now.model.apply(variables, image, phase=now.phase, train=False)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32))
    # Not as a dot: that would round its operands to bfloat16 on a TPU.
    score = (probabilities * np.arange(classes, dtype=np.float32)).sum(-1)
    if thresholds is None:
      grade = probabilities.argmax(-1)
    else:
      grade = (score[..., None] >= thresholds).sum(-1)
    regions = {"boxes": out["boxes"]} if "boxes" in out else {}
    return {"probabilities": probabilities, "score": score, "grade": grade.astype(jnp.int32),
            **regions}

  # Unused weights (of branches that this phase has not) stay arguments: the order is the names'.
  make = jax.export.export(jax.jit(answer, keep_unused=True), platforms=PLATFORMS)
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
  image = lambda batch: jax.ShapeDtypeStruct((batch, *_example(model)), jnp.uint8)
  with _without_source_lines():
    try:
      return make(shapes, image(jax.export.symbolic_shape("b")[0]))
    except Exception as error:  # what is wrong whatever the batch comes again
      batch = model.config.evaluation.batch_size
      exported = make(shapes, image(batch))
      why = " ".join(str(error).split())[:200]
      console.warn(f"the program takes batches of {batch} alone, none of any size: {why}")
      return exported


def describe(
  model: trained.Trained, weights: Mapping[str, np.ndarray], exported: jax.export.Exported
) -> dict[str, Any]:
  """What model.json holds, but for the sums of the files."""
  eyes, side, _, channels = _example(model)
  image = exported.in_avals[-1]
  sizes = lambda array: [size if isinstance(size, int) else str(size) for size in array.shape]
  batch = sizes(image)[0]
  prepared = PAIRS if eyes == 2 else ALIGNED
  words = {
    "probabilities": "of each class",
    "score": "the expected class: the sum of class · probability",
    "grade": "the decision (see decision)",
    "boxes": f"y0, x0, y1, x1 of the regions looked at closely, in pixels of the {side}×{side} "
             "image, ends excluded; strongest first",
  }
  answers = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  return {
    "model": model.config.model.name, "step": model.step, "phase": model.phase,
    "checkpoint_sha256": model.fingerprint,
    "medical_device": False, "use": "research only",
    "made_with": {name: doctor.versions()[name] for name in ("medattn_jax", "jax")},
    "classes": _classes(model),
    "thresholds": None if model.thresholds is None else [float(x) for x in model.thresholds],
    "thresholds_from": model.thresholds_from,
    "decision": "the number of thresholds that the score has reached"
                if model.thresholds is not None else "the class of the largest probability",
    "input": {
      "name": "image", "dtype": "uint8", "shape": sizes(image),
      "axes": ["example", "image of the example", "row", "column", "channel"],
      "preparation": prepared.format(
        side=side, channels="gray" if channels == 1 else "RGB")
        + " Values 0 to 255 as they are: the program scales and normalises.",
    },
    "program": {
      "file": PROGRAM, "platforms": list(exported.platforms), "batch":
        "any" if isinstance(batch, str) else batch,
      "format": "what jax.export serialises: StableHLO and its calling convention, version "
                f"{exported.calling_convention_version}",
      "call": "jax.export.deserialize(…).call(weights, image): weights is the dictionary of "
              f"{WEIGHTS}, image an array as under input",
      "arguments": [
        *({"name": name, "dtype": str(x.dtype), "shape": list(x.shape)}
          for name, x in weights.items()),
        {"name": "image", "dtype": "uint8", "shape": sizes(image)}],
      "main": "the StableHLO function main takes these in this order, after an int32: the place in "
              "platforms of where it runs. jax.export gives that by itself",
      "precision": model.config.precision,
    },
    "outputs": [
      {"name": name, "dtype": str(aval.dtype), "shape": sizes(aval), "is": words[name]}
      for name, aval in answers.items()],
    "run": SNIPPET.format(shape=(1 if isinstance(batch, str) else batch, *sizes(image)[1:])),
  }


def card(
  model: trained.Trained, about: Mapping[str, Any], measured: Mapping[str, Any] | None
) -> str:
  """README.md: the model card."""
  config = model.config
  name = _NAMES.get(config.model.name, config.model.name)
  side, image = config.data.full_size, about["input"]
  rule = "The grade is the class of the largest probability."
  if about["thresholds"] is not None:
    given = ", ".join(f"{value:.3f}" for value in about["thresholds"])
    rule = ("The grade is the number of these thresholds that the score has reached: "
            f"{given} (from {model.thresholds_from}).")
  batch = about["program"]["batch"]
  shape = lambda one: f"{one['dtype']} [{', '.join(map(str, one['shape']))}]"
  lines = [
    f"# {name}, step {model.step}", "",
    "> **Not a medical device, for research only.** It is not fit to diagnose, screen or treat "
    "anyone, and nobody has examined whether it is.", "",
    f"Grades images into {config.model.num_classes} classes: "
    + "; ".join(_cell(one) for one in about["classes"]) + ".",
    f"Model `{config.model.name}`, backbone `{config.model.backbone}`, images of {side}×{side}, "
    f"after {model.step:,} steps (phase `{model.phase}`) of the page in `config.json`. Made with "
    f"medattn_jax {about['made_with']['medattn_jax']} and JAX {about['made_with']['jax']}.", "",
    "## Trained on", "", _trained_on(config), "",
    "No image of it is in this folder.", "",
    "## Measured", "", *_figures(measured), "",
    "## To run it", "",
    "Any JAX that reads its format (the version above; by JAX's promise the releases of at least "
    f"half a year after it), on {', '.join(about['program']['platforms'])}, "
    + ("with batches of any size:" if batch == "any" else f"with batches of {batch}:"), "",
    f'    pip install "jax>={about["made_with"]["jax"]}" flatbuffers safetensors', "",
    "```python", about["run"].rstrip("\n"), "```", "",
    f"Input: `image`, {shape(image)} ({', '.join(image['axes'])}). "
    f"{image['preparation']}", "",
    *(f"- `{one['name']}`, {shape(one)}: {one['is']}" for one in about["outputs"]),
    "", rule, "",
    "## Files", "", "| file | bytes | sha256 |", "|---|---|---|",
    *(f"| `{file}` | {facts['bytes']:,} | `{facts['sha256']}` |"
      for file, facts in about["files"].items()), "",
    "## Limits", "",
    "- The figures above hold for images like those measured. Another camera, population or way of "
    "grading can make it much worse, without a sign of it in the answers.",
    "- It answers whatever it is shown, a picture of something else included.",
    "- Probabilities are no better calibrated than is stated above; thresholds fit the images that "
    "they were tuned on.",
    "- Regions and attention maps show what the answer was computed from. They are not findings, "
    "and what lies outside of them may matter.",
    "- Whether it serves all groups of people alike was not measured.", "",
  ]
  return "\n".join(lines)


def _example(model: trained.Trained) -> tuple[int, int, int, int]:
  """The shape of one example: both eyes of a patient in RGB, or one image."""
  data = model.config.data
  if model.config.model.name == "global_attention":
    return 1, data.full_size, data.full_size, data.channels
  return 2, data.full_size, data.full_size, 3


def _classes(model: trained.Trained) -> list[str]:
  from medattn_jax.analysis.overlays import LEVELS  # imports matplotlib

  count = model.config.model.num_classes
  eyes = _example(model)[0] == 2 and count == len(LEVELS)
  return [f"{level}: {LEVELS[level]}" if eyes else str(level) for level in range(count)]


def _attention(attention: np.ndarray) -> dict[str, bytes]:
  from medattn_jax.analysis import figures, maps  # imports matplotlib

  stored = io.BytesIO()
  np.save(stored, np.ascontiguousarray(attention, np.float32), allow_pickle=False)
  return {"attention.npy": stored.getvalue(), "attention.png": figures.png(maps.alone(attention))}


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
  """A program lowered within names no files of this machine, and is the same on any."""
  key = "jax_traceback_in_locations_limit"
  before = getattr(jax.config, key)
  jax.config.update(key, 0)
  try:
    yield
  finally:
    jax.config.update(key, before)


def _measured(model: trained.Trained) -> dict[str, Any] | None:
  """The workdir's evaluation where it is one of these very weights, as metrics.json holds it."""
  path = model.workdir / "evaluation" / "metrics.json"
  try:
    found = json.loads(files.read_bytes(path, _MAX_METRICS_BYTES))
    these = found["step"] == model.step and found["checkpoint_sha256"] == model.fingerprint
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None
  if not these:
    console.say(f"{path} is of other weights: its figures are not in the model card")
  return found if these else None


def _trained_on(config: Any) -> str:
  data = config.data
  begun = ", ".join(f"`{_cell(pathlib.Path(folder).name)}`" for folder in published.folders(config))
  begun = begun and f" It began with published weights, imported as {begun}."
  if data.name in datasets.DRAWN:
    drawn = data.synthetic
    return (f"`{_cell(data.name)}`: {drawn.train:,} examples drawn by a program (seed "
            f"{drawn.seed}), no photographs. What it answers for real images means nothing.{begun}")
  return (f"The training split of the data set `{_cell(data.name)}`. What is in it, how it was "
          f"graded and what its licence asks of such a model, its owner has to say.{begun}")


def _figures(measured: Mapping[str, Any] | None) -> list[str]:
  """Lines of the card: the evaluation's figures, of those that are numbers."""
  if measured is None:
    return ["Nothing: the run holds no evaluation of these weights (`medattn evaluate`)."]
  recall, attention = (
    found if isinstance(found := measured.get(key), Mapping) else {}
    for key in ("lesion_recall", "attention"))
  rows = {
    "quadratic weighted kappa": (measured.get("quadratic_weighted_kappa"), "kappa_ci"),
    "accuracy": (measured.get("accuracy"), None),
    "AUC, referable (class ≥ 2)": (measured.get("auc_referable"), "auc_referable_ci"),
    "AUC, any (class ≥ 1)": (measured.get("auc_any"), None),
    "expected calibration error": (measured.get("expected_calibration_error"), None),
    "lesions found by the regions": (recall.get("box"), None),
    "share of the map that is attended": (attention.get("area"), None),
    "attended region against the true one, IoU": (attention.get("iou"), None),
  }
  lines = [
    f"On the {_cell(measured.get('split'))} split of `{_cell(measured.get('data'))}`: "
    f"{_cell(measured.get('images'))} images of {_cell(measured.get('patients'))} patients.", "",
    "| figure | value | 95 % interval over patients |", "|---|---|---|"]
  for label, (value, interval) in rows.items():
    if _is_number(value):
      ends = measured.get(interval) if interval else None
      given = isinstance(ends, list) and all(map(_is_number, ends))
      shown = "–".join(f"{end:.3f}" for end in ends[:2]) if given else ""
      lines.append(f"| {label} | {value:.3f} | {shown} |")
  return lines


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(value: Any) -> str:
  """A name or number of a file as a few plain characters, whatever the file says."""
  return "".join(c for c in str(value)[:60] if c.isprintable() and c not in "`|<>[]")


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
