"""Published PyTorch weights, converted by name, and the way back.

A backbone names its parts as the reference does, so one rule serves them all. A dot before an
index is a hyphen here (`repeat.0.branch1.1.conv.weight` is repeat-0/branch1-1/conv/kernel), kernels
turn from [out, in, h, w] to [h, w, in, out] and dense weights from [out, in] to [in, out]; the
rows of one that sees a grid of features go from (channel, row, column) to (row, column, channel).
A dense layer that is written as a convolution over the whole grid (timm's VGG) is the same numbers.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from medattn_jax import console, models
from medattn_jax.errors import UserError, nearest

# The dense head of each backbone whose published weights are understood.
HEADS = {
  "inception_resnet_v2": "classif", "inception_v3": "fc", "googlenet": "fc",
  "vgg16": "classifier.6", "vgg16_bn": "classifier.6", "resnet18": "fc", "resnet50": "fc",
  "densenet121": "classifier"}
# Knowingly left behind: auxiliary heads (training only) and PyTorch's step counters.
_AUXILIARY = re.compile(r"^(AuxLogits|aux[12])\.")
_COUNTER = "num_batches_tracked"
# Dense weights that see a grid, and its (channels, rows, columns).
_GRIDS = {
  "classifier.0.weight": (512, 7, 7), "aux1.fc1.weight": (128, 4, 4),
  "aux2.fc1.weight": (128, 4, 4)}
# Other names of the same tensors. In the file of DenseNet's weights a name has a dot more than in
# torchvision's module; timm's VGG and Cadene's heads have names of their own.
_OTHERS = {
  "densenet121": ((r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", r"\1"),),
  **dict.fromkeys(("vgg16", "vgg16_bn"), (
    (r"^pre_logits\.fc1\.", "classifier.0."), (r"^pre_logits\.fc2\.", "classifier.3."),
    (r"^head\.fc\.", "classifier.6."))),
}
_LEAVES = {
  "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean",
  "var": "running_var"}

_MARK = 7919  # a number of classes that is no other size of any network

Layout = dict[tuple[str, ...], jax.ShapeDtypeStruct]


def from_torch(
  name: str, state_dict: Mapping[str, Any], num_classes: int | None = None
) -> dict[str, Any]:
  """Converts a reference state dict to {"params", "batch_stats"} of `models.backbone(name)`.

  Args:
    name: one of HEADS: "inception_resnet_v2" as timm (and Cadene) name its tensors, the others as
      torchvision and timm do.
    state_dict: {tensor's name: array or CPU tensor}. Where nothing has to be changed the result
      looks at the same memory.
    num_classes: of the network that is wanted: a head of another size is left out, and that is
      said. None: the head as it is, of whatever size; without one the variables have none.

  Returns:
    float32 numpy arrays; "batch_stats" is empty where nothing is normalised.

  Raises:
    UserError: an unknown name; tensors missing, left over, of another shape or no floats.
  """
  known(name, "from_torch")
  state_dict = _named_as_here(name, state_dict)
  head = np.shape(state_dict.get(f"{HEADS[name]}.weight", 0.0))
  classes = head[0] if head else None
  wanted = layout(name, classes)

  found, problems = {}, {what: set() for what in ("missing", "not known", "of another shape",
                                                  "not of floats")}
  for path, leaf in wanted.items():
    tensor = _torch_name(path)
    if tensor not in state_dict:
      problems["missing"].add(tensor)
      continue
    value, grid = state_dict[tensor], _GRIDS.get(tensor)
    if tuple(np.shape(value)) not in _shapes(leaf.shape, grid):
      problems["of another shape"].add(f"{tensor} {tuple(np.shape(value))}")
    elif (array := _floats(value)) is None:
      problems["not of floats"].add(tensor)
    else:
      found[path] = _ours(array, leaf.shape, grid)
  names = {_torch_name(path) for path in wanted}
  problems["not known"] = {
    key for key in state_dict
    if key not in names and not _AUXILIARY.match(key) and not key.endswith(f".{_COUNTER}")}
  refuse(f"from_torch({name!r})", problems)
  if num_classes is not None and classes not in (None, num_classes):
    console.say(f"from_torch({name!r}): the head is of {classes} classes, not {num_classes}: left "
                "out")
    found = {path: value for path, value in found.items() if not is_head(name, path)}
  return {"params": {}, "batch_stats": {}, **traverse_util.unflatten_dict(found)}


def to_torch(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The way back: a state dict for torchvision's model of that name (inception_resnet_v2: timm's).

  `load_state_dict({k: torch.as_tensor(v) for k, v in to_torch(…).items()})` takes it, strictly:
  the batch counters of the normalisations are there too, as zeros.

  Args:
    name: one of HEADS.
    variables: {"params", "batch_stats"} of `models.backbone(name)`, of a head of any size or none.
      The backbone of a trained model may lack what the model leaves out of it (a head; M-Net's
      "conv2d_7b"), and GoogLeNet's may have its auxiliary heads.

  Returns:
    float32 arrays of their own memory.

  Raises:
    UserError: an unknown name; arrays missing, left over or of another shape.
  """
  known(name, "to_torch")
  if strangers := set(variables) - {"params", "batch_stats"}:
    raise UserError(f"to_torch({name!r}): holds {_some(strangers)}; accepted: params and "
                    "batch_stats of a backbone")
  given = traverse_util.flatten_dict(
    {kind: dict(variables.get(kind, {})) for kind in ("params", "batch_stats")})
  head = given.get(("params", HEADS[name].replace(".", "-"), "kernel"))
  classes = None if head is None else np.shape(head)[-1]
  wanted = layout(name, classes, **({"aux": True} if name in models.AUXILIARY else {}))
  optional = trunk_lacks(name) | {path for path in wanted if is_auxiliary(name, path)}

  found, misshapen = {}, set()
  for path, value in given.items():
    if path in wanted and np.shape(value) != wanted[path].shape:
      misshapen.add(f"{shown(path)} {np.shape(value)}")
    elif path in wanted:
      tensor = _torch_name(path)
      found[tensor] = _theirs(np.asarray(value, np.float32), _GRIDS.get(tensor))
      if path[-1] == "var":
        found[_torch_name((*path[:-1], _COUNTER))] = np.zeros((), np.int64)
  refuse(f"to_torch({name!r})", {
    "missing": {shown(path) for path in wanted.keys() - given.keys() - optional},
    "not known": {shown(path) for path in given.keys() - wanted.keys()},
    "of another shape": misshapen})
  return found


def known(name: str, where: str) -> None:
  """Raises UserError for a backbone of whose published weights nothing is known."""
  if name not in HEADS:
    raise UserError(f"{where}: {name!r} is none of the backbones with published weights"
                    f"{nearest(name, HEADS)}; accepted: {', '.join(HEADS)}")


def layout(name: str, num_classes: int | None, **options: Any) -> Layout:
  """{(collection, module, …, leaf): shape and dtype} of a backbone's variables."""
  found = {}
  for path, leaf in _traced(name, **options).items():
    if _MARK not in leaf.shape:
      found[path] = leaf
    elif num_classes is not None:
      shape = tuple(num_classes if size == _MARK else size for size in leaf.shape)
      found[path] = jax.ShapeDtypeStruct(shape, leaf.dtype)
  if num_classes is None:  # GoogLeNet has no auxiliary heads then
    return {path: leaf for path, leaf in found.items() if not is_auxiliary(name, path)}
  return found


@functools.cache
def _traced(name: str, **options: Any) -> Layout:
  """The layout with _MARK for the number of classes: a large network takes seconds to trace."""
  net = models.backbone(name, _MARK, **options)
  shapes = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3)), train=False))
  return traverse_util.flatten_dict(dict(shapes))


