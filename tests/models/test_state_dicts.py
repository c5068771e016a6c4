"""Files of state dicts: what users have is read, and nothing in a file is believed or run."""

import collections
import json
import os
import pathlib
import struct
import sys
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from medattn_jax.errors import UserError
from medattn_jax.models import state_dicts

TENSORS = {"conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
           "conv.bias": np.array([1, -2], np.float16), "bn.num_batches_tracked": np.array(7)}


def stored(path, tensors=TENSORS):
  path.write_bytes(safetensors.numpy.save(tensors))
  return path


def parts(raw):
  """(header, data) of a safetensors file."""
  length = struct.unpack("<Q", raw[:8])[0]
  return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, data, length=None):
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def same(found, expected=TENSORS):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)


def test_safetensors_are_read_whatever_their_floats(tmp_path):
  same(state_dicts.read(stored(tmp_path / "A.SAFETENSORS")))
  header, data = parts(safetensors.numpy.save({"x": np.array([16256, -16320], np.int16)}))
  header["x"]["dtype"] = "BF16"
  (tmp_path / "half.safetensors").write_bytes(joined(header, data))
  found = state_dicts.read(tmp_path / "half.safetensors")["x"]
  assert found.dtype == jnp.bfloat16 and found.astype(float).tolist() == [1.0, -3.0]


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod.module."])
def test_wrappers_prefixes_are_taken_off_where_all_names_have_them(prefix, tmp_path):
  path = tmp_path / "wrapped.safetensors"
  same(state_dicts.read(stored(path, {prefix + name: x for name, x in TENSORS.items()})))
  mixed = {f"module.{name}": x for name, x in TENSORS.items()} | {"extra": np.zeros(1)}
  assert state_dicts.read(stored(path, mixed)).keys() == mixed.keys()


LIES = {
  "a header beyond the file": lambda h, d: joined(h, d, 2**40),
  "a header of no length": lambda h, d: joined(h, d, 0),
  "a length that overflows": lambda h, d: joined(h, d, 2**64 - 1),
  "a shape larger than its data": lambda h, d: joined(h | {"x": {**h["x"], "shape": [10**12]}}, d),
  "a shape that overflows": lambda h, d: joined(h | {"x": {**h["x"], "shape": [2**62, 8]}}, d),
  "a shape below zero": lambda h, d: joined(h | {"x": {**h["x"], "shape": [-6]}}, d),
  "data beyond the file": lambda h, d: joined({"x": {**h["x"], "data_offsets": [0, 999]}}, d),
  "data that lies elsewhere": lambda h, d: joined({"x": {**h["x"], "data_offsets": [8, 32]}}, d),
  "an unknown dtype": lambda h, d: joined(h | {"x": {**h["x"], "dtype": "Q7"}}, d),
  "a dtype of no use here": lambda h, d: joined(h | {"x": {**h["x"], "dtype": "F8_E4M3",
                                                           "shape": [24]}}, d),
  "no JSON": lambda h, d: struct.pack("<Q", 5) + b"{not}" + d,
  "HTML": lambda h, d: b"<!DOCTYPE html><html>404</html>",
  "a torn copy": lambda h, d: joined(h, d)[:-3],
  "one byte": lambda h, d: b"\0",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_one_line(lie, tmp_path):
  path = tmp_path / "lie.safetensors"
  path.write_bytes(lie(*parts(safetensors.numpy.save({"x": np.ones(6, np.float32)}))))
  with pytest.raises(UserError, match="is no whole safetensors file") as caught:
    state_dicts.read(path)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_of_weights_is_named(tmp_path):
  def refused(path, words):
    with pytest.raises(UserError, match=words) as caught:
      state_dicts.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)

  refused(tmp_path / "none.safetensors", "no such file")
  (tmp_path / "folder.pth").mkdir()
  refused(tmp_path / "folder.pth", "is a folder")
  (tmp_path / "empty.pt").touch()
  refused(tmp_path / "empty.pt", "is empty")
  refused(stored(tmp_path / "weights.npz"), r"accepted: a file named \*\.safetensors, \*\.pth")
  os.mkfifo(tmp_path / "pipe.bin")
  refused(tmp_path / "pipe.bin", "no regular file")
  with open(tmp_path / "vast.safetensors", "wb") as vast:
    vast.truncate(6 << 30)  # a hole: no disk is taken
  refused(tmp_path / "vast.safetensors", "has 6 GiB; accepted: weights, of 4 GiB")
  refused(stored(tmp_path / "none_in_it.safetensors", {}), "holds no tensors")


