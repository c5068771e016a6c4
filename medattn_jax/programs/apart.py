"""Work in a process of its own: a chip's compiler may end its process, and needs a deep stack."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable
from typing import Any

from medattn_jax.errors import UserError
from medattn_jax.programs import chips

_SENT = {"builtins", UserError.__module__}


def run(function: Callable, *arguments: Any, target: chips.Target | None = None) -> Any:
  """function(*arguments), of a module's top level, in a new process; what it raises is raised here.

  With a target, JAX finds that chip's compiler there. libtpu recurses deeper than the usual stack.

  Raises:
    UserError: the process died, or the target's plug-in is not installed.
  """
  if target is not None and (reason := chips.missing(target)):
    raise UserError(f"target {target}: {reason}")
  context = multiprocessing.get_context("spawn")
  receive, send = context.Pipe(duplex=False)
  process = context.Process(target=_answer, args=(send, function, arguments), daemon=True)
  stack, environment = resource.getrlimit(resource.RLIMIT_STACK), dict(os.environ)
  resource.setrlimit(resource.RLIMIT_STACK, (stack[1], stack[1]))
  os.environ.update(chips.environment(target) if target else {})
  try:
    process.start()
  finally:
    resource.setrlimit(resource.RLIMIT_STACK, stack)
    os.environ.clear()
    os.environ.update(environment)
  try:
    send.close()  # so that the other end's death is the end of what can be read
    raised, answer = receive.recv()
  except EOFError:
    process.join()
    what = f"the compiler{f' for {target}' if target else ''}"
    raise UserError(
      f"{what} ended its process ({_ending(process.exitcode)}): out of memory, or a fault of its "
      "own; accepted: a smaller batch") from None
  finally:
    process.kill()  # it has answered, is dead, or whoever asked waits no longer
    process.join()
    receive.close()
  if raised:
    raise answer
  return answer


def _answer(send: Any, function: Callable, arguments: tuple[Any, ...]) -> None:
  """In the new process: sends (False, the answer) or (True, the exception)."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked ends this process
  try:
    answer = (False, function(*arguments))
  except Exception as error:
    if type(error).__module__ not in _SENT:  # a library's own may not come through whole
      error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note("in a process apart:\n" + traceback.format_exc())
    answer = (True, error)
  send.send(answer)


def _ending(status: int | None) -> str:
  try:
    return signal.Signals(-status).name
  except (TypeError, ValueError):
    return f"exit status {status}"
