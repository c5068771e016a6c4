"""Config pages: every key present, every key known, every value checked before any work."""

from __future__ import annotations

import ast
import contextlib
import math
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from medattn_jax.errors import UserError, nearest


class Rule(NamedTuple):
  """What a key accepts: a predicate on the value and its words; the values, where they are few."""

  accepts: Callable[[Any], bool]
  words: str
  choices: tuple[str, ...] = ()


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  if _is_int(value):
    return abs(value) < 2**63
  return isinstance(value, float) and math.isfinite(value)


def whole(low: int, high: int = 10**8) -> Rule:
  words = f"a whole number of at least {low} and at most {high}"
  return Rule(lambda v: _is_int(v) and low <= v <= high, words)


def number(low: float, high: float = math.inf) -> Rule:
  words = f"a number of at least {low:g}"
  if high != math.inf:
    words = f"a number from {low:g} to {high:g}"
  return Rule(lambda v: _is_number(v) and low <= v <= high, words)


def one_of(*choices: str) -> Rule:
  return Rule(lambda v: v in choices, "one of " + ", ".join(choices), choices)


def numbers(length: int | None = None) -> Rule:
  words = f"{length} numbers" if length else "a tuple of numbers, () for none"
  return Rule(
      lambda v: isinstance(v, tuple | list)
      and all(_is_number(x) for x in v)
      and (length is None or len(v) == length),
      words,
  )


TEXT = Rule(lambda v: isinstance(v, str) and v != "" and "\0" not in v, "a text")
FOLDER = Rule(
    lambda v: isinstance(v, str) and "\0" not in v,
    'a folder that `medattn import-weights` wrote, "" for none',
)
CROP_INIT = Rule(TEXT.accepts, "random, m_net or a folder that `medattn import-weights` wrote")
SEED = whole(0, 2**32 - 1)  # JAX drops the higher bits of a seed without a word
SWITCH = Rule(lambda v: isinstance(v, bool), "True or False")

PHASE = {
    "steps": whole(0),
    "learning_rate": number(0),
    "earlier_rate": number(0, 1),
    "optimizer": one_of("sgd", "adamw"),
    "momentum": number(0, 1),
    "weight_decay": number(0),
    "schedule": one_of("constant", "step", "cosine"),
    "warmup_steps": whole(0),
    "decay_every": whole(1),
    "decay_rate": number(0, 1),
    "accumulation": whole(1, 1024),
    "remat": one_of("none", "elementwise", "blocks"),
    "clip_norm": number(0),
    "ema": number(0, 1),
}

CLASSES = Rule(lambda v: _is_int(v) and 2 <= v <= 100, "a whole number from 2 to 100")
SOURCE = Rule(
    lambda v: isinstance(v, str)
    and re.fullmatch(r"none|bank(:[1-9]\d{0,7})?|batch|stats|free", v) is not None,
    "none, bank, bank:K with a number K of images, batch, stats or free",
)
STD = Rule(lambda v: numbers(3).accepts(v) and all(x > 0 for x in v), "3 numbers above zero")

# What is a page's whatever its model.
PAGE = {
    "seed": SEED,
    "precision": one_of("bfloat16", "float32"),
    "norm": {"group_size": whole(1), "momentum": number(0, 1)},
    "data": {
        "name": TEXT,
        "dir": TEXT,
        "image_size": whole(16, 8000),
        "full_size": whole(16, 8000),
        "batch_size": whole(1, 65536),
        "balanced": SWITCH,
        "synthetic": {
            "seed": SEED, "train": whole(1), "validation": whole(1), "test": whole(1)
        },
    },
    "augment": {
        "dihedral": SWITCH,
        "mirror": SWITCH,
        "shift": number(0, 0.5),
        "brightness": number(0, 1),
        "contrast": number(0, 1),
        "colour": number(0, 1),
    },
    "loss": {
        "name": one_of("cross_entropy", "focal", "mse"),
        "class_weights": numbers(),
        "auxiliary": number(0),
        "focal_gamma": number(0),
        "ordinal": number(0),
    },
    "checkpoint": {"every": whole(1), "keep": whole(2)},
    "evaluation": {
        "every": whole(1),
        "batch_size": whole(1, 65536),
        "bootstrap": whole(0, 10**6),
        "decision": one_of("thresholds", "argmax"),
    },
    "logging": {"every": whole(1)},
}

ZOOM_IN_NET = {
    "model": {
        "name": TEXT,
        "backbone": TEXT,
        "crop_backbone": TEXT,
        "num_classes": CLASSES,
        "neck_features": whole(1, 8192),
        "attention_features": whole(1, 8192),
        "attention_kernel": Rule(lambda v: _is_int(v) and v in (1, 3, 5), "1, 3 or 5"),
        "init_from": FOLDER,
        "crop_init": CROP_INIT,
        "crop_size": whole(8),
        "num_regions": whole(1, 100),
        "mask_size": whole(1),
        "mask_scope": one_of("level", "all"),
        "coords": one_of("resize", "receptive_field"),
        "mean": numbers(3),
        "std": STD,
        "local_width": Rule(
            lambda v: v == 0 or number(0.005, 0.5).accepts(v), "0 or a number from 0.005 to 0.5"
        ),
        "local_gain": number(0),
    },
}

