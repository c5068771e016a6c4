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
  """What the instructions of one place cost together; "–" is no module's."""

  direction: str
  place: str
  cost: int


class Single(NamedTuple):
  """One instruction: what it costs, and what it is."""

  cost: int
  name: str
  kind: str
  shape: str
  direction: str
  path: str  # of the modules, whole, and what is computed


class Places(NamedTuple):
  """`unit`: cycles or bytes; `total` of the program; `shares` and `singles` with the dearest first.
  """

  unit: str
  total: int
  shares: tuple[Share, ...]
  singles: tuple[Single, ...]


def of(text: str, depth: int, largest: int, rounds: int = 1) -> Places:
  """Gathers a compiled program's costs by place, `depth` modules deep; lists the `largest` singly.

  Cycles where the compiler counts them, else the bytes moved. `rounds`: as in report.read.
  """
  unit, found = "cycles", [
    (one.cycles, one.name, one.kind, one.shape, one.scope) for one in report.costs(text, rounds)]
  if not found:
    unit = "bytes"
    program, _ = traffic.parse(text)
    for one, times, moved in traffic.each(text, rounds):
      kind = one.kind if times == 1 else f"{times} × {one.kind}"
      found.append((moved.total(), one.name, kind, one.shape, report.scope(one, program)))
  total, singles = collections.Counter(), []
  for *what, scope in found:
    total[place(scope, depth)] += what[0]
    direction, _ = place(scope, depth)
    singles.append(Single(*what, direction, scope.rpartition(")/")[2] or "–"))
  singles.sort(key=lambda one: -one.cost)
  shares = (Share(*where, cost) for where, cost in total.most_common())
  return Places(unit, total.total(), tuple(shares), tuple(singles[:largest]))


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
