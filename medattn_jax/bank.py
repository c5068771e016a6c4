"""The bank of a global attention: all aligned images of a training set, as bytes on the devices.

What the pixel classifier reads at each step (papers.md §2). It is made once, from the pipeline's
photographs, spread over the devices along its images, and never leaves them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medattn_jax import processes, sharding
from medattn_jax.errors import UserError

SHARE = 0.8  # of a device's memory that a bank may take: the model and its step need the rest


class Bank(NamedTuple):
  """Rows on a mesh: row n·C + c is channel c of image n.

  Attributes:
    arrays: images uint8 (of `stats` float32) [R, H, W] and valid float32 [R], spread along R; mean
      float32 [C, H, W] and scale float32 [], on each device. See pixel_classifier.summand.
    checksum: SHA-256 of the images in their order; "" for shapes alone.
  """

  arrays: dict[str, Any]
  checksum: str

  @property
  def rows(self) -> int:
    return self.arrays["images"].shape[0]


def kind(source: str) -> str:
  """"bank" of "bank:400"; any other source is its own kind."""
  return source.partition(":")[0]


def choose(source: str, levels: np.ndarray, seed: int) -> np.ndarray:
  """The numbers of the images in the bank, ascending.

  All of them; or the K of bank:K, drawn from the seed such that every class keeps its share (the
  largest remainders round, no class that occurs is left out where K allows it).

  Args:
    levels: int [n]; of all training images.

  Raises:
    UserError: none, or fewer than K images.
  """
  count = len(levels)
  if not count:
    raise UserError(f"attention.source = {source}: the training split has no images")
  wanted = int(source.partition(":")[2] or count) if kind(source) == "bank" else count
  if wanted > count:
    raise UserError(
      f"attention.source = {source}: the training split has {count} images; accepted: bank, or "
      f"bank:K with K up to {count}")
  if wanted == count:
    return np.arange(count)
  rng = np.random.default_rng(seed)
  classes, sizes = np.unique(levels, return_counts=True)
  exact = wanted * sizes / count
  share = np.maximum(np.floor(exact).astype(int), 1)
  for one in np.argsort(np.floor(exact) - exact, kind="stable"):  # largest remainders first
    share[one] += share.sum() < wanted
  while share.sum() > wanted:  # more classes than images, or many of one image
    share[share.argmax()] -= 1
  chosen = [
    rng.choice(np.flatnonzero(levels == own), take, replace=False)
    for own, take in zip(classes, share, strict=True)]
  return np.sort(np.concatenate(chosen))


def rows_of(source: str, images: int, channels: int, classes: int, batch: int) -> int:
  """Rows of the first layer: a multiple of what they may be spread over; 0 without a first layer.

  A batch's rows are as many as it has; a bank is filled up, so that its checkpoint fits any number
  of devices that divides 64 (1,024 from 8,192 images on).
  """
  if kind(source) in ("none", "free"):
    return 0
  if kind(source) == "batch":
    return batch * channels
  images = 2 * classes if source == "stats" else images
  step = 64 if images < 8192 else 1024
  return -(-images // step) * step * channels


def check_fits(source: str, rows: int, size: int, channels: int, mesh: Mesh) -> None:
  """Raises UserError where a device has no room for its share of a bank of `rows`."""
  _check_divides(rows, mesh)
  if kind(source) != "bank":
    return
  needed = rows // mesh.size * size * size
  room = min(_room(device) for device in mesh.local_devices)
  if needed <= SHARE * room:
    return
  step = 64 * channels * size * size
  most = int(SHARE * room) * mesh.size // step * 64
  other = f"attention.source=bank:{most}" if most else "smaller images"
  raise UserError(
    f"attention.source = {source}: the bank takes {needed:,} bytes of each of {mesh.size} devices, "
    f"which have {int(SHARE * room):,} for it ({SHARE:.0%} of {room:,}); accepted: more devices, "
    f"or {other}")


def _check_divides(rows: int, mesh: Mesh) -> None:
  if rows % mesh.size:
    raise UserError(
      f"{mesh.size} devices: the {rows} rows of the bank do not divide over them; accepted: a "
      "number of devices that is a power of two")


def _room(device: jax.Device) -> int:
  """Bytes that are free on a device; a host's devices share its memory."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()


def own_images(rows: int, count: int, channels: int) -> range:
  """Which of the bank's `count` images this process holds, of `rows` in all."""
  each = rows // channels // jax.process_count()
  begin = jax.process_index() * each
  return range(min(begin, count), min(begin + each, count))


