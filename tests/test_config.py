"""Every key present, every key known, every value checked, and mistakes answered in one line."""

import json
import pathlib
import sys

import pytest

from medattn_jax import config, continuation, trained
from medattn_jax.errors import UserError
from medattn_jax.models import remat

PAGES = sorted((pathlib.Path(__file__).parents[1] / "configs").rglob("*.py"))
SMOKE = str(pathlib.Path(__file__).parents[1] / "configs" / "smoke.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_survives_json(page):
  loaded = config.load_page(str(page))
  again = config.from_dict(json.loads(json.dumps(config.to_dict(loaded))))
  assert config.to_dict(again) == config.to_dict(loaded)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_states_command_hardware_time_and_score(page):
  doc = page.read_text().split('"""')[1]
  for word in ("Command:", "Hardware:", "Time:", "Score:"):
    assert word in doc


def test_overrides_take_the_type_of_the_key():
  loaded = config.load_page(
      SMOKE,
      [
          ("data.batch_size", "16"),
          ("phases.m.learning_rate", "1"),
          ("data.balanced", "true"),
          ("loss.class_weights", "(1, 1, 1, 2, 2)"),
          ("data.name", "12"),
      ],
  )
  assert loaded.data.batch_size == 16
  assert isinstance(loaded.phases.m.learning_rate, float)
  assert loaded.data.balanced is True
  assert loaded.loss.class_weights == (1, 1, 1, 2, 2)
  assert loaded.data.name == "12"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.batchsize", "3", "did you mean data.batch_size"),
        ("phases.m.learning_rte", "3", "did you mean phases.m.learning_rate"),
        ("data", "3", "a group of keys"),
        ("seed.deeper", "3", "unknown key"),
        ("data.batch_size", "x", "a whole number"),
        ("data.batch_size", "1.5", "a whole number"),
        ("data.batch_size", "0", "at least 1"),
        ("data.batch_size", "-4", "at least 1"),
        ("data.balanced", "2", "True or False"),
        ("phases.m.learning_rate", "nan", "a number"),
        ("phases.m.learning_rate", "-1", "at least 0"),
        ("model.std", "(0, 1, 1)", "above zero"),
        ("precision", "float64", "bfloat16, float32"),
        ("seed", str(2**32), "at most 4294967295"),
        ("phases.m.steps", "1" + 400 * "0", "at most"),
        ("data.dir", "a\0b", "a text"),
        ("loss.class_weights", "(0, 0, 0, 0, 0)", "not all zero"),
        ("loss.class_weights", "(1, 2)", "model.num_classes"),
        ("data.image_size", "4000", "data.full_size"),
        ("model.neck_features", "65536", "at most 8192"),
        ("model.attention_features", "65536", "at most 8192"),
        ("phases.c.accumulation", "100000000", "at most 1024"),
        ("phases.c.remat", "block", "did you mean blocks?); accepted: one of none, elementwise"),
        ("loss.name", "cross_entropi", "did you mean cross_entropy"),
        ("model.crop_size", "4000", "data.full_size"),
    ],
)
def test_wrong_overrides_name_key_and_what_is_accepted(key, value, words):
  with pytest.raises(UserError) as caught:
    config.load_page(SMOKE, [(key, value)])
  message = str(caught.value)
  assert words in message and key.split(".")[-1] in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", "line 1"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n  return {}\n", "ConfigDict"),
        ("def get_config():\n  return 1 / 0\n", "ZeroDivisionError"),
        ("raise SystemExit(0)\n", "SystemExit"),
    ],
)
def test_broken_pages_are_named(tmp_path, text, words):
  page = tmp_path / "page.py"
  page.write_text(text)
  with pytest.raises(UserError) as caught:
    config.load_page(str(page))
  assert words in str(caught.value) and "page.py" in str(caught.value)
  with pytest.raises(UserError, match="no such file"):
    config.load_page(str(tmp_path / "other.py"))


def test_a_frozen_page_is_a_page(tmp_path):
  page = tmp_path / "page.py"
  source = f"import runpy, ml_collections as m\nget = runpy.run_path({SMOKE!r})['get_config']\n"
  page.write_text(source + "get_config = lambda: m.FrozenConfigDict(get())\n")
  assert config.load_page(str(page), [("seed", "7")]).seed == 7
  required = "m.config_dict.required_placeholder(int)"
  page.write_text(source + f"def get_config():\n  c = get()\n  c.seed = {required}\n  return c\n")
  with pytest.raises(UserError, match="placeholder"):
    config.load_page(str(page))


def test_a_missing_and_a_surplus_key_are_named(tmp_path):
  values = config.to_dict(config.load_page(SMOKE))
  del values["norm"]["momentum"]
  with pytest.raises(UserError, match=r"norm.momentum is missing"):
    config.from_dict(values)
  values["norm"] |= {"momentum": 0.9, "epsilon": 1}
  with pytest.raises(UserError, match=r"unknown key norm.epsilon"):
    config.from_dict(values)


