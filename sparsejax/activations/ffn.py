"""Feed-forward layers that read only the rows of neurons that fire.

What multiplies a kernel is mostly zeros, so that most of its rows are not
needed. Where several tokens are computed at once, the rows are those that any
of them needs.
"""

from collections.abc import Callable, Mapping
import functools

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax.activations.thresholds import keep_above
from sparsejax.activations.top_k import statistical_top_k
from sparsejax.automatic import automatic

Array = jax.Array

# On CPU: the rows that are added in one step of a loop, and those that are
# copied and multiplied in one, few enough to stay in the cache.
ADDED, COPIED = 8, 128


def sparse_matmul(a: Array, kernel: Array, *, capacity: int) -> Array:
  """a @ kernel, of whose rows only those are read that a needs.

  Where more rows are needed than `capacity`, all are read: the result is right
  at any density. Derivatives are those of the product, and dense. It is faster
  where each layer's kernel is an array of its own: of a stack of layers, XLA
  copies a kernel before anything is read. Under `vmap` both products are
  computed and one is taken, which is right, and not faster than the dense one.

  Args:
    a: floating [..., K], mostly zeros.
    kernel: [K, N], as Flax has it.
    capacity: static, how many rows are gathered at most. On CPU time goes with
      the rows needed, elsewhere with the capacity.

  Returns:
    [..., N], of the dtype of a @ kernel, accumulated in f32. What a row holds
    that is not needed does not matter, even if it is NaN, unless all are read;
    on Explicit axes the result lies whole on every device.

  Raises:
    ValueError: for shapes that do not fit, or a negative capacity.

  Example:
    >>> a = jnp.array([0.0, 2.0, 0.0])
    >>> sparse_matmul(a, jnp.arange(6.0).reshape(3, 2), capacity=1).tolist()
    [4.0, 6.0]

  Source: top-k-activation, Training-Free Activation Sparsity in Large Language
  Models, whose kernel skips what is masked; here rows of a list are read.
  """
  _check_product(a, kernel)
  _check_capacity(capacity)
  if not len(kernel):
    return _dense_product(a, kernel)
  y = _product(capacity, a.reshape(-1, a.shape[-1]), kernel)
  return y.reshape(*a.shape[:-1], kernel.shape[1])


def sparse_glu(
  a: Array, x: Array, up: Array, down: Array, *, capacity: int
) -> Array:
  """(a * (x @ up.T)) @ down, of whose neurons only those with an a are read.

  As `sparse_matmul`, for gated networks in which `a`, the activated gate, says
  which neurons matter.

  Args:
    a: floating [..., neurons], mostly zeros.
    x: [..., width].
    up: [neurons, width], a neuron a row: a Flax kernel transposed, once.
    down: [neurons, N].
    capacity: as `sparse_matmul` takes it.

  Returns:
    [..., N], as `sparse_matmul` does.

  Raises:
    ValueError: for shapes that do not fit, or a negative capacity.

  Example:
    >>> a, x = jnp.array([0.0, 2.0]), jnp.array([3.0])
    >>> up, down = jnp.array([[1.0], [5.0]]), jnp.array([[1.0], [1.0]])
    >>> sparse_glu(a, x, up, down, capacity=1).tolist()
    [30.0]

  Source: chess, CHESS: Optimizing LLM Inference via Channel-Wise Thresholding
  and Selective Sparsification; also CATS of top-k-activation.
  """
  _check_gated(a, x, up, down)
  _check_capacity(capacity)
  if not len(up):
    return _dense_gated(a, x, up, down)
  flat = lambda array: array.reshape(-1, array.shape[-1])
  y = _gated(capacity, flat(a), flat(x), up, down)
  return y.reshape(*a.shape[:-1], down.shape[1])


