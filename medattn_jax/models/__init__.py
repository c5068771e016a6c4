"""The models by name: tables, and two constructors that read them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from medattn_jax.errors import UserError, nearest
from medattn_jax.models import zoom_in_net
from medattn_jax.models.backbones.densenet import DenseNet
from medattn_jax.models.backbones.googlenet import GoogLeNet
from medattn_jax.models.backbones.inception_resnet_v2 import InceptionResNetV2
from medattn_jax.models.backbones.inception_v3 import InceptionV3
from medattn_jax.models.backbones.resnet import ResNet
from medattn_jax.models.backbones.resnet_small import ResNetSmall
from medattn_jax.models.backbones.vgg import VGG16
from medattn_jax.models.zoom_in_net import MNet, ZoomInNet

BACKBONES = {
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

# The smallest picture, in pixels a side, of which a backbone leaves features; of the others 1.
# (With stem="small" 16 is enough for any that has it.)
SMALLEST = {
  "inception_resnet_v2": 75, "inception_v3": 75, "googlenet": 15, "vgg16": 32, "vgg16_bn": 32,
  "densenet121": 29}

# Phases in order, and the branches trained in each.
PHASES = {
  "zoom_in_net": {"m": ("m_net",), "a": ("a_net",), "c": ("m_net", "a_net", "c_net")},
  "m_net": {"joint": ("m_net",)},
}

# What each phase grades: the first with weight one, the others with loss.auxiliary.
GRADED = {
  "zoom_in_net": {"m": ("y_M",), "a": ("y_A",), "c": ("logits", "y_M", "y_A", "y_C")},
  "m_net": {"joint": ("y_M",)},
}

# The answers a model can be asked for: sums of these named stops.
ANSWERS = {
  "zoom_in_net": {
    "m_net": ("y_M",), "m_a": ("y_M", "y_A"), "zoom_in_net": ("y_M", "y_A", "y_C")},
  "m_net": {"m_net": ("y_M",)},
}

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build(config: Any) -> nn.Module:
  """The model of a config page.

  Raises:
    UserError: a name that is in none of the tables.
  """
  model = config.model
  options = {
    "num_classes": model.num_classes, "neck_features": model.neck_features,
    "image_size": config.data.image_size, "mean": tuple(model.mean), "std": tuple(model.std),
    "local_width": model.local_width, "local_gain": model.local_gain,
    "group_size": config.norm.group_size, "norm_momentum": config.norm.momentum,
    "dtype": _named("precision", config.precision, PRECISIONS),
    "backbone": functools.partial(
      _named("model.backbone", model.backbone, BACKBONES), **TRUNKS.get(model.backbone, {})),
  }
  _named("model.name", model.name, PHASES)
  if model.name == "m_net":
    return MNet(**options)
  return ZoomInNet(
    crop_backbone=_named("model.crop_backbone", model.crop_backbone, BACKBONES),
    attention_features=model.attention_features, attention_kernel=model.attention_kernel,
    crop_size=model.crop_size,
    num_regions=model.num_regions, mask_size=model.mask_size, mask_scope=model.mask_scope,
    coords=model.coords, **options)


def hand_on(config: Any, phase: str, variables: dict[str, Any]) -> dict[str, Any]:
  """The variables with which `phase` begins, of those with which the phase before it ended."""
  if config.model.name == "zoom_in_net":
    return zoom_in_net.hand_on(variables, phase, config.model.crop_init)
  return variables


def of_one_kind(*names: str) -> bool:
  """Whether the backbones are variants of one network: what they share has equal names."""
  return len({getattr(BACKBONES[name], "func", BACKBONES[name]) for name in names}) == 1


def backbone(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
  """A backbone by itself: net.apply(variables, x, train=False) → (logits, out).

  x is float [B, H, W, 3]; logits float32 [B, num_classes], None without classes; out holds
  "features" [B, h, w, c] and "pooled" [B, d] float32. `options`: group_size, momentum, dtype,
  and what else the backbone's class lists.

  Raises:
    UserError: an unknown name.
  """
  return _named("backbone", name, BACKBONES)(num_classes=num_classes, **options)


def _named(key: str, name: str, table: Mapping[str, Any]) -> Any:
  """table[name], or a UserError that names the key, the nearest name and all of them."""
  if name in table:
    return table[name]
  raise UserError(f"{key}={name!r}: one of {', '.join(table)}{nearest(name, table)}")
