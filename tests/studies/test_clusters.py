"""medattn study clusters: features of the right cells, the right pictures, all members named."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medattn_jax import sharding, trained
from medattn_jax.errors import UserError
from medattn_jax.studies import clusters


def planted_model(gated, features):
  """What stands for a model: its maps and features are these, whatever it is shown."""
  space = types.SimpleNamespace
  model = space(mask_size=12, mask_scope="level", coords="resize", crop_size=12)
  answer = lambda variables, image, train: (
    jnp.zeros((*image.shape[:2], 5)), {"M": jnp.asarray(features), "G": jnp.asarray(gated)})
  mesh = sharding.mesh(jax.devices()[:1])
  return space(experiment=space(apply=answer, mesh=mesh),
               config=space(model=model, data=space(image_size=32)))


def test_features_and_pictures_are_of_the_places():
  """Peaks planted in known cells, in two levels at once: each place comes once, with its own."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 2, 8, 8, 6)).astype(np.float32)
  gated = np.full((2, 2, 8, 8, 5), -1, np.float32)
  cells = {(0, 0): [(1, 6), (5, 2)], (0, 1): [(7, 7), (0, 0)], (1, 0): [(3, 3), (3, 7)],
           (1, 1): [(6, 1)]}
  for eye, places in cells.items():
    for strength, place in zip((3, 2), places, strict=False):
      gated[(*eye, *place, 1 + strength)] = strength
      gated[(*eye, *place, 1)] = strength - 0.5  # the same place, in another level
  image = rng.integers(0, 255, (2, 2, 64, 64, 3), np.uint8)
  out = jax.device_get(clusters._step(planted_model(gated, features), 3, 6)({}, image))
  for eye, places in cells.items():
    for rank, (row, column) in enumerate(places):
      np.testing.assert_array_equal(out["features"][eye][rank], features[(*eye, row, column)])
      top, left = out["corners"][eye][rank]
      # The middle of the picture is in the cell, 8 pixels of 64 wide, but where it would stick out.
      assert abs(top + 3 - (8 * row + 4)) <= 4 and abs(left + 3 - (8 * column + 4)) <= 4
      np.testing.assert_array_equal(
        out["patches"][eye][rank], image[eye][top : top + 6, left : left + 6])
      assert out["levels"][eye][rank] == (4, 3)[rank] and out["strengths"][eye][rank] > 0
    assert (out["strengths"][eye][len(places) :] < 0).all()  # nothing else speaks for a level

  table = {name: value.reshape(4, *value.shape[2:]) for name, value in out.items()}
  table |= {"image": np.array(list("abcd"), object), "patient": np.array(list("ppqq"), object),
            "level": np.array([0, 1, 2, 3]), "true_boxes": [np.zeros((0, 4))] * 4,
            "true_types": [np.zeros(0, int)] * 4}
  corner = out["corners"][0, 1, 0]
  table["true_boxes"][1] = np.array([[*corner, *(corner + 3)]])
  table["true_types"][1] = np.array([2])
  rows = clusters.places(table, 6)
  assert rows["image"].tolist() == list("aabbccd") and rows["grade"].tolist() == [
    0, 0, 1, 1, 2, 2, 3]
  assert rows["kind"].tolist() == [clusters.NOTHING] * 2 + ["hard_exudate"] + [
    clusters.NOTHING] * 4
  np.testing.assert_array_equal(rows["features"][3], features[0, 1, 0, 0])


def test_a_workdir_is_asked(opened, untrained, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(trained, "open_workdir", lambda *_: opened)
  (tmp_path / "cluster_99.png").write_bytes(b"")
  found = clusters.run(str(untrained), out=str(tmp_path), top=3, points=36)
  told = capsys.readouterr()
  assert "6 of 8 patients" in told.err and "cluster_99.png of an earlier run" in told.err
  assert json.loads((tmp_path / "clusters.json").read_text()) == found
  assert found["patients"] == 6 and found["points"] <= 36
  members = [member for group in found["clusters"] for member in group["members"]]
  assert len(members) == found["points"] == sum(group["size"] for group in found["clusters"])
  assert len({(member["image"], *member["box"]) for member in members}) == len(members)
  for member in members:
    top, left, bottom, right = member["box"]
    assert bottom - top == right - left == found["patch"] == 20 and member["strength"] > 0
    assert min(top, left) >= 0 and max(bottom, right) <= 128 and member["level"] in range(1, 5)
  kinds = [sum(group["lesions"].values()) for group in found["clusters"]]
  assert kinds == [group["size"] for group in found["clusters"]] == sorted(kinds, reverse=True)
  assert 0 < found["agreement"]["purity"] <= 1
  for group in found["clusters"]:
    assert (group["sheet"] is not None) == (group["size"] > 1)
    if group["sheet"]:
      with Image.open(tmp_path / group["sheet"]) as page:
        assert page.size[0] > 300
  with Image.open(tmp_path / "exemplars.png") as page:
    assert page.size[1] > 150


def test_mistakes_write_nothing(untrained, untrained_m_net, tmp_path):
  for flags, words in (
    ({"top": 0}, "--top=0"), ({"points": 7}, "--points=7"), ({"preference": 1.5}, "--preference"),
    ({"damping": 1.0}, "--damping=1.0")):
    with pytest.raises(UserError, match=words):
      clusters.run(str(untrained), out=str(tmp_path / "out"), **flags)
  with pytest.raises(UserError, match="chooses no regions"):
    clusters.run(str(untrained_m_net), out=str(tmp_path / "out"))
  assert not list(tmp_path.iterdir())
