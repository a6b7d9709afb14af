"""Which backend has which feature, made by trying: a matrix.

  python -m pallas_kernels.features

Each cell runs a tiny problem, forward and backward, under `jit`. It shows

- "yes": results are finite and equal to those of the backend "reference";
- "no": a ValueError said that the backend lacks it;
- "wrong": results are not finite, or others;
- the name of the exception, where there was another.

The backend "reference" is the definition, and so is compared with itself: its
"yes" says that it runs and is finite. A kernel whose device is not there runs
in Pallas's interpreter, which takes some seconds a cell.
"""

import dataclasses
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.backends import BACKENDS
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul import BlockSparseWeight
from pallas_kernels.block_sparse_matmul import sampled_matmul
from pallas_kernels.grouped_matmul import grouped_matmul

S = 32  # queries and keys
BLOCK = 16
DEFAULT = BACKENDS[::-1]
# Most of the time goes into compiling for a CPU; this takes less of it.
_FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class _Attention:
  """The problem of a feature of `block_sparse_attention`.

  Attributes:
    mask: what the BlockMask has besides its lists.
    options: arguments of `block_sparse_attention`.
    indices: one list for each query block, of key blocks.
    lse: whether the log-sum-exp is compared, and has a cotangent.
    how: None, "vmap", "shard_map" or "second order".
  """

  mask: dict = dataclasses.field(default_factory=dict)
  options: dict = dataclasses.field(default_factory=dict)
  queries: int = S
  keys: int = S
  heads: int = 1
  dim: int = 16
  dtype: Any = jnp.float32
  block_q: int = BLOCK
  indices: tuple = ((0, 1), (0, 1))
  counts: tuple = (1, 2)
  sinks: bool = False
  lse: bool = False
  how: str | None = None

  def problem(self, options):
    """Arrays, a mask, and the loss of both."""
    normal = _draw(self.dtype)
    q = normal(1, self.queries, self.heads, self.dim)
    k, v = (normal(1, self.keys, 1, self.dim) for _ in range(2))
    arrays = dict(q=q, k=k, v=v)
    if self.sinks:
      arrays["sinks"] = jnp.full(self.heads, 0.5)
    arrays["cotangent"] = normal(*q.shape)
    if self.lse:
      arrays["lse_cotangent"] = normal(*q.shape[:3])
    mask = BlockMask(
      np.array(self.indices)[None, None],
      np.array(self.counts)[None, None],
      block_q=self.block_q,
      block_kv=BLOCK,
      kv_blocks=-(-self.keys // BLOCK),
      **self.mask,
    )

    def loss(primals, arrays, mask):
      sinks = {n: primals[n] for n in primals if n == "sinks"}
      out, lse, *rest = block_sparse_attention(
        *(primals[n] for n in "qkv"),
        mask,
        return_lse=True,
        **sinks,
        **self.options,
        **options,
      )
      total = (out * arrays["cotangent"]).astype(jnp.float32).sum()
      if self.lse:
        total += (lse * arrays["lse_cotangent"]).sum()
      return total, (out, lse, *rest)

    return arrays, mask, loss


@dataclasses.dataclass(frozen=True)
class _Grouped:
  """The problem of a feature of `grouped_matmul`, of 24 edges.

  Attributes:
    options: arguments of `grouped_matmul`.
    sizes: of the groups; rhs has the weights of three.
    rows: of lhs, which has a NaN behind the 20 rows of the default groups.
    how: None, "vmap", "shard_map" or "second order".
  """

  options: dict = dataclasses.field(default_factory=dict)
  sizes: tuple = (9, 0, 11)
  rows: int = 24
  k: int = 20
  n: int = 12
  gate: bool = False
  scale: bool = False
  dtype: Any = jnp.float32
  how: str | None = None

  def problem(self, options):
    """Arrays, sizes, and the loss of both."""
    normal = _draw(self.dtype)
    options = self.options | options
    k, n = self.k, self.n
    weight = (3, n, k) if "transpose_rhs" in options else (3, k, n)
    arrays = dict(lhs=normal(self.rows, k), rhs=normal(*weight))
    if "gather" not in options:
      arrays["lhs"] = arrays["lhs"].at[20:].set(jnp.nan)
    if self.gate:
      arrays["rhs_gate"] = normal(*weight)
    if self.scale:
      arrays["row_scale"] = normal(24)
    arrays["cotangent"] = normal(options.get("num_rows", 24), n)

    def loss(primals, arrays, sizes):
      out = grouped_matmul(**primals, group_sizes=sizes, **options)
      return (out * arrays["cotangent"]).astype(jnp.float32).sum(), (out,)

    return arrays, np.array(self.sizes, np.int32), loss


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """The problem of a feature of `block_sparse_matmul`.

  Attributes:
    shape: of the weight, of which three blocks are listed and a fourth is not
      used.
    how: None, "vmap", "shard_map" or "second order".
  """

  shape: tuple[int, int] = (256, 384)
  block: int = 128
  sampled: bool = False
  dtype: Any = jnp.float32
  how: str | None = None

  def problem(self, options):
    """Arrays, lists, and the loss of both."""
    normal = _draw(self.dtype)
    k, n = self.shape
    values = normal(4, self.block, self.block).at[3].set(jnp.nan)
    lists = np.array([[1, 0], [0, 0], [1, 0]]), np.array([2, 0, 1])
    arrays = dict(x=normal(5, k), values=values)
    if self.sampled:
      arrays["y"] = normal(5, n)
    result = values.shape if self.sampled else (5, n)
    arrays["cotangent"] = normal(*result)

    def loss(primals, arrays, lists):
      weight = BlockSparseWeight(primals["values"], *lists, shape=self.shape)
      if self.sampled:
        out = sampled_matmul(primals["x"], primals["y"], weight, **options)
      else:
        out = block_sparse_matmul(primals["x"], weight, **options)
      return (out * arrays["cotangent"]).astype(jnp.float32).sum(), (out,)

    return arrays, lists, loss


_AT = np.arange(S, dtype=np.int32)
_CAUSAL = dict(rule=rules.Causal())
_TRIES = {
  "rule": _Attention(_CAUSAL),
  "positions": _Attention(
    _CAUSAL, dict(q_positions=_AT[::-1].copy(), kv_positions=_AT // 2)
  ),
  "segments": _Attention(
    options=dict(q_segment_ids=_AT // 9, kv_segment_ids=_AT // 9)
  ),
  "members": _Attention(
    dict(members=np.arange(2 * BLOCK, dtype=np.uint32).reshape(1, 1, 2, 1, -1))
  ),
  "columns": _Attention(dict(columns=np.array([[[[17, 20], [-1, -1]]]]))),
  "level": _Attention(dict(level=np.array([[[[1, 0], [2, 0]]]]))),
  "softcap": _Attention(options=dict(softcap=1.5)),
  "sinks": _Attention(sinks=True),
  "lse and its gradient": _Attention(lse=True),
  "block mass": _Attention(options=dict(return_block_mass="sum")),
  "skip_threshold": _Attention(options=dict(skip_threshold=0.3)),
  "GQA": _Attention(heads=2),
  "empty rows": _Attention(counts=(0, 2)),
  "block_q=1": _Attention(
    queries=2, block_q=1, indices=((0, 1), (0, 1)), counts=(1, 2)
  ),
  "head_dim 80": _Attention(dim=80),
  "bf16": _Attention(dtype=jnp.bfloat16),
  "f32": _Attention(),
  "lengths that do not divide": _Attention(queries=S - 5, keys=S - 3),
  "vmap": _Attention(how="vmap"),
  "shard_map": _Attention(how="shard_map"),
  "second order": _Attention(how="second order"),
}
_EDGES = np.arange(24, dtype=np.int32)
_TRIES |= {
  "grouped: empty groups, rows of none": _Grouped(),
  "grouped: gather": _Grouped(dict(gather=_EDGES[::-1] // 3), rows=8),
  "grouped: scatter": _Grouped(dict(scatter=_EDGES // 3, num_rows=8)),
  "grouped: rhs_gate": _Grouped(gate=True),
  "grouped: activation": _Grouped(dict(activation=jnp.tanh)),
  "grouped: row_scale": _Grouped(scale=True),
  "grouped: transpose_rhs": _Grouped(dict(transpose_rhs=True)),
  "grouped: group_offset": _Grouped(
    dict(group_offset=np.int32(1)), sizes=(3, 8, 0, 7, 2)
  ),
  "grouped: bf16": _Grouped(dtype=jnp.bfloat16),
  "grouped: f16": _Grouped(dtype=jnp.float16),
  "grouped: k beyond a tile": _Grouped(k=1100),
  "grouped: vmap": _Grouped(how="vmap"),
  "grouped: shard_map": _Grouped(how="shard_map"),
  "grouped: second order": _Grouped(how="second order"),
  "blocks: product": _Blocks(),
  "blocks: sampled product": _Blocks(sampled=True),
  "blocks: hang over the edge": _Blocks((200, 300)),
  "blocks: of 32": _Blocks((64, 96), block=32),
  "blocks: bf16": _Blocks(dtype=jnp.bfloat16),
  "blocks: vmap": _Blocks(how="vmap"),
  "blocks: shard_map": _Blocks(how="shard_map"),
  "blocks: second order": _Blocks(how="second order"),
}
FEATURES = tuple(_TRIES)


def matrix(backends=DEFAULT, features=FEATURES, *, progress=None) -> dict:
  """Tries every feature on every backend.

  Args:
    backends: names that `block_sparse_attention` takes.
    features: names, of `FEATURES`.
    progress: None, or a function that is called with a line of text before each
      cell.

  Returns:
    A dict of dicts: what a cell shows, by feature and then by backend.

  Raises:
    ValueError: for a name that is none.

  Example:
    >>> matrix(("reference",), ("softcap",))
    {'softcap': {'reference': 'yes'}}
  """
  for name, given, known in (
    ("backends", backends, BACKENDS),
    ("features", features, FEATURES),
  ):
    strange = [x for x in given if x not in known]
    if strange or isinstance(given, str):
      raise ValueError(f"{name} is {given!r}; it takes some of {tuple(known)}.")
  found, cells = {}, len(backends) * len(features)
  for feature in features:
    want, found[feature] = None, {}
    for backend in backends:
      if progress is not None:
        done = sum(map(len, found.values()))
        progress(f"{done}/{cells} {feature}, {backend}")
      if want is None:
        want = _run(_TRIES[feature], "reference")
      found[feature][backend] = _cell(_TRIES[feature], backend, want)
  return found


def _cell(case, backend, want):
  """What a cell shows."""
  try:
    got = want if backend == "reference" else _run(case, backend)
  except ValueError as error:
    # The errors of this package name the backend that lacks something.
    lacks = re.search(rf"backend '{backend}' has no", str(error))
    return "no" if lacks else "ValueError"
  except Exception as error:  # whatever it is, it is what the cell shows
    return type(error).__name__
  # Of the largest number of an array; bf16 rounds some products as well.
  tolerance = 1e-4 if case.dtype == jnp.float32 else 5e-2
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if x.shape != y.shape or x.dtype != y.dtype:
      return "wrong"
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    # The log-sum-exp of a row that reads nothing is -inf in both.
    finite = np.isfinite(y)
    if np.isnan(y).any() or not np.array_equal(x[~finite], y[~finite]):
      return "wrong"
    error = np.abs(x[finite] - y[finite]).max(initial=0)
    if not error <= tolerance * max(np.abs(y[finite]).max(initial=0), 1e-3):
      return "wrong"
  return "yes"


def _run(case, backend):
  """Output, whatever is returned besides, and gradients, as a tuple."""
  interpret = backend == "tpu" and jax.default_backend() != "tpu"
  options = dict(backend=backend, interpret=interpret)
  arrays, given, loss = case.problem(options)

  def value(arrays, given):
    primals = {n: x for n, x in arrays.items() if "cotangent" not in n}
    slope = jax.grad(loss, has_aux=True)
    if case.how != "second order":
      return slope(primals, arrays, given)
    steep = lambda primals: sum(
      (x**2).sum() for x in jax.tree.leaves(slope(primals, arrays, given)[0])
    )
    return jax.grad(steep)(primals)

  f = value
  if case.how == "vmap":
    f = jax.vmap(value, in_axes=(0, None))
    arrays = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), arrays)
  if case.how == "shard_map":
    mesh = jax.make_mesh(
      (1,), ("x",), devices=jax.devices()[:1],
      axis_types=(jax.sharding.AxisType.Auto,),
    )  # fmt: skip
    f = jax.shard_map(
      value,
      mesh=mesh,
      in_specs=(jax.P("x"), jax.P()),
      out_specs=jax.P("x"),
      check_vma=not interpret,  # which the interpreter does not pass
    )
  options = _FAST if jax.default_backend() == "cpu" else None
  return jax.tree.map(
    np.asarray, jax.jit(f, compiler_options=options)(arrays, given)
  )


def _draw(dtype):
  """Normal arrays of a seed, by their shapes in turn."""
  rng = np.random.default_rng(0)
  return lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)


def table(found) -> str:
  """The lines of a matrix, one a feature."""
  backends = list(next(iter(found.values()), {}))
  rows = [["", *backends]]
  rows += [[name, *(row[x] for x in backends)] for name, row in found.items()]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
  return "\n".join(lines)


def main():
  """Prints the matrix; which cell is tried stands on stderr."""
  width = 0

  def progress(line):
    nonlocal width
    sys.stderr.write("\r" + line.ljust(width))
    sys.stderr.flush()
    width = len(line)

  found = matrix(progress=progress)
  progress("")
  sys.stderr.write("\r")
  print(table(found))


if __name__ == "__main__":
  main()
