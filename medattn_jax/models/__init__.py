"""The models by name: tables, and two constructors that read them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medattn_jax.errors import UserError, nearest
from medattn_jax.models import global_attention, pixel_classifier, zoom_in_net
from medattn_jax.models.backbones.cnn import CNN
from medattn_jax.models.backbones.densenet import DenseNet
from medattn_jax.models.backbones.googlenet import GoogLeNet
from medattn_jax.models.backbones.inception_resnet_v2 import InceptionResNetV2
from medattn_jax.models.backbones.inception_v3 import InceptionV3
from medattn_jax.models.backbones.resnet import ResNet
from medattn_jax.models.backbones.resnet_small import ResNetSmall
from medattn_jax.models.backbones.vgg import VGG16
from medattn_jax.models.global_attention import GlobalAttention, Joint
from medattn_jax.models.zoom_in_net import MNet, ZoomInNet

BACKBONES = {
  "cnn": CNN,
  "inception_resnet_v2": InceptionResNetV2,
  "inception_v3": InceptionV3,
  "resnet_small": ResNetSmall,
  "resnet_local": functools.partial(ResNetSmall, blocks=(0, 1, 0)),
  "googlenet": GoogLeNet,
  "vgg16": VGG16,
  "vgg16_bn": functools.partial(VGG16, norm=True),
  "resnet18": ResNet,
  "resnet50": functools.partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
  "densenet121": DenseNet,
}

# What M-Net asks of a backbone beyond its name: to end where the paper splits it, or in features.
TRUNKS = {
  "inception_resnet_v2": {"final_conv": False}, "vgg16": {"hidden": None},
  "vgg16_bn": {"hidden": None}}

# Backbones whose stem a TPU computes in blocks of pixels (see `blocks`): the same numbers, sooner.
IN_BLOCKS = ("inception_resnet_v2", "inception_v3")

# Heads that a backbone has in training beside its own.
AUXILIARY = {"googlenet": ("aux1", "aux2")}

# The smallest picture, in pixels a side, of which a backbone leaves features; of the others 1.
# (With stem="small" 16 is enough for any that has it.)
SMALLEST = {
  "inception_resnet_v2": 75, "inception_v3": 75, "googlenet": 15, "vgg16": 32, "vgg16_bn": 32,
  "densenet121": 29}

# Phases in order, and the branches trained in each.
PHASES = {
  "zoom_in_net": {"m": ("m_net",), "a": ("a_net",), "c": ("m_net", "a_net", "c_net")},
  "m_net": {"joint": ("m_net",)},
  "global_attention": {"joint": ("backbone", "pixel_classifier"), "frozen": ("backbone",)},
}

# Branches that are needed to train and not to answer.
TRAINING_ONLY = {"pixel_classifier"}

# Images of one example: both eyes of a patient, or one image of an aligned set.
IMAGES = {"zoom_in_net": 2, "m_net": 2, "global_attention": 1}

# What each phase grades: the first with weight one, the others with loss.auxiliary.
GRADED = {
  "zoom_in_net": {"m": ("y_M",), "a": ("y_A",), "c": ("logits", "y_M", "y_A", "y_C")},
  "m_net": {"joint": ("y_M",)},
  "global_attention": {"joint": ("logits",), "frozen": ("logits",)},
}

# The answers a model can be asked for: sums of these named stops.
ANSWERS = {
  "zoom_in_net": {
    "m_net": ("y_M",), "m_a": ("y_M", "y_A"), "zoom_in_net": ("y_M", "y_A", "y_C")},
  "m_net": {"m_net": ("y_M",)},
  "global_attention": {},
}

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build(config: Any, platform: str = "", remat: str = "none") -> nn.Module:
  """The model of a config page, arranged for the devices of a platform ("tpu", …), its backbones
  computing twice in training what `remat` says (one of remat.MODES): all arrangements have the same
  variables and give the same answers.

  Raises:
    UserError: a name that is in none of the tables.
  """
  model = config.model
  _named("model.name", model.name, PHASES)
  if model.name == "global_attention":
    return _global_attention(config, remat)
  options = {
    "num_classes": model.num_classes, "neck_features": model.neck_features,
    "image_size": config.data.image_size, "mean": tuple(model.mean), "std": tuple(model.std),
    "local_width": model.local_width, "local_gain": model.local_gain,
    "group_size": config.norm.group_size, "norm_momentum": config.norm.momentum,
    "dtype": _named("precision", config.precision, PRECISIONS),
    "backbone": functools.partial(
      _arranged("model.backbone", model.backbone, platform), remat=remat,
      **TRUNKS.get(model.backbone, {})),
  }
  if model.name == "m_net":
    return MNet(**options)
  return ZoomInNet(
    crop_backbone=functools.partial(
      _arranged("model.crop_backbone", model.crop_backbone, platform), remat=remat),
    attention_features=model.attention_features, attention_kernel=model.attention_kernel,
    crop_size=model.crop_size,
    num_regions=model.num_regions, mask_size=model.mask_size, mask_scope=model.mask_scope,
    coords=model.coords, **options)


def _global_attention(config: Any, remat: str) -> nn.Module:
  model = config.model
  backbone = _named("model.backbone", model.backbone, BACKBONES)
  options = {"remat": remat, **({"aux": True} if model.backbone in AUXILIARY else {})}
  if model.backbone in attending():
    options |= {"stem": model.stem, "width": model.width}
  return GlobalAttention(
    backbone=functools.partial(backbone, **options),
    num_classes=model.num_classes, attends=config.attention.source != "none",
    attend=model.attend, mean=tuple(model.mean), std=tuple(model.std),
    group_size=config.norm.group_size, norm_momentum=config.norm.momentum,
    dtype=_named("precision", config.precision, PRECISIONS))


def attending() -> dict[str, tuple[str, ...]]:
  """The backbones that a global attention can stand before, and their stages."""
  kinds = {name: getattr(made, "func", made) for name, made in BACKBONES.items()}
  return {name: kind.STAGES for name, kind in kinds.items() if hasattr(kind, "STAGES")}


def image_shape(config: Any) -> tuple[int, int, int, int]:
  """The images of one example: how many, their height, width and channels."""
  size = config.data.full_size
  channels = config.data.channels if config.model.name == "global_attention" else 3
  return IMAGES[config.model.name], size, size, channels


def trained(config: Any, phase: str) -> tuple[str, ...]:
  """The branches that a phase trains."""
  branches = PHASES[config.model.name][phase]
  if config.model.name == "global_attention" and config.attention.source == "none":
    return tuple(name for name in branches if name not in TRAINING_ONLY)
  return branches


def graded(config: Any, phase: str) -> tuple[str, ...]:
  """What a phase grades: the first with weight one, the others with loss.auxiliary."""
  return GRADED[config.model.name][phase] + AUXILIARY.get(config.model.backbone, ())


def common(config: Any, phase: str) -> Joint | None:
  """What all images of an update share and is made anew at each step of the phase, or None."""
  if "pixel_classifier" in trained(config, phase):
    return Joint(config.attention.to_dict())
  return None


def draw_classifier(config: Any, key: jax.Array, rows: int) -> dict[str, Any]:
  """The pixel classifier's first params, {} for a model that has none.

  Args:
    rows: of its first layer, see bank.rows_of.
  """
  if config.model.name != "global_attention" or config.attention.source == "none":
    return {}
  page = config.attention
  if page.source == "free":
    _, *size, _ = image_shape(config)
    return {"pixel_classifier": {"scores": jnp.full(size, float(page.bias))}}
  return {"pixel_classifier": pixel_classifier.init(
    key, page.classifier, rows, page.hidden, float(page.bias))}


def hand_on(config: Any, phase: str, variables: dict[str, Any]) -> dict[str, Any]:
  """The variables with which `phase` begins, of those with which the phase before it ended."""
  if config.model.name == "zoom_in_net":
    return zoom_in_net.hand_on(variables, phase, config.model.crop_init)
  if config.model.name == "global_attention":
    return global_attention.hand_on(variables, phase, config.attention.boundary)
  return variables


def of_one_kind(*names: str) -> bool:
  """Whether the backbones are variants of one network: what they share has equal names."""
  return len({getattr(BACKBONES[name], "func", BACKBONES[name]) for name in names}) == 1


def backbone(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
  """A backbone by itself: net.apply(variables, x, train=False) → (logits, out).

  x is float [B, H, W, 3]; logits float32 [B, num_classes], None without classes; out holds
  "features" [B, h, w, c] and "pooled" [B, d] float32. `options`: group_size, momentum, dtype,
  remat, and what else the backbone's class lists.

  Raises:
    UserError: an unknown name.
  """
  return _named("backbone", name, BACKBONES)(num_classes=num_classes, **options)


def _arranged(key: str, name: str, platform: str) -> Any:
  """The constructor of a backbone, arranged for a platform."""
  constructor = _named(key, name, BACKBONES)
  in_blocks = platform == "tpu" and name in IN_BLOCKS
  return functools.partial(constructor, blocks=True) if in_blocks else constructor


def _named(key: str, name: str, table: Mapping[str, Any]) -> Any:
  """table[name], or a UserError that names the key, the nearest name and all of them."""
  if name in table:
    return table[name]
  raise UserError(f"{key}={name!r}: one of {', '.join(table)}{nearest(name, table)}")
