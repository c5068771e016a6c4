"""The pixel classifier: which pixels of an aligned set matter (papers.md §2).

A pixel's features are its intensities in all images of the bank. The bank is uint8 and spread over
the devices along its images, and so is the classifier's first layer: each device passes once over
its own slice, one sum of [H, W] joins them, and the gradient costs one pass more. Standardising
(the mean over images of each pixel removed, one global scale, 1/√features) is part of the
arithmetic; neither it nor a float copy of the bank is ever stored.

Shapes: R rows (N images of C channels each, planar: row n·C + c), M outputs, H × W pixels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, UInt8

from medattn_jax import platforms

Params = dict[str, Any]

# Rows that are float at a time where they must be: a slice's temporaries, whatever the bank.
_BLOCK_BYTES = 4 << 20
_TAPS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def init(key: Key[Array, ""], classifier: str, rows: int, hidden: int, bias: float) -> Params:
  """Parameters: what lies below "rows" is spread over the devices with the bank, along axis 0.

  linear: logistic regression, from zero. conv: 3×3 convolution over the R rows to `hidden`
  channels, ReLU, 1×1 convolution; means over taps and over channels, not sums, so that a step of
  Adam moves the scores about as far as it moves linear's. Its channels begin in pairs that cancel:
  with either classifier every pixel begins at σ(bias).
  """
  if classifier == "linear":
    return {"rows": {"kernel": jnp.zeros((rows, 1))}, "bias": jnp.full((1,), bias)}
  inner, outer = jax.random.split(key)
  pairs = hidden // 2
  taps = jax.random.normal(inner, (rows, len(_TAPS), hidden - pairs)) * (2 * len(_TAPS)) ** 0.5
  out = jax.random.normal(outer, (pairs,))
  return {
    "rows": {"kernel": jnp.concatenate([taps, taps[..., :pairs]], -1).reshape(rows, -1)},
    "hidden_bias": jnp.zeros((hidden,)),
    "out": jnp.concatenate([out, jnp.zeros((hidden % 2,)), -out]),
    "bias": jnp.full((1,), bias)}


def summand(
  kernel: Float[Array, "r m"], images: Num[Array, "r h w"], valid: Float[Array, " r"],
  mean: Float[Array, "c h w"], scale: Float[Array, ""],
) -> Float[Array, "m h w"]:
  """A device's share of the first layer's answers; the sum over the devices is the layer's.

  Args:
    kernel: the rows of the first layer that belong to `images`.
    images: uint8 (float32 for `stats`).
    valid: 1, or 0 for rows that fill the bank up to a size that divides over the devices.
    mean: over all images of the bank, of each channel.
    scale: what standardised features are multiplied by.
  """
  kernel = kernel * valid[:, None]
  total = kernel.reshape(-1, len(mean), kernel.shape[1]).sum(0)
  return scale * (project(kernel, images) - _of_mean(total, mean))


def batch_summands(
  kernel: Float[Array, "r m"], images: UInt8[Array, "1 b e h w c"]
) -> dict[str, Array]:
  """As `summand` where the bank is the update's own images: their statistics are summed too."""
  images = images.reshape(-1, *images.shape[3:])
  planes = images.transpose(0, 3, 1, 2)
  wide = planes.astype(jnp.float32) / 255
  return {
    "answers": project(kernel, planes.reshape(-1, *planes.shape[2:])) / 255,
    "kernel": kernel.reshape(-1, images.shape[-1], kernel.shape[1]).sum(0),
    "mean": wide.sum(0), "square": jnp.square(wide).sum(), "rows": jnp.float32(len(kernel))}


def batch_answers(total: dict[str, Array]) -> Float[Array, "m h w"]:
  """The standardised first layer's answers from the sums of `batch_summands`."""
  mean = total["mean"] / (total["rows"] / len(total["mean"]))
  spread = total["square"] / (total["rows"] * mean[0].size) - jnp.square(mean).mean()
  scale = jax.lax.rsqrt(jnp.maximum(spread, 1e-8) * total["rows"])
  return scale * (total["answers"] - _of_mean(total["kernel"], mean))


