"""Checkpoints in processes of their own: full disks, kill -9, and two processes together."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

from medattn_jax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


def python(code, *arguments, **options):
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", **options.pop("env", {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


FULL = """
import resource, sys
import numpy as np
from medattn_jax.checkpoint import Checkpoints
from medattn_jax.errors import UserError
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": np.zeros(9, np.float32)}, {}); checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints.save(2, {"w": np.random.normal(size=300_000)}, {})
try:
  checkpoints.wait()
except UserError as error:
  print(error)
print(checkpoints.steps())
"""


def test_a_real_write_that_fails_prints_no_traceback(tmp_path):
  out, err = python(FULL, tmp_path).communicate(timeout=120)
  assert out.splitlines()[0].endswith("run again when it is mended") and "file too large" in out
  assert out.splitlines()[1:] == ["[1]"] and os.listdir(tmp_path) == ["1"]
  assert "Traceback" not in err, err


SAVER = """
import itertools, sys
import numpy as np
from medattn_jax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
begin = checkpoints.newest_intact(lambda step: checkpoints.load(step)[1]["step"]) or 0
for step in itertools.count(begin + 1):
  checkpoints.save(step, {"w": np.full((64, 1024), step, np.float32)}, {"step": step}, step % 7)
  print(step, flush=True)
"""


def test_kill_9_at_any_moment_leaves_whole_checkpoints_only(tmp_path):
  chance = random.Random(time.time_ns())
  begun = 0
  for _ in range(4):
    process = python(SAVER, tmp_path)
    for _ in range(chance.randrange(3, 6)):
      begun = int(process.stdout.readline())
    time.sleep(chance.random() * 0.08)
    process.send_signal(signal.SIGKILL)
    err = process.communicate(timeout=60)[1]
    assert "warning" not in err, err
    checkpoints = Checkpoints(tmp_path)
    steps = checkpoints.steps()
    for step in steps:
      tree, meta = checkpoints.load(step)
      assert meta["step"] == step and (tree["w"] == step).all()
    # When save(n) is called, n-1 is being waited for: n-2 at the least is complete.
    assert len(steps) >= 2 and steps[-1] >= begun - 2, (steps, begun)


TWO = """
import sys
rank, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from medattn_jax.checkpoint import Checkpoints, Damaged
from medattn_jax.errors import UserError
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
value = np.arange(8, dtype=np.float32)
put = lambda spec: jax.make_array_from_callback((8,), NamedSharding(mesh, spec), lambda i: value[i])
tree = {"copied": put(P()), "spread": put(P("data"))}
checkpoints = Checkpoints(directory)
for step in (1, 2):
  checkpoints.save(step, tree, {"step": step})
checkpoints.wait()
target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
restored, meta = checkpoints.newest_intact(lambda step: checkpoints.restore(step, target))
for name, array in restored.items():
  assert array.sharding == tree[name].sharding
  for shard in array.addressable_shards:
    np.testing.assert_array_equal(shard.data, value[shard.index])
# The first process cannot write: all must hear of it, none may wait for ever.
import medattn_jax.checkpoint as module
def refuse(*_): raise OSError(28, "No space left on device")
module._orbax_save = refuse
checkpoints.save(3, tree, {})
try:
  checkpoints.wait()
except UserError as error:
  reasons = "no space" in str(error), "first process" in str(error)
  print(meta["step"], checkpoints.resolve("last"), *reasons)
"""


def test_two_processes_save_and_restore_together(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  both = [python(TWO, rank, port, tmp_path) for rank in range(2)]
  try:
    results = [process.communicate(timeout=120) for process in both]
  finally:
    for process in both:
      process.kill()
  said = [out.splitlines()[-1:] for out, _ in results]
  assert said == [["2 2 True False"], ["2 2 False True"]], results
  assert Checkpoints(tmp_path).load(2)[0]["spread"].tolist() == list(range(8))


def test_orbax_is_imported_when_needed_and_brings_no_tensorflow(tmp_path):
  code = """
import json, sys
import medattn_jax.checkpoint
before = "orbax" in sys.modules
import numpy as np
checkpoints = medattn_jax.checkpoint.Checkpoints(sys.argv[1])
checkpoints.save(1, {"w": np.ones(3)}, {}); checkpoints.wait(); checkpoints.load(1)
print(json.dumps([before, "orbax.checkpoint" in sys.modules, "tensorflow" in sys.modules]))
"""
  out, err = python(code, tmp_path).communicate(timeout=120)
  assert json.loads(out) == [False, True, False], err
