"""Pictures of masks, attention and routing, drawn with matplotlib.

Matplotlib is no dependency: it is imported when something is drawn. Each
function draws into the Axes given, or into new ones, and returns them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_mask as block_mask_lib
from pallas_kernels import rules

# Of a block that is read whole, by level; of levels beyond, the last.
COLORS = ("#27618f", "#3f9b7b", "#86b249", "#c9a227")
CUT = (
  "#e2803c"  # what the rule cuts is mixed with, half and half; level 0 is it
)
SKIPPED = "#c9c9c9"  # listed, and nothing of it may be read
COLUMN = "#b0306a"
UNLISTED = "#ffffff"
BLANK = "#e8e8e8"  # behind attention mass
_FAINTEST = 0.15  # of a block that no query of its tile reads
_PIXELS = 600  # blocks a side that are drawn one by one


def _rgb(color) -> np.ndarray:
  """float [3] of "#rrggbb"."""
  return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def _color(level, cut) -> np.ndarray:
  """float [3]: of a block that is read, whole or cut by the rule."""
  whole = _rgb(COLORS[min(level, len(COLORS) - 1)])
  if not cut:
    return whole
  return _rgb(CUT) if level == 0 else (whole + _rgb(CUT)) / 2


def _pick(name, at, size):
  """The index along a leading dimension, which 1 shares."""
  if not 0 <= at < size and size > 1:
    raise ValueError(f"{name} is {at}; the mask has {size}.")
  if at < 0:
    raise ValueError(f"{name} is {at}; it cannot be negative.")
  return at if size > 1 else 0


def _one(mask, batch, head):
  """The arrays of one head, as NumPy, by name; absent ones are None."""
  if not isinstance(mask, block_mask_lib.BlockMask):
    raise ValueError(
      f"mask is a {type(mask).__name__}; it must be a BlockMask."
    )
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(mask)):
    raise ValueError("mask is traced; a picture needs a concrete mask.")
  at = (
    _pick("batch", batch, mask.counts.shape[0]),
    _pick("head", head, mask.counts.shape[1]),
  )
  names = ("indices", "listed", "members", "columns", "level")
  arrays = {name: getattr(mask, name) for name in names}
  return {
    name: None if x is None else np.asarray(x[at]) for name, x in arrays.items()
  }


def _positions(name, value, blocks, block):
  """The extreme positions of each block, int [blocks] twice."""
  if value is None:
    low = np.arange(blocks) * block
    return low, low + block - 1
  value = np.asarray(value)
  if value.ndim != 1 or -(-len(value) // block) != blocks:
    raise ValueError(
      f"{name} has shape {value.shape}; it must be [tokens] of {blocks} blocks "
      f"of {block}."
    )
  value = np.pad(value, (0, blocks * block - len(value)), mode="edge")
  value = value.reshape(blocks, block)
  return value.min(-1), value.max(-1)


def _axes(ax):
  import matplotlib.pyplot as plt

  if ax is None:
    _, ax = plt.subplots(figsize=(5, 5), layout="constrained")
  return ax


def _label(ax, mask, title):
  from matplotlib.ticker import MaxNLocator

  ax.set_xlabel(f"key block (of {mask.block_kv})")
  ax.set_ylabel(f"query block (of {mask.block_q})")
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
  ax.tick_params(length=2)
  for side in ax.spines.values():
    side.set(color="#888888", linewidth=0.6)
  ax.set_title(title, fontsize="medium")


def block_mask(
  mask,
  *,
  head: int = 0,
  batch: int = 0,
  ax: Any = None,
  q_positions=None,
  kv_positions=None,
  legend: bool = True,
):
  """Draws which key blocks each query block of one head reads.

  A pixel of the image is a block: blue where it is read whole, orange where the
  rule cuts it, gray where the rule leaves nothing of it, and another color for
  each level. It is paler the fewer queries of the block are members. Columns
  are thin vertical lines. Of more than 600 blocks a side, a pixel is a square
  of p * p blocks: the mean color of the n listed ones, and as pale as
  sqrt(n) / p.

  Args:
    mask: a concrete BlockMask.
    head: which head; any where the heads share their lists.
    batch: which batch element.
    ax: matplotlib's Axes, or None for new ones.
    q_positions: int [S], what the rule sees; default arange.
    kv_positions: int [T].
    legend: whether to say what the colors mean.

  Returns:
    The Axes. Their first image is uint8 [nq, nk, 3], if nothing is pooled.

  Raises:
    ValueError: for a traced mask, a head or batch element that is not there,
      or positions of another length.

  Example:
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.tril(jnp.ones((8, 8), bool)),
    ...   block_q=64,
    ...   block_kv=64,
    ...   rule=pallas_kernels.Causal(),
    ... )
    >>> block_mask(mask).get_title()
    'head 0, 43.8% sparse'
  """
  one = _one(mask, batch, head)
  nq, nk = mask.counts.shape[2], mask.kv_blocks
  query, slot = one["listed"].nonzero()
  key = one["indices"][query, slot]
  level = np.zeros(len(key), int)
  if one["level"] is not None:
    level = one["level"][query, slot].astype(int)
  kind = np.full(len(key), rules.WHOLE)
  if mask.rule is not None:
    q = _positions("q_positions", q_positions, nq, mask.block_q)
    k = _positions("kv_positions", kv_positions, nk, mask.block_kv)
    bounds = [x[query] for x in q] + [x[key] for x in k]
    kind = np.asarray(rules.classify(mask.rule, *map(jnp.asarray, bounds)))
  share = np.ones(len(key))
  if one["members"] is not None:
    words = one["members"][query, slot // block_mask_lib.MEMBER_BITS]
    bits = words >> (slot % block_mask_lib.MEMBER_BITS)[:, None].astype(
      "uint32"
    )
    share = (bits & 1).mean(-1)

  kinds = sorted({*zip(level.tolist(), (kind == rules.PARTIAL).tolist())})
  color = np.zeros((len(key), 3))
  for which in kinds:
    here = (level == which[0]) & ((kind == rules.PARTIAL) == which[1])
    color[here] = _color(*which)
  color[kind == rules.SKIP] = _rgb(SKIPPED)
  shade = np.where(share < 1, _FAINTEST + (1 - _FAINTEST) * share, 1)[:, None]
  color = shade * color + (1 - shade) * _rgb(UNLISTED)
  image, pool = _image(query, key, color, (nq, nk))

  ax = _axes(ax)
  ax.imshow(
    image,
    interpolation="antialiased",
    aspect="auto",
    extent=(
      -0.5,
      image.shape[1] * pool - 0.5,
      image.shape[0] * pool - 0.5,
      -0.5,
    ),
  )
  ax.set(xlim=(-0.5, nk - 0.5), ylim=(nq - 0.5, -0.5))
  lines = _columns(one["columns"], mask.block_kv)
  if lines:
    _draw_columns(ax, lines)
  sparsity = 1 - len(key) / max(nq * nk, 1)
  title = f"head {head}, {100 * sparsity:.1f}% sparse"
  if mask.counts.shape[0] > 1:
    title = f"batch {batch}, {title}"
  _label(ax, mask, title)
  if legend:
    _legend(ax, kinds, kind, share, lines)
  return ax


def _image(query, key, color, shape):
  """uint8 [rows, columns, 3], and how many blocks a side a pixel is."""
  pool = -(-max(*shape, 1) // _PIXELS)
  rows, columns = (max(-(-size // pool), 1) for size in shape)
  at = query // pool * columns + key // pool
  count = np.bincount(at, minlength=rows * columns)
  total = [np.bincount(at, x, minlength=rows * columns) for x in color.T]
  mean = np.stack(total, -1) / np.maximum(count, 1)[:, None]
  shade = np.sqrt(count)[:, None] / pool
  image = shade * mean + (1 - shade) * _rgb(UNLISTED)
  image = np.rint(255 * image).astype(np.uint8)
  return image.reshape(rows, columns, 3), pool


def _columns(columns, block_kv):
  """(x, first query block, end) of each line; neighbors are joined."""
  if columns is None:
    return []
  query, slot = (columns >= 0).nonzero()
  key = columns[query, slot]
  order = np.lexsort((query, key))
  query, key = query[order], key[order]
  new = np.ones(len(key), bool)
  new[1:] = (key[1:] != key[:-1]) | (query[1:] != query[:-1] + 1)
  first = np.flatnonzero(new)
  last = np.r_[first[1:], len(key)] - 1 if len(key) else first
  x = (key[first] + 0.5) / block_kv - 0.5
  return list(zip(x, query[first] - 0.5, query[last] + 0.5))


def _draw_columns(ax, lines):
  from matplotlib.collections import LineCollection

  segments = [[(x, top), (x, bottom)] for x, top, bottom in lines]
  ax.add_collection(
    LineCollection(segments, colors=COLUMN, linewidths=0.9), autolim=False
  )


def _legend(ax, kinds, kind, share, lines):
  from matplotlib.lines import Line2D
  from matplotlib.patches import Patch

  levels = {level for level, _ in kinds}
  handles = []
  for which in kinds:
    level, cut = which
    if cut or (kind == rules.WHOLE).any():
      words = "cut by the rule" if cut else "whole"
      if levels != {0}:
        words = f"level {level}" + (", cut" if cut else "")
      handles.append(Patch(color=_color(*which), label=words))
  if (kind == rules.SKIP).any():
    handles.append(Patch(color=SKIPPED, label="skipped by the rule"))
  if (share < 1).any():
    base = _color(*kinds[0])
    pale = _FAINTEST + (1 - _FAINTEST) / 4
    pale = pale * base + (1 - pale) * _rgb(UNLISTED)
    handles.append(Patch(color=pale, label="1 in 4 queries"))
  if lines:
    handles.append(Line2D([], [], color=COLUMN, linewidth=0.9, label="column"))
  if handles:
    ax.legend(
      handles=handles,
      loc="upper center",
      bbox_to_anchor=(0.5, -0.13),
      ncols=min(len(handles), 3),
      frameon=False,
      fontsize="small",
      handlelength=1.2,
      columnspacing=1.2,
    )


def attention_mass(
  mask, mass, *, head: int = 0, batch: int = 0, ax: Any = None, log=False
):
  """Draws the probability that each listed block received, on gray.

  Args:
    mask: a concrete BlockMask.
    mass: float [B, H, nq, C], from `block_sparse_attention` with
      `return_block_mass`.
    head: which head.
    batch: which batch element.
    ax: matplotlib's Axes, or None for new ones.
    log: whether colors are by the logarithm; blocks with none are then blank.

  Returns:
    The Axes, with a color bar. Their first image is float [nq, nk], masked
    where nothing is listed.

  Raises:
    ValueError: for a traced mask, a head or batch element that is not there,
      or a mass that does not fit the mask.

  Example:
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> mask = pallas_kernels.BlockMask.from_blocks(
    ...   jnp.eye(4, dtype=bool), block_q=16, block_kv=16
    ... )
    >>> attention_mass(mask, jnp.ones((1, 1, 4, 1))).get_title()
    'head 0, mass of listed blocks'
  """
  one = _one(mask, batch, head)
  mass = np.asarray(mass, np.float64)
  lead, lists = mass.shape[:2], one["indices"].shape
  if mass.ndim != 4 or mass.shape[2:] != lists:
    raise ValueError(
      f"mass has shape {mass.shape}; of this mask it is [batch, heads, "
      f"{lists[0]}, {lists[1]}]."
    )
  mass = mass[_pick("batch", batch, lead[0]), _pick("head", head, lead[1])]
  listed = one["listed"]
  image = np.full((lists[0], mask.kv_blocks), np.nan)
  image[listed.nonzero()[0], one["indices"][listed]] = mass[listed]
  if log:
    image[~(image > 0)] = np.nan

  from matplotlib.colors import LogNorm

  ax = _axes(ax)
  drawn = ax.imshow(
    np.ma.masked_invalid(image),
    cmap="Blues",
    norm=LogNorm() if log else None,
    vmin=None if log else 0,
    interpolation="antialiased",
    aspect="auto",
  )
  ax.set_facecolor(BLANK)
  bar = ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03)
  bar.outline.set(color="#888888", linewidth=0.6)
  bar.ax.tick_params(length=2, labelsize="small")
  bar.set_label("probability in the block")
  title = f"head {head}, mass of listed blocks"
  if lead[0] > 1:
    title = f"batch {batch}, {title}"
  _label(ax, mask, title)
  return ax


def routing_trace(trace, *, axes: Any = None):
  """Draws what a router did over steps: loads, their excess, and shares.

  On the left, each expert's share of the edges, stacked; then the largest load
  over an equal one, less 1; on the right, whichever are there of the evenness
  of loads, the dropped edges, and the likeness of choices between steps and
  between neighbors.

  Args:
    trace: dict of arrays of steps: "load" [steps, experts], "max_violation"
      [steps], and perhaps "entropy", "dropped", "overlap" and "neighbors", as
      `routing.stack_traces` gives it.
    axes: three of matplotlib's Axes, or None for new ones.

  Returns:
    The three Axes.

  Raises:
    ValueError: trace lacks a name, or an array is not of the steps.

  Example:
    >>> import matplotlib
    >>> matplotlib.use("Agg")
    >>> trace = {"load": jnp.ones((5, 2)) / 2, "max_violation": jnp.zeros(5)}
    >>> len(routing_trace(trace)[0].collections)
    2
  """
  import matplotlib.pyplot as plt

  words = {
    "entropy": "evenness of loads",
    "dropped": "dropped edges",
    "overlap": "same choice as before",
    "neighbors": "same choice as the neighbor",
  }
  missing = {"load", "max_violation"} - set(trace)
  if missing:
    raise ValueError(f"trace must have {sorted(missing)}, got {sorted(trace)}")
  load = np.asarray(trace["load"])
  lines = {
    name: np.asarray(trace[name])
    for name in ("max_violation", *words)
    if name in trace
  }
  for name, line in lines.items():
    if load.ndim != 2 or line.shape != load.shape[:1]:
      raise ValueError(
        f"trace must have load [steps, experts] and {name} [steps], got "
        f"{list(load.shape)} and {list(line.shape)}"
      )
  if axes is None:
    _, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
  left, middle, right = axes
  steps = np.arange(len(load))
  shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, load.shape[1]))
  left.stackplot(steps, load.T, colors=shades, linewidth=0)
  left.set(ylim=(0, 1), ylabel="share of the edges")
  middle.plot(steps, lines.pop("max_violation"), color=COLORS[0])
  middle.set(ylabel="largest load / mean - 1")
  middle.set_ylim(bottom=0)
  for color, (name, line) in zip(COLORS, lines.items()):
    right.plot(steps, line, color=color, label=words[name])
  right.set(ylim=(0, 1.02), ylabel="share")
  if lines:
    right.legend(frameon=False, fontsize="small")
  for ax in axes:
    ax.set(xlabel="step", xlim=(0, max(len(load) - 1, 1)))
    ax.tick_params(length=2)
    for side in ax.spines.values():
      side.set(color="#888888", linewidth=0.6)
  return axes
