"""The compiled programs of a run, kept in its workdir: a second start does not compile them."""

from __future__ import annotations

import pathlib
import zlib

import jax

from medattn_jax import console, files

NAME = "compilation_cache"  # the folder's, in a workdir
_PIECE = 2**20  # what is unpacked is not kept
_ZSTD = b"\x28\xb5\x2f\xfd"  # begins what JAX wrote where it found zstandard; all else is zlib's


def use(folder: pathlib.Path) -> None:
  """Programs that take half a second to compile are kept there from now on, and found.

  But for a CPU's train step that calls oneDNN (see `onednn`).
  """
  if folder.exists() and not folder.is_dir():
    console.warn(f"{folder}: is no folder; compiled programs are not kept")
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))
  if jax.default_backend() != "gpu":
    # XLA's cache of kernels, which GPUs alone have: with it each key would hold the folder's name,
    # and a workdir that was moved would be compiled anew.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def drop_damaged(folder: pathlib.Path) -> None:
  """Removes the programs that cannot be read, and says so.

  One was torn if its process was killed as it was written. JAX would compile it anew at each start
  and never write over it.
  """
  damaged = []
  for entry in sorted(folder.glob("*-cache")):  # JAX's ending
    try:
      if not _whole(files.read_bytes(entry)):
        entry.unlink()
        damaged.append(entry)
    except OSError as error:
      console.warn(f"{entry}: {error.strerror}; it is compiled anew")
  if damaged:
    more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
    console.warn(f"{damaged[0]}{more}: damaged; removed, and compiled anew")


def _whole(content: bytes) -> bool:
  if content.startswith(_ZSTD):
    return True  # no reader of it need be here
  reader = zlib.decompressobj()
  try:
    for begin in range(0, len(content), _PIECE):
      reader.decompress(content[begin : begin + _PIECE])
  except zlib.error:  # also where the sum at its end is another's
    return False
  return reader.eof
