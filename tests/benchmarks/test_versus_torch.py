"""Both sides do the same work, and where there is no other side it is said."""

import argparse
import functools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pages, steps, torch_weights, versus_torch
from medattn_jax.models.backbones.resnet_small import space_to_depth

ROOT = pathlib.Path(__file__).parents[2]


def test_without_torch_it_says_so(monkeypatch, capsys):
  monkeypatch.setattr(versus_torch, "NEEDED", ("json", "no_such_library"))
  monkeypatch.setattr(sys, "argv", ["versus_torch"])
  with pytest.raises(SystemExit) as left:
    versus_torch.main()
  said = capsys.readouterr()
  assert left.value.code == 2 and not said.out
  assert "no_such_library would have to be installed; accepted" in said.err


@pytest.mark.parametrize(("theirs", "same"), [
  ([2.0, 1.9, 1.8], True), ([2.0, 1.91, 1.81], True), ([2.001, 1.9, 1.8], False),
  ([2.0, 1.8, 1.8], False)])
def test_losses_of_the_same_work(theirs, same):
  assert versus_torch.agree([2.0, 1.9, 1.8], theirs, "float32") is same


@pytest.mark.parametrize(("name", "side"), [("down0", 4), ("down1", 2)])
def test_a_halving_is_a_convolution_as_wide_as_its_stride(name, side):
  rng = np.random.default_rng(0)
  channels = 3 if side == 4 else 5
  x = jnp.asarray(rng.standard_normal((2, 8, 8, channels), np.float32))
  kernel = rng.standard_normal((1, 1, side * side * channels, 7)).astype(np.float32)
  ours = space_to_depth(x, side) @ kernel[0, 0]
  theirs = jax.lax.conv_general_dilated(
    x, torch_weights._turned((name, "conv"), kernel), (side, side), "VALID",
    dimension_numbers=("NHWC", "OIHW", "NHWC"))
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_weight_has_a_name_and_is_felt():
  page = pages.plain(pages.adapted(pages.named("demo"), batch=1, image_size=32))
  now = steps.build(page, "c", jax.devices()[:1])
  state = jax.device_get(now.initial())
  params, stats = (torch_weights.drawn(tree) for tree in (state.params, state.batch_stats))
  named = torch_weights.named(page, params, stats)
  leaves = jax.tree.leaves((params, stats))
  assert sum(x.size for x in named.values()) == sum(x.size for x in leaves)
  assert len(named) == len(leaves)
  assert all(np.abs(x).max() > 0 and x.std() > 0 for x in named.values())
  neck = params["m_net"]["neck"]["conv"]["kernel"]
  np.testing.assert_array_equal(named["m_net.neck.conv.weight"][..., 0, 0], neck[0, 0].T)
  assert "c_net.backbone.stage2_0_2.bn.running_var" in named


@pytest.mark.parametrize("at_once", [1, 2])
def test_models_at_once(at_once, monkeypatch):
  """So many are started before the first is waited for; each is measured by itself, in order."""
  said = []

  class Child:
    def __init__(self, model, side, page, flags, scratch):
      self.name = f"{model} {side}"
      said.append(f"start {self.name}")

    @functools.cached_property
    def ready(self):
      said.append(f"ready {self.name}")

    def __enter__(self):
      return self

    def __exit__(self, *_):
      said.append(f"end {self.name}")

  def compared(model, page, there, flags):
    said.append(f"turns {model}")
    yield from ({"asked": model, "side": side} for side in there)

  monkeypatch.setattr(versus_torch, "child", Child)
  monkeypatch.setattr(versus_torch, "compared", compared)
  monkeypatch.setattr(versus_torch, "dtype_here", lambda: "float32")
  flags = argparse.Namespace(
    at_once=at_once, size="small", batch=None, image_size=None, dtype=None)
  rows = list(versus_torch.measure(["resnet18", "resnet_small"], flags))
  assert [(one["asked"], one["side"]) for one in rows] == [
    (model, side) for model in ("resnet18", "resnet_small") for side in ("ours", "torch")]
  starts = [at for at, word in enumerate(said) if word.startswith("start")]
  waits = [at for at, word in enumerate(said) if word.startswith("ready")]
  assert (max(starts) < min(waits)) is (at_once == 2)
  assert max(waits) < said.index("turns resnet18") < said.index("end resnet18 ours")
  assert said.index("end resnet18 ours") < said.index("turns resnet_small")


@pytest.mark.slow
def test_the_losses_are_the_same_from_the_same_weights():
  pytest.importorskip("torchvision")
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.versus_torch", "--models=demo,resnet18", "--batch=2",
     "--image-size=64", "--rounds=1", "--seconds=0.01", "--dtype=float32", "--check", "--json"],
    cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr + done.stdout
  found = [json.loads(line) for line in done.stdout.splitlines()]
  assert [one["config"]["side"] for one in found] == ["ours", "best", "users", "ours", "torch"]
  assert all(one["same_losses"] and len(set(one["losses"])) == 3 for one in found)
