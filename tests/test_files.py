"""Files are whole or not there; a folder's manifest notices any change."""

from __future__ import annotations

import errno
import json
import os

import pytest

from medattn_jax import files, manifest
from medattn_jax.errors import UserError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"old": 1})
  with pytest.raises(ValueError, match="JSON"):
    files.write_json(path, {"new": float("nan")})
  with pytest.raises(KeyboardInterrupt), files.replacing(path) as aside:
    aside.write_text("half of the n")
    assert json.loads(path.read_text()) == {"old": 1}  # until the end the old one is there
    raise KeyboardInterrupt
  assert json.loads(path.read_text()) == {"old": 1}
  assert os.listdir(tmp_path) == ["a.json"]


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
  (tmp_path / "plain").write_bytes(b"abc")
  (tmp_path / "link").symlink_to("plain")
  assert files.read_bytes(tmp_path / "plain", 3) == files.read_bytes(tmp_path / "link") == b"abc"
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "endless").symlink_to("/dev/zero")
  for name, why in (("pipe", "no plain file"), ("endless", "no plain file"),
                    (".", "directory"), ("none", "No such file")):
    with pytest.raises(OSError, match=why) as raised:
      files.read_bytes(tmp_path / name)
    assert raised.value.filename == str(tmp_path / name)
  with pytest.raises(OSError, match="larger than 2 bytes"):
    files.read_bytes(tmp_path / "plain", 2)


def test_a_full_disk_is_said_of_the_file_that_was_to_be_written(tmp_path):
  path = tmp_path / "a.csv"
  with pytest.raises(OSError, match="No space") as full, files.replacing(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert full.value.filename == str(path)
  with pytest.raises(FileNotFoundError) as lost:
    files.write_text(tmp_path / "no" / "a.csv", "")
  assert lost.value.filename == str(tmp_path / "no" / "a.csv")


def test_a_folder_comes_by_one_rename_of_synced_files(tmp_path, monkeypatch):
  calls = []
  real = {"fsync": os.fsync, "rename": os.rename}
  for name in real:
    monkeypatch.setattr(os, name, lambda *a, name=name: (calls.append(name), real[name](*a))[1])
  with files.placing(tmp_path / "new" / "folder") as aside:
    (aside / "below").mkdir()
    (aside / "below" / "b.txt").write_text("b")
    (aside / "a.txt").write_text("a")
    assert not (tmp_path / "new" / "folder").exists()
  assert calls == ["fsync"] * 4 + ["rename", "fsync"]  # two files, their folders; the one above
  assert (tmp_path / "new" / "folder" / "below" / "b.txt").read_text() == "b"
  assert os.listdir(tmp_path / "new") == ["folder"]


def test_a_folder_that_fails_is_not_there_and_another_stays_as_it_is(tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "mine.txt").write_text("mine")
  full = tmp_path / "full"
  with pytest.raises(OSError, match="not empty") as raised, files.placing(full) as aside:
    (aside / "a.txt").write_text("a")
  assert raised.value.filename == str(full)
  with pytest.raises(KeyboardInterrupt), files.placing(tmp_path / "new") as aside:
    (aside / "a.txt").write_text("a")
    raise KeyboardInterrupt
  with pytest.raises(OSError, match="No space") as raised, files.placing(tmp_path / "new") as aside:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside / "a.txt"))
  assert raised.value.filename == str(tmp_path / "new")
  assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["mine.txt"]


def test_a_write_replaces_by_one_rename_of_a_synced_file(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  path.write_text("old")
  calls = []
  sync, rename = os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), sync(fd)))
  monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(os.fspath(b)), rename(a, b)))
  files.write_text(path, "größer")
  # The content, then the name, then the folder that holds the name.
  assert calls == ["sync", str(path), "sync"]
  assert path.read_bytes() == "größer".encode() and os.listdir(tmp_path) == ["a.txt"]


def test_sha256_is_that_of_the_bytes(tmp_path):
  (tmp_path / "abc").write_bytes(b"abc")
  expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
  assert files.sha256(tmp_path / "abc") == expected


def test_a_manifest_keeps_facts_and_checks_names_sizes_and_sums(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in/a b.bin").write_bytes(bytes(range(256)))
  manifest.write(tmp_path, {"step": 3})
  assert manifest.check(tmp_path)["step"] == 3
  assert manifest.read_file(tmp_path, "in/a b.bin") == bytes(range(256))
  (tmp_path / "in/a b.bin").write_bytes(bytes(255) + b"x")
  manifest.check(tmp_path, sums=False)  # names and sizes are as they were
  with pytest.raises(manifest.Broken, match=r"in/a b\.bin is not what was written"):
    manifest.check(tmp_path)
  with pytest.raises(manifest.Broken, match=r"in/a b\.bin is not what was written"):
    manifest.read_file(tmp_path, "in/a b.bin")
  os.truncate(tmp_path / "in/a b.bin", 9)
  with pytest.raises(manifest.Broken, match="has 9 bytes instead of 256"):
    manifest.check(tmp_path, sums=False)


def test_a_manifest_opens_nothing_outside_its_folder(tmp_path):
  (tmp_path / "outside").write_text("secret")
  folder = tmp_path / "folder"
  folder.mkdir()
  entry = {"size": 6, "sha256": files.sha256(tmp_path / "outside")}
  sealed = manifest._sealed({"files": {"../outside": entry}})
  (folder / "manifest.json").write_bytes(sealed)
  with pytest.raises(manifest.Broken, match=r"\.\./outside is missing"):
    manifest.check(folder)


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
  (tmp_path / "file").write_text("mine")
  for place in ("file", "file/below"):
    with pytest.raises(UserError, match="is a file"):
      files.check_folder(tmp_path / place)
  files.check_folder(tmp_path / "new" / "below")
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
  assert (tmp_path / "file").read_text() == "mine"
