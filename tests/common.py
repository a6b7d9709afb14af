"""What several test files share: scores to draw, meshes, compiled text."""

import re

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

AXIS_TYPES = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)

# Few values, so that there are ties; every special one among them.
SPECIAL = (0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf)
PLAIN = (1.0, -1.0, 0.5, 2.0, -3.0, 1.0078125, 65280.0, -1e-3)


def mesh_of(axis_type: jax.sharding.AxisType) -> jax.sharding.Mesh:
  """Eight devices, four along "x" and two along "y"."""
  return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def place(x, mesh: jax.sharding.Mesh, spec: jax.P) -> jax.Array:
  """`x` on the devices of `mesh`."""
  return jax.device_put(x, jax.NamedSharding(mesh, spec))


def moved(compiled: jax.stages.Compiled) -> set[str]:
  """Sorts, and collectives that move arrays, in a compiled program."""
  names = (
    "all-gather|all-to-all|ragged-all-to-all|collective-permute|"
    "reduce-scatter|sort|topk"
  )
  pattern = rf"[ )]({names})(?:-start)?\("
  return set(re.findall(pattern, compiled.as_text(), re.IGNORECASE))


def reduced(compiled: jax.stages.Compiled) -> set[int]:
  """How many numbers the all-reduces of a compiled program add up."""
  lines = re.findall(
    r"= (.*?) all-reduce(?:-start)?\(", compiled.as_text(), re.MULTILINE
  )
  shapes = [s for line in lines for s in re.findall(r"\w\d*\[([\d,]*)\]", line)]
  return {int(np.prod([int(d) for d in s.split(",") if d])) for s in shapes}


@st.composite
def score_arrays(draw, shape, dtype=jnp.float32, special=True):
  """Arrays with many ties: few values, at places drawn from a seed."""
  values = st.floats(-100, 100, width=16, allow_subnormal=False)
  values |= st.sampled_from(PLAIN)
  if special:
    values |= st.sampled_from(SPECIAL)
  palette = draw(st.lists(values, min_size=1, max_size=8))
  rng = np.random.default_rng(draw(st.integers(0, 99)))
  return np.asarray(rng.choice(palette, shape), jnp.dtype(dtype))


def distinct(rng: np.random.Generator, shape) -> np.ndarray:
  """Small integers in f32, all different, of either sign, none zero."""
  size = int(np.prod(shape))
  signs = rng.choice([-1, 1], size)
  return (signs * (1 + rng.permutation(size))).reshape(shape).astype(np.float32)


def float64(x) -> np.ndarray:
  """What the oracles take."""
  return np.asarray(x).astype(np.float64)