GLOBAL_ATTENTION = {
    "model": {
        "name": TEXT,
        "backbone": TEXT,
        "init_from": FOLDER,
        "stem": one_of("full", "small"),
        "width": number(0.01, 4),
        "attend": TEXT,
        "num_classes": CLASSES,
        "mean": numbers(3),
        "std": STD,
    },
    "attention": {
        "source": SOURCE,
        "classifier": one_of("linear", "conv"),
        "hidden": whole(1, 1024),
        "temperature": number(1e-3),
        "bias": number(-100),
        "smoothing": number(0, 0.5),
        "boundary": one_of("fixed", "two_class"),
        "learning_rate": number(0),
        "area": number(0),
        "total_variation": number(0),
        "binarisation": number(0),
        "kept": whole(0, 1000),
    },
    "data": {
        "channels": Rule(lambda v: _is_int(v) and v in (1, 3), "1 or 3"),
        "frame": one_of("whole", "cropped"),
    },
}

MODELS = {
    "zoom_in_net": ZOOM_IN_NET, "m_net": ZOOM_IN_NET, "global_attention": GLOBAL_ATTENTION}

# Keys of MODELS that came when there were runs already: by these values those go on as they did.
LATER = {"model.init_from": "", "model.width": 1.0, "data.frame": "whole"}
# … and keys of PHASE.
LATER_OF_PHASES = {"remat": "none"}


def load_page(
    path: str, overrides: Sequence[tuple[str, str]] = ()
) -> ml_collections.ConfigDict:
  """Runs the page `path`, applies `overrides` ((dotted key, text) pairs) and checks it all.

  A page may import those beside it, and those of the folder above.

  Raises:
    UserError: the page is missing, broken or without get_config(); a key is unknown (the nearest
      is named) or a value is not what the key accepts.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise UserError(f"--config={path}: no such file; accepted: a page such as configs/demo.py")
  with _siblings(file.resolve().parent):
    try:
      page = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
      where = getattr(error, "lineno", None)
      at = f" line {where}" if where else ""
      raise UserError(f"--config={path}:{at} cannot be run: {_one_line(error)}") from error
    if not callable(page.get("get_config")):
      raise UserError(f"--config={path}: has no function get_config() that returns a ConfigDict")
    try:
      config = page["get_config"]()
    except (Exception, SystemExit) as error:
      raise UserError(f"--config={path}: get_config() failed: {_one_line(error)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
        f"--config={path}: get_config() returned {type(config).__name__}, accepted: ConfigDict"
    )
  try:
    config = ml_collections.ConfigDict(config, sort_keys=False)  # thawed, if it was frozen
    for key, text in overrides:
      _override(config, key, text)
    check(config, source=f"--config={path}")
  except ml_collections.config_dict.RequiredValueError:
    raise UserError(f"--config={path}: holds a required placeholder; accepted: values") from None
  return config


@contextlib.contextmanager
def _siblings(folder: pathlib.Path) -> Iterator[None]:
  """Pages there and above can be imported meanwhile; others of the same names later."""
  places = [folder, folder.parent]
  sys.path[:0] = map(str, places)
  before = set(sys.modules)
  try:
    yield
  finally:
    for place in places:
      sys.path.remove(str(place))
    for name in set(sys.modules) - before:
      if pathlib.Path(getattr(sys.modules[name], "__file__", None) or "/").parent in places:
        del sys.modules[name]


def from_dict(values: Mapping[str, Any], source: str = "config.json") -> ml_collections.ConfigDict:
  """The ConfigDict of a stored nested dict, completed and checked.

  Raises UserError as `load_page`.
  """
  if not isinstance(values, Mapping):
    raise UserError(f"{source}: holds {type(values).__name__}, accepted: the keys of a config page")
  try:
    config = ml_collections.ConfigDict(completed(values), sort_keys=False)
  except Exception as error:
    raise UserError(f"{source}: is no config: {_one_line(error)}") from error
  check(config, source=source)
  return config


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
  """A stored config with the keys that have come since, as LATER has them."""
  values = dict(values)
  model = values.get("model")
  named = str(model.get("name")) if isinstance(model, Mapping) else ""
  for key, value in LATER.items():
    group, _, name = key.partition(".")
    if name in MODELS.get(named, {}).get(group, {}) and isinstance(values.get(group), Mapping):
      values[group] = {name: value, **values[group]}
  if isinstance(values.get("phases"), Mapping):
    values["phases"] = {
        name: {**LATER_OF_PHASES, **page} if isinstance(page, Mapping) else page
        for name, page in values["phases"].items()}
  return values


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """A plain nested dict that JSON can carry: tuples become lists."""
  return {
      key: to_dict(value)
      if isinstance(value, ml_collections.ConfigDict)
      else list(value)
      if isinstance(value, tuple)
      else value
      for key, value in config.items()
  }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted key: value} of a nested dict."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def check(config: ml_collections.ConfigDict, source: str = "config") -> None:
  """Raises UserError unless `config` has exactly the keys of the schema with accepted values."""
  if not isinstance(config.get("phases"), ml_collections.ConfigDict) or not config.phases.keys():
    raise UserError(f"{source}: phases is missing; accepted: phases.<name>.steps and so on")
  _check_level(config, _schema(config), "", source)
  weights = config.loss.class_weights
  if len(weights) not in (0, config.model.num_classes):
    raise UserError(
        f"{source}: loss.class_weights has {len(weights)} numbers; accepted: () or "
        f"model.num_classes = {config.model.num_classes} of them"
    )
  if any(w < 0 for w in weights) or (len(weights) and not any(weights)):
    raise UserError(
        f"{source}: loss.class_weights = {tuple(weights)}: accepted: none below zero, not all zero"
    )
  for small, large in (("image_size", "full_size"),):
    if config.data[small] > config.data[large]:
      raise UserError(
          f"{source}: data.{small} = {config.data[small]} is larger than data.{large} = "
          f"{config.data[large]}; accepted: at most data.{large}"
      )
  if config.model.get("crop_size", 0) > config.data.full_size:
    raise UserError(
        f"{source}: model.crop_size = {config.model.crop_size} is larger than data.full_size = "
        f"{config.data.full_size}; accepted: at most data.full_size"
    )


def _schema(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The keys of a page, by its model.name."""
  model = config.get("model")
  name = model.get("name") if isinstance(model, ml_collections.ConfigDict) else None
  own = MODELS.get(name if isinstance(name, str) else "", ZOOM_IN_NET)
  groups = {key: PAGE.get(key, {}) | rules for key, rules in own.items()}
  return PAGE | groups | {"phases": {name: PHASE for name in config.phases}}


