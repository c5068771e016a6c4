"""What the bank of a global attention costs a step: time, bytes, memory, against its images.

`python -m benchmarks.bank [--size=small|full] [--classifiers=linear,conv] [--images=400,1600,6400]
[--image-size=48] [--backbone=cnn] [--batch=32] [--plot=FILE] [--json]
[--target=h100|h200|v5e|v5p|v6e]`

Times a training step that reads the bank, the same step without attention, and the map's part alone
(its forward pass and gradient): alternating, the least of several rounds. Reads from the compiled
programs how often the bank crosses the memory's wires, how many bytes of floats do, and what
memory the step takes besides. With --target the programs are compiled for a chip that is not
here, and only read. Needs JAX, flax, optax and jaxtyping: neither TensorFlow nor config pages.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import rows
from medattn_jax.errors import UserError
from medattn_jax.programs import chips, traffic

CLASSIFIERS = ("linear", "conv")
SIZES = {
  "small": {"images": "400,1600,6400", "image_size": 48, "backbone": "cnn", "batch": 32,
            "rounds": 4, "steps": 4},
  "full": {"images": "4096,16384,65536", "image_size": 96, "backbone": "resnet18", "batch": 64,
           "rounds": 5, "steps": 20},
}
PAGE = {"source": "bank", "temperature": 1.0, "smoothing": 0.03, "area": 0.0,
        "total_variation": 0.0, "binarisation": 0.0}
AUGMENT = {"dihedral": False, "mirror": False, "shift": 0.1, "brightness": 0.0, "contrast": 0.0,
           "colour": 0.0}
LOSS = {"name": "cross_entropy", "class_weights": (), "auxiliary": 0.0, "focal_gamma": 2.0,
        "ordinal": 0.0}


class Program(NamedTuple):
  """A program, compiled.

  Attributes:
    flops: of a device, as XLA counts them: of the bank's loop one round. None: not counted here.
    seconds: that lowering and compiling it took.
    run: milliseconds a call, over so many; None where it is not to be run here.
  """

  compiled: Any
  text: str
  flops: float | None
  seconds: float
  run: Callable[[int], float] | None = None


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--classifiers", default=",".join(CLASSIFIERS))
  parser.add_argument("--images", help="of the bank, with commas between")
  parser.add_argument("--image-size", type=rows.count, help="pixels a side")
  parser.add_argument("--backbone")
  parser.add_argument("--batch", type=rows.count)
  parser.add_argument("--hidden", type=rows.count, default=8, help="channels of conv")
  parser.add_argument("--rounds", type=rows.count)
  parser.add_argument("--steps", type=rows.count, help="of a round")
  parser.add_argument("--target", help="compile for a chip that is not here, and run nothing")
  flags = rows.parsed(parser, SIZES)
  if flags.target:
    try:
      flags.target = chips.target(flags.target)
    except UserError as error:
      rows.stop("bank", error)
    if reason := chips.missing(flags.target):
      rows.stop("bank", f"--target={flags.target.chip}: {reason}")
    os.environ.update(chips.environment(flags.target))
  try:
    found = measure(flags)
  except UserError as error:
    rows.stop("bank", error)
  rows.say(found, table(found), flags.json)
  if flags.plot:
    plot(found, flags.plot)


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
  from medattn_jax import bank, models, sharding

  for name, value, known in (("classifiers", flags.classifiers.split(","), CLASSIFIERS),
                             ("backbone", [flags.backbone], tuple(models.attending()))):
    if strange := set(value) - set(known):
      raise UserError(f"--{name}: {min(strange)}; accepted: {', '.join(known)}")
  if not all(one.isdigit() and int(one) for one in flags.images.split(",")):
    raise UserError(f"--images={flags.images}; accepted: numbers with commas between")
  mesh = sharding.mesh(chips.devices(flags.target) if flags.target else None)
  without, found = train_program(flags, mesh, None, None), []
  for classifier in flags.classifiers.split(","):
    for count in map(int, flags.images.split(",")):
      held = bank.rows_of("bank", count, 1, 2, flags.batch)
      if flags.target:
        whole = bank.abstract("bank", held, flags.image_size, 1, mesh)
      else:
        rng, side = np.random.default_rng(0), flags.image_size
        drawn = (rng.integers(0, 256, (side, side, 1), np.uint8) for _ in range(count))
        whole = bank.fill(drawn, held, count, side, 1, mesh)
      programs = {"without": without, "step": train_program(flags, mesh, classifier, whole),
                  "map": map_program(flags, mesh, classifier, whole)}
      found.append(figures(programs, held, flags, classifier, count, mesh))
  for row in found:
    row["images_that_double_a_step"] = doubling(
      [own for own in found if own["config"]["classifier"] == row["config"]["classifier"]])
  return found


def figures(programs, held, flags, classifier, count, mesh) -> dict[str, Any]:
  """One row. Bytes are those of one device.

  passes_in_step is the step's uint8 bytes without those of the step without attention: how the
  batch's own images are read may differ between the two, which shows where the bank is small.
  """
  from medattn_jax.programs import report

  pixels = flags.image_size**2
  outputs = 1 if classifier == "linear" else 9 * flags.hidden
  share, of_map = held * pixels // mesh.size, 4 * held * outputs * pixels
  temporaries = {
    name: one.compiled.memory_analysis().temp_size_in_bytes for name, one in programs.items()}
  found = {
    "bank_bytes": share, "map_flops": of_map, "temporary_bytes": temporaries,
    "extra_temporaries_over_bank": (temporaries["step"] - temporaries["without"]) / share}
  try:
    moved = {name: traffic.moved(one.text) for name, one in programs.items()}
    of = lambda name, kind: moved[name].get(kind, 0)
    found |= {
      "passes": of("map", "u8") / share,
      "passes_in_step": (of("step", "u8") - of("without", "u8")) / share,
      "float_bytes_over_bank": (of("map", "f32") + of("map", "bf16")) / share}
  except traffic.UnknownLoop:
    found |= {"passes": None, "passes_in_step": None, "float_bytes_over_bank": None}
  times = {name: [] for name in programs}
  for _ in range(0 if flags.target else flags.rounds):
    for name, one in programs.items():
      times[name].append(one.run(flags.steps))
  least = {name: min(own, default=None) for name, own in times.items()}
  step, alone = programs["step"], programs["without"].flops
  return rows.row(
    "bank", config={
      "classifier": classifier, "images": count,
      **{key: getattr(flags, key) for key in
         ("image_size", "backbone", "hidden", "rounds", "steps")}},
    devices=mesh.size, device_kind=mesh.devices.flat[0].device_kind, batch=flags.batch,
    dtype="float32", compile_seconds=step.seconds, milliseconds=times["step"], images=flags.batch,
    flops=None if alone is None else mesh.size * alone + of_map,
    memory=report.read(step.compiled).peak,
    without_ms=least["without"], map_ms=least["map"],
    ratio=least["step"] / least["without"] if least["step"] else None, **found)


def doubling(found: Sequence[dict[str, Any]]) -> int | None:
  """At how many images the map takes as long as the step without it: by the largest bank's rate."""
  last = max(found, key=lambda row: row["config"]["images"])
  images = last["config"]["images"]
  return last["map_ms"] and round(images * last["without_ms"] / last["map_ms"])


