"""Checkpoints: complete or not there, never believed unverified, on any number of devices."""

from __future__ import annotations

import errno
import os
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from medattn_jax import checkpoint, manifest
from medattn_jax.checkpoint import Checkpoints, Damaged
from medattn_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def sharding(devices, spec=()):
  mesh = jax.make_mesh(
    (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
  )
  return NamedSharding(mesh, PartitionSpec(*spec))


def abstract(tree, placed):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), tree)


def small(seed=0):
  return {"w": np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)}


def saved(directory, *steps, **options):
  checkpoints = Checkpoints(directory, **options)
  for step in steps:
    checkpoints.save(step, small(step), {"step": step, "phase_index": 0})
  checkpoints.wait()
  return checkpoints


def files_of(path):
  return sorted(p for p in pathlib.Path(path).rglob("*") if p.is_file())


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8), (8, 8), (2, 4)])
def test_a_state_comes_back_bit_equal_on_any_number_of_devices(tmp_path, before, after):
  params = {"w": jnp.arange(16, dtype=jnp.float32).reshape(8, 2) / 7, "b": {"c": jnp.int32(5)}}
  tree = {
    "params": params,
    "half": jnp.asarray([1.5, -2.25], ml_dtypes.bfloat16),
    "batch_stats": {},
    "opt_state": optax.sgd(0.1, momentum=0.9).init(params),
    "ema": None,
  }
  tree = jax.device_put(tree, sharding(before))
  # One leaf is spread over the devices, not copied to each.
  tree["params"]["w"] = jax.device_put(tree["params"]["w"], sharding(before, ("data",)))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(7, tree, {"phase": "a", "thresholds": [0.5, 1.5]})
  checkpoints.wait()

  target = abstract(tree, sharding(after))
  target["params"]["w"] = jax.ShapeDtypeStruct(
    (8, 2), jnp.float32, sharding=sharding(after, ("data",))
  )
  restored, meta = checkpoints.restore(7, target)
  assert meta == {"phase": "a", "thresholds": [0.5, 1.5]}
  assert jax.tree.structure(restored) == jax.tree.structure(tree)
  for old, new, wanted in zip(*map(jax.tree.leaves, (tree, restored, target)), strict=True):
    assert new.sharding == wanted.sharding and new.dtype == old.dtype
    np.testing.assert_array_equal(np.asarray(old), np.asarray(new))

  loaded, _ = checkpoints.load(7)
  assert loaded["ema"] is None and loaded["batch_stats"] == {}
  np.testing.assert_array_equal(loaded["opt_state"]["0"]["trace"]["w"], np.zeros((8, 2)))
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded))


def test_a_state_may_be_donated_right_after_save_and_right_after_restore(tmp_path):
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3 + 1, tree), donate_argnums=0)
  start = {"w": np.arange(1 << 18, dtype=np.float32)}
  state = jax.device_put(start, sharding(8))
  checkpoints = Checkpoints(tmp_path)
  mine = {"w": start["w"].copy()}
  checkpoints.save(1, mine, {})
  mine["w"][:] = 0
  checkpoints.save(0, state, {})
  for _ in range(3):
    state = step(state)  # overwrites the buffers while they are written
  checkpoints.wait()
  np.testing.assert_array_equal(checkpoints.load(0)[0]["w"], start["w"])
  np.testing.assert_array_equal(checkpoints.load(1)[0]["w"], start["w"])
  again, _ = checkpoints.restore(0, abstract(state, sharding(8)))
  for _ in range(3):
    again = step(again)
  for shard in again["w"].addressable_shards:
    np.testing.assert_array_equal(shard.data, np.asarray(state["w"]))


def test_one_flipped_bit_in_any_file_is_noticed_by_load_and_restore(tmp_path):
  checkpoints = saved(tmp_path, 5)
  chance = random.Random(0)
  target = abstract(small(), sharding(1))
  names = files_of(tmp_path / "5")
  assert len(names) > 5 and {"meta.json", "manifest.json"} <= {p.name for p in names}
  for path in names:
    raw = path.read_bytes()
    if not raw:
      continue
    place = chance.randrange(len(raw))
    path.write_bytes(
      raw[:place] + bytes([raw[place] ^ (1 << chance.randrange(8))]) + raw[place + 1 :]
    )
    with pytest.raises(Damaged, match="5: damaged checkpoint"):
      checkpoints.load(5)
    with pytest.raises(Damaged):
      checkpoints.restore(5, target)
    path.write_bytes(raw)
  checkpoints.load(5)  # The damage was the only reason.


def reseal(folder, change):
  content = manifest.read(folder)
  change(content)
  (folder / manifest.NAME).write_bytes(manifest._sealed(content))


def link_out(step):
  outside = step.parent / "outside"
  shutil.move(step / "meta.json", outside)
  (step / "meta.json").symlink_to(outside)


def link_folder_out(step):
  outside = step.parent / "outside"
  shutil.move(step / "tree", outside)
  (step / "tree").symlink_to(outside)


def name_outside(step):
  (step.parent / "outside").write_text("x")
  entry = {"size": 1, "sha256": "0"}
  reseal(step, lambda content: content["files"].update({"../outside": entry}))


