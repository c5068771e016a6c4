"""The compiled first layer of the pixel classifier: one pass over the bank, and no copy of it.

For the processor here, and for a GPU and a TPU where their compilers are installed (in a process
of their own: see programs/chips.py). No such chip is needed.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from medattn_jax.models import pixel_classifier
from medattn_jax.programs import chips, traffic

ROWS, SIDE = 16384, 64
BANK = ROWS * SIDE * SIDE  # 64 MiB
OUTPUTS = {"linear": 1, "conv": 72}
PARTS = [(classifier, part) for classifier in OUTPUTS for part in ("forward", "gradient")]


def program(classifier: str, part: str, device=None, summand=pixel_classifier.summand):
  """Temporary bytes, arrays of floats as large as the bank, and {dtype: bytes moved} or None."""
  placed = jax.sharding.SingleDeviceSharding(device or jax.devices()[0])
  shape = lambda *sides, dtype=jnp.float32: jax.ShapeDtypeStruct(sides, dtype, sharding=placed)
  outputs = OUTPUTS[classifier]
  bank = (shape(ROWS, SIDE, SIDE, dtype=jnp.uint8), shape(ROWS), shape(1, SIDE, SIDE), shape())
  kernel, slope = shape(ROWS, outputs), shape(outputs, SIDE, SIDE)

  def gradient(kernel, slope, *bank):
    return jax.vjp(lambda k: summand(k, *bank), kernel)[1](slope)

  if part == "forward":
    compiled = jax.jit(summand).lower(kernel, *bank).compile()
  else:
    compiled = jax.jit(gradient).lower(kernel, slope, *bank).compile()
  text = compiled.as_text()
  try:
    moved = traffic.moved(text)
  except traffic.UnknownLoop:
    moved = None
  return {"temporaries": compiled.memory_analysis().temp_size_in_bytes,
          "floats": traffic.floats(text, BANK), "moved": moved}


@pytest.fixture(scope="session")
def of_target():
  """(target) → {classifier part: its program}, compiled in another process; skips without one."""
  found = {}

  def compile_all(target):
    if reason := chips.missing(chips.target(target)):
      pytest.skip(reason)
    if target not in found:
      root = pathlib.Path(__file__).parents[2]
      run = subprocess.run(
        [sys.executable, __file__, target], capture_output=True, text=True, cwd=root, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])})
      assert run.returncode == 0, run.stderr[-2000:]
      found[target] = json.loads(run.stdout.splitlines()[-1])
    return found[target]

  return compile_all


@pytest.fixture(params=["here", "h200", "v5e"])
def read(request, of_target):
  """(classifier, part) → its program on a kind of device."""
  request.node.target = request.param
  if request.param == "here":
    return program
  programs = of_target(request.param)
  return lambda classifier, part: programs[f"{classifier} {part}"]


@pytest.mark.parametrize(("classifier", "part"), PARTS)
def test_the_bank_is_read_once_and_never_copied(read, classifier, part, request):
  found = read(classifier, part)
  assert found["floats"] == []
  assert found["temporaries"] < 0.1 * BANK + 4 * OUTPUTS[classifier] * ROWS
  assert found["moved"] is not None
  # (A TPU reads it four times for the seventy-two outputs of conv.)
  often = 4 if (request.node.target, classifier) == ("v5e", "conv") else 1
  assert found["moved"]["u8"] == often * BANK


@pytest.mark.parametrize("part", ["forward", "gradient"])
def test_a_float_copy_would_be_seen(part):
  """Planted: the bank as floats, standardised before it is multiplied."""

  def careless(kernel, images, valid, mean, scale):
    features = jax.lax.optimization_barrier((images.astype(jnp.float32) - mean) * scale)
    return jnp.einsum("rm,rhw->mhw", kernel * valid[:, None], features)

  found = program("conv", part, summand=careless)
  assert found["floats"]
  assert found["temporaries"] > BANK


def test_a_second_pass_would_be_seen():
  """Planted: the bank's own mean and square, found anew at each step."""

  def careless(kernel, images, valid, mean, scale):
    again = jax.lax.optimization_barrier(images)
    return (pixel_classifier.summand(kernel, images, valid, mean, scale)
            - pixel_classifier.project(jnp.ones_like(kernel), again) / ROWS)

  assert program("conv", "forward", summand=careless)["moved"]["u8"] >= 2 * BANK


if __name__ == "__main__":
  os.environ.update(chips.ENVIRONMENT)
  chip = chips.devices(chips.target(sys.argv[1]))[0]
  print(json.dumps({f"{name} {part}": program(name, part, chip) for name, part in PARTS}))
