"""Masks before training: against loops by hand, and what each promises."""

import functools
import itertools
import re

from absl.testing import parameterized
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import weights
from sparsejax.select import budgets
from sparsejax.select import structures
from tests import common
from tests.oracles import before_training as oracle
from tests.weights import problem

KEY = jax.random.key(0)


def network(*widths, seed=0, bias=True, scale=1.0):
  """Dense layers as the oracle takes them, in f32."""
  layers = []
  for i, shape in enumerate(itertools.pairwise(widths)):
    layer = {"kernel": problem.numbers(*shape, seed=seed + 2 * i) * scale}
    if bias:
      layer["bias"] = problem.numbers(shape[1], seed=seed + 2 * i + 1)
    layers.append(layer)
  return layers


def outputs(layers, x, act=jnp.tanh):
  for i, layer in enumerate(layers):
    x = x @ layer["kernel"]
    if "bias" in layer:
      x = x + layer["bias"]
    if i + 1 < len(layers):
      x = act(x)
  return x


def loss(layers, batch, act=jnp.tanh):
  """The oracle's: the mean over rows of the squared distance."""
  x, y = batch
  return jnp.mean(jnp.sum((outputs(layers, x, act) - y) ** 2, -1))


relu_outputs = functools.partial(outputs, act=jax.nn.relu)
linear_outputs = functools.partial(outputs, act=lambda z: z)

LAYERS = network(5, 7, 3, scale=0.5)
BATCH = problem.numbers(6, 5, seed=20), problem.numbers(6, 3, seed=21)
SIZE = 5 * 7 + 7 * 3


def compiled(function, *args, **settings):
  """What `function` gives, compiled at once: quicker than bit by bit."""
  made = functools.partial(function, *args, **settings)
  return problem.copied(problem.jit(lambda: made())())


def assert_masks(got, want):
  """The kernels' masks are these, and biases are dense."""
  for i, (layer, m) in enumerate(zip(got, want, strict=True)):
    np.testing.assert_array_equal(layer["kernel"], m, err_msg=f"layer {i}")
    assert np.all(layer.get("bias", True))


def assert_scores(got, want, atol):
  for layer, w in zip(got, want, strict=True):
    for name in layer:
      assert layer[name].dtype == jnp.float32
      np.testing.assert_allclose(layer[name], w[name], rtol=2e-5, atol=atol)


