"""Reference definition of fixed attention patterns: who reads whom, by place.

Every pattern is a bool table [S, T] (or [H, S, T] where heads differ), filled
one pair of a query and a key at a time. Query s stands at position
s + offset, key t at position t; in a decode step over T cached tokens S is 1
and offset T - 1. Unions and intersections are `|` and `&` of tables.

What the papers leave open and is settled here:

- A window of w positions holds the query's own: the keys p - w + 1 ... p. In
  MInference's search code a band of w holds w + 1.
- The first tokens of StreamingLLM are read by every query that stands behind
  them, and are no part of the window's size.
- A dilation d keeps every d-th position of a window that is d times as long.
- S2-Attention. Head h of H reads, beside its `local` last blocks, key block j
  if (j + h * step + first) % stride == 0; the step is max(1, stride // heads)
  and `first` is 0, as in the authors' code, where the paper has a figure (in
  the code of Phi-3-small `first` is 1). Heads of one key head (GQA) share the
  pattern, h being the key head; the step is still that of all heads.
- Neighborhood attention. A dilation splits an axis into independent groups of
  equal residue; window, stride and borders are those of the group. The leader
  of stride s in an even group is the right one of the two in the middle, and
  an even window has one more key on the left. A causal axis has its leader at
  the end, does not shift at the border, and a query that is not the leader
  sees fewer than w keys. A window that is longer than its group is cut to it.
- BigBird's random blocks are an argument: which ones is a draw. The blocks
  that may be drawn are `bigbird_candidates`.
- The flat butterfly needs no power of two of blocks: partners that do not
  exist are dropped.
"""

import itertools

import numpy as np


def table(queries, keys, reads):
  """bool [S, T] of reads(query index, key index)."""
  out = np.zeros((queries, keys), bool)
  for s in range(queries):
    for t in range(keys):
      out[s, t] = bool(reads(s, t))
  return out


def heads(tables):
  """[H, S, T] of a list of tables."""
  return np.stack([np.asarray(x, bool) for x in tables])


def picture(pattern):
  """The table as text, `#` where a key is read.

  >>> print(picture(causal(2, 3, offset=1)))
  ##.
  ###
  """
  return "\n".join("".join(".#"[int(x)] for x in row) for row in pattern)


# --- Bands


def causal(queries, keys, *, offset=0):
  """Keys at the query's own position and before."""
  return table(queries, keys, lambda s, t: t <= s + offset)


def window(queries, keys, *, left, right=0, offset=0):
  """Keys at p - left ... p + right, so left + 1 + right of them.

  >>> print(picture(window(3, 4, left=1)))
  #...
  ##..
  .##.
  """
  return table(queries, keys, lambda s, t: -left <= t - (s + offset) <= right)


def sinks(queries, keys, *, first, local, offset=0):
  """StreamingLLM, the A-shape: the `first` tokens and the last `local` ones.

  Source: streaming-llm, Efficient Streaming Language Models with Attention
  Sinks (4 first tokens); minference, MInference 1.0 (A-shape).

  >>> print(picture(sinks(5, 5, first=1, local=2)))
  #....
  ##...
  ###..
  #.##.
  #..##
  """

  def reads(s, t):
    p = s + offset
    return t <= p and (t < first or p - t < local)

  return table(queries, keys, reads)


def dilated(queries, keys, *, left, right=0, dilation=1, offset=0):
  """Keys at p + d * i for i = -left ... right.

  >>> print(picture(dilated(5, 5, left=2, dilation=2)[4:]))
  #.#.#
  """

  def reads(s, t):
    steps, rest = divmod(t - (s + offset), dilation)
    return rest == 0 and -left <= steps <= right

  return table(queries, keys, reads)


def diagonals(queries, keys, offsets, *, offset=0):
  """Keys at p - o for each o of `offsets` (slashes); 0 is the query's own."""
  offsets = set(offsets)
  return table(queries, keys, lambda s, t: (s + offset) - t in offsets)


def columns(queries, keys, positions, *, offset=0):
  """The keys `positions` (verticals), from where the query stands behind."""
  positions = set(positions)
  return table(queries, keys, lambda s, t: t in positions and t <= s + offset)


