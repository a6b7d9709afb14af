"""What every test and doctest runs under: eight CPU devices, no network."""

import gc
import os
import pathlib
import socket

# Before jax is imported; JAX_PLATFORMS from outside still wins.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# Before pytest collects it, which would put the folder in the function's place.
import pallas_kernels

jax.config.update("jax_num_cpu_devices", 8)

# The same examples on every run and machine; more of them in make test-all.
hypothesis.settings.register_profile(
  "quick", max_examples=25, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("deep", max_examples=500, deadline=None)
hypothesis.settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def no_network():
  """A test that reaches for the network fails wherever it runs."""
  connect = socket.socket.connect

  def connect_locally(self, address):
    local = self.family not in (socket.AF_INET, socket.AF_INET6) or address[
      0
    ] in ("127.0.0.1", "::1", "localhost")
    if not local:
      raise OSError(f"tests have no network: refused to connect to {address}")
    return connect(self, address)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(socket.socket, "connect", connect_locally)
    yield


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """Drops what JAX compiled before the system runs out of places for it.

  Linux lets a process have 65,530 mappings, of which each program on CPU takes
  some; the compiler crashes beyond.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def names_in_examples(doctest_namespace):
  """What every docstring's example may use without importing it."""
  import jax.numpy as jnp
  import optax

  from sparsejax import routing
  from sparsejax import select
  from sparsejax import weights

  doctest_namespace.update(
    jax=jax,
    jnp=jnp,
    optax=optax,
    pallas_kernels=pallas_kernels,
    routing=routing,
    select=select,
    weights=weights,
  )