class ChooseMasksTest(parameterized.TestCase):
  @given(data=st.data())
  def test_global_is_a_stable_argsort(self, data):
    # Whole numbers of a few values: most of them tie.
    ints = data.draw(st.lists(st.integers(-2, 2), min_size=17, max_size=17))
    scores = [np.reshape(ints[:12], (3, 4)), np.reshape(ints[12:], (5, 1))]
    scores = [s.astype(np.float32) for s in scores]
    keep = data.draw(st.integers(0, 17))
    got = CHOOSE_17[keep](scores)
    order = np.argsort(-np.asarray(ints), kind="stable")
    want = np.zeros(17, bool)
    want[order[:keep]] = True
    np.testing.assert_array_equal(
      np.concatenate([m.ravel() for m in got]), want
    )

  def test_other_budgets_and_structures(self):
    scores = {"a": problem.numbers(8, 4), "b": problem.numbers(4, 6, seed=1)}
    with self.subTest("by path; what none matches is dense"):
      masks = compiled(weights.choose_masks, scores, sparsity={"^b$": 0.75})
      assert masks["a"].all() and masks["b"].sum() == 6
    with self.subTest("a budget"):
      masks = compiled(
        weights.choose_masks, scores, sparsity=0.5, distribution="erk"
      )
      counts = budgets.largest_remainder(
        {
          n: d * scores[n].size
          for n, d in budgets.erk(
            {n: s.shape for n, s in scores.items()}, 0.5
          ).items()
        }
      )
      assert {n: int(m.sum()) for n, m in masks.items()} == counts
    with self.subTest("n:m, which fixes the sparsity"):
      masks = compiled(
        weights.choose_masks, scores, structure=structures.NM(1, 2)
      )
      for n, m in masks.items():
        pairs = np.asarray(m).reshape(-1, 2, m.shape[1])
        assert (pairs.sum(1) == 1).all()
        first = scores[n].reshape(pairs.shape)
        np.testing.assert_array_equal(pairs[:, 0], first[:, 0] > first[:, 1])
    with self.subTest("blocks"):
      masks = compiled(
        weights.choose_masks,
        scores,
        sparsity=0.5,
        structure=structures.Block((2, 2)),
      )
      assert sum(int(m.sum()) for m in masks.values()) == 28
      assert masks["a"].reshape(4, 2, 2, 2).all((1, 3)).sum() * 4 == (
        masks["a"].sum()
      )

  def test_a_source_network(self):
    scores = {"a": problem.numbers(4, 4), "b": problem.numbers(4, 4, seed=1)}
    source = {"a": np.eye(4, dtype=bool)}
    masks = compiled(weights.choose_masks, scores, sparsity=0.9, where=source)
    assert masks["b"].all() and masks["a"].sum() == 2  # round(1.6)
    assert not (masks["a"] & ~source["a"]).any()
    masks = compiled(weights.choose_masks, scores, sparsity=0.5, where=source)
    np.testing.assert_array_equal(masks["a"], source["a"])  # it has no eight
    below = {n: -1 - np.abs(s) for n, s in scores.items()}
    masks = compiled(weights.choose_masks, below, sparsity=0.9, where=source)
    assert masks["a"].sum() == 2  # no score is as good as not to be there

  @parameterized.parameters(np.nan, np.inf, -np.inf)
  def test_scores_that_are_not_finite_choose_nothing(self, value):
    scores = {"a": problem.numbers(4, 4), "b": problem.numbers(4, 4, seed=1)}
    scores["a"][1, 2] = value
    with pytest.raises(ValueError, match=r"scores must be finite.*'a'"):
      weights.choose_masks(scores, sparsity=0.5)
    if np.isnan(value):  # inside of jit the value is not known
      masks = CHOOSE_LAYERWISE(scores)
      assert masks["a"].all() and masks["b"].sum() == 8
      masks = CHOOSE_GLOBAL(scores)
      assert masks["a"].all() and masks["b"].all()

  def test_vmap(self):
    scores = {"a": problem.numbers(3, 4, 4), "b": problem.numbers(3, 2, 4)}
    got = jax.vmap(CHOOSE_GLOBAL)(scores)
    for i in range(3):
      one = {n: s[i] for n, s in scores.items()}
      problem.assert_bits(
        {n: np.asarray(m[i]) for n, m in got.items()},
        problem.copied(CHOOSE_GLOBAL(one)),
      )

  @parameterized.named_parameters(
    ("high", dict(sparsity=1.5), r"sparsity must be in \[0, 1\], got 1.5"),
    ("schedule", dict(sparsity=lambda t: 0.5), "sparsity must be a Python num"),
    ("none", dict(), "sparsity must be given"),
    ("where", dict(sparsity=0.5, where="c"), "where has a pattern"),
    (
      "source",
      dict(sparsity=0.5, where={"c": np.eye(2, dtype=bool)}),
      r"where\['c'\] must be the mask",
    ),
    (
      "distribution",
      dict(sparsity={"a": 0.5}, distribution="global"),
      "distribution must not be given where sparsity is by path",
    ),
    (
      "unknown",
      dict(sparsity=0.5, distribution="er_k"),
      "distribution must be",
    ),
    (
      "global_fan_in",
      dict(sparsity=0.5, structure=structures.ConstantFanIn()),
      'distribution="global" must have one structure',
    ),
  )
  def test_bad_settings(self, settings, message):
    with pytest.raises(ValueError, match=message):
      weights.choose_masks({"a": np.ones((2, 2), np.float32)}, **settings)

  def test_integer_scores(self):
    with pytest.raises(ValueError, match="scores must be floating, got int32"):
      weights.choose_masks({"a": jnp.ones((2, 2), jnp.int32)}, sparsity=0.5)


def choosing(**settings):
  return problem.jit(functools.partial(weights.choose_masks, **settings))


CHOOSE_17 = [choosing(sparsity=1 - k / 17) for k in range(18)]
CHOOSE_GLOBAL = choosing(sparsity=0.5)
CHOOSE_LAYERWISE = choosing(sparsity=0.5, distribution="uniform")


