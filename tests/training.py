"""A module trained by Flax NNX and, through its bridge, by Linen."""

from flax import nnx
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp


def assert_trains_alike(linen, params, make, module, arrays, target, tx, path):
  """Ten steps of both, with equal losses and a checkpoint between them.

  Args:
    linen: the Linen module, and
    params: its parameters.
    make: what makes an NNX module of the same shapes, to be restored into.
    module: the NNX module that begins with those parameters.
    arrays: what both are called with.
    target: of their output, by squares.
    tx: an Optax optimizer.
    path: a folder for the checkpoint.
  """

  @jax.jit
  def linen_step(params, opt_state):
    def loss(params):
      return ((linen.apply({"params": params}, *arrays) - target) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  @nnx.jit
  def nnx_step(module, optimizer):
    value, grads = nnx.value_and_grad(
      lambda module: ((module(*arrays) - target) ** 2).mean()
    )(module)
    optimizer.update(module, grads)
    return value

  optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
  opt_state, values = tx.init(params), []
  for i in range(10):
    params, opt_state, value = linen_step(params, opt_state)
    values.append(float(value))
    np.testing.assert_allclose(value, nnx_step(module, optimizer), 1e-5)
    if i == 4:
      saved = {
        "linen": (params, opt_state),
        "nnx": nnx.state((module, optimizer)),
      }
      with ocp.StandardCheckpointer() as saver:
        saver.save(path / "saved", saved)
        saver.wait_until_finished()
        saved = saver.restore(path / "saved", saved)
      params, opt_state = saved["linen"]
      module = make()
      optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
      nnx.update((module, optimizer), saved["nnx"])
  assert values[-1] < values[0]
