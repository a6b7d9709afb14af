"""Sparse kernels as they are stored: what masks left, and nothing else."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.select import structures as structures_lib

Format = str | structures_lib.Structure

_TAKES = (
  '"auto", "dense", "bitmask", or select.NM, Block, ConstantFanIn or '
  "Unstructured"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
  """A kernel as it is stored.

  Attributes:
    arrays: by the names that `pack` tells.
    description: format, shape and dtype, and what else the format has; JSON.
  """

  arrays: dict[str, np.ndarray]
  description: dict[str, Any]

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in self.arrays.values())


def pack(kernel: jax.Array, mask: jax.Array, format: Format) -> Packed:
  """What a mask leaves of a kernel, without what it excludes.

  Bits are kept: those of -0.0 and of NaN too. What the mask excludes is +0.0
  after `unpack`. The formats, each with its arrays:

  - "bitmask" (or `select.Unstructured()`): of the transpose [outputs, inputs],
    as the format sparse-bitmask of compressed-tensors has it: compressed
    [kept], bitmask uint8 [outputs, inputs / 8, rounded up] with the first bit
    lowest, row_offsets int64 [outputs], where each begins, and shape int64 [2].
    All axes but the last count as inputs.
  - `select.NM(n, m)`, n of m consecutive inputs: values [inputs / m * n,
    outputs] by position, and metadata uint8 [bytes, outputs], positions within
    the groups in as few bits as m needs, lowest first. Where a group keeps
    fewer, zeros at its lowest free positions fill it up, and used uint8 [bytes,
    outputs] has a bit for each value that tells which these are not.
  - `select.Block((bk, bn))`: values [kept, bk, bn], indices int32 [columns,
    longest], counts int32 [columns], as `pallas_kernels.BlockSparseWeight`.
  - `select.ConstantFanIn()`: values, inputs and, where some have no entry,
    outputs, as `CondensedWeight`.
  - "dense": values, the kernel as it is; and bitmask, unless the mask is full.

  Args:
    kernel: [inputs, outputs]; a bitmask and dense take any shape.
    mask: concrete bool, of the kernel's shape.
    format: one of these, or "auto": the one of the fewest bytes, where n:m is
      tried with m of 2, 4, 8 and 16, and blocks as large as the mask has them.

  Returns:
    Packed, with NumPy arrays.

  Raises:
    ValueError: for an unknown format, and a mask that is not of it.

  Example:
    >>> mask = jnp.array([[True, False], [False, True]] * 2)
    >>> packed = weights.pack(jnp.ones((4, 2)), mask, select.NM(2, 4))
    >>> packed.arrays["values"].tolist(), packed.arrays["metadata"].tolist()
    ([[1.0, 1.0], [1.0, 1.0]], [[8, 13]])
    >>> packed.description["format"], packed.nbytes
    ('nm', 18)
    >>> weights.unpack(packed)[0].tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
  """
  for name, x in (("kernel", kernel), ("mask", mask)):
    if isinstance(x, jax.core.Tracer):
      raise ValueError(f"{name} must be concrete, got {x}")
  w, mask = host(kernel), np.asarray(mask)
  if mask.shape != w.shape or mask.dtype != bool:
    raise ValueError(
      f"mask must be bool{list(w.shape)}, got {mask.dtype}{list(mask.shape)}"
    )
  if isinstance(format, str) and format == "auto":
    _, settings = min(sizes(mask, w.itemsize), key=lambda found: found[0])
    return _pack(w, mask, settings)
  return _pack(w, mask, _settings(format))


def unpack(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
  """The kernel that was packed, and its mask, bit for bit.

  Raises:
    ValueError: the arrays are not what the description says.

  >>> mask = jnp.array([True, False, True])
  >>> packed = weights.pack(jnp.array([-0.0, 1.0, 2.0]), mask, "bitmask")
  >>> kernel, kept = weights.unpack(packed)
  >>> kernel.tolist(), kept.tolist()
  ([-0.0, 0.0, 2.0], [True, False, True])
  """
  given = dict(packed.description)
  try:
    shape, dtype = tuple(given.pop("shape")), jnp.dtype(given.pop("dtype"))
    _, read = _FORMATS[given.pop("format")]
    return read(_Arrays(packed.arrays, dtype), shape, **given)
  except (ArithmeticError, LookupError, TypeError) as error:
    raise ValueError(
      f"the description does not fit: {error!r}, of {packed.description}"
    ) from error


def host(x) -> np.ndarray:
  """x in row-major order: a file holds nothing else."""
  return np.asarray(x, order="C")


def _settings(format) -> dict[str, Any]:
  if isinstance(format, structures_lib.NM):
    if format.axis not in (None, 0, -2):
      raise ValueError(f"format must choose among inputs, got {format}")
    return {"format": "nm", "n": format.n, "m": format.m}
  if isinstance(format, structures_lib.Block):
    return {"format": "blocks", "block": list(format.shape)}
  if isinstance(format, structures_lib.ConstantFanIn):
    return {"format": "constant_fan_in"}
  if isinstance(format, structures_lib.Unstructured):
    return {"format": "bitmask"}
  if format in ("dense", "bitmask"):
    return {"format": format}
  raise ValueError(f"format must be {_TAKES}, got {format!r}")


def _pack(w, mask, settings) -> Packed:
  options = dict(settings)
  name = options.pop("format")
  if name not in ("dense", "bitmask") and w.ndim != 2:
    raise ValueError(
      f"kernel must be [inputs, outputs] for {name}, got {list(w.shape)}"
    )
  arrays = _FORMATS[name][0](w, mask, **options)
  shape = {"shape": list(w.shape), "dtype": w.dtype.name}
  arrays = {name: host(x) for name, x in arrays.items()}
  return Packed(arrays, settings | shape)


def sizes(mask, itemsize):
  """(bytes, settings) of each format the mask is of.

  "dense" comes first, so that it stays where nothing is gained.
  """
  outputs, inputs = _matrix(mask).shape
  kept, bits = int(mask.sum()), outputs * -(-inputs // 8)
  if kept == mask.size:
    yield mask.size * itemsize, {"format": "dense"}
    return
  yield mask.size * itemsize + bits, {"format": "dense"}
  yield kept * itemsize + bits + 8 * outputs + 16, {"format": "bitmask"}
  if mask.ndim != 2:
    return
  for m in (2, 4, 8, 16):
    if inputs % m == 0:
      n = int(mask.reshape(-1, m, outputs).sum(1).max())
      entries = inputs // m * n
      size = entries * itemsize + -(-entries * (m - 1).bit_length() // 8)
      size += 0 if entries * outputs == kept else -(-entries // 8)
      size *= outputs
      yield size, {"format": "nm", "n": n, "m": m}
  counts = mask.sum(0)
  alive = np.count_nonzero(counts)
  if kept == alive * counts.max():
    size = kept * (itemsize + (2 if inputs <= 2**16 else 4))
    size += 0 if alive == outputs else 4 * alive
    yield size, {"format": "constant_fan_in"}
  # The coarsest grid of which each block is kept or excluded as a whole.
  block = [
    math.gcd(size, *(1 + np.nonzero(np.diff(mask, axis=a).any(1 - a))[0]))
    for a, size in enumerate(mask.shape)
  ]
  if block != [1, 1]:
    counts = mask[:: block[0], :: block[1]].sum(0)
    size = kept * itemsize + 4 * counts.size * (1 + int(counts.max()))
    yield size, {"format": "blocks", "block": block}


class _Arrays:
  """Arrays that are what is asked for, or a ValueError."""

  def __init__(self, found, dtype):
    self.found, self.dtype = found, dtype

  def __call__(self, name, shape, dtype=None):
    x, dtype = self.found[name], jnp.dtype(dtype or self.dtype)
    if x.shape != tuple(shape) or x.dtype != dtype:
      raise ValueError(
        f"{name} must be {dtype}{list(map(int, shape))}, got {x.dtype}"
        f"{list(x.shape)}"
      )
    return x


def _require(condition, message):
  if not condition:
    raise ValueError(message)


def _bits(mask, axis=-1):
  return np.packbits(mask, axis=axis, bitorder="little")


def _mask(bits, many, axis=-1):
  bits = np.unpackbits(bits, axis=axis, count=many, bitorder="little")
  return bits.astype(bool)


def _matrix(x):
  """[outputs, inputs] of what may have any number of axes, a view."""
  shape = x.shape if x.ndim > 1 else (x.size, 1)
  return x.reshape(math.prod(shape[:-1]), shape[-1]).T


def _pack_dense(w, mask):
  if mask.all():
    return {"values": w}
  return {"values": w, "bitmask": _bits(_matrix(mask))}


def _unpack_dense(arrays, shape):
  mask = np.ones(shape, bool)
  if "bitmask" in arrays.found:
    _matrix(mask)[...] = _read_bitmask(arrays, _matrix(mask).shape)
  return arrays("values", shape), mask


def _pack_bitmask(w, mask):
  kept = _matrix(mask)
  counts = kept.sum(1, dtype=np.int64)
  return {
    "shape": np.array(kept.shape, np.int64),
    "compressed": _matrix(w)[kept],
    "bitmask": _bits(kept),
    "row_offsets": np.cumsum(counts) - counts,
  }


def _unpack_bitmask(arrays, shape):
  w, mask = np.zeros(shape, arrays.dtype), np.zeros(shape, bool)
  kept = _read_bitmask(arrays, _matrix(mask).shape)
  counts = kept.sum(1, dtype=np.int64)
  for name, wanted in (
    ("shape", kept.shape),
    ("row_offsets", np.cumsum(counts) - counts),
  ):
    got = arrays(name, np.shape(wanted), np.int64)
    _require((got == wanted).all(), f"{name} must be what bitmask makes it")
  _matrix(mask)[...] = kept
  _matrix(w)[kept] = arrays("compressed", (counts.sum(),))
  return w, mask


def _read_bitmask(arrays, shape):
  bits = arrays("bitmask", (shape[0], -(-shape[1] // 8)), np.uint8)
  return _mask(bits, shape[1])


def _pack_nm(w, mask, n, m):
  inputs, outputs = w.shape
  _require(
    inputs % m == 0, f"m must divide the inputs, got m={m} for {list(w.shape)}"
  )
  groups = mask.reshape(inputs // m, m, outputs)
  most = groups.sum(1).max(initial=0)
  _require(
    most <= n,
    f"mask must keep at most {n} of every {m} inputs, got {most} in a group",
  )
  full, missing = groups.copy(), n - groups.sum(1)
  for place in range(m):
    fill = ~full[:, place] & (missing > 0)
    full[:, place] |= fill
    missing -= fill
  # Numbered with the groups last: n after n are of one.
  at = np.flatnonzero(full.swapaxes(1, 2)) % m
  at = at.reshape(inputs // m, outputs, n).swapaxes(1, 2)
  used = np.take_along_axis(groups, at, 1)
  values = np.take_along_axis(w.reshape(groups.shape), at, 1)
  values = np.where(used, values, np.zeros((), w.dtype))
  entries, width = inputs // m * n, (m - 1).bit_length()
  bits = at[:, :, None] >> np.arange(width)[:, None] & 1
  arrays = {
    "values": values.reshape(entries, outputs),
    "metadata": _bits(bits.astype(bool).reshape(entries * width, outputs), 0),
  }
  if not used.all():
    arrays["used"] = _bits(used.reshape(entries, outputs), 0)
  return arrays


def _unpack_nm(arrays, shape, n, m):
  (inputs, outputs), width = shape, (m - 1).bit_length()
  entries = inputs // m * n
  groups = (inputs // m, n, outputs)

  def read(name, width):
    many = entries * width
    bits = arrays(name, (-(-many // 8), outputs), np.uint8)
    return _mask(bits, many, 0).reshape(entries, width, outputs)

  bits = read("metadata", width)
  at = np.zeros((entries, outputs), np.int64)
  for place in range(width):
    at |= bits[:, place].astype(np.int64) << place
  at = at.reshape(groups)
  _require(
    (at < m).all() and (np.diff(at, axis=1) > 0).all(),
    f"metadata must increase within groups of {m}",
  )
  used = read("used", 1) if "used" in arrays.found else np.ones(groups, bool)
  values = arrays("values", (entries, outputs))
  w = np.zeros((inputs // m, m, outputs), arrays.dtype)
  mask = np.zeros(w.shape, bool)
  np.put_along_axis(w, at, values.reshape(groups), 1)
  np.put_along_axis(mask, at, used.reshape(groups), 1)
  return w.reshape(shape), mask.reshape(shape)


def _blocks(x, block):
  """[K, N] -> [n_n, n_k, bk, bn], a view."""
  (bk, bn), (rows, columns) = block, x.shape
  x = x.reshape(rows // bk, bk, columns // bn, bn)
  return x.transpose(2, 0, 1, 3)


def _pack_blocks(w, mask, block):
  structures_lib.Block(tuple(block)).check(w.shape, structures_lib.Axes())
  blocks = _blocks(mask, block)
  listed = blocks.any((2, 3))
  _require(
    (blocks.all((2, 3)) == listed).all(),
    f"mask must be of whole blocks of {tuple(block)}",
  )
  counts = listed.sum(1, dtype=np.int32)
  indices = np.argsort(~listed, axis=1, kind="stable")
  return {
    "values": _blocks(w, block)[listed],
    "indices": indices[:, : counts.max(initial=0)].astype(np.int32),
    "counts": counts,
  }


def _unpack_blocks(arrays, shape, block):
  w, mask = np.zeros(shape, arrays.dtype), np.zeros(shape, bool)
  columns, rows = _blocks(w, block).shape[:2]
  counts = arrays("counts", (columns,), np.int32)
  longest = counts.max(initial=0)
  indices = arrays("indices", (columns, longest), np.int32)
  _require((counts >= 0).all(), "counts must be 0 or more")
  column = np.repeat(np.arange(columns), counts)
  row = indices[np.arange(longest) < counts[:, None]]
  _require(
    ((row >= 0) & (row < rows)).all(), f"indices must lie in [0, {rows})"
  )
  _blocks(w, block)[column, row] = arrays("values", (len(row), *block))
  _blocks(mask, block)[column, row] = True
  return w, mask


def _pack_constant_fan_in(w, mask):
  counts = mask.sum(0)
  (outputs,) = np.nonzero(counts)
  fan_in = counts.max(initial=0)
  _require(
    (counts[outputs] == fan_in).all(),
    "mask must have constant fan-in, got columns of "
    f"{counts[outputs].min(initial=fan_in)} to {fan_in} entries",
  )
  inputs = np.argsort(~mask[:, outputs], axis=0, kind="stable")[:fan_in]
  narrow = len(w) <= 2**16
  arrays = {
    "values": w[inputs, outputs],
    "inputs": inputs.astype(np.uint16 if narrow else np.int32),
  }
  if outputs.size < len(counts):
    arrays["outputs"] = outputs.astype(np.int32)
  return arrays


def _unpack_constant_fan_in(arrays, shape):
  outputs = np.arange(shape[1])
  values = arrays.found["values"]
  if "outputs" in arrays.found:
    outputs = arrays("outputs", values.shape[1:], np.int32)
  kind = np.uint16 if shape[0] <= 2**16 else np.int32
  inputs = arrays("inputs", (len(values), len(outputs)), kind)
  for name, x, size in zip(("inputs", "outputs"), (inputs, outputs), shape):
    _require(((x >= 0) & (x < size)).all(), f"{name} must lie in [0, {size})")
  w, mask = np.zeros(shape, arrays.dtype), np.zeros(shape, bool)
  w[inputs, outputs] = arrays("values", inputs.shape)
  mask[inputs, outputs] = True
  return w, mask


_FORMATS = {
  "dense": (_pack_dense, _unpack_dense),
  "bitmask": (_pack_bitmask, _unpack_bitmask),
  "nm": (_pack_nm, _unpack_nm),
  "blocks": (_pack_blocks, _unpack_blocks),
  "constant_fan_in": (_pack_constant_fan_in, _unpack_constant_fan_in),
}
