"""predictor: pairs, folders, bad files; the same answers on any devices; nothing of TensorFlow."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import medattn_jax
from medattn_jax import console, evaluate, explain, metrics, predictor, trained
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.errors import UserError


@pytest.fixture(scope="module")
def model(untrained):
  return medattn_jax.load(untrained, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def photographs():
  """uint8 [5, 128, 128, 3], as the network takes them."""
  from medattn_jax.data import synthetic

  eyes = [eye.image for i in range(4) for eye in synthetic.draw_patient(3, i, 128).eyes]
  return np.stack(eyes[:5])


def save(photograph, path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(photograph).save(path)
  return str(path)


def test_answers_are_the_networks(model, photographs):
  """Against the network applied by hand: each photograph its own fellow."""
  result = model.predict(photographs)
  image = np.stack([photographs, photographs], axis=1)
  network = model._experiment.model
  apply = jax.jit(lambda variables, x: network.apply(variables, x, phase="c", train=False))
  logits, out = apply(model.variables, image)
  expected = np.asarray(jax.nn.softmax(logits[:, 0]))
  np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
  np.testing.assert_array_equal(result.boxes, out["boxes"][:, 0])
  np.testing.assert_allclose(result.attention, out["G"][:, 0], atol=1e-4)
  np.testing.assert_allclose(result.score, result.probabilities @ np.arange(5))
  np.testing.assert_array_equal(result.grade, np.digitize(result.score, [0.6, 1.4, 2.4, 3.4]))
  assert result.images == ("0", "1", "2", "3", "4") and result.rejected == ()
  assert len(np.unique(result.score)) == 5


def test_any_number_of_devices_and_any_company(untrained, model, photographs):
  """A photograph's answer depends neither on the devices nor on what it is graded with."""
  whole = model.predict(photographs)
  eight = medattn_jax.load(untrained).predict(photographs)
  np.testing.assert_allclose(whole.probabilities, eight.probabilities, atol=1e-5)
  alone = model.predict(photographs[3:4])
  np.testing.assert_allclose(whole.probabilities[3:4], alone.probabilities, atol=1e-5)


def test_files_of_a_folder_are_paired(model, photographs, tmp_path):
  """Left and right of one folder see one another; the same names in two folders do not."""
  left = save(photographs[0], tmp_path / "a" / "10_left.png")
  dark = photographs[4] // 3  # a fellow that changes the answer
  right = save(dark, tmp_path / "a" / "10_right.png")
  other = save(dark, tmp_path / "b" / "10_right.png")
  pair = model.predict([left, right])
  apart = model.predict([left, other])
  alone = model.predict([left])
  np.testing.assert_allclose(apart.probabilities[0], alone.probabilities[0], atol=1e-5)
  assert np.abs(pair.probabilities[0] - alone.probabilities[0]).max() > 1e-2
  assert pair.images == (left, right)
  np.testing.assert_allclose(
    model.predict([right, left]).probabilities, pair.probabilities[::-1], atol=1e-5)


def test_pairs_by_name():
  paths = ["d/10_left.png", "d/11_right.png", "e/10_right.png", "d/10_RIGHT.jpg", "d/left.png",
           "d/10_left.jpg", "d/_left.png", "d/a_b_right.png", "d/a_b_left.png",
           "d/7-left.png", "d/7-right.png", "d/Müller 8 Right.png", "d/Müller 8 Left.png"]
  assert predictor._pairs(paths) == [
    (0, 3), (1, 1), (2, 2), (4, 4), (5, 5), (6, 6), (8, 7), (9, 10), (12, 11)]


def test_a_photograph_that_is_named_twice_is_graded_once(photographs, tmp_path):
  """It would be graded again with itself for a fellow."""
  left, right = (save(photographs[i], tmp_path / f"10_{eye}.png")
                 for i, eye in enumerate(("left", "right")))
  again = f"{tmp_path}/./10_left.png"
  assert predictor._expand([str(tmp_path), str(left), again])[0] == [str(left), str(right)]


