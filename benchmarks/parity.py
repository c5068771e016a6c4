"""Do the backbones answer as the published ones, and what does converting their weights cost?

`python -m benchmarks.parity [--size=full|small] [--models=resnet50,…] [--reference=golden|torch]
[--sizes=197,…] [--shared=DIR] [--json] [--plot=FILE]`

The reference is what torchvision and timm answered for drawn weights and images (../shared, where
it is beside the checkout), or those libraries themselves, at any size, with weights drawn here.
Deviations are the largest difference as a share of the range of the reference's logits: in float32
with the weights' own arithmetic, in bfloat16 as trainings compute (at the first size alone). The
conversion is from_torch and the copies that make its arrays lie in order. --size=full is all
backbones, which take minutes; small the three that compile fastest, at one size.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import statistics
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.rows import count, figure, parsed, say, stop

SHARED = pathlib.Path(__file__).resolve().parents[1].parent / "shared"
SIZES = {"small": {"models": "resnet18,googlenet,resnet50", "sizes": "197"},
         "full": {"models": "", "sizes": "197,203,384,492"}}
CLASSES = 10
TORCH = ("torch", "torchvision", "timm")


class Case(NamedTuple):
  """A backbone, its weights, and what the reference answers for the images.

  Attributes:
    state: {the reference's tensor: array}.
    images: float32 [N, H, W, 3].
    logits: float64 [N, classes].
    pooled: float64 [N, the first of the features before the head], where they are known.
  """

  name: str
  state: Mapping[str, np.ndarray]
  images: np.ndarray
  logits: np.ndarray
  pooled: np.ndarray | None


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", help="with commas between; all by default")
  parser.add_argument("--reference", choices=("golden", "torch"),
                      help="golden where ../shared is, else torch, by default")
  parser.add_argument("--sizes", help="pixels a side, for --reference=torch")
  parser.add_argument("--shared", type=pathlib.Path, default=SHARED, help="of golden answers")
  parser.add_argument("--rounds", type=count, default=3, help="timed forward passes")
  flags = parsed(parser, SIZES, usual="full")
  rows = []
  for case, reference in cases(flags):
    seen = any(found["config"]["model"] == case.name for found in rows)
    rows.append(row(case, reference, flags.rounds, first=not seen))
    print(json.dumps(rows[-1], allow_nan=False) if flags.json else line(rows[-1]), flush=True)
  if not flags.json:
    say(rows, summary(rows), False)
  if flags.plot:
    plot(rows, flags.plot)


def cases(flags: argparse.Namespace) -> Iterator[tuple[Case, str]]:
  """What is to be compared. Leaves with status 2 where there is no reference."""
  from medattn_jax.models import pretrained

  names = flags.models.split(",") if flags.models else list(pretrained.HEADS)
  if unknown := set(names) - set(pretrained.HEADS):
    stop("parity", f"--models: {', '.join(sorted(unknown))}; accepted: "
         f"{', '.join(pretrained.HEADS)}")
  golden = flags.shared / "parity"
  missing = [library for library in TORCH if not importlib.util.find_spec(library)]
  reference = flags.reference or ("golden" if golden.is_dir() else "torch")
  if reference == "golden":
    if not golden.is_dir():
      stop("parity", f"--shared={flags.shared}: no golden answers there; accepted: their folder, "
           "or --reference=torch")
    for name in names:
      yield of_golden(golden, name), "golden"
    return
  if missing:
    stop("parity", f"no golden answers in {flags.shared}, and to ask the libraries themselves "
         f"{', '.join(missing)} would have to be installed; accepted: pip install "
         "'medattn_jax[parity]', or --shared=DIR")
  try:
    sizes = [int(size) for size in flags.sizes.split(",")]
  except ValueError:
    stop("parity", f"--sizes={flags.sizes}: accepted: whole numbers with commas between")
  for name in names:
    yield from ((case, "torch") for case in of_torch(name, sizes))


def of_golden(folder: pathlib.Path, name: str) -> Case:
  """What the reference answered once: ../shared/parity."""
  spec = importlib.util.spec_from_file_location("drawn", folder / "synthetic_weights.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  expected = module.load_golden(folder / f"golden_{name}.json")
  state = module.state_dict(expected["tensors"], expected["weight_seed"])
  answers = (np.asarray(expected[key], np.float64) for key in ("logits", "pooled"))
  return Case(name, state, module.images(**expected["input"]), *answers)


def of_torch(
  name: str, sizes: Sequence[int], timm: bool = False, classes: int = CLASSES
) -> Iterator[Case]:
  """A case for each size, of torchvision's own model or, with `timm`, of timm's."""
  import torch

  module = torch_model(name, timm, classes)
  shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
  state = draw(shapes)
  module.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()}, strict=True)
  for size in sizes:
    images = np.random.default_rng(size).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    with torch.no_grad():
      given = torch.as_tensor(images.transpose(0, 3, 1, 2).copy())
      logits = module(given).numpy().astype(np.float64)
    yield Case(name, state, images, logits, None)


def torch_model(name: str, timm: bool = False, classes: int = CLASSES) -> Any:
  """The published network of a backbone, in evaluation: without input transform, no auxiliaries."""
  if timm or name == "inception_resnet_v2":
    import timm as library

    return library.create_model(name, pretrained=False, num_classes=classes).eval()
  import torchvision

  options: dict[str, Any] = {}
  if name in ("googlenet", "inception_v3"):
    options = {"transform_input": False, "aux_logits": False, "init_weights": False}
  return getattr(torchvision.models, name)(weights=None, num_classes=classes, **options).eval()


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
  """A tensor for each of the reference's names and shapes, by chance of that name alone.

  Of such sizes that activations neither die nor grow: kernels as He draws them, variances above
  one, and statistics and biases that are felt.
  """
  drawn = {}
  for name, shape in shapes.items():
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
      drawn[name] = np.zeros(shape, np.int64)
      continue
    values = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
      values *= np.sqrt(2 / np.prod(shape[1:]))
    elif kind == "running_var":
      values = 1 + np.abs(values) / 4
    elif kind == "weight":
      values = 1 + values / 10
    else:
      values = values / 10
    drawn[name] = values.astype(np.float32)
  return drawn


def row(case: Case, reference: str, rounds: int, first: bool = True) -> dict[str, Any]:
  """What is measured of a case, as strict JSON has it; bfloat16 of a model's `first` alone."""
  import jax
  import jax.numpy as jnp

  variables, seconds, peak = conversion(case)
  exact = answer(case, variables, jnp.float32, rounds)
  rounded = answer(case, variables, jnp.bfloat16, 0)["logits"] if first else None
  spread = np.ptp(case.logits)
  least = np.sort(case.logits, axis=1)
  device = jax.devices()[0]
  pooled = None
  if case.pooled is not None:
    own = exact["pooled"][:, : case.pooled.shape[1]]
    pooled = float(np.abs(own - case.pooled).max() / np.ptp(case.pooled))
  return {
    "name": "parity",
    "config": {"model": case.name, "reference": reference, "size": case.images.shape[1]},
    "devices": 1, "device_kind": device.device_kind, "batch": len(case.images), "dtype": "float32",
    "deviation": float(np.abs(exact["logits"] - case.logits).max() / spread),
    "pooled_deviation": pooled,
    "bfloat16_drift": float(np.abs(rounded - case.logits).max() / spread) if first else None,
    "bfloat16_top1":
      float((rounded.argmax(1) == case.logits.argmax(1)).mean()) if first else None,
    "top1_lead": float((least[:, -1] - least[:, -2]).min() / spread),
    "conversion_seconds": seconds, "conversion_peak_bytes": peak,
    "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(variables)),
    **{key: exact[key] for key in (
      "compile_seconds", "step_ms", "images_per_second", "flops_per_step", "peak_memory_bytes")},
    "mfu": None, "input_bound": None}


def conversion(case: Case) -> tuple[dict, float, int]:
  """(variables, the processor's seconds, the most bytes that were held beside the state dict)."""
  import jax

  from medattn_jax.models import pretrained

  def convert():
    return jax.tree.map(np.ascontiguousarray, pretrained.from_torch(case.name, case.state))

  convert()  # traces the network once
  start = time.process_time()
  convert()
  seconds = time.process_time() - start
  tracemalloc.start()
  variables = convert()
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  return variables, seconds, peak


def answer(case: Case, variables: Any, dtype: Any, rounds: int) -> dict[str, Any]:
  """{"logits", "pooled"} float64, with times and sizes of the compiled forward pass."""
  import jax

  from medattn_jax import models

  net = models.backbone(case.name, case.logits.shape[1], dtype=dtype)

  def forward(variables, images):
    logits, out = net.apply(variables, images, train=False)
    return {"logits": logits, "pooled": out["pooled"]}

  start = time.perf_counter()
  with jax.default_matmul_precision("highest" if dtype == np.float32 else "default"):
    compiled = jax.jit(forward).lower(variables, case.images).compile()
  seconds = time.perf_counter() - start
  variables = jax.device_put(variables)
  found = jax.device_get(compiled(variables, case.images))
  times = [timed(lambda: jax.block_until_ready(compiled(variables, case.images)))
           for _ in range(rounds)]
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  held = (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes)
  return {
    **{name: np.asarray(value, np.float64) for name, value in found.items()},
    "compile_seconds": seconds,
    "step_ms": {"min": min(times), "median": statistics.median(times), "max": max(times)}
               if times else None,
    "images_per_second": 1000 * len(case.images) / statistics.median(times) if times else None,
    "flops_per_step": cost.get("flops") if cost else None, "peak_memory_bytes": sum(held)}


def timed(function: Callable[[], Any]) -> float:
  start = time.perf_counter()
  function()
  return 1000 * (time.perf_counter() - start)


def line(found: Mapping[str, Any]) -> str:
  """A row for a reader."""
  config = found["config"]
  words = (f"{config['model']:20}{config['size']:>5}²  {config['reference']:7}"
           f"float32 {found['deviation']:.1e}")
  if found["bfloat16_drift"] is not None:
    words += (f"   bfloat16 {found['bfloat16_drift']:.1e}, top-1 "
              f"{'agrees' if found['bfloat16_top1'] == 1 else 'DIFFERS'} "
              f"(lead {found['top1_lead']:.1e})")
  return words


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
  """A line for each backbone: the largest of its deviations, and what converting it costs."""
  lines = ["", f"{'':20}{'float32':>10}{'bfloat16':>10}{'top-1':>9}{'weights':>10}{'converted':>11}"
               f"{'held':>9}"]
  for name in dict.fromkeys(found["config"]["model"] for found in rows):
    own = [found for found in rows if found["config"]["model"] == name]
    first, most = own[0], max(found["deviation"] for found in own)
    agrees = "agrees" if first["bfloat16_top1"] == 1 else "DIFFERS"
    lines.append(
      f"{name:20}{most:>10.1e}{first['bfloat16_drift']:>10.1e}{agrees:>9}"
      f"{first['weights_bytes'] / 1e6:>7.0f} MB"
      f"{1000 * min(found['conversion_seconds'] for found in own):>8.0f} ms"
      f"{first['conversion_peak_bytes'] / 1e6:>6.0f} MB")
  lines.append("Deviations as shares of the range of the reference's logits, the largest of all "
               "sizes; held: memory taken beside the state dict.")
  return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """The deviations of each backbone, float32 and bfloat16, as shares of the logits' range."""
  names = list(dict.fromkeys(found["config"]["model"] for found in rows))
  own = [[found for found in rows if found["config"]["model"] == name] for name in names]

  def draw(panel):
    for key, label, colour in (("bfloat16_drift", "bfloat16", "#f58518"),
                               ("deviation", "float32", "#4c78a8")):
      most = [max(found[key] for found in of if found[key] is not None) for of in own]
      panel.plot(most, names, "o", color=colour, markersize=7, label=label)
    panel.set(xscale="log", xlabel="largest difference, as a share of the logits' range")
    panel.invert_yaxis()
    panel.margins(x=0.1, y=0.15)
    panel.grid(alpha=0.3)
    panel.set_title(f"against {rows[0]['config']['reference']} answers", fontsize=10)
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

  figure(path, 6.2, 1.4 + 0.32 * len(names), draw)


if __name__ == "__main__":
  main()
