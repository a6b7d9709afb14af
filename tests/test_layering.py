"""The three floors, read from the imports.

pallas_kernels stands alone; the floor of sparsejax (select/ and the single
files) never imports a room; rooms never import each other; recipes/ may import
every room; nothing that ships imports what does not.
"""

import ast
import pathlib
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = ("sparsejax", "pallas_kernels")
ROOMS = {
  "activations",
  "attention",
  "finetuning",
  "routing",
  "sparse_coding",
  "weights",
}
FLOOR_PACKAGES = {"select"}
NOT_SHIPPED = {"configs", "conftest", "docs", "experiments", "tests"}
# What a distribution is imported as, where the names differ.
IMPORTED_AS = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
# Drawing and files are optional: they are imported where they are asked for.
ALSO_ALLOWED = {
  "sparsejax.plots": {"matplotlib"},
  "sparsejax.tensor_files": {"safetensors"},
}


def declared_packages(pyproject: str) -> set[str]:
  """The top-level names that the run-time dependencies bring."""
  names = []
  for requirement in tomllib.loads(pyproject)["project"]["dependencies"]:
    name = requirement
    for sign in "[<>=!~; ":
      name = name.split(sign)[0]
    names.append(IMPORTED_AS.get(name, name.replace("-", "_")))
  return {*names, "jaxlib"}


def imported_names(source: str, module: str, is_package: bool) -> list[str]:
  """The absolute dotted names that a source imports, wherever in it.

  `from a import b` gives `a.b`: b may be a module, and where it is not, the
  longer name still lies in the same place. Calls of import_module and
  __import__ count where the name is a literal.
  """
  package = module.split(".") if is_package else module.split(".")[:-1]
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, *([base] if base else [])])
      names += [
        base if alias.name == "*" else f"{base}.{alias.name}"
        for alias in node.names
      ]
    elif (
      isinstance(node, ast.Call)
      and node.args
      and isinstance(node.args[0], ast.Constant)
      and isinstance(node.args[0].value, str)
    ):
      called = node.func
      name = getattr(called, "attr", getattr(called, "id", ""))
      if name in ("import_module", "__import__"):
        names.append(node.args[0].value)
  return names


def place(name: str) -> str:
  """Where in sparsejax a dotted name lies: root, floor, recipes or a room."""
  parts = name.split(".")
  if len(parts) == 1:
    return "root"
  return parts[1] if parts[1] in ROOMS | {"recipes"} else "floor"


def fault(
  module: str, is_package: bool, imported: str, third_party: set[str]
) -> str | None:
  """Why `module` may not import `imported`; None where it may."""
  home = module.split(".")[0]
  top = imported.split(".")[0]
  if top in NOT_SHIPPED:
    return f"{top} is not in the wheel"
  if top not in SHIPPED:
    allowed = {"jax", "jaxlib", "numpy"}
    if home == "sparsejax":
      allowed = third_party | ALSO_ALLOWED.get(module, set())
    known = top in allowed or top in sys.stdlib_module_names
    return None if known else f"{top} is not a dependency of {home}"
  if home == "pallas_kernels":
    return (
      "pallas_kernels never imports sparsejax" if top == "sparsejax" else None
    )
  if top == "pallas_kernels":
    return None
  # sparsejax to sparsejax. Its __init__.py is the front door, which shows the
  # rooms; so nobody inside may go through it.
  if module == "sparsejax" and is_package:
    return None
  source, target = place(module), place(imported)
  if target == "root":
    return "import the module that is meant, not the whole of sparsejax"
  if target in ("floor", source) or source == "recipes":
    return None
  if source == "floor":
    return f"the floor never imports {target}"
  if target == "recipes":
    return "rooms never import recipes"
  return f"rooms never import each other: {source} and {target}"


def faults(
  sources: dict[str, str], third_party: set[str]
) -> list[tuple[str, str, str]]:
  """(file, imported name, reason) for each edge that the floors forbid.

  `sources` maps a path such as "sparsejax/weights/rules.py" to its text.
  """
  found = []
  for path, source in sources.items():
    parts = path.removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    if is_package:
      parts.pop()
    module = ".".join(parts)
    known = ROOMS | FLOOR_PACKAGES | {"recipes"}
    nested = len(parts) > 2 or (is_package and len(parts) == 2)
    if parts[0] == "sparsejax" and nested and parts[1] not in known:
      found.append((path, "", f"{parts[1]} is neither floor nor room"))
    for name in imported_names(source, module, is_package):
      reason = fault(module, is_package, name, third_party)
      if reason:
        found.append((path, name, reason))
  return found


