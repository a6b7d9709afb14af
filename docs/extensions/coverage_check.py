"""Warns of each public name that no page documents (the build then fails).

Public is what the packages of sparsejax show: the names in their `__all__`
(of a module named there, what that module shows), or without one the functions
and classes that lie inside the package. A single file on the floor shows what
its `__all__` lists, and without one nothing. A name is documented where an
autodoc directive of any page names that object, by this path or another.
"""

from collections.abc import Iterable
import importlib
import inspect
import pathlib
import pkgutil
import re
from types import ModuleType

_DIRECTIVE = re.compile(
  r"^\s*(?:\.\. |[`:]{3,}\{)auto(?:class|data|decorator|exception|function)"
  r"(?:::\s*|\}\s*)([\w.]+)",
  re.MULTILINE,
)


def documented_names(pages: Iterable[str]) -> set[str]:
  """The dotted names that the autodoc directives of some pages give."""
  return {name for page in pages for name in _DIRECTIVE.findall(page)}


def public_names(module: ModuleType) -> dict[str, object]:
  """What a module shows: each dotted name and its object."""
  names = getattr(module, "__all__", None)
  if names is None:
    inside = module.__name__ + "."
    names = [
      name
      for name, value in vars(module).items()
      if not name.startswith("_")
      and callable(value)
      and f"{getattr(value, '__module__', '')}.".startswith(inside)
    ]
  shown = {}
  for name in names:
    value = getattr(module, name)
    if inspect.ismodule(value):
      shown |= public_names(value)
    else:
      shown[f"{module.__name__}.{name}"] = value
  return shown


def missing_names(
  modules: Iterable[ModuleType], documented: Iterable[str]
) -> list[str]:
  """The public names, dotted, whose object no documented name leads to."""
  documented = set(documented)
  objects = set()
  for name in documented:
    home, _, last = name.rpartition(".")
    try:
      objects.add(id(getattr(importlib.import_module(home), last)))
    except (AttributeError, ImportError):
      continue  # autodoc warns of it itself
  return [
    name
    for module in modules
    for name, value in public_names(module).items()
    if name not in documented and id(value) not in objects
  ]


def public_modules(package: ModuleType) -> list[ModuleType]:
  """The packages directly in a package, and the files that have `__all__`."""
  modules = [
    importlib.import_module(f"{package.__name__}.{found.name}")
    for found in pkgutil.iter_modules(package.__path__)
    if not found.name.startswith("_")
  ]
  return [
    module
    for module in modules
    if hasattr(module, "__path__") or hasattr(module, "__all__")
  ]


def read_pages(folder: pathlib.Path) -> list[str]:
  return [path.read_text() for path in sorted(folder.rglob("*.md"))]


def _check(app):
  from sphinx.util import logging

  modules = public_modules(importlib.import_module("sparsejax"))
  documented = documented_names(read_pages(pathlib.Path(app.srcdir)))
  for name in missing_names(modules, documented):
    logging.getLogger(__name__).warning(
      "no page documents the public name %s", name
    )


def setup(app):
  app.connect("builder-inited", _check)
  return {"parallel_read_safe": True}
