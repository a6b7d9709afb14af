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
import functools
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rules
from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.checks import BACKENDS

S = 32  # queries and keys
BLOCK = 16
DEFAULT = BACKENDS[::-1]
# Most of the time goes into compiling for a CPU; this takes less of it.
_FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class _Try:
  """The problem of a feature.

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


_AT = np.arange(S, dtype=np.int32)
_CAUSAL = dict(rule=rules.Causal())
_TRIES = {
  "rule": _Try(_CAUSAL),
  "positions": _Try(
    _CAUSAL, dict(q_positions=_AT[::-1].copy(), kv_positions=_AT // 2)
  ),
  "segments": _Try(
    options=dict(q_segment_ids=_AT // 9, kv_segment_ids=_AT // 9)
  ),
  "members": _Try(
    dict(members=np.arange(2 * BLOCK, dtype=np.uint32).reshape(1, 1, 2, 1, -1))
  ),
  "columns": _Try(dict(columns=np.array([[[[17, 20], [-1, -1]]]]))),
  "level": _Try(dict(level=np.array([[[[1, 0], [2, 0]]]]))),
  "softcap": _Try(options=dict(softcap=1.5)),
  "sinks": _Try(sinks=True),
  "lse and its gradient": _Try(lse=True),
  "block mass": _Try(options=dict(return_block_mass="sum")),
  "skip_threshold": _Try(options=dict(skip_threshold=0.3)),
  "GQA": _Try(heads=2),
  "empty rows": _Try(counts=(0, 2)),
  "block_q=1": _Try(
    queries=2, block_q=1, indices=((0, 1), (0, 1)), counts=(1, 2)
  ),
  "head_dim 80": _Try(dim=80),
  "bf16": _Try(dtype=jnp.bfloat16),
  "f32": _Try(),
  "lengths that do not divide": _Try(queries=S - 5, keys=S - 3),
  "vmap": _Try(how="vmap"),
  "shard_map": _Try(how="shard_map"),
  "second order": _Try(how="second order"),
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
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), case.dtype)

  q = normal(1, case.queries, case.heads, case.dim)
  k, v = (normal(1, case.keys, 1, case.dim) for _ in range(2))
  arrays = dict(q=q, k=k, v=v)
  if case.sinks:
    arrays["sinks"] = jnp.full(case.heads, 0.5)
  arrays["cotangent"] = normal(*q.shape)
  if case.lse:
    arrays["lse_cotangent"] = normal(*q.shape[:3])
  mask = BlockMask(
    np.array(case.indices)[None, None],
    np.array(case.counts)[None, None],
    block_q=case.block_q,
    block_kv=BLOCK,
    kv_blocks=-(-case.keys // BLOCK),
    **case.mask,
  )
  interpret = backend == "tpu" and jax.default_backend() != "tpu"
  attend = functools.partial(
    block_sparse_attention,
    backend=backend,
    interpret=interpret,
    return_lse=True,
    **case.options,
  )

  def loss(primals, arrays, mask):
    given = {n: primals[n] for n in primals if n == "sinks"}
    out, lse, *rest = attend(*(primals[n] for n in "qkv"), mask, **given)
    total = (out * arrays["cotangent"]).astype(jnp.float32).sum()
    if case.lse:
      total += (lse * arrays["lse_cotangent"]).sum()
    return total, (out, lse, *rest)

  def value(arrays, mask):
    primals = {n: x for n, x in arrays.items() if "cotangent" not in n}
    slope = jax.grad(loss, has_aux=True)
    if case.how != "second order":
      return slope(primals, arrays, mask)
    steep = lambda primals: sum(
      (x**2).sum() for x in jax.tree.leaves(slope(primals, arrays, mask)[0])
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
    np.asarray, jax.jit(f, compiler_options=options)(arrays, mask)
  )


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
