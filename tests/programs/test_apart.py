"""A process apart: its answers, its exceptions, its death; and what it leaves behind."""

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal

import pytest

from medattn_jax.errors import UserError
from medattn_jax.programs import apart, chips


def surroundings(*names):
  return os.getpid(), resource.getrlimit(resource.RLIMIT_STACK)[0], [os.getenv(n) for n in names]


def test_it_runs_in_a_process_with_a_deep_stack_and_the_targets_environment(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "somewhere")
  before = dict(os.environ), resource.getrlimit(resource.RLIMIT_STACK)
  process, stack, found = apart.run(
    surroundings, "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", target=chips.target("cpu:5"))
  assert process != os.getpid() and found == ["cpu", "5"]
  assert stack == before[1][1]
  assert (dict(os.environ), resource.getrlimit(resource.RLIMIT_STACK)) == before
  assert apart.run(surroundings, "JAX_PLATFORMS")[2] == ["somewhere"]


class Odd(Exception):
  """A library's own: it could not be made again from its text."""

  def __init__(self, one, other):
    super().__init__(f"{one} and {other}")


def fail(kind):
  if kind == "user":
    raise UserError("batch = 3; accepted: 4")
  if kind == "odd":
    raise Odd("one", "other")
  return [][1]


@pytest.mark.parametrize(("kind", "raised", "said"), [
  ("user", UserError, "^batch = 3; accepted: 4"), ("odd", RuntimeError, "Odd: one and other"),
  ("index", IndexError, "out of range")])
def test_what_it_raises_is_raised_here_with_where_it_was(kind, raised, said):
  with pytest.raises(raised, match=said) as error:
    apart.run(fail, kind)
  assert any("in fail" in note for note in error.value.__notes__)


def die(how):
  os.kill(os.getpid(), how) if how > 0 else os._exit(-how)


@pytest.mark.parametrize(("how", "said"), [
  (signal.SIGSEGV, "SIGSEGV"), (signal.SIGKILL, "SIGKILL"), (-3, "exit status 3")])
def test_its_death_is_a_users_error_that_says_of_what(how, said):
  with pytest.raises(UserError, match=rf"compiler for cpu:1 ended its process \({said}\)"):
    apart.run(die, how, target=chips.target("cpu:1"))


def test_whoever_is_interrupted_leaves_no_process(monkeypatch):
  def interrupted(self, *_):
    raise KeyboardInterrupt

  monkeypatch.setattr(multiprocessing.connection.Connection, "recv", interrupted)
  with pytest.raises(KeyboardInterrupt):
    apart.run(signal.pause)
  assert multiprocessing.active_children() == []
