"""What no change may cost a step: held against the compiled programs, on no particular hardware."""

import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medattn_jax import config, experiment, forecast, models
from medattn_jax.models.norm import Conv
from medattn_jax.programs import chips, places, report, traffic

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

# Of the demo's steps on eight devices, a device's 4 photographs: MiB of temporaries, and MiB
# accessed a photograph. Measured, and a tenth more.
BOUNDS = {"m": (12, 36), "a": (11, 21), "c": (32, 92)}


@pytest.mark.parametrize("phase", BOUNDS)
def test_a_step_of_the_demo(phase):
  # The page's groups of 16 photographs fit one or two devices; on eight each holds 4.
  page = config.load_page(str(CONFIGS / "demo.py"), [("norm.group_size", "4")])
  now = experiment.build(page, phase=phase)
  assert now.mesh.size == 8
  compiled = now.lower_train_step().compile()
  found, text = report.read(compiled), compiled.as_text()
  assert found.counts == {"all-reduce": 1}  # the gradients, with statistics and metrics
  assert not any(one.inside for one in found.collectives)
  assert found.donated == len(jax.tree.leaves(now.abstract_state))
  assert "f64[" not in text
  assert not re.search(r"callback|infeed|outfeed|send\(|recv\(", text)  # a host's round trip
  assert not re.search(r"\b[a-z]+\d+\[[^\]]*<=", text)  # a length that is known only when it runs
  # YNNPACK would run these on one core: its fusions hold an operation alone.
  convolutions = [line for line in text.splitlines() if " convolution(" in line]
  assert convolutions and not any("ROOT" in line for line in convolutions)
  temporaries, accessed = BOUNDS[phase]
  assert found.temporaries <= temporaries * 2**20
  assert found.accessed / 4 <= accessed * 2**20


def products(page, phase):
  """(multiplications of one forward pass, those of the layer that sees the images), by hand.

  Taps that fall on padding are none.
  """
  found = []

  def taps(length, size, stride, padding):
    first = stride * np.arange((length + 2 * padding - size) // stride + 1) - padding
    places = first[:, None] + np.arange(size)
    return int(((places >= 0) & (places < length)).sum())

  def count(method, args, kwargs, context):
    module, x = context.module, args[0] if args else None
    if isinstance(module, Conv) and context.method_name == "convolve":
      kernel = args[1].shape
      around = module.padding or tuple((size - 1) // 2 for size in module.kernel_size)
      seen = map(taps, x.shape[1:3], kernel[:2], (module.stride,) * 2, around)
      found.append(len(x) * math.prod(seen) * kernel[2] * kernel[3])
    elif isinstance(module, Conv) and context.method_name == "onto":
      found.append(math.prod(args[1].shape) * module.features)
    elif isinstance(module, nn.Dense) and context.method_name == "__call__":
      found.append(math.prod(x.shape) * module.features)
    return method(*args, **kwargs)

  each, *shape = models.image_shape(page)
  image = jax.ShapeDtypeStruct((page.data.batch_size, each, *shape), jnp.uint8)
  model = models.build(page)
  with nn.intercept_methods(count):
    jax.eval_shape(lambda key, x: model.init(key, x, phase=phase, train=False),
                   jax.random.key(0), image)
  return sum(found), found[0]


@pytest.mark.parametrize(("name", "phase"), [
  ("paper/attention_resnet50.py", "joint"),
  pytest.param("paper/eyepacs_m_net.py", "joint", marks=pytest.mark.slow)])
def test_a_step_multiplies_no_more_than_its_layers_must(name, phase):
  changes = [("attention.source", "none")] if "eyepacs" not in name else []
  page = config.load_page(str(CONFIGS / name), [("data.batch_size", "8"), ("norm.group_size", "8"),
                                      (f"phases.{phase}.accumulation", "1"), *changes])
  if each := models.IMAGES[page.model.name] - 1:
    page.data.batch_size = 8 // (1 + each)
  now = experiment.build(page, phase, jax.devices()[:1])
  every, first = products(page, phase)
  # A backward pass is two of them, but that nobody asks for the images' gradient.
  hand = 2 * (3 * every - first)
  assert now.lower_train_step().cost_analysis()["flops"] == pytest.approx(hand, rel=0.02)


def copies(path):
  """In a program: of what it overwrites, or has made elsewhere. A GPU's had a thousand."""
  program, entry = traffic.parse(path.read_text())
  return sum(one.kind == "copy" for one in program[entry].values())


def of_no_layer(path):
  """In a program: kernels of norms, averages and the update, not of what a layer computes."""
  program, entry = traffic.parse(path.read_text())
  ran = [one for _, one, _ in traffic.run(program, entry, 1) if one.kind in ("fusion", "copy")]
  return sum(places.place(report.scope(one, program), 1)[0] == places.REST for one in ran)


@pytest.mark.slow
def test_a_gpu_alone_updates_in_place(tmp_path):
  """ResNet-50 before its map: a convolution's gradient is turned before it meets the kernel, and
  kernels of one shape are updated together."""
  wanted = chips.target("h200")
  if reason := chips.missing(wanted):
    pytest.skip(reason)
  page = config.load_page(str(CONFIGS / "paper" / "attention_resnet50.py"), [
    ("data.batch_size", "32"), ("phases.joint.accumulation", "1")])
  found = forecast.of(page, "joint", wanted, keep=str(tmp_path / "program.txt"))
  assert found.report.donated == found.leaves - found.unread  # of the map before this step's
  assert copies(tmp_path / "program.txt") < 20
  assert (many := of_no_layer(tmp_path / "program.txt")) < 100, many


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x4", "h200:8"])
def test_the_whole_step_on_an_accelerators_compiler(target, tmp_path):
  """Inception-ResNet-v2, A-Net and C-Net's Inception-v3, 8 photographs of 1230² a chip."""
  wanted = chips.target(target)
  if reason := chips.missing(wanted):
    pytest.skip(reason)
  page = config.load_page(str(CONFIGS / "zoom_in_net.py"), [
    ("data.batch_size", "32"), ("norm.group_size", "8"), ("phases.c.accumulation", "1")])
  found = forecast.of(page, "c", wanted, keep=str(tmp_path / "program.txt"))
  assert found.fits
  # A TPU's compiler gathers the kernels, which no vector holds, into a few; for a GPU there are
  # three vectors, each beside what is still to be done.
  assert set(found.report.counts) == {"all-reduce"} and set(found.report.wire) == {"f32"}
  assert found.report.counts["all-reduce"] <= (6 if wanted.tpu else 3)
  if wanted.gpu:
    assert not any(one.synchronous for one in found.report.collectives)
    assert copies(tmp_path / "program.txt") < 20
    print(f"{target}: {found.accessed / 1e9:.1f} GB a step")
    assert (many := of_no_layer(tmp_path / "program.txt")) < 300, many
    assert found.accessed < 35.5e9  # 34.8 when the means' branches shared their blocks' products
  assert not any(one.inside for one in found.report.collectives)
  assert found.report.donated == found.leaves
