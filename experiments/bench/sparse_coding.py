"""Top-k autoencoders on CPU: the training step, its parts, many in one.

Steps are of what users call: `encode_top_k` and `decode`, with the squared
error and `optax.adam`, on donated buffers.
"""

from collections.abc import Callable, Iterator
import functools
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from experiments.bench import attention
from experiments.bench import timing
from sparsejax import sparse_coding

ROWS, WIDTH, LATENTS, K = 2048, 384, 16384, 32
MANY, MANY_ROWS, MANY_LATENTS = 16, 1024, 2048
STEPS = 10
ADAM = optax.adam(1e-3)


def normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def start(latents: int, seed: int = 0) -> tuple:
  """Parameters and the state of Adam."""
  atoms = normal(seed, latents, WIDTH)
  atoms /= jnp.linalg.norm(atoms, axis=1, keepdims=True)
  params = {
    "kernel": atoms,
    "dictionary": jnp.copy(atoms),
    "encoder_bias": jnp.zeros(latents),
    "bias": jnp.zeros(WIDTH),
  }
  return params, ADAM.init(params)


def plain_encode(x, kernel, bias, k):
  """What JAX has."""
  values, indices = lax.top_k(x @ kernel.T + bias, k)
  return sparse_coding.Code(jax.nn.relu(values), indices, len(kernel))


def dense(code):
  """All latents of a code, zeros among them."""
  rows = jnp.arange(len(code.values))[:, None]
  zeros = jnp.zeros((len(rows), code.latents))
  return zeros.at[rows, code.indices].set(code.values, unique_indices=True)


def plain_decode(code, dictionary):
  return dense(code) @ dictionary


def loss_of(encode: Callable, decode: Callable, params: dict, x: jax.Array):
  bias = params["bias"]
  code = encode(x - bias, params["kernel"], params["encoder_bias"], K)
  error = decode(code, params["dictionary"]) + bias - x
  return (error**2).sum(-1).mean()


def update(state: tuple, grads: dict) -> tuple:
  params, adam = state
  updates, adam = ADAM.update(grads, adam, params)
  return optax.apply_updates(params, updates), adam


def step(loss: Callable, state: tuple, x: jax.Array):
  """The state after a step, and the loss before it."""
  found, grads = jax.value_and_grad(loss)(state[0], x)
  return update(state, grads), found


our_loss = functools.partial(
  loss_of, sparse_coding.encode_top_k, sparse_coding.decode
)
ours = functools.partial(step, our_loss)
plain = functools.partial(
  step, functools.partial(loss_of, plain_encode, plain_decode)
)


def training(runs: list[Callable], states: list, x: jax.Array) -> Callable:
  """A function that trains on, each state by its program, in sequence."""

  def once():
    losses = []
    for i, run in enumerate(runs):
      states[i], loss = run(states[i], x)
      losses.append(loss)
    return losses

  return once


def compiled(run: Callable, state: Any, x: jax.Array) -> Callable:
  run = jax.jit(run, donate_argnums=0)
  return run.lower(state, x).compile()


def trained(run: Callable, state: Any, x: jax.Array) -> timing.Contestant:
  return timing.timed(training([compiled(run, state, x)], [state], x))


def one_by_one(states, x):
  """A step of all states: one program that loops for their gradients."""
  gradients = lambda params: jax.value_and_grad(our_loss)(params, x)
  losses, grads = lax.map(gradients, states[0])
  return jax.vmap(update)(states, grads), losses


def at_once(states, x):
  return jax.vmap(ours, in_axes=(0, None))(states, x)


def stacked() -> Any:
  states = [start(MANY_LATENTS, seed) for seed in range(MANY)]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def apart() -> list:
  return [start(MANY_LATENTS, seed) for seed in range(MANY)]


def backward(decode: Callable) -> Callable:
  """Decoded rows and both gradients, of their sum of squares."""
  loss = lambda code, dictionary: (decode(code, dictionary) ** 2).sum()
  return jax.value_and_grad(loss, (0, 1), allow_int=True)


