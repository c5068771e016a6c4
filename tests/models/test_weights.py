"""A folder of weights: believed only as it was written, and put where the page says."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from medattn_jax import config, manifest
from medattn_jax.errors import UserError
from medattn_jax.models import pretrained, weights

ROOT = pathlib.Path(__file__).parents[2]
IMAGENET = weights.CONVENTIONS["resnet18"]
PAGE = [("model.backbone", "resnet18"), ("model.stem", "full"),
        ("model.mean", str(IMAGENET[0])), ("model.std", str(IMAGENET[1]))]
FROM = {"source": {"file": "resnet18.pth", "sha256": "0" * 64}}


def drawn(name, classes, sign=1, **options):
  """Variables whose every leaf holds one number of its own, in the memory of that one."""
  leaves = pretrained.layout(name, classes, **options)
  return {path: np.broadcast_to(np.float32(sign * (n + 1)), leaf.shape)
          for n, (path, leaf) in enumerate(sorted(leaves.items()))}


def nested(flat):
  return {"batch_stats": {}} | traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Weights of a ResNet-18 of two classes. Not to be changed."""
  place = tmp_path_factory.mktemp("weights") / "resnet18"
  weights.write(place, "resnet18", nested(drawn("resnet18", 2)), IMAGENET, FROM)
  return place


@pytest.fixture
def damaged(folder, tmp_path):
  """A copy of the folder, to be changed."""
  copy = tmp_path / "copy"
  copy.mkdir()
  for path in folder.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  return copy


def page(init_from, *overrides):
  tiny = str(ROOT / "tests" / "pages" / "tiny_map.py")
  return config.load_page(tiny, [*PAGE, ("model.init_from", str(init_from)), *overrides])


def test_what_is_written_is_read(folder):
  found = weights.read(str(folder), "model.init_from")
  assert (found.model, found.num_classes, found.mean, found.std) == ("resnet18", 2, *IMAGENET)
  expected = drawn("resnet18", 2)
  assert found.variables.keys() == expected.keys()
  assert all(np.array_equal(found.variables[path], expected[path]) for path in expected)
  about = json.loads((folder / manifest.NAME).read_text())
  assert about["source"] == FROM["source"] and about["input"]["channels"] == "RGB"
  assert sorted(path.name for path in folder.iterdir()) == [manifest.NAME, weights.FILE]


def test_arrays_that_lie_otherwise_in_memory_are_stored_in_order(tmp_path):
  """from_torch turns kernels by looking at them otherwise; the file's library does not look."""
  flat = drawn("resnet18", None)
  key = ("params", "conv1", "kernel")
  shape = flat[key].shape
  flat[key] = np.random.default_rng(0).random(shape[::-1], np.float32).transpose()
  weights.write(tmp_path / "new", "resnet18", nested(flat), IMAGENET, FROM)
  found = weights.read(str(tmp_path / "new"), "model.init_from")
  np.testing.assert_array_equal(found.variables[key], flat[key])
  assert found.num_classes is None


def refused(place, words):
  with pytest.raises(UserError, match=words) as caught:
    weights.check(page(place))
  assert "\n" not in str(caught.value) and "model.init_from" in str(caught.value)


def test_damage_of_any_kind_is_noticed(damaged, tmp_path):
  file, about = damaged / weights.FILE, damaged / manifest.NAME
  whole, said = file.read_bytes(), about.read_bytes()
  middle = len(whole) // 2
  file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
  refused(damaged, "weights.safetensors is not what was written")
  file.write_bytes(whole[:-1])
  refused(damaged, "weights.safetensors has .* bytes instead of")
  file.unlink()
  refused(damaged, "weights.safetensors is missing")
  file.write_bytes(whole)
  about.write_bytes(said.replace(b'"num_classes": 2', b'"num_classes": 3'))
  refused(damaged, "manifest.json is not what was written")
  about.unlink()
  refused(damaged, r"manifest.json is missing; accepted: a folder that `medattn import-weights`")
  refused(tmp_path / "nowhere", 'no such folder; accepted: "" for none, or a folder')
  refused(file, "no such folder")


