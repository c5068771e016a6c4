"""Eight virtual CPU devices for every test, and the way to the project's shared material."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """The folder of golden answers and real photographs beside the checkout."""
  folder = pathlib.Path(__file__).resolve().parents[1].parent / "shared"
  if not folder.is_dir():
    pytest.skip("no ../shared beside the checkout: golden answers and real photographs are there")
  return folder
