"""Draws a network's first values without compiling a program of them all.

As one program, the thousand arrays of a full-size network take XLA minutes: each draw becomes code
of its own. Here the trace is walked instead. Draws run one by one, those of a size by the same
small program; what little arithmetic surrounds them is numpy's; the forward pass is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core


def evaluate(traced: jax.stages.Traced, *args: Any) -> Any:
  """What the traced function returns for `args`, as numpy arrays.

  The arithmetic is of the host's CPU, whatever the devices: the same values everywhere.

  Args:
    traced: jax.jit(function).trace(*args).
  """
  program = traced.jaxpr.jaxpr
  values = dict(zip(program.constvars, traced.jaxpr.consts, strict=True))
  values |= zip(program.invars, jax.tree.leaves(args), strict=True)

  def read(atom):
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, atom.aval.dtype)
    return values[atom]

  with _on_the_host():
    for equation in _needed(program):
      by_numpy = _NUMPY.get(equation.primitive.name)
      keys = any(jax.dtypes.issubdtype(a.aval.dtype, jax.dtypes.prng_key) for a in equation.invars)
      if by_numpy and not keys:
        given = [np.asarray(read(atom)) for atom in equation.invars]
        answer = [by_numpy(*given, **equation.params)]
      else:
        used = [atom for atom in equation.invars if isinstance(atom, core.Var)]
        alone = program.replace(
          constvars=(), invars=used, outvars=equation.outvars, eqns=[equation])
        answer = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*map(read, used))
      values |= zip(equation.outvars, answer, strict=True)
    leaves = [np.asarray(read(atom)) for atom in program.outvars]
  return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)


def _needed(program: core.Jaxpr) -> list[core.JaxprEqn]:
  """The equations that the answer depends on, in order."""
  wanted = {atom for atom in program.outvars if isinstance(atom, core.Var)}
  kept = []
  for equation in reversed(program.eqns):
    if not wanted.isdisjoint(equation.outvars):
      kept.append(equation)
      wanted.update(atom for atom in equation.invars if isinstance(atom, core.Var))
  return kept[::-1]


def _on_the_host() -> contextlib.AbstractContextManager:
  try:
    return jax.default_device(jax.local_devices(backend="cpu")[0])
  except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
    return contextlib.nullcontext()


def _broadcast(x: np.ndarray, *, shape, broadcast_dimensions, **_) -> np.ndarray:
  spread = [1] * len(shape)
  for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
    spread[axis] = size
  return np.broadcast_to(x.reshape(spread), shape)


def _slice(x: np.ndarray, *, start_indices, limit_indices, strides, **_) -> np.ndarray:
  strides = strides or [None] * x.ndim
  return x[tuple(map(slice, start_indices, limit_indices, strides))]


# What needs no compiled program: its answers are exactly rounded, so numpy's are XLA's.
_NUMPY: dict[str, Callable[..., np.ndarray]] = {
  "broadcast_in_dim": _broadcast,
  "copy": lambda x, **_: x.copy(),
  "div": lambda x, y, **_: x / y,
  "mul": lambda x, y, **_: x * y,
  "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
  "slice": _slice,
  "sqrt": lambda x, **_: np.sqrt(x),
}
