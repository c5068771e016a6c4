"""Where a program's cost goes, complete: like instructions of like modules together, and by kind.

Beside the bytes of the text (traffic.py) stands, kind by kind, what XLA's cost analysis counts. Of
a fusion that is much the same; of all else it is what an instruction takes and gives, each array as
large as its tiles. So each slice that is fetched ahead counts as its whole source, slices that lie
side by side already as moved, and what the program returns once more.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from medattn_jax.programs import report, traffic
from medattn_jax.programs.places import Single

_NUMBERED = re.compile(r"-\d+(?=/|$)")  # one of several like modules
_UNCOUNTED = {"parameter", "constant", "get-tuple-element", "bitcast", "after-all", "partition-id",
              "replica-id"}
_TARGET = re.compile(r'custom_call_target="(\w+)"')
_TILE = re.compile(r"T\(([\d,]+)\)")


class Alike(NamedTuple):
  """Instructions that are one but for the number of their module; `shape`: the largest result."""

  number: int
  cost: int
  moved: int
  hbm: int
  direction: str
  path: str
  kind: str
  shape: str


class Kind(NamedTuple):
  """All instructions of a kind; `counted`: bytes by XLA's rule, a loop's body once."""

  kind: str
  number: int
  cost: int
  moved: int
  hbm: int
  counted: int


def alike(singles: Iterable[Single]) -> list[Alike]:
  """The dearest first; of those that cost nothing, what moves most."""
  found = collections.defaultdict(collections.Counter)
  for one in singles:
    arrays = traffic.arrays(one.shape)
    shape = max(arrays, key=lambda array: math.prod(array[1]), default=("", ()))
    shape = f"{shape[0]}[{','.join(map(str, shape[1]))}]" if shape[0] else "–"
    key = one.direction, _NUMBERED.sub("", one.path), one.kind, shape
    found[key].update(number=1, cost=one.cost, moved=one.moved, hbm=one.hbm)
  rows = [Alike(*(costs[name] for name in Alike._fields[:4]), *key) for key, costs in found.items()]
  return sorted(rows, key=lambda one: (-one.cost, -one.moved))


def covering(rows: list[Alike], share: float) -> list[Alike]:
  """Of `alike`'s the fewest that hold such a share of the cost and of the bytes moved."""
  kept = set()
  for of in ("cost", "moved"):
    wanted = share * sum(getattr(one, of) for one in rows)
    wanted -= sum(getattr(one, of) for one in kept)
    for one in sorted(rows, key=lambda one: -getattr(one, of)):
      if wanted <= 0:
        break
      if one not in kept:
        kept.add(one)
        wanted -= getattr(one, of)
  return [one for one in rows if one in kept]


def kinds(text: str, singles: Iterable[Single]) -> list[Kind]:
  """What XLA counts most of first; a custom call's kind is its target. `singles`: all of them."""
  program, entry = traffic.parse(text)
  costs = {one.name: one for one in singles}
  found = collections.defaultdict(collections.Counter)
  for inside, one, _ in traffic.run(program, entry, 1):
    target = _TARGET.search(one.rest)
    kind = target.group(1) if target and one.kind == "custom-call" else one.kind
    own = costs.get(one.name)
    if counted := _counted(program, inside, one):
      found[kind].update(counted=counted)
    if own or counted:
      found[kind].update(number=1)
    if own:
      found[kind].update(cost=own.cost, moved=own.moved, hbm=own.hbm)
  rows = [Kind(kind, *(of[name] for name in Kind._fields[1:])) for kind, of in found.items()]
  return sorted(rows, key=lambda one: (-one.counted, -one.cost))


def _counted(program: traffic.Program, inside: str, one: traffic.Instruction) -> int:
  if one.kind in _UNCOUNTED:
    return 0
  if one.kind == "fusion":
    return traffic.bytes_of(program, inside, one).total()
  shapes = [program[inside][name].shape for name in one.operands]
  if one.kind == "tuple":
    return _tiled(one.shape) if one.root else 0
  if one.kind not in report.KINDS:  # of an operation that is under way a tuple is but the handle
    shapes = [shape for shape in (*shapes, one.shape) if not shape.startswith("(")]
    return sum(map(_tiled, shapes))
  return sum(map(_tiled, (*shapes, one.shape)))


def _tiled(shape: str) -> int:
  """Bytes of an array's or a tuple's type, each array as large as the tiles that it fills."""
  total = 0
  for dtype, sides, layout in traffic.arrays(shape):
    order, _, rest = layout.partition(":")
    order = [int(side) for side in order.split(",") if side]
    physical = [sides[place] for place in reversed(order)] if order else list(sides)
    tile = _TILE.search(rest)
    for place, side in enumerate(reversed(tile.group(1).split(",")) if tile else ()):
      if place < len(physical):
        physical[-1 - place] = -(-physical[-1 - place] // int(side)) * int(side)
    total += traffic.BYTES[dtype] * math.prod(physical)
  return total
