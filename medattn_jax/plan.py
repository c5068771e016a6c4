"""What a page would take on chips that need not be here: room, what bounds it, images/s, hours."""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections
import rich.box
import rich.console
import rich.table

from medattn_jax import config, console, experiment, forecast
from medattn_jax.errors import UserError
from medattn_jax.forecast import Forecast
from medattn_jax.models import remat
from medattn_jax.programs import chips

MODEL = "a model from data sheets, not a measurement; real runs are slower"
_MUCH = 0.2  # of a step, that is worth a word


def run(path: str, target: str, overrides: Sequence[tuple[str, str]]) -> None:
  """Compiles each phase of a page for a target, and prints what it would take there.

  Raises:
    UserError: for a page or a target that is none, a batch that does not divide over the target's
      devices, or a plug-in that is not installed.
  """
  page, wanted = config.load_page(path, overrides), chips.target(target)
  experiment.check(page)
  if reason := chips.missing(wanted):
    raise UserError(f"--target={target}: {reason}")
  found = []
  for phase in experiment.phases(page):
    if page.phases[phase].steps:
      console.say(f"compiling phase {phase} for {wanted}")
      found.append(forecast.of(page, phase, wanted))
  if not found:
    raise UserError(f"--config={path}: all phases.<name>.steps are 0; accepted: one above it")
  out, first = rich.console.Console(soft_wrap=True), found[0]
  of = f" of {first.memory / 1e9:.1f} GB" if first.memory else ""
  out.print(f"{path} on {first.devices} × {first.kind}{of} ({wanted}), {first.dtype}",
            markup=False, highlight=False, style="bold")
  out.print(_table(page, found))
  for line in verdicts(page, found, path, wanted):
    out.print(f"• {line}", markup=False, highlight=False)


def _table(page: ml_collections.ConfigDict, found: Sequence[Forecast]) -> rich.table.Table:
  table = rich.table.Table(
    box=rich.box.SIMPLE, padding=(0, 1, 0, 0), caption=MODEL, caption_justify="left")
  for number, column in enumerate((
      "phase", "steps", "images\na step", "memory\na chip", "fits", "bound by", "step", "images/s",
      "hours", "collec-\ntives")):
    table.add_column(column, justify="right" if number else "left", no_wrap=True)
  for one in found:
    steps, bound = page.phases[one.phase].steps, one.bound
    needs = "more" if one.needs is None else f"{one.needs / 1e9:.2f} GB"
    table.add_row(
      one.phase, f"{steps:,}", f"{one.images:,}", needs, "yes" if one.fits else "no",
      *(("–",) * 5 if bound is None else (
        bound.by, f"{1e3 * bound.seconds:.1f} ms", f"{one.rate:,.0f}", f"{hours(page, one):.2f}",
        f"{share(one):.0%}")))
  return table


def _said(one: Forecast) -> str:
  """What a phase's devices say to each other in a step."""
  kinds = ", ".join(f"{n} {kind}" for kind, n in one.report.counts.items())
  size = sum(one.report.wire.values()) / 1e6
  return f"phase {one.phase}: {f'{kinds}, {size:.1f} MB' if kinds else 'no collective'}"


def hours(page: ml_collections.ConfigDict, one: Forecast) -> float:
  """To a phase's last step, by the model."""
  return page.phases[one.phase].steps * one.bound.seconds / 3600


def share(one: Forecast) -> float:
  """Of a step's time that its collectives take where nothing hides them."""
  return one.bound.collectives / one.bound.seconds


def verdicts(page: ml_collections.ConfigDict, found: Sequence[Forecast], path: str,
             target: chips.Target) -> list[str]:
  """What follows, in words: the whole time, what does not fit, and what would be worth a change."""
  lines = []
  timed = [one for one in found if one.bound]
  if len(timed) == len(found):
    whole = sum(hours(page, one) for one in timed)
    images = sum(page.phases[one.phase].steps * one.images for one in timed)
    lines.append(f"all phases: {whole:.2f} hours, {images:,} images, by the model")
    most = max(one.rate for one in timed)
    lines.append(f"the input has to bring up to {most:,.0f} images/s, photographs decoded: "
                 "python -m benchmarks.pipeline tells how many cores that takes")
  elif target.sheet is None:
    lines.append("no data sheet of this device: memory and collectives alone")
  lines.append("; ".join(_said(one) for one in found if one.report) or "no phase fits")
  alone = chips.Target(target.chip, "" if target.sheet else target.topology)
  lines += [
    f"phase {one.phase} does not fit: python -m benchmarks.fit --config={path} "
    f"--phase={one.phase} --target={alone} --remat={','.join(remat.MODES)} finds the largest "
    f"batch that does, also where parts are computed twice to save memory "
    f"(phases.{one.phase}.remat = {page.phases[one.phase].remat} here)"
    for one in found if not one.fits]
  if page.precision == "float32" and target.sheet:
    lines.append("precision = float32: the arithmetic is reckoned at bfloat16's rate all the same; "
                 "bfloat16 halves the bytes")
  if any(share(one) > _MUCH for one in timed):
    lines.append("collectives take much of a step: more images a chip (data.batch_size, "
                 "phases.<name>.accumulation) pay")
  return lines
