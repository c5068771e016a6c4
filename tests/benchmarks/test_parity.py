"""What is held against a reference, and that nothing is said without one."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from benchmarks import parity
from medattn_jax import models
from medattn_jax.models import pretrained


@pytest.mark.parametrize(("flags", "libraries", "words"), [
  ([], ("no_such_library",), "no golden answers in .* no_such_library would have to be installed"),
  (["--reference=golden"], (), "no golden answers there; accepted"),
  (["--reference=torch", "--sizes=197,big"], (), "--sizes=197,big: accepted: whole numbers"),
  (["--models=resnet50,resnet51"], (), "--models: resnet51; accepted: .*resnet50"),
])
def test_without_a_reference_it_says_so(flags, libraries, words, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(parity, "TORCH", libraries)
  monkeypatch.setattr(sys, "argv", ["parity", f"--shared={tmp_path}", *flags])
  with pytest.raises(SystemExit) as left:
    parity.main()
  said = capsys.readouterr()
  assert left.value.code == 2 and not said.out
  assert said.err.count("\n") == 1
  assert re.search(words, said.err)


def test_a_tensor_is_drawn_by_its_name_alone():
  shapes = {"conv.weight": (64, 32, 3, 3), "bn.weight": (64,), "bn.running_var": (64,),
            "bn.num_batches_tracked": ()}
  whole = parity.draw(shapes)
  for name, shape in shapes.items():
    np.testing.assert_array_equal(parity.draw({name: shape})[name], whole[name])
  assert not np.array_equal(parity.draw(shapes, 1)["bn.weight"], whole["bn.weight"])
  assert whole["conv.weight"].std() == pytest.approx(np.sqrt(2 / (32 * 9)), rel=0.05)
  assert whole["bn.running_var"].min() >= 1
  assert whole["bn.num_batches_tracked"].dtype == np.int64


@pytest.mark.slow
def test_a_row_measures_what_differs():
  """A ResNet-18 held against its own answers, and against such as are a thousandth off."""
  name = "resnet18"
  shapes = {key: x.shape for key, x in pretrained.to_torch(name, _ones(name)).items()}
  state, net = parity.draw(shapes), models.backbone(name, 3)
  images = np.random.default_rng(0).uniform(-1, 1, (2, 33, 33, 3)).astype(np.float32)
  answer, out = jax.jit(net.apply)(pretrained.from_torch(name, state), images)
  answer = np.asarray(answer, np.float64)
  for wrong in (0.0, 1e-3):
    logits = answer + wrong * np.ptp(answer) * np.eye(2, 3)
    found = parity.row(
      parity.Case(name, state, images, logits, np.asarray(out["pooled"])[:, :16]), "torch", 2)
    assert found["deviation"] == pytest.approx(wrong, abs=2e-5)
    assert found["pooled_deviation"] < 2e-5 < found["bfloat16_drift"] < 0.05
    assert found["step_ms"]["min"] <= found["step_ms"]["median"] <= found["step_ms"]["max"]
    size = found["weights_bytes"]
    assert size == 4 * sum(x.size for x in state.values() if x.ndim)
    assert 0.9 * size < found["conversion_peak_bytes"] < 1.5 * size
    json.dumps(found, allow_nan=False)
  assert "resnet18" in parity.summary([found]) and "33²" in parity.line(found)
  assert "bfloat16" not in parity.line(
    parity.row(parity.Case(name, state, images, logits, None), "torch", 0, first=False))


def _ones(name):
  return traverse_util.unflatten_dict(
    {path: jnp.ones(leaf.shape) for path, leaf in pretrained.layout(name, 3).items()})