def test_without_pytorch_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "weights.pth").write_bytes(b"whatever")
  with pytest.raises(UserError, match=r"pip install 'medattn_jax\[torch\]', or .*\.safetensors"):
    state_dicts.read(tmp_path / "weights.pth")


class Coded:
  """Makes a file where it is unpickled by plain pickle."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


@pytest.fixture(scope="module")
def torch():
  """PyTorch, where it is installed."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return pytest.importorskip("torch", reason="PyTorch is not installed (the torch extra)")


@pytest.fixture
def saved(torch, tmp_path):
  """(something to save, …) → the path of a file that torch.save wrote."""
  def save(thing, name="weights.pth", **options):
    torch.save(thing, tmp_path / name, **options)
    return tmp_path / name
  return save


def test_pytorchs_files(torch, saved):
  tensors = collections.OrderedDict(
    (name, torch.as_tensor(value.copy())) for name, value in TENSORS.items())
  wrapped = {f"module.{name}": value for name, value in tensors.items()}
  same(state_dicts.read(saved(tensors)))
  same(state_dicts.read(saved(tensors, "old.bin", _use_new_zipfile_serialization=False)))
  same(state_dicts.read(saved({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}})))
  same(state_dicts.read(saved({"model": tensors, "best": 0.5}, "a.PT")))
  same(state_dicts.read(saved({"state_dict": {"model_state_dict": wrapped}})))
  found = state_dicts.read(saved({"x": torch.tensor([1.0, -3.0], dtype=torch.bfloat16)}))
  assert found["x"].dtype == np.float32 and found["x"].tolist() == [1, -3]
  parameter = torch.nn.Parameter(torch.ones(2))
  assert state_dicts.read(saved({"x": parameter}))["x"].tolist() == [1, 1]


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_file_is_not_run(new, torch, saved, tmp_path):
  ran = tmp_path / "ran"
  thing = {"x": torch.ones(2), "epoch": Coded(ran)}
  path = saved(thing, _use_new_zipfile_serialization=new)
  with pytest.raises(UserError, match=r"as tensors alone .* nothing in it was run") as caught:
    state_dicts.read(path)
  assert "\n" not in str(caught.value) and not ran.exists()
  torch.load(path, weights_only=False)  # the file is what it is taken for
  assert ran.exists()


def test_pytorchs_files_that_are_none(torch, saved, tmp_path):
  def refused(path, words):
    with pytest.raises(UserError, match=words) as caught:
      state_dicts.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)

  whole = saved({"x": torch.arange(5000.0)})
  raw = whole.read_bytes()
  (tmp_path / "torn.pth").write_bytes(raw[: len(raw) // 2])
  refused(tmp_path / "torn.pth", "cannot be read as tensors alone")
  refused(saved([torch.ones(2)]), "holds list, no state dict")
  refused(saved({"epoch": 3}), "holds no tensors")
  refused(saved({"x": torch.ones(1).expand(1 << 31)}), "would take more than 4 GiB")
  refused(saved({"x": torch.eye(3).to_sparse()}), "x is no plain tensor")
  with zipfile.ZipFile(whole) as old, zipfile.ZipFile(
      tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new:
    for name in old.namelist():
      new.writestr(name, old.read(name))
  refused(tmp_path / "packed.pth", "not as PyTorch writes it")
