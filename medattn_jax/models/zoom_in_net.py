"""Zoom-in-Net and its M-Net alone (papers.md §1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from medattn_jax import augment, contrast, crops
from medattn_jax.models.attention import AttentionNet
from medattn_jax.models.norm import Array, ConvBN


class MainNet(nn.Module):
  """M-Net: backbone, neck (1×1 convolution, normalisation, ReLU), global pooling, pair head.

  Each eye is computed once; the head sees [own ‖ fellow].
  """

  backbone: Callable
  num_classes: int
  neck_features: int
  group_size: int | None
  momentum: float
  dtype: Any

  @nn.compact
  def __call__(self, view: Float[Array, "p 2 h w 3"], train: bool):
    """Returns (y_M [P, 2, classes], M [P, 2, h, w, neck_features], pair [P, 2, 2·neck_features]).

    y_M and pair (the pooled features, own ‖ fellow) are float32.
    """
    options = {"group_size": self.group_size, "momentum": self.momentum, "dtype": self.dtype}
    patients = view.shape[0]
    x = view.reshape(-1, *view.shape[2:])
    _, stops = self.backbone(name="backbone", **options)(x, train=train)
    m = ConvBN(self.neck_features, name="neck", **options)(stops["features"], train)
    m = m.reshape(patients, 2, *m.shape[1:])
    pooled = m.astype(jnp.float32).mean((2, 3))
    pair = jnp.concatenate([pooled, pooled[:, ::-1]], -1)
    # Small, not zero: answers start even, and the backbone has a gradient from the first step.
    y = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="head")(pair)
    return y, m, pair


class CropNet(nn.Module):
  """C-Net: pooled features of each crop, their maximum, joined by M-Net's pooled pair features."""

  backbone: Callable
  num_classes: int
  group_size: int | None
  momentum: float
  dtype: Any

  @nn.compact
  def __call__(
    self, patches: Float[Array, "p 2 n s s 3"], pair: Float[Array, "p 2 d"], train: bool,
  ) -> Float[Array, "p 2 classes"]:
    """Returns y_C, float32."""
    patients, eyes, regions = patches.shape[:3]
    # The crops of group_size images are normalised together.
    group = None if self.group_size is None else self.group_size * regions
    backbone = self.backbone(
      group_size=group, momentum=self.momentum, dtype=self.dtype, name="backbone")
    _, stops = backbone(patches.reshape(-1, *patches.shape[3:]), train=train)
    pooled = stops["pooled"].reshape(patients, eyes, regions, -1).max(2)
    # Zero: the joint phase begins exactly from what the two earlier phases answer.
    return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(
      jnp.concatenate([pooled, pair], -1))


class MNet(nn.Module):
  """M-Net alone: small view → logits of both eyes. Attributes as of `ZoomInNet`."""

  backbone: Callable
  num_classes: int = 5
  neck_features: int = 1024
  image_size: int = 492
  group_size: int | None = None
  norm_momentum: float = 0.9
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  local_width: float = 0.0
  local_gain: float = 4.0
  dtype: Any = jnp.float32

  def setup(self):
    self.m_net = MainNet(
      self.backbone, self.num_classes, self.neck_features, self.group_size, self.norm_momentum,
      self.dtype)

  def __call__(
    self, image: UInt8[Array, "p 2 full full 3"], *, drawn: augment.Draw | None = None,
    phase: str = "joint", train: bool = False,
  ) -> tuple[Float[Array, "p 2 classes"], dict[str, Array]]:
    """Returns (y_M, {"M", "y_M"}); see `ZoomInNet`. The one phase is "joint"."""
    if phase != "joint":
      raise ValueError(f"phase {phase!r}: joint")
    view, _ = small_view(self, moved(image, drawn), drawn)
    y, m, _ = self.m_net(view, train)
    return y, {"M": m, "y_M": y}


