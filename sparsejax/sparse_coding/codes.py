"""Sparse codes: of each row the latents that are active, and what they make."""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import partitioning

Array = jax.Array

# How many numbers are gathered, or made to choose from, at a time. On CPU they
# stay in its caches.
GATHERED = {"cpu": 2**20, "default": 2**26}
SCORED = 2**21


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Code:
  """The active latents of rows, as lists of equal length.

  Attributes:
    values: [..., k]; a latent whose value is 0 is not active.
    indices: int32 [..., k], none twice in a row.
    latents: how many there are.
  """

  values: Array
  indices: Array
  latents: int = dataclasses.field(metadata={"static": True})

  def dense(self) -> Array:
    """All latents, [..., latents], zeros included.

    >>> code = Code(jnp.array([[2.0, 3.0]]), jnp.array([[3, 0]]), 4)
    >>> code.dense().tolist()
    [[3.0, 0.0, 0.0, 2.0]]
    """
    shape = (*self.values.shape[:-1], self.latents)
    zeros = jnp.zeros(shape, self.values.dtype)
    return jnp.put_along_axis(
      zeros, self.indices, self.values, axis=-1, inplace=False
    )


def top_k(
  pre: Array, k: int, *, scores: Callable[[Array], Array] | None = None
) -> Code:
  """Keeps the k latents with the largest scores of each row, if positive.

  Args:
    pre: pre-activations, floating [..., latents].
    k: how many of a row are kept, static, from 0 to all.
    scores: function of `pre` that gives scores of its shape, default `pre`
      itself; equal ones go to the lower index. It carries no gradient.

  Returns:
    A Code whose values are what is positive of `pre`.

  Raises:
    ValueError: for a k that does not fit, or pre-activations not floating.

  Example:
    >>> top_k(jnp.array([1.0, -2.0, 3.0]), 1).dense().tolist()
    [0.0, 0.0, 3.0]

  Source: topk-sae, Scaling and evaluating sparse autoencoders, section 2.3.
  """
  if not jnp.issubdtype(pre.dtype, jnp.floating):
    raise ValueError(f"pre must be floating, got {pre.dtype}")
  check_k(k, pre.shape[-1])
  ranked = lax.stop_gradient(pre)
  if scores is not None:
    ranked = lax.stop_gradient(scores(ranked))
  indices = largest(ranked, k)
  values = jax.nn.relu(jnp.take_along_axis(pre, indices, axis=-1))
  return Code(values, indices, pre.shape[-1])


def encode_top_k(
  x: Array,
  kernel: Array,
  bias: Array,
  k: int,
  *,
  scores: Callable[[Array], Array] | None = None,
) -> Code:
  """`top_k` of `x @ kernel.T + bias`.

  Its gradients read and change only those rows of the kernel that are kept.
  Without `scores` a CPU holds the pre-activations of some rows at a time.

  Args:
    x: [..., width].
    kernel: [latents, width].
    bias: [latents].
    k: as `top_k` takes it.
    scores: likewise.

  Returns:
    The Code.

  Raises:
    ValueError: for a k or shapes that do not fit.

  Example:
    >>> code = encode_top_k(jnp.ones(2), jnp.eye(2), jnp.array([0.0, 1.0]), 1)
    >>> code.dense().tolist()
    [0.0, 2.0]
  """
  check_k(k, len(kernel))
  if x.shape[-1:] != kernel.shape[1:] or bias.shape != kernel.shape[:1]:
    shapes = [list(array.shape) for array in (x, kernel, bias)]
    raise ValueError(
      "x, kernel and bias must be [..., width], [latents, width] and "
      f"[latents], got {shapes}"
    )
  _, values, indices = chosen(x, kernel, bias, k, scores)
  values = with_gradients(values, indices, x, kernel, bias)
  return Code(values, indices, len(kernel))


def decode(code: Code | Array, dictionary: Array) -> Array:
  """The sum of the atoms that a code names, each by its value.

  Args:
    code: a Code, or dense latents [..., latents].
    dictionary: [latents, width], an atom a row.

  Returns:
    [..., width].

  Raises:
    ValueError: for a code of another number of latents.

  Example:
    >>> code = Code(jnp.array([2.0, 1.0]), jnp.array([2, 0]), 3)
    >>> decode(code, jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 1.0]])).tolist()
    [1.0, 2.0]
  """
  latents = code.latents if isinstance(code, Code) else code.shape[-1]
  if latents != len(dictionary):
    raise ValueError(
      f"code must be of the {len(dictionary)} latents of the dictionary, got "
      f"{latents}"
    )
  if isinstance(code, Code):
    return weighted_sum(code.values, code.indices, dictionary)
  return code @ dictionary


