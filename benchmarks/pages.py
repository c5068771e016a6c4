"""Config pages by name, as plain data: for machines on which ml_collections is not installed.

What a training step reads of the real pages (configs/), the same values; a test holds the two
together. Of a backbone by itself there is a page too: a classifier of single images, without a map.
"""

from __future__ import annotations

import copy
from typing import Any

from medattn_jax.errors import UserError, nearest

SIZES = {  # pixels a side for which a backbone was published; of the others 224
  "inception_resnet_v2": 492, "inception_v3": 384, "resnet_small": 160, "resnet_local": 160,
  "cnn": 48}
PAIRS = ("demo", "zoom_in_net", "zoom_in_net_fast", "m_net")

# (batch of a device, pixels a side) of a model: small is for two cores, full for a card of 80 GB.
SHAPES = {
  "small": {"cnn": (32, 48), "resnet_small": (32, 160), "resnet_local": (32, 160),
            "resnet18": (16, 96), "resnet50": (8, 64), "vgg16": (4, 64), "densenet121": (4, 64),
            "inception_v3": (2, 96), "inception_resnet_v2": (2, 96), "demo": (8, 160),
            "m_net": (1, 96), "zoom_in_net": (1, 96), "zoom_in_net_fast": (1, 96)},
  "full": {"resnet50": (256, 224), "resnet18": (512, 224), "inception_resnet_v2": (64, 492),
           "inception_v3": (128, 384), "densenet121": (128, 224), "vgg16": (128, 224),
           "demo": (64, 160), "m_net": (32, 492), "zoom_in_net": (16, 492),
           "zoom_in_net_fast": (16, 492)},
}


class Page(dict):
  """A dictionary whose keys are attributes."""

  def __getattr__(self, name: str) -> Any:
    try:
      return self[name]
    except KeyError:
      raise AttributeError(name) from None

  def __setattr__(self, name: str, value: Any) -> None:
    if name not in self:
      raise AttributeError(name)
    self[name] = value

  def __deepcopy__(self, memo: dict) -> Page:
    return Page({key: copy.deepcopy(value, memo) for key, value in self.items()})

  def to_dict(self) -> dict[str, Any]:
    return {k: v.to_dict() if isinstance(v, Page) else v for k, v in self.items()}


def named(model: str) -> Page:
  """The page of a model: one of PAIRS, m_net:BACKBONE, or BACKBONE for a classifier.

  Raises:
    UserError: no such model.
  """
  from medattn_jax import models

  kind, _, backbone = model.partition(":")
  if backbone and (kind != "m_net" or backbone not in models.BACKBONES):
    raise UserError(f"model {model!r}{nearest(backbone, list(models.BACKBONES))}; accepted: "
                    f"m_net:BACKBONE, of {', '.join(models.BACKBONES)}")
  if kind in models.BACKBONES:
    return _classifier(kind)
  if kind not in PAIRS:
    raise UserError(f"model {model!r}{nearest(kind, [*PAIRS, *models.BACKBONES])}; accepted: "
                    f"{', '.join(PAIRS)}, m_net:BACKBONE, {', '.join(models.BACKBONES)}")
  if kind == "demo":
    return _demo()
  page = _paper() if kind in ("zoom_in_net", "m_net") else _fast()
  if kind == "m_net":
    page.model.name, page.model.backbone = "m_net", backbone or page.model.backbone
    page.phases = Page(joint=page.phases.m)
  return page


def phases(page: Page) -> tuple[str, ...]:
  """Those of a page that are measured: m, a and c, or the one that learns from nothing."""
  return ("joint",) if "joint" in page.phases else ("m", "a", "c")


def shape(model: str, size: str) -> tuple[int, int | None]:
  """(batch of a device, pixels a side) for a model at a benchmark's size."""
  return SHAPES[size].get(model.partition(":")[0], (8, None))


def adapted(
  page: Page, *, devices: int = 1, batch: int | None = None, precision: str | None = None,
  image_size: int | None = None, accumulation: int | None = None,
) -> Page:
  """A copy with other numbers; its groups of normalisation made to divide a device's images.

  Args:
    batch: of a small batch, over all devices: patients of pairs, else images.
    image_size: of the (small) view; the full image, crops and masks grow as it does.
    accumulation: small batches of an update, in all phases.

  Raises:
    UserError: a batch that does not divide over the devices.
  """
  page = copy.deepcopy(page)
  if image_size:
    grown = lambda size: max(1, round(size * image_size / page.data.image_size))
    for key in ("crop_size", "mask_size"):
      if key in page.model:
        page.model[key] = grown(page.model[key])
    page.data.full_size, page.data.image_size = grown(page.data.full_size), image_size
  page.data.batch_size = batch or page.data.batch_size
  page.precision = precision or page.precision
  for phase in page.phases.values():
    phase.accumulation = accumulation or phase.accumulation
  each = 1 if page.model.name == "global_attention" else 2
  if page.data.batch_size % devices:
    raise UserError(f"batch {page.data.batch_size} over {devices} devices; accepted: a multiple of "
                    f"{devices}")
  images = each * page.data.batch_size // devices
  page.norm.group_size = max(
    group for group in range(1, min(images, page.norm.group_size) + 1) if images % group == 0)
  return page


def plain(page: Page) -> Page:
  """A copy that does what any trainer does, so that another one can do the same.

  SGD with momentum, cross-entropy, one group; no augmentation, average of the params or local
  contrast.
  """
  page = copy.deepcopy(page)
  each = 1 if page.model.name == "global_attention" else 2
  page.norm.group_size = each * page.data.batch_size
  page.augment, page.loss = _augment(), _loss(0.0)
  if "local_width" in page.model:
    page.model.local_width = 0.0
  for name in page.phases:
    accumulation = page.phases[name].accumulation
    page.phases[name] = _phase(100, "sgd", 1e-3, "constant", accumulation=accumulation)
  return page