def cases(bandwidth: float) -> Iterator[timing.Case]:
  """Rows; a step's limit is the encoder's product alone."""
  del bandwidth
  rate = attention.gemm_rate()
  product = 2 * ROWS * WIDTH * LATENTS / rate
  x, (params, _) = normal(1, ROWS, WIDTH), start(LATENTS)
  kernel = params["kernel"]
  size = f"{ROWS} rows, {WIDTH} to {LATENTS}, k {K}"
  matmul = jax.jit(lambda x, kernel: x @ kernel.T)
  yield timing.Case(
    name=f"a step of a top-k SAE, {size}",
    ours=trained(ours, start(LATENTS), x),
    peers={
      "jax dense": trained(plain, start(LATENTS), x),
      "the encoder's product alone": timing.timed(matmul, x, kernel),
    },
    target={"torch dense": 2.5, "torch bag": 1.2},
    limit=product,
    note="limit: the encoder's product, at the rate of a large one",
  )
  pre = matmul(x, kernel)
  yield timing.Case(
    name=f"the {K} largest of {ROWS} rows of {LATENTS}",
    ours=timing.timed(jax.jit(lambda x: sparse_coding.top_k(x, K)), pre),
    peers={"lax.top_k": timing.timed(jax.jit(lambda x: lax.top_k(x, K)), pre)},
    target={},
    note="equal choices, also among equal scores",
  )
  code = jax.jit(lambda x: sparse_coding.top_k(x, K))(pre)
  all_latents = jax.jit(dense)(code)
  for name, change, target in (
    ("decode", lambda f: f, 7),
    ("decode and its gradients", backward, 6),
  ):
    run = jax.jit(change(sparse_coding.decode))
    yield timing.Case(
      name=f"{name}, {size}",
      ours=timing.timed(run, code, kernel),
      peers={"dense": timing.timed(run, all_latents, kernel)},
      target={"dense": target},
      note="dense: the product of all latents, which are there already",
    )
  x = normal(2, MANY_ROWS, WIDTH)
  runs = [compiled(ours, start(MANY_LATENTS), x)] * MANY
  yield timing.Case(
    name=f"a step of {MANY} top-k SAEs in one program, {MANY_ROWS} rows, "
    f"{WIDTH} to {MANY_LATENTS}, k {K}",
    ours=trained(one_by_one, stacked(), x),
    peers={
      "a program each, in sequence": timing.timed(training(runs, apart(), x)),
      "vmap": trained(at_once, stacked(), x),
    },
    target={"a program each, in sequence": 1 / 1.1},
    limit=MANY * 2 * MANY_ROWS * WIDTH * MANY_LATENTS / rate,
    note="ours: lax.map for the gradients, and one update of all",
  )


def facts() -> dict[str, Any]:
  """Temporary memory of steps; what many cost, compilation included."""
  x, found = normal(1, ROWS, WIDTH), {}
  for name, run in {"ours": ours, "jax dense": plain}.items():
    memory = compiled(run, start(LATENTS), x).memory_analysis()
    found[f"a step of a top-k SAE, {name}"] = (
      f"{memory.temp_size_in_bytes / 1e6:.0f} MB temporary"
    )
  x = normal(2, MANY_ROWS, WIDTH)
  for name, run, states in (
    ("in one program", one_by_one, [stacked()]),
    ("a program each", ours, apart()),
  ):
    begin = time.perf_counter()
    runs = []
    for state in states:
      jax.clear_caches()  # or what is equal would not be compiled again
      runs.append(compiled(run, state, x))
    middle = time.perf_counter()
    once = training(runs, states, x)
    for _ in range(STEPS):
      jax.block_until_ready(once())
    end = time.perf_counter()
    found[f"{STEPS} steps of {MANY} top-k SAEs, {name}"] = (
      f"{end - begin:.1f} s, of which compiling {middle - begin:.1f}"
    )
  return found
