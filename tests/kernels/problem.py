"""Cases of block-sparse attention, the backends, and a comparison.

A case is a seeded problem with any of the features; `compare` runs a backend on
it, forward and backward, and holds the results against the oracle.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from tests.oracles import attention as oracle

# Compilation is most of what these tests cost, and this makes it four times
# cheaper. It changes the machine code only, not what is computed.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
jit = functools.partial(jax.jit, compiler_options=FAST)


@dataclasses.dataclass(frozen=True)
class Backend:
  """A backend and what is known of it.

  Attributes:
    options: what `block_sparse_attention` is called with.
    rounds_products: whether probabilities are rounded to the dtype of q before
      they are multiplied.
    slow: whether all its tests are for make test-all.
  """

  name: str
  options: tuple
  rounds_products: bool = False
  slow: bool = False

  def __call__(self, *args, **options):
    return pk.block_sparse_attention(*args, **dict(self.options), **options)

  @property
  def kernel(self):
    """Whether it is a Pallas kernel, and takes long to compile here."""
    return "interpret" in dict(self.options)


def _tpu(name, interpret, **fields):
  return Backend(
    name,
    (("backend", "tpu"), ("interpret", interpret)),
    rounds_products=True,
    **fields,
  )


REFERENCE = Backend("reference", (("backend", "reference"),))
XLA = Backend("xla", (("backend", "xla"),))
TPU = _tpu("tpu", True)
RACES = _tpu(
  "tpu_races",
  pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
  slow=True,
)
DEFAULT = Backend("default", (("backend", None),))
BACKENDS = (REFERENCE, XLA, TPU)


def each(*backends, slow=()):
  """Runs a test with each backend; those in `slow` in make test-all only."""

  def param(backend):
    mark = pytest.mark.slow if backend.slow or backend in slow else ()
    return pytest.param(backend, id=backend.name, marks=mark)

  return pytest.mark.parametrize("backend", [*map(param, backends)])


each_backend = each(*BACKENDS)
# For tests that compile a good deal.
xla_first = each(*BACKENDS, slow=(REFERENCE, TPU))


@dataclasses.dataclass(frozen=True)
class Case:
  """What a problem has; everything in it is drawn from `seed`.

  The lists are drawn unsorted, repeated and out of range, with counts of 0 to
  more than the capacity, so that some are empty.

  Attributes:
    shared: which of "batch" and "heads" the mask shares.
    full: whether every query block lists every key block.
    columns: how many single keys a query block lists, or 0.
    spread: how far the logits of different key blocks are apart.
    mass: the block mass to compare.
  """

  batch: int = 2
  queries: int = 40
  keys: int = 40
  heads: int = 4
  kv_heads: int = 2
  dim: int = 8
  block_q: int = 16
  block_kv: int = 16
  capacity: int = 2
  shared: tuple = ()
  full: bool = False
  members: bool = False
  columns: int = 0
  level: bool = False
  rule: Any = None
  scale: float | None = None
  softcap: float | None = None
  sinks: bool = False
  positions: bool = False
  segments: bool = False
  skip_threshold: float | None = None
  spread: float = 0.0
  mass: str = "sum"
  seed: int = 0

  @property
  def static(self):
    """Options that are no arrays."""
    names = ("scale", "softcap", "skip_threshold")
    options = {n: getattr(self, n) for n in names}
    return {n: x for n, x in options.items() if x is not None}


@dataclasses.dataclass
class Problem:
  """The arguments of a case.

  Attributes:
    arrays: q, k, v and perhaps sinks: what there are gradients of.
    mask: a BlockMask.
    integers: positions and segment ids, by argument.
    dout: cotangent of the output.
    dlse: cotangent of the log-sum-exp.
  """

  arrays: dict
  mask: pk.BlockMask
  integers: dict
  dout: np.ndarray
  dlse: np.ndarray


def make(case: Case) -> Problem:
  """The problem of a case."""
  rng = np.random.default_rng(case.seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  b, h, d = case.batch, case.heads, case.dim
  nq = -(-case.queries // case.block_q)
  nk = -(-case.keys // case.block_kv)

  q = 2 * normal(b, case.queries, h, d)
  k, v = (normal(b, case.keys, case.kv_heads, d) for _ in range(2))
  if case.spread:
    height = rng.permutation(nk)[np.arange(case.keys) // case.block_kv]
    q[..., 0] = 1
    k[..., 0] += case.spread * height[:, None] * d**0.5
  arrays = dict(q=q, k=k, v=v)
  if case.sinks:
    arrays["sinks"] = normal(h)

  lead = (
    1 if "batch" in case.shared else b,
    1 if "heads" in case.shared else h,
    nq,
  )
  capacity = nk if case.full else case.capacity
  indices = rng.integers(-1, nk + 1, (*lead, capacity))
  counts = rng.integers(0, capacity + 2, lead)
  if case.full:
    indices = np.broadcast_to(rng.permutation(nk), (*lead, nk))
    counts = np.full(lead, nk)
  given = {}
  if case.members:
    words = -(-capacity // 32)
    shape = (*lead, words, case.block_q)
    given["members"] = rng.integers(0, 2**32, shape).astype(np.uint32)
  if case.columns:
    shape = (*lead, case.columns)
    given["columns"] = rng.integers(-1, case.keys + 2, shape)
  if case.level:
    given["level"] = rng.integers(0, 3, (*lead, capacity))
  given |= dict(indices=indices, counts=counts)
  static = dict(block_q=case.block_q, block_kv=case.block_kv, kv_blocks=nk)
  mask = constructor(rule=case.rule, **static)(given)

  integers = {}
  if case.positions:  # of their own in each batch element of the keys
    integers["q_positions"] = rng.permutation(case.queries)
    order = [rng.permutation(case.keys) for _ in range(b)]
    integers["kv_positions"] = np.stack(order)
  if case.segments:
    ids = lambda *shape: np.sort(rng.integers(-1, 2, shape), -1)
    integers["q_segment_ids"] = ids(b, case.queries)
    integers["kv_segment_ids"] = ids(case.keys)
  integers = {n: x.astype(np.int32) for n, x in integers.items()}
  dout, dlse = normal(*q.shape), normal(*q.shape[:3])
  return Problem(arrays, mask, integers, dout, dlse)


@functools.cache
def constructor(**static):
  """BlockMask(**arrays, **static) as a compiled function of the arrays."""
  return jit(lambda arrays: pk.BlockMask(**arrays, **static))


@functools.cache
def expected(case: Case):
  """The problem, and the oracle's results by name, in f64."""
  problem = make(case)
  mask = problem.mask
  lists = dict(indices=mask.indices, counts=mask.counts)
  for name in ("members", "columns", "level"):
    if getattr(mask, name) is not None:
      lists[name] = getattr(mask, name)
  lists = {n: np.asarray(x) for n, x in lists.items()}
  inputs = problem.arrays | lists | problem.integers | case.static
  inputs |= dict(block_q=mask.block_q, block_kv=mask.block_kv)
  if mask.rule is not None:
    at = np.arange(-1, max(case.queries, case.keys) + 1)
    table = np.asarray(mask.rule(at[:, None], at[None]))
    inputs["rule"] = lambda q, k: table[q + 1, k + 1]
  found = oracle.attention(**inputs)
  # A decision close to the threshold may rightly fall either way in f32.
  assert found.skip_margin > 1e-3, f"another seed: {found.skip_margin}"
  want = oracle.gradients(**inputs, dout=problem.dout, dlse=problem.dlse)
  want = {n: x for n, x in want.items() if x is not None}
  mass = getattr(found, f"mass_{case.mass}")
  want |= dict(out=found.out, lse=found.lse, mass=mass, kept=found.kept)
  return problem, want