def test_floors():
  third_party = declared_packages((ROOT / "pyproject.toml").read_text())
  sources = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for package in SHIPPED
    for path in sorted((ROOT / package).rglob("*.py"))
  }
  assert "sparsejax/__init__.py" in sources
  assert "pallas_kernels/__init__.py" in sources
  assert not faults(sources, third_party)


THIRD_PARTY = {"jax", "jaxlib", "numpy", "optax", "flax", "orbax", "absl"}


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("pallas_kernels/a.py", "import sparsejax"),
    ("pallas_kernels/a.py", "from sparsejax.select import top_k_mask"),
    ("pallas_kernels/a.py", "import optax"),
    ("pallas_kernels/a.py", "import tests.oracles"),
    ("sparsejax/masks.py", "from sparsejax.weights import rules"),
    ("sparsejax/masks.py", "from sparsejax import weights"),
    ("sparsejax/masks.py", "from .weights import rules"),
    ("sparsejax/masks.py", "from . import weights"),
    ("sparsejax/masks.py", "import sparsejax"),
    ("sparsejax/masks.py", "def f():\n  import sparsejax.recipes.umoe"),
    ("sparsejax/masks.py", "import chex"),
    ("sparsejax/masks.py", "import matplotlib.pyplot"),
    ("sparsejax/select/top_k.py", "from ..routing import routers"),
    ("sparsejax/select/__init__.py", "from ..weights import rigl"),
    ("sparsejax/select/top_k.py", "__import__('sparsejax.attention')"),
    ("sparsejax/weights/rules.py", "from sparsejax.finetuning import lora"),
    ("sparsejax/weights/__init__.py", "from ..sparse_coding import solvers"),
    ("sparsejax/weights/rules.py", "from sparsejax import *"),
    ("sparsejax/weights/rules.py", "import sparsejax.recipes"),
    ("sparsejax/weights/rules.py", "from experiments import tasks"),
    (
      "sparsejax/weights/rules.py",
      "import importlib\nimportlib.import_module('configs.demo')",
    ),
    ("sparsejax/recipes/umoe.py", "from experiments.models import mlp"),
    ("sparsejax/__init__.py", "from tests import oracles"),
    ("sparsejax/pruning/__init__.py", ""),
    ("sparsejax/pruning/wanda.py", ""),
  ],
)
def test_forbidden_edge_is_found(path, source):
  assert len(faults({path: source}, THIRD_PARTY)) == 1


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("pallas_kernels/a.py", "import jax, numpy, functools"),
    ("pallas_kernels/a.py", "from pallas_kernels import block_mask"),
    ("pallas_kernels/b/tpu.py", "from jax.experimental import pallas"),
    ("pallas_kernels/b/__init__.py", "from ..block_mask import BlockMask"),
    ("sparsejax/masks.py", "from sparsejax.select import structures"),
    ("sparsejax/masks.py", "from .select import structures"),
    ("sparsejax/masks.py", "from sparsejax import costs"),
    ("sparsejax/plots.py", "def f():\n  import matplotlib.pyplot as plt"),
    ("sparsejax/select/top_k.py", "from . import thresholds"),
    ("sparsejax/select/top_k.py", "from sparsejax import sharding"),
    ("sparsejax/weights/rules.py", "import optax\nfrom sparsejax import masks"),
    ("sparsejax/weights/rules.py", "from sparsejax.weights import sparsify"),
    ("sparsejax/weights/__init__.py", "from .rules import rigl"),
    ("sparsejax/attention/a.py", "from pallas_kernels import block_mask"),
    (
      "sparsejax/recipes/umoe.py",
      "from sparsejax.attention import a\nfrom sparsejax.routing import b",
    ),
    ("sparsejax/__init__.py", "from sparsejax import select, weights"),
  ],
)
def test_allowed_edge_passes(path, source):
  assert not faults({path: source}, THIRD_PARTY)
