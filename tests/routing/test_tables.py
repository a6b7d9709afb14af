"""Rows of a table in the place of a projection, against a loop over tokens."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import pieces

WIDTH, HIDDEN, ROWS = 3, 4, 6
IDS = np.array([4, 1, 4, -1, ROWS])  # the last two are unknown


def arrays_of(seed=0):
  return {
    "x": pieces.draw(seed, len(IDS), WIDTH),
    "gate": pieces.draw(seed + 1, WIDTH, HIDDEN),
    "table": pieces.draw(seed + 2, ROWS, HIDDEN),
    "down": pieces.draw(seed + 3, HIDDEN, WIDTH),
  }


def with_gradients(arrays, ids):
  def f(arrays):
    params = {name: x for name, x in arrays.items() if name != "x"}
    return routing.stem(arrays["x"], ids, params)

  square = lambda arrays: (f(arrays) ** 2).sum()
  return f(arrays), jax.grad(square)(arrays)


run = pieces.jit(with_gradients)


def test_equals_a_loop():
  arrays = arrays_of()
  want = lambda arrays: oracle.stem(arrays["x"], IDS, arrays)
  y, gradients = pieces.compare(None, want, arrays, lambda a: run(a, IDS))
  # Only rows that are there have a gradient.
  used = np.isin(np.arange(ROWS), IDS)
  np.testing.assert_array_equal(np.any(gradients["table"], -1), used)
  assert not y[3:].any() and not gradients["x"][3:].any()
  # Whatever padding holds stays there.
  arrays["x"][3:] = np.nan
  jax.tree.map(np.testing.assert_array_equal, run(arrays, IDS), (y, gradients))


def test_a_changed_row_changes_its_tokens_alone():
  arrays, changed = arrays_of(10), arrays_of(10)
  changed["table"][1] += 1
  different = np.any(run(arrays, IDS)[0] != run(changed, IDS)[0], axis=-1)
  assert different.tolist() == [False, True, False, False, False]


def test_rows_in_use_are_enough():
  arrays = arrays_of(20)
  used, places = np.unique(IDS[:3], return_inverse=True)
  y, whole = run(arrays, IDS)
  places = np.append(places, [-1, -1])
  part = {**arrays, "table": arrays["table"][used]}
  got, rows = run(part, places)
  np.testing.assert_allclose(got, y, 1e-6, 1e-6)
  np.testing.assert_allclose(rows["table"], whole["table"][used], 1e-5, 1e-5)


def test_module():
  layer = pieces.made(lambda: routing.Stem(64, 32, ids=100, rngs=nnx.Rngs(0)))
  np.testing.assert_allclose(layer.table[...].std(), 1, rtol=0.05)
  x = jnp.asarray(pieces.draw(30, 2, 3, 64), jnp.bfloat16)
  ids = np.array([[0, 99, 3], [3, 3, 7]])
  call = pieces.module_jit(lambda layer, x, ids: layer(x, ids))
  y = call(layer, x, ids)
  assert y.dtype == jnp.bfloat16
  of = {"gate": layer.gate, "table": layer.table, "down": layer.down}
  params = {name: common.float64(p[...]) for name, p in of.items()}
  for i in range(2):
    pieces.close(y[i], oracle.stem(x[i], ids[i], params), 0.05, 0.05)
  call(layer, x, ids[::-1])
  assert call.compilations() == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  params = arrays_of(40)
  del params["x"]

  def f(x):
    return routing.stem(x, jnp.argmax(x, -1), params)

  pieces.compare_on_eight_devices(f, pieces.draw(41, 16, WIDTH), axis_type)


def test_bad_input():
  arrays = arrays_of()
  x = arrays.pop("x")
  with pytest.raises(ValueError, match=r"ids must be integer\[5\], got int64"):
    routing.stem(x, IDS[:4], arrays)
  with pytest.raises(ValueError, match=r"ids must be integer\[5\], got float"):
    routing.stem(x, IDS.astype(np.float32), arrays)
  with pytest.raises(ValueError, match='params must have "gate", "table" and'):
    routing.stem(x, IDS, {**arrays, "up": arrays["gate"]})