def stand_in(step):
  shutil.rmtree(step)
  step.write_text("a file")


DAMAGE = {
  "a file is gone": lambda step: (step / "tree/_METADATA").unlink(),
  "a file is too many": lambda step: (step / "tree/more").write_text("x"),
  "a file is truncated": lambda step: os.truncate(max(files_of(step), key=os.path.getsize), 9),
  "a file is empty": lambda step: os.truncate(step / "meta.json", 0),
  "the arrays are gone": lambda step: shutil.rmtree(step / "tree"),
  "the manifest is gone": lambda step: (step / "manifest.json").unlink(),
  "the manifest is empty": lambda step: (step / "manifest.json").write_text(""),
  "the manifest is a list": lambda step: (step / "manifest.json").write_text("[]"),
  "the manifest is deep": lambda step: (step / "manifest.json").write_text("[" * 100_000),
  "the manifest got a blank": lambda step: (step / "manifest.json").open("a").write(" "),
  "the manifest vouches for nothing": lambda step: reseal(step, lambda c: c["files"].clear()),
  "the manifest names no sums": lambda step: reseal(step, lambda c: c["files"].update(a={})),
  "the manifest has a strange rank": lambda step: reseal(step, lambda c: c.update(rank="best")),
  "the manifest points outside": name_outside,
  "a file is a link": link_out,
  "a folder is a link": link_folder_out,
  "a file is a pipe": lambda step: os.mkfifo(step / "tree/pipe"),
  "another step bears its name": lambda step: (
    shutil.rmtree(step),
    shutil.copytree(step.with_name("10"), step),
  ),
  "it is a file": stand_in,
  "meta is no JSON": lambda step: (
    (step / "meta.json").write_text("{"),
    os.unlink(step / "manifest.json"),
    manifest.write(step, {"step": 20, "rank": None}),
  ),
}


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed_said_and_the_step_before_is_taken(tmp_path, capsys, damage):
  checkpoints = saved(tmp_path, 10, 20)
  damage(tmp_path / "20")
  with pytest.raises(Damaged):
    checkpoints.load(20)
  tree, _ = Checkpoints(tmp_path).newest_intact(checkpoints.load)
  np.testing.assert_array_equal(tree["w"], small(10)["w"])
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "warning" in said and f"{tmp_path}/20: damaged" in said


def test_all_damaged_is_the_users_error_and_nothing_there_is_none(tmp_path, capsys):
  assert Checkpoints(tmp_path / "none").newest_intact(pytest.fail) is None
  (tmp_path / "9").mkdir()
  (tmp_path / "notes").mkdir()
  (tmp_path / "007").mkdir()
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.newest_intact(pytest.fail) is None and not checkpoints.any()
  assert "9: an empty directory" in capsys.readouterr().err
  saved(tmp_path, 3, 9)
  for step in "39":
    (tmp_path / step / "meta.json").write_text("")
  with pytest.raises(UserError, match=r"every checkpoint is damaged \(9: meta.json.*; 3: meta.js"):
    checkpoints.newest_intact(checkpoints.load)
  assert checkpoints.any() and checkpoints.newest_meta() is None


def test_the_arrays_may_not_promise_more_than_the_memory_holds(tmp_path, monkeypatch):
  checkpoints = saved(tmp_path, 1)
  monkeypatch.setattr(os, "sysconf", lambda name: 8)
  with pytest.raises(Damaged, match="promises"):
    checkpoints.load(1)


def test_meta_is_read_and_verified_without_the_arrays(tmp_path):
  checkpoints = saved(tmp_path, 1, 2)
  shutil.rmtree(tmp_path / "2/tree")
  assert checkpoints.meta(2) == checkpoints.newest_meta() == {"step": 2, "phase_index": 0}
  (tmp_path / "2/meta.json").write_text('{"step": 2, "phase_index": 1}')
  with pytest.raises(Damaged):
    checkpoints.meta(2)
  assert checkpoints.newest_meta()["step"] == 1


def test_another_model_is_the_users_error_not_damage(tmp_path):
  checkpoints = saved(tmp_path, 1)
  for wrong in ({"w": np.zeros((8, 4), np.float32)}, {"v": np.zeros((8, 3), np.float32)}):
    with pytest.raises(UserError, match=r"1: holds .* at [vw] where") as caught:
      checkpoints.restore(1, abstract(wrong, sharding(1)))
    assert not isinstance(caught.value, Damaged)


def test_the_newest_and_the_best_stay(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  scores = {1: (0, 0.9), 2: (1, 0.3), 3: (1, 0.5), 4: (1, 0.5), 5: (1, float("nan")), 6: (1, 0.1)}
  lists = []
  for step, (phase, score) in scores.items():
    checkpoints.save(step, small(), {"phase_index": phase}, score=score)
    checkpoints.wait()
    lists.append(checkpoints.steps())
  # A later phase counts more than a score, of equals the later; the best stays beside the two.
  assert lists == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5, 6]]
  assert [checkpoints.resolve(s) for s in ("best", "last", "latest", 5, "5")] == [4, 6, 6, 5, 5]
  assert sorted(os.listdir(tmp_path)) == ["4", "5", "6"]


