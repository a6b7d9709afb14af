"""Reference definitions of the grouped and the block-sparse matmul.

Everything here is NumPy in float64 with plain loops, over edges or blocks.

Grouped: edge i reads a row of lhs, is multiplied by the weights of its group
and goes to a row of the result. Only edges of a group whose weights are at
hand take part; the others are never computed.

Block-sparse: the K x N matrix is cut into blocks of [bk, bn]. Block column j
lists the block rows indices[j, : counts[j]]; values[p] is the p-th listed
block, column after column.

What the definitions leave open and is settled here:
- An edge of no group, or of a group without weights here, is not touched: a
  NaN in its row of lhs, its row_scale or its cotangent has no effect.
- An edge that scatter drops adds exactly nothing to any gradient, whatever
  its row of lhs holds.
- An edge whose gather is out of range is an edge like any other, of a row of
  zeros: activation(0) is added for it, and its row_scale has a gradient.
- Only the listed blocks are multiplied. So a NaN in x reaches the columns
  that list its block row, and no others.
- Of a block row listed twice in a column the blocks are added.
"""

import dataclasses

import numpy as np


def _float64(x):
  return np.asarray(x).astype(np.float64)


@dataclasses.dataclass
class _Edge:
  """An edge that has weights."""

  i: int
  row: int | None  # the row of lhs; None for a row of zeros
  weight: int  # rhs[weight]
  to: int | None  # the row of the result; None where it is dropped


def edge_groups(group_sizes, m):
  """The group of each of m edges; None for those past the last group.

  >>> edge_groups([2, 0, 1], 5)
  [0, 0, 2, None, None]
  >>> edge_groups([2, -4, 9], 5)
  [0, 0, 2, 2, 2]
  """
  groups = []
  for group, size in enumerate(np.asarray(group_sizes).tolist()):
    groups += [group] * min(max(size, 0), m - len(groups))
  return groups + [None] * (m - len(groups))


def _edges(rows, weights, group_sizes, gather, scatter, num_rows, group_offset):
  """The number of edges, the rows of the result, the edges with weights."""
  if (scatter is None) != (num_rows is None):
    raise ValueError("scatter and num_rows go together")
  if group_offset is None and len(group_sizes) != weights:
    raise ValueError(f"{len(group_sizes)} groups, {weights} weights")
  m = rows if gather is None else len(gather)
  out_rows = m if scatter is None else num_rows
  if scatter is not None and len(scatter) != m:
    raise ValueError(f"scatter of {len(scatter)} for {m} edges")
  offset = 0 if group_offset is None else int(group_offset)

  edges = []
  for i, group in enumerate(edge_groups(group_sizes, m)):
    if group is None or not 0 <= group - offset < weights:
      continue
    row = i if gather is None else int(gather[i])
    to = i if scatter is None else int(scatter[i])
    edges.append(
      _Edge(
        i,
        row if 0 <= row < rows else None,
        group - offset,
        to if 0 <= to < out_rows else None,
      )
    )
  return m, out_rows, edges


def _k_by_n(rhs, transpose_rhs):
  """[g, k, n] of [g, k, n] or [g, n, k], and the other way round."""
  return np.swapaxes(rhs, 1, 2) if transpose_rhs else rhs


def _identity(x):
  return x


def _check(lhs, rhs, rhs_gate, row_scale, m):
  if lhs.shape[1] != rhs.shape[1]:
    raise ValueError(f"lhs {lhs.shape}, rhs {rhs.shape}")
  if rhs_gate is not None and rhs_gate.shape != rhs.shape:
    raise ValueError(f"rhs_gate {rhs_gate.shape}, rhs {rhs.shape}")
  if row_scale is not None and row_scale.shape != (m,):
    raise ValueError(f"row_scale {row_scale.shape} for {m} edges")


