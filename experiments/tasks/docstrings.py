"""Functions of Python's standard library, and what their docstrings say.

Text that every machine has: a pair is a function's signature and the first
paragraph of its docstring. Whoever finds the one by the other understands text.
"""

import ast
import dataclasses
import hashlib
import inspect
import pathlib
import sys
import sysconfig

import numpy as np

LEAST, MOST = 40, 400  # characters of a docstring's first paragraph


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Signatures and docstrings, in the same order.

  Attributes:
    signatures: such as "textwrap: def dedent(text)".
    docstrings: first paragraphs, each on one line.
    source: what they are of, with a hash of them all.
  """

  signatures: tuple[str, ...]
  docstrings: tuple[str, ...]
  source: str


def load(directory: pathlib.Path | None = None) -> Pairs:
  """The pairs of the modules that lie directly in a directory.

  Args:
    directory: of Python files; default that of the standard library.

  Raises:
    ValueError: there are none.
  """
  given = directory is not None
  directory = pathlib.Path(directory or sysconfig.get_path("stdlib"))
  found = {}  # by docstring: the first that has it
  for path in sorted(directory.glob("*.py")):
    for function in functions(path):
      text = inspect.cleandoc(ast.get_docstring(function, clean=False) or "")
      text = " ".join(text.split("\n\n")[0].split())
      if LEAST <= len(text) <= MOST:
        arguments = ast.unparse(function.args)
        found.setdefault(text, f"{path.stem}: def {function.name}({arguments})")
  # Of equal signatures the first: no text tells which of them is meant.
  first = {signature: text for text, signature in reversed(found.items())}
  found = {text: x for text, x in found.items() if first[x] == text}
  if not found:
    raise ValueError(f"{directory} has no Python file with a docstring")
  digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]
  name = str(directory) if given else (
    f"the standard library of Python {sys.version.split()[0]}"
  )  # fmt: skip
  return Pairs(tuple(found.values()), tuple(found), f"{name} ({digest})")


def functions(path: pathlib.Path) -> list[ast.FunctionDef]:
  """The functions and methods of a file with a public name."""
  try:
    tree = ast.parse(path.read_bytes())
  except SyntaxError:
    return []
  return [
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
  ]


def split(
  pairs: Pairs, *, calibration: int, evaluation: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Which pairs calibrate and which evaluate: no pair does both.

  The pairs to evaluate are the same for all seeds.

  Raises:
    ValueError: there are not enough pairs.
  """
  total = len(pairs.docstrings)
  if calibration < 1 or evaluation < 2 or calibration + evaluation > total:
    raise ValueError(
      f"calibration and evaluation must be 1 and 2 or more, and {total} pairs "
      f"together; got {calibration} and {evaluation}"
    )
  order = np.random.default_rng(0).permutation(total)
  rest = np.random.default_rng(seed).permutation(order[evaluation:])
  return rest[:calibration], order[:evaluation]
