"""A spreadsheet's rows as text, from the .xlsx file it is: a zip archive with XML in it.

Only what a list of labels needs: the cells of the first sheet. Believed nothing: no more is read
than LIMIT bytes a part, and XML that defines anything (a DOCTYPE, with which a few bytes become
gigabytes) is refused.
"""

from __future__ import annotations

import io
import pathlib
import re
import zipfile
from xml.etree import ElementTree
from xml.parsers import expat

from medattn_jax.data import archives
from medattn_jax.errors import UserError

LIMIT = 32 * 2**20  # bytes of a part of the archive, unpacked
MAX_COLUMNS = 256
DAMAGE = (*archives.DAMAGE, expat.ExpatError)
STRINGS = "xl/sharedStrings.xml"
_SHEET = re.compile(r"xl/worksheets/[^/]*?(\d*)\.xml")
_PLACE = re.compile(r"([A-Z]{1,3})\d+")


def rows(content: bytes, sheet: pathlib.Path, what: str) -> list[tuple[int, list[str]]]:
  """(row number, cells) of the first sheet of the file with these bytes; "" for an empty cell.

  Raises UserError, with the words `what` is accepted, for damage and for what is none such.
  """
  try:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
      parts = {name: found for name in archive.namelist() if (found := _SHEET.fullmatch(name))}
      if not parts:
        raise ValueError("there is no sheet in it")
      first = min(parts, key=lambda name: (int(parts[name][1] or 0), name))
      strings = _strings(archive) if STRINGS in archive.namelist() else []
      found = []
      for row in _tree(archive, first).iter("row"):
        cells: dict[int, str] = {}
        for cell in row.iter("c"):
          cells[_column(cell, next(reversed(cells), -1) + 1)] = _text(cell, strings)
        width = max(cells, default=-1) + 1
        number = int(row.get("r") or len(found) + 1)
        found.append((number, [cells.get(column, "") for column in range(width)]))
      return found
  except DAMAGE as error:
    why = " ".join(str(error).split())[:160] or type(error).__name__
    raise UserError(f"{sheet} is no .xlsx file, or damaged ({why}); accepted: {what}") from None


def _tree(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
  """A part's XML; names without their namespaces."""
  with archive.open(name) as part:
    content = part.read(LIMIT + 1)
  if len(content) > LIMIT:
    raise ValueError(f"{name} has more than {LIMIT} bytes")
  builder = ElementTree.TreeBuilder()
  local = lambda name: name.rpartition(" ")[2]
  parser = expat.ParserCreate(namespace_separator=" ")
  parser.StartDoctypeDeclHandler = _refuse
  parser.StartElementHandler = lambda name, attributes: builder.start(local(name), attributes)
  parser.EndElementHandler = lambda name: builder.end(local(name))
  parser.CharacterDataHandler = builder.data
  parser.Parse(content, True)
  return builder.close()


def _refuse(*declaration: object) -> None:
  raise ValueError("its XML has a DOCTYPE")


def _strings(archive: zipfile.ZipFile) -> list[str]:
  return [_joined(entry) for entry in _tree(archive, STRINGS).iter("si")]


def _joined(entry: ElementTree.Element) -> str:
  """A string's runs; not how it is spoken, which East Asian sheets note beside it (rPh)."""
  runs = [entry, *(run for run in entry if run.tag == "r")]
  return "".join(text.text or "" for run in runs for text in run.findall("t"))


def _column(cell: ElementTree.Element, following: int) -> int:
  """From 0; a cell that does not say where it is follows the last."""
  place = _PLACE.fullmatch(cell.get("r", ""))
  if not place:
    return following
  column = 0
  for letter in place[1]:
    column = 26 * column + ord(letter) - ord("A") + 1
  if column > MAX_COLUMNS:
    raise ValueError(f"{place[0]} is beyond {MAX_COLUMNS} columns")
  return column - 1


def _text(cell: ElementTree.Element, strings: list[str]) -> str:
  if cell.get("t") == "inlineStr":
    return "".join(_joined(inline) for inline in cell.findall("is"))
  value = cell.findtext("v") or ""
  if cell.get("t") != "s":
    return value
  number = int(value or -1)
  if not 0 <= number < len(strings):
    raise ValueError(f"{cell.get('r')} is string {value!r} of {len(strings)}")
  return strings[number]
