"""What tests of mixtures share: draws, and a comparison with the oracle."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tests import common
from tests.kernels import problem
from tests.oracles import routing as oracle

jit = problem.jit


def draw(seed, *shape):
  """Normal, f32."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bank(seed, experts, d, hidden, out=None, gated=True):
  """Parameters of a bank of feed-forward networks."""
  params = {
    "up": draw(seed, experts, d, hidden),
    "down": draw(seed + 1, experts, hidden, out or d),
  }
  return params | (
    {"gate": draw(seed + 2, experts, d, hidden)} if gated else {}
  )


def close(got, want, rtol=1e-4, atol=1e-4):
  np.testing.assert_allclose(common.float64(got), want, rtol, atol)


def compare(f, want, arrays, run=None):
  """f of a dict of arrays equals `want`, in value and in all gradients.

  Gradients are those of the sum of squares; the oracle's are numerical. With
  `run`, a compiled `with_gradients(f)`, nothing is compiled anew.
  """
  y, gradients = (run or jit(with_gradients(f)))(arrays)
  plain = jax.tree.map(common.float64, arrays)
  close(y, want(plain))
  numeric = oracle.numerical_gradients(lambda a: (want(a) ** 2).sum(), plain)
  for name, gradient in gradients.items():
    scale = max(1, np.abs(numeric[name]).max())
    close(gradient / scale, numeric[name] / scale)
  return y, gradients


def with_gradients(f):
  """A function of arrays that gives f of them and the gradients of a loss."""

  def run(arrays):
    loss = lambda arrays: (f(arrays).astype(jnp.float32) ** 2).sum()
    return f(arrays), jax.grad(loss)(arrays)

  return run


def made(make):
  """A module of `make()`, its parameters drawn in one cheap compilation."""
  graph = nnx.graphdef(nnx.eval_shape(make))
  return nnx.merge(graph, jit(lambda: nnx.state(make()))())


def module_jit(f):
  """`jit`, cheap to compile, of a function of a module and arrays.

  What it does to the module's state is lost.
  """

  def outer(module, *args):
    graph, state = nnx.split(module)
    return inner(graph, state, *args)

  @functools.partial(jit, static_argnums=0)
  def inner(graph, state, *args):
    return f(nnx.merge(graph, state), *args)

  outer.compilations = inner._cache_size
  return outer


def compare_on_eight_devices(f, x, axis_type):
  """f of x, whose leading dimension is divided, is f of x on one device.

  So is a gradient. Where shardings are types, a result of as many dimensions
  is sharded as x is.
  """

  def both(x):
    loss = lambda x: sum((y**2).sum() for y in floating(f(x)))
    return f(x), jax.grad(loss)(x)

  def floating(tree):
    leaves = jax.tree.leaves(tree)
    return [y for y in leaves if jnp.issubdtype(y.dtype, jnp.floating)]

  want = jit(both)(x)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    got = jit(both)(common.place(x, mesh, jax.P("x")))
  jax.tree.map(lambda a, b: close(a, common.float64(b), 1e-4, 1e-3), got, want)
  if axis_type == jax.sharding.AxisType.Explicit:
    for y in jax.tree.leaves(got):
      if y.ndim == x.ndim:
        assert y.sharding.spec[0] == "x"
