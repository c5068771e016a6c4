"""Work in a process of its own: a chip's compiler may end its process, and needs a deep stack."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import resource
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from medattn_jax.errors import UserError
from medattn_jax.programs import chips


def run(function: Callable, *arguments: Any, target: chips.Target | None = None) -> Any:
  """function(*arguments), of a module's top level, in a new process; what it raises is raised here.

  With a target, JAX finds that chip's compiler there. libtpu recurses deeper than the usual stack.

  Raises:
    UserError: the process died, or the target's plug-in is not installed.
  """
  if target is not None and (reason := chips.missing(target)):
    raise UserError(f"target {target.chip}: {reason}")
  stack, environment = resource.getrlimit(resource.RLIMIT_STACK), dict(os.environ)
  resource.setrlimit(resource.RLIMIT_STACK, (stack[1], stack[1]))
  os.environ.update(chips.ENVIRONMENT if target else {})
  try:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
      return pool.submit(function, *arguments).result()
  except BrokenProcessPool as error:
    raise UserError(
      f"the compiler{f' for {target.chip}' if target else ''} ended its process: out of memory, "
      "or a fault of its own; accepted: a smaller batch") from error
  finally:
    resource.setrlimit(resource.RLIMIT_STACK, stack)
    os.environ.clear()
    os.environ.update(environment)