def grouped_matmul(
  lhs,
  rhs,
  group_sizes,
  *,
  rhs_gate=None,
  activation=None,
  gather=None,
  scatter=None,
  num_rows=None,
  row_scale=None,
  transpose_rhs=False,
  group_offset=None,
):
  """The result, [m, n] or with scatter [num_rows, n].

  lhs is [rows, k], rhs and rhs_gate [g, k, n] ([g, n, k] if transposed),
  group_sizes [G], gather, scatter and row_scale [m]; activation is a function
  of a float64 array.

  One edge with the weight 2, one with 3, and one of no group:

  >>> lhs = np.array([[10.0], [20.0], [np.nan]])
  >>> rhs = np.array([[[2.0]], [[3.0]]])
  >>> grouped_matmul(lhs, rhs, [1, 1]).tolist()
  [[20.0], [60.0], [0.0]]
  >>> grouped_matmul(lhs, rhs, [1, 1], scatter=[0, 0, 0], num_rows=2).tolist()
  [[80.0], [0.0]]
  """
  lhs = _float64(lhs)
  rhs = _k_by_n(_float64(rhs), transpose_rhs)
  if rhs_gate is not None:
    rhs_gate = _k_by_n(_float64(rhs_gate), transpose_rhs)
  if row_scale is not None:
    row_scale = _float64(row_scale)
  if activation is None:
    activation = _identity
  rows, k = lhs.shape
  m, out_rows, edges = _edges(
    rows, len(rhs), group_sizes, gather, scatter, num_rows, group_offset
  )
  _check(lhs, rhs, rhs_gate, row_scale, m)

  out = np.zeros((out_rows, rhs.shape[2]))
  for e in edges:
    x = np.zeros(k) if e.row is None else lhs[e.row]
    up = x @ rhs[e.weight]
    if rhs_gate is None:
      y = activation(up)
    else:
      y = activation(x @ rhs_gate[e.weight]) * up
    if row_scale is not None:
      y = y * row_scale[e.i]
    if e.to is not None:
      out[e.to] += y
  return out


def grouped_matmul_gradients(
  dout,
  lhs,
  rhs,
  group_sizes,
  *,
  rhs_gate=None,
  activation=None,
  activation_slope=None,
  gather=None,
  scatter=None,
  num_rows=None,
  row_scale=None,
  transpose_rhs=False,
  group_offset=None,
):
  """Gradients of sum(dout * grouped_matmul(...)); a dict.

  The keys are lhs, rhs, rhs_gate and row_scale (None for the last two where
  they are not given). activation_slope is the derivative of activation, a
  function of a float64 array as well.

  In the example of `grouped_matmul`, the cotangents 1, 100 and NaN:

  >>> lhs = np.array([[10.0], [20.0], [np.nan]])
  >>> rhs = np.array([[[2.0]], [[3.0]]])
  >>> dout = np.array([[1.0], [100.0], [np.nan]])
  >>> got = grouped_matmul_gradients(dout, lhs, rhs, [1, 1])
  >>> got["lhs"].tolist(), got["rhs"].tolist()
  ([[2.0], [300.0], [0.0]], [[[10.0]], [[2000.0]]])
  """
  if (activation is None) != (activation_slope is None):
    raise ValueError("activation and activation_slope go together")
  dout, lhs = _float64(dout), _float64(lhs)
  rhs = _k_by_n(_float64(rhs), transpose_rhs)
  if rhs_gate is not None:
    rhs_gate = _k_by_n(_float64(rhs_gate), transpose_rhs)
  if row_scale is not None:
    row_scale = _float64(row_scale)
  if activation is None:
    activation, activation_slope = _identity, np.ones_like
  rows, k = lhs.shape
  m, out_rows, edges = _edges(
    rows, len(rhs), group_sizes, gather, scatter, num_rows, group_offset
  )
  _check(lhs, rhs, rhs_gate, row_scale, m)
  if dout.shape != (out_rows, rhs.shape[2]):
    raise ValueError(f"dout {dout.shape} for {(out_rows, rhs.shape[2])}")

  d_lhs = np.zeros(lhs.shape)
  d_rhs = np.zeros(rhs.shape)
  d_rhs_gate = None if rhs_gate is None else np.zeros(rhs.shape)
  d_row_scale = None if row_scale is None else np.zeros(m)
  for e in edges:
    if e.to is None:
      continue
    x = np.zeros(k) if e.row is None else lhs[e.row]
    w = rhs[e.weight]
    up = x @ w

    # y = activation(up) or activation(gate) * up; the result has scale * y.
    if rhs_gate is None:
      y = activation(up)
    else:
      gate = x @ rhs_gate[e.weight]
      y = activation(gate) * up
    if row_scale is None:
      d_y = dout[e.to]
    else:
      d_row_scale[e.i] = np.sum(dout[e.to] * y)
      d_y = dout[e.to] * row_scale[e.i]

    if rhs_gate is None:
      d_up = d_y * activation_slope(up)
    else:
      d_up = d_y * activation(gate)
      d_gate = d_y * up * activation_slope(gate)

    d_rhs[e.weight] += np.outer(x, d_up)
    d_x = w @ d_up
    if rhs_gate is not None:
      d_rhs_gate[e.weight] += np.outer(x, d_gate)
      d_x = d_x + rhs_gate[e.weight] @ d_gate
    if e.row is not None:
      d_lhs[e.row] += d_x

  d_rhs = _k_by_n(d_rhs, transpose_rhs)
  if rhs_gate is not None:
    d_rhs_gate = _k_by_n(d_rhs_gate, transpose_rhs)
  return dict(lhs=d_lhs, rhs=d_rhs, rhs_gate=d_rhs_gate, row_scale=d_row_scale)