def test_a_page_may_import_those_beside_it(tmp_path):
  """Each folder its own: two folders may hold pages of one name."""
  smoke = pathlib.Path(SMOKE).read_text()
  for name, seed in (("first", 5), ("second", 6)):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "whole.py").write_text(smoke.replace("config.seed = 0", f"config.seed = {seed}"))
    (folder / "page.py").write_text(
        "import whole\ndef get_config():\n  config = whole.get_config()\n"
        "  config.model.num_regions = 3\n  return config\n"
    )
    loaded = config.load_page(str(folder / "page.py"))
    assert (loaded.seed, loaded.model.num_regions) == (seed, 3)
  assert "whole" not in sys.modules and str(tmp_path / "first") not in sys.path
  (tmp_path / "second" / "broken.py").write_text("import whol\n")
  with pytest.raises(UserError, match="cannot be run"):
    config.load_page(str(tmp_path / "second" / "broken.py"))
  assert str(tmp_path / "second") not in sys.path


def test_a_stored_config_of_before_a_key_came_goes_on_as_it_did():
  """Pages must have every key; what runs stored is completed."""
  values = config.to_dict(config.load_page(SMOKE))
  del values["model"]["init_from"]
  assert config.from_dict(values).model.init_from == ""
  assert "init_from" not in values["model"]
  new = config.to_dict(config.load_page(SMOKE))
  continuation.refuse_other_run(pathlib.Path("w"), new, values, 4)
  trained._agree(config.from_dict(values), {"config": new}, pathlib.Path("w"))
  trained._agree(config.from_dict(new), {"config": values}, pathlib.Path("w"))
  new["model"]["init_from"] = "weights"
  with pytest.raises(UserError, match=r"model.init_from = '', not 'weights'"):
    continuation.refuse_other_run(pathlib.Path("w"), new, values, 4)
  aligned = config.to_dict(config.load_page(SMOKE.replace("smoke", "planted_region")))
  del aligned["data"]["frame"]
  assert config.from_dict(aligned).data.frame == "whole"
  assert "frame" not in config.completed(values)["data"]
  for damaged in ({}, {"model": 3}, {"model": {"name": []}}, {"model": {}, "data": 1}):
    with pytest.raises(UserError):
      config.from_dict(damaged)


def test_a_run_may_go_on_with_other_parts_computed_twice():
  """The numbers are the same; and runs of before there was the key kept everything."""
  old = config.to_dict(config.load_page(SMOKE))
  for page in old["phases"].values():
    del page["remat"]
  assert {page.remat for page in config.from_dict(old).phases.values()} == {"none"}
  new = config.to_dict(config.load_page(SMOKE, [("phases.m.remat", "blocks")]))
  for held, asked in ((old, new), (new, old)):
    continuation.refuse_other_run(pathlib.Path("w"), config.completed(asked), held, 4)
    trained._agree(config.from_dict(held), {"config": asked}, pathlib.Path("w"))
  assert "remat" not in old["phases"]["m"]
  new["phases"]["m"]["ema"] = 0.5
  with pytest.raises(UserError, match=r"phases\.m\.ema"):
    continuation.refuse_other_run(pathlib.Path("w"), new, old, 4)


@pytest.mark.parametrize(
  ("step", "phase", "steps", "goes"),
  [(4, "m", 9, True), (5, "m", 9, True), (4, "m", 4, True), (4, "m", 3, False),
   (6, "m", 9, False), (6, "m", 6, False),  # it is over: the next one would begin elsewhere
   (6, "a", 9, True), (6, "c", 1, True)])
def test_a_phase_may_be_made_longer_until_it_is_over(step, phase, steps, goes):
  held = config.to_dict(config.load_page(SMOKE))
  for page in held["phases"].values():
    page |= {"steps": 5, "schedule": "constant"}
  asked = config.to_dict(config.from_dict(held))
  asked["phases"][phase]["steps"] = steps
  if goes:
    continuation.refuse_other_run(pathlib.Path("w"), asked, held, step)
  else:
    with pytest.raises(UserError, match=f"phases.{phase}.steps"):
      continuation.refuse_other_run(pathlib.Path("w"), asked, held, step)


def test_a_page_and_the_models_know_the_same_ways_to_compute_twice():
  assert config.PHASE["remat"].choices == remat.MODES


def test_a_page_without_a_new_key_is_no_page(tmp_path):
  page = tmp_path / "page.py"
  text = pathlib.Path(SMOKE).read_text()
  page.write_text(text.replace('  config.model.init_from = ""\n', ""))
  with pytest.raises(UserError, match=r"key model.init_from is missing"):
    config.load_page(str(page))
