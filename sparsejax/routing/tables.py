"""Tables in the place of a projection: a row for each token id."""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from sparsejax.automatic import automatic

Array = jax.Array


def stem(
  x: Array,
  ids: Array,
  params: dict[str, Array],
  *,
  activation: Callable[[Array], Array] = jax.nn.silu,
) -> Array:
  """A gated feed-forward network whose up-projection is a row of a table.

    down(activation(gate(x)) * table[id])

  Nothing is routed, and a token costs two thirds of a gated network. Rows of
  tokens that are not there have no gradient. A table may lie elsewhere, in host
  memory: where `ids` are places among the rows that a batch needs, these rows
  alone are given as the table, and the gradient is theirs (see the example).

  Args:
    x: floating [..., d].
    ids: integer [...], of the input's tokens.
    params: "gate" [d, h], "table" [ids, h], "down" [h, d2].
    activation: elementwise.

  Returns:
    [..., d2] in the dtype of x; zeros where the table has no such id.

  Raises:
    ValueError: for arguments that do not fit each other.

  Example:
    >>> params = {"gate": jnp.eye(2), "down": jnp.eye(2)}
    >>> table = jnp.array([[1.0, 1.0], [5.0, 7.0]])
    >>> x, ids = jnp.ones((3, 2)), jnp.array([1, 0, 1])
    >>> call = lambda table, ids: routing.stem(
    ...   x, ids, {**params, "table": table}, activation=jax.nn.relu
    ... )
    >>> call(table, ids).tolist()
    [[5.0, 7.0], [1.0, 1.0], [5.0, 7.0]]
    >>> used, places = jnp.unique(ids, return_inverse=True, size=3)
    >>> call(table[used], places).tolist()  # at most three rows of the table
    [[5.0, 7.0], [1.0, 1.0], [5.0, 7.0]]

  Source: stem, STEM: Scaling Transformers with Embedding Modules.
  """
  if set(params) != {"gate", "table", "down"}:
    raise ValueError(
      f'params must have "gate", "table" and "down", got {sorted(params)}'
    )
  if ids.shape != x.shape[:-1] or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"ids must be integer{list(x.shape[:-1])}, got {ids.dtype}"
      f"{list(ids.shape)}"
    )
  table = jnp.asarray(params["table"])
  known = (ids >= 0) & (ids < len(table))
  rows = automatic(
    lambda table, ids: table.at[ids].get(mode="fill", fill_value=0),
    table,
    jnp.where(known, ids, len(table)),
    out=x,
  )
  x = jnp.where(known[..., None], x, 0)  # padding may hold anything
  return (activation(x @ params["gate"]) * rows) @ params["down"]


class Stem(nnx.Module):
  """`stem` as a module, in the place of a gated feed-forward network.

  The table begins with variance 1, as an up-projection of tokens of variance 1
  would give it.

  Args:
    width: of tokens.
    hidden: of the network, and of the table's rows.
    ids: rows of the table: the vocabulary.
    activation: elementwise.
    param_dtype: of the parameters.
    rngs: for the initial parameters.

  Example:
    >>> from flax import nnx
    >>> layer = routing.Stem(4, 8, ids=100, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)).shape
    (2, 3, 4)

  Source: stem, STEM: Scaling Transformers with Embedding Modules.
  """

  def __init__(
    self,
    width: int,
    hidden: int,
    ids: int,
    *,
    activation: Callable[[Array], Array] = jax.nn.silu,
    param_dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    linear = jax.nn.initializers.lecun_normal()
    draw = lambda init, *shape: nnx.Param(
      init(rngs.params(), shape, param_dtype)
    )
    self.gate = draw(linear, width, hidden)
    self.table = draw(jax.nn.initializers.normal(1.0), ids, hidden)
    self.down = draw(linear, hidden, width)
    self.activation = activation

  def __call__(self, x: Array, ids: Array) -> Array:
    """Floating [..., width], like x; see `stem`."""
    of = {"gate": self.gate, "table": self.table, "down": self.down}
    params = {name: p[...].astype(x.dtype) for name, p in of.items()}
    return stem(x, ids, params, activation=self.activation)
