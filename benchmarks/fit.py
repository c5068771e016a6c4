"""How many images a chip has room for: the largest batch of a page's train step, on named chips.

`python -m benchmarks.fit --config=FILE [--phase=P] --target=v5e,h200 [--remat=none,blocks]
[--config.KEY=VALUE …] [--most=4096] [--json] [--plot=FILE]`

Compiles the step for each target (a process for each batch that is tried; see benchmarks.aot), with
as many images a chip as the page's group of normalisation and its pairs allow, and the page's own
accumulation. A TPU's compiler refuses what has no room; a GPU's and a CPU's do not, so there the
program's peak must be within the memory, on a GPU less 8 % for what its compiler does not know of
(cuDNN's workspaces, NCCL, the driver). Few batches are tried: after two of them a line through
their peaks says where to look. Near its limit a compiler may compute things twice to save memory, a
TPU's here too (a GPU's is told not to), so the largest batch need not be the fastest an image; the
same holds of --remat, which searches with other values of phases.P.remat. Exits with 1 where not
even the smallest batch has room.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.rows import count, drawn, figure
from medattn_jax.errors import UserError


class Try(NamedTuple):
  """One batch: images a chip, whether they fit, and the bytes of a chip that they need."""

  images: int
  fits: bool
  needs: int | None


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0], allow_abbrev=False,
    epilog="--config.KEY=VALUE changes a key of the page")
  parser.add_argument("--config", required=True, metavar="FILE")
  parser.add_argument("--phase", help="the page's last by default")
  parser.add_argument("--target", required=True, help="with commas between")
  parser.add_argument("--remat", help="with commas between; the page's own by default")
  parser.add_argument("--most", type=count, default=4096, help="images a chip to try at most")
  parser.add_argument("--plot", type=drawn, metavar="FILE", help="bytes of a chip by its images")
  parser.add_argument("--json", action="store_true", help="the JSON lines alone")
  flags, rest = parser.parse_known_args()
  try:
    rows = measure(flags, rest)
  except UserError as error:
    print(f"benchmarks.fit: {error}", file=sys.stderr)
    sys.exit(2)
  if not flags.json:
    print("\n".join(map(words, rows)))
  for row in rows:
    print(json.dumps(row, allow_nan=False))
  if flags.plot:
    plot(rows, flags.plot)
  sys.exit(not all(row["images_per_chip"] for row in rows))


def measure(flags: argparse.Namespace, rest: Sequence[str]) -> list[dict[str, Any]]:
  """A row for each target and each way to keep what the backward pass needs."""
  from medattn_jax import cli, config, experiment, forecast, models
  from medattn_jax.errors import nearest
  from medattn_jax.models import remat
  from medattn_jax.programs import chips

  page = config.load_page(flags.config, cli.overrides(rest))
  experiment.check(page)
  known = experiment.phases(page)
  phase = flags.phase or known[-1]
  if phase not in known:
    raise UserError(f"--phase={phase}; accepted for {page.model.name}: {', '.join(known)}")
  modes = flags.remat.split(",") if flags.remat else [page.phases[phase].remat]
  for mode in modes:
    if mode not in remat.MODES:
      raise UserError(
        f"--remat={mode}{nearest(mode, remat.MODES)}; accepted: {', '.join(remat.MODES)}, with "
        "commas between")
  targets = [chips.target(text) for text in flags.target.split(",")]
  for target in targets:
    if reason := chips.missing(target):
      raise UserError(f"--target={target}: {reason}")
    if target.chip == chips.HERE:
      raise UserError("--target=here; accepted: a chip's name, or cpu:N")
  each = models.IMAGES[page.model.name]
  unit = math.lcm(each, page.norm.group_size)
  if flags.most < unit:
    raise UserError(f"--most={flags.most}; accepted: at least {unit}, the least that the page's "
                    "pairs and norm.group_size allow")
  rows = []
  for target, mode in itertools.product(targets, modes):
    last = []

    def attempt(images, target=target, mode=mode, last=last):
      page.data.batch_size = images * target.count // each
      page.phases[phase].remat = mode
      print(f"compiling {phase} for {target}, remat {mode}, {images} images a chip …",
            file=sys.stderr, flush=True)
      found = forecast.of(page, phase, target)
      last[:] = [found]
      return Try(images, found.fits, found.needs)

    tried = search(attempt, unit, flags.most, room(target))
    best = max((one.images for one in tried if one.fits), default=0)
    rows.append({
      "name": "fit", "config": {"file": flags.config, "overrides": list(rest)}, "phase": phase,
      "remat": mode, "target": str(target), "device_kind": last[0].kind, "devices": target.count,
      "dtype": page.precision, "images_per_chip": best, "unit": unit,
      "batch_size": best * target.count // each,
      "memory_bytes": last[0].memory, "accepted_bytes": room(target),
      "more_may_fit": bool(best) and all(one.fits for one in tried),
      "tried": [one._asdict() for one in sorted(tried)]})
  return rows


def room(target: Any) -> int | None:
  """Bytes of a chip that a program may take; None where the host's memory is the chip's."""
  from medattn_jax import forecast

  if target.sheet is None:
    return None
  return int(target.sheet.memory * (1 - forecast.MARGIN if target.gpu else 1))


def search(attempt: Callable[[int], Try], unit: int, most: int, room: int | None) -> list[Try]:
  """Tries multiples of `unit` up to `most`, until the largest that fits and the next one up, which
  does not, are among them (or not even one unit fits, or `most` does).

  Between them it looks where a line through the two largest peaks that fit meets `room`; where
  that has not halved what is left, in the middle.
  """
  tried: list[Try] = []
  low, high, step = 0, most // unit + 1, 1
  while high - low > 1:
    guess = _guess([one for one in tried if one.fits], unit, room)
    bracketed = any(not one.fits for one in tried)
    if guess is None or (bracketed and len(tried) % 2):
      number = (low + high) // 2 if bracketed else max(1, 2 * low)
    elif guess <= low and not bracketed:
      number, step = low + step, 2 * step  # the line was too steep
    else:
      number = guess
    number = min(max(number, low + 1), high - 1)
    tried.append(attempt(number * unit))
    low, high = (number, high) if tried[-1].fits else (low, number)
  return tried


def _guess(fit: Sequence[Try], unit: int, room: int | None) -> int | None:
  """Units that fill the room, by a line through the two largest batches that fit."""
  known = sorted(one for one in fit if one.needs)[-2:]
  if room is None or len(known) < 2 or known[1].needs <= known[0].needs:
    return None
  slope = (known[1].needs - known[0].needs) / (known[1].images - known[0].images)
  return int((known[1].images + (room - known[1].needs) / slope) // unit)


def words(row: Mapping[str, Any]) -> str:
  """The answer, and what was tried."""
  lines = []
  for one in row["tried"]:
    needs = f"{one['needs'] / 1e9:8.2f} GB" if one["needs"] else " " * 11
    of = f" of {row['accepted_bytes'] / 1e9:.2f}" if row["accepted_bytes"] else ""
    lines.append(f"  {one['images']:5} images a chip {needs}{of}  "
                 f"{'fits' if one['fits'] else 'does not fit'}")
  where = f"{row['phase']} on {row['target']}, remat {row['remat']}"
  if not row["images_per_chip"]:
    head = (f"{where}: not even {row['unit']} images fit; accepted: a smaller norm.group_size, "
            "data.image_size or model.crop_size")
  else:
    more = ", and perhaps more (--most)" if row["more_may_fit"] else ""
    head = (f"{where}: {row['images_per_chip']} images a chip{more}: data.batch_size = "
            f"{row['batch_size']} on {row['devices']} of them")
  return "\n".join([head, *lines])


def plot(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """What a chip needs for so many images, and what it has room for; a cross does not fit."""

  def draw(panel):
    for number, row in enumerate(found):
      colour, label = f"C{number % 10}", f"{row['target']}, remat {row['remat']}"
      known = [one for one in row["tried"] if one["needs"]]
      panel.plot([one["images"] for one in known], [one["needs"] / 1e9 for one in known], "-",
                 color=colour, linewidth=1, label=label)
      for one in known:
        panel.plot(one["images"], one["needs"] / 1e9, "o" if one["fits"] else "x", color=colour)
      if row["accepted_bytes"]:
        panel.axhline(row["accepted_bytes"] / 1e9, color=colour, linewidth=0.8, linestyle="--")
    panel.set_xlabel("images a chip")
    panel.set_ylabel("GB at the peak; room dashed")
    panel.set_title(f"{found[0]['config']['file']}, phase {found[0]['phase']}", fontsize=10)
    panel.legend(frameon=False, fontsize=8)

  figure(path, 5.6, 3.8, draw)


if __name__ == "__main__":
  main()