def test_folders_to_the_bottom_and_bad_files_named(model, photographs, tmp_path, capsys):
  """The good are graded in the order of their names, the bad named with their reason."""
  folder, outside = tmp_path / "in", tmp_path / "outside"
  good = [save(photographs[0], folder / "a.png"),
          save(photographs[1], folder / "deep" / "er" / "é ,\"視.JPG")]
  secret = save(photographs[2], outside / "secret.png")
  (folder / "b.jpg").write_bytes(b"<html>no picture</html>")
  (folder / "c.jpg").write_bytes(b"")
  (folder / "notes.txt").write_text("mine")
  (folder / "link.png").symlink_to(secret)
  (folder / "dangling.png").symlink_to(folder / "nothing")
  (folder / "loop.png").symlink_to(folder / "loop.png")
  (folder / "deep" / "up").symlink_to(folder)
  (folder / "inside.png").symlink_to(folder / "a.png")
  os.mkfifo(folder / "pipe.png")
  result = model.predict(str(folder))
  assert sorted(result.images) == sorted([*good, str(folder / "inside.png")])
  reasons = {os.path.basename(name): reason for name, reason in result.rejected}
  assert reasons.keys() == {
    "b.jpg", "c.jpg", "link.png", "dangling.png", "loop.png", "up", "pipe.png"}
  assert "outside" in reasons["link.png"] and "link to nothing" in reasons["dangling.png"]
  assert "pipe" in reasons["pipe.png"] and "empty" in reasons["c.jpg"]
  said = capsys.readouterr().err
  for name in reasons:
    assert name in said
  assert "1 files that are no photographs" in said and "notes.txt" in said


def test_a_bad_fellow_costs_its_fellow_nothing(model, photographs, tmp_path):
  left = save(photographs[0], tmp_path / "10_left.png")
  (tmp_path / "10_right.png").write_bytes(b"\x89PNG broken")
  result = model.predict([left, str(tmp_path / "10_right.png")])
  assert result.images == (left,) and len(result.rejected) == 1
  np.testing.assert_allclose(
    result.probabilities, model.predict([left]).probabilities, atol=1e-5)


def test_of_several_frames_the_first_is_graded_and_it_is_said(
    model, photographs, tmp_path, capsys):
  first, more = (Image.fromarray(photograph) for photograph in photographs[:2])
  first.save(tmp_path / "alone.tif")
  first.save(tmp_path / "pages.tif", save_all=True, append_images=[more])
  result = model.predict([str(tmp_path / name) for name in ("alone.tif", "pages.tif")])
  np.testing.assert_array_equal(*result.probabilities)
  told = [line for line in capsys.readouterr().err.splitlines() if "several pages" in line]
  assert len(told) == 1 and "pages.tif" in told[0]


def black(*shape):
  return np.zeros(shape, np.uint8)


@pytest.mark.parametrize("images", [
  np.zeros((2, 8, 8, 3), np.float32), black(8, 8, 3), black(2, 8, 8, 4), black(0, 8, 8, 3),
  black(1, 0, 8, 3), [], (), None, 7, {"a": 1}, [black(8, 8)], [black(8, 8, 3), "a.png"],
  [[1, 2], [3]], b""])
def test_wrong_arguments_are_answered_with_what_is_accepted(model, images):
  with pytest.raises(UserError, match=r"uint8|accepted"):
    model.predict(images)


def test_m_net_has_no_regions(untrained_m_net, photographs):
  """Boxes and maps are None, and explain says what it needs."""
  model = medattn_jax.load(str(untrained_m_net))
  result = model.predict(list(photographs[:2]))
  assert result.boxes is None and result.attention is None and result.probabilities.shape == (2, 5)
  with pytest.raises(UserError, match=r"m_net.*chooses no regions"):
    explain.run(str(untrained_m_net))
  assert not (untrained_m_net / "explanations").exists()


