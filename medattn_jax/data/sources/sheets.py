"""Sheets of labels as people and publishers write them: encodings, separators, headers, rows."""

from __future__ import annotations

import collections
import contextlib
import csv
import io
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence

from medattn_jax.data import preprocess
from medattn_jax.errors import UserError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def content(sheet: pathlib.Path, root: pathlib.Path, what: str) -> bytes:
  """The bytes of a sheet below the folder `root`. UserError, with the words `what`, otherwise."""
  try:
    preprocess.resolve(sheet, root)
    return preprocess.read_bytes(sheet)
  except preprocess.BadImage as error:
    raise UserError(f"{sheet} {error}: {what}") from None


def read(
  sheet: pathlib.Path, root: pathlib.Path, required: Sequence[str], what: str,
  optional: Collection[str] = (),
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
  """Header and rows, as `table` gives them, of a sheet below the folder `root`.

  Raises UserError, with the words `what` is accepted, where it is of no use as a whole.
  """
  decoded, _ = text(content(sheet, root, what), sheet)
  header, rows, _ = table(decoded, sheet, required, optional, what)
  return header, rows


def find(
  folder: pathlib.Path, name: str, columns: Sequence[str] = ()
) -> pathlib.Path | None:
  """The file right in `folder` that is called `name`, or else the .csv that has the `columns`."""
  there = sorted(folder.glob("*"))
  named = [path for path in there if path.name.lower() == name.lower()]
  if named or not columns:
    return named[0] if named else None
  for path in there:
    if path.suffix.lower() == ".csv":
      with contextlib.suppress(UserError):  # some other sheet
        read(path, folder, columns, name)
        return path
  return None


def text(content: bytes, sheet: object) -> tuple[str, str]:
  """The text of a sheet's bytes, and the name of its encoding where that is not UTF-8."""
  if content.startswith((b"\xff\xfe", b"\xfe\xff")):
    try:
      return content.decode("utf-16"), "UTF-16"
    except UnicodeDecodeError as error:
      raise UserError(f"{sheet} is damaged UTF-16 ({error.reason}): save it as UTF-8") from None
  if b"\0" in content:
    raise UserError(f"{sheet} is no text (it has zero bytes): save it as CSV in UTF-8")
  try:
    return content.decode("utf-8-sig"), ""
  except UnicodeDecodeError as error:
    line = content[: error.start].count(b"\n") + 1
    raise UserError(f"{sheet} line {line} is not UTF-8 (byte 0x{content[error.start]:02x}): save "
                    "the sheet as UTF-8") from None


def table(
  text: str, sheet: object, required: Sequence[str], optional: Collection[str], what: str
) -> tuple[list[str], Iterator[tuple[int, list[str]]], str]:
  """The header's names, in small letters, an iterator of (line, cells), and the separator.

  Args:
    sheet: how errors name it. required, optional: columns, none of which may be there twice.
    what: the words for what is accepted.

  Raises:
    UserError: no header with the required columns; while iterating, a quote that never closes.
  """
  first = next((line for line in re.split(r"\r\n|\r|\n", text) if line.strip()), None)
  if first is None:
    raise UserError(f"{sheet} is empty: {what}")
  try:
    headers = {s: [c.strip().lower() for c in next(csv.reader([first], delimiter=s))]
               for s in SEPARATORS}
  except csv.Error as error:
    raise UserError(f"{sheet}: its header cannot be read ({error}): {what}") from None
  separator = next((s for s in SEPARATORS if set(required) <= set(headers[s])), None)
  if separator is None:
    separator = max(SEPARATORS, key=lambda s: len(headers[s]))
    missing = " and ".join(name for name in required if name not in headers[separator])
    shown = ", ".join(headers[separator])[:200]
    raise UserError(f"{sheet} has no column {missing}: its header, read as separated by "
                    f"{SEPARATORS[separator]}, is {shown!r}; {what} (separated by "
                    f"{', '.join(SEPARATORS.values())})")
  header = headers[separator]
  double = [name for name in (*required, *optional) if header.count(name) > 1]
  if double:
    raise UserError(f"{sheet} has more than one column {double[0]}: one is accepted")

  def rows() -> Iterator[tuple[int, list[str]]]:
    # strict: a quote that never closes would otherwise swallow the rows after it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line, seen = 1, False
    try:
      for row in reader:
        if seen and row:
          yield line, row
        seen = seen or any(cell.strip() for cell in row)
        line = reader.line_num + 1
    except csv.Error as error:
      raise UserError(f"{sheet} line {line} cannot be read ({error}): quotes must be closed, and "
                      "doubled inside quotes") from None

  return header, rows(), separator


def cells(header: list[str], row: list[str]) -> dict[str, str]:
  """{column: cell} of a row, "" for a column that is not there. Raises BadImage: cells beyond."""
  found = collections.defaultdict(str)
  found.update((name, cell.strip()) for name, cell in zip(header, row, strict=False))
  if any(cell.strip() for cell in row[len(header) :]):
    raise preprocess.BadImage(f"has {len(row)} cells where the header has {len(header)}: a name "
                              "with a separator in it needs quotes")
  return found
