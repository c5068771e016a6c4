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


@pytest.fixture(scope="session")
def smoke_config(tmp_path_factory):
  """The smoke page with tiny backbones; its photographs are drawn in this session's folder."""
  from medattn_jax import config

  page = pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py"
  return config.load_page(str(page), [
    ("data.dir", str(tmp_path_factory.mktemp("data"))), ("data.synthetic.train", "8"),
    ("model.backbone", "resnet_tiny"), ("model.crop_backbone", "resnet_tiny"),
    ("evaluation.batch_size", "4")])


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, smoke_config):
  """A workdir of the smoke page: step 12, phase c, weights drawn by chance. Not to be changed."""
  import numpy as np

  from medattn_jax import config, experiment
  from medattn_jax.checkpoint import Checkpoints
  from medattn_jax.workdir import Workdir

  place = Workdir(tmp_path_factory.mktemp("untrained") / "run")
  place.path.mkdir()
  now = experiment.build(smoke_config, "c", jax.devices()[:1])
  state = now.initial()
  rng = np.random.default_rng(0)

  def drawn(x):  # zero and near-zero layers (the heads) would answer the same for every photograph
    spread = rng.normal(0, 1 / np.sqrt(x[..., 0].size), x.shape) if x.ndim > 1 else 0
    return (np.asarray(x) + spread).astype(x.dtype)

  params = jax.tree.map(drawn, state.params)
  tree = {name: getattr(state, name) for name in state.__dataclass_fields__}
  tree |= {"params": params, "ema": params, "step": np.int32(12)}
  place.write_config(config.to_dict(smoke_config))
  meta = {"step": 12, "phase": "c", "phase_index": 2, "config": config.to_dict(smoke_config),
          "validated": True, "kappa": 0.5, "thresholds": [0.6, 1.4, 2.4, 3.4]}
  checkpoints = Checkpoints(place.checkpoints)
  checkpoints.save(12, tree, meta, score=0.5)
  checkpoints.wait()
  return place.path