@pytest.fixture(scope="module")
def of_map(untrained_map):
  """A global attention of gray images of 24 pixels."""
  return medattn_jax.load(untrained_map, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def gray():
  """uint8 [5, 24, 24], of the set that the model is of."""
  from medattn_jax.data import planted

  return np.stack([planted.draw(0, number, 24)[0] for number in range(5)])


def test_a_global_attention_answers_with_its_one_map(of_map, untrained_map, gray):
  """Against the network applied by hand, each image by itself, weighted by hand."""
  result = of_map.predict(gray)
  network = of_map._experiment.model
  logits, _ = jax.jit(lambda v, x: network.apply(v, x, phase="frozen"))(
    of_map.variables, gray[:, None, :, :, None])
  expected = np.asarray(jax.nn.softmax(logits[:, 0]))
  np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
  np.testing.assert_array_equal(result.grade, expected.argmax(-1))
  assert result.boxes is None and of_map.thresholds is None
  assert result.attention.dtype == np.float32 and result.attention.shape == (24, 24)
  tree, _ = Checkpoints(untrained_map / "checkpoints").load(12)
  np.testing.assert_array_equal(result.attention, tree["constants"]["map"])
  assert len(np.unique(result.score)) == 5
  unseen = np.where(result.attention < 1e-3, 255 - gray, gray)  # where nothing is attended
  assert (unseen != gray).sum() > 100
  np.testing.assert_allclose(of_map.predict(unseen).probabilities, expected, atol=1e-3)
  seen = np.where(result.attention > 0.5, 255 - gray, gray)
  assert np.abs(of_map.predict(seen).probabilities - expected).max() > 1e-2
  eight = medattn_jax.load(untrained_map).predict(gray)
  np.testing.assert_allclose(eight.probabilities, expected, atol=1e-5)


def test_forms_of_gray_images_are_one(of_map, gray, tmp_path):
  """Arrays with and without channels, and files of each kind that loses nothing."""
  expected = of_map.predict(gray)
  colour = np.repeat(gray[..., None], 3, axis=-1)
  mixed = [gray[0], gray[1][..., None], colour[2], gray[3], colour[4]]
  paths = [save(image, tmp_path / f"{i}.png") for i, image in enumerate((*gray[:4], colour[4]))]
  for images in (gray[..., None], colour, list(gray), mixed, tuple(paths), str(tmp_path)):
    result = of_map.predict(images)
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)
  assert result.images == tuple(paths)


def test_aligned_images_are_resized_as_a_whole(of_map, gray, tmp_path):
  """No black border is cut, no black is added, and black is an image like others."""
  framed = np.zeros((72, 96), np.uint8)
  framed[20:50, 30:60] = np.kron(gray[0], np.ones((2, 2), np.uint8))[:30, :30]
  whole = np.asarray(Image.fromarray(framed).resize((24, 24), Image.Resampling.LANCZOS))
  expected = of_map.predict(whole[None]).probabilities
  assert np.abs(expected - of_map.predict(gray[:1]).probabilities).max() > 1e-4
  for images in (framed[None], [framed], [save(framed, tmp_path / "a.png")]):
    np.testing.assert_allclose(of_map.predict(images).probabilities, expected, atol=1e-3)
  assert of_map.predict(np.zeros((2, 24, 24), np.uint8)).images == ("0", "1")


def test_aligned_images_have_no_fellows(of_map, gray, tmp_path):
  """Left and right are names like others; one that cannot be graded costs no other."""
  paths = [save(gray[0], tmp_path / "10_left.png"), save(gray[1], tmp_path / "10_right.png")]
  result = of_map.predict([paths[1], paths[0]])
  assert result.images == (paths[1], paths[0])
  np.testing.assert_array_equal(
    result.probabilities, of_map.predict(gray[[1, 0]]).probabilities)
  small = save(gray[0][:20, :20], tmp_path / "small.png")
  result = of_map.predict([small, *paths])
  assert result.images == tuple(paths)
  assert result.rejected == ((small, "has 20x20 pixels: at least 24 a side are needed"),)


