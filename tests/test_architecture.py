"""The house stands: floors, one address a library, nothing that runs what a file says.

`violations` reads a package's source; the tests hold it against the package itself, and against
small packages with one fault each, which it must find.
"""

from __future__ import annotations

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NAME = "medattn_jax"

# From the ground up. A module imports from the floors below its own, and never from its own floor
# unless that floor is one of SHARED. A folder (models, data, analysis, programs) is one piece.
FLOORS = (
  {"errors", "console", "files", "manifest", "arrays", "signals", "processes", "heap",
   "onednn", "apart", "platforms", "compilation_cache"},
  {"losses", "metrics", "optim", "augment", "contrast", "crops", "sharding", "joining", "initial",
   "checkpoint", "config", "workdir"},
  {"models", "data", "analysis", "programs"},
  {"step", "bank"},
  {"experiment"},
  {"trained", "train", "evaluate", "explain", "explain_map", "predictor", "export", "doctor",
   "compiling", "continuation", "fill_bank", "import_weights", "studies", "forecast", "plan",
   "decode"},
  {"cli"},
  {"__main__", "__init__"},
)
SHARED = (0, 5)  # the ground, and the commands (train ends by evaluating); no circles even there

# More than the floors say.
APART = {
  "step": {"models", "data", "analysis", "config", "checkpoint", "workdir"},  # a pure function
  "data": {"arrays", "sharding", "checkpoint", "losses", "optim", "augment", "crops"},  # JAX
}

# Who may import a library; all others may not.
ADDRESS = {
  "orbax": {"checkpoint"},
  "tensorflow": {"data"},
  "tensorflow_datasets": {"data"},
  "clu": {"train"},
  "optax": {"optim", "step", "losses"},
  "sklearn": {"metrics", "analysis"},
  "matplotlib": {"analysis"},
  "torch": {"models"},
  "runpy": {"config"},  # a config page is a program, and nothing else is
  "importlib": {"__init__", "config", "models", "data", "doctor", "programs", "studies"},
}
# Who may not import a library, not even by way of another module that is imported at its top.
_NO_TENSORFLOW = ("tensorflow", "tensorflow_datasets", "clu")
WITHOUT = {
  "data": ("jax", "jaxlib", "flax", "optax", "orbax", "clu"),
  **dict.fromkeys(("models", "step", "experiment", "predictor", "cli", "__init__"), _NO_TENSORFLOW),
}
# fmt: off
NOWHERE = {
  "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "pty",
  "ctypes", "socket", "ssl", "http", "urllib", "requests", "aiohttp", "ftplib", "smtplib",
}
# fmt: on
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
METHODS = {"extractall", "unpack_archive", "unsafe_load"}
OF_OS = re.compile("system|popen|exec|spawn|fork|startfile")
HOUSE_WORDS = {
  "utils",
  "util",
  "common",
  "base",
  "registry",
  "trainer",
  "manager",
  "helpers",
  "misc",
}
LINES = 450


