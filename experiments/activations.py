"""Activations of a model on texts: kept in files, and read in any order.

A store is a directory of shards, which are the rows and nothing else, and of
meta.json, which says what they are of. It is there whole, or not at all. Rows
are the tokens of texts, padding left out, and each has the number of its text
and of its token there.

  texts = activations.paragraphs()
  activations.collect(path, loaded, "blocks/3", texts)
  store = activations.Store(path)
  batches = iter(store.batches(512, seed=0).to_iter_dataset())
"""

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import inspect
import json
import pathlib
import sysconfig
from typing import Any

from flax import nnx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import files
from experiments import prune
from experiments.models import pretrained
from experiments.tasks import task
from sparsejax import capture

DTYPES = ("float16", "bfloat16", "float32")
LEAST = 40  # characters of a paragraph
SHARD = 1 << 16  # rows
META = "meta.json"
# What each row is: the number of its text, and of its token there.
PLACES = ("text", "token")

Part = tuple[np.ndarray, np.ndarray, np.ndarray]


def paragraphs(directory: pathlib.Path | None = None) -> list[str]:
  """English text that Python's installation carries, each of it once.

  That is the paragraphs of all docstrings of the standard library, and those
  of the language reference that `help` shows.

  Args:
    directory: of Python files, in the place of the standard library.

  Raises:
    ValueError: there are none.
  """
  root = pathlib.Path(directory or sysconfig.get_path("stdlib"))
  found = [
    text
    for path in sorted(root.rglob("*.py"))
    # Installed packages lie there, too, and what is not documentation.
    if not {"site-packages", "dist-packages", "test"} & set(path.parts)
    for text in _docstrings(path)
  ]
  if directory is None:
    from pydoc_data import topics

    found += [topics.topics[name] for name in sorted(topics.topics)]
  lines = (
    " ".join(paragraph.split())
    for text in found
    for paragraph in inspect.cleandoc(text).split("\n\n")
  )
  texts = list(dict.fromkeys(line for line in lines if len(line) >= LEAST))
  if not texts:
    raise ValueError(f"{root} has no Python file with a docstring")
  return texts


def _docstrings(path):
  try:
    tree = ast.parse(path.read_bytes())
  except SyntaxError:
    return []
  kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
  nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
  return [ast.get_docstring(node, clean=False) or "" for node in nodes]


class Store:
  """A random-access source of rows.

  Attributes:
    meta: what meta.json says: rows, width, dtype, shards, about.
    text: int32 [rows], which text each row is of.
    token: int32 [rows], which token of it.
  """

  def __init__(
    self, directory: str | pathlib.Path, about: Mapping[str, Any] | None = None
  ):
    """Opens a store; rows are read when they are asked for.

    Args:
      directory: what `write` made.
      about: what the store must say of itself; others of its entries are not
        looked at.

    Raises:
      ValueError: the store is damaged, or of something else.
    """
    path = pathlib.Path(directory)
    self.meta = _meta(path)
    for name, value in (about or {}).items():
      kept = self.meta["about"].get(name)
      if kept != value:
        raise ValueError(
          f"{path} holds activations of {name}={kept!r}, not of {value!r}; "
          "give another directory, or delete it to make it anew"
        )
    rows, self.width = self.meta["rows"], self.meta["width"]
    dtype = jnp.dtype(self.meta["dtype"])
    shapes = {
      name: (dtype, (count, self.width))
      for name, count in self.meta["shards"].items()
    } | {name: (np.dtype(np.int32), (rows,)) for name in PLACES}
    # All before the first is read.
    for name, (kind, shape) in shapes.items():
      _check_size(path / name, kind.itemsize * int(np.prod(shape)))
    opened = {
      name: np.memmap(path / name, kind, "r", shape=shape)
      for name, (kind, shape) in shapes.items()
    }
    self.text, self.token = (opened.pop(name) for name in PLACES)
    self._shards = list(opened.values())
    self._ends = np.cumsum([len(shard) for shard in self._shards])

  def __len__(self) -> int:
    return self.meta["rows"]

  def __getitem__(self, index) -> np.ndarray:
    """f32 [..., width] of int [...]."""
    index = np.asarray(index)
    if index.size and not 0 <= index.min() <= index.max() < len(self):
      raise IndexError(f"index must be in [0, {len(self)}), got {index}")
    found = np.empty((*index.shape, self.width), np.float32)
    holder = np.searchsorted(self._ends, index, side="right")
    for i in np.unique(holder):
      here, shard = holder == i, self._shards[i]
      found[here] = shard[index[here] - (self._ends[i] - len(shard))]
    return found

  def mean(self) -> np.ndarray:
    """f32 [width], of all rows."""
    total = sum(
      np.asarray(shard[i : i + SHARD]).astype(np.float64).sum(0)
      for shard in self._shards
      for i in range(0, len(shard), SHARD)
    )
    return (total / len(self)).astype(np.float32)

  def batches(self, size: int, seed: int) -> grain.MapDataset:
    """Endless batches f32 [size, width]; each epoch has an order of its own.

    An iterator of them can be saved and restored, and then goes on exactly.
    """
    return task.endless_batches(self, size)(seed)


