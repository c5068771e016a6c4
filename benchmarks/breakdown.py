"""Where does a Zoom-in-Net step go?

`python -m benchmarks.breakdown [--size=small|full] [--model=demo|zoom_in_net|zoom_in_net_fast]
[--phase=m|a|c] [--dtype=float32|bfloat16] [--batch=N] [--image-size=N] [--devices=N] [--json]
[--plot=FILE]`

Its parts are compiled and timed by themselves, in turns, on one device's share of the batch: the
view (the image turned, resized, normalised), M-Net, A-Net, the selection of regions, the crops,
C-Net, the optimiser; and over the devices the one all-reduce. Networks that learn are run forward,
and forward and backward. The sum of the parts is held against the whole step: what it is above is
what the compiler saves by seeing them together, what it is below is what the step does besides.

Needs JAX, flax and optax: neither TensorFlow nor config pages.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import pages, rows
from medattn_jax.errors import UserError

SIZES = {"small": {"model": "demo", "rounds": 3, "steps": 1},
         "full": {"model": "zoom_in_net", "rounds": 10, "steps": 5}}


class Part(NamedTuple):
  """A piece of a step.

  Attributes:
    forward: (fixed, given) → what the next part is given.
    given: its inputs.
    learns: whether the step needs the gradient of `given`.
  """

  name: str
  forward: Callable[[Any], Any]
  given: Any
  learns: bool


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", help="demo, zoom_in_net or zoom_in_net_fast")
  parser.add_argument("--phase", default="c", help="m, a or c")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 but on a CPU")
  parser.add_argument("--batch", type=rows.count, help="patients of a device")
  parser.add_argument("--image-size", type=rows.count, help="of the small view, pixels a side")
  parser.add_argument("--devices", type=rows.count, default=1)
  parser.add_argument("--rounds", type=rows.count)
  parser.add_argument("--steps", type=rows.count, help="of a round")
  flags = rows.parsed(parser, SIZES)
  try:
    found = measure(flags)
  except UserError as error:
    rows.stop("breakdown", error)
  rows.say(found, table(found), flags.json)
  if flags.plot:
    plot(found, flags.plot)


def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
  """A line for each part, one for their sum and one for the whole."""
  from benchmarks import steps
  from medattn_jax.programs import report

  (count,) = steps.devices(str(flags.devices))
  import jax

  page = pages.named(flags.model)
  if page.model.name != "zoom_in_net" or flags.phase not in page.phases:
    raise UserError(f"--model={flags.model} --phase={flags.phase}; accepted: demo, zoom_in_net or "
                    "zoom_in_net_fast; m, a or c")
  batch, image_size = pages.shape(flags.model, flags.size)
  page = pages.adapted(
    page, devices=count, batch=count * (flags.batch or batch), accumulation=1,
    precision=flags.dtype or pages.dtype_here(), image_size=flags.image_size or image_size)
  now = steps.build(page, flags.phase, jax.devices()[:count])
  start = jax.device_get(now.initial())
  (host,) = steps.host_batches(now)
  image = jax.device_put(host["image"][: page.data.batch_size // count], jax.devices()[0])

  programs: dict[str, dict[str, tuple]] = {}  # {part: {"forward", "whole": (running, …)}}
  for part in parts(now, jax.device_put(start, jax.devices()[0]), image):
    programs[part.name] = {"forward": prepared(lambda s, x, f=part.forward: (s, f(x)), part.given)}
    if part.learns:
      programs[part.name]["whole"] = prepared(*differentiated(part))
  programs["optimiser"] = {"whole": prepared(*optimiser(now, start))}
  if count > 1:
    programs["all-reduce"] = {"whole": prepared(*joined(now, start))}
  compiled, seconds = steps.compiled(now.lower_train_step)
  programs["whole"] = {"whole": (
    steps.Running(compiled, sharded(now, start), now.put_train([host])),
    steps.flops(page, flags.phase, count) / count, compiled, seconds)}

  times = {(name, kind): [] for name, kinds in programs.items() for kind in kinds}
  for kinds in programs.values():
    for running, *_ in kinds.values():
      running.run(1)
  for _ in range(flags.rounds):
    for name, kind in times:
      times[name, kind].append(programs[name][kind][0].run(flags.steps))

  shared = {"devices": count, "device_kind": jax.devices()[0].device_kind,
            "batch": page.data.batch_size, "dtype": page.precision}
  found, total = [], 0.0
  for name, kinds in programs.items():
    kind = "whole" if "whole" in kinds else "forward"
    _, operations, compiled, seconds = kinds[kind]
    milliseconds = times[name, kind]
    if name == "whole":
      found.append(rows.row(
        "breakdown", config={**pages.describe(page, flags.phase), "part": "sum of the parts"},
        images=now.images, milliseconds=[total], **shared, forward_ms=None, share=None))
    else:
      total += min(milliseconds)
    found.append(rows.row(
      "breakdown", config={**pages.describe(page, flags.phase), "part": name},
      compile_seconds=seconds, milliseconds=milliseconds, images=now.images,
      flops=operations and count * operations, memory=report.read(compiled).peak, **shared,
      forward_ms=rows.rounded(min(times[name, "forward"])) if "forward" in kinds else None))
  whole = found[-1]["step_ms"]["min"]
  for one in found:
    one["share"] = rows.rounded(one["step_ms"]["min"] / whole)
  return found


def prepared(function: Callable, given: Any, state: Any = ()) -> tuple:
  """(running, operations, compiled, seconds) of function(state, given) → (state, answer)."""
  import jax

  from benchmarks import steps
  from medattn_jax.step import compiler_options

  options = compiler_options(jax.default_backend())
  jitted = jax.jit(function, donate_argnums=0, compiler_options=options)
  lower = lambda: jitted.lower(state, given)
  compiled, seconds = steps.compiled(lower)
  return steps.Running(compiled, state, given), steps.counted(lower()), compiled, seconds


def parts(now: Any, state: Any, image: Any) -> list[Part]:
  """What a step of the phase runs, each part given what those before it answered.

  Args:
    image: uint8 [P, 2, full, full, 3], a device's share.
  """
  import jax

  from medattn_jax import augment, crops
  from medattn_jax.models import zoom_in_net

  model, phase, options = now.model, now.phase, now.step_options["augmentation"]
  keys = jax.numpy.arange(2 * len(image))

  def branch(name, train, *after):
    """A branch's forward pass: (its params, inputs …) → answers."""
    stats = state.batch_stats.get(name, {})

    def forward(given):
      params, *inputs = given
      variables = {"params": {name: params}, "batch_stats": {name: stats}}
      answers, updates = model.apply(
        variables, *inputs, train, mutable=["batch_stats"],
        method=lambda net, *a: getattr(net, name)(*a))
      return answers, updates

    return forward, (state.params[name], *after)

  def view(image):
    drawn = augment.draw(jax.random.key(0), keys, image.shape[-2], **options)
    image = zoom_in_net.moved(image, drawn)
    return (image, drawn, *zoom_in_net.small_view(model, image, drawn))

  found = [Part("view", view, image, False)]
  image, drawn, small, means = jax.jit(view)(image)
  forward, given = branch("m_net", phase != "a", small)
  found.append(Part("M-Net", forward, given, phase != "a"))
  if phase == "m":
    return found
  (_, m, pair), _ = jax.jit(forward)(given)
  forward, given = branch("a_net", True, m.reshape(-1, *m.shape[2:]))
  found.append(Part("A-Net", forward, given, True))
  if phase == "a":
    return found
  (_, maps), _ = jax.jit(forward)(given)

  def select(gated):
    centres = crops.select_regions(
      gated, model.image_size, model.mask_size, model.num_regions, model.mask_scope, model.coords)
    return crops.corners(centres, model.image_size, image.shape[2], model.crop_size)

  found.append(Part("selection", select, maps["G"], False))
  first = jax.jit(select)(maps["G"])
  cut = lambda given: zoom_in_net.patches(model, *given)
  found.append(Part("crops", cut, (image, first, means, drawn), False))
  patches = jax.jit(cut)((image, first, means, drawn))
  # Crops have no gradient; M-Net's pooled features have.
  of_crops, given = branch("c_net", True, pair)

  def forward(given):
    params, pair = given
    return of_crops((params, patches, pair))

  return [*found, Part("C-Net", forward, given, True)]