class SnipTest(parameterized.TestCase):
  def test_equals_the_oracle(self):
    got = problem.jit(functools.partial(weights.snip_scores, loss))(
      LAYERS, BATCH
    )
    want = oracle.snip_scores(LAYERS, *BATCH)
    assert_scores(got, want, atol=1e-6)  # f32 against f64, scores of about 1
    masks = compiled(weights.snip, loss, LAYERS, BATCH, sparsity=0.75)
    keep = SIZE // 4
    assert_masks(masks, oracle.global_masks(oracle.kernels(want), keep))
    # And of the very scores: a global stable argsort.
    flat = np.concatenate([s["kernel"].ravel() for s in got])
    last = np.sort(flat)[-keep]
    ties = np.concatenate([m["kernel"].ravel() for m in masks])
    np.testing.assert_array_equal(ties, flat >= last)

  def test_a_source_network_is_what_is_scored(self):
    """Not the dense one, whose other weights would be felt too."""
    source = weights.random_masks(KEY, LAYERS, sparsity=0.5)
    inside = jax.tree.map(lambda p, m: np.where(m, p, 0), LAYERS, source)
    for method in (weights.snip, weights.grasp):
      made = functools.partial(method, loss, sparsity=0.75, where=source)
      made = problem.jit(made)
      got, want = made(LAYERS, BATCH), made(inside, BATCH)
      problem.assert_bits(problem.copied(got), problem.copied(want))
      some = [layer["kernel"] for layer in got]
      whole = [layer["kernel"] for layer in source]
      assert sum(int(m.sum()) for m in some) == SIZE // 4
      assert all(not (m & ~s).any() for m, s in zip(some, whole))

  def test_the_scale_of_the_loss_changes_nothing(self):
    want = problem.copied(weights.snip(loss, LAYERS, BATCH, sparsity=0.75))
    for scale in (2.0**-40, 2.0**40, 3.7):  # the last one rounds scores anew
      got = weights.snip(
        lambda p, b, scale=scale: scale * loss(p, b),
        LAYERS,
        BATCH,
        sparsity=0.75,
      )
      problem.assert_bits(problem.copied(got), want)

  def test_weights_that_the_loss_does_not_feel_go_by_position(self):
    params = {
      "a": np.ones((2, 3), np.float32),
      "b": np.ones((3, 2), np.float32),
    }
    masks = compiled(
      weights.snip, lambda p, _: 0.0 * p["a"].sum(), params, None, sparsity=0.5
    )
    assert masks["a"].all() and not masks["b"].any()

  def test_a_flax_model_with_an_integer_and_half_precision(self):
    model = Model(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def distance(params, batch):
      x, y = batch
      return jnp.mean((nnx.merge(graph, params, rest)(x) - y) ** 2)

    masks = compiled(weights.snip, distance, params, BATCH, sparsity=0.5)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert masks.first.bias[...].all() and masks.embedding[...].all()
    kept = masks.first.kernel[...].sum() + masks.second.kernel[...].sum()
    assert kept == SIZE // 2
    tx = optax.chain(optax.adamw(0.1), weights.keep_masked(masks))
    state = tx.init(params)
    seen = weights.sparse_params(state, params)
    problem.assert_zeros(seen, masks)

  def test_a_loss_that_is_no_scalar(self):
    for other in (
      lambda p, b: outputs(p, b[0]),
      lambda p, b: (loss(p, b), {}),
      lambda p, b: jnp.int32(loss(p, b)),
    ):
      with pytest.raises(ValueError, match="return a floating scalar"):
        weights.snip(other, LAYERS, BATCH, sparsity=0.5)

  def test_a_gradient_that_is_not_finite(self):
    def broken(p, b):
      return loss(p, b) + jnp.sqrt(jnp.sum(p[0]["kernel"] * 0))

    with pytest.raises(ValueError, match=r"scores must be finite.*0/kernel"):
      weights.snip(broken, LAYERS, BATCH, sparsity=0.5)


class Model(nnx.Module):
  def __init__(self, rngs):
    half = dict(param_dtype=jnp.bfloat16, rngs=rngs)
    self.first = nnx.Linear(5, 7, **half)
    self.second = nnx.Linear(7, 3, **half)
    self.embedding = nnx.Param(jnp.arange(12).reshape(4, 3))

  def __call__(self, x):
    return self.second(jnp.tanh(self.first(x))) + self.embedding[0]


class GraspTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_equals_the_oracle_and_finite_differences(self, biases):
    where = (lambda path, p: True) if biases else None
    score = functools.partial(weights.grasp_scores, loss, where=where)
    got = problem.jit(score)(LAYERS, BATCH)
    want = oracle.grasp_scores(LAYERS, *BATCH, biases=biases)
    if not biases:
      for layer in want:
        layer["bias"][:] = 0
    # f32 against f64; scores are up to about 100.
    assert_scores(got, want, atol=1e-4)
    grads = oracle.gradients(LAYERS, *BATCH)
    if not biases:
      for layer in grads:
        layer["bias"][:] = 0
    product = oracle.hessian_vector_differences(LAYERS, grads, *BATCH)
    for layer, hg, p in zip(got, product, LAYERS):
      np.testing.assert_allclose(
        layer["kernel"], p["kernel"] * hg["kernel"], rtol=1e-4, atol=1e-3
      )

  def test_removes_the_highest_of_the_papers_score(self):
    masks = compiled(weights.grasp, loss, LAYERS, BATCH, sparsity=0.75)
    score = oracle.kernels(oracle.grasp_scores(LAYERS, *BATCH))
    papers = np.concatenate([-s.ravel() for s in score])
    keep = np.zeros(SIZE, bool)
    keep[np.argsort(papers, kind="stable")[: SIZE // 4]] = True
    want = [keep[:35].reshape(5, 7), keep[35:].reshape(7, 3)]
    assert_masks(masks, want)

  def test_only_what_is_sparse_counts(self):
    """The Hessian of one layer, though all have gradients."""
    scores = weights.grasp_scores(loss, LAYERS, BATCH, where="1/kernel")
    assert not scores[0]["kernel"].any() and not scores[1]["bias"].any()
    x = np.tanh(BATCH[0] @ LAYERS[0]["kernel"] + LAYERS[0]["bias"])
    error = x @ LAYERS[1]["kernel"] + LAYERS[1]["bias"] - BATCH[1]
    gradient = 2 * x.T @ error / len(x)
    product = 2 * x.T @ x @ gradient / len(x)  # the loss is quadratic in it
    np.testing.assert_allclose(
      scores[1]["kernel"], LAYERS[1]["kernel"] * product, rtol=1e-4, atol=1e-4
    )


def collapsed(masks):
  """Layers that nothing is left of."""
  return [i for i, m in enumerate(masks) if not m["kernel"].any()]


class SynflowTest(parameterized.TestCase):
  def test_scores_equal_the_oracle(self):
    got = compiled(
      weights.synflow_scores, relu_outputs, LAYERS, jnp.ones((1, 5))
    )
    # Sums of positive numbers: only their rounding.
    assert_scores(got, oracle.synflow_scores(LAYERS), atol=0)

  def test_layers_have_equal_sums(self):
    layers = network(9, 4, 30, 1, 6, 2, bias=False)
    scores = compiled(
      weights.synflow_scores, relu_outputs, layers, jnp.ones((1, 9))
    )
    flow = np.ones((1, 9))
    for layer in layers:
      flow = flow @ np.abs(layer["kernel"]).astype(np.float64)
    for s in scores:
      got = float(np.sum(common.float64(s["kernel"])))
      assert abs(got / flow.sum() - 1) < 1e-5  # f32 products of five layers

  @parameterized.parameters(1, 2, 7)
  def test_masks_equal_the_oracle(self, rounds):
    layers = network(5, 7, 6, 3)
    got = problem.jit(
      functools.partial(
        weights.synflow, relu_outputs, sparsity=0.88, rounds=rounds
      )
    )(layers, jnp.ones((1, 5)))
    want = oracle.synflow_masks(layers, 0.12, rounds)[-1]
    assert_masks(got, want)

  def test_no_layer_collapses_at_999_permille(self):
    # A bottleneck of 4 among layers of 80, drawn with 1 / sqrt(inputs).
    widths = 80, 80, 80, 4, 80, 80, 10
    layers = [
      {"kernel": problem.numbers(a, b, seed=i) / np.sqrt(a, dtype=np.float32)}
      for i, (a, b) in enumerate(itertools.pairwise(widths))
    ]
    sizes = [layer["kernel"].size for layer in layers]
    keep = round(0.001 * sum(sizes))
    masks = problem.jit(
      functools.partial(weights.synflow, linear_outputs, sparsity=0.999)
    )(layers, jnp.ones((1, 80)))
    assert sum(int(m["kernel"].sum()) for m in masks) == keep
    assert not collapsed(masks)
    # Every weight that is left lies on a path: it has a part in the flow.
    left = [
      {"kernel": p["kernel"] * m["kernel"]} for p, m in zip(layers, masks)
    ]
    flow = compiled(
      weights.synflow_scores, linear_outputs, left, jnp.ones((1, 80))
    )
    for s, m in zip(flow, masks):
      assert (np.asarray(s["kernel"]) > 0)[np.asarray(m["kernel"])].all()
    magnitude = compiled(
      weights.choose_masks, jax.tree.map(np.abs, layers), sparsity=0.999
    )
    batch = problem.numbers(32, 80, seed=30), problem.numbers(32, 10, seed=31)
    snip = compiled(
      weights.snip,
      functools.partial(loss, act=jax.nn.relu),
      layers,
      batch,
      sparsity=0.999,
    )
    assert collapsed(magnitude) and collapsed(snip)

  def test_rounds_are_one_loop(self):
    def program(rounds):
      prune = functools.partial(
        weights.synflow, relu_outputs, sparsity=0.5, rounds=rounds
      )
      text = str(jax.make_jaxpr(prune)(LAYERS, jnp.ones((1, 5))))
      return len(re.findall("dot_general", text)), text.count("while[")

    assert program(3) == program(90)

  @parameterized.parameters((2.0**30, 2.0**-100), (2.0**-30, 2.0**100))
  def test_flows_beyond_float32(self, scale, inputs):
    layers = network(6, 5, 5, 5, 5, 5, 2, bias=False)
    prune = functools.partial(
      weights.synflow, linear_outputs, sparsity=0.8, rounds=3
    )
    # Scaled by a power of two, layers score as before, but for a factor.
    scaled = jax.tree.map(lambda p: p * np.float32(scale), layers)
    ones = jnp.ones((1, 6))
    with pytest.raises(ValueError, match="apply must give outputs whose sum"):
      prune(scaled, ones)
    prune = problem.jit(prune)
    assert all(m["kernel"].all() for m in prune(scaled, ones))
    problem.assert_bits(
      problem.copied(prune(scaled, inputs * ones)),
      problem.copied(prune(layers, ones)),
    )

  def test_a_budget_that_leaves_no_path(self):
    layers = network(3, 20, 1, 20, 2, bias=False)
    with pytest.raises(ValueError, match="above 0 and finite"):
      weights.synflow(
        linear_outputs,
        layers,
        jnp.ones((1, 3)),
        sparsity={"1/kernel": 0.999, "2/kernel": 0.5},
        rounds=3,
      )

  def test_what_is_pruned_stays_so(self):
    """Though what is left, its path cut, has no more flow than it has."""
    layers = {"a": np.float32([[1, 2, 3]]), "b": np.float32([[1], [2], [3]])}
    # 2 and 3 are left in round 1, 2 and 2, 1 and 2, and 1 and 2 in round 4:
    # the second of b has then lost its input.
    masks = compiled(
      weights.synflow,
      lambda p, x: x @ p["a"] @ p["b"],
      layers,
      jnp.ones((1, 1)),
      sparsity={"a": 0.7, "b": 0.4},
      rounds=4,
    )
    assert masks["a"].ravel().tolist() == [False, False, True]
    assert masks["b"].ravel().tolist() == [False, True, True]

  def test_structures_and_sources(self):
    layers = network(8, 8, 4, bias=False)
    prune = functools.partial(weights.synflow, linear_outputs, rounds=3)
    ones = jnp.ones((1, 8))
    masks = compiled(prune, layers, ones, structure=structures.NM(2, 4))
    for m in masks:
      groups = np.asarray(m["kernel"]).reshape(2, 4, -1)
      assert (groups.sum(1) == 2).all()
    source = weights.random_masks(KEY, layers, sparsity=0.5)
    masks = compiled(prune, layers, ones, sparsity=0.75, where=source)
    assert sum(int(m["kernel"].sum()) for m in masks) == 24
    for m, s in zip(masks, source):
      assert not (m["kernel"] & ~s["kernel"]).any()

  @parameterized.named_parameters(
    ("none_left", dict(sparsity=1.0), "sparsity must be below 1"),
    (
      "rounds",
      dict(sparsity=0.5, rounds=0),
      "rounds must be at least 1, got 0",
    ),
    ("float", dict(sparsity=0.5, rounds=2.0), "rounds must be an integer"),
  )
  def test_bad_settings(self, settings, message):
    with pytest.raises(ValueError, match=message):
      weights.synflow(relu_outputs, LAYERS, jnp.ones((1, 5)), **settings)


SHAPES = {
  "conv": (3, 3, 4, 8),
  "dense": (40, 30),
  "head": (30, 2),
  "zbias": (30,),
}
PARAMS = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
SPARSE = [n for n in SHAPES if n != "zbias"]
TOTAL = sum(PARAMS[n].size for n in SPARSE)


class RandomMasksTest(parameterized.TestCase):
  @parameterized.product(
    distribution=("uniform", "er", "erk", "balanced", "pyramidal"),
    bernoulli=(False, True),
  )
  def test_densities_are_those_asked_for(self, distribution, bernoulli):
    sparsity = 0.4  # some layers are capped at 1
    draw = functools.partial(
      weights.random_masks,
      sparsity=sparsity,
      distribution=distribution,
      bernoulli=bernoulli,
    )
    masks = problem.copied(problem.jit(draw)(KEY, PARAMS))
    assert masks["zbias"].all()
    shapes = {n: SHAPES[n] for n in SPARSE}
    density = budgets.BUDGETS[distribution](shapes, 1 - sparsity)
    deviation = 0.0
    for n, d in density.items():
      count, size = int(masks[n].sum()), PARAMS[n].size
      low, high = oracle.binomial_range(size, d)
      if bernoulli:
        assert low <= count <= high, (n, count)
      else:
        assert abs(count - d * size) < 1, (n, count)
      if d == 1:
        assert masks[n].all()
      deviation += size * d * (1 - d)
    count = sum(int(masks[n].sum()) for n in SPARSE)
    within = 5 * deviation**0.5 if bernoulli else 0.5
    assert abs(count - (1 - sparsity) * TOTAL) <= within

  def test_draws(self):
    for bernoulli in (False, True):
      draw = functools.partial(
        weights.random_masks, sparsity=0.5, bernoulli=bernoulli
      )
      draw = problem.jit(draw)
      one, same, other = (
        problem.copied(draw(jax.random.key(i), PARAMS)) for i in (0, 0, 1)
      )
      problem.assert_bits(one, same)
      assert all((one[n] != other[n]).any() for n in ("conv", "dense"))
      # No two parameters share their draws.
      assert (one["conv"].ravel()[:60] != one["dense"].ravel()[:60]).any()

  def test_bernoulli_compares_uniform_numbers(self):
    got = compiled(
      weights.random_masks, KEY, PARAMS, sparsity={"dense": 0.7}, bernoulli=True
    )
    # The second of the sparse parameters by name.
    key = jax.random.fold_in(jax.random.fold_in(KEY, 0), 1)
    numbers = jax.random.uniform(key, SHAPES["dense"])
    want = oracle.bernoulli_mask(np.asarray(numbers), np.float32(1 - 0.7))
    np.testing.assert_array_equal(got["dense"], want)
    assert got["conv"].all() and got["head"].all()

  def test_bernoulli_draws_within_a_source(self):
    """Counts are right on average there too, for each layer of a stack."""
    params = {"stack": np.zeros((2, 40, 20), np.float32)}
    source = {"stack": np.ones((2, 40, 20), bool)}
    source["stack"][1, 20:] = False
    masks = weights.random_masks(
      KEY,
      params,
      sparsity=0.7,
      bernoulli=True,
      where=source,
      axes=structures.Axes(stack=(0,)),
    )
    counts = np.asarray(masks["stack"]).sum((1, 2))
    for count, (size, share) in zip(counts, ((800, 0.3), (400, 0.6))):
      low, high = oracle.binomial_range(size, share)
      assert low <= count <= high
    assert not (masks["stack"] & ~source["stack"]).any()

  def test_they_are_those_of_static(self):
    tx = weights.static(optax.sgd(0.1), sparsity=0.8, key=KEY)

    @problem.jit
    def both(params):
      drawn = weights.random_masks(KEY, params, sparsity=0.8)
      return drawn, weights.masks(tx.init(params), params)

    problem.assert_bits(*problem.copied(both(PARAMS)))

  def test_layers_of_a_stack_are_drawn_each(self):
    params = {"stack": np.zeros((3, 40, 20), np.float32)}
    draw = functools.partial(
      weights.random_masks,
      KEY,
      params,
      sparsity=0.5,
      distribution="pyramidal",
      axes=structures.Axes(stack=(0,)),
    )
    q = budgets.pyramidal({str(i): (40, 20) for i in range(3)}, 0.5)
    exact = np.asarray(draw()["stack"]).sum((1, 2))
    loose = np.asarray(draw(bernoulli=True)["stack"]).sum((1, 2))
    for d, e, b in zip(q.values(), exact, loose):
      assert abs(e - 800 * d) < 1
      low, high = oracle.binomial_range(800, d)
      assert low <= b <= high

  @parameterized.named_parameters(
    ("key", dict(key=0, sparsity=0.5), "key must be a PRNG key"),
    ("no_key", dict(key=None, sparsity=0.5), "key must be given"),
    (
      "global",
      dict(key=KEY, sparsity=0.5, distribution="global", bernoulli=True),
      'distribution must not be "global"',
    ),
    ("high", dict(key=KEY, sparsity=2), r"sparsity must be in \[0, 1\]"),
  )
  def test_bad_settings(self, settings, message):
    with pytest.raises(ValueError, match=message):
      weights.random_masks(params=PARAMS, **settings)


class SparsitiesTest(parameterized.TestCase):
  def test_static_draws_the_same_ratios(self):
    # Names of which one is in the other, and one with a dot.
    params = {
      "a": problem.numbers(6, 7),
      "b": {"a": problem.numbers(7, 5, seed=1), "a.a": problem.numbers(5, 3)},
      "bias": problem.numbers(5, seed=2),
    }
    masks = compiled(weights.choose_masks, params, sparsity=0.6)
    got = weights.sparsities(masks)
    assert list(got) == ["^a$", "^b/a$", r"^b/a\.a$"]
    want = oracle.sparsities({"a": np.asarray(masks["a"])})
    assert got["^a$"] == want["a"]
    tx = weights.static(optax.sgd(0.1), sparsity=got, key=KEY)
    drawn = weights.masks(tx.init(params), params)
    count = functools.partial(jax.tree.map, lambda m: int(m.sum()))
    assert count(drawn) == count(masks)
    assert (drawn["a"] != masks["a"]).any()

  def test_dense_parameters_stay_so(self):
    masks = {"w": np.ones((2, 2), bool), "v": np.zeros((2, 2), bool)}
    assert weights.sparsities(masks) == {"^v$": 1.0}

  def test_bad_masks(self):
    with pytest.raises(ValueError, match=r"masks must be boolean.*'w'"):
      weights.sparsities({"w": np.ones((2, 2))})
    with pytest.raises(ValueError, match="masks must be concrete"):
      jax.jit(weights.sparsities)({"w": np.ones((2, 2), bool)})


class RescaleFanInTest(parameterized.TestCase):
  def test_equals_the_oracle(self):
    params = {
      "conv": problem.numbers(3, 3, 2, 5),
      "dense": problem.numbers(6, 4, seed=1),
      "other": problem.numbers(6, 4, seed=2),
    }
    masks = {
      n: problem.numbers(*params[n].shape, seed=9) > 0.5
      for n in ("conv", "dense")
    }
    masks["dense"][:, 1] = False
    masks["dense"][:, 2] = True
    got = weights.rescale_fan_in(params, masks)
    for n in masks:
      want = oracle.rescale_fan_in(params[n], masks[n])
      np.testing.assert_allclose(got[n], want, rtol=1e-6)  # f32 roots
      assert not problem.bits(got[n])[~masks[n]].any()
    problem.assert_bits(got["other"], params["other"])
    np.testing.assert_array_equal(got["dense"][:, 2], params["dense"][:, 2])

  def test_stacks_and_half_precision(self):
    params = {"stack": jnp.ones((2, 4, 3), jnp.bfloat16)}
    mask = np.ones((2, 4, 3), bool)
    mask[1, 1:] = False
    got = weights.rescale_fan_in(
      params, {"stack": mask}, axes=structures.Axes(stack=(0,))
    )["stack"]
    assert got.dtype == jnp.bfloat16
    assert (got[0] == 1).all() and (got[1, 0] == 2).all()

  def test_a_mask_of_nothing(self):
    for masks in {"v": np.ones((2, 2), bool)}, {"w": np.ones((3, 2), bool)}:
      with pytest.raises(ValueError, match="must be the mask of a parameter"):
        weights.rescale_fan_in({"w": jnp.ones((2, 2))}, masks)


AUTO, EXPLICIT = common.AXIS_TYPES
SHARDED = network(8, 16, 8, bias=False)
SPECS = [jax.P(None, "y"), jax.P("y", None)]


def whole(seed, *shape):
  """Numbers of which no sum in these tests is rounded."""
  return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


class ShardedTest(parameterized.TestCase):
  """On eight devices the masks are those of one, and no weight moves."""

  @parameterized.parameters("snip", "grasp", "synflow")
  def test_methods(self, name):
    layers = [{"kernel": whole(1, 8, 16)}, {"kernel": whole(2, 16, 8)}]
    batch = np.eye(8, dtype=np.float32), whole(3, 8, 8)
    square = functools.partial(loss, act=lambda z: z)
    if name == "synflow":
      batch = np.ones((4, 8), np.float32)
      method = functools.partial(weights.synflow, linear_outputs, rounds=3)
    else:
      method = functools.partial(getattr(weights, name), square)
    method = problem.jit(functools.partial(method, sparsity=0.7))
    want = problem.copied(method(layers, batch))
    mesh = common.mesh_of(AUTO)
    with jax.set_mesh(mesh):
      put = [
        {"kernel": common.place(p["kernel"], mesh, s)}
        for p, s in zip(layers, SPECS)
      ]
      batch = jax.tree.map(
        lambda x: common.place(x, mesh, jax.P("x", None)), batch
      )
      program = method.lower(put, batch).compile()
      got = program(put, batch)
      problem.assert_bits(problem.copied(got), want)
      for m, s in zip(got, SPECS):
        assert m["kernel"].sharding.is_equivalent_to(
          jax.NamedSharding(mesh, s), 2
        )
    assert not common.moved(program)
    # Nothing as large as a Hessian of these 256 weights either.
    sizes = re.findall(r"f32\[([\d,]+)\]", program.as_text())
    largest = max(np.prod([int(d) for d in s.split(",")]) for s in sizes)
    assert largest <= 8 * 16

  @parameterized.parameters(AUTO, EXPLICIT)
  def test_scores_and_draws(self, axis_type):
    scores = [problem.numbers(8, 16), problem.numbers(16, 8, seed=1)]
    specs = [jax.P("x", "y"), jax.P("y", "x")]

    @problem.jit
    def made(scores):
      ranked = weights.choose_masks(scores, sparsity=0.7)
      grouped = weights.choose_masks(scores, structure=structures.NM(1, 2))
      drawn = weights.random_masks(KEY, scores, sparsity=0.7)
      loose = weights.random_masks(KEY, scores, sparsity=0.7, bernoulli=True)
      scaled = weights.rescale_fan_in(scores, drawn)
      return ranked, grouped, drawn, loose, scaled

    want = problem.copied(made(scores))
    mesh = common.mesh_of(axis_type)
    with jax.set_mesh(mesh):
      put = [common.place(s, mesh, p) for s, p in zip(scores, specs)]
      program = made.lower(put).compile()
      got = program(put)
      problem.assert_bits(problem.copied(got), want)
      if axis_type == EXPLICIT:
        for tree in got:
          assert [x.sharding.spec for x in tree] == specs
    assert not common.moved(program)