@pytest.mark.parametrize("images", [
  black(24, 24), black(24, 24, 3), black(24, 24, 1), black(0, 24, 24), black(2, 24, 24, 2),
  np.zeros((2, 24, 24), np.float32), [black(24, 24), black(24)], [black(1, 24, 24)], [None]])
def test_what_is_no_aligned_image_is_answered_with_what_is_accepted(of_map, images):
  with pytest.raises(UserError, match=r"\[N, H, W\]"):
    of_map.predict(images)


@pytest.mark.parametrize("path", ["missing.png", "a\0b.png", ""])
def test_missing_paths_are_named(model, path, tmp_path):
  with pytest.raises(UserError, match="accepted"):
    model.predict([str(tmp_path / path) if path else path])


def test_load_refuses_what_is_no_workdir(untrained, tmp_path):
  (tmp_path / "file").write_text("x")
  for place in (tmp_path, tmp_path / "missing", tmp_path / "file", "", None, 3):
    with pytest.raises(UserError, match=r"workdir|config\.json"):
      medattn_jax.load(place)
  for step in (99, "newest", -1, 1.5, None):
    with pytest.raises(UserError, match="step"):
      medattn_jax.load(untrained, step=step)


def test_load_refuses_damage(untrained, tmp_path):
  """A flipped bit of the weights; a config.json that is another model's."""
  place = tmp_path / "run"
  shutil.copytree(untrained, place)
  largest = max((p for p in (place / "checkpoints" / "12").rglob("*") if p.is_file()),
                key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(bytes(content))
  with pytest.raises(UserError, match="damaged"):
    medattn_jax.load(place)
  shutil.rmtree(place)
  shutil.copytree(untrained, place)
  page = json.loads((place / "config.json").read_text())
  page["model"]["mask_size"] = 27
  (place / "config.json").write_text(json.dumps(page))
  with pytest.raises(UserError, match=r"model\.mask_size = 27"):
    medattn_jax.load(place)


def test_thresholds_come_from_where_they_were_tuned(tmp_path):
  start, tuned = [0.5, 1.5, 2.5, 3.5], [0.1, 0.2, 0.3, 0.4]
  place = trained.Workdir(tmp_path)
  (tmp_path / "evaluation").mkdir()
  path = tmp_path / "evaluation" / "metrics.json"

  def taken(meta=None):
    found, source = trained._thresholds({"thresholds": meta}, place, "these weights", 5)
    return found.tolist(), source

  assert taken(tuned) == (tuned, "the checkpoint's validation")
  for wrong in (None, [1, 2], [2, 1, 3, 4], ["a"] * 4, [float("nan")] * 4):
    assert taken(wrong) == (start, trained.ROUNDING)
  of_these = {"checkpoint_sha256": "these weights", "own_data": True, "thresholds": tuned}
  path.write_text(json.dumps(of_these))
  assert taken() == (tuned, "the workdir's evaluation")
  for strange in (
      {"checkpoint_sha256": "others"}, {"own_data": False}, {"thresholds": [1, 2]},
      {"thresholds": start, "thresholds_from": trained.ROUNDING}):
    path.write_text(json.dumps(of_these | strange))
    assert taken() == (start, trained.ROUNDING)
  path.write_text("[" * 100000)
  assert taken() == (start, trained.ROUNDING)


def test_command_writes_a_csv_or_nothing(untrained, photographs, tmp_path, capfdbinary):
  good = save(photographs[0], tmp_path / "in" / "10_left.png")
  bad = tmp_path / "bad.png"
  bad.write_bytes(b"nothing")
  out = tmp_path / "grades.csv"
  predictor.run(str(untrained), [good, str(bad)], str(out))
  rows = list(csv.DictReader(out.read_text().splitlines()))
  assert list(rows[0]) == ["image", "grade", "score", "p0", "p1", "p2", "p3", "p4"]
  assert [row["image"] for row in rows] == [good]
  assert sum(float(rows[0][f"p{k}"]) for k in range(5)) == 1
  said = capfdbinary.readouterr().err.decode()
  assert str(bad) in said and "1 graded, 1 not" in said
  predictor.run(str(untrained), [good])
  assert capfdbinary.readouterr().out.decode() == out.read_text()
  for images, where in (([str(bad)], "none.csv"), ([good], "no/folder.csv"), ([good], "in"),
                        ([good], good), ([good, "missing.png"], "none.csv")):
    with pytest.raises(UserError):
      predictor.run(str(untrained), images, str(tmp_path / where))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.png", "grades.csv", "in"]
  with Image.open(good) as kept:
    assert kept.size == (128, 128)
  link = tmp_path / "link.csv"
  link.symlink_to(out)
  os.mkfifo(tmp_path / "pipe.csv")  # as /dev/stdout may be: a rename would destroy it
  for other in (link, tmp_path / "pipe.csv"):
    with pytest.raises(UserError, match="a link or a device"):
      predictor.run(str(untrained), [good], str(other))


def test_predict_agrees_with_evaluate(model, smoke_config):
  """The photographs of a data set, each its own fellow, are graded alike by both."""
  dataset = evaluate.open_data(smoke_config, None)
  batch = next(evaluate.batches_of(dataset, "test", smoke_config))
  batch["image"][:, 1] = batch["image"][:, 0]
  table = evaluate.collect(model._experiment, model.variables, [batch])
  first = np.flatnonzero(np.isin(table["image"], batch["image_id"][:, 0]))
  result = model.predict(batch["image"][:, 0])
  expected = metrics.probabilities_of(table["logits"][first])
  np.testing.assert_allclose(result.probabilities, expected, atol=1e-5)
  np.testing.assert_array_equal(result.boxes, table["boxes"][first])


def test_nothing_of_tensorflow_and_a_quick_import(untrained):
  """load and predict import no TensorFlow, TFDS or clu; `import medattn_jax` not even JAX."""
  script = f"""
import sys, time
begin = time.perf_counter()
import medattn_jax
spent = time.perf_counter() - begin
assert spent < 0.3, spent
assert "jax" not in sys.modules and "numpy" not in sys.modules
import numpy as np
model = medattn_jax.load({str(untrained)!r})
model.predict(np.zeros((1, 128, 128, 3), np.uint8) + np.arange(128, dtype=np.uint8)[:, None, None])
heavy = [name for name in sys.modules if name.split(".")[0] in
         ("tensorflow", "tensorflow_datasets", "clu")]
assert not heavy, heavy[:5]
import jax
assert not jax.config.jax_compilation_cache_dir
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                        check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]


def test_names_of_the_package():
  assert set(dir(medattn_jax)) >= {"load", "backbone", "from_torch", "crops", "experiment"}
  assert medattn_jax.crops.select_regions and medattn_jax.experiment.build
  with pytest.raises(AttributeError, match="lode"):
    medattn_jax.lode  # noqa: B018


def test_a_name_is_shown_as_one_printable_line():
  name = "a\nb\x1b[2J\udcff é"
  assert console.plain(name).isprintable() and "é" in console.plain(name)


def test_predictions_csv_reads_back_exactly():
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.ones(5), 3)
  result = predictor.Result(("a,\"b", "c\nd", "視"), p, p @ np.arange(5), np.array([0, 1, 2]), None,
                            None, ())
  rows = list(csv.DictReader(io.StringIO(predictor.predictions_csv(result), newline="")))
  assert [row["image"] for row in rows] == list(result.images)
  np.testing.assert_array_equal([[float(row[f"p{k}"]) for k in range(5)] for row in rows], p)