class Module:
  """One source file: its dotted name below the package, and what it imports."""

  def __init__(self, root: pathlib.Path, path: pathlib.Path):
    parts = path.relative_to(root).with_suffix("").parts
    self.path = path.relative_to(root).as_posix()
    self.text = path.read_text()
    self.tree = ast.parse(self.text)
    self.is_package = parts[-1] == "__init__"
    self.dotted = ".".join(parts[:-1] if self.is_package else parts)
    self.area = parts[0]  # "__init__" for the package's own
    at_top = {id(node) for node in _top_level(self.tree)}
    self.imports = [  # (dotted name, imported with the module?)
      (name, id(node) in at_top) for node in ast.walk(self.tree) for name in self._names(node)
    ]

  def _names(self, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
      return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
      return []
    if not node.level:
      stem = node.module
    else:
      here = [NAME, *filter(None, self.dotted.split("."))]
      up = node.level - self.is_package
      stem = ".".join(here[: len(here) - up] + ([node.module] if node.module else []))
    return [f"{stem}.{alias.name}" for alias in node.names]


def _top_level(tree):
  """The statements that run when the module is imported."""
  for node in ast.iter_child_nodes(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
      yield node
      yield from _top_level(node)


def violations(root: pathlib.Path) -> list[str]:
  """Every breach of the rules above in the package at `root`, one line each."""
  modules = {m.dotted: m for m in (Module(root, path) for path in sorted(root.rglob("*.py")))}
  found = []
  for module in modules.values():
    found += _own(module)
    for name, _ in module.imports:
      found += _edge(module, name, modules)
  found += _circles(modules)
  for module in modules.values():
    for library in sorted(_reached(module.dotted, modules) & set(WITHOUT.get(module.area, ()))):
      found.append(f"{module.path}: imports {library}, itself or by way of another module")
  return found


def _target(name: str, modules: dict[str, Module]) -> str | None:
  """The dotted name, below the package, of the file that `name` comes from; None: not ours."""
  if name.split(".")[0] != NAME:
    return None
  parts = name.split(".")[1:]
  while parts and ".".join(parts) not in modules:
    parts.pop()
  return ".".join(parts)


def _floor(area: str) -> int | None:
  return next((number for number, floor in enumerate(FLOORS) if area in floor), None)


def _edge(module: Module, name: str, modules: dict[str, Module]) -> list[str]:
  target = _target(name, modules)
  if target is None:
    library, area = name.split(".")[0], module.area
    if library in NOWHERE or area not in ADDRESS.get(library, {area}):
      return [f"{module.path}: imports {library}"]
    return []
  area = target.split(".")[0] or "__init__"
  if area == module.area or module.area == "__init__":
    return []
  above, below = _floor(module.area), _floor(area)
  if above is None or below is None:
    return [
      f"{module.path}: imports {target}: {area if below is None else module.area} has no floor"
    ]
  same = above == below and above in SHARED
  if below > above or (below == above and not same) or area in APART.get(module.area, ()):
    return [f"{module.path}: imports {target or 'the package itself'}, which is not below it"]
  return []


def _own(module: Module) -> list[str]:
  found = []
  if _floor(module.area) is None:
    found.append(f"{module.path}: stands on no floor")
  if HOUSE_WORDS & set(re.split(r"[._]", module.dotted.lower())):
    found.append(f"{module.path}: a name that says nothing")
  if module.text.count("\n") > LINES:
    found.append(f"{module.path}: more than {LINES} lines")
  if module.text.strip() and not ast.get_docstring(module.tree):
    found.append(f"{module.path}: does not say what it is")
  for node in ast.walk(module.tree):
    if not isinstance(node, ast.Call):
      continue
    function, keywords = node.func, {k.arg: k.value for k in node.keywords}
    if isinstance(function, ast.Name) and function.id in CALLS:
      found.append(f"{module.path}:{node.lineno}: calls {function.id}")
    if isinstance(function, ast.Attribute):
      owner = ast.unparse(function.value)
      if function.attr in METHODS or (owner == "os" and OF_OS.match(function.attr)):
        found.append(f"{module.path}:{node.lineno}: calls {owner}.{function.attr}")
      if (owner, function.attr) == ("np", "load") and _constant(
        keywords, "allow_pickle"
      ) is not False:
        found.append(f"{module.path}:{node.lineno}: np.load without allow_pickle=False")
      if (owner, function.attr) == ("torch", "load") and _constant(
        keywords, "weights_only"
      ) is not True:
        found.append(f"{module.path}:{node.lineno}: torch.load without weights_only=True")
    if _constant(keywords, "shell") not in (None, False) or _constant(keywords, "allow_pickle"):
      found.append(f"{module.path}:{node.lineno}: shell or allow_pickle")
  return found


def _constant(keywords: dict[str, ast.expr], name: str) -> object:
  value = keywords.get(name)
  return value.value if isinstance(value, ast.Constant) else value


def _circles(modules: dict[str, Module]) -> list[str]:
  """Modules that, at import, need themselves."""
  return [
    f"{module.path}: imports itself by way of others"
    for module in modules.values()
    if module.dotted in _files(module.dotted, modules, itself=False)
  ]


def _files(start: str, modules: dict[str, Module], *, itself: bool = True) -> set[str]:
  """The package's files that importing `start` runs (its packages' own too)."""
  seen, queue = {start} if itself else set(), [start]
  while queue:
    module = modules[queue.pop()]
    targets = {_target(name, modules) for name, at_top in module.imports if at_top}
    for target in targets - {None, "", module.dotted}:
      parts = target.split(".")
      folders = {".".join(parts[:n]) for n in range(1, len(parts))}
      # A package that gathers its own modules is no circle.
      outer = {f for f in folders & modules.keys() if not f"{module.dotted}.".startswith(f"{f}.")}
      for file in ({target} | outer) - seen:
        seen.add(file)
        queue.append(file)
  return seen


def _reached(start: str, modules: dict[str, Module]) -> set[str]:
  return {
    name.split(".")[0]
    for file in _files(start, modules)
    for name, at_top in modules[file].imports
    if (at_top or file == start) and not name.startswith(NAME)
  }


def test_the_package_keeps_the_rules():
  found = violations(ROOT / NAME)
  assert not found, "\n".join(found)


SOUND = {
  "__init__.py": "",
  "errors.py": '"""E."""',
  "files.py": '"""F."""\nimport os',
  "config.py": '"""C."""\nimport runpy\nfrom medattn_jax.errors import UserError',
  "crops.py": '"""C."""\nimport jax',
  "optim.py": '"""O."""\nimport optax',
  "models/__init__.py": '"""M."""\nfrom medattn_jax.models import norm',
  "models/norm.py": '"""N."""\nfrom medattn_jax import crops\nfrom medattn_jax.models import conv',
  "models/conv.py": '"""C."""\nfrom ..errors import UserError\nfrom . import rest',
  "models/rest.py": '"""R."""',
  "data/__init__.py": '"""D."""',
  "data/schema.py": '"""S."""\nimport numpy as np\nnp.load("x", allow_pickle=False)',
  "data/pipeline.py": '"""P."""\nimport tensorflow as tf\nfrom medattn_jax.data import schema',
  "step.py": '"""S."""\nfrom medattn_jax import optim',
  "experiment.py": '"""E."""\nfrom medattn_jax import models, step',
  "evaluate.py": '"""E."""\nfrom medattn_jax import step\nfrom medattn_jax.data import pipeline',
  "train.py": '"""T."""\nfrom medattn_jax import evaluate\ndef f():\n  import clu.metric_writers',
  "predictor.py": '"""P."""\nfrom medattn_jax.data import schema\ndef f():\n  model.eval()',
  "cli.py": '"""C."""\ndef f():\n  from medattn_jax import train\n  import re; re.compile("x")',
}
# File, a line added to it, and a part of what is to be said. Some files are new.
PLANTED = {
  "up the house": (
    "step.py",
    "from medattn_jax import experiment",
    "experiment, which is not below",
  ),
  "a lazy import up": ("files.py", "def f():\n  import medattn_jax.cli", "cli, which is not below"),
  "leaf to leaf": ("crops.py", "from medattn_jax.config import x", "config, which is not below"),
  "models to data": ("models/conv.py", "import medattn_jax.data.schema", "data.schema, which is"),
  "data to models": ("data/schema.py", "from medattn_jax import models", "models, which is not"),
  "a relative import": ("models/conv.py", "from ..data.schema import x", "data.schema, which is"),
  "the package itself": ("step.py", "from medattn_jax import load", "the package itself, which"),
  "a step that knows models": ("step.py", "from medattn_jax import models", "models, which is not"),
  "a new module": ("things.py", '"""T."""', "things.py: stands on no floor"),
  "a name that says nothing": ("data/image_utils.py", '"""U."""', "a name that says nothing"),
  "a giant": ("step.py", "x = 1\n" * LINES, "more than 450 lines"),
  "no docstring": ("data/quiet.py", "x = 1", "does not say what it is"),
  "a circle": ("evaluate.py", "from medattn_jax import train", "evaluate.py: imports itself"),
  "a circle inside": ("models/rest.py", "from medattn_jax.models import norm", "imports itself"),
  "a second Orbax": ("train.py", "import orbax.checkpoint as ocp", "train.py: imports orbax"),
  "TensorFlow in a loop": (
    "train.py",
    "from tensorflow import data",
    "train.py: imports tensorflow",
  ),
  "clu elsewhere": ("evaluate.py", "def f():\n  from clu import metrics", "imports clu"),
  "a model with TensorFlow": ("models/rest.py", "import tensorflow", "rest.py: imports tensorflow"),
  "TensorFlow by the back door": (
    "predictor.py",
    "from medattn_jax import evaluate",
    "predictor.py: imports tensorflow, itself or by way",
  ),
  "JAX in data": ("data/schema.py", "import jax", "pipeline.py: imports jax, itself or by way"),
  "JAX in data, lazily": ("data/schema.py", "def f():\n  import jax", "schema.py: imports jax"),
  "pickle": ("data/schema.py", "import pickle", "imports pickle"),
  "a shell": ("cli.py", "def f():\n  import subprocess", "imports subprocess"),
  "the network": ("data/schema.py", "from urllib.request import urlopen", "imports urllib"),
  "a program run": ("predictor.py", "def f():\n  import runpy", "predictor.py: imports runpy"),
  "eval": ("config.py", "x = eval('1')", "calls eval"),
  "exec": ("config.py", "exec('x = 1')", "calls exec"),
  "os.system": ("config.py", "import os\nos.system('ls')", "calls os.system"),
  "extractall": ("data/schema.py", "def f(tar):\n  tar.extractall('.')", "calls tar.extractall"),
  "np.load": ("data/schema.py", "np.load('x')", "np.load without"),
  "allow_pickle": ("data/schema.py", "np.savez('x', allow_pickle=True)", "shell or allow_pickle"),
  "torch.load": ("models/rest.py", "import torch\ntorch.load('x')", "torch.load without"),
}


def plant(root, sources):
  for name, text in sources.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text + "\n")
  return root


def test_a_sound_house_has_no_violations(tmp_path):
  assert violations(plant(tmp_path, SOUND)) == []


@pytest.mark.parametrize(("name", "line", "said"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_fault_is_found(tmp_path, name, line, said):
  before = SOUND.get(name, "")
  found = violations(plant(tmp_path, {**SOUND, name: f"{before}\n{line}" if before else line}))
  assert any(said in one for one in found), found


def imported(code: str) -> set[str]:
  """The top-level libraries that are loaded after `code`, in a process of its own."""
  code += "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
  run = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert run.returncode == 0, run.stderr
  return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_package_is_imported_lightly():
  heavy = {"jax", "numpy", "tensorflow", "flax", "orbax", "matplotlib", "PIL", "sklearn"}
  assert not imported("import medattn_jax, medattn_jax.cli") & heavy


def test_models_steps_and_predictions_start_without_tensorflow():
  modules = "models, step, experiment, predictor, checkpoint"
  assert not imported(f"from medattn_jax import {modules}") & {"tensorflow", "clu", "orbax"}


def test_a_training_begins_to_compile_without_tensorflow():
  """Whose import, of seconds, is done while XLA works."""
  heavy = {"tensorflow", "clu", "orbax", "sklearn", "matplotlib"}
  assert not imported("from medattn_jax import train") & heavy


def test_preprocessing_and_drawing_start_without_jax_and_tensorflow():
  found = imported("from medattn_jax.data import preprocess, schema, synthetic")
  assert not found & {"tensorflow", "tensorflow_datasets", "jax", "flax"}


def test_the_project_speaks_of_itself_alone():
  """No path of some machine, in anything a reader reads."""
  foreign = re.compile(r"/(?:wo" + "rk|ro" + r"ot|home)/\w|/tm" + r"p/\w")
  folders = (NAME, "tests", "configs", "benchmarks", "docs", ".ci")
  paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
  paths += [path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt", ".cff"}]
  for path in [*paths, ROOT / "Makefile"]:
    if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".cff", ".sh", ""}:
      lines = path.read_text().splitlines()
      assert not (bad := [line for line in lines if foreign.search(line)]), (path, bad)