def sparse_ffn(
  x: Array,
  params: Mapping[str, Array],
  activation: Callable[[Array], Array],
  *,
  capacity: int | None = None,
) -> Array:
  """A feed-forward layer whose activation leaves most neurons at zero.

  Without a gate, `activation(x @ up) @ down`; with one, `(activation(x @ gate)
  * (x @ up_rows.T)) @ down`. The first product is dense: it says which neurons
  fire. Of the others the rows of those are read.

  Args:
    x: floating [..., width].
    params: "up" [width, neurons] and "down" [neurons, N]; or "gate" [width,
      neurons], "up_rows" [neurons, width], whose neurons are rows (a Flax
      kernel transposed, once), and "down".
    activation: function of what the first product gives, [..., neurons], such
      as `lambda s: keep_above(jax.nn.silu(s), threshold)` (CATS, CHESS),
      `lambda s: top_k(jax.nn.relu(s), k)` or `jax.nn.relu`.
    capacity: None computes dense products with zeros, as training does;
      otherwise as `sparse_matmul` takes it.

  Returns:
    [..., N], with any capacity the same but for rounding.

  Raises:
    ValueError: for parameters or shapes that do not fit.

  Example:
    >>> params = {"up": jnp.eye(2), "down": jnp.ones((2, 1))}
    >>> sparse_ffn(
    ...   jnp.array([3.0, -1.0]), params, jax.nn.relu, capacity=1
    ... ).tolist()
    [3.0]

  Source: top-k-activation (CATS), Training-Free Activation Sparsity in Large
  Language Models; chess, CHESS: Optimizing LLM Inference via Channel-Wise
  Thresholding and Selective Sparsification; lazy-neuron-topk, The Lazy Neuron
  Phenomenon: On Emergence of Activation Sparsity in Transformers, section 4.
  """
  gated = _is_gated(params, "up_rows")
  first = "gate" if gated else "up"
  _check_product(x, params[first], f"x and {first}")
  a = activation(x @ params[first])
  if gated:
    arrays = a, x, params["up_rows"], params["down"]
    return _either(sparse_glu, _dense_gated, arrays, capacity)
  arrays = a, params["down"]
  return _either(sparse_matmul, _dense_product, arrays, capacity)


def threshold_ffn(
  x: Array,
  params: Mapping[str, Array],
  activation: Callable[[Array], Array],
  thresholds: Mapping[str, float | Array],
  *,
  capacity: int | None = None,
) -> Array:
  """A feed-forward layer each of whose products reads what exceeds a threshold.

  `activation(x @ up) @ down`, or `(activation(x @ gate) * (x @ up)) @ down`,
  where each product has `keep_above` of its input.

  Args:
    x: floating [..., width].
    params: "up" [width, neurons] and "down" [neurons, N], with or without
      "gate" [width, neurons]: kernels as Flax has them.
    activation: function of [..., neurons], such as `jax.nn.silu`.
    thresholds: by the names of params, as `calibrate` finds them.
    capacity: None computes dense products with zeros, as training does;
      otherwise of each product, as `sparse_matmul` takes it.

  Returns:
    [..., N], with any capacity the same but for rounding.

  Raises:
    ValueError: for parameters, thresholds or shapes that do not fit.

  Example:
    >>> params = {"up": jnp.eye(2), "down": jnp.ones((2, 1))}
    >>> thresholds = {"up": 1.0, "down": 0.0}
    >>> threshold_ffn(
    ...   jnp.array([3.0, 0.5]), params, jax.nn.relu, thresholds, capacity=1
    ... ).tolist()
    [3.0]

  Source: top-k-activation, Training-Free Activation Sparsity in Large Language
  Models, section 4.
  """
  gated = _is_gated(params, "up")
  if set(thresholds) != set(params):
    raise ValueError(
      f"thresholds must be by the names of params, {sorted(params)}, got "
      f"{sorted(thresholds)}"
    )

  def product(x, name):
    _check_product(x, params[name], f"the input and {name}")
    arrays = keep_above(x, thresholds[name]), params[name]
    return _either(sparse_matmul, _dense_product, arrays, capacity)

  up = product(x, "up")
  hidden = activation(product(x, "gate")) * up if gated else activation(up)
  return product(hidden, "down")


