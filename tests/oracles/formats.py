"""What the formats of block-sparse attention mean, as tables of tokens.

Plain loops, one entry of a list at a time. A table is bool [B, H, S, T]: which
query reads which key. `rule(q, k)` takes indices of tokens.
"""

import numpy as np


def everything(q, k):
  return True


def _paint(table, block_q, block_kv, i, j, rule=everything, rows=None):
  """Reads key block j in query block i of table [S, T]; `rows`: of them."""
  queries, keys = table.shape
  for q in range(i * block_q, min((i + 1) * block_q, queries)):
    if rows is None or rows[q - i * block_q]:
      for k in range(j * block_kv, min((j + 1) * block_kv, keys)):
        table[q, k] |= bool(rule(q, k))


def of_mask(mask, queries, keys, rule=everything):
  """Of the fields of a BlockMask, with the rule given as plain Python."""
  indices, counts = np.asarray(mask.indices), np.asarray(mask.counts)
  table = np.zeros((*counts.shape[:2], queries, keys), bool)
  for where in np.ndindex(*counts.shape):
    b, h, i = where
    for c in range(min(counts[where], indices.shape[-1])):
      rows = None
      if mask.members is not None:
        words = np.asarray(mask.members)[where][c // 32]
        rows = [int(word) >> (c % 32) & 1 for word in words]
      j = indices[where][c]
      _paint(table[b, h], mask.block_q, mask.block_kv, i, j, rule, rows)
    if mask.columns is not None:
      for k in np.asarray(mask.columns)[where]:
        for q in range(i * mask.block_q, (i + 1) * mask.block_q):
          if 0 <= k < keys and q < queries:
            table[b, h, q, k] |= bool(rule(q, k))
  return table


def of_flex(lists, block_q, block_kv, queries, keys, mask_mod=everything):
  """Of kv_num_blocks, kv_indices and the same two of full blocks."""
  some, some_of, full, full_of = map(np.asarray, lists)
  table = np.zeros((*some.shape[:2], queries, keys), bool)
  for where in np.ndindex(*some.shape):
    b, h, i = where
    for j in some_of[where][: some[where]]:
      _paint(table[b, h], block_q, block_kv, i, j, mask_mod)
    for j in full_of[where][: full[where]]:
      _paint(table[b, h], block_q, block_kv, i, j)
  return table


def of_queries(indices, counts, block_kv, keys, rule=everything):
  """Of the key blocks of each query and head, [B, S, H, K]; [B, S, H]."""
  batch, queries, heads, width = indices.shape
  table = np.zeros((batch, heads, queries, keys), bool)
  for b, q, h in np.ndindex(batch, queries, heads):
    for j in indices[b, q, h][: width if counts is None else counts[b, q, h]]:
      for k in range(j * block_kv, min((j + 1) * block_kv, keys)):
        if k >= 0:
          table[b, h, q, k] |= bool(rule(q, k))
  return table


def of_lines(verticals, slashes, queries, keys, block_q, block_kv):
  """Blocks [nq, nk] that slashes pass, and pairs [S, T] that lines name."""
  blocks = np.zeros((-(-queries // block_q), -(-keys // block_kv)), bool)
  named = np.zeros((queries, keys), bool)
  for q in range(queries):
    for s in slashes:
      if s >= 0 and 0 <= q - s < keys:
        blocks[q // block_q, (q - s) // block_kv] = True
        named[q, q - s] = True
    for k in verticals:
      if 0 <= k <= min(q, keys - 1):
        named[q, k] = True
  return blocks, named


def of_columns(offsets, counts, rows, block_kv, queries, keys):
  """Of the queries of each key block: entries [begin, begin + count)."""
  table = np.zeros((*offsets.shape[:2], queries, keys), bool)
  for b, h, j in np.ndindex(*offsets.shape):
    for at in range(offsets[b, h, j], offsets[b, h, j] + counts[b, h, j]):
      begin, end = j * block_kv, min((j + 1) * block_kv, keys)
      table[b, h, rows[at], begin:end] = True
  return table