def _meta(path):
  if not (path / META).is_file():
    raise ValueError(f"{path} is no store of activations: it has no {META}")
  try:
    meta = json.loads((path / META).read_text())
    if {"rows", "width", "dtype", "shards", "about"} <= set(meta):
      return meta
  except ValueError as error:
    raise ValueError(f"{path / META} is damaged: {error}") from error
  raise ValueError(f"{path / META} lacks fields; it has {', '.join(meta)}")


def _check_size(path, size):
  got = path.stat().st_size if path.is_file() else 0
  if got != size:
    raise ValueError(f"{path} has {got} bytes and should have {size}")


def write(
  directory: str | pathlib.Path,
  parts: Iterable[Part],
  about: Mapping[str, Any],
  *,
  dtype: str = "float16",
  shard: int = SHARD,
) -> None:
  """Writes a store: all of it, or nothing.

  Args:
    directory: is made.
    parts: (rows [n, width], texts int [n], tokens int [n]), in their order.
    about: what the rows are of, for JSON.
    dtype: in which rows are kept.
    shard: rows of a file, about.

  Raises:
    ValueError: there are no rows, they differ in width, or some are not finite.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
  with files.new_directory(pathlib.Path(directory)) as path:
    shards, places, width = {}, {name: [] for name in PLACES}, None
    name = None
    for rows, *place in parts:
      width = width or rows.shape[1]
      if rows.shape[1] != width:
        raise ValueError(f"rows must be [n, {width}], got {list(rows.shape)}")
      rows = _finite(rows, *place, dtype)
      if name is None or shards[name] >= shard:
        name = f"{len(shards):05d}"
        shards[name] = 0
      shards[name] += len(rows)
      with open(path / name, "ab") as file:
        file.write(rows.tobytes())
      for which, numbers in zip(PLACES, place, strict=True):
        places[which].append(np.asarray(numbers, np.int32))
    total = sum(shards.values())
    if not total:
      raise ValueError("parts must hold at least one row, got none")
    for which, numbers in places.items():
      (path / which).write_bytes(np.concatenate(numbers).tobytes())
    meta = {
      "rows": total,
      "width": int(width),
      "dtype": dtype,
      "shards": shards,
      "about": dict(about),
    }
    files.write(path / META, json.dumps(meta, indent=2) + "\n")


def _finite(rows, text, token, dtype):
  """The rows in the dtype, where all of them are finite."""
  with np.errstate(over="ignore"):  # an infinity is told of below
    rows = np.asarray(rows).astype(jnp.dtype(dtype))
  finite = np.isfinite(rows).all(1)
  if not finite.all():
    bad = finite.argmin()
    raise ValueError(
      f"activations must be finite in {dtype}; those of token {token[bad]} of "
      f"text {text[bad]} are not"
    )
  return rows


def describe(
  loaded: pretrained.Pretrained,
  layer: str,
  texts: Sequence[str],
  length: int,
) -> dict[str, Any]:
  """What tells activations from those of another model, layer or text."""
  leaves = jax.tree.leaves(nnx.state(loaded.model, nnx.Param))
  return {
    "model": type(loaded.model).__name__,
    "weights": prune.digest(np.asarray(x).tobytes() for x in leaves),
    "layer": layer,
    "text": prune.digest(text.encode() for text in texts),
    "texts": len(texts),
    "length": length,
  }


def collect(
  directory: str | pathlib.Path,
  loaded: pretrained.Pretrained,
  layer: str,
  texts: Sequence[str],
  *,
  length: int = 64,
  dtype: str = "float16",
) -> Store:
  """What a module returns on texts, as a store, which is made where it's none.

  Args:
    directory: of the store.
    loaded: an encoder with its tokenizer.
    layer: path of the module, such as "blocks/3".
    texts: are cut to `length` tokens.
    length: in tokens.
    dtype: as `write` takes it.

  Raises:
    ValueError: the model has no such module, the directory holds something
      else or in another dtype, or activations are not finite.
  """
  about = describe(loaded, layer, texts, length)
  if not pathlib.Path(directory).exists():
    batches = prune.batches_of(loaded.tokenizer, texts, length)
    write(directory, rows(loaded.model, layer, batches), about, dtype=dtype)
  store = Store(directory, about)
  if store.meta["dtype"] != dtype:
    raise ValueError(
      f"{directory} keeps activations in {store.meta['dtype']!r}, not in "
      f"{dtype!r}; give another directory, or delete it to make it anew"
    )
  return store


def rows(model: nnx.Module, layer: str, texts: prune.Texts) -> Iterator[Part]:
  """What a module returns of each batch's tokens, with a progress bar."""
  done = 0
  for tokens, valid in tqdm.tqdm(texts.batches, unit="batch"):
    found = np.asarray(stream(model, layer, tokens, valid))
    row, token = np.nonzero(valid)
    yield found[valid], texts.order[done + row], token
    done += len(tokens)


