"""`synthetic_fundus`: the drawn photographs of data/synthetic.py as a TFDS data set.

It is generated where it is missing, by all cores, and read like every other set.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys

from medattn_jax.data import schema, synthetic
from medattn_jax.data.backend import tfds
from medattn_jax.data.datasets import drawn

SPAWN_FROM = 12  # fewer patients are drawn sooner than a process is started


@dataclasses.dataclass(kw_only=True)
class SyntheticFundusConfig(tfds.core.BuilderConfig):
  """Which patients to draw, and how large; train, validation and test are numbers of patients."""

  seed: int
  size: int
  train: int
  validation: int
  test: int


class SyntheticFundus(tfds.core.GeneratorBasedBuilder):
  """Both eyes of drawn patients; the splits are disjoint ranges of patient numbers."""

  name = "synthetic_fundus"
  VERSION = tfds.core.Version(schema.VERSION)
  BUILDER_CONFIGS = []  # noqa: RUF012 (TFDS reads a plain list)
  num_classes = schema.LEVELS
  region = None
  frame = "cropped"

  def _info(self):
    return self.dataset_info_from_configs(
      description="Drawn fundus photographs with lesions, graded 0-4 (see data/synthetic.py).",
      features=schema.features(self.builder_config.size),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return drawn.splits(self.name, "patients", self.builder_config, self._generate_examples)

  def _generate_examples(self, progress, patients):
    config = self.builder_config
    draw = functools.partial(synthetic.draw_example, config.seed, size=config.size)
    for example in drawn.draw_all(draw, patients, SPAWN_FROM):
      progress.add(len(example["images"]))
      yield example["patient"], example


def build(data_dir, *, seed: int, size: int, train: int, validation: int, test: int):
  """The builder of this set, generated first if it is not there yet.

  Args:
    data_dir: TFDS data directory; the set goes to DIR/synthetic_fundus/<config>/<version>.
    seed, size: what to draw, and its pixels a side.
    train, validation, test: numbers of patients; a split of 0 is left out.

  Raises:
    UserError: a number that makes no set, or a directory that cannot be written.
  """
  numbers = {"seed": seed, "size": size, "train": train, "validation": validation, "test": test}
  least = {"seed": 0, "size": 16, "train": 1, "validation": 0, "test": 0}
  drawn.check(SyntheticFundus.name, numbers, {k: (v, sys.maxsize) for k, v in least.items()})
  config = SyntheticFundusConfig(
    name=f"size{size}_seed{seed}_{train}_{validation}_{test}",
    description=f"{train}/{validation}/{test} patients, {size} pixels, seed {seed}",
    **numbers,
  )
  return drawn.build(
    functools.partial(
      SyntheticFundus, data_dir=os.fspath(data_dir), config=config, file_format=schema.FILE_FORMAT
    ),
    data_dir,
  )