def trunk_lacks(name: str) -> set[tuple[str, ...]]:
  """The leaves of a backbone that M-Net leaves out of it; its head is not among them."""
  if name not in models.TRUNKS:
    return set()
  return layout(name, None).keys() - layout(name, None, **models.TRUNKS[name]).keys()


def is_head(name: str, path: tuple[str, ...]) -> bool:
  """Whether a leaf is of the backbone's own head."""
  return path[1] == HEADS[name].replace(".", "-")


def is_auxiliary(name: str, path: tuple[str, ...]) -> bool:
  """Whether a leaf is of a head that serves training alone."""
  return path[1] in models.AUXILIARY.get(name, ())


def left_behind(state_dict: Iterable[str]) -> list[str]:
  """The modules of a state dict that from_torch knowingly leaves behind: auxiliary heads."""
  found = (_AUXILIARY.match(key) for key in state_dict)
  return sorted({match.group(1) for match in found if match})


def shown(path: tuple[str, ...]) -> str:
  """A leaf's name for a reader: without its collection."""
  return "/".join(path[1:])


def _named_as_here(name: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors under the names of torchvision's module (timm's of inception_resnet_v2)."""
  rules = (*_OTHERS.get(name, ()), (r"^last_linear\.", f"{HEADS[name]}."))
  renamed: dict[str, str] = {}
  for key in state_dict:
    new = str(key)
    for pattern, replacement in rules:
      new = re.sub(pattern, replacement, new)
    if new in renamed:
      raise UserError(f"from_torch({name!r}): {renamed[new]} and {key} are two names of one tensor")
    renamed[new] = key
  return {new: state_dict[key] for new, key in renamed.items()}


def _shapes(shape: tuple[int, ...], grid: tuple[int, int, int] | None) -> set[tuple[int, ...]]:
  """The shapes in PyTorch of a leaf of `shape`."""
  if len(shape) == 4:
    height, width, inputs, outputs = shape
    return {(outputs, inputs, height, width)}
  if len(shape) == 2:
    inputs, outputs = shape
    return {(outputs, inputs), (outputs, *(grid or (inputs, 1, 1)))}
  return {shape}


def _floats(tensor: Any) -> np.ndarray | None:
  """A tensor as a float32 array, of the same memory where it can be; None: it is not of floats."""
  if hasattr(tensor, "detach"):  # PyTorch's; its bfloat16 is none of numpy's
    if not tensor.is_floating_point():
      return None
    return tensor.detach().to("cpu").float().numpy()
  array = np.asarray(tensor)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return None
  return array.astype(np.float32, copy=False)


def _ours(
  value: np.ndarray, shape: tuple[int, ...], grid: tuple[int, int, int] | None
) -> np.ndarray:
  """A tensor as the leaf of `shape`: [out, in] or [out, in, h, w] turned; `grid`: what `in` is."""
  if grid and value.ndim == 2:
    value = value.reshape(-1, *grid)
  if value.ndim == 4:
    return value.transpose(2, 3, 1, 0).reshape(shape)
  return value.T


def _theirs(value: np.ndarray, grid: tuple[int, int, int] | None) -> np.ndarray:
  """The reverse of `_ours`, contiguous and a copy."""
  if grid:
    channels, rows, columns = grid
    value = value.reshape(rows, columns, channels, -1).transpose(3, 2, 0, 1)
    return np.array(value.reshape(len(value), math.prod(grid)), order="C")
  axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, range(value.ndim))
  return np.array(value.transpose(*axes), order="C")


def _torch_name(path: tuple[str, ...]) -> str:
  """The reference's name of a leaf: (collection, module, …, leaf)."""
  _, *parts, leaf = path
  return ".".join([*parts, _LEAVES.get(leaf, leaf)]).replace("-", ".")


def refuse(what: str, problems: Mapping[str, Iterable[str]]) -> None:
  """Raises UserError with the names, where there is a problem."""
  if any(problems.values()):
    raise UserError(f"{what}: " + "; ".join(
      f"{problem}: {_some(names)}" for problem, names in problems.items() if names))


def _some(names: Iterable[str], limit: int = 8) -> str:
  """At most `limit` of the names, sorted, and how many more there are."""
  names = sorted(names)
  rest = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + rest
