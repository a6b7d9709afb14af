"""Reference definitions of how sparse kernels are stored.

NumPy with plain loops over the words of weights: uint16 or uint32 of the same
bits, so that nothing is rounded, and -0.0, subnormals and the payloads of NaNs
come back as they were. A kernel is w [K, N], inputs by outputs, of any dtype of
two or four bytes; a mask is bool [K, N]. An encoder returns a dictionary of
arrays, and its decoder wants that, the shape (K, N) and what else its name
says. Decoded weights that the mask leaves out are +0.0, whatever they were.

  bitmask              any mask
  bitmask_24, nm       n of each m consecutive inputs of an output
  blocks               whole blocks [bk, bn]
  constant_fan_in      as many inputs for each output that has any
  dense                (the kernel as it is)

What is settled here:
- `bitmask` and `bitmask_24` store the transpose, [outputs, inputs], which is
  how PyTorch has a linear layer's weight. The arrays then are those of the
  formats sparse-bitmask and sparse-24-bitmask of the package
  compressed-tensors, under its names and with the shape that it stores (an
  array [2], and [2, 1]). data/storage_peers.json has what it makes. Its masks
  are w != 0: a kept zero, of either sign, is stored here and not there; both
  decode both.
- `bitmask_24` is theirs for 2 of 4, and the same of any n of m.
- `nm` stores inputs by outputs, and where each entry is in its group instead of
  a bit for each weight. Positions take ceil(log2 m) bits. Those of one output
  follow each other in the order of its values, lowest bits first, across bytes
  where the bits do not divide eight; the last byte is filled with zeros. So an
  output's bytes are one column of the table.
- Read along one output, `nm` for 2 of 4 is what torch.sparse's semi-structured
  tensors have as metadata before these are reordered for CUTLASS: two bits for
  a position, the lower one first, and lower bits first in a word. (Theirs of
  float32 are 1 of 2, written as 2 of 4 half words. In groups with fewer entries
  they name other positions than these.)
- A group with fewer than n entries has zeros at the lowest positions that are
  free. That these were not kept cannot be told from what is stored.
- Of `blocks`, the rest of a list is block rows that are not kept, in order. In
  a kept block, what is masked or hangs over the edge is +0.0.
"""

import math

import numpy as np


def words(x):
  """The same bits as unsigned integers.

  >>> words(np.array([-0.0, 1.0], np.float32)).tolist()
  [2147483648, 1065353216]
  """
  x = np.ascontiguousarray(x)
  return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def _checked(w, mask):
  w, mask = np.asarray(w), np.asarray(mask)
  if w.ndim != 2 or mask.shape != w.shape or mask.dtype != bool:
    raise ValueError(f"{w.dtype}{w.shape}, mask {mask.dtype}{mask.shape}")
  return words(w), mask, w.dtype


def _words_like(values, shape):
  return np.zeros(shape, words(np.zeros(1, values.dtype)).dtype)