def _check_level(config, schema, prefix, source):
  for key in config:
    if key not in schema:
      raise UserError(
          f"{source}: unknown key {prefix}{key}{nearest(key, list(schema))}; "
          f"accepted: {', '.join(schema)}"
      )
  for key, rule in schema.items():
    if key not in config:
      raise UserError(f"{source}: the key {prefix}{key} is missing; every key must be present")
    value = config[key]
    if isinstance(rule, dict):
      if not isinstance(value, ml_collections.ConfigDict):
        raise UserError(
            f"{source}: {prefix}{key} = {value!r}; accepted: the keys {', '.join(rule)}"
        )
      _check_level(value, rule, f"{prefix}{key}.", source)
    elif not rule.accepts(value):
      hint = nearest(value, rule.choices)
      raise UserError(f"{source}: {prefix}{key} = {value!r}{hint}; accepted: {rule.words}")


def _override(config, key, text):
  """Sets the dotted `key` of `config` to `text`, read as the type that the key holds."""
  flag = f"--config.{key}"
  node, parts = config, key.split(".")
  for depth, part in enumerate(parts):
    known = list(node.keys()) if isinstance(node, ml_collections.ConfigDict) else []
    if part not in known:
      below = ".".join(parts[:depth])
      every = list(flatten(to_dict(config)))
      raise UserError(
          f"{flag}: unknown key{nearest(key, every)}; accepted"
          f"{' under ' + below if below else ''}: {', '.join(known) or 'nothing'}"
      )
    if depth < len(parts) - 1:
      node = node[part]
  old = node[parts[-1]]
  if isinstance(old, ml_collections.ConfigDict):
    members = ", ".join(f"{flag}.{k}" for k in old)
    raise UserError(f"{flag}: is a group of keys; accepted: {members}")
  node.unlock()
  with node.ignore_type():
    node[parts[-1]] = _read(flag, text, old)


def _read(flag, text, old):
  if isinstance(old, str):
    return text
  names = {bool: "True or False", int: "a whole number", float: "a number", tuple: "a tuple"}
  try:
    value = {"true": True, "false": False}.get(text.lower())
    value = ast.literal_eval(text) if value is None else value
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    value = text
  if isinstance(old, float) and _is_int(value):
    value = float(value)
  if isinstance(old, tuple | list):
    value = tuple(value) if isinstance(value, tuple | list) else (value,)
  if type(value) is not (tuple if isinstance(old, list) else type(old)):
    words = names.get(type(old), type(old).__name__)
    raise UserError(f"{flag}={text}: accepted: {words}, such as {old!r}")
  return value


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text}" if text else type(error).__name__
