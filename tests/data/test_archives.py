"""A zip archive is read in memory, and what a hostile one asks for is refused."""

from __future__ import annotations

import os
import stat
import struct
import zipfile

import pytest

from medattn_jax.data import archives
from medattn_jax.data.preprocess import BadImage


def archive(path, members, method=zipfile.ZIP_DEFLATED):
  """Writes {name: bytes, or (ZipInfo, bytes)} as a zip archive."""
  with zipfile.ZipFile(path, "w", method) as file:
    for name, content in members.items():
      if isinstance(content, tuple):
        file.writestr(*content)
      else:
        file.writestr(name, content)
  return path


def entry(name, mode):
  info = zipfile.ZipInfo(name)
  info.create_system, info.external_attr = 3, mode << 16
  return info


def tree(folder):
  return sorted(os.path.join(where, name) for where, inner, names in os.walk(folder)
                for name in inner + names)


def test_entries_are_read_as_they_were_written(tmp_path):
  members = {"a.tif": b"pixels" * 1000, "b/c d/é.tif": b"x", "empty.tif": b""}
  path = archive(tmp_path / "a.zip", {**members, "b/": b""})
  names, refused = archives.entries(path)
  assert names == list(members) and refused == []
  assert archives.read(path, "a.tif") == members["a.tif"]
  assert archives.read(path, "b/c d/é.tif") == b"x"
  with pytest.raises(BadImage, match="empty"):
    archives.read(path, "empty.tif")
  with pytest.raises(BadImage, match=r"no more in a\.zip"):
    archives.read(path, "gone.tif")


@pytest.mark.parametrize("name, mode, reason", [
  ("../out.tif", 0, "outside"), ("a/../../out.tif", 0, "outside"), ("..\\out.tif", 0, "outside"),
  ("/etc/out.tif", 0, "absolute"), ("C:/out.tif", 0, "absolute"),
  ("link.tif", stat.S_IFLNK | 0o777, "a link"), ("pipe.tif", stat.S_IFIFO, "no plain file"),
])  # fmt: skip
def test_what_leads_outside_is_refused_and_nothing_is_written(tmp_path, name, mode, reason):
  inner = tmp_path / "inner"
  inner.mkdir()
  path = archive(inner / "a.zip", {name: (entry(name, mode), b"/etc/passwd"), "good.tif": b"good"})
  before = tree(tmp_path)
  names, refused = archives.entries(path)
  assert names == ["good.tif"] and [n for n, _ in refused] == [name] and reason in refused[0][1]
  with pytest.raises(BadImage, match=reason):
    archives.read(path, name)
  assert archives.read(path, "good.tif") == b"good" and tree(tmp_path) == before


def test_bombs_and_locks_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, "MAX_BYTES", 10_000)
  path = archive(tmp_path / "a.zip", {"bomb.tif": bytes(10_001), "good.tif": bytes(10_000)})
  names, refused = archives.entries(path)
  assert names == ["good.tif"] and "declares 10001 bytes, more than 10000" in refused[0][1]
  with pytest.raises(BadImage, match="more than 10000"):
    archives.read(path, "bomb.tif")
  assert archives.read(path, "good.tif") == bytes(10_000)
  # One that declares less than it holds gives no more than it declares, and is found out.
  content = bytearray(path.read_bytes())
  for place in (content.index(b"PK\x01\x02") + 24, 22):  # the directory's word, the entry's own
    content[place : place + 4] = struct.pack("<I", 100)
  (tmp_path / "liar.zip").write_bytes(content)
  with pytest.raises(BadImage, match="damaged within its archive"):
    archives.read(tmp_path / "liar.zip", "bomb.tif")
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\x01\x02") + 8] |= 1
  (tmp_path / "locked.zip").write_bytes(content)
  assert "password" in archives.entries(tmp_path / "locked.zip")[1][0][1]
  path = archive(tmp_path / "lzma.zip", {"a.tif": b"x"}, zipfile.ZIP_LZMA)
  assert "method 14" in archives.entries(path)[1][0][1]
  monkeypatch.setattr(archives, "MAX_ENTRIES", 1)
  with pytest.raises(BadImage, match="2 entries, more than 1"):
    archives.entries(tmp_path / "a.zip")


def test_damage_is_noticed(tmp_path):
  path = archive(tmp_path / "a.zip", {"a.tif": bytes(range(256)) * 8}, zipfile.ZIP_STORED)
  content = path.read_bytes()
  (tmp_path / "flipped.zip").write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
  with pytest.raises(BadImage, match="damaged within its archive"):
    archives.read(tmp_path / "flipped.zip", "a.tif")
  for name, damaged in (("cut.zip", content[:500]), ("text.zip", b"no archive"), ("0.zip", b"")):
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(BadImage, match="no zip archive, or damaged"):
      archives.entries(tmp_path / name)
  os.mkfifo(tmp_path / "pipe.zip")
  with pytest.raises(BadImage, match="a pipe"):
    archives.entries(tmp_path / "pipe.zip")
  twice = zipfile.ZipFile(tmp_path / "twice.zip", "w")
  with pytest.warns(UserWarning, match="Duplicate name"):
    twice.writestr("a.tif", b"1")
    twice.writestr("a.tif", b"2")
  twice.close()
  names, refused = archives.entries(tmp_path / "twice.zip")
  assert names == ["a.tif"] and "is there twice" in refused[0][1]
