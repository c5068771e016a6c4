"""explain of a global attention: what is drawn is what was learned; damage costs the evolution."""

import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import medattn_jax
from medattn_jax import evaluate, explain, explain_map, models, trained
from medattn_jax.analysis import maps
from medattn_jax.data import planted
from medattn_jax.errors import UserError
from medattn_jax.workdir import Workdir

FILES = {"attention.npy", "attention.png", "class_means.png", "evolution.png", "evolution.gif"}
KEPT = (1, 4, 8)


def drawn_maps(count, size=24):
  """float32 [count, size, size], soft and unlike."""
  y, x = np.mgrid[:size, :size] / size
  return np.stack([np.exp(-((x - 0.3 - 0.1 * i) ** 2 + (y - 0.5) ** 2) / 0.05) * (0.9 - 0.2 * i)
                   for i in range(count)]).astype(np.float32)


@pytest.fixture
def workdir(untrained_map, tmp_path):
  """A copy of the workdir with maps of three steps kept, and one of a later step than its own."""
  place = tmp_path / "run"
  shutil.copytree(untrained_map, place)
  for step, one in zip((*KEPT, 20), drawn_maps(4), strict=True):
    Workdir(place).keep_map(step, one)
  return place


@pytest.fixture
def model(workdir):
  return trained.open_workdir(workdir, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def drawn(map_config):
  """The page's training images uint8 [40, 24, 24] and their classes, drawn anew."""
  data = map_config.data
  images, levels = zip(*(planted.draw(data.synthetic.seed, number, data.full_size, 2)
                         for number in range(data.synthetic.train)), strict=True)
  return np.stack(images), np.array(levels)


@pytest.fixture
def calls(monkeypatch):
  """{function of maps: (positional, named arguments)} of what is drawn."""
  seen = {}

  def spy(name):
    own = getattr(maps, name)

    def recording(*positional, **named):
      seen[name] = positional, named
      return own(*positional, **named)

    monkeypatch.setattr(maps, name, recording)

  for name in ("page", "class_means", "evolution", "animation"):
    spy(name)
  return seen


def test_files_of_a_run(workdir, map_config, drawn, calls, tmp_path, capsys):
  """Map, means, samples, classes and the region that is known, each as it is elsewhere."""
  out = tmp_path / "new" / "pages"
  before = sorted(path.name for path in workdir.iterdir())
  explain.run(str(workdir), out=str(out), limit=3)
  assert {path.name for path in out.iterdir()} == FILES
  assert sorted(path.name for path in workdir.iterdir()) == before
  said = capsys.readouterr()
  assert all(name in said.out for name in FILES) and not said.err
  model = medattn_jax.load(workdir, devices=jax.devices()[:1])
  attention = np.asarray(model.variables["constants"]["map"])
  kept = np.load(out / "attention.npy", allow_pickle=False)
  assert kept.dtype == np.float32 and 0 < kept.min() < 0.5 < kept.max() < 1
  np.testing.assert_array_equal(kept, attention)
  region = planted.region(map_config.data.synthetic.seed, 24)
  for positional, named in calls.values():
    np.testing.assert_array_equal(named["region"], region)
    assert len(positional) >= 2
  (given, mean, samples), named = calls["page"]
  np.testing.assert_array_equal(given, attention)
  images, levels = drawn
  np.testing.assert_allclose(mean[..., 0], images.mean(0), atol=1e-4)
  assert "planted_region" in named["title"] and "step 12" in named["title"]
  data = map_config.data.synthetic
  first = data.train + data.validation  # the test split's first number
  result = model.predict(np.stack([one.image for one in samples]))
  for place, one in enumerate(samples):
    image, level = planted.draw(data.seed, first + place, 24, 2)
    np.testing.assert_array_equal(one.image[..., 0], image)
    assert (one.name, one.true) == (f"{first + place:05d}", level)
    assert one.given == result.grade[place] == result.probabilities[place].argmax()
  assert len(samples) == 3
  (means, counts, _), _ = calls["class_means"]
  for level in range(2):
    np.testing.assert_allclose(means[level, ..., 0], images[levels == level].mean(0), atol=1e-4)
    assert counts[level] == (levels == level).sum()
  with Image.open(out / "evolution.gif") as animation:
    assert animation.format == "GIF" and animation.n_frames == 4
  for name in FILES - {"attention.npy", "evolution.gif"}:
    with Image.open(out / name) as page:
      assert page.format == "PNG" and min(page.size) > 200


def test_the_evolution_ends_with_the_map_that_answers(model, calls):
  """Maps up to the checkpoint's step, each as it would have been frozen."""
  attention = np.asarray(model.variables["constants"]["map"])
  written = explain_map._evolution(model, attention, None)
  assert written.keys() == {"evolution.png", "evolution.gif"}
  for name in ("evolution", "animation"):
    found, steps = calls[name][0]
    assert steps == [*KEPT, 12]
    np.testing.assert_array_equal(found[-1], attention)
    for one, kept in zip(found, drawn_maps(3), strict=False):
      frozen = models.hand_on(model.config, "frozen", {"constants": {"map": kept}})
      np.testing.assert_allclose(one, frozen["constants"]["map"], atol=1e-5)
      assert np.abs(one - kept).max() > 0.05
  assert "as it would have been frozen" in calls["evolution"][1]["title"]


def test_in_the_joint_phase_maps_are_as_they_were(model, calls):
  """Nothing is frozen by then; the map of the checkpoint's own step is the checkpoint's."""
  attention = np.full((24, 24), 0.7, np.float32)
  explain_map._evolution(model._replace(phase="joint", step=8), attention, None)
  found, steps = calls["evolution"][0]
  assert steps == list(KEPT) and "frozen" not in calls["evolution"][1]["title"]
  for one, wanted in zip(found, [*drawn_maps(2), attention], strict=True):
    np.testing.assert_array_equal(one, wanted)


def damaged(kind, path):
  content = path.read_bytes()
  if kind == "torn":
    path.write_bytes(content[:-100])
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "header":
    path.write_bytes(content[:20] + b"\xff" * 40 + content[60:])
  elif kind == "objects":
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
  elif kind == "another size":
    np.save(path, np.ones((12, 12), np.float32), allow_pickle=False)
  elif kind == "another kind":
    np.save(path, np.ones((24, 24)), allow_pickle=False)
  elif kind == "no numbers":
    np.save(path, np.full((24, 24), np.nan, np.float32), allow_pickle=False)
  elif kind == "archive":
    with open(path, "wb") as file:
      np.savez(file, a=np.ones(3))
  elif kind == "pipe":
    path.unlink()
    os.mkfifo(path)


DAMAGES = ("torn", "empty", "header", "objects", "another size", "another kind", "no numbers",
           "archive", "pipe")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_map_costs_the_evolution_and_is_named(workdir, model, kind, capsys):
  path = Workdir(workdir).kept_maps()[4]
  assert explain_map.kept_maps(model).keys() == set(KEPT)
  damaged(kind, path)
  assert explain_map._evolution(model, np.ones((24, 24), np.float32), None) == {}
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "warning" in said and str(path) in said
  damaged("torn", Workdir(workdir).kept_maps()[20])  # of a later step: not looked at
  path.unlink()
  assert explain_map.kept_maps(model).keys() == {1, 8}


def test_nothing_else_is_lost_where_no_map_was_kept(untrained_map, tmp_path, capsys):
  """Another split, and more photographs than the page has room for: both are said."""
  explain.run(str(untrained_map), out=str(tmp_path), split="validation", limit=30)
  assert {path.name for path in tmp_path.iterdir()} == FILES - {"evolution.png", "evolution.gif"}
  said = capsys.readouterr().err
  assert "no map up to step 12" in said and "room for 24" in said


def test_of_many_photographs_some_are_averaged_and_it_is_said(
    model, drawn, monkeypatch, capsys):
  """As many as are told, each class with its share; of few all."""
  dataset = evaluate.open_data(model.config, None)
  levels = drawn[1]
  monkeypatch.setattr(explain_map, "AVERAGED", 10)
  found = explain_map.means(dataset, model, "train")
  assert found.counts.sum() == 10 and "10 of the 40 of train" in found.told
  assert np.abs(found.counts - 10 * np.bincount(levels) / 40).max() <= 1
  assert "10 of the 40" in capsys.readouterr().err
  np.testing.assert_allclose(
    found.whole, np.average(found.classes, axis=0, weights=found.counts), atol=1e-3)
  assert np.abs(found.whole[..., 0] - drawn[0].mean(0)).max() > 1
  monkeypatch.setattr(explain_map, "AVERAGED", 40)
  assert explain_map.means(dataset, model, "train").told == "all 40 of train"
  model.config.model.num_classes = 1
  with pytest.raises(UserError, match=r"level 1; accepted by this model: 0–0"):
    explain_map.means(dataset, model, "train")


def test_without_a_map_there_is_nothing_to_explain(model, tmp_path, monkeypatch):
  model.config.attention.source = "none"
  bare = {name: model.variables[name] for name in ("params", "batch_stats")}
  monkeypatch.setattr(trained, "open_workdir", lambda _: model._replace(variables=bare))
  with pytest.raises(UserError, match=r"attention\.source = none: the model has no map") as raised:
    explain.run(str(tmp_path / "run"), out=str(tmp_path / "out"))
  assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_wrong_arguments_write_nothing(untrained_map, tmp_path):
  for arguments, words in (({"limit": 0}, "--limit=0"), ({"split": "tset"}, "test"),
                           ({"data": "no_such_set"}, "no_such_set")):
    with pytest.raises(UserError, match=words):
      explain.run(str(untrained_map), out=str(tmp_path / "out"), **arguments)
  assert not (tmp_path / "out").exists()