def fill(
  photographs: Iterable[np.ndarray], rows: int, count: int, size: int, channels: int, mesh: Mesh
) -> Bank:
  """The bank of the images that come, which are this process's own in order.

  Args:
    photographs: uint8 [size, size, channels] each.
    rows, count: of the whole bank, and its images.

  Raises:
    UserError: an image of another size.
  """
  own = own_images(rows, count, channels)
  images = np.zeros((rows // channels // jax.process_count(), channels, size, size), np.uint8)
  total, square = np.zeros((channels, size, size), np.int64), 0
  digests = []
  for place, photograph in enumerate(photographs):
    if photograph.shape != (size, size, channels):
      raise UserError(
        f"image {own.start + place} of the bank has the shape {list(photograph.shape)}; accepted: "
        f"[{size}, {size}, {channels}], as all others")
    images[place] = photograph.transpose(2, 0, 1)
    total += images[place]
    square += int(np.square(images[place].astype(np.uint32)).sum(dtype=np.int64))
    digests.append(hashlib.sha256(images[place].tobytes()).hexdigest())
  if len(digests) != len(own):
    raise UserError(f"the bank was given {len(digests)} images; accepted: {len(own)}")
  shares = processes.gather({"square": square, "digests": digests})
  sums = processes.gather_rows({"total": total.reshape(1, -1)})["total"].sum(0)
  mean = sums.reshape(total.shape) / count
  features = count * channels
  spread = sum(share["square"] for share in shares) / (features * size * size)
  spread -= np.square(mean).mean()
  checksum = hashlib.sha256("".join(d for s in shares for d in s["digests"]).encode()).hexdigest()
  return _placed(
    images.reshape(-1, size, size), len(own) * channels, mean.astype(np.float32),
    1 / np.sqrt(max(spread, 1e-8) * features), rows, mesh, checksum)


def class_statistics(
  photographs: Iterable[np.ndarray], levels: np.ndarray, classes: int, rows: int, mesh: Mesh
) -> Bank:
  """The bank of `stats`: of each class the mean and the standard deviation of each pixel.

  Both are centred on their average over the classes and scaled to deviation one as a whole.

  Args:
    photographs: uint8 [H, W, C]; all training images, in every process.
    levels: int [n]; their classes.
  """
  counts = np.bincount(levels, minlength=classes)
  sums = squares = None
  digest = hashlib.sha256()
  for photograph, level in zip(photographs, levels, strict=True):
    plane = photograph.transpose(2, 0, 1)
    digest.update(np.ascontiguousarray(plane).tobytes())
    if sums is None:
      sums = np.zeros((classes, *plane.shape))
      squares = np.zeros_like(sums)
    sums[level] += plane
    squares[level] += np.square(plane.astype(np.float64))
  divisor = np.maximum(counts, 1)[:, None, None, None]
  means = sums / divisor
  deviations = np.sqrt(np.maximum(squares / divisor - np.square(means), 0))
  there = counts > 0
  made = []
  for table in (means, deviations):
    centred = (table - table[there].mean(0)) * there[:, None, None, None]
    made.append(centred / max(centred[there].std(), 1e-8))
  table = np.concatenate(made).astype(np.float32)
  _, channels, height, width = table.shape
  own = rows // jax.process_count()
  planes = np.zeros((rows, height, width), np.float32)
  planes[: len(table) * channels] = table.reshape(-1, height, width)
  begin = own * jax.process_index()
  valid = max(0, min(own, len(table) * channels - begin))
  return _placed(
    planes[begin : begin + own], valid, np.zeros((channels, height, width), np.float32),
    1 / np.sqrt(len(table) * channels), rows, mesh, digest.hexdigest())


def _placed(images, valid, mean, scale, rows, mesh, checksum) -> Bank:
  split, copied = sharding.batched(mesh), sharding.replicated(mesh)
  flags = (np.arange(len(images)) < valid).astype(np.float32)
  local = lambda x: jax.make_array_from_process_local_data(split, x, (rows, *x.shape[1:]))
  arrays = {"images": local(images), "valid": local(flags)}
  arrays |= sharding.place(
    {"mean": mean, "scale": np.float32(scale)}, {"mean": copied, "scale": copied})
  return Bank(arrays, checksum)


def abstract(source: str, rows: int, size: int, channels: int, mesh: Mesh) -> Bank:
  """The shapes of a bank on a mesh, nothing allocated: what a step is lowered with."""
  dtype = np.float32 if source == "stats" else np.uint8
  shapes: Mapping[str, tuple] = {
    "images": ((rows, size, size), dtype, P(sharding.AXIS)),
    "valid": ((rows,), np.float32, P(sharding.AXIS)),
    "mean": ((channels, size, size), np.float32, P()), "scale": ((), np.float32, P())}
  return Bank({
    name: jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
    for name, (shape, kind, spec) in shapes.items()}, "")
