"""Planted dictionaries, and autoencoders of several seeds trained in a program.

A plant is a pytree with a leading axis of seeds, and `draw(key, plant)` gives
rows of one seed.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import sparse_coding

ATOMS, WIDTH, ROWS = 32, 24, 256


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def atoms(seeds, count=ATOMS, width=WIDTH):
  """f32 [seeds, count, width], of norm one."""
  draws = [
    np.random.default_rng(seed).normal(size=(count, width))
    for seed in range(seeds)
  ]
  return jnp.asarray(unit(np.stack(draws)), jnp.float32)


def draw(key, atoms, k=3, rows=ROWS):
  """k atoms a row, each as often, of amounts from a half to one and a half."""
  chosen, amounts = jax.random.split(key)
  places = jax.random.uniform(chosen, (rows, len(atoms)))
  _, indices = jax.lax.top_k(places, k)
  values = jax.random.uniform(amounts, (rows, k), minval=0.5, maxval=1.5)
  return jnp.einsum("rk,rkd->rd", values, atoms[indices])


def train(make, plants, draw=draw, *, steps=1000, rate=0.01, gradient=None):
  """One autoencoder for each seed of the plants, as a list.

  Args:
    make: a function of `rngs`.
    plants: what is planted, with a leading axis of seeds.
    draw: rows of a plant.
    steps: of Adam, its rate falling as a cosine; atoms are of norm one.
    rate: the first.
    gradient: None, or a function of rows and a plant that `loss` is given.
  """
  seeds = len(jax.tree.leaves(plants)[0])
  made = [make(rngs=nnx.Rngs(seed)) for seed in range(seeds)]
  split = [nnx.split(sae, nnx.Param, ...) for sae in made]
  graph = split[0][0]
  tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
  tx = sparse_coding.unit_norm(tx)

  def step(plant, carry, key):
    params, rest, state = carry
    rows, other = jax.random.split(key)
    x = draw(rows, plant)
    given = {"gradient": gradient(x, plant)} if gradient else {}

    def loss(params):
      sae = nnx.merge(graph, params, rest, copy=True)
      value, _ = sae.loss(x, key=other, **given)
      return value, nnx.state(sae, nnx.Not(nnx.Param))

    (_, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), rest, state), None

  @jax.jit
  @jax.vmap
  def run(params, rest, plant, key):
    start = params, rest, tx.init(params)
    keys = jax.random.split(key, steps)
    (params, rest, _), _ = jax.lax.scan(
      functools.partial(step, plant), start, keys
    )
    return params, rest

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *[s[1:] for s in split])
  keys = jax.random.split(jax.random.key(0), seeds)
  params, rest = run(*stacked, plants, keys)
  one = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  return [nnx.merge(graph, one(params, i), one(rest, i)) for i in range(seeds)]


def recovered(saes, planted):
  """The mean cosine of matched atoms, of each seed."""
  return [
    float(sparse_coding.mcc(sae.dictionary[...], atoms))
    for sae, atoms in zip(saes, planted)
  ]


def dense(code):
  return code.dense() if isinstance(code, sparse_coding.Code) else code


def mean_l0(sae, x):
  return float((dense(sae.encode(x)) != 0).sum() / len(x))