def describe(page: Page, phase: str) -> dict[str, Any]:
  """What of a page the lines of a benchmark show."""
  shown = {
    "model": page.model.name, "phase": phase, "backbone": page.model.backbone,
    "image_size": page.data.image_size, "full_size": page.data.full_size,
    "group_size": page.norm.group_size, "optimizer": page.phases[phase].optimizer,
    "accumulation": page.phases[phase].accumulation}
  if page.model.name == "zoom_in_net":
    shown |= {key: page.model[key] for key in ("crop_backbone", "crop_size", "num_regions")}
  return shown


def dtype_here() -> str:
  """The precision in which this machine's devices train: bfloat16, but on a CPU float32."""
  import jax

  return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def _phase(
  steps: int, optimizer: str, learning_rate: float, schedule: str, *, earlier_rate: float = 1.0,
  weight_decay: float = 0.0, warmup_steps: int = 0, accumulation: int = 1, clip_norm: float = 0.0,
  ema: float = 0.0, remat: str = "none",
) -> Page:
  return Page(
    steps=steps, learning_rate=learning_rate, earlier_rate=earlier_rate, optimizer=optimizer,
    momentum=0.9, weight_decay=weight_decay, schedule=schedule, warmup_steps=warmup_steps,
    decay_every=20_000, decay_rate=0.1, accumulation=accumulation, clip_norm=clip_norm, ema=ema,
    remat=remat)


def _augment(**changes: Any) -> Page:
  still = {"dihedral": False, "mirror": False, "shift": 0.0, "brightness": 0.0, "contrast": 0.0,
           "colour": 0.0}
  return Page(still | changes)


def _loss(ordinal: float) -> Page:
  return Page(name="cross_entropy", class_weights=(), auxiliary=0.3, focal_gamma=2.0,
              ordinal=ordinal)


def _data(full_size: int, image_size: int, batch_size: int, train: int) -> Page:
  return Page(full_size=full_size, image_size=image_size, batch_size=batch_size,
              synthetic=Page(train=train))


def _paper() -> Page:
  """configs/zoom_in_net.py."""
  return Page(
    seed=0, precision="bfloat16",
    model=Page(
      name="zoom_in_net", backbone="inception_resnet_v2", neck_features=1024,
      attention_features=1024, attention_kernel=3, crop_backbone="inception_v3", init_from="",
      crop_init="random", num_classes=5, num_regions=4, crop_size=384, mask_size=200,
      mask_scope="level", coords="resize", mean=(0.5,) * 3, std=(0.5,) * 3, local_width=0.0,
      local_gain=4.0),
    norm=Page(group_size=2, momentum=0.99), data=_data(1230, 492, 8, 2000),
    augment=_augment(dihedral=True), loss=_loss(0.0),
    phases=Page({
      name: _phase(steps, "sgd", 1e-5, "step", accumulation=12)
      for name, steps in (("m", 60_000), ("a", 20_000), ("c", 40_000))}),
    evaluation=Page(batch_size=16))


def _fast() -> Page:
  """configs/zoom_in_net_fast.py."""
  page = _paper()
  page.norm.group_size, page.data.batch_size = 8, 64
  page.augment = _augment(dihedral=True, brightness=0.1, contrast=0.2, colour=0.1)
  page.evaluation.batch_size = 64
  page.phases = Page({
    name: _phase(steps, "adamw", rate, "cosine", weight_decay=1e-2, warmup_steps=warmup,
                 clip_norm=1.0, ema=0.999)
    for name, steps, rate, warmup in
    (("m", 12_000, 1e-3, 1000), ("a", 3_000, 1e-3, 200), ("c", 8_000, 3e-4, 500))})
  return page


def _demo() -> Page:
  """configs/demo.py."""
  page = _paper()
  page.precision = "float32"
  page.model |= {
    "backbone": "resnet_local", "neck_features": 128, "attention_features": 64,
    "attention_kernel": 1, "crop_backbone": "resnet_small", "crop_init": "m_net", "crop_size": 112,
    "mask_size": 76, "mask_scope": "all", "local_width": 0.03, "local_gain": 2.0}
  page.norm = Page(group_size=16, momentum=0.9)
  page.data, page.loss = _data(400, 160, 16, 700), _loss(1.0)
  adamw = {"weight_decay": 1e-2, "clip_norm": 1.0}
  page.phases = Page(
    m=_phase(320, "adamw", 3e-3, "cosine", warmup_steps=30, ema=0.99, **adamw),
    a=_phase(160, "adamw", 3e-3, "cosine", warmup_steps=20, **adamw),
    c=_phase(220, "adamw", 3e-3, "cosine", warmup_steps=20, ema=0.99, earlier_rate=0.1, **adamw))
  return page


def _classifier(backbone: str) -> Page:
  """A backbone with a head over single images of three channels."""
  size = SIZES.get(backbone, 224)
  return Page(
    seed=0, precision="bfloat16",
    model=Page(
      name="global_attention", backbone=backbone, init_from="", stem="full", width=1.0,
      attend="input", num_classes=5, mean=(0.5,) * 3, std=(0.25,) * 3),
    attention=Page(source="none"), norm=Page(group_size=32, momentum=0.9),
    data=Page(_data(size, size, 32, 0) | {"channels": 3}), augment=_augment(), loss=_loss(0.0),
    phases=Page({name: _phase(100, "sgd", 1e-3, "constant") for name in ("joint", "frozen")}),
    evaluation=Page(batch_size=32))