class ZoomInNet(nn.Module):
  """M-Net finds features, A-Net says where to look, C-Net looks there at full resolution.

  Attributes:
    backbone, crop_backbone: constructors taking (group_size, momentum, dtype, name); the
      module answers (logits, {"features" [B, h, w, c], "pooled" [B, d]}).
    image_size: side of the small view that M-Net sees.
    attention_features, attention_kernel: see `AttentionNet`.
    crop_size: side of a crop, in pixels of the full image.
    num_regions, mask_size, mask_scope, coords: see `crops.select_regions`.
    group_size: images normalised together (C-Net: all their crops); None, the whole batch.
    norm_momentum: share of the running statistics kept by an update.
    mean, std: of the input's three channels.
    local_width, local_gain: of the local contrast (see `contrast`), before all else; 0 for none.
    dtype: of the arithmetic; parameters, statistics, softmax and answers are float32.
  """

  backbone: Callable
  crop_backbone: Callable
  num_classes: int = 5
  neck_features: int = 1024
  attention_features: int = 1024
  attention_kernel: int = 3
  image_size: int = 492
  crop_size: int = 384
  num_regions: int = 4
  mask_size: int = 200
  mask_scope: str = "level"
  coords: str = "resize"
  group_size: int | None = None
  norm_momentum: float = 0.9
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  local_width: float = 0.0
  local_gain: float = 4.0
  dtype: Any = jnp.float32

  def setup(self):
    norm = (self.group_size, self.norm_momentum, self.dtype)
    self.m_net = MainNet(self.backbone, self.num_classes, self.neck_features, *norm)
    self.a_net = AttentionNet(
      self.num_classes, self.attention_features, self.attention_kernel, *norm)
    self.c_net = CropNet(self.crop_backbone, self.num_classes, *norm)

  def __call__(
    self, image: UInt8[Array, "p 2 full full 3"], *, drawn: augment.Draw | None = None,
    phase: str = "c", train: bool = False,
  ) -> tuple[Float[Array, "p 2 classes"], dict[str, Array]]:
    """Answers both eyes of each patient.

    Args:
      image: the full image, once; the small view and the crops are made of it here.
      drawn: the augmentation of the P·2 images: of the full image, so of view and crops alike.
      phase: "m": M-Net alone; "a": A-Net on a fixed M-Net; "c": all three.
      train: normalise by the batch. A fixed branch never does, and has no gradient.

    Returns:
      The logits (the sum of the branches' answers, float32) and the named stops of the phase:
      M [P, 2, h, w, neck_features]; S, A, G [P, 2, h, w, classes] float32; y_M, y_A, y_C;
      boxes int32 [P, 2, regions, (y0, x0, y1, x1)] in pixels of the full image.
    """
    if phase not in ("m", "a", "c"):
      raise ValueError(f"phase {phase!r}: one of m, a, c")
    patients = image.shape[0]  # len() is no number where any number of them is exported
    image = moved(image, drawn)
    view, means = small_view(self, image, drawn)
    y_m, m, pair = self.m_net(view, train and phase != "a")
    if phase == "m":
      return y_m, {"M": m, "y_M": y_m}
    if phase == "a":
      y_m, m, pair = jax.lax.stop_gradient((y_m, m, pair))

    apart = lambda x: x.reshape(patients, 2, *x.shape[1:])
    together = lambda x: x.reshape(patients * 2, *x.shape[2:])
    y_a, maps = self.a_net(together(m), train)
    y_a = apart(y_a)
    centres = crops.select_regions(
      jax.lax.stop_gradient(maps["G"]), self.image_size, self.mask_size, self.num_regions,
      self.mask_scope, self.coords)
    first = crops.corners(centres, self.image_size, image.shape[2], self.crop_size)
    out = {"M": m, "y_M": y_m, "y_A": y_a, **{name: apart(x) for name, x in maps.items()},
           "boxes": apart(jnp.concatenate([first, first + self.crop_size], -1))}
    if phase == "a":
      return y_m + y_a, out

    y_c = self.c_net(patches(self, image, first, means, drawn), pair, train)
    return y_m + y_a + y_c, {**out, "y_C": y_c}


def hand_on(variables: dict, phase: str, crop_init: str) -> dict:
  """What the phases before leave to `phase`: C-Net may begin with M-Net's layers. [choice]

  The paper begins both from ImageNet; where there are no such weights, M-Net's are the nearest.

  Args:
    variables: {"params", "batch_stats"}; not changed.
    crop_init: "m_net": of the two backbones' layers those of equal name and shapes; or "random"
      to leave all as it is, as is any folder of weights, with which C-Net began already.
  """
  if phase != "c" or crop_init != "m_net":
    return variables
  handed = {}
  for kind, branches in variables.items():
    if "backbone" not in branches.get("c_net", {}) or "backbone" not in branches["m_net"]:
      handed[kind] = branches  # batch_stats, of a backbone that normalises nothing
      continue
    own, given = branches["c_net"]["backbone"], branches["m_net"]["backbone"]
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    alike = [name for name in own if name in given and shapes(own[name]) == shapes(given[name])]
    # Buffers of its own: a step is given them to overwrite.
    own = {**own, **{name: jax.tree.map(jnp.copy, given[name]) for name in alike}}
    handed[kind] = {**branches, "c_net": {**branches["c_net"], "backbone": own}}
  return handed


def moved(image, drawn):
  """The images [P, 2, s, s, 3], turned and shifted as drawn."""
  return augment.move(image.reshape(-1, *image.shape[2:]), drawn).reshape(image.shape)


def small_view(model: MNet | ZoomInNet, image, drawn):
  """The normalised small view [P, 2, s, s, 3] of the full images, and their local means or None."""
  size, means = model.image_size, None
  view = crops.small_view(image.reshape(-1, *image.shape[2:]), size, model.dtype)
  if model.local_width:
    means = contrast.local_means(view, model.local_width)
    view = contrast.subtract(view, means, model.local_gain)
  view = view.reshape(*image.shape[:2], size, size, 3)
  return augment.normalise(view, drawn, model.mean, model.std, model.dtype), means


def patches(model: ZoomInNet, image, first, means, drawn):
  """The normalised crops [P, 2, n, s, s, 3] at the corners `first` [P·2, n, 2] of the full images.

  `means`: of small_view.
  """
  found = crops.cut(image.reshape(-1, *image.shape[2:]), first, model.crop_size)
  if means is not None:
    found = contrast.subtract_crops(
      found.astype(jnp.float32) / 255, means, first, image.shape[2], model.local_gain)
  found = found.reshape(*image.shape[:2], *found.shape[1:])
  return augment.normalise(found, drawn, model.mean, model.std, model.dtype)