def _of_mean(kernel, mean):
  """What is taken from answers that are nearly as large: a TPU would round both to 8 bits."""
  return jnp.einsum("cm,chw->mhw", kernel, mean, precision="highest")


def scores(answers: Float[Array, "m h w"], params: Params) -> Float[Array, "h w"]:
  """The classifier's logit of each pixel, from the first layer's answers."""
  if "out" not in params:
    return answers[0] + params["bias"][0]
  _, height, width = answers.shape
  answers = answers.reshape(len(_TAPS), -1, height, width)
  padded = jnp.pad(answers, ((0, 0), (0, 0), (1, 1), (1, 1)))
  hidden = sum(
    padded[tap, :, 1 + row : 1 + row + height, 1 + column : 1 + column + width]
    for tap, (row, column) in enumerate(_TAPS))
  hidden = jax.nn.relu(hidden / len(_TAPS) + params["hidden_bias"][:, None, None])
  return jnp.einsum("f,fhw->hw", params["out"] / len(hidden), hidden) + params["bias"][0]


@jax.custom_vjp
def project(kernel: Float[Array, "r m"], images: Num[Array, "r h w"]) -> Float[Array, "m h w"]:
  """Σ over rows of kernel × images, one pass over the images. They have no gradient."""
  return platforms.dependent(
    kernel, images, cuda=_fused, tpu=_product, default=_blocked)


def _project_forward(kernel, images):
  return project(kernel, images), images


def _project_backward(images, gradient):
  kernel = platforms.dependent(
    gradient, images, cuda=_fused_gradient, tpu=_product_gradient, default=_blocked_gradient)
  return kernel, None


project.defvjp(_project_forward, _project_backward)


# One kernel that reads bytes and adds: nothing else than the bank crosses the memory's wires.
def _fused(kernel, images):
  if kernel.shape[1] > 1:
    return _blocked(kernel, images)
  return (kernel[:, :, None] * images.astype(jnp.float32)).sum(0, keepdims=True)


def _fused_gradient(gradient, images):
  if len(gradient) > 1:
    return _blocked_gradient(gradient, images)
  return (gradient * images.astype(jnp.float32)).sum((1, 2))[:, None]


# One matrix product, into which a TPU's compiler takes the conversion. (Elsewhere it would make a
# float copy of the bank; and a slice of the rows would make a TPU turn the whole bank around.)
def _product(kernel, images):
  return jnp.einsum("rm,rhw->mhw", kernel, images.astype(jnp.float32))


def _product_gradient(gradient, images):
  return jnp.einsum("mhw,rhw->rm", gradient, images.astype(jnp.float32))


# Matrix products over a few rows at a time, that stay in the cache while they are float.
def _blocked(kernel, images):
  pixels = images.reshape(len(images), -1)

  def add(total, begin, rows):
    taken = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, rows)
    return total + taken(kernel).T @ taken(pixels).astype(jnp.float32)

  total = jnp.zeros((kernel.shape[1], pixels.shape[1]))
  total = _over_blocks(add, total, pixels.shape)
  return total.reshape(-1, *images.shape[1:])


def _blocked_gradient(gradient, images):
  pixels, gradient = images.reshape(len(images), -1), gradient.reshape(len(gradient), -1)

  def put(kernel, begin, rows):
    block = jax.lax.dynamic_slice_in_dim(pixels, begin, rows).astype(jnp.float32)
    return jax.lax.dynamic_update_slice_in_dim(kernel, block @ gradient.T, begin, 0)

  return _over_blocks(put, jnp.zeros((len(images), len(gradient))), pixels.shape)


def _over_blocks(body, carry, shape):
  """body(carry, first row, how many) over all rows, a block at a time."""
  rows = min(shape[0], max(1, _BLOCK_BYTES // (4 * shape[1])))
  whole = shape[0] // rows
  carry = jax.lax.fori_loop(0, whole, lambda i, c: body(c, i * rows, rows), carry)
  rest = shape[0] - whole * rows
  return body(carry, whole * rows, rest) if rest else carry
