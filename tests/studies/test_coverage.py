"""medattn study coverage: what evaluate says at four boxes, and more boxes after the same ones."""

import functools
import json
import types

import jax
import numpy as np
import pytest

from medattn_jax import crops, evaluate, trained
from medattn_jax.analysis import coverage as curves
from medattn_jax.errors import UserError
from medattn_jax.studies import coverage


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def corners(gated, number, mask_size, mask_scope):
  return crops.corners(crops.select_regions(gated, 64, mask_size, number, mask_scope), 64, 128, 40)


def config(mask_size=24, mask_scope="level"):
  space = types.SimpleNamespace
  return space(seed=0, data=space(image_size=64, full_size=128), model=space(
    mask_size=mask_size, mask_scope=mask_scope, coords="resize", crop_size=40, num_regions=4))


def looked(page, images=20, seed=0):
  """Gated maps, the four regions that are looked into, and lesions where the maps are strong."""
  rng = np.random.default_rng(seed)
  gated = rng.normal(size=(images, 8, 8, 5)).astype(np.float32)
  first = np.asarray(corners(gated, 4, page.model.mask_size, page.model.mask_scope))
  corner = rng.integers(0, 118, (images, 5, 2))
  true = [np.concatenate([own, own + 10], axis=1).astype(np.float32) for own in corner]
  return gated, np.concatenate([first, first + 40], -1), true, rng.integers(0, 5, (images, 5))


@pytest.mark.parametrize("scope", crops.MASK_SCOPES)
def test_four_boxes_are_evaluates(scope):
  page = config(mask_scope=scope)
  gated, boxes, true, kinds = looked(page)
  found = coverage.summarise(true, kinds, np.arange(20).astype(str), gated, boxes, 16, page)
  same = evaluate.lesion_recall(true, boxes, 40, 128, 0)
  assert (found["lesions"], found["images"]) == (same["lesions"], same["images"]) == (100, 20)
  for name, prefix in (("regions", ""), ("best", "best_")):
    for kind in ("box", "image"):
      assert found["curves"][name][kind][3] == pytest.approx(same[f"{prefix}{kind}"], abs=1e-12)
  assert found["curves"]["random"]["box"][3] == pytest.approx(same["random_box"], abs=0.04)
  for own in [*found["curves"].values(), *(k[n] for k in found["types"].values()
                                           for n in found["curves"])]:
    assert len(own["box"]) == 16 and (np.diff(own["box"]) >= -1e-12).all()
  weights = [own["lesions"] for own in found["types"].values()]
  assert np.average([own["maps"]["box"][7] for own in found["types"].values()],
                    weights=weights) == pytest.approx(found["curves"]["maps"]["box"][7])
  json.dumps(found, allow_nan=False)


def test_more_regions_follow_the_ones_looked_into():
  page = config(mask_size=20)
  gated, boxes, *_ = looked(page, images=19)
  regions = coverage.regions_of(gated, boxes, 9, page)
  assert len(regions) == 19
  for own, first in zip(regions, np.asarray(corners(gated, 9, 20, "level")), strict=True):
    np.testing.assert_array_equal(own, np.concatenate([first, first + 40], 1))


def test_what_the_masks_leave_no_room_for_is_no_box():
  page = config(mask_size=200, mask_scope="all")
  gated, boxes, *_ = looked(page, images=3)
  assert all(len(own) == 4 for own in coverage.regions_of(gated, boxes, 16, page))


def test_a_workdir_is_asked_and_its_figures_drawn(opened, untrained, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trained, "open_workdir", lambda *_: opened)  # one compiled step for both
  found = coverage.run(str(untrained), out=str(tmp_path / "out"), boxes=6)
  same = evaluate.run(str(untrained), out=str(tmp_path / "evaluation"))["lesion_recall"]
  assert found["curves"]["regions"]["box"][3] == pytest.approx(same["box"], abs=1e-12)
  assert found["curves"]["regions"]["image"][3] == pytest.approx(same["image"], abs=1e-12)
  assert found["curves"]["best"]["box"][3] == pytest.approx(same["best_box"], abs=1e-12)
  assert json.loads((tmp_path / "out" / "coverage.json").read_text()) == found
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "coverage.json", "recall.png", "types.png"}
  assert f"{same['box']:.3f}" in capsys.readouterr().out and found["paper"] == curves.PAPER
  assert not (untrained / "studies").exists()


def test_mistakes_write_nothing(opened, untrained, untrained_m_net, tmp_path, monkeypatch):
  out = {"out": str(tmp_path / "out")}
  with pytest.raises(UserError, match="chooses no regions"):
    coverage.run(str(untrained_m_net), **out)
  monkeypatch.setattr(trained, "open_workdir", lambda *_: opened)
  for boxes in (3, 65):
    with pytest.raises(UserError, match=f"--boxes={boxes}"):
      coverage.run(str(untrained), boxes=boxes, **out)
  graded = {"true_boxes": [np.zeros((0, 4))] * 2, "level": np.zeros(2)}
  monkeypatch.setattr(evaluate, "graded", lambda *_, **__: graded)
  with pytest.raises(UserError, match="none of 2 photographs has a box"):
    coverage.run(str(untrained), **out)
  assert not list(tmp_path.iterdir())
