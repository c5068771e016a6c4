"""Drawn photographs: deterministic, graded by their lesions, the same at every size."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import schema, synthetic, synthetic_eye, synthetic_lesions
from medattn_jax.data.synthetic_lesions import (
  COTTON_WOOL_SPOT,
  HAEMORRHAGE,
  HARD_EXUDATE,
  MICROANEURYSM,
  NEOVASCULARISATION,
)

UNIT = synthetic_eye.UNIT
FOVEA = (600.0, 620.0)


@pytest.fixture(scope="module")
def patients():
  return [synthetic.draw_patient(3, k, 160) for k in range(70)]


@pytest.fixture(scope="module")
def anatomy():
  return synthetic_eye.draw_anatomy(np.random.default_rng(5))


@pytest.fixture(scope="module")
def camera():
  return synthetic_eye.draw_camera(np.random.default_rng(6))


def _same(a, b):
  return a.patient == b.patient and all(
    np.array_equal(getattr(x, f.name), getattr(y, f.name))
    for x, y in zip(a.eyes, b.eyes, strict=True)
    for f in dataclasses.fields(x)
  )


def _paint(anatomy, camera, marks, size):
  """One eye with these marks, all else equal."""
  return synthetic.paint(anatomy, camera, marks, size, np.random.default_rng(0))


def _boxes(points, half=5.0):
  y, x = np.asarray(points, float).reshape(-1, 2).T
  return np.stack([y - half, x - half, y + half, x + half], 1)


def _quadrants(counts):
  """Haemorrhage boxes, counts = above-left, above-right, below-left, below-right of FOVEA."""
  signs = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
  points = [
    (FOVEA[0] + sy * (20 + i), FOVEA[1] + sx * (30 + 2 * i))
    for (sy, sx), n in zip(signs, counts, strict=True)
    for i in range(n)
  ]
  return np.full(len(points), HAEMORRHAGE), _boxes(points)


def test_a_patient_is_a_function_of_seed_and_number():
  first = synthetic.draw_patient(11, 4, 96)
  synthetic.draw_patient(11, 5, 96)  # chance drawn in between changes nothing
  assert _same(first, synthetic.draw_patient(11, 4, 96))
  assert not _same(first, synthetic.draw_patient(12, 4, 96))
  assert not np.array_equal(first.eyes[0].image, synthetic.draw_patient(11, 6, 96).eyes[0].image)


def test_another_process_draws_the_same():
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    there = pool.apply(synthetic.draw_patient, (11, 4, 96))
  assert _same(there, synthetic.draw_patient(11, 4, 96))


@pytest.mark.parametrize(
  ("types", "level"),
  [
    ([], 0),
    ([MICROANEURYSM], 1),
    ([MICROANEURYSM] * 50, 1),
    ([MICROANEURYSM, HAEMORRHAGE], 2),
    ([HARD_EXUDATE], 2),
    ([COTTON_WOOL_SPOT], 2),
    ([NEOVASCULARISATION], 4),
    ([MICROANEURYSM, NEOVASCULARISATION], 4),
  ],
)
def test_the_rule_by_types(types, level):
  boxes = _boxes([(300 + 7 * i, 400) for i in range(len(types))])
  assert synthetic.grade(types, boxes, FOVEA) == level


def test_severe_needs_more_than_twenty_haemorrhages_in_every_quadrant():
  assert synthetic.grade(*_quadrants([21, 21, 21, 21]), FOVEA) == 3
  for short in range(4):
    counts = [60] * 4
    counts[short] = 20
    assert synthetic.grade(*_quadrants(counts), FOVEA) == 2
  types, boxes = _quadrants([30] * 4)
  assert synthetic.grade(np.full_like(types, MICROANEURYSM), boxes, FOVEA) == 1
  assert synthetic.grade(types, boxes, (FOVEA[0] + 300, FOVEA[1])) == 2  # another centre


def test_lesions_make_the_level_they_were_drawn_for():
  for k in range(40):
    rng = np.random.default_rng([9, k])
    anatomy = synthetic_eye.draw_anatomy(rng)
    for level in range(5):
      marks = synthetic_lesions.draw_lesions(rng, anatomy, level)
      types, boxes = [m.type for m in marks], [m.box for m in marks]
      assert synthetic.grade(types, boxes, anatomy.fovea[::-1]) == level


def test_levels_follow_from_the_boxes_of_the_photograph(patients):
  for patient in patients:
    for eye in patient.eyes:
      assert eye.level == synthetic.grade(eye.types, eye.boxes, eye.fovea)
      assert (eye.level == 0) == (len(eye.boxes) == 0)


def test_levels_are_those_meant_and_spread_alike_in_both_eyes(patients):
  for k, patient in enumerate(patients):
    meant = [level for level in synthetic.draw_levels(3, k) if level is not None]
    assert [eye.level for eye in patient.eyes] == meant
  levels = [synthetic.draw_levels(3, k) for k in range(4000)]
  both = np.array([pair for pair in levels if None not in pair])
  for side in both.T:
    share = np.bincount(side, minlength=5) / len(side)
    np.testing.assert_allclose(share, [0.38, 0.16, 0.22, 0.12, 0.12], atol=0.025)
  assert 0.5 < np.corrcoef(both.T)[0, 1] < 0.95
  assert 0.05 < 1 - len(both) / len(levels) < 0.08


def test_boxes_lie_in_the_field_of_view(patients):
  for patient in patients:
    for eye in patient.eyes:
      seen = eye.image.max(-1) > 25
      for y0, x0, y1, x1 in eye.boxes:
        assert 0 <= y0 < y1 <= 160
        assert 0 <= x0 < x1 <= 160
        corners = [(y, x) for y in (y0, y1) for x in (x0, x1)]
        assert all(seen[min(int(y), 159), min(int(x), 159)] for y, x in corners)


def test_a_box_holds_its_lesion_and_all_of_it(anatomy, camera):
  rng = np.random.default_rng(1)
  for level in (2, 4):
    marks = synthetic_lesions.draw_lesions(rng, anatomy, level)
    kinds = {mark.type: i for i, mark in enumerate(marks)}  # one of each type
    whole = _paint(anatomy, camera, marks, 615).astype(int)
    for i in kinds.values():
      without = _paint(anatomy, camera, marks[:i] + marks[i + 1 :], 615)
      change = np.abs(whole - without).max(-1)
      y0, x0, y1, x1 = (np.array(marks[i].box) * 615 / UNIT + [-1.5, -1.5, 1.5, 1.5]).astype(int)
      inside = change[y0 : y1 + 1, x0 : x1 + 1]
      assert inside.max() > 15
      assert inside.sum() > 0.8 * change.sum()


def test_left_and_right_eyes_are_mirrored(patients):
  """The disc, the brightest spot, is to the left of the fovea in a left eye."""
  right_way = []
  for patient in patients:
    for eye in patient.eyes:
      if not (set(eye.types) & {HARD_EXUDATE, COTTON_WOOL_SPOT}):
        smooth = Image.fromarray(eye.image[..., 1]).resize((20, 20), Image.Resampling.BOX)
        column = np.asarray(smooth).argmax() % 20 * 8 + 4
        right_way.append((column < eye.fovea[1]) == (eye.eye == "left"))
  assert len(right_way) > 50
  assert np.mean(right_way) > 0.97


def test_some_patients_have_one_eye(patients):
  sides = [tuple(eye.eye for eye in patient.eyes) for patient in patients]
  assert set(sides) == {("left", "right"), ("left",), ("right",)}


def test_the_smallest_lesions_nearly_vanish_in_the_small_view(anatomy, camera):
  rng = np.random.default_rng(2)
  marks = [m for _ in range(6) for m in synthetic_lesions.draw_lesions(rng, anatomy, 1)]
  full = [_paint(anatomy, camera, some, 400) for some in ([], marks)]
  small = [
    np.asarray(Image.fromarray(image).resize((160, 160), Image.Resampling.BILINEAR))
    for image in full
  ]
  contrasts = []
  for mark in marks:
    y0, x0, y1, x1 = mark.box
    assert 6 <= y1 - y0 <= 11
    assert 6 <= x1 - x0 <= 11
    row = []
    for (before, after), size in ((full, 400), (small, 160)):
      top, left, bottom, right = (np.array(mark.box) * size / UNIT).astype(int)
      area = np.s_[top : bottom + 1, left : right + 1, 1]
      row.append(((before[area].astype(float) - after[area]) / before[area]).max())
    contrasts.append(row)
  in_full, in_small = np.median(contrasts, 0)
  assert in_full > 0.3
  assert in_small < 0.5 * in_full


def test_a_patient_looks_the_same_at_every_size():
  large, small = (synthetic.draw_patient(3, 8, size) for size in (1230, 400))
  for a, b in zip(large.eyes, small.eyes, strict=True):
    assert (a.level, a.image_id) == (b.level, b.image_id)
    np.testing.assert_array_equal(a.types, b.types)
    np.testing.assert_allclose(a.boxes * (400 / 1230), b.boxes, atol=1e-3)
    shrunk = Image.fromarray(a.image).resize((400, 400), Image.Resampling.BOX)
    difference = np.abs(np.asarray(shrunk, float) - b.image)
    assert difference.mean() < 4
    assert np.percentile(difference, 99) < 16


def test_harmless_things_occur_without_a_box(anatomy):
  rng = np.random.default_rng(3)
  marks = [
    mark
    for _ in range(30)
    for mark in synthetic_lesions.draw_harmless(rng, anatomy, synthetic_lesions.draw_habit(rng))
  ]
  assert all(mark.type is None for mark in marks)
  assert sum(bool(mark.under) for mark in marks) > 5  # drusen, pigment
  assert sum(bool(mark.dark) for mark in marks) > 5  # dust


def test_examples_have_the_schema_and_decode_to_the_photograph():
  example = synthetic.draw_example(3, 1, 128)
  drawn = synthetic.draw_patient(3, 1, 128)
  assert list(example) == ["patient", "images", "image_ids", "eyes", "levels", "boxes"]
  assert len(example["boxes"]) == sum(len(eye.types) for eye in drawn.eyes)
  for encoded, eye in zip(example["images"], drawn.eyes, strict=True):
    image = Image.open(io.BytesIO(encoded))
    assert image.format == "JPEG"
    assert image.layer[0][1:3] == image.layer[1][1:3] == (1, 1)  # colour at full resolution
    assert np.abs(np.asarray(image, float) - eye.image).mean() < 3
  assert set(example["eyes"]) <= set(schema.EYES)


def test_a_camera_frame_holds_the_photograph_between_black_borders(patients):
  rng = np.random.default_rng(0)
  ratios = set()
  for patient in patients[:10]:
    image = patient.eyes[0].image
    frame = synthetic.as_camera(image, rng)
    height, width, _ = frame.shape
    assert frame.dtype == np.uint8
    assert width > height
    assert frame[:, 0].max() < 10
    assert frame[:, -1].max() < 10
    light = (frame.max(-1) > 40).sum() / (image.max(-1) > 40).sum()
    assert 0.9 < light <= 1.01
    ratios.add(round(width / height, 2))
  assert len(ratios) > 3


def test_a_generated_set_holds_the_patients_and_a_killed_one_leaves_nothing(tmp_path):
  from medattn_jax.data.datasets import synthetic_fundus

  numbers = {"seed": 3, "size": 96, "train": 3, "validation": 1, "test": 2}
  config = "size96_seed3_3_1_2"
  left = tmp_path / "synthetic_fundus" / config / "incomplete.ABCDEF_1.0.0"
  left.mkdir(parents=True)  # of a generation that was killed
  (left / "half.array_record").write_bytes(b"x")
  builder = synthetic_fundus.build(tmp_path, **numbers)
  found = {
    path.name for path in (tmp_path / "synthetic_fundus" / config).iterdir() if path.is_dir()
  }
  assert found == {"1.0.0"}
  assert not (tmp_path / "downloads").exists()
  numbers_of = {}
  for split in schema.SPLITS:
    rows = list(builder.as_data_source(split))
    numbers_of[split] = sorted(int(row["patient"]) for row in rows)
    for row in rows:
      drawn = synthetic.draw_patient(3, int(row["patient"]), 96)
      assert list(row["levels"]) == [eye.level for eye in drawn.eyes]
      assert [eye.decode() for eye in row["eyes"]] == [eye.eye for eye in drawn.eyes]
      assert np.abs(row["images"][0].astype(float) - drawn.eyes[0].image).mean() < 4
      np.testing.assert_allclose(
        np.asarray(row["boxes"]["box"]).reshape(-1, 4),
        np.concatenate([eye.boxes for eye in drawn.eyes]),
      )
  assert numbers_of == {"train": [0, 1, 2], "validation": [3], "test": [4, 5]}


def test_numbers_that_make_no_set_are_named(tmp_path):
  from medattn_jax.data.datasets import synthetic_fundus
  from medattn_jax.errors import UserError

  good = {"seed": 0, "size": 96, "train": 1, "validation": 0, "test": 0}
  for key, bad in (("train", 0), ("seed", -1), ("size", 10), ("test", 1.5)):
    with pytest.raises(UserError, match=key):
      synthetic_fundus.build(tmp_path, **{**good, key: bad})
  assert list(tmp_path.iterdir()) == []
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.raises(UserError, match="file"):
    synthetic_fundus.build(blocked, **good)


def test_a_drawing_process_that_dies_is_noticed_at_once(tmp_path):
  """As one killed for memory; nothing is left that looks like a data set."""
  script = """
