"""What each device sums, joined over all of them: the same sums, by what a platform is good at.

- "vector": one all-reduce of one float32 vector, of everything. A CPU's way.
- "kernels": each kernel as it lies, and all else as one vector. A TPU's compiler gathers them into
  few, and no kernel is moved into a vector and out of it.
- "parts": up to three vectors, one after another, each on its way as soon as the backward pass has
  made it, beside what that has yet to make. A GPU's way, where one vector can begin only when
  nothing is left to do beside it, and its compiler would leave kernels as some ninety all-reduces.
"""

from __future__ import annotations

import bisect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree

Tree = Any

Way = typing.Literal["vector", "kernels", "parts"]
# A network's last layers, whose gradients are made first, have most of its bytes and its first
# layers most of its time. So a part is so much of what the earlier ones leave, as long as that is
# more than so many bytes. [choice]
_SHARE, _MOST, _LEAST = 3 / 4, 3, 16 * 2**20


def way(platform: str) -> Way:
  """The way of a platform's devices."""
  return {"tpu": "kernels", "gpu": "parts"}.get(platform, "vector")


def total(gradients: Tree, rest: Tree, axis: str, way: Way,
          order: Sequence[int] | None = None) -> tuple[Tree, Tree]:
  """(gradients, rest), each summed over the devices of `axis`.

  Args:
    rest: what is known before the backward pass.
    order: for "parts", of each leaf of the gradients (what more there is does not count): those of
      smaller numbers are made sooner. None, as where a loop gives all at once: then one vector.
  """
  if order is not None:
    return _in_parts(gradients, rest, axis, order)
  leaves, structure = jax.tree.flatten((gradients, rest))
  alone = {i: leaf for i, leaf in enumerate(leaves) if way == "kernels" and leaf.ndim > 1}
  vector, unravel = ravel_pytree({i: leaf for i, leaf in enumerate(leaves) if i not in alone})
  # Held as they are: a TPU's compiler would else sum in bfloat16 what a product in it has given.
  alone = jax.tree.map(jax.lax.optimization_barrier, alone)
  alone, vector = jax.lax.psum((alone, vector), axis)
  found = {**alone, **unravel(vector)}
  return jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])


def observed(function: Callable[..., Tree], *args: Tree) -> tuple[Tree, list[int]]:
  """function(*args), and for each leaf of it how many operations come before its own.

  Costs a twelfth of a step's tracing.
  """
  jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  made = {out: i for i, one in enumerate(jaxpr.jaxpr.eqns) for out in one.outvars}
  order = [-1 if isinstance(out, Literal) else made.get(out, -1) for out in jaxpr.jaxpr.outvars]
  leaves = jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(args))
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves), order


def parts(sizes: Sequence[int], order: Sequence[int]) -> list[list[int]]:
  """The leaves (by number) of each part, in the order in which the parts are made.

  Args:
    sizes: of the leaves, in bytes.
    order: as in `total`.
  """
  ends, left = [], sum(sizes)
  while left > _LEAST and len(ends) < _MOST - 1:
    left *= 1 - _SHARE
    ends.append(sum(sizes) - left)
  groups, before = [[] for _ in range(len(ends) + 1)], 0
  for i in sorted(range(len(sizes)), key=lambda i: order[i]):
    groups[bisect.bisect(ends, before + sizes[i] / 2)].append(i)
    before += sizes[i]
  return [group for group in groups if group]


def taps(leaf: jax.Array) -> bool:
  """Whether it is a convolution's kernel, or its gradient, of more than one pixel."""
  return leaf.ndim == 4 and max(leaf.shape[:2]) > 1


def _in_parts(gradients, rest, axis, order):
  leaves, structure = jax.tree.flatten(gradients)
  # As a GPU's convolutions give them, [out, height, width, in]: turned one by one before the sum,
  # they are a kernel each; after it those of one shape are turned together.
  leaves = [leaf.transpose(3, 0, 1, 2) if taps(leaf) else leaf for leaf in leaves]
  groups = parts([leaf.size * leaf.dtype.itemsize for leaf in leaves], order)
  found, before = {}, None
  for number, group in enumerate(groups):
    # All gradients are divided by a weight in `rest`: where that is in the last part but one, the
    # update of what is joined by then can run beside the last.
    more = rest if number == max(0, len(groups) - 2) else ()
    vector, unravel = ravel_pytree(({i: leaves[i] for i in group}, more))
    if number:  # one after another: else the compiler begins with the last
      vector, before = jax.lax.optimization_barrier((vector, before))
    before = jax.lax.psum(vector, axis)
    some, more = unravel(before)
    found |= some
    rest = more or rest
  summed = jax.tree.unflatten(structure, [found[i] for i in range(len(leaves))])
  return jax.tree.map(lambda one, as_it_was: one.transpose(1, 2, 3, 0) if taps(as_it_was) else one,
                      summed, gradients), rest
