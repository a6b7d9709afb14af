"""A whole training step with RigL against the same with plain AdamW."""

from collections.abc import Iterator
import functools
import time

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from experiments.bench import timing
from experiments.models import transformer
from sparsejax import paths
from sparsejax import weights

EVERY = 100
TOKENS = 2048


class _Training:
  """A model in training whose next step can be timed."""

  def __init__(self, tx, graph, params, batch):
    self._batch = batch

    def loss(params):
      model = nnx.merge(graph, params)
      logits = model(batch[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch[:, 1:]
      ).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
      updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def optimize(grads, opt_state, params):
      updates, opt_state = tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    self._step, self._optimize = step, optimize
    self.params = jax.tree.map(jnp.copy, params)
    self.opt_state = jax.jit(tx.init)(params)
    if weights_in(self.opt_state):
      self.params = weights.sparse_params(self.opt_state, self.params)
    self.grads = jax.jit(jax.grad(loss))(self.params)
    self.step()  # compiles
    self.optimize()

  def _timed(self, function, *args):
    begin = time.perf_counter()
    self.params, self.opt_state = jax.block_until_ready(function(*args))
    return time.perf_counter() - begin

  def step(self) -> float:
    """Seconds of a step: forward, backward, optimizer."""
    return self._timed(self._step, self.params, self.opt_state)

  def optimize(self) -> float:
    """Seconds of the optimizer's update alone."""
    args = self.grads, self.opt_state, self.params
    return self._timed(self._optimize, *args)

  def at(self, count: int) -> None:
    """Sets the number of steps that the sparsifier has counted."""
    (state,) = weights_in(self.opt_state)
    self.opt_state = state._replace(count=jnp.int32(count))


def weights_in(opt_state) -> list[weights.SparseState]:
  """The sparsifier's states."""
  return [opt_state] * isinstance(opt_state, weights.SparseState)


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows, given the bytes per second that this machine reads."""
  model = transformer.Transformer(
    vocabulary=256, width=384, depth=6, heads=6, rngs=nnx.Rngs(0)
  )
  graph, state = nnx.split(model, nnx.Param)
  params = nnx.to_pure_dict(state)
  size = sum(p.size for p in jax.tree.leaves(params))
  batch = jax.random.randint(jax.random.key(0), (8, TOKENS // 8 + 1), 0, 256)
  rigl = weights.rigl(
    optax.adamw(1e-3),
    sparsity=0.9,
    every=EVERY,
    until=10**5,
    key=jax.random.key(0),
  )
  sparse = _Training(rigl, graph, params, batch)
  dense = _Training(optax.adamw(1e-3), graph, params, batch)

  def mean_of_cycle(run):
    """One ordinary step and one that updates masks, weighed as in training."""

    def seconds():
      sparse.at(1)
      ordinary = run()
      sparse.at(EVERY)
      return ((EVERY - 1) * ordinary + run()) / EVERY

    return seconds

  millions = f"{size / 1e6:.1f}M parameters"
  yield timing.Case(
    name=f"RigL step, {millions}, {TOKENS:,} tokens, masks every {EVERY}",
    ours=mean_of_cycle(sparse.step),
    peers={"adamw": dense.step},
    target={"adamw": 1 / 1.10},
    note="a ratio below 1 is the overhead: at most 1.10x is aimed at",
  )
  yield timing.Case(
    name=f"RigL update alone, {millions}, masks every {EVERY}",
    ours=mean_of_cycle(sparse.optimize),
    peers={"adamw": dense.optimize},
    target={},
    limit=7 * 4 * size / bandwidth,
    note="limit: four reads and three writes of f32 weights",
  )


def facts() -> dict[str, str]:
  """The size of the mask state."""
  bits = ", ".join(f"{bits:.3f} {kind}" for kind, bits in mask_bits().items())
  return {"mask state": bits}


def mask_bits() -> dict[str, float]:
  """Bits of mask state for each weight that may be masked."""
  model = nnx.eval_shape(
    lambda: transformer.Transformer(
      vocabulary=256, width=384, depth=6, heads=6, rngs=nnx.Rngs(0)
    )
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tx = weights.static(optax.adamw(1e-3), sparsity=0.9, key=jax.random.key(0))
  bits = paths.named(jax.eval_shape(tx.init, params).masks)[0]
  leaves = paths.named(params)[0]
  sparse = [n for n in leaves if leaves[n].ndim > 1 and "embed" not in n]
  size = lambda names, tree: sum(
    tree[n].size * tree[n].dtype.itemsize for n in names
  )
  maskable = sum(leaves[n].size for n in sparse)
  return {
    "bits per maskable weight": 8 * size(sparse, bits) / maskable,
    "with the masks of dense parameters": 8 * size(bits, bits) / maskable,
  }
