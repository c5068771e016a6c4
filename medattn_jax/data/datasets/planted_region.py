"""`planted_region`: the drawn images of data/planted.py as a TFDS data set, with their region.

It is generated where it is missing, stored without loss, and read like every other set.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys

from medattn_jax.data import planted, schema
from medattn_jax.data.backend import tfds
from medattn_jax.data.datasets import drawn

SPAWN_FROM = 4000  # fewer images are drawn sooner than processes are started


@dataclasses.dataclass(kw_only=True)
class PlantedRegionConfig(tfds.core.BuilderConfig):
  """Which images to draw, and how large; train, validation and test are numbers of images."""

  seed: int
  size: int
  train: int
  validation: int
  test: int
  num_classes: int


class PlantedRegion(tfds.core.GeneratorBasedBuilder):
  """Single gray images; the splits are disjoint ranges of their numbers."""

  name = "planted_region"
  frame = "whole"
  VERSION = tfds.core.Version(schema.VERSION)
  BUILDER_CONFIGS = []  # noqa: RUF012 (TFDS reads a plain list)

  @property
  def num_classes(self):
    return self.builder_config.num_classes

  @property
  def region(self):
    return planted.region(self.builder_config.seed, self.builder_config.size)

  def _info(self):
    return self.dataset_info_from_configs(
      description="Drawn images whose class is told in one region (see data/planted.py).",
      features=schema.features(self.builder_config.size, channels=1, encoding="png"),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return drawn.splits(self.name, "images", self.builder_config, self._generate_examples)

  def _generate_examples(self, progress, numbers):
    config = self.builder_config
    draw = functools.partial(
      planted.draw_example, config.seed, size=config.size, num_classes=config.num_classes
    )
    for number, example in zip(numbers, drawn.draw_all(draw, numbers, SPAWN_FROM), strict=True):
      progress.add(1)
      yield number, example


def build(
  data_dir, *, seed: int, size: int, train: int, validation: int, test: int, num_classes: int = 2
):
  """The builder of this set, generated first if it is not there yet.

  Args:
    data_dir: TFDS data directory; the set goes to DIR/planted_region/<config>/<version>.
    seed, size: what to draw, and its pixels a side.
    train, validation, test: numbers of images; a split of 0 is left out.
    num_classes: 2 to 4.

  Raises:
    UserError: a number that makes no set, or a directory that cannot be written.
  """
  numbers = {
    "seed": seed, "size": size, "train": train, "validation": validation, "test": test,
    "num_classes": num_classes,
  }  # fmt: skip
  most = sys.maxsize
  drawn.check(PlantedRegion.name, numbers, {
    "seed": (0, most), "size": (16, 8000), "train": (1, most), "validation": (0, most),
    "test": (0, most), "num_classes": (2, 4),
  })  # fmt: skip
  config = PlantedRegionConfig(
    name=f"size{size}_seed{seed}_{train}_{validation}_{test}_classes{num_classes}",
    description=f"{train}/{validation}/{test} images, {num_classes} classes, {size} pixels, "
                f"seed {seed}",
    **numbers,
  )
  return drawn.build(
    functools.partial(
      PlantedRegion, data_dir=os.fspath(data_dir), config=config, file_format=schema.FILE_FORMAT
    ),
    data_dir,
  )
