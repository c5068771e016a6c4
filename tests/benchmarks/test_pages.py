"""The benchmarks' pages say what the real ones say."""

import pathlib

import pytest

from benchmarks import pages
from medattn_jax import config, experiment
from medattn_jax.errors import UserError

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def differences(page, real, path=""):
  for key, value in page.items():
    if isinstance(value, dict):
      yield from differences(value, real[key], f"{path}{key}.")
    elif value != real[key]:
      yield f"{path}{key}: {value!r}, {real[key]!r}"


@pytest.mark.parametrize("name", ["demo", "zoom_in_net", "zoom_in_net_fast"])
def test_a_page_is_the_real_one(name):
  real = config.load_page(str(CONFIGS / f"{name}.py"), []).to_dict()
  page = pages.named(name).to_dict()
  assert not list(differences(page, real))
  for group in ("model", "norm", "augment", "loss"):
    assert page[group].keys() == real[group].keys()
  assert {phase: set(own) for phase, own in page["phases"].items()} == {
    phase: set(own) for phase, own in real["phases"].items()}


@pytest.mark.parametrize("model", ["m_net:resnet50", "inception_v3", "densenet121"])
def test_a_page_can_be_built(model):
  page = pages.adapted(pages.named(model), devices=4, batch=12, precision="float32")
  experiment.check(page, devices=4)
  assert page.norm.group_size == (2 if page.model.name == "m_net" else 3)
  with pytest.raises(UserError, match="a multiple of 4"):
    pages.adapted(page, devices=4, batch=6)


def test_a_smaller_view_has_smaller_crops():
  page = pages.adapted(pages.named("demo"), image_size=80)
  assert (page.data.full_size, page.data.image_size) == (200, 80)
  assert (page.model.crop_size, page.model.mask_size) == (56, 38)
  assert pages.named("demo").model.crop_size == 112  # a copy


@pytest.mark.parametrize(("model", "words"), [
  ("resnet5", "did you mean resnet50"), ("m_net:vgg", "accepted: m_net:BACKBONE"),
  ("demo:resnet50", "m_net:BACKBONE")])
def test_an_unknown_model_is_named(model, words):
  with pytest.raises(UserError, match=words):
    pages.named(model)