def test_a_known_damaged_step_does_not_count_as_kept(tmp_path):
  checkpoints = saved(tmp_path, 10, 20)
  path = tmp_path / "20/tree/_METADATA"
  path.write_bytes(path.read_bytes()[:-1] + b"?")  # its size is right: only the sums tell
  checkpoints.newest_intact(checkpoints.load)
  checkpoints.save(15, small(), {})
  checkpoints.wait()
  assert checkpoints.steps() == [10, 15, 20]


def test_steps_that_are_not_there_are_the_users_error(tmp_path):
  with pytest.raises(UserError, match="no checkpoint there"):
    Checkpoints(tmp_path / "none").resolve("best")
  checkpoints = saved(tmp_path, 4, 8)
  assert checkpoints.resolve("best") == 8  # None has a score.
  with pytest.raises(UserError, match=r"no checkpoint of step 5; there are \[4, 8\]"):
    checkpoints.resolve(5)
  with pytest.raises(UserError, match=r"step='newest': accepted are"):
    checkpoints.resolve("newest")
  checkpoints.drop(8)
  checkpoints.drop(8)
  assert checkpoints.steps() == [4] and os.listdir(tmp_path) == ["4"]


def test_an_empty_directory_is_no_step_and_is_said(tmp_path, capsys):
  checkpoints = saved(tmp_path, 4)
  (tmp_path / "9").mkdir()
  assert checkpoints.resolve("last") == checkpoints.resolve("best") == 4
  assert "9: an empty directory, no checkpoint; passed over" in capsys.readouterr().err


def test_a_step_that_lost_its_manifest_is_passed_over_aloud(tmp_path, capsys):
  checkpoints = saved(tmp_path, 4, 8)
  (tmp_path / "8/manifest.json").unlink()
  assert checkpoints.resolve("last") == checkpoints.resolve("best") == 4
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 2 and all(
    "8: damaged checkpoint: manifest.json is missing" in s for s in said
  )


def test_a_step_saved_twice_is_left_alone_mended_or_replaced(tmp_path, capsys):
  checkpoints = saved(tmp_path, 1)
  checkpoints.save(1, small(99), {"new": True})
  checkpoints.wait()
  assert checkpoints.load(1)[1] == {"step": 1, "phase_index": 0}
  checkpoints.save(1, small(99), {"new": True}, replace=True)
  checkpoints.wait()
  assert checkpoints.load(1)[1] == {"new": True} and os.listdir(tmp_path) == ["1"]
  (tmp_path / "1/meta.json").write_text("{}")
  checkpoints.save(1, small(5), {"mended": True})
  checkpoints.wait()
  np.testing.assert_array_equal(checkpoints.load(1)[0]["w"], small(5)["w"])
  # What was there may be another's work: it is moved, not deleted.
  assert (tmp_path / "1.damaged/meta.json").read_text() == "{}"
  assert "moved to 1.damaged" in capsys.readouterr().err


def test_what_a_killed_save_left_is_swept_by_the_next_save_only(tmp_path):
  left = tmp_path / ".saving-2"
  (left / "tree").mkdir(parents=True)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [] and checkpoints.newest_intact(pytest.fail) is None
  assert left.exists()
  saved(tmp_path, 3)
  assert os.listdir(tmp_path) == ["3"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("where", ["python", "tensorstore"])
def test_a_disk_that_refuses_is_one_line_and_harms_no_step(tmp_path, monkeypatch, number, where):
  checkpoints = saved(tmp_path, 1)

  def refuse(*_):
    if where == "python":
      raise OSError(number, os.strerror(number))
    raise ValueError(f"INTERNAL: Error writing:\nFailed: {os.strerror(number)} [os_error_code=1]")

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "_orbax_save", refuse)
    checkpoints.save(2, small(), {})
    with pytest.raises(
      UserError, match=f"checkpoint 2 was not saved: {os.strerror(number).lower()}"
    ):
      checkpoints.wait()
  assert os.listdir(tmp_path) == ["1"]
  checkpoints.verify(1)
  checkpoints.save(2, small(), {})  # With room again it goes on.
  checkpoints.wait()
  assert checkpoints.steps() == [1, 2]


def test_an_error_of_the_background_is_raised_by_the_next_save(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  monkeypatch.setattr(checkpoint, "_orbax_save", lambda *_: 1 / 0)
  checkpoints.save(1, small(), {})
  with pytest.raises(ZeroDivisionError):
    checkpoints.save(2, small(), {})
  checkpoints.wait()


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
  checkpoints = Checkpoints(tmp_path / "new")
  for tree, meta in [
    ({"key": jax.random.key(0)}, {}),
    ({"empty": np.zeros((0, 3))}, {}),
    ({"a/b": np.zeros(2)}, {}),
    ({"name": np.asarray(["text", None])}, {}),
    (small(), {"loss": float("nan")}),
  ]:
    with pytest.raises((TypeError, ValueError)):
      checkpoints.save(1, tree, meta)
  assert not (tmp_path / "new").exists()
