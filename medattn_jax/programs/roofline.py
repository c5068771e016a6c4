"""The time that a compiled program needs at least, by a chip's data sheet: a model, no measurement.

A step takes as long as its arithmetic at the chip's peak or its bytes at the memory's bandwidth,
whichever is longer, and then its collectives, as if nothing hid them.
"""

from __future__ import annotations

from typing import NamedTuple

from medattn_jax.programs.chips import Chip

LAUNCH = 10e-6  # seconds that a collective costs however little it carries [choice]


class Bound(NamedTuple):
  """Seconds of one step on one device.

  Attributes:
    arithmetic, memory, collectives: each part alone.
    compiler: its own estimate of all but the collectives, of TPUs alone.
  """

  arithmetic: float
  memory: float
  collectives: float
  compiler: float | None

  @property
  def seconds(self) -> float:
    """The longest of what is known of the program, and its collectives."""
    return max(self.arithmetic, self.memory, self.compiler or 0.0) + self.collectives

  @property
  def by(self) -> str:
    """What bounds it: "arithmetic", "memory", "collectives", or "on-chip work" where the compiler
    expects more time than both units could take: of vector units, tiles half full, VMEM."""
    parts = {name: getattr(self, name) for name in ("arithmetic", "memory", "collectives")}
    parts["on-chip work"] = self.compiler or 0.0
    return max(parts, key=parts.get)


def bound(flops: float, hbm: float, wire: float, launches: int, devices: int, chip: Chip,
          compiler: float | None = None, hosts: int = 1) -> Bound:
  """The bound of a step of so many operations, and bytes of memory and of collectives, a device.

  hosts: between which there is the chip's network alone.
  """
  return Bound(
    flops / chip.flops, hbm / chip.bandwidth,
    reduced(wire, devices, chip, hosts) + (launches * LAUNCH if devices > 1 else 0.0), compiler)


def reduced(count: float, devices: int, chip: Chip, hosts: int = 1) -> float:
  """Seconds of rings' all-reduce of so many bytes: each crosses a link twice, but for 1/n.

  Over several hosts, each chip reduces its share of what its host has reduced with its fellows.
  """
  here = devices // hosts
  inside = 2 * (here - 1) / here * count / chip.link
  return inside + 2 * (hosts - 1) / hosts * (count / here) / chip.network
