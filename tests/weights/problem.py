"""The tiny training problem that the tests of this room share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import masks as masks_lib
from sparsejax import weights

# Compilation is most of what these tests cost, and this makes it five times
# cheaper. It changes the machine code only, not what is computed.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
jit = functools.partial(jax.jit, compiler_options=FAST)

SPARSE = ("a", "b")
LR = 0.3


def numbers(*shape, seed=0):
  """Normal numbers of shape `shape`, in f32."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def start():
  """Weights [16, 8] and [8, 24], and a bias."""
  return {
    "a": numbers(16, 8, seed=1) * 0.5,
    "b": numbers(8, 24, seed=2) * 0.5,
    "bias": numbers(24, seed=3) * 0.1,
  }


X, Y = numbers(32, 16, seed=4), numbers(32, 24, seed=5)


def loss(params):
  """A layer of tanh, a linear one, and half the mean squared distance."""
  hidden = jnp.tanh(X @ params["a"])
  error = hidden @ params["b"] + params["bias"] - Y
  return jnp.sum(error**2) / (2 * len(X))


def oracle_gradient(params):
  """The gradient of `loss`, by hand, in f64."""
  hidden = np.tanh(X.astype(np.float64) @ params["a"])
  error = (hidden @ params["b"] + params["bias"] - Y) / len(X)
  back = error @ params["b"].T * (1 - hidden**2)
  return {
    "a": X.T.astype(np.float64) @ back,
    "b": hidden.T @ error,
    "bias": error.sum(0),
  }


def f64(tree):
  """A copy of `tree` in f64, for an oracle."""
  return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def copied(tree):
  """A copy of `tree` in NumPy, which donation does not touch."""
  return jax.tree.map(np.array, tree)


def bits(x):
  """The bit patterns of floats: tells -0.0 from +0.0."""
  x = np.asarray(x)
  return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_bits(got, want):
  """Two trees are equal, signs of zeros included."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
  ):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype and x.shape == y.shape, path
    same = x.tobytes() == y.tobytes()
    assert same, f"{jax.tree_util.keystr(path)}: {x} != {y}"


def assert_zeros(params, masks):
  """Masked weights are +0.0, to the bit."""
  for p, m in zip(jax.tree.leaves(params), jax.tree.leaves(masks)):
    assert not bits(p)[~np.asarray(m)].any()


def step_of(tx):
  """A training step, and what is then seen; not compiled."""

  def step(params, state):
    grads = jax.grad(loss)(weights.sparse_params(state, params))
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, *look(params, state)

  return step


def look(params, state):
  """What the forward pass computes with, and the masks."""
  return weights.sparse_params(state, params), weights.masks(state, params)


class Run:
  """A training run: what was there before and after every step.

  Attributes:
    params: the parameters before each step and after the last, in NumPy.
    state: the optimizer's states, likewise.
    seen: what the forward pass computed with, likewise.
    masks: the masks, likewise.
    step: the compiled step.
  """

  def __init__(self, tx, steps, enforced=True):
    self.params, self.states, self.seen, self.masks = [], [], [], []
    self.step = jit(step_of(tx))

    @jit
    def begin(params):
      state = tx.init(params)
      if enforced:  # as the documentation says: start at masked parameters
        params = weights.sparse_params(state, params)
      return params, state, *look(params, state)

    now = begin(start())
    self._add(now)
    for _ in range(steps):
      now = self.step(*now[:2])
      self._add(now)

  def _add(self, now):
    kept = self.params, self.states, self.seen, self.masks
    for past, new in zip(kept, copied(now)):
      past.append(new)

  def __len__(self):
    return len(self.params) - 1

  def sparse(self, name):
    """The masks of one parameter in time."""
    return [m[name] for m in self.masks]


def unpacked(packed, params):
  """The boolean masks of packed ones."""
  return {
    n: np.asarray(masks_lib.unpack(jnp.asarray(packed[n]), p))
    for n, p in params.items()
  }