def _pack(bits):
  """Bytes of a list of 0 and 1, the first in the lowest place.

  >>> _pack([1, 0, 0, 0, 0, 0, 0, 0, 1, 1])
  [1, 3]
  """
  packed = [0] * -(-len(bits) // 8)
  for i, bit in enumerate(bits):
    packed[i // 8] += bit << (i % 8)
  return packed


def _bit(packed, i):
  return int(packed[i // 8]) >> (i % 8) & 1


def _bit_rows(table):
  """uint8 [rows, ceil(columns / 8)] of bool [rows, columns]."""
  rows, columns = table.shape
  packed = np.zeros((rows, -(-columns // 8)), np.uint8)
  for i in range(rows):
    packed[i] = _pack([int(b) for b in table[i]])
  return packed


def bitmask(w, mask):
  """shape [2], compressed [nnz], bitmask [N, ceil(K / 8)], row_offsets [N].

  >>> w = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
  >>> mask = np.array([[True, False], [False, False], [True, True]])
  >>> {name: x.tolist() for name, x in bitmask(w, mask).items()}
  ... # doctest: +NORMALIZE_WHITESPACE
  {'shape': [2, 3], 'compressed': [1.0, 5.0, 6.0], 'bitmask': [[5], [4]],
   'row_offsets': [0, 2]}
  """
  bits, mask, dtype = _checked(w, mask)
  inputs, outputs = mask.shape
  values, offsets = [], []
  for j in range(outputs):
    offsets.append(len(values))
    for i in range(inputs):
      if mask[i, j]:
        values.append(bits[i, j])
  return {
    "shape": np.array([outputs, inputs], np.int64),
    "compressed": np.array(values, bits.dtype).view(dtype),
    "bitmask": _bit_rows(mask.T),
    "row_offsets": np.array(offsets, np.int64),
  }


def from_bitmask(arrays, shape):
  """(w [K, N], mask) of `bitmask`; each output starts at its offset."""
  values = words(arrays["compressed"])
  w, mask = _words_like(arrays["compressed"], shape), np.zeros(shape, bool)
  for j in range(shape[1]):
    at = int(arrays["row_offsets"][j])
    for i in range(shape[0]):
      if _bit(arrays["bitmask"][j], i):
        w[i, j], mask[i, j] = values[at], True
        at += 1
  return w.view(arrays["compressed"].dtype), mask


def positions(mask, n, m):
  """Of each output, the inputs that are stored: n of every m, in order.

  >>> positions(np.array([[True], [False], [False], [True]]), 1, 2)
  [[0, 3]]
  >>> positions(np.array([[False], [False], [False], [True]]), 2, 4)
  [[0, 3]]
  """
  inputs, outputs = mask.shape
  if inputs % m or not 0 < n <= m:
    raise ValueError(f"{n}:{m} of {inputs} inputs")
  stored = []
  for j in range(outputs):
    stored.append([])
    for start in range(0, inputs, m):
      group = [i for i in range(start, start + m) if mask[i, j]]
      if len(group) > n:
        raise ValueError(f"{len(group)} of inputs {start} to {start + m}")
      free = [i for i in range(start, start + m) if not mask[i, j]]
      stored[-1] += sorted(group + free[: n - len(group)])
  return stored


def nm(w, mask, n, m):
  """values [K / m * n, N], metadata uint8 [ceil(K / m * n * bits / 8), N].

  >>> w = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
  >>> mask = np.array([[True], [False], [False], [True]])
  >>> {name: x.tolist() for name, x in nm(w, mask, 2, 4).items()}
  {'values': [[1.0], [4.0]], 'metadata': [[12]]}
  """
  bits, mask, dtype = _checked(w, mask)
  inputs, outputs = mask.shape
  entries, each = inputs // m * n, _position_bits(m)
  values = np.zeros((entries, outputs), bits.dtype)
  metadata = np.zeros((-(-entries * each // 8), outputs), np.uint8)
  for j, stored in enumerate(positions(mask, n, m)):
    stream = []
    for p, i in enumerate(stored):
      values[p, j] = bits[i, j] if mask[i, j] else 0
      stream += [i % m >> b & 1 for b in range(each)]
    metadata[:, j] = _pack(stream)
  return {"values": values.view(dtype), "metadata": metadata}


def from_nm(arrays, shape, n, m):
  """w [K, N] of `nm`."""
  values, each = words(arrays["values"]), _position_bits(m)
  w = _words_like(arrays["values"], shape)
  for p, j in np.ndindex(*values.shape):
    position = 0
    for b in range(each):
      position += _bit(arrays["metadata"][:, j], p * each + b) << b
    w[p // n * m + position, j] = values[p, j]
  return w.view(arrays["values"].dtype)


def _position_bits(m):
  return math.ceil(math.log2(m))


def bitmask_24(w, mask, n=2, m=4):
  """shape [2, 1], compressed [N, K / m * n], bitmask [N, ceil(K / 8)].

  >>> w = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
  >>> mask = np.array([[True], [False], [False], [True]])
  >>> {name: x.tolist() for name, x in bitmask_24(w, mask).items()}
  {'shape': [[1], [4]], 'compressed': [[1.0, 4.0]], 'bitmask': [[9]]}
  """
  bits, mask, dtype = _checked(w, mask)
  inputs, outputs = mask.shape
  values = np.zeros((outputs, inputs // m * n), bits.dtype)
  named = np.zeros((outputs, inputs), bool)
  for j, stored in enumerate(positions(mask, n, m)):
    for p, i in enumerate(stored):
      values[j, p] = bits[i, j] if mask[i, j] else 0
      named[j, i] = True
  return {
    "shape": np.array([[outputs], [inputs]], np.int64),
    "compressed": values.view(dtype),
    "bitmask": _bit_rows(named),
  }


def from_bitmask_24(arrays, shape):
  """w [K, N] of `bitmask_24`, of any n and m."""
  values = words(arrays["compressed"])
  w = _words_like(arrays["compressed"], shape)
  for j in range(shape[1]):
    p = 0
    for i in range(shape[0]):
      if _bit(arrays["bitmask"][j], i):
        w[i, j] = values[j, p]
        p += 1
  return w.view(arrays["compressed"].dtype)


def blocks(w, mask, block):
  """values [nnz, bk, bn], indices int32 [n_n, C], counts int32 [n_n].

  A block is kept where the mask has anything in it. Values go column after
  column of blocks, C is the longest column.

  >>> w = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
  >>> mask = np.array([[True, True, False], [False, False, True]])
  >>> {name: x.tolist() for name, x in blocks(w, mask, (1, 2)).items()}
  ... # doctest: +NORMALIZE_WHITESPACE
  {'values': [[[1.0, 2.0]], [[6.0, 0.0]]], 'indices': [[0], [1]],
   'counts': [1, 1]}
  """
  bits, mask, dtype = _checked(w, mask)
  inputs, outputs = mask.shape
  bk, bn = block
  n_k, n_n = -(-inputs // bk), -(-outputs // bn)
  values, lists, counts = [], [], []
  for q in range(n_n):
    kept, rest = [], []
    for p in range(n_k):
      cell = np.zeros((bk, bn), bits.dtype)
      some = False
      for a, b in np.ndindex(bk, bn):
        i, j = p * bk + a, q * bn + b
        if i < inputs and j < outputs and mask[i, j]:
          cell[a, b], some = bits[i, j], True
      if some:
        values.append(cell)
      (kept if some else rest).append(p)
    lists.append(kept + rest)
    counts.append(len(kept))
  longest = max(counts, default=0)
  indices = np.array([x[:longest] for x in lists], np.int32)
  return {
    "values": np.array(values, bits.dtype).reshape(-1, bk, bn).view(dtype),
    "indices": indices.reshape(n_n, longest),
    "counts": np.array(counts, np.int32),
  }


def from_blocks(arrays, shape):
  """w [K, N] of `blocks`."""
  values = words(arrays["values"])
  w = _words_like(arrays["values"], shape)
  at = 0
  for q, count in enumerate(arrays["counts"]):
    for p in arrays["indices"][q][: int(count)]:
      for a, b in np.ndindex(*values.shape[1:]):
        i, j = int(p) * values.shape[1] + a, q * values.shape[2] + b
        if i < shape[0] and j < shape[1]:
          w[i, j] = values[at, a, b]
      at += 1
  return w.view(arrays["values"].dtype)


def constant_fan_in(w, mask):
  """values [F, A], inputs uint16 [F, A], outputs int32 [A] of A of N outputs.

  inputs is int32 where K is above 2^16, outputs None where all have entries.

  >>> w = np.arange(1.0, 7.0, dtype=np.float32).reshape(3, 2)
  >>> mask = np.array([[False, True], [False, False], [False, True]])
  >>> values, inputs, outputs = constant_fan_in(w, mask).values()
  >>> values.tolist(), inputs.tolist(), outputs.tolist()
  ([[2.0], [6.0]], [[0], [2]], [1])
  """
  bits, mask, dtype = _checked(w, mask)
  inputs, outputs = mask.shape
  columns = []
  for j in range(outputs):
    entries = [i for i in range(inputs) if mask[i, j]]
    if entries:
      columns.append((j, entries))
  alive = [j for j, _ in columns]
  fan_ins = {len(entries) for _, entries in columns}
  if len(fan_ins) > 1:
    raise ValueError(f"columns of {sorted(fan_ins)} entries")
  fan_in = max(fan_ins, default=0)
  narrow = np.uint16 if inputs <= 2**16 else np.int32
  values = np.zeros((fan_in, len(alive)), bits.dtype)
  rows = np.zeros((fan_in, len(alive)), narrow)
  for a, (j, entries) in enumerate(columns):
    for p, i in enumerate(entries):
      values[p, a], rows[p, a] = bits[i, j], i
  return {
    "values": values.view(dtype),
    "inputs": rows,
    "outputs": (None if len(alive) == outputs else np.array(alive, np.int32)),
  }


def from_constant_fan_in(arrays, shape):
  """w [K, N] of `constant_fan_in`."""
  values = words(arrays["values"])
  w = _words_like(arrays["values"], shape)
  outputs = arrays["outputs"]
  for p, a in np.ndindex(*values.shape):
    j = a if outputs is None else outputs[a]
    w[arrays["inputs"][p, a], j] = values[p, a]
  return w.view(arrays["values"].dtype)