def differentiated(part: Part) -> tuple[Callable, Any]:
  """(its forward and backward pass as `prepared` takes it, what that is given)."""
  import jax

  answers = jax.eval_shape(part.forward, part.given)[0]
  slopes = jax.tree.map(lambda x: jax.numpy.full(x.shape, 1e-3, x.dtype), answers)
  # M-Net's view has no gradient in the step: it comes from the image.
  learned = slice(0, 1) if part.name == "M-Net" else slice(None)

  def both(state, given):
    (given, slopes), fixed = given, given[0]
    free = given[learned]
    answers, pull, updates = jax.vjp(
      lambda free: part.forward((*free, *fixed[len(free):])), free, has_aux=True)
    return state, (answers, updates, pull(slopes))

  return both, (part.given, slopes)


def optimiser(now: Any, start: Any) -> tuple[Callable, Any, Any]:
  """(the update of params and their average, the gradients, the state that it moves)."""
  import jax
  import optax

  device = jax.devices()[0]
  trained = {name: start.params[name] for name in now.trained}
  average = jax.tree.map(jax.numpy.copy, trained) if now.page.ema else None

  def update(state, grads):
    params, opt_state, average = state
    updates, opt_state = now.optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    if average is not None:
      decay = now.page.ema
      average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, average, params)
    return (params, opt_state, average), ()

  grads = jax.tree.map(lambda x: jax.numpy.full(x.shape, 1e-3, x.dtype), trained)
  # Arrays of its own: it is given them to overwrite.
  own = jax.tree.map(jax.numpy.copy, jax.device_put((trained, start.opt_state, average), device))
  return update, grads, own