def _listed(indices, counts, shape, values_shape):
  """(inside, rows, cols) of each listed block, in the order of the values.

  values[inside] is the part of the block that is in the matrix, without what
  hangs over, and matrix[rows, cols] is where it lies.

  A 3 x 2 matrix in blocks of [2, 2], of which the lower one is listed:

  >>> _listed([[1]], [1], (3, 2), (1, 2, 2))
  [((0, slice(0, 1, None), slice(0, 2, None)),
    slice(2, 3, None), slice(0, 2, None))]
  """
  indices, counts = np.asarray(indices), np.asarray(counts)
  big_k, big_n = shape
  nnz, bk, bn = values_shape
  block_rows, block_cols = -(-big_k // bk), -(-big_n // bn)
  capacity = indices.shape[1]
  if len(indices) != block_cols or counts.shape != (block_cols,):
    raise ValueError(f"indices {indices.shape}, counts {counts.shape}")

  found = []
  for j in range(block_cols):
    if not 0 <= counts[j] <= capacity:
      raise ValueError(f"{counts[j]} blocks in lists of {capacity}")
    for s in range(int(counts[j])):
      block = int(indices[j, s])
      if not 0 <= block < block_rows:
        raise ValueError(f"block row {block} of {block_rows}")
      p = len(found)
      rows = slice(block * bk, min((block + 1) * bk, big_k))
      cols = slice(j * bn, min((j + 1) * bn, big_n))
      height, width = rows.stop - rows.start, cols.stop - cols.start
      found.append(((p, slice(0, height), slice(0, width)), rows, cols))
  if len(found) > nnz:
    raise ValueError(f"{len(found)} blocks listed, {nnz} values")
  return found


def dense(values, indices, counts, shape):
  """The matrix, [K, N].

  >>> values = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
  >>> dense(values, [[1], [0]], [1, 1], (2, 3)).tolist()
  [[0.0, 0.0, 3.0], [1.0, 2.0, 0.0]]
  """
  values = _float64(values)
  matrix = np.zeros(shape)
  for inside, rows, cols in _listed(indices, counts, shape, values.shape):
    matrix[rows, cols] += values[inside]
  return matrix


def block_sparse_matmul(x, values, indices, counts, shape):
  """x @ the matrix: x [..., K] to [..., N].

  >>> values = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
  >>> block_sparse_matmul([1.0, 10.0], values, [[1], [0]], [1, 1], (2, 3))
  array([10., 20.,  3.])
  """
  x, values = _float64(x), _float64(values)
  if x.shape[-1] != shape[0]:
    raise ValueError(f"x {x.shape}, the matrix {shape}")
  out = np.zeros((*x.shape[:-1], shape[1]))
  for inside, rows, cols in _listed(indices, counts, shape, values.shape):
    for where in np.ndindex(*x.shape[:-1]):
      out[where][cols] += x[where][rows] @ values[inside]
  return out


def block_sparse_matmul_gradients(dout, x, values, indices, counts, shape):
  """(dx, dvalues) of sum(dout * block_sparse_matmul(...))."""
  dout, x, values = _float64(dout), _float64(x), _float64(values)
  if dout.shape != (*x.shape[:-1], shape[1]) or x.shape[-1] != shape[0]:
    raise ValueError(f"dout {dout.shape}, x {x.shape}, the matrix {shape}")
  dx, dvalues = np.zeros(x.shape), np.zeros(values.shape)
  for inside, rows, cols in _listed(indices, counts, shape, values.shape):
    for where in np.ndindex(*x.shape[:-1]):
      dx[where][rows] += values[inside] @ dout[where][cols]
      dvalues[inside] += np.outer(x[where][rows], dout[where][cols])
  return dx, dvalues


def sampled_matmul(x, y, indices, counts, blocks, nnz):
  """The listed blocks of x.T @ y, [nnz, bk, bn]; zeros in what is no value.

  x is [..., K], y [..., N], blocks (bk, bn); all leading axes are summed.

  >>> x, y = np.array([1.0, 10.0]), np.array([2.0, 3.0, 4.0])
  >>> sampled_matmul(x, y, [[1], [0]], [1, 1], (1, 2), 3).tolist()
  [[[20.0, 30.0]], [[4.0, 0.0]], [[0.0, 0.0]]]
  """
  x, y = _float64(x), _float64(y)
  if x.shape[:-1] != y.shape[:-1]:
    raise ValueError(f"x {x.shape}, y {y.shape}")
  shape = x.shape[-1], y.shape[-1]
  values = np.zeros((nnz, *blocks))
  for inside, rows, cols in _listed(indices, counts, shape, values.shape):
    for where in np.ndindex(*x.shape[:-1]):
      values[inside] += np.outer(x[where][rows], y[where][cols])
  return values
