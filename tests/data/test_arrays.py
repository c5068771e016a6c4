"""`prepare --source=npz`: every pixel as it was, every mistake named."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from medattn_jax.data import pipeline
from medattn_jax.data import prepare as module
from medattn_jax.data.datasets import prepared
from medattn_jax.errors import UserError

SIDE = 20
COUNTS = {"train": 9, "val": 3, "test": 4}
SPLITS = {"train": "train", "val": "validation", "test": "test"}


def arrays_of(*tail: int, classes: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
  """The six arrays of MedMNIST's layout; images [N, SIDE, SIDE, *tail]."""
  chance = np.random.default_rng(seed)
  arrays = {}
  for key, count in COUNTS.items():
    arrays[f"{key}_images"] = chance.integers(0, 256, (count, SIDE, SIDE, *tail), np.uint8)
    arrays[f"{key}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
  return arrays


@pytest.mark.parametrize("tail", [(), (1,), (3,)])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_become_a_set_pixel_by_pixel(folder, data, tail, save, capsys, read, rejected_of):
  arrays = arrays_of(*tail)
  save(folder / "thing.npz", **arrays)
  summary = module.prepare("npz", folder, data)
  dataset = pipeline.open_dataset("npz", data, full_size=SIDE)
  assert dataset.channels == (3 if tail == (3,) else 1) and dataset.encoding == "png"
  assert dataset.num_classes == 3 and dataset.full_size == SIDE
  for key, split in SPLITS.items():
    images, levels, names = read(data, "npz", split)
    np.testing.assert_array_equal(images.squeeze(), arrays[f"{key}_images"].squeeze())
    np.testing.assert_array_equal(levels, arrays[f"{key}_labels"][:, 0])
    assert names == [f"{key}_{number:05}" for number in range(COUNTS[key])]
    assert summary.patients[split] == COUNTS[key]
  assert summary.levels == {"train": [3, 3, 3], "validation": [1, 1, 1], "test": [2, 1, 1]}
  assert "test                4        4        2        1        1" in capsys.readouterr().out
  assert rejected_of(data) == {} and sorted(os.listdir(data)) == [
    ".npz.lock", "npz", "rejected.csv"]


@pytest.mark.parametrize("labels", [
  lambda x: x[:, 0], lambda x: x.astype(np.int64), lambda x: x.astype(">i4"),
])  # fmt: skip
def test_labels_may_be_flat_or_of_any_whole_kind(folder, data, labels, read):
  arrays = arrays_of()
  changed = {k: labels(x) if k.endswith("labels") else x for k, x in arrays.items()}
  np.savez(folder / "a.npz", **changed)
  module.prepare("npz", folder / "a.npz", data)  # the file itself may be named
  np.testing.assert_array_equal(read(data, "npz", "train")[1], arrays["train_labels"][:, 0])


def test_many_classes_are_counted_in_rows(folder, data, capsys):
  arrays = arrays_of()
  arrays["train_labels"] = np.array([[0], [35], [10], [35], [7], [0], [1], [2], [3]])
  np.savez(folder / "a.npz", **arrays)
  summary = module.prepare("npz", folder, data)
  assert summary.levels["train"][35] == 2 and summary.levels["train"][10] == 1
  dataset = pipeline.open_dataset("npz", data, full_size=SIDE)
  assert dataset.num_classes == 36
  assert dataset.photo_levels("train").tolist() == arrays["train_labels"][:, 0].tolist()
  out = capsys.readouterr()
  assert f"level 35    {2:>12}{0:>12}{0:>12}" in out.out
  assert "no photograph has label 4, 5, 6, 8, 9, 11" in out.err


def test_validation_may_be_missing_and_one_class_is_enough(folder, data, capsys):
  arrays = {k: x for k, x in arrays_of(classes=1).items() if not k.startswith("val")}
  np.savez(folder / "a.npz", **arrays)
  summary = module.prepare("npz", folder, data)
  assert summary.levels == {"train": [9], "test": [4]}
  assert "no validation split" in capsys.readouterr().err


def test_pixels_are_resized_only_when_asked_for(folder, data, capsys, read):
  arrays = arrays_of()
  arrays["train_images"][0] = 200
  np.savez(folder / "a.npz", **arrays)
  module.prepare("npz", folder, data, full_size=40)
  assert "photographs of 20 pixels are resized to 40" in capsys.readouterr().err
  images, _, _ = read(data, "npz", "train", size=40)
  assert images.shape == (9, 40, 40, 1) and (images[0] == 200).all()
  coarse = images[..., 0].reshape(9, SIDE, 2, SIDE, 2).mean((2, 4))
  assert np.abs(coarse - arrays["train_images"]).mean() < 25  # of noise, whose edges are cut
  with pytest.raises(UserError, match="--full-size=8: 16 to 8000"):
    module.prepare("npz", folder, data, full_size=8)


def test_photographs_keep_their_own_size_by_default(camera, data):
  camera.both(["a.jpg"])
  module.prepare("csv", camera.folder, data, workers=1)
  assert pipeline.open_dataset("csv", data, full_size=1230).full_size == 1230


def test_a_second_run_does_nothing_and_a_changed_file_is_prepared_anew(
  folder, data, capsys, read, rejected_of
):
  path = folder / "a.npz"
  np.savez(path, **arrays_of())
  module.prepare("npz", folder, data)
  index = data / "npz/1.0.0/index.json"
  written = index.stat().st_mtime_ns
  (data / "rejected.csv").unlink()
  shutil.move(path, folder / "b.npz")  # by what is in it, not where it lies
  module.prepare("npz", folder, data)
  assert "nothing to do" in capsys.readouterr().err and index.stat().st_mtime_ns == written
  assert rejected_of(data) == {}
  changed = arrays_of(seed=1)
  np.savez(folder / "b.npz", **changed)
  module.prepare("npz", folder, data)
  assert "made anew" in capsys.readouterr().err
  np.testing.assert_array_equal(read(data, "npz", "test")[0][..., 0], changed["test_images"])
  next((data / "npz/1.0.0").glob("*array_record*")).unlink()
  module.prepare("npz", folder, data)
  assert "is missing" in capsys.readouterr().err
  np.testing.assert_array_equal(read(data, "npz", "test")[0][..., 0], changed["test_images"])


def test_repeated_and_blank_photographs_are_kept_and_said(folder, data, capsys, read):
  arrays = arrays_of()
  arrays["train_images"][4] = arrays["train_images"][2]
  arrays["test_images"][1] = arrays["train_images"][2]
  arrays["test_images"][3] = 7
  np.savez(folder / "a.npz", **arrays)
  module.prepare("npz", folder, data)
  said = capsys.readouterr().err
  assert "2 photographs repeat another one pixel by pixel, 1 of them one of another split" in said
  assert "train_00002 and train_00004" in said
  assert "1 photographs have one shade throughout" in said and "test_00003" in said
  np.testing.assert_array_equal(read(data, "npz", "test")[0][..., 0], arrays["test_images"])


def changed(key: str, value) -> dict:
  """The six arrays with one replaced, or (None) without it."""
  arrays = arrays_of()
  arrays[key] = value(arrays[key]) if callable(value) else value
  return {name: array for name, array in arrays.items() if array is not None}


class Deadly:
  """Runs code where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key, value, named", [
  ("train_images", None, "no array train_images, only test_images"),
  ("test_labels", None, "no array test_labels"),
  ("val_images", None, "no array val_images.*without val"),
  ("train_images", lambda x: x / 255, r"train_images is float64 \[9, 20, 20\]; accepted: uint8"),
  ("val_images", lambda x: x.astype(np.float32) * np.nan, "val_images is float32"),
  ("test_images", lambda x: x.astype(np.uint16), "test_images is uint16"),
  ("train_images", lambda x: x[..., None].repeat(SIDE, -1), "train_images .* not a photograph ea"),
  ("train_images", lambda x: x[..., None].repeat(4, -1), "train_images .*or a volume|train_images"),
  ("train_images", lambda x: x[..., None, None], "train_images .* volume"),
  ("train_images", lambda x: x[:, :, :18], r"train_images is uint8 \[9, 20, 18\]: not square"),
  ("train_images", lambda x: x[0], r"train_images is uint8 \[20, 20\]: not square"),
  ("train_images", lambda x: x[:, :8, :8], "16 to 8000 pixels"),
  ("test_images", lambda x: x[:, :18, :18], "test_images .*and train_images .* one size"),
  ("test_images", lambda x: x[..., None].repeat(3, -1), "test_images .* number of channels"),
  ("train_images", lambda x: x[:0], "train_images .*1 to"),
  ("train_images", lambda x: x[:5], "train_images has 5 images and train_labels 9 labels"),
  ("train_images", np.asfortranarray, "train_images is in Fortran's order"),
  ("train_labels", lambda x: x.repeat(14, 1), r"train_labels is uint8 \[9, 14\]: several labels"),
  ("val_labels", lambda x: x.astype(float), r"val_labels is float64 \[3, 1\]; accepted: whole"),
  ("val_labels", lambda x: x > 0, "val_labels is bool"),
  ("val_labels", lambda x: x.astype(str), "val_labels is <U"),
  ("test_labels", np.array([[0], [1], [36], [0]]), r"test_labels\[2\] is 36; .* 0 to 35"),
  ("test_labels", np.array([[0], [-1], [3], [0]]), r"test_labels\[1\] is -1"),
])  # fmt: skip
def test_arrays_that_cannot_be_used_are_named(folder, data, key, value, named):
  np.savez(folder / "a.npz", **changed(key, value))
  with pytest.raises(UserError, match=named) as error:
    module.prepare("npz", folder, data)
  assert str(folder / "a.npz") in str(error.value) and "accepted: " in str(error.value)
  assert "\n" not in str(error.value) and not data.exists()


def test_no_pickle_is_opened(folder, data, tmp_path):
  for key in ("train_images", "test_labels"):
    np.savez(folder / "a.npz", **changed(key, np.array([Deadly(tmp_path / "ran")] * 4, object)))
    with pytest.raises(UserError, match=f"{key} holds Python objects"):
      module.prepare("npz", folder, data)
  assert not (tmp_path / "ran").exists() and not data.exists()


def rewritten(path: pathlib.Path, name: str, change) -> None:
  """The archive `path` with one member's bytes changed, its checksums right."""
  with zipfile.ZipFile(path) as archive:
    members = {one: archive.read(one) for one in archive.namelist()}
  members[name] = change(members[name])
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for one, content in members.items():
      archive.writestr(one, content)


@pytest.mark.parametrize("change, named", [
  (lambda c: c.replace(b"(9, 20, 20)", b"(9, 8000, 8000)"), "declares 576000000 bytes"),
  (lambda c: c.replace(b"(9, 20, 20)", b"(8, 20, 20)"), "declares 3200 bytes .* and has 3600"),
  (lambda c: c[:6] + b"\x02" + c[7:], "header of another version"),
  (lambda c: c[:40], "no .npz file, or damaged"),
  (lambda c: b"", "no .npz file, or damaged"),
  (lambda c: c.replace(b"'|u1'", b"1 + 1"), "no .npz file, or damaged"),
])  # fmt: skip
def test_headers_are_not_believed(folder, data, change, named):
  np.savez(folder / "a.npz", **arrays_of())
  rewritten(folder / "a.npz", "train_images.npy", change)
  with pytest.raises(UserError, match=named):
    module.prepare("npz", folder, data)
  assert not data.exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_noticed_and_leaves_no_set(folder, data, save, read, no_set):
  path = folder / "a.npz"
  save(path, **arrays_of())
  sound = path.read_bytes()
  for place in np.linspace(100, len(sound) - 30, 12).astype(int):
    path.write_bytes(sound[:place] + bytes([sound[place] ^ 8]) + sound[place + 1 :])
    try:
      module.prepare("npz", folder, data)
    except UserError as error:
      assert str(path) in str(error)
      assert not data.exists() or no_set(data, "npz")
    else:  # of a time or an attribute, of which nothing is read
      for key, split in SPLITS.items():
        np.testing.assert_array_equal(
          read(data, "npz", split)[0][..., 0], arrays_of()[f"{key}_images"])
      shutil.rmtree(data)
  for cut in (0, 50, len(sound) // 2, len(sound) - 5):
    path.write_bytes(sound[:cut])
    with pytest.raises(UserError, match=r"a\.npz is no \.npz file, or damaged"):
      module.prepare("npz", folder, data)


def test_a_file_that_changes_meanwhile_is_noticed(folder, data, monkeypatch, no_set):
  path = folder / "a.npz"
  np.savez(path, **arrays_of())
  install = prepared.install

  def later(*arguments):
    np.savez(path, **arrays_of(seed=1))
    return install(*arguments)

  monkeypatch.setattr(prepared, "install", later)
  with pytest.raises(UserError, match="was changed while it was read"):
    module.prepare("npz", folder, data)
  assert no_set(data, "npz")


def test_where_no_one_file_is_to_be_had_is_named(folder, data, tmp_path):
  def fails(place, named, source="npz"):
    with pytest.raises(UserError, match=named) as error:
      module.prepare(source, place, data)
    assert "accepted: " in str(error.value) and not data.exists()

  fails(folder, "has no such file")
  fails(folder, "has no such file.*a fer2013.csv", "fer2013")
  np.savez(folder / "b.npz", **arrays_of())
  np.savez(folder / "a.NPZ.npz", **arrays_of())
  fails(folder, r"has 2 such files, a\.NPZ\.npz, b\.npz")
  os.remove(folder / "a.NPZ.npz")
  os.rename(folder / "b.npz", tmp_path / "outside.npz")
  os.symlink(tmp_path / "outside.npz", folder / "b.npz")
  fails(folder, "is a link to outside")
  os.remove(folder / "b.npz")
  os.mkfifo(folder / "b.npz")
  fails(folder, "b.npz is a pipe")
  fails(folder / "b.npz", "b.npz is a pipe")
  (folder / "text.npz").write_text("no archive")
  fails(folder / "text.npz", "no .npz file, or damaged")
  with pytest.raises(UserError, match=r"--input=.*none is neither a folder nor a file"):
    module.prepare("npz", folder / "none", data)
  with pytest.raises(UserError, match=r"text\.npz is no folder"):
    module.prepare("csv", folder / "text.npz", data)


def test_two_runs_at_once_are_one_too_many_and_what_a_killed_one_left_goes(folder, data, read):
  np.savez(folder / "a.npz", **arrays_of())
  left = data / ".building-npz" / "npz" / "incomplete.AB_1.0.0"
  left.mkdir(parents=True)
  (left / "npz-train.array_record-00000-of-00001").write_bytes(b"half")
  with prepared.exclusive(data / ".npz.lock", wait=False), pytest.raises(
    UserError, match="another prepare"
  ):
    module.prepare("npz", folder, data)
  module.prepare("npz", folder, data)
  assert len(read(data, "npz", "train")[0]) == 9 and not left.exists()


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_of_a_set(folder, data):
  arrays = arrays_of()
  arrays["train_images"] = np.random.default_rng(0).integers(0, 256, (20000, 20, 20), np.uint8)
  arrays["train_labels"] = np.zeros((20000, 1), np.uint8)
  np.savez(folder / "a.npz", **arrays)
  command = [sys.executable, "-m", "medattn_jax", "prepare", "--source=npz", f"--input={folder}",
             f"--data-dir={data}"]
  run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not list(data.glob(".building-npz/npz/*/*array_record*")):
    assert run.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  run.send_signal(signal.SIGKILL)
  run.wait()
  assert not (data / "npz").exists() and not (data / "rejected.csv").exists()
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
  assert "train           20000" in done.stdout and not list(data.glob(".building*"))


@pytest.mark.slow
def test_real_radiographs(shared, data, read):
  source = shared / "realdata" / "pneumoniamnist"
  summary = module.prepare("npz", source, data)
  assert summary.levels == {"train": [388, 3494], "validation": [135, 389], "test": [234, 390]}
  with np.load(source / "pneumoniamnist.npz", allow_pickle=False) as raw:
    for key, split in SPLITS.items():
      images, levels, _ = read(data, "npz", split)
      np.testing.assert_array_equal(images[..., 0], raw[f"{key}_images"])
      np.testing.assert_array_equal(levels, raw[f"{key}_labels"][:, 0])
