"""All that a compiled program tells without being run.

XLA's three compilers answer unevenly: a TPU's estimates cycles, a GPU's has no cost analysis and a
CPU's peak leaves the temporaries out. What one does not say is None here.
"""

from __future__ import annotations

import collections
import re
from typing import Any, NamedTuple

import jax

from medattn_jax.programs import traffic

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_NOWHERE = "jit(local)/shard_map"  # of what a compiler made itself
# What libtpu cannot estimate, it counts as minus one second.
_UNKNOWN = re.compile(r'custom_call_target="ConcatBitcast"')


class Collective(NamedTuple):
  """One collective of a program; `size`: {dtype: bytes} that a device gives."""

  kind: str
  size: dict[str, int]
  synchronous: bool
  inside: bool  # a loop or a branch, and so perhaps run many times
  elements: int


class Cost(NamedTuple):
  """One instruction of those that run, by the compiler's own estimate."""

  times: int
  cycles: int  # of all of them
  name: str
  kind: str
  shape: str
  scope: str  # the op_name: where in the model it comes from


class Report(NamedTuple):
  """Of one device's program. Bytes, unless said otherwise.

  Attributes:
    collectives: in the order of the text.
    donated: buffers of the input that the output takes over.
    arguments, outputs, aliased, temporaries, peak: memory; the peak includes the arguments.
    flops, accessed: floating point operations and bytes read and written; loops' bodies once.
    seconds: the compiler's estimate of a run, of TPUs alone.
    cycles: the sum over the instructions that run, of TPUs alone; loops as often as `read` says.
  """

  collectives: tuple[Collective, ...]
  donated: int
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  peak: int
  flops: float | None
  accessed: float | None
  seconds: float | None
  cycles: int | None

  @property
  def counts(self) -> dict[str, int]:
    """{kind of collective: how many}."""
    return dict(collections.Counter(one.kind for one in self.collectives))

  @property
  def wire(self) -> dict[str, int]:
    """{dtype: bytes} that a device gives to all collectives together."""
    total = collections.Counter()
    for one in self.collectives:
      total.update(one.size)
    return dict(total)

  def row(self) -> dict[str, Any]:
    """As one JSON object."""
    fields = self._asdict()
    del fields["collectives"]
    return {
      "collectives": self.counts, "wire_bytes": self.wire,
      "synchronous": sum(one.synchronous for one in self.collectives),
      "inside": sum(one.inside for one in self.collectives), **fields}


def read(compiled: Any) -> Report:
  """A report of a `jax.stages.Compiled`."""
  text, memory = compiled.as_text(), compiled.memory_analysis()
  cost = compiled.cost_analysis() or {}
  parts = {
    name: getattr(memory, f"{of}_size_in_bytes") for name, of in
    (("arguments", "argument"), ("outputs", "output"), ("aliased", "alias"),
     ("temporaries", "temp"))}
  held = parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
  seconds = cost.get("optimal_seconds")
  each = costs(text)
  cycles, once = (sum(own) for own in ([one.cycles for one in each],
                                       [one.cycles / one.times for one in each]))
  return Report(
    collectives=collectives(text), donated=donated(text), **parts,
    # A CPU's peak is of the arguments alone.
    peak=max(memory.peak_memory_in_bytes, held if "cpu" in _platform(compiled) else 0),
    flops=cost.get("flops"), accessed=cost.get("bytes accessed"),
    seconds=None if seconds is None or not cycles else
    (seconds + len(_UNKNOWN.findall(text))) * cycles / once,
    cycles=cycles or None)


def collectives(text: str) -> tuple[Collective, ...]:
  """The collectives of a compiled program's text; a start and its end are one."""
  program, entry = traffic.parse(text)
  found = []
  for computation, body in program.items():
    for one in body.values():
      kind = one.kind.removesuffix("-start")
      if kind in KINDS:
        given = [body[name].shape for name in one.operands if name in body]
        size = collections.Counter()
        for shape in given:
          size.update(traffic.size(shape))
        found.append(Collective(
          kind, dict(size), one.kind == kind or '"is_sync":true' in one.rest, computation != entry,
          sum(traffic.elements(shape) for shape in given)))
  return tuple(found)


def donated(text: str) -> int:
  """Buffers of the input that the output takes over."""
  return len(re.findall(r"(?:may|must)-alias\)", text[: text.index("\n")]))


def inputs(lowered: jax.stages.Lowered) -> list[str]:
  """The names of the arguments that a program takes; those that it never reads are not among them.

  Of the program before compilation: a TPU's has more than 2,000 of them as one tuple without names.
  """
  module = lowered.compiler_ir().body.operations
  (main,) = (one for one in module
             if one.OPERATION_NAME == "func.func" and one.name.value == "main")
  return [one.location.name_str for one in main.arguments]


def costs(text: str) -> list[Cost]:
  """The instructions that run and that a TPU's compiler gives cycles, in the order of the text.

  A loop's body counts as often as it runs; once where the text does not tell.
  """
  program, entry = traffic.parse(text)
  found = []
  for _, one, times in traffic.run(program, entry, unknown=1):
    if cycles := _CYCLES.search(one.rest):
      found.append(Cost(
        times, times * int(cycles.group(1)), one.name, one.kind, one.shape, scope(one, program)))
  return found


def scope(one: traffic.Instruction, program: traffic.Program | None = None) -> str:
  """An instruction's op_name: where in the model it comes from; "" for none.

  Of a fusion that has none of its own, with its `program`, the last one within it that has.
  """
  found = _SCOPE.search(one.rest)
  name = found.group(1).replace("\\'", "'") if found else ""
  if program and one.kind == "fusion" and "/" not in name.removeprefix(_NOWHERE):
    within = (scope(inner) for inner in reversed(traffic.called(program, one).values()))
    return next((own for own in within if "/" in own.removeprefix(_NOWHERE)), name)
  return name


def _platform(compiled: Any) -> str:
  try:
    return compiled.runtime_executable().local_devices()[0].platform
  except (AttributeError, IndexError, RuntimeError):
    return ""  # of a chip that is not here
