"""What is kept of compiled programs is found again, or compiled anew where it is damaged."""

import os

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jaxs

from medattn_jax import compilation_cache

KEYS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches")  # fmt: skip


@pytest.fixture
def compiled():
  """(folder, numbers) → the entries in the folder once a program of each number was compiled."""
  before = {key: getattr(jax.config, key) for key in KEYS}

  def compile_in(folder, *numbers):
    jaxs.reset_cache()
    compilation_cache.use(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for number in numbers:
      jax.jit(lambda x, number=number: x * 2 + number).lower(np.ones(3, np.float32)).compile()
    return {file.name: file.read_bytes() for file in folder.glob("*-cache")}

  yield compile_in
  for key, value in before.items():
    jax.config.update(key, value)
  jaxs.reset_cache()


def test_programs_are_found_again_where_the_workdir_was_moved(compiled, tmp_path):
  assert compiled(tmp_path / "begun", 1).keys() == compiled(tmp_path / "moved", 1).keys() != set()


def test_what_is_damaged_is_removed_and_written_anew(compiled, tmp_path, capsys, recwarn):
  whole = compiled(tmp_path, 1, 2, 3, 4)
  torn, flipped, empty, kept = sorted(tmp_path.glob("*-cache"))
  os.truncate(torn, len(whole[torn.name]) // 2)
  content = bytearray(whole[flipped.name])
  content[len(content) // 2] ^= 1
  flipped.write_bytes(content)
  empty.write_bytes(b"")
  written = kept.stat().st_mtime_ns

  compilation_cache.drop_damaged(tmp_path)
  assert capsys.readouterr().err == (
    f"medattn: warning: {torn} and 2 more: damaged; removed, and compiled anew\n")
  assert list(tmp_path.glob("*-cache")) == [kept]

  assert compiled(tmp_path, 1, 2, 3, 4).keys() == whole.keys()
  assert kept.stat().st_mtime_ns == written and not recwarn.list
  compilation_cache.drop_damaged(tmp_path)
  assert not capsys.readouterr().err


def test_what_cannot_be_read_is_said_and_left(tmp_path, capsys):
  (tmp_path / "jit_local-0-cache").mkdir()
  compilation_cache.drop_damaged(tmp_path)
  assert "jit_local-0-cache: Is a directory; it is compiled anew" in capsys.readouterr().err


def test_a_folder_that_is_not_there_yet_has_nothing_damaged(tmp_path, capsys):
  compilation_cache.drop_damaged(tmp_path / "new")
  assert not capsys.readouterr().err and not (tmp_path / "new").exists()


def test_where_a_file_is_in_its_place_nothing_is_kept(tmp_path, capsys):
  (tmp_path / compilation_cache.NAME).write_text("")
  before = jax.config.jax_compilation_cache_dir
  compilation_cache.use(tmp_path / compilation_cache.NAME)
  assert jax.config.jax_compilation_cache_dir == before
  assert "is no folder; compiled programs are not kept" in capsys.readouterr().err