def train_program(flags, mesh, classifier: str | None, whole) -> Program:
  """The whole training step, of a phase in which backbone and classifier learn."""
  import jax
  import jax.numpy as jnp
  import optax

  from medattn_jax import models, sharding
  from medattn_jax.models import pixel_classifier
  from medattn_jax.step import State, make_train_step

  side, each = flags.image_size, flags.batch // mesh.size
  backbone = functools.partial(models.BACKBONES[flags.backbone], stem="small")
  model = models.GlobalAttention(
    backbone=backbone, num_classes=2, attends=classifier is not None, mean=(0.5,) * 3,
    std=(0.25,) * 3, group_size=8 if each % 8 == 0 else each)
  common = models.Joint(PAGE) if classifier else None
  rates = {"backbone": optax.adamw(1e-3), "pixel_classifier": optax.adam(1e-2)}
  optimizer = optax.multi_transform(rates, lambda params: {name: name for name in params})

  def begin():
    key = jax.random.key(0)
    variables = model.init(key, jnp.zeros((1, 1, side, side, 1), jnp.uint8), train=False)
    params = dict(variables["params"])
    if classifier:
      params["pixel_classifier"] = pixel_classifier.init(
        key, classifier, whole.rows, flags.hidden, 2.0)
    return State(jnp.zeros((), jnp.int32), params, variables.get("batch_stats", {}),
                 variables.get("constants", {}), optimizer.init(params), None)

  shapes = jax.eval_shape(begin)
  step = make_train_step(
    functools.partial(model.apply, phase="joint"), optimizer, mesh, state=shapes, seed=0,
    trained=tuple(shapes.params), answers=("logits",), loss=LOSS, augmentation=AUGMENT, ema=0.0,
    common=common)
  where = sharding.on(mesh, sharding.placed(shapes))
  split = sharding.batched(mesh, axis=1)
  rng = np.random.default_rng(1)
  batch = {"image": rng.integers(0, 256, (1, flags.batch, 1, side, side, 1), np.uint8),
           "level": rng.integers(0, 2, (1, flags.batch, 1), np.int32),
           "mask": np.ones((1, flags.batch, 1), np.float32)}
  shared = {"bank": whole.arrays} if classifier else {}
  if flags.target:
    abstract = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    inputs = {name: abstract(array, split) for name, array in batch.items()}
    return _read(lambda: step.lower(jax.tree.map(abstract, shapes, where), inputs | shared))
  state = jax.jit(begin, out_shardings=where)()
  inputs = sharding.put(batch, split) | shared
  program = _read(lambda: step.lower(state, inputs))
  held = [program.compiled(state, inputs)[0]]  # donated at each call

  def run(times: int) -> float:
    jax.block_until_ready(held)
    start = time.perf_counter()
    for _ in range(times):
      held[0], _ = program.compiled(held[0], inputs)
    jax.block_until_ready(held)
    return (time.perf_counter() - start) * 1000 / times

  return program._replace(run=run)


