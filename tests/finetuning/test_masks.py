import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import finetuning
from tests import common
from tests.oracles import finetuning as oracle

RNG = np.random.default_rng(0)


def log_prob(params, example):
  x, y = example
  return jax.nn.log_softmax(x @ params["w"] + params["b"])[y]


XS = RNG.normal(size=(7, 3)).astype(np.float32)
YS = RNG.integers(0, 4, 7)
SOFTMAX = {
  "w": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
  "b": jnp.zeros(4),
}


def test_fisher_of_softmax_regression():
  got = jax.jit(lambda p, e: finetuning.fisher_scores(log_prob, p, e))(
    SOFTMAX, (XS, YS)
  )
  want = oracle.logistic_fisher(XS, np.asarray(SOFTMAX["w"]), YS)
  np.testing.assert_allclose(got["w"], want, rtol=1e-4)  # f32 softmaxes
  # Squares of single examples, not of their mean.
  mean = jax.grad(
    lambda p: jnp.mean(jax.vmap(log_prob, (None, 0))(p, (XS, YS)))
  )(SOFTMAX)
  assert not np.allclose(got["w"], mean["w"] ** 2, rtol=0.1)
  # The expectation over labels, each label in its share, is the closed form.
  p = jax.nn.softmax(XS @ SOFTMAX["w"])
  every = [
    finetuning.fisher_scores(log_prob, SOFTMAX, (XS[i : i + 1], y[None]))["w"]
    * p[i, y]
    for i in range(2)
    for y in np.arange(4)
  ]
  want = oracle.logistic_fisher(XS[:2], np.asarray(SOFTMAX["w"]))
  np.testing.assert_allclose(sum(every) / 2, want, rtol=1e-4)


def test_fish_mask():
  scores = {
    "a": RNG.integers(0, 5, (4, 3)).astype(np.float32),
    "b": RNG.integers(0, 5, (5,)).astype(np.float32),
    "c": np.zeros((2, 0), np.float32),
  }
  for k in (0, 1, 6, 17):
    got = finetuning.fish_mask(scores, k)
    want = oracle.fish_mask(list(scores.values()), k)
    for g, w in zip(got.values(), want, strict=True):
      np.testing.assert_array_equal(g, w)
  got = finetuning.fish_mask(scores, 7, always="b")
  want = oracle.fish_mask(list(scores.values()), 7, always=(1,))
  for g, w in zip(got.values(), want, strict=True):
    np.testing.assert_array_equal(g, w)


def test_fish_trains_k_entries_and_beats_random_ones():
  """A planted task: of many inputs three matter, and few entries may move."""
  x = RNG.normal(size=(64, 30)).astype(np.float32)
  truth = np.zeros((30, 2), np.float32)
  truth[:3] = 2 * RNG.normal(size=(3, 2))
  y = (x @ truth).argmax(-1)
  x[:, 3:] *= 0.1
  start = {"w": jnp.zeros((30, 2)), "b": jnp.zeros(2)}
  scores = finetuning.fisher_scores(log_prob, start, (x, y))
  value = lambda p: -jnp.mean(jax.vmap(log_prob, (None, 0))(p, (x, y)))

  def tuned(masks):
    tx = finetuning.train_only(optax.adam(0.1), masks)

    @jax.jit
    def run(params, state):
      def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(value)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

      return jax.lax.scan(step, (params, state), length=30)[0][0]

    return run(start, tx.init(start))

  fish = tuned(finetuning.fish_mask(scores, 6))
  changed = finetuning.update_masks(start, fish, tolerance=0)
  assert sum(int(m.sum()) for m in changed.values()) == 6
  draws = jax.tree.map(lambda p: RNG.random(p.shape).astype(np.float32), start)
  random = tuned(finetuning.fish_mask(draws, 6))
  assert value(fish) < value(random) - 0.05  # a gap of 0.3 when written


def trees():
  shapes = {"a": (4, 5), "b": (7,), "c": ()}
  start = {
    n: RNG.integers(-3, 3, s).astype(np.float32) for n, s in shapes.items()
  }
  tuned = {
    n: x + RNG.integers(-3, 4, x.shape).astype(np.float32)
    for n, x in start.items()
  }
  return jax.tree.map(jnp.asarray, start), jax.tree.map(jnp.asarray, tuned)


