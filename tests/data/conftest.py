"""A folder as a camera leaves it, and a small set on disk."""

from __future__ import annotations

import csv
import io
import pathlib
import types
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from medattn_jax.data import schema


def eye_picture(width: int, height: int, seed: int = 0) -> np.ndarray:
  """uint8 [height, width, 3]: a bright disc with structure on black, as a fundus camera's."""
  rows, columns = np.mgrid[:height, :width]
  radius = 0.46 * min(height, width)
  y, x = (rows - height / 2) / radius, (columns - width / 2) / radius
  chance = np.random.default_rng(seed)
  a, b, c = chance.uniform(2, 5, 3)
  colour = np.stack([190 + 40 * np.sin(a * x), 90 + 30 * np.cos(b * y), 40 + 20 * x * y * c], -1)
  return np.where((x**2 + y**2 < 1)[..., None], colour, 2).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  if kind == "JPEG":
    options = {"quality": 95, **options}
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  (tmp_path / "raw").mkdir()
  return tmp_path / "raw"


@pytest.fixture
def data(tmp_path) -> pathlib.Path:
  return tmp_path / "data"


@pytest.fixture(scope="session")
def read() -> Callable:
  """read(data_dir, source, split, size=None, channels=None): what a prepared set holds.

  Images uint8 [n, S, S, C], as stored unless asked otherwise, levels and names.
  """
  from medattn_jax.data import pipeline
  from medattn_jax.data.datasets import prepared

  def read(data_dir, source, split, size=None, channels=None):
    size = size or prepared.read_index(data_dir / source / schema.VERSION)["full_size"]
    dataset = pipeline.open_dataset(source, data_dir, full_size=size)
    count, channels = dataset.splits[split], channels or dataset.channels
    images = np.stack(list(
      pipeline.photographs(dataset, split, range(count), full_size=size, channels=channels)))
    batches = pipeline.eval_batches(dataset, split, batch_size=4, full_size=size, pairs=False)
    names = [str(name) for batch in batches for name in batch["image_id"][:, 0]]
    return images, dataset.photo_levels(split), names[:count]

  return read


@pytest.fixture(scope="session")
def rejected_of() -> Callable[[pathlib.Path], dict[str, str]]:
  """rejected_of(data_dir): {file: reason} of its rejected.csv."""
  def rejected_of(data_dir):
    with open(data_dir / "rejected.csv", newline="", encoding="utf-8") as file:
      lines = list(csv.reader(file))
    assert lines[0] == ["file", "reason"]
    return dict(lines[1:])

  return rejected_of


@pytest.fixture(scope="session")
def no_set() -> Callable[[pathlib.Path, str], bool]:
  """no_set(data_dir, source): neither a set nor half of one is there."""
  def no_set(data_dir, source):
    return not (data_dir / source).exists() and not list(data_dir.glob(".building*"))

  return no_set


class Camera:
  """Writes pictures and a labels.csv into a folder."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    folder.mkdir(parents=True, exist_ok=True)

  def picture(self, name: str, width: int = 120, height: int = 90, seed: int = 0, **options):
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(eye_picture(width, height, seed), **options))
    return path

  def sheet(self, rows, columns=("image", "level"), **dialect) -> None:
    with open(self.folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
      csv.writer(file, **dialect).writerows([columns, *rows])

  def both(self, names, **options) -> None:
    """Pictures of these names, each of its own content, labelled 0, 1, 2, 3, 4, 0, …"""
    for number, name in enumerate(names):
      self.picture(name, seed=number, **options)
    self.sheet([(name, number % 5) for number, name in enumerate(names)])


@pytest.fixture
def camera(tmp_path) -> Camera:
  return Camera(tmp_path / "camera")


SIZE = 48


def example_of(number: int) -> dict:
  """Example `number` of the small set: one or two eyes, and up to four boxes."""
  eyes = 1 + (number % 3 > 0)
  pictures = [eye_picture(SIZE, SIZE, seed=10 * number + eye) for eye in range(eyes)]
  return {
    "patient": f"{number:03}",
    "images": [io.BytesIO(encoded(picture, subsampling=0)) for picture in pictures],
    "image_ids": [f"é {number}, {eye}" for eye in range(eyes)],
    "eyes": ["left", "right"][:eyes],
    "levels": [(number + eye) % 5 for eye in range(eyes)],
    "boxes": [
      {"eye": i % eyes, "type": i, "box": np.array([i, 1, 20 + i, number + 2], np.float32)}
      for i in range(number % 5)
    ],
  }


def write_small_set(folder: pathlib.Path, counts=(("train", 11), ("test", 5))) -> pathlib.Path:
  from medattn_jax.data.datasets import prepared

  def make(directory):
    examples = {s: lambda n=n: map(example_of, range(n)) for s, n in counts}
    return prepared.Prepared(source="csv", full_size=SIZE, examples=examples, data_dir=directory)

  return prepared.install(make, folder, {"made": "for tests"})


@pytest.fixture(scope="session")
def small_set(tmp_path_factory) -> pathlib.Path:
  """The data_dir of a set "csv" of 11 training and 5 test patients, SIZE pixels."""
  folder = tmp_path_factory.mktemp("small")
  write_small_set(folder)
  return folder


@pytest.fixture(scope="session")
def make() -> types.SimpleNamespace:
  """The functions above, for tests that want other pictures or sets."""
  return types.SimpleNamespace(
    eye_picture=eye_picture, encoded=encoded, example_of=example_of, write_small_set=write_small_set
  )
