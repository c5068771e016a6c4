"""Programs compiled beside the run."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from medattn_jax import onednn
from medattn_jax.compiling import Compiling


class Program(NamedTuple):
  """Answers with its name."""

  name: str

  def __call__(self):
    return self.name


class Phase:
  """A phase whose programs are compiled once `gate` is open; counts what is compiled."""

  images, page, mesh = 1, SimpleNamespace(accumulation=1), SimpleNamespace(size=1)
  config = SimpleNamespace(data=SimpleNamespace(image_size=8))

  def __init__(self, phase, trained=("backbone",), gate=None):
    self.phase, self.trained, self.gate = phase, trained, gate
    self.compiled = []

  def lower_train_step(self):
    return self._lowered("train")

  def lower_eval_step(self):
    return self._lowered("eval")

  def _lowered(self, name):
    def compile():
      if self.gate:
        assert self.gate.wait(30)
      if name in self.compiled:
        raise RuntimeError(f"{name} again")
      self.compiled.append(name)
      return Program(f"{self.phase} {name}")

    return type("Lowered", (), {"compile": staticmethod(compile)})


def test_later_phases_are_compiled_while_the_first_one_runs():
  first, later = Phase("m"), Phase("c")
  with Compiling() as compiling:
    compiling.ask(first)
    compiling.ask(first, later)
    assert compiling.step(first).step() == "m train"
    for _ in range(1000):  # nobody asks for its step
      if len(later.compiled) == len(first.compiled) == 2:
        break
      time.sleep(0.01)
    assert sorted(first.compiled) == sorted(later.compiled) == ["eval", "train"]
    assert compiling.step(later).step() == "c train"


def test_what_the_run_waits_for_is_traced_first_and_alone():
  """Planted: the later phase, which has more to learn, would take the first one's time."""
  order = []

  class Traced(Phase):
    def _lowered(self, name):
      order.append(f"> {self.phase} {name}")
      time.sleep(0.02)
      order.append(f"< {self.phase} {name}")
      return super()._lowered(name)

  first, second, last = Traced("m"), Traced("a"), Traced("c", trained=("m_net", "a_net", "c_net"))
  with Compiling() as compiling:
    compiling.ask(first, second, last)
    compiling.step(second)
    compiling._pool.shutdown()
  names = [line[2:] for line in order]
  assert names[0::2] == names[1::2]  # none begins before another one ends
  assert names[0] == "m train"


def test_the_program_that_is_waited_for_may_be_begun_before_the_rest():
  """Traced when the call returns, not compiled; what fails while it is traced ends no wait late."""
  gate, traced = threading.Event(), []

  class Traced(Phase):
    def _lowered(self, name):
      traced.append(name)
      return super()._lowered(name)

  class Failing(Phase):
    def lower_train_step(self):
      raise ValueError("no such layer")

  now = Traced("c", gate=gate)
  with Compiling() as compiling:
    compiling.begin(now)
    assert traced == ["train"] and not now.compiled
    gate.set()
    compiling.ask(now)
    assert compiling.step(now).step() == "c train"
    compiling._pool.shutdown()
  assert sorted(now.compiled) == ["eval", "train"]
  class Odd(Failing):
    images = None  # fails before it comes to that

  for failing in (Failing("m"), Odd("m")):
    with Compiling() as compiling:
      compiling.begin(failing)
      with pytest.raises((ValueError, TypeError)):
        compiling.step(failing)


def test_what_a_compilation_raised_is_raised_where_its_step_is_wanted():
  good, bad = Phase("m"), Phase("c")
  bad.compiled.append("train")
  with Compiling() as compiling:
    compiling.ask(good, bad)
    assert compiling.step(good).step() == "m train"
    with pytest.raises(RuntimeError, match="train again"):
      compiling.step(bad)


def test_who_stops_does_not_wait_for_the_compiler():
  gate = threading.Event()
  slow = [Phase(str(number), gate=gate) for number in range(4)]
  begun = time.monotonic()
  with Compiling() as compiling:
    compiling.ask(*slow)
  assert time.monotonic() - begun < 5
  gate.set()
  compiling._pool.shutdown()
  assert sum(len(phase.compiled) for phase in slow) <= 2  # those that had begun


def test_steps_of_many_pixels_alone_are_given_to_onednn(monkeypatch):
  """What calls it is compiled at each start: a small page's program is rather stored."""
  given = []

  def compiled(lower):
    given.append(lower())
    return given[-1].compile()

  monkeypatch.setattr(onednn, "compiled", compiled)

  class Large(Phase):
    images, page = 128, SimpleNamespace(accumulation=2)
    config = SimpleNamespace(data=SimpleNamespace(image_size=64))

  class Shared(Large):
    mesh = SimpleNamespace(size=2)

  with Compiling() as compiling:
    for phase in (Phase("small"), Shared("of two devices"), Large("large")):
      assert compiling.step(phase).step() == f"{phase.phase} train"
      assert len(given) == (phase.phase == "large")
