"""explain: the boxes of boxes.csv are the model's and their reasons true; names stay inside."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from medattn_jax import crops, explain
from medattn_jax.errors import UserError


def with_config(smoke_config, **model):
  config = smoke_config.copy_and_resolve_references()
  config.model.update(model)
  return config


def maps_of(gated, size):
  """The maps at every pixel, by the crops' own resize."""
  grown = crops._bilinear(jnp.asarray(gated.transpose(2, 0, 1)), size)
  return np.asarray(jnp.swapaxes(crops._bilinear(jnp.swapaxes(grown, 1, 2), size), 1, 2))


@pytest.mark.parametrize("scope", ["level", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_level_and_strength_are_those_of_the_selection(smoke_config, scope, seed):
  """Against the greedy rule written out on the whole resized maps."""
  config = with_config(smoke_config, mask_scope=scope, mask_size=30)
  gated = np.random.default_rng(seed).normal(size=(5, 6, 5)).astype(np.float32)
  gated[..., 0] += 10  # level 0 carries nothing
  maps = maps_of(gated, 64)[1:].copy()
  regions = explain.regions_of(gated, np.zeros((4, 4), int), config)
  for region in regions:
    level, row, column = np.unravel_index(maps.argmax(), maps.shape)
    assert region.level == level + 1
    assert region.strength == pytest.approx(maps.max(), rel=1e-5)
    window = np.s_[max(0, row - 15):row + 15, max(0, column - 15):column + 15]
    maps[(slice(None) if scope == "all" else level, *window)] = -np.inf
  strengths = [region.strength for region in regions]
  assert strengths == sorted(strengths, reverse=True)


def test_receptive_field_reads_the_cells_themselves(smoke_config):
  config = with_config(smoke_config, coords="receptive_field", mask_size=40)
  config.data.image_size = 128
  gated = np.random.default_rng(0).normal(size=(3, 3, 5)).astype(np.float32)
  strengths = [r.strength for r in explain.regions_of(gated, np.zeros((4, 4), int), config)]
  assert set(np.float32(strengths)) <= set(gated[..., 1:].ravel())
  assert strengths[0] == gated[..., 1:].max()


def test_nothing_left_to_choose_is_said(smoke_config):
  """One window over the whole image leaves nothing to the second region."""
  config = with_config(smoke_config, mask_scope="all", mask_size=200)
  gated = np.random.default_rng(0).normal(size=(3, 3, 5)).astype(np.float32)
  first, second = explain.regions_of(gated, np.zeros((2, 4), int), config)
  assert first.level in (1, 2, 3, 4) and second.level is None and second.strength is None


def test_file_names_stay_in_the_folder_and_differ():
  taken = set()
  names = [explain.file_name(image, taken) for image in (
    "a/b", "../../etc/passwd", "a_b", "A_B", "", "..", "é視 1", "x" * 500, "視" * 300, "x\0y\n")]
  assert len({name.casefold() for name in names}) == len(names)
  for name in names:
    assert "/" not in name and "\0" not in name and not name.startswith(".")
    assert len(name.encode()) < 200 and name.endswith(".png")


def test_pages_and_boxes_of_a_split(untrained, tmp_path, capsys):
  """The first photographs in stored order, four regions each, inside the image."""
  out = tmp_path / "new" / "pages"
  explain.run(str(untrained), out=str(out), limit=3)
  assert "3 photographs explained" in capsys.readouterr().out
  rows = list(csv.DictReader((out / "boxes.csv").read_text().splitlines()))
  assert list(rows[0]) == ["image", "rank", "y0", "x0", "y1", "x1", "level", "strength"]
  images = list(dict.fromkeys(row["image"] for row in rows))
  assert len(images) == 3 and [row["rank"] for row in rows] == list("1234") * 3
  assert sorted(path.name for path in out.glob("*.png")) == sorted(f"{i}.png" for i in images)
  for row in rows:
    y0, x0, y1, x1 = (int(row[key]) for key in ("y0", "x0", "y1", "x1"))
    assert min(y0, x0) >= 0 and max(y1, x1) <= 128 and y1 - y0 == x1 - x0 == 40
    assert row["level"] in "1234"
  strengths = np.array([float(row["strength"]) for row in rows]).reshape(3, 4)
  assert (np.diff(strengths) <= 0).all()
  with Image.open(out / f"{images[0]}.png") as page:
    assert page.size == (1760, 860)
  assert not (untrained / "explanations").exists()


def test_wrong_arguments_write_nothing(untrained, tmp_path):
  for arguments, words in (({"limit": 0}, "--limit=0"), ({"split": "tset"}, "test"),
                           ({"data": "no_such_set"}, "no_such_set")):
    with pytest.raises(UserError, match=words):
      explain.run(str(untrained), out=str(tmp_path / "out"), **arguments)
  assert not (tmp_path / "out").exists()
