"""What replicas that train apart send each other: few values, two bits each.

Each replica takes some steps of its own optimizer, then all of them take one
outer step together (SparseLoCo):

  tuned = inner_steps(params, batches)  # yours
  error, params = communication.outer_step(
    error, params, tuned, axis_name="replicas", k=32
  )

Source: [sparseloco] Sarfi et al., Communication Efficient LLM Pre-training with
  SparseLoCo.
"""

import math
import operator
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from sparsejax import paths

Array = jax.Array
PyTree = Any

_LARGEST_CHUNK = 256  # 256 by 256 entries are as many as 16 bits tell apart.


class Compressed(NamedTuple):
  """What is sent of an array in `chunks` chunks; k is that of a chunk.

  Attributes:
    indices: uint16 [chunks, k], which entries of each chunk; descending sizes.
    values: their codes, four a byte, uint8 [ceil(chunks * k / 4)]; without
      quantization the values themselves, f32 [chunks, k].
    table: what the four codes stand for, f32 [4]; without quantization [0].
  """

  indices: Array
  values: Array
  table: Array


def compress(
  x: Array, k: int, *, chunk: int = 64, quantize: bool = True
) -> Compressed:
  """The k largest entries of each chunk of an array, in two bits each.

  A matrix is cut into squares, and what has more axes is a stack of matrices;
  a vector is cut into runs. A side is the largest divisor of its axis up to
  `chunk`. So an axis of awkward size has small chunks, and more is sent: of 127
  the sides are 1, and a vector of 127 is sent whole; see `sent_bytes`.

  Codes are levels 1.5 standard deviations apart, around the mean of all that is
  sent of the array, and each level stands for the mean of its members. So an
  entry of 0 that is sent may stand for another value: under masks, mask again.

  Args:
    x: floating array of any shape, not sharded; see `outer_step`.
    k: entries sent of a chunk, in [1, chunk * chunk]; all of one that has less.
      Of equal ones the first are sent. A NaN is larger than all else; where one
      is quantized, all that is sent of the array is NaN.
    chunk: the largest side, in [1, 256].
    quantize: two bits for a value rather than 32.

  Returns:
    The indices, values and table.

  Raises:
    ValueError: x is not floating, or k or chunk is out of range.

  Example:
    >>> x = jnp.array([5.0, 1, 2, -5, 0, 5, -5, 3])
    >>> sent = compress(x, 1, chunk=2)
    >>> sent.indices.tolist(), sent.values.tolist(), sent.table.tolist()
    ([[0], [1], [1], [0]], [119], [0.0, -5.0, 0.0, 5.0])
    >>> decompress(sent, (8,), chunk=2).tolist()
    [5.0, 0.0, 0.0, -5.0, 0.0, 5.0, -5.0, 0.0]

  Source: [sparseloco] Sarfi et al., Communication Efficient LLM Pre-training
    with SparseLoCo; chunks and codes are those of the authors' code (CCLoco),
    which knows no stacks and sends indices of 64 bits.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating, got {x.dtype}")
  k = _checked(k, chunk)
  lead, down, height, across, width = _layout(x.shape, chunk)
  cut = x.astype(jnp.float32).reshape(lead, down, height, across, width)
  cut = cut.swapaxes(2, 3).reshape(lead * down * across, height * width)
  _, indices = lax.top_k(jnp.abs(cut), min(k, height * width))
  values = jnp.take_along_axis(cut, indices, 1)
  indices = indices.astype(jnp.uint16)
  if not quantize:
    return Compressed(indices, values, jnp.zeros(0, jnp.float32))
  return Compressed(indices, *_encode(values.ravel()))


def decompress(
  sent: Compressed, shape: tuple[int, ...], *, chunk: int = 64
) -> Array:
  """The array that was sent, 0 where nothing was.

  Args:
    sent: what `compress` returned.
    shape: that of the array which was compressed.
    chunk: as given to `compress`.

  Returns:
    f32 array of that shape. An index outside of its chunk is left out.

  Raises:
    ValueError: an array of that shape has other chunks, or chunk is out of
      range.

  Example:
    >>> sent = compress(jnp.eye(3), 1, quantize=False)
    >>> decompress(sent, (3, 3)).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

  Source: [sparseloco], as `compress`.
  """
  _checked(1, chunk)
  zeros = _no_chunks(shape, chunk)
  if sent.indices.shape[0] != zeros.shape[0]:
    raise ValueError(
      f"sent must have the {zeros.shape[0]} chunks of shape {shape} at chunk "
      f"{chunk}, got {sent.indices.shape[0]}"
    )
  return _joined(_add(zeros, sent), shape, chunk)


def sent_bytes(
  params: PyTree, k: int, *, chunk: int = 64, quantize: bool = True
) -> int:
  """The bytes that a replica sends in an outer step, to each of the others.

  Two bytes an index, a quarter of one a value (four without quantization), and
  16 an array for its table. Nothing is sent of an empty array.

  Args:
    params: arrays or their `jax.ShapeDtypeStruct`.
    k: as for `compress`.
    chunk: as for `compress`.
    quantize: as for `compress`.

  Returns:
    The number of bytes.

  Raises:
    ValueError: k or chunk is out of range, or params has an array that is not
      floating.

  Example:
    >>> params = {"kernel": jnp.zeros((128, 128)), "bias": jnp.zeros(127)}
    >>> sent_bytes(params, 32), 4 * (128 * 128 + 127)
    (606, 66044)

  Source: [sparseloco], of what `compress` returns.
  """
  k, total = _checked(k, chunk), 0
  for x in _floating("params", params)[0].values():
    if math.prod(x.shape):
      sent = jax.eval_shape(
        lambda x: compress(x, k, chunk=chunk, quantize=quantize), x
      )
      total += sum(part.size * part.dtype.itemsize for part in sent)
  return total


def outer_step(
  error: PyTree,
  before: PyTree,
  after: PyTree,
  *,
  axis_name: Any,
  k: int,
  chunk: int = 64,
  beta: float = 0.95,
  rate: float = 1.0,
  quantize: bool = True,
) -> tuple[PyTree, PyTree]:
  """One outer step of SparseLoCo, of one replica among those along an axis.

  With d = before - after, what the inner steps did, and e = beta * error + d, a
  replica sends s, the compressed e, and keeps e - s as its new error. All take
  `before - rate * mean(s)`, each adding up what was sent in the same order, so
  that parameters stay bit for bit equal. To be called inside of `shard_map` or
  of `vmap` with that axis, where `before` is the same in all replicas; the new
  parameters then are too, and are so known to `shard_map`::

    replica = jax.shard_map(
      round_of_a_replica,  # with `outer_step(..., axis_name="replicas")` in it
      mesh=mesh,
      in_specs=(P("replicas"), P(), P("replicas")),  # error, params, batches
      out_specs=(P("replicas"), P()),  # error, params
    )

  Here `error` has a first axis of the replicas, of which each one sees one
  entry: `error[0]` inside, and `[None]` as it goes out.
  Inside of `shard_map` inner steps must begin at
  `lax.pcast(params, "replicas", to="varying")`: of parameters that are known to
  be equal JAX adds the gradients up over the replicas.

  Parameters should be whole in each replica, since chunks are cut by
  reshaping. Of those that are sharded along further axes of the mesh the result
  is right where these axes are Auto, but arrays are gathered within the
  replica; Explicit axes are not supported, and JAX refuses the reshape.

  Args:
    error: f32 arrays, a tree of the names and shapes of `before`; zeros first.
    before: floating arrays, the parameters before the inner steps.
    after: a tree like `before`, after them.
    axis_name: of the replicas.
    k: as for `compress`. The paper sends 1 to 3%.
    chunk: as for `compress`.
    beta: how much of the error is remembered, in [0, 1].
    rate: of the outer step, a number or a scalar array.
    quantize: as for `compress`.

  Returns:
    The new error, and the new parameters in the dtypes of `before`. Empty
    arrays stay as they are.

  Raises:
    ValueError: trees, names, shapes or dtypes do not fit, or k, chunk or beta
      is out of range.

  Example:
    >>> params = {"w": jnp.zeros(4)}
    >>> tuned = {"w": jnp.array([[4.0, 1, 0, 0], [0, 0, 2, 0]])}  # of two
    >>> error = {"w": jnp.zeros((2, 4))}
    >>> error, params = jax.vmap(
    ...   lambda *trees: outer_step(*trees, axis_name="replicas", k=1),
    ...   in_axes=(0, None, 0),
    ...   out_axes=(0, None),
    ...   axis_name="replicas",
    ... )(error, params, tuned)
    >>> params["w"].tolist()
    [2.0, 0.0, 1.0, 0.0]
    >>> error["w"].tolist()
    [[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

  Source: [sparseloco] Sarfi et al., Communication Efficient LLM Pre-training
    with SparseLoCo. The mean is over all replicas, as in the paper's rule; the
    authors' code divides an entry by the number of replicas that sent it, and
    multiplies by the rate twice, which is the same at 1.
  """
  if isinstance(beta, int | float) and not 0 <= beta <= 1:
    raise ValueError(f"beta must be in [0, 1], got {beta}")
  k = _checked(k, chunk)
  old, rebuild = _floating("before", before)
  new, _ = _floating("after", after, old)
  memory, rebuild_error = _floating("error", error, old)
  for name, x in memory.items():
    if x.dtype != jnp.float32:
      raise ValueError(f"error must be float32, got {x.dtype} at {name!r}")
  left, params = dict(memory), dict(old)
  for name, x in old.items():
    if not x.size:
      continue
    moved = x.astype(jnp.float32) - new[name].astype(jnp.float32)
    e = beta * memory[name] + moved
    sent = compress(e, k, chunk=chunk, quantize=quantize)
    left[name] = e - decompress(sent, x.shape, chunk=chunk)
    everyone = lax.all_gather(sent, axis_name, to="invarying")
    mean = _mean(everyone, x.shape, chunk)
    params[name] = (x - rate * mean).astype(x.dtype)
  return rebuild_error(left), rebuild(params)


def _checked(k, chunk):
  """k as an int."""
  for name, size in (("chunk", chunk), ("k", k)):
    try:
      operator.index(size)
    except TypeError:
      raise ValueError(f"{name} must be a known integer, got {size}") from None
  if not 1 <= chunk <= _LARGEST_CHUNK:
    raise ValueError(f"chunk must be in [1, {_LARGEST_CHUNK}], got {chunk}")
  if not 1 <= k <= chunk * chunk:
    raise ValueError(f"k must be in [1, {chunk * chunk}], got {k}")
  return operator.index(k)


def _floating(argument, tree, like=None):
  """`paths.named` of floating arrays, named and shaped as those of `like`."""
  leaves, rebuild = paths.named(tree)
  if like is not None and leaves.keys() != like.keys():
    raise ValueError(
      f"{argument} must have the leaves of before, {sorted(like)}, got "
      f"{sorted(leaves)}"
    )
  for name, x in leaves.items():
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{argument} must be floating, got {x.dtype} at {name!r}"
      )
    if like is not None and x.shape != like[name].shape:
      raise ValueError(
        f"{argument} must have shape {like[name].shape} at {name!r}, got "
        f"{x.shape}"
      )
  return leaves, rebuild


def _side(size, chunk):
  divisors = (d for d in range(1, min(size, chunk) + 1) if size % d == 0)
  return max(divisors, default=1)


def _layout(shape, chunk):
  """Matrices, chunks down, their height, chunks across, their width."""
  rows, columns = shape[-2:] if len(shape) > 1 else (1, math.prod(shape))
  height, width = (_side(n, chunk) for n in (rows, columns))
  lead = math.prod(shape[:-2])
  return lead, rows // height, height, columns // width, width


def _no_chunks(shape, chunk):
  lead, down, height, across, width = _layout(shape, chunk)
  return jnp.zeros((lead * down * across, height * width), jnp.float32)


def _joined(cut, shape, chunk):
  lead, down, height, across, width = _layout(shape, chunk)
  cut = cut.reshape(lead, down, across, height, width)
  return cut.swapaxes(2, 3).reshape(shape)


def _encode(values):
  """Packed codes, and the table."""
  mean = values.sum() / max(values.size, 1)
  centered = values - mean
  deviation = jnp.sqrt((centered**2).sum() / max(values.size - 1, 1))
  step = jnp.where(deviation > 0, 1.5 * deviation, 1.0)
  codes = jnp.clip(jnp.round(centered / step + 2), 0, 3).astype(jnp.uint8)
  member = codes[:, None] == jnp.arange(4)
  sums = jnp.where(member, centered[:, None], 0).sum(0)
  table = mean + sums / jnp.maximum(member.sum(0), 1)
  codes = jnp.pad(codes, (0, -codes.size % 4)).reshape(-1, 4)
  packed = codes << jnp.arange(0, 8, 2, dtype=jnp.uint8)
  return packed.sum(1, dtype=jnp.uint8), table


def _add(cut, sent):
  """The chunks, plus what was sent."""
  values = sent.values
  if values.dtype == jnp.uint8:
    codes = values[:, None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8) & 3
    codes = codes.ravel()[: sent.indices.size]
    values = sent.table[codes].reshape(sent.indices.shape)
  rows = jnp.arange(cut.shape[0])[:, None]
  return cut.at[rows, sent.indices.astype(jnp.int32)].add(values)


def _mean(everyone, shape, chunk):
  """Over the first axis, without an array for each replica.

  One by one, since a scatter that adds to an entry twice has no order of its
  own on an accelerator, and replicas would drift apart.
  """
  total, _ = lax.scan(
    lambda total, sent: (_add(total, sent), None),
    _no_chunks(shape, chunk),
    everyone,
  )
  return _joined(total / everyone.indices.shape[0], shape, chunk)