def resealed(place, change):
  """The folder with another manifest, honest about sizes and sums, of other facts."""
  about = json.loads((place / manifest.NAME).read_text())
  facts = {key: value for key, value in about.items() if key not in ("files", "sha256")}
  (place / manifest.NAME).unlink()
  manifest.write(place, facts | change)


@pytest.mark.parametrize(("change", "words"), [
  ({"format": 2}, "is of format 2, not 1"),
  ({"model": "resnet81"}, "manifest.json is not of weights"),
  ({"model": ["resnet18"]}, "not of weights"),
  ({"num_classes": "2"}, "not of weights"),
  ({"num_classes": -2}, "of another shape: fc/bias, fc/kernel"),
  ({"num_classes": None}, "not known: fc/bias, fc/kernel"),
  ({"input": {"mean": [0, 0], "std": [1, 1, 1]}}, "not of weights"),
  ({"input": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "not of weights"),
  ({"input": None}, "not of weights"),
])
def test_a_manifest_that_says_something_else(change, words, damaged):
  resealed(damaged, change)
  refused(damaged, words)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
  flat = drawn("resnet18", 2)
  del flat["params", "layer3-1", "conv2", "kernel"]
  flat["params", "layer9", "kernel"] = np.zeros(3, np.float32)
  flat["batch_stats", "bn1", "mean"] = np.zeros(63, np.float32)
  flat["params", "bn1", "bias"] = np.zeros(64, np.float16)
  weights.write(tmp_path / "odd", "resnet18", nested(flat), IMAGENET, FROM)
  refused(tmp_path / "odd", r"missing: layer3-1/conv2/kernel; not known: layer9/kernel; "
                            r"of another shape: bn1/bias, bn1/mean$")


@pytest.mark.parametrize(("override", "words"), [
  (("model.backbone", "resnet50"), "weights of resnet18 where model.backbone = resnet50"),
  (("model.backbone", "cnn"), "weights of resnet18 where model.backbone = cnn"),
  (("model.stem", "small"), "model.stem = small: published weights have full"),
  (("model.width", "0.5"), "model.width = 0.5: published weights have 1"),
  (("model.mean", "(0.5, 0.5, 0.5)"), r"mean \(0.485, 0.456, 0.406\).*model.mean = \(0.5, 0.5, "
   r"0.5\).*accepted: --config.model.mean='\(0.485, 0.456, 0.406\)'"),
  (("model.std", "(0.229, 0.224, 0.226)"), r"model.std = \(0.229, 0.224, 0.226\)"),
])
def test_weights_that_do_not_fit_the_page(override, words, folder):
  with pytest.raises(UserError, match=words):
    weights.check(page(folder, override))


def test_the_convention_of_the_published_weights():
  """torchvision's Inception-v3 and GoogLeNet turn ImageNet's input into [-1, 1] by themselves."""
  mean, std = map(np.array, weights.CONVENTIONS["resnet50"])
  pixel = np.array([0.1, 0.5, 0.9])
  turned = (pixel - mean) / std * (std / 0.5) + (mean - 0.5) / 0.5  # their transform_input
  for name in ("googlenet", "inception_v3"):
    own_mean, own_std = map(np.array, weights.CONVENTIONS[name])
    np.testing.assert_allclose((pixel - own_mean) / own_std, turned)
  assert weights.CONVENTIONS.keys() == pretrained.HEADS.keys()


def at(branch, flat):
  return nested({(path[0], *branch, *path[1:]): x for path, x in flat.items()})


def leaves(tree):
  return traverse_util.flatten_dict(tree)


def test_a_run_begins_with_them_and_with_its_own_head(folder, capsys):
  """A head of as many classes is taken, another is left as it was drawn; so is all beside it."""
  for classes in (2, 5):
    own = drawn("resnet18", classes, -1)
    before = at(("backbone",), own)
    before["params"]["pixel_classifier"] = {"scores": np.ones((2, 2))}
    copy = jax.tree.map(np.copy, before)
    # A page of two classes may be asked to grade five here: only the drawn arrays matter.
    after = weights.begin(page(folder), before)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, copy))
    found, given = leaves(after), drawn("resnet18", 2)
    assert found.pop(("params", "pixel_classifier", "scores")).sum() == 4
    for path, value in found.items():
      path = (path[0], *path[2:])
      head = pretrained.is_head("resnet18", path) and classes == 5
      np.testing.assert_array_equal(value, own[path] if head else given[path])
    assert len(found) == len(given)
    said = capsys.readouterr().err
    words = "left out: fc (its head is of 2 classes); drawn by chance: fc"
    assert (words in said) == (classes == 5)


