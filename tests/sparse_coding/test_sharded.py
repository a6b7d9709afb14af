"""Latents over devices: what one device gives, and what crosses them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_coding
from sparsejax.sparse_coding import codes
from sparsejax.sparse_coding import sharded
from tests import common

P = jax.P
ROWS, WIDTH, LATENTS = 6, 5, 32
DIVIDED = (P("data"), P("latents"), P("latents"), P("latents"))


def inputs(seed, ties=False, dtype=jnp.float32):
  """x, kernel, bias and dictionary; ties within and between devices."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (
    rng.integers(-1, 2, shape) if ties else rng.normal(size=shape)
  )
  shapes = (ROWS, WIDTH), (LATENTS, WIDTH), (LATENTS,), (LATENTS, WIDTH)
  return [jnp.array(draw(*shape), dtype) for shape in shapes]


@functools.cache
def one_device(k, scores=None, dense=True):
  def run(x, kernel, bias, dictionary):
    options = {} if scores is None else {"scores": scores(dictionary)}
    code = sparse_coding.encode_top_k(x, kernel, bias, k, **options)
    out = sparse_coding.decode(code, dictionary)
    return code.dense() if dense else code, out

  return with_gradients(run)


def divided(mesh, k, scores=None):
  axis = dict(axis_name="latents")

  def run(x, kernel, bias, dictionary):
    options = {} if scores is None else {"scores": scores(dictionary)}
    code = sharded.encode_top_k(x, kernel, bias, k, **axis, **options)
    return code.dense(), sharded.decode(code, dictionary, **axis)

  out = P("data", "latents"), P("data")
  return with_gradients(
    jax.shard_map(run, mesh=mesh, in_specs=DIVIDED, out_specs=out)
  )


def with_gradients(run):
  def loss(args):
    code, out = run(*args)
    return (out**2).sum(), (code, out)

  return jax.jit(jax.grad(loss, has_aux=True))


def mesh_of(data, latents):
  kinds = (jax.sharding.AxisType.Auto,) * 2
  devices = jax.devices()[: data * latents]
  names = "data", "latents"
  return jax.make_mesh(
    (data, latents), names, axis_types=kinds, devices=devices
  )


def place(args, mesh):
  return [common.place(*pair[:1], mesh, pair[1]) for pair in zip(args, DIVIDED)]


def assert_close(got, want):
  """Sums of tens of f32 products of about 10, in another order."""
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 4), (1, 8), (2, 4)])
def test_equals_one_device(shape):
  k = 5  # on 8 devices more than one has
  mesh = mesh_of(*shape)
  run, want = divided(mesh, k), one_device(k)
  for seed, ties in ((0, False), (1, True), (2, True)):
    args = inputs(seed, ties)
    got = run(place(args, mesh))
    assert_close(got, want(args))
  assert run._cache_size() == 1


@pytest.mark.parametrize("k", [0, LATENTS])
def test_as_many_as(k):
  args, mesh = inputs(3), mesh_of(1, 4)
  assert_close(divided(mesh, k)(place(args, mesh)), one_device(k)(args))


def test_scores():
  norms = sparse_coding.norm_aware
  args, mesh = inputs(4), mesh_of(1, 4)
  got = divided(mesh, 3, norms)(place(args, mesh))
  assert_close(got, one_device(3, norms)(args))
  assert (got[1][0] != one_device(3)(args)[1][0]).any()


def test_bf16_is_chosen_in_f32():
  args, mesh = inputs(5, dtype=jnp.bfloat16), mesh_of(1, 4)
  code, out = divided(mesh, 3)(place(args, mesh))[1]
  assert code.dtype == out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(code, one_device(3)(args)[1][0])


def test_only_what_may_be_kept_crosses():
  k, mesh = 2, mesh_of(1, 4)
  text = divided(mesh, k).lower(place(inputs(6), mesh)).compile().as_text()
  assert gathered(text) == {ROWS * 4 * k}
  assert not re.search("all-to-all|collective-permute", text)


def gathered(text):
  """Sizes of what all-gathers make."""
  shapes = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)
  assert len(shapes) == len(re.findall(r"all-gather(?:-start)?\(", text))
  return {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes}


@pytest.mark.parametrize("rows,latents", [("data", None), (None, "latents")])
def test_plain_functions_on_divided_arrays(rows, latents, monkeypatch):
  """What the compiler makes of the plain functions is right, too."""
  two_rows = 2 * 3 * WIDTH
  monkeypatch.setattr(codes, "GATHERED", {"cpu": two_rows, "default": 1})
  mesh, args = mesh_of(2, 4), inputs(7, ties=True)
  specs = P(rows), P(latents), P(latents), P(latents)
  placed = [common.place(x, mesh, s) for x, s in zip(args, specs)]
  both = one_device(3, dense=False)
  want = both(args)
  with jax.set_mesh(mesh):
    assert_close(both(placed), want)
    assert_close(both([common.place(x, mesh, P()) for x in args]), want)
    text = both.lower(placed).compile().as_text()
  if rows:  # only gradients, summed once
    assert not gathered(text)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) <= 2


def test_bad_input():
  x, kernel, bias, _ = inputs(0)
  with pytest.raises(ValueError, match="axis_name is 'latents'"):
    sharded.encode_top_k(x, kernel, bias, 1, axis_name="latents")
  with pytest.raises(ValueError, match="axis_name is 'latents'"):
    sharded.decode(jnp.ones((1, LATENTS)), kernel, axis_name="latents")
  with pytest.raises(ValueError, match="k must be an integer from 0 to 32"):
    divided(mesh_of(1, 2), 33)(inputs(0))