def test_lt_sft_masks_and_penalty():
  start, tuned = trees()
  flat = lambda tree: list(map(np.asarray, tree.values()))
  for k in (0, 3, 11, 28):
    got = finetuning.lt_sft_masks(start, tuned, k)
    want = oracle.most_changed(flat(start), flat(tuned), k)
    for g, w in zip(flat(got), want, strict=True):
      np.testing.assert_array_equal(g, w)
  first = finetuning.lt_sft_masks(start, tuned, 4)
  got = jax.jit(lambda m: finetuning.lt_sft_masks(start, tuned, 5, already=m))(
    first
  )
  want = oracle.most_changed(flat(start), flat(tuned), 5, flat(first))
  for g, w in zip(flat(got), want, strict=True):
    np.testing.assert_array_equal(g, w)
  assert sum(int(m.sum()) for m in flat(got)) == 9
  every = finetuning.lt_sft_masks(start, tuned, 28, already=first)
  assert all(m.all() for m in flat(every))
  penalty = finetuning.distance_penalty(tuned, start, 0.3)
  want = oracle.distance_penalty(flat(start), flat(tuned), 0.3)
  np.testing.assert_allclose(penalty, want, rtol=1e-6)
  grads = jax.grad(finetuning.distance_penalty)(tuned, start, 28.0)
  for n, g in grads.items():
    np.testing.assert_allclose(g, np.sign(tuned[n] - start[n]), rtol=1e-6)


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 6)])
def test_blocks_by_mean_gradient(block):
  steps = [
    {
      "q": RNG.normal(size=(4, 6)),
      "v": RNG.normal(size=(8, 6)),
      "n": np.ones(3),
    }
    for _ in range(3)
  ]
  sizes = jax.tree.map(
    lambda *g: jnp.asarray(sum(map(abs, g)), jnp.float32), *steps
  )
  scores = finetuning.block_scores(sizes, block, where="q|v")
  want = [oracle.block_scores([s[n] for s in steps], block) for n in "qv"]
  for n, w in zip("qv", want, strict=True):
    np.testing.assert_allclose(scores[n], w, rtol=1e-6)
  for k in (0, 1, 3):
    got = finetuning.smt_blocks(sizes, k, block, where="q|v")
    chosen = dict(zip("qv", oracle.select_blocks(want, k), strict=True))
    assert got.keys() == {n for n, w in chosen.items() if w}
    for n, blocks in got.items():
      assert blocks.index.tolist() == list(map(list, chosen[n]))
    tx = finetuning.train_only(optax.adam(1), got)
    mu = tx.init(sizes).inner[0].mu
    count = sum(x.size for x in jax.tree.leaves(mu))
    assert count == k * block[0] * block[1]


@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_scores_over_devices(axis_type):
  mesh = common.mesh_of(axis_type)
  rng = np.random.default_rng(5)
  w, x = rng.normal(size=(4, 8)), rng.normal(size=(8, 4))
  w, x = w.astype(np.float32), x.astype(np.float32)
  score = jax.jit(
    lambda w, x: finetuning.fisher_scores(lambda w, x: (x @ w).sum(), w, x)
  )
  with jax.set_mesh(mesh):
    kernel = common.place(w, mesh, jax.P(None, "y"))
    fisher = score(kernel, common.place(x, mesh, jax.P("x")))
    sizes = {"w": common.place(abs(w), mesh, jax.P("x", "y"))}
    blocks = finetuning.block_scores(sizes, (2, 4))
    chosen = finetuning.smt_blocks(sizes, 2, (2, 4))
  np.testing.assert_allclose(
    fisher, np.repeat((x**2).mean(0)[:, None], 8, 1), rtol=1e-5
  )
  want = abs(w).reshape(2, 2, 2, 4).mean((1, 3))
  np.testing.assert_allclose(blocks["w"], want, rtol=1e-6)
  assert len(chosen["w"].index) == 2


def test_bad_input():
  start, tuned = trees()
  with pytest.raises(ValueError, match="params must be floating, got int"):
    finetuning.fisher_scores(log_prob, {"w": jnp.arange(3)}, XS)
  for examples in ((XS, YS[:3]), (XS[:0], YS[:0]), (), (XS, 1.0)):
    with pytest.raises(ValueError, match="examples must be arrays with the"):
      finetuning.fisher_scores(log_prob, SOFTMAX, examples)
  with pytest.raises(ValueError, match=r"k must be in \[0, 28\], got 29"):
    finetuning.fish_mask(start, 29)
  with pytest.raises(ValueError, match=r"k must be in \[7, 28\], got 6"):
    finetuning.fish_mask(start, 6, always="b")
  with pytest.raises(ValueError, match="always"):
    finetuning.fish_mask(start, 6, always="head")
  with pytest.raises(ValueError, match="k must be in"):
    finetuning.lt_sft_masks(start, tuned, -1)
  with pytest.raises(ValueError, match="tuned must be like start"):
    finetuning.lt_sft_masks(start, tuned | {"a": tuned["b"]}, 1)
  with pytest.raises(ValueError, match="already must be boolean masks"):
    finetuning.lt_sft_masks(start, tuned, 1, already=start)
  with pytest.raises(ValueError, match="start must be like params"):
    finetuning.distance_penalty(start, {}, 1)
  with pytest.raises(ValueError, match=r"block must divide.*got \(3, 5\)"):
    finetuning.smt_blocks(start, 1, (3, 5), where="a")
  with pytest.raises(ValueError, match="block must divide"):
    finetuning.block_scores(start, (1, 1))
  with pytest.raises(ValueError, match="where"):
    finetuning.block_scores(start, (1, 1), where="nothing")
  with pytest.raises(ValueError, match="k must be in"):
    finetuning.smt_blocks(start, 99, (1, 5), where="a")
  with pytest.raises(ValueError, match="sizes must be known"):
    jax.jit(lambda s: finetuning.smt_blocks(s, 1, (1, 5), where="a"))(start)
