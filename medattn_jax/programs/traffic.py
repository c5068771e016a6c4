"""A compiled program's text, and the bytes it moves, a loop's body counted as often as it runs.

XLA's own cost analysis counts a loop's body once, and the GPU's compiler gives none. This reads the
optimised program's text: what each instruction reads and writes of arrays that lie in memory, by
their dtype. What a fusion keeps to itself is not counted; what a cache holds is, so for a
processor with large caches the floats are an upper bound. A TPU's program says of each array in
which memory it lies: `near=VMEM` leaves out what stays within the chip, and the rest is what passes
its pins.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^{}]*)\})?")
VMEM = "S(1)"  # the memory space within a TPU, in an array's layout
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_TRIPS = re.compile(r'known_trip_count":?\s*=?\{\\?"?n\\?"?:\\?"?(\d+)')
_BELOW = re.compile(
  r"\b(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FLOATS = {"f16", "bf16", "f32", "f64"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
         "partition-id", "replica-id", "optimization-barrier"}
_SCRATCH = re.compile(r", [su]8\[\d+\][^,]*\)$")  # a library's workspace: of what is used, unknown
_SLICE = re.compile(r"slice=\{[^}]*\}")
_NAMING = 'custom_call_target="ConcatBitcast"'  # slices that lie side by side already
_SAME = {"bitcast", "reshape", "copy-done"}  # another name of the same bytes, inside a fusion
# Number by number: of an operand they need what is needed of their result.
_EACH = _SAME | {
  "abs", "add", "and", "bitcast-convert", "ceil", "clamp", "compare", "convert", "copy", "cosine",
  "divide", "exponential", "exponential-minus-one", "floor", "is-finite", "log", "log-plus-one",
  "logistic", "maximum", "minimum", "multiply", "negate", "not", "or", "power", "remainder",
  "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "shift-left",
  "shift-right-arithmetic", "shift-right-logical", "sign", "sine", "sqrt", "subtract", "tan",
  "tanh", "transpose", "xor"}
_WHOLE = ""  # all that there is, among the parts of an array


class Instruction(NamedTuple):
  name: str
  shape: str
  kind: str
  operands: list[str]
  number: int  # of a parameter; a constant that is a whole number; else -1
  rest: str
  root: bool


Program = dict[str, dict[str, Instruction]]


class UnknownLoop(ValueError):
  """A loop whose number of rounds the program's text does not tell."""


def moved(text: str, near: str | None = None) -> dict[str, int]:
  """{dtype: bytes read and written} by one run of a compiled program (`compiled.as_text()`).

  Arguments and errors as `each`.
  """
  return dict(sum((bytes for *_, bytes in each(text, near)), collections.Counter()))


def repeats(text: str) -> float:
  """What is moved over what would be, did each loop run once. Errors as `each`."""
  every = [(times, bytes.total()) for _, times, bytes in each(text)]
  return sum(bytes for _, bytes in every) / sum(bytes / times for times, bytes in every)


def each(
    text: str, near: str | None = None, unknown: int | None = None
) -> list[tuple[Instruction, int, collections.Counter]]:
  """Every instruction that moves bytes: itself, how often it runs, and {dtype: bytes} in all.

  Loops, calls and branches are entered; a fusion is one instruction.

  Args:
    near: the memory space whose arrays are not counted.
    unknown: how often a loop is taken to run of which the text does not tell.

  Raises:
    UnknownLoop: there is such a loop, and `unknown` is None.
  """
  program, entry = parse(text)
  found = []
  for inside, one, times in run(program, entry, unknown):
    if bytes := bytes_of(program, inside, one, near):
      found.append((one, times, _multiplied(bytes, times)))
  return found