def joined(now: Any, start: Any) -> tuple[Callable, Any]:
  """(the all-reduce of the gradients over the devices, the devices' gradients)."""
  import jax
  from jax.sharding import PartitionSpec as P

  from medattn_jax import joining, sharding

  way = joining.way(now.mesh.devices.flat[0].platform)

  def local(grads):
    grads = jax.tree.map(lambda x: x[0], grads)
    return joining.total(grads, (), sharding.AXIS, way)[0]

  trained = {name: start.params[name] for name in now.trained}
  each = jax.tree.map(lambda x: jax.numpy.stack([x] * now.mesh.size), trained)
  grads = jax.device_put(each, sharding.batched(now.mesh))
  reduce = jax.shard_map(
    local, mesh=now.mesh, in_specs=P(sharding.AXIS), out_specs=P(), check_vma=False)
  return lambda state, grads: (state, reduce(grads)), grads


def sharded(now: Any, start: Any) -> Any:
  import jax

  from medattn_jax import sharding

  return sharding.place(start, jax.tree.map(lambda x: x.sharding, now.abstract_state))


def table(found: Sequence[Mapping[str, Any]]) -> str:
  first = found[0]
  config = first["config"]
  lines = [(one["config"]["part"], one["forward_ms"], one["step_ms"]["min"], 100 * one["share"],
            None if one["flops_per_step"] is None else one["flops_per_step"] / 1e9,
            one["compile_seconds"]) for one in found]
  return (f"{first['devices']} × {first['device_kind']}, phase {config['phase']}, "
          f"{config['backbone']} {config['image_size']}², batch {first['batch']} patients, "
          f"{first['dtype']}\n" + rows.table(
            ("part", "forward ms", "ms", "% of the whole", "GFLOP", "compile s"), lines))


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """A bar for each part, the forward pass darker; the whole beside their sum."""
  from matplotlib import patches

  shades = {"#4c78a8": "forward pass", "#9ecae9": "backward pass", "#54a24b": "update"}

  def draw(panel):
    names = [one["config"]["part"] for one in found]
    colours = ["#54a24b" if one["forward_ms"] is None else "#9ecae9" for one in found[:-2]]
    colours += ["#bab0ac", "#f58518"]
    bars = panel.barh(names, [one["step_ms"]["min"] for one in found], color=colours, height=0.65)
    panel.bar_label(bars, [f"{rows.shown(one['step_ms']['min'])} ms, {100 * one['share']:.0f} %"
                           for one in found], padding=4, fontsize=8)
    panel.barh(names, [one["forward_ms"] or 0 for one in found], color="#4c78a8", height=0.65)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set_xlabel("ms a step")
    config = found[0]["config"]
    panel.set_title(
      f"{config['backbone']} {config['image_size']}², phase {config['phase']}, "
      f"{found[0]['batch']} patients, {found[0]['device_kind']}", fontsize=10)
    panel.legend([patches.Patch(color=colour) for colour in shades], shades.values(),
                 frameon=False, fontsize=8, loc="upper right")

  rows.figure(path, 6.5, 1 + 0.36 * len(found), draw)


if __name__ == "__main__":
  main()