def spark_ffn(
  x: Array,
  params: Mapping[str, Array],
  k: float,
  *,
  capacity: int | None = None,
) -> Array:
  """A gated layer whose first inputs predict, cheaply, which neurons fire.

  `(gelu(statistical_top_k(x[:r] @ gate, k)) * (x[r:] @ up_rows.T)) @ down`.

  Args:
    x: floating [..., width].
    params: "gate" [r, neurons], "up_rows" [neurons, width - r], whose neurons
      are rows, and "down" [neurons, N].
    k: how many neurons about fire; see `statistical_top_k`.
    capacity: as `sparse_ffn` takes it.

  Returns:
    [..., N], with any capacity the same but for rounding.

  Raises:
    ValueError: for parameters, shapes or a k that do not fit.

  Example:
    >>> params = {
    ...   "gate": jnp.array([[1.0, 2.0, 3.0, 4.0]]),
    ...   "up_rows": jnp.ones((4, 1)),
    ...   "down": jnp.eye(4),
    ... }
    >>> y = spark_ffn(jnp.array([1.0, 10.0]), params, 2, capacity=2)
    >>> [round(v, 3) for v in y.tolist()]
    [0.0, 0.0, 3.457, 13.998]

  Source: spark-transformer, Spark Transformer: Reactivating Sparsity in FFN and
  Attention, its FFN. GELU is the exact one.
  """
  if not _is_gated(params, "up_rows") or len(params["gate"]) >= x.shape[-1]:
    raise ValueError(
      f"params must have a gate [r, neurons] with r below {x.shape[-1]}, got "
      f"{ {name: array.shape for name, array in params.items()} }"
    )
  first, rest = jnp.split(x, [len(params["gate"])], -1)
  scores = statistical_top_k(first @ params["gate"], k)
  a = jax.nn.gelu(scores, approximate=False)
  arrays = a, rest, params["up_rows"], params["down"]
  return _either(sparse_glu, _dense_gated, arrays, capacity)


def _is_gated(params, up):
  """Whether there is a gate; refuses other names.

  A square kernel fits both ways: what is to be transposed has its own name.
  """
  if set(params) not in ({"up", "down"}, {"gate", up, "down"}):
    raise ValueError(
      f"params must be up and down, or gate, {up} and down, got "
      f"{sorted(params)}"
    )
  return "gate" in params


def _check_capacity(capacity):
  if not isinstance(capacity, int) or capacity < 0:
    raise ValueError(f"capacity must be an integer >= 0, got {capacity!r}")


def _check_product(a, kernel, names="a and kernel"):
  if kernel.ndim != 2 or a.shape[-1:] != kernel.shape[:1]:
    raise ValueError(
      f"{names} must be [..., K] and [K, N], got {a.shape} and {kernel.shape}"
    )


def _check_gated(a, x, up, down):
  if (
    up.ndim != 2
    or down.ndim != 2
    or a.shape != (*x.shape[:-1], len(up))
    or x.shape[-1:] != up.shape[1:]
    or len(up) != len(down)
  ):
    raise ValueError(
      "a, x, up and down must be [..., neurons], [..., width], [neurons, "
      f"width] and [neurons, N], got {a.shape}, {x.shape}, {up.shape} and "
      f"{down.shape}"
    )


def _either(sparse, dense, arrays, capacity):
  if capacity is None:
    (_check_gated if len(arrays) == 4 else _check_product)(*arrays)
    return dense(*arrays)
  return sparse(*arrays, capacity=capacity)


def _dense_product(a, kernel):
  return a @ kernel


def _dense_gated(a, x, up, down):
  return (a * (x @ up.T)) @ down


# Loops of unknown length cannot be reversed. What they compute is a product, so
# that its derivatives are theirs.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(capacity, a, kernel):
  return _choose(capacity, _dense_product, _gathered_product, a, kernel)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gated(capacity, a, x, up, down):
  return _choose(capacity, _dense_gated, _gathered_gated, a, x, up, down)


@_product.defjvp
def _product_jvp(capacity, primals, tangents):
  tangent = _tangent(_dense_product, primals, tangents)
  return _product(capacity, *primals), tangent


@_gated.defjvp
def _gated_jvp(capacity, primals, tangents):
  tangent = _tangent(_dense_gated, primals, tangents)
  return _gated(capacity, *primals), tangent


def _tangent(dense, primals, tangents):
  """Whole on every device, as the primal is."""
  slope = lambda *args: jax.jvp(dense, *args)[1]
  return automatic(slope, primals, tangents)


