"""Eight virtual CPU devices for every test, and the way to the project's shared material."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

with contextlib.suppress(ImportError):
  import triton  # noqa: F401  PyTorch's: it ends a process that has TensorFlow already

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
def summed():
  """summed(lowered): the shape, as "3x4", of all that a program's all-reduces sum in float32."""
  return lambda lowered: re.findall(
    r'all_reduce"?\(.*?\) -> tensor<([\dx]*)xf32>', lowered.as_text(), re.DOTALL)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
  """made_once(name, make): a path of the session that make(path) made, in whichever process."""
  place = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    place = place.parent  # that of all of pytest's processes

  def made(name, make):
    with open(place / f"{name}.lock", "w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not (place / f"{name}.done").exists():
        make(place / name)
        (place / f"{name}.done").touch()
    return place / name

  return made


@pytest.fixture(scope="session")
def smoke_config(tmp_path_factory):
  """The smoke page with tiny backbones; its photographs are drawn in this session's folder."""
  from medattn_jax import config

  page = pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py"
  return config.load_page(str(page), [
    ("data.dir", str(tmp_path_factory.mktemp("data"))), ("data.synthetic.train", "8"),
    ("model.backbone", "resnet_small"), ("model.crop_backbone", "resnet_small"),
    ("evaluation.batch_size", "4")])


@pytest.fixture(scope="session")
def make_untrained(tmp_path_factory):
  """make(config, phase): a workdir with one checkpoint, step 12, of weights drawn by chance.

  `constants`, where given, makes the checkpoint's own of the params that were drawn.
  """
  import numpy as np

  from medattn_jax import config, experiment
  from medattn_jax.checkpoint import Checkpoints
  from medattn_jax.workdir import Workdir

  def make(page, phase, constants=None):
    place = Workdir(tmp_path_factory.mktemp("untrained") / "run")
    place.path.mkdir()
    state = experiment.build(page, phase, jax.devices()[:1]).initial()
    rng = np.random.default_rng(0)

    def drawn(x):  # zero and near-zero layers (the heads) would answer the same for all
      spread = rng.normal(0, 1 / np.sqrt(x[..., 0].size), x.shape) if x.ndim > 1 else 0
      return (np.asarray(x) + spread).astype(x.dtype)

    tree = {name: getattr(state, name) for name in state.__dataclass_fields__}
    tree["params"] = jax.tree.map(drawn, state.params)
    if constants:
      tree["constants"] = constants(tree["params"])
    tree |= {"ema": None if state.ema is None else tree["params"], "step": np.int32(12)}
    place.write_config(config.to_dict(page))
    meta = {"step": 12, "phase": phase, "phase_index": 0, "config": config.to_dict(page),
            "validated": True, "kappa": 0.5, "thresholds": [0.6, 1.4, 2.4, 3.4]}
    if page.evaluation.decision == "argmax":
      meta["thresholds"] = None
    checkpoints = Checkpoints(place.checkpoints)
    checkpoints.save(12, tree, meta, score=0.5)
    checkpoints.wait()
    return place.path

  return make


@pytest.fixture(scope="session")
def untrained(make_untrained, smoke_config):
  """A workdir of the smoke page in phase c, with chance weights. Not to be changed."""
  return make_untrained(smoke_config, "c")


@pytest.fixture(scope="session")
def untrained_m_net(make_untrained, smoke_config):
  """A workdir of M-Net alone, with chance weights. Not to be changed."""
  page = smoke_config.copy_and_resolve_references()
  page.model.name = "m_net"
  joint = page.phases.m
  with page.unlocked():
    del page.phases
    page.phases = {"joint": joint}
  return make_untrained(page, "joint")


@pytest.fixture(scope="session")
def map_config(tmp_path_factory):
  """The smallest page of the global attention; its images are drawn in this session's folder."""
  from medattn_jax import config

  page = pathlib.Path(__file__).resolve().parent / "pages" / "tiny_map.py"
  return config.load_page(str(page), [("data.dir", str(tmp_path_factory.mktemp("planted")))])


@pytest.fixture(scope="session")
def untrained_map(make_untrained, map_config):
  """A workdir of a global attention in its frozen phase. Not to be changed.

  Its map is what a pixel classifier of chance weights makes of the bank, frozen by the page's rule.
  """
  from medattn_jax import evaluate, fill_bank, models

  bank = fill_bank.of_phase(map_config, "joint", evaluate.open_data(map_config, None))
  joint = models.common(map_config, "joint")

  def constants(params):
    own = params["pixel_classifier"]
    own = own | {"rows": {"kernel": 20 * own["rows"]["kernel"]}}  # or it would be of one shade
    drawn = joint.finish(joint.partial(own, {"bank": bank.arrays}), own)
    return models.hand_on(map_config, "frozen", {"constants": drawn})["constants"]

  return make_untrained(map_config, "frozen", constants)


class Bundles:
  """What a bundle of `export` holds, read as a stranger reads it."""

  FILES = frozenset(
    {"README.md", "config.json", "model.json", "model.safetensors", "model.stablehlo"})

  @staticmethod
  def opened(folder):
    """(program, weights) of a bundle."""
    import jax.export
    import safetensors.numpy

    blob = bytearray((folder / "model.stablehlo").read_bytes())
    return jax.export.deserialize(blob), safetensors.numpy.load_file(folder / "model.safetensors")

  @staticmethod
  def about(folder):
    return json.loads((folder / "model.json").read_text())

  @staticmethod
  def python(code, folder):
    """Runs `code` in a process of its own, in `folder`; returns what it prints.

    Nothing of ours, and nothing a bundle is made with, can be imported there.
    """
    alone = ("import sys\n"
             "for name in ('medattn_jax', 'flax', 'orbax', 'tensorflow', 'optax', 'clu'):\n"
             "  sys.modules[name] = None\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
      [sys.executable, "-W", "error", "-c", alone + code], cwd=folder, env=environment,
      capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

  def answers(self, folder, images, place):
    """What the bundle in `folder` answers to the images, by name, in such a process.

    `place` is a folder for the files that pass between.
    """
    import numpy as np

    np.save(place / "images.npy", images)
    self.python(f"""
import jax, jax.export, numpy as np
from safetensors.numpy import load_file
program = jax.export.deserialize(bytearray(open({str(folder / "model.stablehlo")!r}, "rb").read()))
weights = load_file({str(folder / "model.safetensors")!r})
np.savez("answers.npz", **program.call(weights, np.load("images.npy")))
assert sys.modules["medattn_jax"] is None
""", place)
    return np.load(place / "answers.npz")


@pytest.fixture(scope="session")
def bundles():
  return Bundles()