def run(
    program: Program, name: str, unknown: int | None = None, times: int = 1
) -> Iterator[tuple[str, Instruction, int]]:
  """(computation, instruction, how often) of all that a computation runs; of a branch, the side
  that moves more. Arguments and errors as `each`."""
  for one in program[name].values():
    if one.kind == "while":
      told = _rounds(program, one)
      if (number := unknown if told is None else told) is None:
        raise UnknownLoop(one.name)
      if number:
        yield from run(program, _called(one, "body"), unknown, times * number)
    elif one.kind == "call":
      yield from run(program, _called(one, "to_apply"), unknown, times)
    elif one.kind == "conditional":
      names = _names(_BRANCHES.search(one.rest)) or [
        _called(one, key) for key in ("true_computation", "false_computation")]
      sides = [list(run(program, side, unknown, times)) for side in names]
      yield from max(sides, key=lambda side: sum(
        number * bytes_of(program, name, one).total() for name, one, number in side))
    else:
      yield name, one, times


def _rounds(program: Program, loop: Instruction) -> int | None:
  """How often a loop runs; None where the text does not tell.

  A GPU's and a CPU's says so. Of a TPU's the condition does: JAX counts from 0 up to a constant.
  """
  if told := _TRIPS.search(loop.rest):
    return int(told.group(1))
  within = program[_called(loop, "condition")]
  for one in within.values():
    if one.root and one.kind == "compare" and "direction=LT" in one.rest:
      counter, end = (within[name] for name in one.operands)
      if counter.kind == "get-tuple-element" and end.kind == "constant" and end.number >= 0:
        return end.number
  return None


def floats(text: str, least: int) -> list[str]:
  """Every array of floats of at least so many elements that the program puts into memory.

  What is within a fusion, and so never in memory, is not looked at.
  """
  program, entry = parse(text)
  waiting, seen, found = [entry], set(), set()
  while waiting:
    for one in program[waiting.pop()].values():
      arrays = (array for array in _ARRAY.finditer(one.shape) if _elements(array) >= least)
      found |= {_bare(array) for array in arrays if array.group(1) in _FLOATS}
      below = set(_BELOW.findall(one.rest)) - seen if one.kind != "fusion" else set()
      below |= set(_names(_BRANCHES.search(one.rest))) - seen
      waiting += below
      seen |= below
  return sorted(found)


def parse(text: str) -> tuple[Program, str]:
  """The computations by name, each {instruction's name: instruction}; and the entry's name."""
  program: Program = {}
  entry = current = ""
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = head.group(2)
      program[current] = {}
      entry = current if head.group(1) else entry
    elif current and (found := _LINE.match(line)):
      root, name, right = found.groups()
      shape, right = _split(right) if right.startswith("(") else right.split(" ", 1)
      kind, _, right = right.strip().partition("(")
      operands, rest = _split("(" + right)
      names = re.findall(r"%([\w.\-]+)", operands)
      told = kind in ("parameter", "constant") and operands[1:-1].isdigit()
      number = int(operands[1:-1]) if told else -1
      program[current][name] = Instruction(name, shape, kind, names, number, rest, bool(root))
  return program, entry


def _split(text: str) -> tuple[str, str]:
  """A text in brackets, and what follows it."""
  depth = 0
  for place, sign in enumerate(text):
    depth += (sign == "(") - (sign == ")")
    if not depth:
      return text[: place + 1], text[place + 1 :]
  raise ValueError(f"brackets that do not close: {text[:80]}")


def _names(found: re.Match | None) -> list[str]:
  return re.findall(r"[\w.\-]+", found.group(1)) if found else []


def _elements(array: re.Match) -> int:
  return math.prod(int(side) for side in array.group(2).split(",") if side)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
  """(dtype, sides, layout) of each array of a type."""
  return [(array.group(1), tuple(int(side) for side in array.group(2).split(",") if side),
           array.group(3) or "") for array in _ARRAY.finditer(shape) if array.group(1) in BYTES]


def _bare(array: re.Match) -> str:
  return f"{array.group(1)}[{array.group(2)}]"


def elements(shape: str) -> int:
  """Numbers in an array's or a tuple's type."""
  return sum(_elements(array) for array in _ARRAY.finditer(shape))


def size(shape: str, near: str | None = None) -> collections.Counter:
  """{dtype: bytes} of an array's or a tuple's type; but for what lies in the memory `near`."""
  found = collections.Counter()
  for array in _ARRAY.finditer(shape):
    if array.group(1) in BYTES and not _lies(array, near):
      found[array.group(1)] += BYTES[array.group(1)] * _elements(array)
  return found