# Outside of jit, a cond would be compiled in each call.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _choose(capacity, dense, gathered, *arrays):
  """`gathered` where no more rows than the capacity are needed."""
  capacity = min(capacity, arrays[0].shape[1])

  def run(*arrays):
    active = (arrays[0] != 0).any(0)
    return lax.cond(
      active.sum(dtype=jnp.int32) <= capacity,
      functools.partial(gathered, capacity, active),
      dense,
      *arrays,
    )

  return automatic(run, *arrays)


def _gathered_product(capacity, active, a, kernel):
  out = jnp.result_type(a, kernel)
  ids, count = _listed(active)
  return lax.platform_dependent(
    a.T[ids],
    kernel,
    cpu=lambda a, kernel: _added(a, kernel, ids, count),
    default=lambda a, kernel: _taken(a, kernel, ids[:capacity], count),
  ).astype(out)


def _gathered_gated(capacity, active, a, x, up, down):
  out = jnp.result_type(a, x, up, down)
  ids, count = _listed(active)

  def by_loops(a, x, up, down):
    return _added(a * _dots(x, up, ids, count), down, ids, count)

  def at_once(a, x, up, down):
    return _taken_gated(a, x, up, down, ids[:capacity], count)

  return lax.platform_dependent(
    a.T[ids], x, up, down, cpu=by_loops, default=at_once
  ).astype(out)


def _listed(active):
  """int32 [K]: which are active, in order, and then zeros; and their number."""
  size = active.shape[0]
  place = jnp.cumsum(active, dtype=jnp.int32)
  ids = jnp.zeros(size, jnp.int32).at[jnp.where(active, place - 1, size)]
  ids = ids.set(
    jnp.arange(size, dtype=jnp.int32), mode="drop", unique_indices=True
  )
  return ids, active.sum(dtype=jnp.int32)


def _taken(values, kernel, ids, count):
  """f32 [tokens, N]: of values [K, tokens] by rows that are copied."""
  valid = (jnp.arange(len(ids)) < count)[:, None]
  rows = jnp.where(valid, kernel[ids], 0)
  values = jnp.where(valid, values[: len(ids)], 0)
  return jnp.matmul(values.T, rows, preferred_element_type=jnp.float32)


def _taken_gated(a, x, up, down, ids, count):
  """As `_taken`, of values a [K, tokens] times what the rows of up give."""
  valid = (jnp.arange(len(ids)) < count)[:, None]
  rows = jnp.where(valid, up[ids], 0)
  values = jnp.matmul(rows, x.T, preferred_element_type=jnp.float32)
  return _taken(values * a[: len(ids)], down, ids, count)


def _added(values, kernel, ids, count):
  """f32 [tokens, N]: rows times values [K, tokens], one after the other.

  No row is copied: a step reads it where it lies, and adds.
  """
  wide = kernel.shape[1]
  values = values.astype(jnp.float32)

  def add(first, y, rows):
    for i in range(rows):
      row = lax.dynamic_slice(kernel, (ids[first + i], 0), (1, wide))
      y += values[first + i][:, None] * row.astype(jnp.float32)
    return y

  steps = count // ADDED
  y = jnp.zeros((values.shape[1], wide), jnp.float32)
  y = lax.fori_loop(0, steps, lambda i, y: add(i * ADDED, y, ADDED), y)
  return lax.fori_loop(steps * ADDED, count, lambda i, y: add(i, y, 1), y)


def _dots(x, up, ids, count):
  """f32 [K, tokens]: the listed rows, copied in parts, times x.

  What is behind the last part is 0; a part may hold rows that are not listed.
  """
  part = min(COPIED, len(ids))

  def dot(i, values):
    # The last part moves back to end with the list.
    first = jnp.minimum(i * part, len(ids) - part)
    rows = up[lax.dynamic_slice(ids, (first,), (part,))]
    # On CPU rows @ x.T takes half as long again.
    found = jnp.matmul(x, rows.T, preferred_element_type=jnp.float32)
    return lax.dynamic_update_slice(values, found, (0, first))

  values = jnp.zeros((len(x), len(ids)), jnp.float32)
  return lax.fori_loop(0, (count + part - 1) // part, dot, values).T
