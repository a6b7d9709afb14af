"""Whether the arguments of a call fit each other."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backends

_ACTIVATION = "it takes None or an elementwise function such as jax.nn.silu"


def check(
  lhs,
  rhs,
  group_sizes,
  rhs_gate,
  activation,
  gather,
  scatter,
  num_rows,
  row_scale,
  transpose_rhs,
  group_offset,
  preferred_element_type,
  backend,
  interpret,
):
  """Raises a ValueError that names the argument; see `grouped_matmul`."""
  for name, x, rank, shape in (
    ("lhs", lhs, 2, "[rows, k]"),
    ("rhs", rhs, 3, "[groups, n, k]" if transpose_rhs else "[groups, k, n]"),
  ):
    if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{name} is {x.dtype}{list(x.shape)}; it must be floating, {shape}."
      )
  if rhs.dtype != lhs.dtype:
    raise ValueError(f"rhs has dtype {rhs.dtype}, lhs {lhs.dtype}; use one.")
  k = rhs.shape[2 if transpose_rhs else 1]
  if k != lhs.shape[1]:
    raise ValueError(
      f"rhs has shape {rhs.shape} with transpose_rhs {transpose_rhs}, so its k "
      f"is {k}; it must be that of lhs, {lhs.shape[1]}."
    )
  of_rhs = (rhs.shape, rhs.dtype)
  if rhs_gate is not None and (rhs_gate.shape, rhs_gate.dtype) != of_rhs:
    raise ValueError(
      f"rhs_gate is {rhs_gate.dtype}{list(rhs_gate.shape)}; it must be as rhs, "
      f"{rhs.dtype}{list(rhs.shape)}."
    )
  if activation is not None:
    try:
      hash(activation)
    except TypeError as error:
      raise ValueError(
        f"activation is {activation!r}; {_ACTIVATION}, and hashable."
      ) from error
  count = lhs.shape[0]
  if gather is not None:
    _integers("gather", gather, 1, "[edges]")
    count = gather.shape[0]
  _integers("group_sizes", group_sizes, 1, "[groups]")
  if group_offset is None:
    if group_sizes.shape[0] != rhs.shape[0]:
      raise ValueError(
        f"group_sizes has {group_sizes.shape[0]} groups, rhs {rhs.shape[0]}; "
        "they must agree where there is no group_offset."
      )
  else:
    _integers("group_offset", group_offset, 0, "a scalar")
  if (scatter is None) != (num_rows is None):
    raise ValueError(
      f"scatter is {'' if scatter is None else 'not '}None and num_rows is "
      f"{num_rows}; they go together."
    )
  if scatter is not None:
    _integers("scatter", scatter, 1, f"[{count}]")
    if scatter.shape != (count,):
      raise ValueError(
        f"scatter has shape {scatter.shape}; it must be ({count},), one an "
        "edge."
      )
    if not isinstance(num_rows, int | np.integer) or num_rows < 0:
      raise ValueError(f"num_rows is {num_rows!r}; it must be an int, 0 or up.")
  if row_scale is not None and (
    row_scale.shape != (count,)
    or not jnp.issubdtype(row_scale.dtype, jnp.floating)
  ):
    raise ValueError(
      f"row_scale is {row_scale.dtype}{list(row_scale.shape)}; it must be "
      f"floating, [{count}], one an edge."
    )
  if preferred_element_type is not None:
    try:
      floating = jnp.issubdtype(jnp.dtype(preferred_element_type), jnp.floating)
    except TypeError:
      floating = False
    if not floating:
      raise ValueError(
        f"preferred_element_type is {preferred_element_type!r}; it must be a "
        "floating dtype."
      )
  backends.check(backend, interpret)


def check_activation(activation):
  """Raises a ValueError for what is no function of an array; traces it."""
  try:
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    traced, out = jax.make_jaxpr(activation, return_shape=True)(x)
  except TypeError as error:
    raise ValueError(
      f"activation is {activation!r}; {_ACTIVATION}, of one array."
    ) from error
  if not hasattr(out, "shape") or out.shape != x.shape:
    raise ValueError(
      f"activation is {activation!r}; {_ACTIVATION}; it makes {out}."
    )
  if traced.consts:
    raise ValueError(
      f"activation is {activation!r} and holds arrays, "
      f"{[jnp.shape(x) for x in traced.consts]}; {_ACTIVATION} that holds none."
    )


def _integers(name, x, rank, shape):
  if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.integer):
    raise ValueError(
      f"{name} is {x.dtype}{list(x.shape)}; it must hold integers, {shape}."
    )