def test_a_trunk_takes_what_it_has(capsys):
  """M-Net ends VGG in its features, and has a head of its own."""
  name, branch = "vgg16_bn", ("m_net", "backbone")
  given = weights.Weights(name, 1000, *IMAGENET, drawn(name, 1000), "")
  own = drawn(name, None, -1, hidden=None)
  before = at(branch, own)
  before["params"]["m_net"]["head"] = {"bias": np.zeros(5)}
  after = leaves(weights._put(before, branch, given, "model.init_from = W"))
  assert not after.pop(("params", "m_net", "head", "bias")).any()
  assert len(after) == len(own)
  for path, value in after.items():
    np.testing.assert_array_equal(value, given.variables[path[0], *path[3:]])
  assert "left out: classifier-0, classifier-3, classifier-6\n" in capsys.readouterr().err


def test_auxiliary_heads_stay_as_they_were_drawn(capsys):
  given = weights.Weights("googlenet", 2, *IMAGENET, drawn("googlenet", 2), "")
  own = drawn("googlenet", 2, -1, aux=True)
  after = leaves(weights._put(at(("backbone",), own), ("backbone",), given, "model.init_from = W"))
  assert {path[2] for path, x in after.items() if x.max() < 0} == {"aux1", "aux2"}
  assert "drawn by chance: aux1, aux2" in capsys.readouterr().err


def test_what_does_not_fit_the_network_is_named():
  given = drawn("resnet18", 2)
  own = dict(given)
  own["params", "conv1", "kernel"] = np.zeros((3, 3, 3, 64))
  del own["params", "layer1-0", "conv1", "kernel"]
  own["params", "layer1-7", "conv1", "kernel"] = np.zeros(3)
  with pytest.raises(UserError, match=r"missing: layer1-7/conv1/kernel; not known: layer1-0/conv1/"
                                      r"kernel; of another shape: conv1/kernel$"):
    weights._put(at(("backbone",), own), ("backbone",), weights.Weights(
      "resnet18", 2, *IMAGENET, given, ""), "model.init_from = W")


def test_c_nets_backbone_has_a_key_of_its_own(folder):
  smoke = str(ROOT / "configs" / "smoke.py")
  both = [*(one for one in PAGE if one[0] in ("model.mean", "model.std")),
          ("model.crop_backbone", "resnet18"), ("model.crop_init", str(folder))]
  assert set(weights.check(config.load_page(smoke, both))) == {"model.crop_init"}
  m_net = [("model.backbone", "resnet18"), ("model.init_from", str(folder))]
  found = weights.check(config.load_page(smoke, [*both, *m_net]))
  assert set(found) == {"model.crop_init", "model.init_from"} and len(set(found.values())) == 1
  for word in ("random", "m_net"):
    assert not weights.check(config.load_page(smoke, [("model.crop_init", word)]))
  words = r"model.crop_init = 'm_nt': no such folder; accepted: random, m_net or a folder"
  with pytest.raises(UserError, match=words):
    weights.check(config.load_page(smoke, [("model.crop_init", "m_nt")]))