def map_program(flags, mesh, classifier: str, whole) -> Program:
  """The first layer's answers and its gradient, which the bank's size decides."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import PartitionSpec as P

  from medattn_jax import models, sharding
  from medattn_jax.models import pixel_classifier

  reads = models.Joint(PAGE).reads["bank"]
  side = flags.image_size
  outputs = 1 if classifier == "linear" else 9 * flags.hidden

  def local(kernel, bank, slope):
    answers, pull = jax.vjp(lambda k: pixel_classifier.summand(k, **bank), kernel)
    total = jax.lax.psum(answers, sharding.AXIS)
    return total, pull(slope * total)[0]  # no gradient before there are answers, as in a step

  specs = (P(sharding.AXIS), reads, P())
  mapped = jax.jit(jax.shard_map(
    local, mesh=mesh, in_specs=specs, out_specs=(P(), P(sharding.AXIS)), check_vma=False))
  shapes = ((whole.rows, outputs), (outputs, side, side))
  kernel, slope = (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.on(mesh, spec))
    for shape, spec in zip(shapes, specs[::2], strict=True))
  program = _read(lambda: mapped.lower(kernel, whole.arrays, slope))
  if flags.target:
    return program
  kernel, slope = (
    jax.jit(functools.partial(jnp.ones, one.shape), out_shardings=one.sharding)()
    for one in (kernel, slope))
  jax.block_until_ready(program.compiled(kernel, whole.arrays, slope))

  def run(times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
      answers = program.compiled(kernel, whole.arrays, slope)
    jax.block_until_ready(answers)
    return (time.perf_counter() - start) * 1000 / times

  return program._replace(run=run)


def _read(lower: Callable[[], Any]) -> Program:
  from benchmarks import steps

  compiled, seconds = steps.compiled(lower)
  return Program(compiled, compiled.as_text(), steps.counted(lower()), seconds)


def table(found: Sequence[dict[str, Any]]) -> str:
  """The lines to read. Passes: how often the map's part reads the bank; floats: bytes, in banks."""
  first, config = found[0], found[0]["config"]
  lines = [(
    row["config"]["classifier"], row["config"]["images"], row["bank_bytes"] / 2**20,
    row["step_ms"] and row["step_ms"]["min"], row["without_ms"], row["ratio"], row["map_ms"],
    row["passes"], row["float_bytes_over_bank"], row["extra_temporaries_over_bank"],
    row["map_flops"] / 1e9) for row in found]
  text = (f"{first['devices']} × {first['device_kind']}, {config['image_size']}² pixels, "
          f"{config['backbone']}, batch {first['batch']}\n" + rows.table(
            ("classifier", "images", "bank MiB", "step ms", "without", "ratio", "map ms", "passes",
             "floats", "memory +", "map GFLOP"), lines))
  text += ("\nwithout: the step without attention; map: its part alone, forward and gradient\n"
           "passes: reads of the bank by the map's part; floats and memory + (the step's "
           "temporaries over those without): in bank sizes")
  if first["map_ms"]:
    twice = {row["config"]["classifier"]: row["images_that_double_a_step"] for row in found}
    for name, images in twice.items():
      text += f"\n{name}: the map takes as long as all else from about {images} images on"
  return text


def plot(found: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Milliseconds a step by images of the bank; without times, memory by images."""
  timed = found[0]["step_ms"] is not None

  def draw(panel):
    for classifier in dict.fromkeys(row["config"]["classifier"] for row in found):
      own = [row for row in found if row["config"]["classifier"] == classifier]
      heights = [row["step_ms"]["min"] if timed else row["temporary_bytes"]["step"] / 2**20
                 for row in own]
      panel.plot([row["config"]["images"] for row in own], heights, "o-",
                 label=f"with the bank, {classifier}")
    if timed:
      panel.axhline(min(row["without_ms"] for row in found), color="0.5", linestyle="--",
                    label="without attention")
    images = sorted({row["config"]["images"] for row in found})
    panel.set(xscale="log", xlabel="images of the bank",
              ylabel="ms a step" if timed else "temporaries of a step, MiB")
    panel.set_xticks(images, [f"{count:,}" for count in images])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    config = found[0]["config"]
    panel.set_title(f"{found[0]['devices']} × {found[0]['device_kind']}, {config['backbone']} "
                    f"{config['image_size']}², batch {found[0]['batch']}", fontsize=10)

  rows.figure(path, 5.2, 3.6, draw)


if __name__ == "__main__":
  main()