@functools.partial(nnx.jit, static_argnames="layer")
def stream(model, layer: str, tokens, valid) -> jax.Array:
  """What a module returns, [batch, sequence, width]."""
  call = lambda model: model(tokens, valid)
  _, found = capture.outputs(call, model, where=lambda path: path == layer)
  return found[layer]


def streamed(
  parts: Iterable[Part], size: int, *, window: int, seed: int = 0
) -> Iterator[np.ndarray]:
  """Batches [size, width] of rows that are kept nowhere, each given once.

  A window is filled and shuffled, half of it is given, and it is filled again:
  memory is that of the window and a part. What fills no batch is left out.

  Args:
    parts: as `write` takes them, such as `rows` gives.
    size: rows of a batch.
    window: rows that are shuffled together, about; two batches or more.
    seed: of their order.

  Raises:
    ValueError: the window holds less than two batches, or rows are not finite.

  >>> at = np.arange(6)
  >>> parts = [(np.ones((6, 1)), at, at)] * 2
  >>> [len(batch) for batch in streamed(parts, 2, window=4)]
  [2, 2, 2, 2, 2, 2]
  """
  if window < 2 * size:
    raise ValueError(f"window must be at least 2 * {size}, got {window}")
  generator, held = np.random.default_rng(seed), []

  def shuffled(share):
    nonlocal held
    whole = generator.permutation(np.concatenate(held))
    given = int(share * len(whole)) // size * size
    held = [whole[given:]]
    return whole[:given].reshape(-1, size, whole.shape[1])

  for found, *place in parts:
    held.append(_finite(found, *place, found.dtype))
    if sum(map(len, held)) >= window:
      yield from shuffled(0.5)
  if held:
    yield from shuffled(1)
