"""Files of PyTorch state dicts, read as data alone: no code in them runs, whatever they say."""

from __future__ import annotations

import os
import pathlib
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from medattn_jax.errors import UserError

SAFE = ".safetensors"
SUFFIXES = (SAFE, ".pth", ".pt", ".bin")
# Twice VGG-16 with two moments of an optimiser, the most that a training leaves of one of ours.
MAX_BYTES = 4 << 30
_DTYPES = {
  "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
  "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
# Where trainings keep the state dict in what they save, and what wrappers put before each name.
_NESTS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_SAVED = "accepted: what torch.save(model.state_dict(), …) writes, or a .safetensors file"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{tensor's name: array} of a .safetensors, .pth, .pt or .bin file.

  A state dict under "state_dict", "model_state_dict" or "model" is found; the prefix "module."
  of DataParallel, and such of other wrappers, is taken off where all names have it. bfloat16 of
  PyTorch's files comes as float32.

  Raises:
    UserError: no such file, not a regular one, empty, too large, damaged, holding more than
      tensors and plain values, or PyTorch is needed and not installed.
  """
  file = pathlib.Path(path)
  if file.suffix.lower() not in SUFFIXES:
    raise UserError(f"{path}: accepted: a file named {', '.join('*' + s for s in SUFFIXES)}")
  try:
    found = file.stat()
  except (OSError, ValueError) as error:
    why = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{path}: {why.lower()}; accepted: a file of weights") from None
  if not stat.S_ISREG(found.st_mode):
    what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
    raise UserError(f"{path}: is {what}; accepted: a file of weights")
  if not 0 < found.st_size <= MAX_BYTES:
    what = "is empty" if not found.st_size else f"has {found.st_size >> 30} GiB"
    raise UserError(f"{path}: {what}; accepted: weights, of {MAX_BYTES >> 30} GiB at most")
  tensors = of_safetensors(file) if file.suffix.lower() == SAFE else _of_torch(file)
  if not tensors:
    raise UserError(f"{path}: holds no tensors; {_SAVED}")
  for prefix in _PREFIXES * 2:
    if all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
  return tensors


def of_safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file, as views of one read. Raises UserError where it is damaged.

  The library holds the header against the file's length; what it leaves open is looked at here.
  """
  try:
    parts = safetensors.deserialize(file.read_bytes())
    return {name: _array(**part) for name, part in parts}
  except OSError as error:
    raise UserError(f"{file}: cannot be read: {error.strerror}") from None
  except MemoryError:
    raise
  except Exception as error:
    raise UserError(f"{file}: is no whole safetensors file: {_one_line(error)}; accepted: one that "
                    "is as it was written") from None


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
  if dtype not in _DTYPES:
    raise ValueError(f"a tensor of {dtype}, not of {', '.join(_DTYPES)}")
  return np.frombuffer(data, jnp.dtype(_DTYPES[dtype])).reshape(shape)


def _of_torch(file: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{file}: PyTorch reads such a file, and it is not installed; accepted: pip install "
      "'medattn_jax[torch]', or the same weights as a .safetensors file") from None
  _check_archive(file)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      found = torch.load(file, map_location="cpu", weights_only=True)
  except MemoryError:
    raise
  except Exception as error:
    alien = re.search(r"Unsupported (?:global|class|operand).{0,120}?([\w.]+\.[\w.]+)", str(error))
    why = f"it holds {alien.group(1)}" if alien else _one_line(error)
    raise UserError(f"{file}: cannot be read as tensors alone ({why}); nothing in it was run; "
                    f"{_SAVED}") from None
  for _ in range(2):
    if isinstance(found, Mapping) and not any(map(torch.is_tensor, found.values())):
      found = next((found[key] for key in _NESTS if key in found), found)
  if not isinstance(found, Mapping):
    raise UserError(f"{file}: holds {type(found).__name__}, no state dict; {_SAVED}")
  tensors = {str(name): value for name, value in found.items() if torch.is_tensor(value)}
  # A tensor may say that one number of the file is a million of its own.
  if sum(value.numel() * value.element_size() for value in tensors.values()) > MAX_BYTES:
    raise UserError(f"{file}: its tensors would take more than {MAX_BYTES >> 30} GiB; {_SAVED}")
  return {name: _of_tensor(file, name, value) for name, value in tensors.items()}


def _of_tensor(file: pathlib.Path, name: str, tensor: Any) -> np.ndarray:
  try:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  except (TypeError, RuntimeError) as error:
    raise UserError(f"{file}: {name} is no plain tensor: {_one_line(error)}; {_SAVED}") from None


def _check_archive(file: pathlib.Path) -> None:
  """Refuses an archive whose parts are larger than the file: PyTorch stores them as they are."""
  if not zipfile.is_zipfile(file):
    return  # the format before 1.6
  try:
    with zipfile.ZipFile(file) as archive:
      parts = archive.infolist()
  except (zipfile.BadZipFile, RuntimeError, ValueError, OSError) as error:
    raise UserError(f"{file}: damaged: {_one_line(error)}; {_SAVED}") from None
  stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
  if not stored or sum(part.file_size for part in parts) > file.stat().st_size:
    raise UserError(f"{file}: an archive that is not as PyTorch writes it; {_SAVED}")


def _one_line(error: BaseException) -> str:
  return " ".join(str(error).split())[:200] or type(error).__name__