def check_k(k: int, latents: int) -> None:
  """ValueError for a k that is no number of latents."""
  if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= latents:
    raise ValueError(f"k must be an integer from 0 to {latents}, got {k!r}")


@functools.partial(jax.jit, static_argnums=1)
def largest(scores: Array, k: int) -> Array:
  """Indices of the k largest of each row, in the order of `lax.top_k`.

  On CPU only chunks of a row are searched: those k with the largest maxima have
  the k largest. That is twice as fast for rows of 16k.
  """
  rows = _flat(scores)
  chunk = 1
  while 0 < 2 * k * chunk**2 <= rows.shape[1]:  # as many as they hold
    chunk *= 2
  whole = lambda rows: lax.top_k(rows, k)[1]
  in_chunks = functools.partial(_largest, k=k, chunk=chunk)

  def run(rows):
    if chunk < 8:
      return (whole(rows),)
    return (lax.platform_dependent(rows, cpu=in_chunks, default=whole),)

  (found,) = _on_shards(run, [rows], ["n m"], ["n k"], k=k)
  return found.reshape(*scores.shape[:-1], k)


def _largest(x, k, chunk):
  n, m = x.shape
  take = functools.partial(
    jnp.take_along_axis, axis=1, mode="promise_in_bounds"
  )
  # `lax.top_k` is faster where few are above the others.
  above = lambda x, floor: jnp.where(x < floor[:, None], -jnp.inf, x)
  # Chunks of neighbors, so that among equal ones lower means lower indices.
  x = jnp.pad(x, ((0, 0), (0, -m % chunk)), constant_values=-jnp.inf)
  x = x.reshape(n, -(-m // chunk), chunk)
  best = x.max(-1).astype(_accumulator(x))
  # Each of k groups has one that is at least the floor.
  group = best.shape[1] // k
  groups = best[:, : group * k].reshape(n, group, k)
  best, chosen = lax.top_k(above(best, groups.max(1).min(1)), k)
  chosen = jnp.sort(chosen, axis=1)
  x = take(x, chosen[..., None]).reshape(n, k * chunk).astype(best.dtype)
  _, at = lax.top_k(above(x, best[:, -1]), k)
  return take(chosen, at // chunk) * chunk + at % chunk


def chosen(
  x: Array, kernel: Array, bias: Array, k: int, scores: Callable | None
) -> tuple[Array, Array, Array]:
  """Scores, values and indices of what `encode_top_k` keeps, [..., k].

  Scores have the precision of the choice, and nothing has a gradient.
  """
  dtype = jnp.result_type(x, kernel, bias)

  def choose(x, kernel, bias, scores=None):
    wide = _accumulator(x, kernel, bias)
    pre = jnp.matmul(x, kernel.T, preferred_element_type=wide) + bias
    ranked = pre if scores is None else scores(pre)
    indices = largest(ranked, k)
    at = lambda x: jnp.take_along_axis(x, indices, axis=-1)
    return at(ranked), jax.nn.relu(at(pre)).astype(dtype), indices

  def in_chunks(x, kernel, bias):
    step = lambda _, x: (None, choose(x, kernel, bias))
    rows = max(SCORED // max(len(kernel), 1), 128)
    return _over_chunks(step, None, [x], rows)[1]

  def run(x, kernel, bias):
    return lax.platform_dependent(
      x, kernel, bias, cpu=in_chunks, default=choose
    )

  given = lax.stop_gradient((x, kernel, bias))
  if scores is not None:  # it may look at arrays of all rows
    return lax.stop_gradient(choose(*given, scores))
  found = _on_shards(
    run, [_flat(given[0]), *given[1:]], ["n d", "m d", "m"], ["n k"] * 3, k=k
  )
  return tuple(a.reshape(*x.shape[:-1], k) for a in found)


@jax.custom_vjp
def weighted_sum(values: Array, indices: Array, table: Array) -> Array:
  """Rows of a table [m, d] at indices [..., k], times values: [..., d]."""
  return _weighted_sum(values, indices, table)


def _backward(given, dy):
  values, indices, table = given
  dvalues = _products(dy, indices, table).astype(values.dtype)
  dtable = _outer_sum(values, indices, dy, len(table)).astype(table.dtype)
  return (
    partitioning.sum_like(dvalues, values),
    None,
    partitioning.sum_like(dtable, table),
  )


weighted_sum.defvjp(lambda *given: (weighted_sum(*given), given), _backward)


@jax.custom_vjp
def with_gradients(
  values: Array, indices: Array, x: Array, kernel: Array, bias: Array
) -> Array:
  """`values`, which positive `x @ kernel.T + bias` has at `indices`."""
  del indices, x, kernel, bias
  return values


def _backward_of_kept(given, dvalues):
  values, indices, x, kernel, bias = given
  dvalues = jnp.where(values > 0, dvalues, 0)
  dbias = jnp.zeros(bias.shape, _accumulator(bias))
  dbias, dvalues, indices = partitioning.vary_alike(dbias, dvalues, indices)
  dbias = dbias.at[indices].add(dvalues, mode="promise_in_bounds")
  dx = _weighted_sum(dvalues, indices, kernel)
  dkernel = _outer_sum(dvalues, indices, x, len(kernel))
  like = lambda d, given: partitioning.sum_like(d.astype(given.dtype), given)
  return None, None, like(dx, x), like(dkernel, kernel), like(dbias, bias)


with_gradients.defvjp(lambda *given: (given[0], given), _backward_of_kept)


# A row of values v, indices i and a table t makes of another row y, or gives,
# sum_j v[j] <t[i[j]], y>: a sum of rows, products, or a sum of outer products.


@jax.jit
def _weighted_sum(values, indices, table):
  dtype = _accumulator(values, table)

  def step(total, given):
    value, index = given
    # XLA makes one loop of this, and no array of what is read.
    return total + value[..., None] * _rows(table, index), None

  total = jnp.zeros((*values.shape[:-1], table.shape[1]), dtype)
  total, *given = partitioning.vary_alike(total, values, indices, table)
  values, indices, table = given
  lists = [jnp.moveaxis(x, -1, 0) for x in (values, indices)]
  total, _ = lax.scan(step, total, lists, unroll=8)
  return total.astype(jnp.result_type(values, table))


@jax.jit
def _products(y, indices, table):
  dtype = _accumulator(y, table)
  shape, k = indices.shape, indices.shape[-1]

  def run(held, y, indices, table):
    def step(_, y, index):
      rows = _rows(table, index).astype(dtype)
      return None, jnp.einsum("rd,rkd->rk", y.astype(dtype), rows)

    rows = _flat(y), _flat(indices)
    size = held // max(k * y.shape[-1], 1)
    return _over_chunks(step, None, rows, size)[1].reshape(shape)

  return _by_platform(run, y, indices, table)


@functools.partial(jax.jit, static_argnums=3)
def _outer_sum(values, indices, y, m):
  dtype = _accumulator(values, y)
  k, d = values.shape[-1], y.shape[-1]

  def run(held, values, indices, y):
    def step(total, value, index, y):
      outer = value[..., None] * y[:, None].astype(dtype)
      return total.at[index].add(outer, mode="promise_in_bounds"), None

    size = held // max(k * d, 1)
    rows = values, indices, y
    return _over_chunks(step, jnp.zeros((m, d), dtype), rows, size)[0]

  (found,) = _on_shards(
    lambda *rows: (_by_platform(run, *rows),),
    [_flat(x) for x in (values, indices, y)],
    ["n k", "n k", "n d"],
    ["m d"],
    summed={0: "n"},
    m=m,
  )
  return found


def _rows(table, index):
  return table.at[index].get(mode="promise_in_bounds")


def _flat(x):
  return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _accumulator(*arrays):
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _by_platform(run, *args):
  """run(how many numbers it may hold, *args)."""
  on = {name: functools.partial(run, n) for name, n in GATHERED.items()}
  return lax.platform_dependent(*args, **on)


def _on_shards(f, arrays, names, out_names, summed=None, **sizes):
  """f(*arrays), where a mesh divides their rows "n" on each shard.

  Left to itself, XLA gathers what a list is chosen from, and sums over devices
  once a chunk; see `partitioning.per_shard`.
  """
  for words, x in zip(names, arrays, strict=True):
    sizes |= zip(words.split(), x.shape, strict=True)
  batched = lambda words: [f"b {x}" for x in words]
  found = partitioning.per_shard(
    lambda _, *arrays: jax.vmap(f)(*arrays),
    [x[None] for x in arrays],
    batched(names),
    batched(out_names),
    {"b": 1, **sizes},
    cut="n",
    summed=summed,
  )
  return tuple(x[0] for x in found)


def _over_chunks(step, carry, rows, size):
  """Scans over rows [n, ...], some `size` at a time; the last may be zeros."""
  n = len(rows[0])
  count = max(-(-n // max(size, 1)), 1)
  size = -(-n // count)

  # A chunk has every count-th row, and so some of each shard of the rows.
  def split(x):
    x = jnp.pad(x, ((0, count * size - n), (0, 0)))
    return jnp.moveaxis(x.reshape(size, count, x.shape[1]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(size * count, x.shape[2])[:n]

  carry, rows = partitioning.vary_alike(carry, rows)
  scanned = lambda carry, rows: step(carry, *rows)
  carry, out = lax.scan(scanned, carry, tuple(map(split, rows)))
  return carry, jax.tree.map(join, out)
