"""Sparse embeddings: definitions, the index, and what training does to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

from sparsejax import sparse_coding
from sparsejax.sparse_coding import Code
from tests import common
from tests.kernels import problem
from tests.oracles import embeddings as oracle

assert_close = functools.partial(
  np.testing.assert_allclose, rtol=1e-5, atol=1e-6
)


def draw(seed, rows, k=3, latents=11):
  """A Code of positive values, some of them 0, and it dense."""
  rng = np.random.default_rng(seed)
  rows = (rows,) if isinstance(rows, int) else rows
  indices = np.argsort(rng.random((*rows, latents)), -1)[..., :k]
  values = np.maximum(rng.normal(size=(*rows, k)) + 0.5, 0)
  code = Code(
    jnp.array(values, jnp.float32), jnp.array(indices, jnp.int32), latents
  )
  return code, np.asarray(code.dense())


def test_splade():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 5, 7)).astype(np.float32)
  valid = rng.random((3, 5)) < 0.6
  valid[1] = False
  logits[~valid] = np.nan
  weights = problem.jit(sparse_coding.splade)
  got = weights(logits, valid)
  assert_close(got, oracle.splade(logits, valid))
  assert not got[1].any()
  assert weights(logits.astype(jnp.bfloat16), valid).dtype == jnp.bfloat16
  whole = np.nan_to_num(logits)
  assert_close(
    sparse_coding.splade(whole), oracle.splade(whole, np.ones_like(valid))
  )
  # The gradient goes to the largest logit, where that is positive.
  grad = problem.jit(jax.grad(lambda x: sparse_coding.splade(x, valid).sum()))(
    logits
  )
  masked = np.where(valid[..., None], logits, -np.inf)
  largest = masked.max(1, keepdims=True)
  at_largest = (masked == largest) & (largest > 0)
  assert_close(grad, np.where(at_largest, 1 / (1 + np.maximum(masked, 0)), 0))
  with pytest.raises(ValueError, match=r"valid must be bool\[3, 5\]"):
    sparse_coding.splade(logits, valid[:2])


@pytest.mark.parametrize("rows", [(6,), (2, 4), (1,)])
def test_flops(rows):
  code, dense = draw(1, rows)
  code = dataclasses.replace(code, values=-code.values)
  want = oracle.flops(dense.reshape(-1, 11))
  f = problem.jit(sparse_coding.flops)
  assert_close(f(code), want)
  assert_close(f(-dense), want)
  by_values = problem.jit(
    jax.grad(lambda v: sparse_coding.flops(dataclasses.replace(code, values=v)))
  )(code.values)
  by_dense = problem.jit(jax.grad(sparse_coding.flops))(-dense)
  listed = np.take_along_axis(
    np.asarray(by_dense), np.asarray(code.indices), -1
  )
  assert_close(by_values, listed)


def test_flops_prefers_even_latents():
  """At one mean size: least where all are alike, most where one has it all."""
  rng = np.random.default_rng(2)
  values = []
  for concentration in (1e3, 1.0, 0.1):
    shares = rng.dirichlet(np.full(16, concentration))
    z = rng.random((400, 16)) < shares  # sizes 1
    z = z / z.mean(0).sum() * 1.0
    assert_close(oracle.l1(z), 1)
    values.append(sparse_coding.flops(z))
  assert values[0] < values[1] < values[2]
  assert_close(values[0], 1 / 16, rtol=0.2)
  even = np.eye(16)  # each row another
  assert_close(sparse_coding.flops(even), 1 / 16)
  assert_close(sparse_coding.flops(np.roll(even[:1], 3) * np.ones((16, 1))), 1)


@problem.jit
def found(index, queries, documents):
  """All ways to one answer."""
  similarity = sparse_coding.similarity
  return {
    "similarity": similarity(queries, documents),
    "scores": index.scores(queries),
    "vmap of similarity": jax.vmap(similarity, (0, None))(queries, documents),
    "vmap of scores": jax.vmap(index.scores)(queries),
  }


def test_similarity_and_index_equal_dense_products():
  queries, q = draw(3, (2, 3), k=4)
  documents, d = draw(4, 9)
  index = sparse_coding.InvertedIndex.of(documents)
  want = q @ d.T
  assert_close(want.reshape(6, 9), oracle.scores(q.reshape(6, 11), d))
  for name, got in found(index, queries, documents).items():
    assert_close(got, want, err_msg=name)
  products = index.products(queries)
  assert products.sum() == oracle.multiplies(q.reshape(6, 11), d)
  assert products[1, 2] == oracle.multiplies(q[1, 2][None], d)
  one = jax.tree.map(lambda x: x[1, 2], queries)
  best, which = index.search(one, 4)
  assert_close(best, -np.sort(-want[1, 2])[:4])
  assert_close(want[1, 2][which], best)
  # Dense documents make the same index; so do lists in another order.
  back = jax.tree.map(lambda x: x[:, ::-1], documents)
  for same in (d, back):
    again = sparse_coding.InvertedIndex.of(same)
    jax.tree.map(np.testing.assert_array_equal, again, index)
  assert len(index.values) == (d != 0).sum()
  half = dataclasses.replace(queries, values=queries.values.astype("bfloat16"))
  for got in found(index, half, documents).values():
    assert got.dtype == jnp.bfloat16
    assert_close(got.astype(jnp.float32), want, rtol=0.02, atol=0.02)


def test_gradients_of_similarity():
  queries, q = draw(3, 4)
  documents, d = draw(4, 9)

  def loss(values, others):
    given = [
      dataclasses.replace(code, values=v)
      for code, v in zip((queries, documents), (values, others), strict=True)
    ]
    return (sparse_coding.similarity(*given) ** 2).sum() / 2

  got = problem.jit(jax.grad(loss, (0, 1)))(queries.values, documents.values)
  dense = q @ d.T @ d, (q @ d.T).T @ q
  for grad, want, code in zip(got, dense, (queries, documents), strict=True):
    assert_close(grad, np.take_along_axis(want, np.asarray(code.indices), -1))


def test_an_index_of_many_chunks():
  """More postings than are read at once, and lists that are empty."""
  rng = np.random.default_rng(5)
  d = rng.random((700, 6)).astype(np.float32)
  d[:, 2] = 0
  d[rng.random(d.shape) < 0.3] = 0
  index = sparse_coding.InvertedIndex.of(d)
  scores = problem.jit(index.scores)
  for latents, values in [
    ([2, 0, 5, 1], [1.0, 2.0, 3.0, 4.0]),
    ([5, 2, 2, 2], [1.0, 0.0, 0.0, 0.0]),
    ([0, 1, 3, 4], [0.0, 0.0, 0.0, 0.0]),
  ]:
    query = Code(jnp.array(values), jnp.array(latents), 6)
    q = np.zeros(6)
    np.add.at(q, latents, values)
    assert_close(scores(query), d @ q)
    assert index.products(query) == (d[:, q != 0] != 0).sum()
  assert scores._cache_size() == 1
  nothing = sparse_coding.InvertedIndex.of(np.zeros((3, 6), np.float32))
  assert not nothing.scores(query).any()
  empty = Code(jnp.zeros(0), jnp.zeros(0, jnp.int32), 6)
  assert not index.scores(empty).any() and index.products(empty) == 0


def test_annealed_k():
  k_at = problem.jit(sparse_coding.annealed_k, static_argnums=(1, 2, 3))
  for start, end, steps in [(64, 2, 7), (8, 3, 10), (2, 5, 4), (4, 2, 0)]:
    got = [int(k_at(step, start, end, steps)) for step in range(steps + 3)]
    want = [oracle.k_at(step, start, end, steps) for step in range(steps + 3)]
    assert got == want
  assert k_at._cache_size() == 4


def test_the_first_k():
  """As k falls the codes are those of `top_k`, and nothing compiles anew."""
  pre = jnp.array(np.random.default_rng(6).normal(size=(5, 9)), jnp.float32)
  keep = problem.jit(
    lambda k: sparse_coding.keep_first(sparse_coding.top_k(pre, 6), k).dense()
  )
  for k in (0, 1, 2, 6):
    np.testing.assert_array_equal(keep(k), sparse_coding.top_k(pre, k).dense())
    assert_close(keep(k), oracle.top_k(np.asarray(pre, np.float64), k))
  assert keep._cache_size() == 1
  each = np.asarray(keep(jnp.arange(5)))
  np.testing.assert_array_equal(
    (each > 0).sum(1),
    np.minimum(np.arange(5), np.minimum((np.asarray(pre) > 0).sum(1), 6)),
  )


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
def test_contrastive_loss(labels):
  code, dense = draw(7, 6, k=4)
  code = dataclasses.replace(code, values=code.values.at[2].set(0))
  dense = dense * (np.arange(6) != 2)[:, None]
  labels = jnp.array(labels)
  loss = problem.jit(sparse_coding.contrastive_loss)
  want = oracle.contrast(dense, labels)
  assert (want > 0) == (len(set(labels.tolist())) < 6)
  assert_close(loss(code, labels), want)
  assert_close(loss(dense, labels), want)
  sharp = functools.partial(sparse_coding.contrastive_loss, temperature=0.05)
  want = oracle.contrast(dense, labels, 0.05)
  assert_close(problem.jit(sharp)(dense, labels), want)
  grad = problem.jit(jax.grad(sparse_coding.contrastive_loss))(dense, labels)
  assert np.isfinite(grad).all()
  step = 1e-5 * np.random.default_rng(0).normal(size=dense.shape)
  step[2] = 0  # the cosine has no gradient at 0
  apart = oracle.contrast(dense + step, labels) - oracle.contrast(
    dense - step, labels
  )
  assert_close((grad * step).sum(), apart / 2, rtol=1e-3, atol=1e-9)
  of_one = problem.jit(jax.value_and_grad(sparse_coding.contrastive_loss))
  loss, grad = of_one(dense[:1], labels[:1])
  assert loss == 0 and not grad.any()


def test_the_loss_of_csrv2():
  """Its terms, put together from what is here, against the oracle."""
  rng = np.random.default_rng(8)
  x = rng.normal(size=(6, 4)).astype(np.float32)
  kernel, dictionary = rng.normal(size=(2, 9, 4)).astype(np.float32)
  bias, center = np.ones(9, np.float32), np.ones(4, np.float32)
  labels = np.array([0, 0, 1, 1, 2, 2])
  want = oracle.csrv2_loss(
    x, kernel, bias, dictionary, center, labels, np.zeros(9, bool), 2, k_aux=2
  )

  @problem.jit
  def terms(k):
    code = sparse_coding.encode_top_k(x, kernel, bias, 5)
    code = sparse_coding.keep_first(code, k)
    decoded = sparse_coding.decode(code, dictionary) + center
    error = ((x - decoded) ** 2).sum(-1).mean()
    return error, sparse_coding.contrastive_loss(code, labels)

  assert_close(terms(2), (want["error"], want["contrast"]))


@pytest.mark.parametrize("spec", [("x",), ("y",)])
def test_explicit_rows(spec):
  mesh = common.mesh_of(AxisType.Explicit)
  code, dense = draw(9, 8)
  place = functools.partial(common.place, mesh=mesh, spec=jax.P(*spec))
  placed = jax.tree.map(place, (code, dense))
  f = problem.jit(sparse_coding.flops)
  assert_close([f(x) for x in placed], [oracle.flops(dense)] * 2)


def test_errors():
  queries, _ = draw(10, 2)
  documents, _ = draw(11, 5, latents=12)
  index = sparse_coding.InvertedIndex.of(documents)
  for search in (
    lambda: sparse_coding.similarity(queries, documents),
    lambda: index.scores(queries),
    lambda: index.products(queries),
  ):
    with pytest.raises(ValueError, match="queries must have 12 latents"):
      search()
  with pytest.raises(ValueError, match="k must be from 0 to 5"):
    index.search(documents, 6)
  with pytest.raises(ValueError, match="code must be of"):
    sparse_coding.InvertedIndex.of(np.ones(3))
  with pytest.raises(ValueError, match="temperature must be above 0"):
    sparse_coding.contrastive_loss(queries, jnp.zeros(2, int), temperature=0)
  with pytest.raises(ValueError, match="code and labels"):
    sparse_coding.contrastive_loss(queries, jnp.zeros(3, int))


def train_to_retrieve(penalty, weight, key):
  """Codes of queries and documents of an encoder trained on pairs of them.

  Topics are as uneven as in texts, and the penalty's weight grows at first.
  """
  latents, width, topics, rows, steps, batch = 64, 16, 12, 256, 400, 64
  keys = jax.random.split(key, 6)
  centers = 1.5 * jax.random.normal(keys[0], (topics, width))
  topic = jax.random.categorical(
    keys[1], -jnp.log(1.0 + jnp.arange(topics)), shape=(rows,)
  )
  noise = jax.random.normal(keys[2], (2, rows, width))
  documents = centers[topic] + 0.7 * noise[0]
  queries = documents + 0.25 * noise[1]
  encode = lambda params, x: jax.nn.relu(x @ params[0].T + params[1])
  optimizer = optax.adam(5e-3)
  kernel = jax.random.normal(keys[3], (latents, width)) / 4
  start = kernel, jnp.zeros(latents)

  def loss(params, chosen, weight):
    q, d = (encode(params, x[chosen]) for x in (queries, documents))
    error = optax.softmax_cross_entropy_with_integer_labels(
      q @ d.T, jnp.arange(batch)
    )
    return error.mean() + weight * (penalty(q) + penalty(d))

  def step(carry, i):
    params, state = carry
    order = jax.random.permutation(jax.random.fold_in(keys[4], i), rows)
    ramp = jnp.minimum(1, 3 * i / steps) ** 2
    grads = jax.grad(loss)(params, order[:batch], weight * ramp)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(
    step, (start, optimizer.init(start)), jnp.arange(steps)
  )
  return encode(params, queries), encode(params, documents)


def l1(z):
  return jnp.abs(z).sum(-1).mean()


@pytest.mark.slow
def test_training_with_flops_takes_fewer_products():
  """Than l1 at one number of active latents, and at one recall."""
  keys = jax.random.split(jax.random.key(0), 5)
  curves = {}
  for penalty, weights in [
    (l1, (0.012, 0.025, 0.05, 0.11)),
    (sparse_coding.flops, (0.11, 0.23, 0.48, 1.0)),
  ]:
    train = functools.partial(train_to_retrieve, penalty)
    train = jax.vmap(jax.vmap(train, (0, None)), (None, 0))
    trained = problem.jit(train)(jnp.array(weights), keys)
    for seed, runs in enumerate(zip(*trained, strict=True)):
      points = []
      for q, d in zip(*runs, strict=True):
        index = sparse_coding.InvertedIndex.of(d)
        queries = sparse_coding.top_k(q, q.shape[1])
        right = (q @ d.T).argmax(-1) == jnp.arange(len(q))
        products = index.products(queries).mean()
        active = (sparse_coding.l0(q) * sparse_coding.l0(d)) ** 0.5
        points.append((active, products, right.mean()))
      # From few active latents to many, as np.interp wants them.
      curves[penalty, seed] = np.array(points, np.float64)[::-1].T
  same_active, same_recall = [], []
  for seed in range(5):
    at = lambda f, x, y, value, seed=seed: np.exp(
      np.interp(value, curves[f, seed][x], np.log(curves[f, seed][y]))
    )
    arms = (sparse_coding.flops, l1)
    few, many = (at(f, 0, 1, 14) for f in arms)
    same_active.append(few / many)
    few, many = (at(f, 2, 1, 0.75) for f in arms)
    same_recall.append(few / many)
  print("products, flops / l1:", same_active, same_recall)
  assert max(same_active) < 0.9
  assert np.mean(same_recall) < 1


def train_at_falling_k(start, key):
  """Share of dead latents, and accuracies, once k has gone from start to 2.

  The data are few of many atoms; the label of a row is its largest one.
  """
  latents, width, atoms, rows, steps, batch = 256, 32, 128, 4096, 800, 64
  keys = jax.random.split(key, 5)
  unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  truth = unit(jax.random.normal(keys[0], (atoms, width)))
  planted = jax.random.exponential(keys[1], (rows, atoms))
  planted *= jax.random.bernoulli(keys[2], 3 / atoms, planted.shape)
  x, label = planted @ truth, planted.argmax(-1)
  x = x - x.mean(0)
  x = x / jnp.sqrt((x**2).sum(-1).mean())
  kernel = unit(jax.random.normal(keys[3], (latents, width)))
  params = kernel, jnp.zeros(latents), kernel, jnp.zeros(width)
  optimizer = optax.adam(3e-3)

  def encode(params, x, k):
    code = sparse_coding.encode_top_k(x, params[0], params[1], 8)
    return sparse_coding.keep_first(code, k)

  def loss(params, x, k):
    found = sparse_coding.decode(encode(params, x, k), params[2]) + params[3]
    return ((found - x) ** 2).sum(-1).mean()

  def step(carry, i):
    params, state = carry
    chosen = jax.random.randint(
      jax.random.fold_in(keys[4], i), (batch,), 0, rows
    )
    k = sparse_coding.annealed_k(i, start, 2, int(0.7 * steps))
    grads = jax.grad(loss)(params, x[chosen], k)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(
    step, (params, optimizer.init(params)), jnp.arange(steps)
  )
  code = encode(params, x, 2)

  def nearest(z):
    cosines = unit(z[:500]) @ unit(z[500:]).T
    right = label[500:][cosines.argmax(-1)] == label[:500]
    return right.mean()

  components = jnp.linalg.svd(x, full_matrices=False)[2][:2]
  return (
    sparse_coding.dead_fraction(sparse_coding.density(code)),
    nearest(code.dense() + 1e-9),  # a code of zeros has no direction
    nearest(x @ components.T),
  )


@pytest.mark.slow
def test_falling_k_leaves_fewer_dead_latents():
  """Than k = 2 from the start, and 2 latents tell more than 2 components.

  Of data that are made of atoms: where a few directions had nearly all of the
  variance, falling k left more dead latents than it found.
  """
  keys = jax.random.split(jax.random.key(1), 5)
  train = jax.vmap(jax.vmap(train_at_falling_k, (0, None)), (None, 0))
  dead, sparse, dense = jax.jit(train)(jnp.array([2, 8]), keys)
  print("dead:", dead.T, "accuracy:", sparse.T, dense.T)
  assert np.all(dead[:, 1] < dead[:, 0] - 0.05)
  assert np.all(sparse > dense + 0.1)