import multiprocessing, os, signal, sys, threading, time
def kill():
  while not multiprocessing.active_children():
    time.sleep(0.01)
  os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
if __name__ == "__main__":
  from medattn_jax.data.datasets import synthetic_fundus
  threading.Thread(target=kill, daemon=True).start()
  synthetic_fundus.build(sys.argv[1], seed=0, size=400, train=300, validation=0, test=0)
"""
  result = _run(script, tmp_path)
  assert result.stderr.splitlines()[-1].startswith("medattn_jax.errors.UserError")
  assert "a drawing process died: too little memory" in result.stderr.splitlines()[-1]
  assert not list(tmp_path.glob("data/synthetic_fundus/*/1.0.0"))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
  script = """
import sys
from medattn_jax.data.datasets import synthetic_fundus
synthetic_fundus.build(sys.argv[1], seed=0, size=64, train=12, validation=0, test=0)
"""
  result = _run(script, tmp_path)
  assert "without `if __name__ == '__main__':`" in result.stderr.splitlines()[-1]


def _run(script, tmp_path):
  path = tmp_path / "script.py"
  path.write_text(script)
  root = pathlib.Path(synthetic.__file__).parents[2]
  return subprocess.run(
    [sys.executable, path, tmp_path / "data"],
    env={**os.environ, "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
