"""The files below a folder, found by the names that a sheet gives them."""

from __future__ import annotations

import collections
import os
import pathlib
import re
import unicodedata
from collections.abc import Collection

from medattn_jax.data import preprocess


def stem(name: str) -> str:
  """The name without the suffix of a picture; one with any other suffix as it is."""
  root, suffix = os.path.splitext(name)
  return root if suffix.lower() in preprocess.SUFFIXES else name


def folded(name: str) -> str:
  """One spelling of what file systems and sheets spell differently: accents, case."""
  return unicodedata.normalize("NFC", name).casefold()


class Pictures:
  """The files below a folder, whatever they are, of which a sheet names some.

  Attributes:
    root: what the real place of each must be below. names: the files, relative to the folder, in
    order. closed: (folder relative to `root`, why it cannot be listed).
  """

  def __init__(
    self, root: pathlib.Path, skip: Collection[pathlib.Path] = (), part: str = ""
  ):
    """Looks through the folder `part` of `root`, or all of it; `skip` is not looked into."""
    self.root, self._part = root, part
    self.closed: list[tuple[str, str]] = []
    self._links: set[str] = set()
    self.names: list[str] = []
    folder = root / part
    self._is_there = folder.is_dir()
    skipped = {os.path.realpath(path) for path in skip}
    closed = lambda e: self.closed.append(
      (os.path.relpath(e.filename, root), f"cannot be listed: {e.strerror}")
    )
    for where, inner, files in os.walk(folder, onerror=closed) if self._is_there else ():
      relative = pathlib.PurePath(os.path.relpath(where, folder))
      inner[:] = [d for d in inner if os.path.realpath(os.path.join(where, d)) not in skipped]
      for name in inner:
        if os.path.islink(os.path.join(where, name)):
          self._links.add((relative / name).as_posix())
      # A folder or pipe that is named like a picture is told apart when it is opened.
      named = files + [d for d in inner if stem(d) != d]
      self.names += [(relative / name).as_posix() for name in named]
    self.names.sort()  # a folder is listed in no order
    self._asked: set[str] = set()
    # From the strictest reading of a name to the most lenient.
    views = (
      lambda n: n,
      stem,
      folded,
      lambda n: folded(stem(n)),
      lambda n: n.rpartition("/")[2],
      lambda n: stem(n.rpartition("/")[2]),
      lambda n: folded(n.rpartition("/")[2]),
      lambda n: folded(stem(n.rpartition("/")[2])),
    )
    self._views = []
    for number, view in enumerate(views):
      table = collections.defaultdict(list)
      for name in self.names:
        if number % 2 == 0 or view(name) != views[number - 1](name):
          table[view(name)].append(name)
      self._views.append(table)

  def find(self, image: str) -> pathlib.Path:
    """The real place of the file that the sheet calls `image`; raises BadImage."""
    if not self._is_there:
      raise preprocess.BadImage(f"is missing: there is no folder {self._part}")
    return preprocess.resolve(self.root / self._part / self._named(image), self.root)

  def _named(self, image: str) -> str:
    """The file that the sheet calls `image`, as in `names`."""
    name = image
    if "\\" in name and name not in self._views[0]:
      name = name.replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:/", name):
      raise preprocess.BadImage("is an absolute path: names below the input folder are accepted")
    if ".." in parts:
      raise preprocess.BadImage("leads outside of the input folder: names below it are accepted")
    name = "/".join(part for part in parts if part not in ("", "."))
    for number, table in enumerate(self._views):
      matches = table.get(folded(name) if number % 4 > 1 else name, ())
      if len(matches) > 1:
        raise preprocess.BadImage(f"may be any of {', '.join(matches[:3])}")
      if matches:
        self._asked.update(matches)
        return matches[0]
    behind = next((link for link in self._links if name.startswith(f"{link}/")), None)
    if behind:
      raise preprocess.BadImage(f"is behind the link {behind}, which is not followed")
    raise preprocess.BadImage("is missing")

  def unasked(self) -> list[str]:
    """The pictures that no name in the sheet has found, relative to `root`."""
    return [(pathlib.PurePath(self._part) / name).as_posix() for name in self.names
            if name not in self._asked and stem(name) != name]
