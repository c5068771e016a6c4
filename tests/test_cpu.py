"""A kept heap gives no pages back, but where something else settles it; options that XLA knows."""

import argparse
import os
import platform
import subprocess
import sys

import pytest

from medattn_jax import cli, config, cpu
from medattn_jax.errors import UserError

LARGE = """
import resource, sys
from medattn_jax import cpu
assert cpu.keep_heap() == (sys.argv[1] == "kept")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(8):
  before = faults()
  bytearray(64 << 20)
print(faults() - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap alone")


def faults(word: str, **variables: str) -> int:
  """New pages asked of the system by the last of eight blocks of 64 MiB, each given up at once."""
  environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
  found = subprocess.run([sys.executable, "-c", LARGE, word], env={**environment, **variables},
                         check=True, capture_output=True, text=True)
  return int(found.stdout)


@glibc
def test_a_kept_heap_uses_its_pages_again():
  assert faults("kept", JAX_PLATFORMS="cpu") < 100
  assert faults("left", GLIBC_TUNABLES="glibc.malloc.arena_max=2") > 10_000


@glibc
def test_where_steps_run_on_an_accelerator_it_is_left_alone(monkeypatch):
  monkeypatch.setattr(cpu, "accelerators", lambda: {"cuda"})
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert not cpu.keep_heap()


def test_a_training_keeps_it_before_all_else(monkeypatch):
  called = []
  monkeypatch.setattr(cpu, "keep_heap", lambda: called.append("keep"))

  def page(*_):
    called.append("page")
    raise UserError("enough")

  monkeypatch.setattr(config, "load_page", page)
  with pytest.raises(UserError, match="enough"):
    cli.train(argparse.Namespace(config="page.py"), [])
  assert called == ["keep", "page"]


def test_options_are_a_cpus_and_only_those_that_its_compiler_knows(monkeypatch):
  assert cpu.compiler_options("tpu") == {}
  assert set(cpu.compiler_options("cpu")) == set(cpu.OPTIONS)
  monkeypatch.setattr(cpu, "OPTIONS", {"xla_cpu_no_such_option": "1"})
  cpu._known.cache_clear()
  assert cpu.compiler_options("cpu") == {}
  cpu._known.cache_clear()
