"""Global spatial attention: one weight map, shared by all images of an aligned set (papers.md §2).

The map is a constant of this module. In training the step computes it, once for all images of an
update, from the pixel classifier (`Joint`); what is trained is exported with the map alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from medattn_jax import augment, sharding
from medattn_jax.models import pixel_classifier, two_classes


class GlobalAttention(nn.Module):
  """A backbone that sees each image weighted by the map.

  Attributes:
    backbone: constructor taking (num_classes, group_size, momentum, dtype, name).
    attends: False leaves the map out altogether: the backbone alone, which then needs no stages.
    attend: "input", or the name of the backbone's stage whose features are weighted.
    mean, std: of the input's channels. The weights multiply what is normalised: a pixel without
      weight has the mean intensity. [choice]
    group_size, norm_momentum, dtype: as of `ZoomInNet`.
  """

  backbone: Callable
  num_classes: int
  attends: bool = True
  attend: str = "input"
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  group_size: int | None = None
  norm_momentum: float = 0.9
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, image: UInt8[Array, "p e s s c"], *, drawn: augment.Draw | None = None,
    phase: str = "joint", train: bool = False,
  ) -> tuple[Float[Array, "p e classes"], dict[str, Array]]:
    """Answers each image.

    Args:
      image: c is 1 (gray) or 3; the backbone is given three channels, each with its own mean and
        std.
      drawn: the augmentation of the P·E images: shaded before the map, moved after it, since the
        map lives in image coordinates.
      phase: "joint" or "frozen": the step's affair, the answer is the same.
      train: normalise by the batch.

    Returns:
      The logits, float32, and {"features"} (and "aux1", "aux2" of a GoogLeNet in training).
    """
    del phase
    x = image.reshape(-1, *image.shape[2:])
    x = augment.normalise(x, drawn, self.mean, self.std, jnp.float32)
    stage = None
    if self.attends:
      weights = self.variable("constants", "map", jnp.ones, x.shape[1:3]).value[None, :, :, None]
      if self.attend == "input":
        x = x * weights
      else:
        each = jnp.broadcast_to(weights, (len(x), *weights.shape[1:]))
        stage = self._weighing(augment.move(each, drawn))
    x = augment.move(x, drawn).astype(self.dtype)
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    backbone = self.backbone(
      num_classes=self.num_classes, group_size=self.group_size, momentum=self.norm_momentum,
      dtype=self.dtype, name="backbone")
    options = {}
    if hasattr(backbone, "STAGES"):
      options = {"chance": None if drawn is None else drawn.chance, "stage": stage}
    logits, out = backbone(x, train=train, **options)
    apart = lambda y: y.reshape(*image.shape[:2], *y.shape[1:])
    kept = {name: apart(y) for name, y in out.items() if name != "pooled"}
    return apart(logits), kept

  def _weighing(self, weights):
    """Multiplies the chosen stage by the weights [B, s, s, 1], averaged down to its grid."""

    def weigh(name, x):
      if name != self.attend:
        return x
      size = (len(x), *x.shape[1:3], 1)
      return x * jax.image.resize(weights, size, "linear", antialias=True).astype(x.dtype)

    return weigh


def smoothed(scores: Float[Array, "h w"], width: float) -> Float[Array, "h w"]:
  """Gaussian means of deviation `width` (a share of the side): neighbours share their evidence.

  The scores are linear in the features, so this is as if the features were smoothed. [choice]
  """
  for axis, size in enumerate(scores.shape):
    place = jnp.arange(size) / size
    weights = jax.nn.softmax(-jnp.square((place[:, None] - place) / width) / 2, axis=1)
    scores = jnp.tensordot(weights, scores, (1, axis)) if axis == 0 else scores @ weights.T
  return scores


def hand_on(variables: dict, phase: str, boundary: str) -> dict:
  """What the phases before leave to `phase`: the map is frozen, its boundary drawn by then."""
  if phase != "frozen" or boundary == "fixed" or not variables["constants"]:
    return variables
  return {**variables, "constants": {"map": two_classes.split(variables["constants"]["map"])}}


class Joint:
  """How each step of the joint phase comes by its map: a step.Common.

  Args:
    attention: the page's `attention`, its source not "none".
  """

  branch = "pixel_classifier"

  def __init__(self, attention: Mapping[str, Any]):
    self.page = attention
    self.source = attention["source"].partition(":")[0]
    spread = {"images": P(sharding.AXIS), "valid": P(sharding.AXIS), "mean": P(), "scale": P()}
    self.reads = {} if self.source in ("free", "batch") else {"bank": spread}

  def partial(self, params: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Array]:
    """A device's summand: of the answers [M, H, W]; of a batch's statistics too."""
    if self.source == "free":
      return {}
    kernel = params["rows"]["kernel"]
    if self.source == "batch":
      return pixel_classifier.batch_summands(kernel, batch["image"])
    return {"answers": pixel_classifier.summand(kernel, **batch["bank"])}

  def finish(self, total: Mapping[str, Array], params: Mapping[str, Any]) -> dict[str, Array]:
    """{"map" [H, W]} from the sum over the devices."""
    if self.source == "free":
      scores = params["scores"]
    else:
      answers = (
        pixel_classifier.batch_answers(total) if self.source == "batch" else total["answers"])
      scores = pixel_classifier.scores(answers, params)
    if self.page["smoothing"]:
      scores = smoothed(scores, self.page["smoothing"])
    return {"map": jax.nn.sigmoid(scores / self.page["temperature"])}

  def penalty(self, constants: Mapping[str, Array]) -> Array:
    """Area, total variation and binarisation, each a mean over the pixels."""
    weights, page = constants["map"], self.page
    variation = sum(jnp.abs(jnp.diff(weights, axis=axis)).mean() for axis in (0, 1))
    return (page["area"] * weights.mean() + page["total_variation"] * variation
            + page["binarisation"] * (weights * (1 - weights)).mean())

  def keep(
    self, old: Mapping[str, Array], new: Mapping[str, Array], age: Array
  ) -> Mapping[str, Array]:
    """The map to answer with: this update's; of `batch`, whose maps differ, a moving average."""
    if self.source != "batch":
      return new
    age = age.astype(jnp.float32)
    decay = jnp.minimum(0.99, age / (10 + age))
    return jax.tree.map(lambda o, n: decay * o + (1 - decay) * n, old, new)
