"""Names of a tree's leaves, and settings given by patterns of names."""

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any

import jax


def name_of(path: tuple[Any, ...]) -> str:
  """The name of a leaf: "layers/0/kernel".

  The same for nested dicts, Linen's boxes and NNX's variables, whose leaves
  end in a `value` of their own that is left out.
  """
  if path and getattr(path[-1], "name", None) in ("value", "raw_value"):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping], Any]]:
  """The leaves of `tree` by name, and the function that puts them back.

  >>> leaves, rebuild = named({"a": {"kernel": 1}, "b": 2})
  >>> leaves
  {'a/kernel': 1, 'b': 2}
  >>> rebuild({"a/kernel": 3, "b": 4})
  {'a': {'kernel': 3}, 'b': 4}
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
  names = [name_of(path) for path, _ in leaves]
  if len(set(names)) < len(names):
    twice = sorted({n for n in names if names.count(n) > 1})
    raise ValueError(f"leaves must have names of their own, got {twice} twice")

  def rebuild(by_name: Mapping[str, Any]) -> Any:
    return treedef.unflatten([by_name[n] for n in names])

  return dict(zip(names, (x for _, x in leaves), strict=True)), rebuild


def matching(
  setting: str, patterns: Mapping[str, Any], names: Iterable[str]
) -> dict[str, Any]:
  """The value for each name: that of the first pattern found in it.

  Patterns are regular expressions, searched for. Names that none matches are
  left out; a pattern that gives no name its value is an error.

  >>> matching("rank", {"mlp": 8, "kernel$": 4}, ["mlp/kernel", "out/kernel"])
  {'mlp/kernel': 8, 'out/kernel': 4}
  """
  names = list(names)
  for pattern in patterns:
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(
        f"{setting} must have regular expressions, got {pattern!r}: {error}"
      ) from error
  out, used = {}, set()
  for name in names:
    for pattern, value in patterns.items():
      if re.search(pattern, name):
        out[name] = value
        used.add(pattern)
        break
  for pattern in patterns:
    if pattern not in used:
      raise ValueError(
        f"{setting} has a pattern that matches no weight, or none that an "
        f"earlier pattern left: {pattern!r}; the weights are {names}"
      )
  return out
