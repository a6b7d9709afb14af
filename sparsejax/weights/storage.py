"""Sparse models in files, and what that saves.

A file is smaller than the dense one; that alone makes nothing faster. Kernels
of blocks and of constant fan-in run as such by `condense`; a bitmask and n:m
are unpacked and computed as dense.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
import os
import pathlib
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import costs
from sparsejax import paths
from sparsejax import tensor_files
from sparsejax.weights import packing

PyTree = Any
Format = packing.Format

_KEY, _VERSION = "sparsejax", 1  # in a file's metadata
# What safetensors writes and reads back with NumPy.
_DTYPES = {
  *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
  *("uint64", "bfloat16", "float16", "float32", "float64", "complex64"),
}


@dataclasses.dataclass(frozen=True)
class Stored:
  """One parameter as it is stored, or all of them.

  Attributes:
    format: its name, None for all of them.
    dense_bytes: bytes of the array.
    bytes: bytes that are stored.
    dense_flops: forward FLOPs of one row of inputs, with all weights.
    flops: the same if excluded weights cost nothing. Both are None where
      nothing is excluded: an array does not tell whether it is multiplied.
    runs: whether the format makes the layer faster on this backend.
  """

  format: str | None
  dense_bytes: int
  bytes: int
  dense_flops: float | None
  flops: float | None
  runs: str


@dataclasses.dataclass(frozen=True)
class StorageReport:
  """Rows by path, and their total; `str` makes it a table.

  Attributes:
    layers: a row for each parameter.
    backend: of jax, which `runs` is about.
  """

  layers: Mapping[str, Stored]
  backend: str

  @property
  def total(self) -> Stored:
    """Over all parameters; of FLOPs, over the sparse ones."""
    return _total(self.layers.values())

  def __str__(self) -> str:
    sparse = {n: r for n, r in self.layers.items() if r.flops is not None}
    others = [r for r in self.layers.values() if r.flops is None]
    rows = dict(sparse)
    if others:
      rows[f"({len(others)} others)"] = _total(others)
    rows["total"] = self.total
    lines = [
      f"{'parameter':<40} {'format':<15} {'dense bytes':>13} {'bytes':>13} "
      f"{'of':>6} {'dense FLOPs':>13} {'FLOPs':>13}  on {self.backend}"
    ]
    flops = lambda x: "-" if x is None else f"{x:,.0f}"
    for name, r in rows.items():
      share = r.bytes / r.dense_bytes if r.dense_bytes else 1
      lines.append(
        f"{name:<40} {r.format or '':<15} {r.dense_bytes:>13,} {r.bytes:>13,} "
        f"{share:>6.1%} {flops(r.dense_flops):>13} {flops(r.flops):>13}  "
        f"{r.runs}".rstrip()
      )
    lines.append(
      "FLOPs: of one row of inputs, sparse layers alone, if excluded weights "
      "cost nothing."
    )
    if any(r.runs.startswith(_BY_CONDENSE) for r in sparse.values()):
      lines.append(
        "condense: sparsejax.weights.condense; faster at some batch sizes and "
        "slower at others, as python -m experiments.bench --only=condensed "
        "prints."
      )
    return "\n".join(lines)


_BY_CONDENSE = "by condense: "


def _runs(format: str, backend: str) -> str:
  if format == "dense":
    return "computed as dense"
  if format in ("bitmask", "nm"):
    return "no faster: computed as dense"
  if backend == "cpu":
    return f"{_BY_CONDENSE}depends on the batch"
  return f"{_BY_CONDENSE}not measured on {backend}"


def _total(rows) -> Stored:
  rows = list(rows)
  flops = [r for r in rows if r.flops is not None]
  return Stored(
    format=None,
    dense_bytes=sum(r.dense_bytes for r in rows),
    bytes=sum(r.bytes for r in rows),
    dense_flops=sum(r.dense_flops for r in flops) if flops else None,
    flops=sum(r.flops for r in flops) if flops else None,
    runs="",
  )


def storage_report(
  params: PyTree,
  masks: PyTree,
  formats: Format | Mapping[str, Format] = "auto",
) -> StorageReport:
  """What `save` would store, and what that saves: bytes, FLOPs, time or not.

  Args:
    params: as in `save`, and so the others.
    masks: their masks.
    formats: what they are stored as.

  Raises:
    ValueError: as `save`.

  >>> params = {"w": jnp.eye(64), "b": jnp.ones(64)}
  >>> masks = {"w": jnp.eye(64, dtype=bool)}
  >>> report = weights.storage_report(params, masks)
  >>> row = report.layers["w"]
  >>> row.format, row.dense_bytes, row.bytes, row.dense_flops, row.flops
  ('constant_fan_in', 16384, 384, 8192, 128)
  >>> report.layers["w"].runs, report.layers["b"].runs
  ('by condense: depends on the batch', 'computed as dense')
  """
  return _report(_packed(params, masks, formats))


class _Entry(NamedTuple):
  packed: packing.Packed
  kept: int | None  # where its mask excludes something
  masked: bool


def _report(entries: Mapping[str, _Entry]) -> StorageReport:
  backend, layers = jax.default_backend(), {}
  for name, (packed, kept, _) in entries.items():
    format, shape, dtype = (
      packed.description[key] for key in ("format", "shape", "dtype")
    )
    size, sparse = math.prod(shape), kept is not None
    layers[name] = Stored(
      format=format,
      dense_bytes=size * jnp.dtype(dtype).itemsize,
      bytes=packed.nbytes,
      dense_flops=costs.weight_flops(size) if sparse else None,
      flops=costs.weight_flops(kept) if sparse else None,
      runs=_runs(format, backend),
    )
  return StorageReport(layers, backend)


def _packed(params, masks, formats) -> dict[str, _Entry]:
  leaves, wanted = paths.named(params)[0], paths.named(masks)[0]
  for name, mask in wanted.items():
    if isinstance(mask, jax.core.Tracer):
      raise ValueError(f"masks[{name!r}] must be concrete, got {mask}")
    got = leaves[name].shape if name in leaves else None
    if got != mask.shape or mask.dtype != bool:
      raise ValueError(
        f"masks[{name!r}] must be a boolean mask of a parameter, got "
        f"{mask.dtype}{list(mask.shape)} for a parameter of shape {got}"
      )
  wanted = {name: np.asarray(mask) for name, mask in wanted.items()}
  pruned = [name for name, mask in wanted.items() if not mask.all()]
  chosen = dict.fromkeys(pruned, formats)
  if isinstance(formats, Mapping):
    chosen = paths.matching("formats", formats, pruned)
  found = {}
  for name, leaf in leaves.items():
    try:
      w = packing.host(leaf)
      if w.dtype.name not in _DTYPES:
        raise ValueError(f"safetensors has no dtype {w.dtype}")
      mask = wanted.get(name, np.ones(w.shape, bool))
      sparse = not mask.all()
      format = chosen.get(name, "auto") if sparse else "dense"
      lost = 0 if format == "dense" else np.count_nonzero(w[~mask])
      if lost:
        raise ValueError(
          f"{lost} weights that its mask excludes are not zero, and would be "
          'lost: store sparse_params(opt_state, params), or name "dense"'
        )
      packed = packing.pack(w, mask, format)
    except (TypeError, ValueError) as error:
      raise ValueError(f"{name}: {error}") from error
    kept = int(mask.sum()) if sparse else None
    found[name] = _Entry(packed, kept, name in wanted)
  return found


def save(
  path: str | os.PathLike,
  params: PyTree,
  masks: PyTree,
  formats: Format | Mapping[str, Format] = "auto",
) -> StorageReport:
  """Writes parameters and masks into one safetensors file.

  The file is written beside its place and then moved there: whatever fails,
  there is the old file or the new one. An array of a parameter lies in it under
  the parameter's name, a dot, and the name that `pack` tells; the metadata
  "sparsejax" describes them, with checksums, as JSON.

  Args:
    path: of the file, which is replaced where it exists.
    params: the parameters, concrete arrays of 8 to 64 bits.
    masks: their masks, as `masks(opt_state, params)` and `prune` give them: a
      tree of bool arrays like the parameters, or part of that tree.
    formats: what kernels that a mask excludes something of are stored as: what
      `pack` takes, for all or by patterns of their names; "auto" for those that
      no pattern matches. All other parameters are dense.

  Returns:
    What was stored, and what it saves.

  Raises:
    ValueError: naming the parameter, for masks that fit neither it nor its
      format, and excluded weights that are not zero; without safetensors.
    OSError: the file cannot be written.

  Example:
    >>> import os, tempfile
    >>> params = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]]), "b": jnp.ones(2)}
    >>> masks = {"w": params["w"] != 0}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   path = os.path.join(directory, "sparse.safetensors")
    ...   report = weights.save(path, params, masks)
    ...   found, found_masks = weights.load(path)
    >>> found["w"].tolist(), found["b"].tolist(), found_masks["w"].tolist()
    ([[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0], [[True, False], [False, True]])
  """
  tensor_files.package()  # before anything is made
  entries = _packed(params, masks, formats)
  tensors, about = {}, {}
  for name, (packed, _, masked) in entries.items():
    checks = {n: _checksum(x) for n, x in packed.arrays.items()}
    about[name] = packed.description | {"masked": masked, "crc32": checks}
    tensors |= {f"{name}.{n}": x for n, x in packed.arrays.items()}
  metadata = {_KEY: json.dumps({"version": _VERSION, "params": about})}
  tensor_files.write(pathlib.Path(path), tensors, metadata)
  return _report(entries)


def load(
  path: str | os.PathLike, like: PyTree | None = None
) -> tuple[PyTree, PyTree]:
  """The parameters and masks of a file that `save` wrote, bit for bit.

  Args:
    path: of the file.
    like: None, or the parameters of the model (or their shapes).

  Returns:
    By name, NumPy arrays: the parameters, and the masks of those that were
    saved with one. With `like` trees like it, of arrays placed as its are, and
    masks that are True where there was none.

  Raises:
    ValueError: naming the file, where it is missing, truncated or damaged, or
      not of `save`; and the parameter, where `like` has another.
  """
  path = pathlib.Path(path)
  about, tensors = _read(path)
  params, masks = {}, {}
  for name, given in about.items():
    try:
      given = dict(given)
      checks, masked = given.pop("crc32"), given.pop("masked")
      arrays = {n: tensors[f"{name}.{n}"] for n in checks}
      for n, x in arrays.items():
        if _checksum(x) != checks[n]:
          raise ValueError(f"{n} differs from its checksum")
      params[name], mask = packing.unpack(packing.Packed(arrays, given))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{path} is damaged: {name}: {error}") from error
    if masked:
      masks[name] = mask
  if like is None:
    return params, masks
  leaves, rebuild = paths.named(like)
  told = lambda x: f"{x.dtype}{list(x.shape)}"
  for name in sorted(leaves | params):
    want, got = (told(x[name]) if name in x else None for x in (leaves, params))
    if want != got:
      raise ValueError(f"like must be of {path}: {name} is {got}, got {want}")
  for name, x in params.items():
    place = getattr(leaves[name], "sharding", None)
    mask = masks.get(name, np.ones(x.shape, bool))
    params[name], masks[name] = jax.device_put((x, mask), place)
  return rebuild(params), rebuild(masks)


def _read(path):
  """The descriptions by parameter, and the arrays, of a file."""
  metadata, tensors = tensor_files.read(path)
  if _KEY not in metadata:
    raise ValueError(f"{path} was not written by sparsejax.weights.save")
  try:
    found = json.loads(metadata[_KEY])
    version, about = found["version"], dict(found["params"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged: {error!r} in its metadata") from error
  if version != _VERSION:
    raise ValueError(
      f"{path} is of version {version}; this sparsejax reads {_VERSION}"
    )
  return about, tensors


def _checksum(x: np.ndarray) -> int:
  return zlib.crc32(x.reshape(-1).view(np.uint8))