def stripes(queries, keys, *, verticals, slashes, offset=0):
  """Columns and diagonals together, causal: a vertical-slash pattern.

  Source: minference, MInference 1.0, Algorithm 2 (vertical-slash).

  >>> print(picture(stripes(4, 4, verticals=[0], slashes=[0, 2])))
  #...
  ##..
  #.#.
  ##.#
  """
  past = [o for o in slashes if o >= 0]
  return columns(queries, keys, verticals, offset=offset) | diagonals(
    queries, keys, past, offset=offset
  )


def strided(queries, keys, *, local, stride, offset=0):
  """The last `local` keys and every stride-th one behind, relative to p.

  Source: Generating Long Sequences with Sparse Transformers (strided: both
  of its heads at once, local = stride).
  """

  def reads(s, t):
    back = s + offset - t
    return back >= 0 and (back < local or back % stride == 0)

  return table(queries, keys, reads)


# --- Blocks


def of_blocks(blocks, block_q, block_kv, queries, keys):
  """A table [S, T] of the pairs of blocks [nq, nk] that are read.

  >>> print(picture(of_blocks([[1, 0], [0, 1]], 2, 2, 3, 3)))
  ##.
  ##.
  ..#
  """
  return table(queries, keys, lambda s, t: blocks[s // block_q][t // block_kv])


def to_blocks(pattern, block_q, block_kv):
  """Which key blocks a block of queries touches: lists, ascending.

  >>> to_blocks(causal(4, 4), 2, 2)
  [[0], [0, 1]]
  """
  pattern = np.asarray(pattern, bool)
  queries, keys = pattern.shape
  lists = []
  for begin in range(0, queries, block_q):
    found = []
    for j, at in enumerate(range(0, keys, block_kv)):
      if pattern[begin : begin + block_q, at : at + block_kv].any():
        found.append(j)
    lists.append(found)
  return lists


def s2(
  blocks,
  *,
  num_heads,
  local,
  stride,
  kv_heads=None,
  step=None,
  first=0,
):
  """S2-Attention: block tables [H, n, n], strided with an offset per head.

  Query block i of head h reads key block j <= i if i - j < local, or if
  (j + h * step + first) % stride == 0. With step 1 and as many heads as the
  stride (or any multiple), the heads together read every block.

  Source: s2-attention, Efficient LLM Training and Serving with Heterogeneous
  Context Sharding among Attention Heads (strided heads).

  >>> a, b = s2(4, num_heads=2, local=1, stride=2)
  >>> print(picture(a))
  #...
  ##..
  #.#.
  #.##
  >>> print(picture(b))
  #...
  .#..
  .##.
  .#.#
  """
  kv_heads = num_heads if kv_heads is None else kv_heads
  if num_heads % kv_heads:
    raise ValueError(f"kv_heads {kv_heads} of {num_heads}")
  if step is None:
    step = max(1, stride // num_heads)

  def head(h):
    def reads(i, j):
      remote = (j + h * step + first) % stride == 0
      return j <= i and (i - j < local or remote)

    return table(blocks, blocks, reads)

  group = num_heads // kv_heads
  return heads([head(h // group) for h in range(num_heads)])


def butterfly(blocks, *, max_stride):
  """The flat block butterfly: i reads i and i xor 2^m for 2^m < max_stride.

  It is the union of the supports of the butterfly factors of strides
  2, 4 ... max_stride, whose product the flat matrix approximates to first
  order. max_stride is a power of two; 1 is the diagonal alone.

  Source: Pixelated Butterfly (flat block butterfly).

  >>> print(picture(butterfly(4, max_stride=4)))
  ###.
  ##.#
  #.##
  .###
  """
  if max_stride < 1 or max_stride & (max_stride - 1):
    raise ValueError(f"max_stride {max_stride}")
  near = {1 << m for m in range(max_stride.bit_length() - 1)}
  return table(blocks, blocks, lambda i, j: i == j or (i ^ j) in near)


# --- Global tokens


def longformer(
  length, *, left, right, global_tokens=(), dilation=1, is_causal=False
):
  """A (dilated) window; global tokens read and are read by everything.

  The paper's window w is w / 2 on each side: left = right = w // 2, and the
  token itself. Causal (for language modelling) cuts the future everywhere.

  Source: longformer-bigbird, Longformer (attention pattern).

  >>> print(picture(longformer(4, left=1, right=1, global_tokens=[0])))
  ####
  ###.
  ####
  #.##
  """
  everywhere = set(global_tokens)
  band = dilated(length, length, left=left, right=right, dilation=dilation)
  lines = table(length, length, lambda s, t: s in everywhere or t in everywhere)
  both = band | lines
  return both & causal(length, length) if is_causal else both


def bigbird_candidates(i, blocks, *, window_blocks=3, global_blocks=1):
  """The blocks that may be drawn for block i: no window, no global ones.

  >>> bigbird_candidates(3, 8)
  [1, 5, 6]
  """
  side = window_blocks // 2
  ends = set(range(global_blocks)) | set(range(blocks - global_blocks, blocks))
  return [j for j in range(blocks) if abs(i - j) > side and j not in ends]


def bigbird(blocks, *, random, window_blocks=3, global_blocks=1):
  """Window, global and random blocks, [n, n]; not causal.

  The first and the last `global_blocks` blocks read and are read by all (the
  internal transformer construction; in the extended one the first are added
  tokens). `random[i]` lists the blocks drawn for query block i; those of a
  global row change nothing. Defaults of the paper: 3 window blocks, 2 global
  (one at each end), 3 random, blocks of 64.

  Source: longformer-bigbird, Big Bird (blocked implementation).

  >>> print(picture(bigbird(5, random=[[], [], [], [1], []])))
  #####
  ###.#
  #####
  #####
  #####
  """
  side = window_blocks // 2
  ends = set(range(global_blocks)) | set(range(blocks - global_blocks, blocks))

  def reads(i, j):
    if i in ends or j in ends:
      return True
    return abs(i - j) <= side or j in random[i]

  return table(blocks, blocks, reads)


# --- Neighborhoods


def _neighbors(x, length, *, window, stride, dilation, is_causal):
  """What coordinate x reads along one axis, a set of coordinates."""
  residue, x = x % dilation, x // dilation
  group = len(range(residue, length, dilation))
  size = min(window, group)
  first = x // stride * stride
  if is_causal:
    leader = min(first + stride - 1, group - 1)
    found = [k for k in range(group) if leader - size < k <= x]
  else:
    leader = min(first + stride // 2, group - 1)
    begin = min(max(leader - size // 2, 0), group - size)
    found = range(begin, begin + size)
  return {residue + dilation * k for k in found}


def neighborhood(shape, *, window, stride=1, dilation=1, is_causal=False):
  """Generalized neighborhood attention over a grid of 1 to 3 axes.

  Tokens lie in row-major order. Along each axis the queries come in groups of
  `stride`; the leader of a group (the middle one, or the last one if causal)
  places a window of `window` tokens, moved inward at the border, and the
  whole group reads it. Stride 1 is neighborhood attention, stride = window
  on a multiple of it is attention within blocks, a window of the whole axis
  is dense. Numbers apply to every axis, or give one for each.

  Source: gna, Generalized Neighborhood Attention (definition of window,
  stride, dilation and the causal variant).

  >>> print(picture(neighborhood((5,), window=3)))
  ###..
  ###..
  .###.
  ..###
  ..###
  >>> print(picture(neighborhood((4,), window=2, stride=2, is_causal=True)))
  #...
  ##..
  ..#.
  ..##
  """
  axes = len(shape)

  def each(name, value):
    value = (value,) * axes if np.ndim(value) == 0 else tuple(value)
    if len(value) != axes:
      raise ValueError(f"{name} {value} for {axes} axes")
    return value

  window, stride = each("window", window), each("stride", stride)
  dilation = each("dilation", dilation)
  is_causal = each("is_causal", is_causal)
  for w, s, d in zip(window, stride, dilation):
    if w < 1 or d < 1 or not 1 <= s <= w:
      raise ValueError(f"window {w}, stride {s}, dilation {d}")

  grid = list(itertools.product(*[range(n) for n in shape]))
  reach = [
    [
      _neighbors(
        x,
        shape[a],
        window=window[a],
        stride=stride[a],
        dilation=dilation[a],
        is_causal=is_causal[a],
      )
      for x in range(shape[a])
    ]
    for a in range(axes)
  ]
  return table(
    len(grid),
    len(grid),
    lambda s, t: all(grid[t][a] in reach[a][grid[s][a]] for a in range(axes)),
  )