def called(program: Program, fusion: Instruction) -> dict[str, Instruction]:
  """What a fusion computes."""
  return program[_called(fusion, "calls")]


def _called(one: Instruction, key: str) -> str:
  return re.search(rf"\b{key}=%?([\w.\-]+)", one.rest).group(1)


def _multiplied(bytes: collections.Counter, times: int) -> collections.Counter:
  return collections.Counter({kind: times * n for kind, n in bytes.items()})


def _lies(array: re.Match, near: str | None) -> bool:
  return bool(near) and near in (array.group(3) or "")


def bytes_of(
    program: Program, inside: str, one: Instruction, near: str | None = None
) -> collections.Counter:
  """{dtype: bytes} that one run of an instruction of the computation `inside` moves."""
  shapes = [program[inside][name].shape for name in one.operands]
  if one.kind in _FREE or one.kind.endswith("-done") or _NAMING in one.rest:
    return collections.Counter()
  if one.kind == "fusion":
    return _fusion(program, one, shapes, near)
  if one.kind in ("copy-start", "slice-start"):  # the result is named with its source
    arrays = [found.group() for found in _ARRAY.finditer(one.shape)]
    return _from_to(arrays[one.kind == "slice-start"], shapes[0], near)
  if one.kind in ("dynamic-slice", "slice", "gather"):
    return _from_to(one.shape, shapes[0], near)
  if one.kind == "dynamic-update-slice":
    written = size(shapes[1]) if size(one.shape, near) else collections.Counter()
    return size(shapes[1], near) + written
  shape = _SCRATCH.sub("", one.shape) if one.kind == "custom-call" else one.shape
  return sum((size(given, near) for given in shapes), size(shape, near))


def _from_to(part: str, source: str, near: str | None) -> collections.Counter:
  """The bytes of a part of `source` that is put elsewhere."""
  read = size(part) if size(source, near) else collections.Counter()
  return read + size(part, near)


def _fusion(program, one, shapes, near) -> collections.Counter:
  """Of an operand what is needed of it; of a result that is only updated, the update."""
  body = called(program, one)
  needed = _needed(body)
  total = collections.Counter()
  for inner in body.values():
    if inner.kind == "parameter" and inner.name in needed:
      whole, parts = size(shapes[inner.number], near), needed[inner.name]
      if _WHOLE not in parts:
        share = sum(parts.values()) / max(1, elements(shapes[inner.number]))
        whole = collections.Counter({kind: int(n * min(1, share)) for kind, n in whole.items()})
      total += whole
  roots = [inner for inner in body.values() if inner.root]
  given = [one.shape]  # the fusion's own type tells where its results lie
  if roots[0].kind == "tuple":
    roots = [body[name] for name in roots[0].operands]
    arrays = (array.group() for array in _ARRAY.finditer(one.shape))
    # One of a fusion's results may be several itself, of a reduction of several arrays at once.
    given = [", ".join(itertools.islice(arrays, len(_ARRAY.findall(root.shape)))) for root in roots]
  for root, shape in zip(roots, given, strict=True):
    while root.kind in _SAME and root.operands:
      root = body[root.operands[0]]
    if root.kind != "dynamic-update-slice":
      total += size(shape, near)
    elif size(shape, near):
      total += size(body[root.operands[1]].shape)
  return total


def _needed(body) -> dict[str, dict[str, int]]:
  """{name: {part: its elements}} of what a fusion computes, as far as its results need it."""
  needed = collections.defaultdict(dict)
  for one in reversed(body.values()):  # users come after what they use
    if one.root:
      needed[one.name] = {_WHOLE: elements(one.shape)}
    parts = needed.get(one.name, {})
    for place, name in enumerate(one.operands if parts else ()):
      if place == 0 and one.kind in ("slice", "dynamic-slice"):
        told = _SLICE.search(one.rest)
        part = told.group() if told else one.name
        needed[name] |= {f"{part}{inner}": count for inner, count in parts.items()}
      elif one.kind in _EACH and elements(body[name].shape) == elements(one.shape):
        needed[name] |= parts
      elif not (place == 0 and one.kind == "dynamic-update-slice"):
        needed[name] |= {_WHOLE: elements(body[name].shape)}
  return needed