def everything(backend, mass, **static):
  """f(arrays, mask, integers, dout, dlse) -> results by name."""

  def f(arrays, mask, integers, dout, dlse):
    def attend(arrays):
      options = dict(integers, sinks=arrays.get("sinks"), **static)
      out, lse, mass_of = backend(
        *(arrays[n] for n in "qkv"),
        mask,
        **options,
        return_lse=True,
        return_block_mass=mass,
      )
      return (out, lse), mass_of

    (out, lse), pull, mass_of = jax.vjp(attend, arrays, has_aux=True)
    (back,) = pull((dout.astype(out.dtype), dlse))
    back = {f"d{n}": x for n, x in back.items()}
    return dict(out=out, lse=lse, mass=mass_of, **back)

  return f


@functools.cache
def compiled(backend, mass="sum", **static):
  return jit(everything(backend, mass, **static))


def run(backend: Backend, problem: Problem, mass="sum", **static) -> dict:
  """Results by name; compiled once for equal shapes and options."""
  arguments = [getattr(problem, f.name) for f in dataclasses.fields(problem)]
  got = compiled(backend, mass, **static)(*arguments)
  return jax.tree.map(np.asarray, got)


def compare(backend: Backend, case: Case, atol=1e-5):
  """Holds a backend's results against the oracle's; returns both."""
  problem, want = expected(case)
  got = run(backend, problem, case.mass, **case.static)
  for name, x in got.items():
    message = f"{name} of {backend.name}"
    assert x.shape == want[name].shape and x.dtype == np.float32, message
    np.testing.assert_allclose(
      x, want[name], rtol=1e-5, atol=atol, err_msg=message
    )
  return got, want


def gradients(f, arrays, cotangent):
  """Output of f(*arrays) and its gradients against a cotangent."""
  out, pull = jax.vjp(f, *arrays)
  return out, *pull(jnp.asarray(cotangent, out.dtype))


def qkv(batch, queries, keys, heads, kv_heads, dim, *, seed=0, dtype="float32"):
  """[q, k, v] and a cotangent of the output."""
  rng = np.random.default_rng(seed)
  dtype = jnp.dtype(dtype)
  of_q, of_k = (batch, queries, heads, dim), (batch, keys, kv_heads, dim)
  found = [
    rng.standard_normal(shape).astype(dtype)
    for shape in (of_q, of_k, of_k, of_q)
  ]
  return found[:3], found[3]
