"""Where in the model a compiled program spends: its instructions gathered by the code they are of.

JAX writes the path of modules and transformations into every instruction's op_name. A fusion bears
the name of one of its instructions, its root's as a rule, so a shared pass is booked to one place.
"""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from medattn_jax.programs import report, traffic

FORWARD, BACKWARD, REST = "forward", "backward", "rest"
_MODULE = re.compile(r"[A-Za-z_][\w.\-]*")
_COPY = re.compile(r"-\d+$")  # the number of one of several like modules
# Names in a path that are of JAX itself, besides those of transformations.
_OF_JAX = {"shard_map", "while", "body", "cond", "scan", "closed_call", "checkpoint",
           "rematted_computation", "custom_jvp_call", "custom_vjp_call", "branch_0_fun",
           "branch_1_fun"}


class Share(NamedTuple):
  """What the instructions of one place cost together, and the bytes that they move, of which `hbm`
  to and from the chip's memory; "–" is no module's."""

  direction: str
  place: str
  cost: int
  moved: int
  hbm: int


class Single(NamedTuple):
  """One instruction: what it costs and moves, and what it is."""

  cost: int
  moved: int
  hbm: int
  name: str
  kind: str
  shape: str
  direction: str
  path: str  # of the modules, whole, and what is computed


class Places(NamedTuple):
  """`unit` of the costs: cycles or bytes; `total` of the program; `shares` and `singles` with the
  dearest first."""

  unit: str
  total: int
  shares: tuple[Share, ...]
  singles: tuple[Single, ...]


def of(text: str, depth: int, largest: int) -> Places:
  """Gathers a compiled program's costs by place, `depth` modules deep; lists the `largest` singly.

  Cycles where the compiler counts them, else the bytes moved. A loop counts as often as it runs;
  once where the text does not tell.
  """
  cycles = {one.name: one.cycles for one in report.costs(text)}
  unit, near = ("cycles", traffic.VMEM) if cycles else ("bytes", None)
  program, entry = traffic.parse(text)
  moved, hbm = (
    {one.name: bytes.total() for one, _, bytes in traffic.each(text, memory, unknown=1)}
    for memory in (None, near))
  costs, singles = collections.defaultdict(collections.Counter), []
  for _, one, times in traffic.run(program, entry, unknown=1):
    bytes = moved.get(one.name, 0), hbm.get(one.name, 0)
    cost = cycles.get(one.name, 0) if cycles else bytes[0]
    if not cost and not any(bytes):
      continue
    scope = report.scope(one, program)
    where = place(scope, depth)
    costs[where].update(cost=cost, moved=bytes[0], hbm=bytes[1])
    kind = one.kind if times == 1 else f"{times} × {one.kind}"
    singles.append(Single(
      cost, *bytes, one.name, kind, one.shape, where[0], scope.rpartition(")/")[2] or "–"))
  singles.sort(key=lambda one: -one.cost)
  shares = [Share(*where, **dict(cost)) for where, cost in costs.items()]
  shares.sort(key=lambda one: -one.cost)
  return Places(unit, sum(one.cost for one in shares), tuple(shares), tuple(singles[:largest]))


def place(scope: str, depth: int) -> tuple[str, str]:
  """(direction, path of modules) of an op_name; the model itself, first of all paths, is left out.

  Backward is what a transposed function computes, forward what a differentiated one does, rest all
  else: the optimiser, collectives, copies. Like modules (repeat-3, repeat-4) are one.
  """
  path = max(scope.split(";"), key=lambda part: part.count("/"))  # of merged instructions
  modules = [
    _COPY.sub("", part) for part in path.split("/")[:-1]
    if _MODULE.fullmatch(part) and part not in _OF_JAX]
  direction = BACKWARD if "transpose(" in path else FORWARD if "jvp(" in path else REST
  return direction, "/".join(modules[:depth]) or "–"
