"""Source networks: whatever a method does, masks stay subsets of them."""

import functools
import tempfile

from absl.testing import parameterized
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sparsejax import weights
from sparsejax.select import budgets
from sparsejax.select import structures
from tests import common
from tests.weights import problem

KEY = jax.random.key(0)
SHAPES = {n: p.shape for n, p in problem.start().items()}
SIZES = {n: int(np.prod(s)) for n, s in SHAPES.items()}
STEPS = 6


def drawn(share, seed=7):
  """A network of about this share, and a bias that is whole."""
  rng = np.random.default_rng(seed)
  source = {n: rng.random(SHAPES[n]) < share for n in problem.SPARSE}
  return source | {"bias": np.ones(SHAPES["bias"], bool)}


SOURCE = drawn(0.5)


def growing(make, **settings):
  given = dict(sparsity=0.75, every=2, until=9, key=KEY)
  return functools.partial(make, **given | settings)


# Those that enforce masks, and those that keep dense weights.
ENFORCED = dict(
  static=functools.partial(weights.static, sparsity=0.75, key=KEY),
  gradual_magnitude=functools.partial(
    weights.gradual_magnitude, sparsity=0.75, begin=2, until=6, every=2
  ),
  set_=growing(weights.set_),
  rigl=growing(weights.rigl),
  rigl_itop=growing(weights.rigl_itop, every=2),
  rigl_global=growing(weights.rigl, distribution="global"),
  rigl_block=growing(weights.rigl, structure=structures.Block((2, 2))),
  rigl_channel=growing(
    weights.rigl, structure=structures.Channel(), drop_fraction=0.5
  ),
  srigl=growing(weights.srigl),
  dst_ee=growing(weights.dst_ee, c=0.1),
)
DENSE = dict(
  top_kast=functools.partial(
    weights.top_kast, sparsity=0.75, backward_sparsity=0.5
  ),
  sr_ste=functools.partial(weights.sr_ste, n=2, m=4, decay=0.01),
  mask_decay=functools.partial(weights.mask_decay, n=1, m=2, until=4),
  structure_decay=functools.partial(weights.structure_decay, n=1, m=4, until=6),
  iss_p=functools.partial(weights.iss_p, sparsity=0.75, until=4, factor=0.5),
)
CASES = ENFORCED | DENSE
RARER = ("dst_ee", "rigl_channel", "structure_decay", "rigl_itop")


@functools.cache
def run_of(name, network=None):
  """A run in a source network; the whole of one where it is named."""
  source = SOURCE
  if network == "whole":
    source = jax.tree.map(np.ones_like, SOURCE)
  tx = CASES[name](optax.adam(0.05), where=source)
  return problem.Run(tx, STEPS, enforced=name in ENFORCED)


class SubsetsTest(parameterized.TestCase):
  @parameterized.parameters(*[n for n in CASES if n not in RARER])
  def test_every_mask(self, name):
    self.check(name)

  @parameterized.parameters(*RARER)
  @pytest.mark.slow
  def test_every_mask_too(self, name):
    self.check(name)

  def check(self, name):
    run = run_of(name)
    for t in range(STEPS + 1):
      masks, seen, state = run.masks[t], run.seen[t], run.states[t]
      assert masks["bias"].all()
      assert state.violations == 0
      for n in problem.SPARSE:
        outside = ~SOURCE[n]
        assert masks[n].any() and not (masks[n] & outside).any(), (t, n)
        assert not problem.bits(seen[n])[outside].any(), (t, n)
        if t or name in ENFORCED:  # there is nothing behind the masks either
          assert not problem.bits(run.params[t][n])[outside].any()
        # Its optimizer has never heard of what is outside.
        assert not state.inner[0].mu[n][outside].any()
        for extra in (state.backward, state.explored):
          if extra is not None:
            wider = problem.unpacked(extra, run.params[t])[n]
            assert not (wider & outside).any()
            assert not (masks[n] & ~wider).any()
      source = problem.unpacked(state.source, run.params[t])
      problem.assert_bits(source, SOURCE)

  def test_counts(self):
    """The budget where the source has it, and all of the source elsewhere."""
    run = run_of("rigl")
    density = budgets.erk({n: SHAPES[n] for n in problem.SPARSE}, 0.25)
    budget = budgets.largest_remainder(
      {n: d * SIZES[n] for n, d in density.items()}
    )
    for masks in run.masks:
      for n in problem.SPARSE:
        assert masks[n].sum() == min(budget[n], SOURCE[n].sum())
    moved = [run.masks[0][n] ^ run.masks[-1][n] for n in problem.SPARSE]
    assert any(m.any() for m in moved)

  def test_a_source_smaller_than_the_budget_is_kept(self):
    source = drawn(0.1)
    for name in ("rigl", "rigl_global", "top_kast"):
      tx = CASES[name](optax.sgd(0.1), where=source)

      @problem.jit
      def two_steps(params, tx=tx):
        state = tx.init(params)
        first = weights.masks(state, params)
        params = weights.sparse_params(state, params)
        for _ in range(3):
          _, state = tx.update(
            jax.tree.map(lambda p: p + 1, params), state, params
          )
        return first, weights.masks(state, params)

      for masks in problem.copied(two_steps(problem.start())):
        problem.assert_bits(masks, source)

  @parameterized.parameters("rigl", "sr_ste")
  def test_a_whole_source_changes_nothing(self, name):
    got = run_of(name, "whole")
    tx = CASES[name](optax.adam(0.05))
    want = problem.Run(tx, STEPS, enforced=name in ENFORCED)
    for t in range(STEPS + 1):
      problem.assert_bits(got.params[t], want.params[t])
      problem.assert_bits(got.masks[t], want.masks[t])
      assert want.states[t].source is None

  def test_part_of_the_tree_names_what_is_sparse(self):
    embedded = {"embed": problem.numbers(8, 4), "w": problem.numbers(4, 4)}

    def started(where):
      tx = weights.static(optax.sgd(0.1), sparsity=0.5, key=KEY, where=where)
      return problem.jit(lambda p: weights.masks(tx.init(p), p))(embedded)

    eye = np.eye(4, dtype=bool)
    masks = started({"w": eye})
    assert masks["embed"].all() and masks["w"].sum() == 4
    # What is dense by default is sparse where the source masks some of it,
    masks = started({"embed": np.tri(8, 4, dtype=bool)})
    assert masks["w"].all() and masks["embed"].sum() == 16
    # and dense where it does not.
    masks = started({"embed": np.ones((8, 4), bool), "w": eye})
    assert masks["embed"].all() and masks["w"].sum() == 4

  def test_leaks_stop_at_the_source(self):
    run = run_of("mask_decay")
    leaks = [float(s.leak) for s in run.states]
    assert 0 < leaks[1] < 1
    a, masks = run.seen[1]["a"], run.masks[1]["a"]
    inside = SOURCE["a"] & ~masks
    np.testing.assert_allclose(a[inside], leaks[1] * run.params[1]["a"][inside])
    assert a[inside].any() and not a[~SOURCE["a"]].any()


class StateTest(parameterized.TestCase):
  def test_a_restored_run_goes_on_bit_for_bit(self):
    run = run_of("rigl")
    saved = jax.tree.map(jnp.array, (run.params[3], run.states[3]))
    with (
      tempfile.TemporaryDirectory() as folder,
      ocp.StandardCheckpointer() as checkpointer,
    ):
      checkpointer.save(folder + "/checkpoint", saved)
      checkpointer.wait_until_finished()
      now = checkpointer.restore(
        folder + "/checkpoint", jax.eval_shape(lambda: saved)
      )
    for _ in range(3, STEPS):
      now = run.step(*now[:2])
    problem.assert_bits(problem.copied(now[0]), run.params[-1])
    problem.assert_bits(problem.copied(now[1]), run.states[-1])

  def test_donation_and_shapes(self):
    params = {"odd": problem.numbers(5, 3), "even": problem.numbers(8, 3)}
    source = {n: np.tri(*p.shape, dtype=bool) for n, p in params.items()}
    tx = weights.gradual_magnitude(
      optax.sgd(0.1), sparsity=0.5, begin=0, until=4, every=2, where=source
    )
    state = tx.init(jax.tree.map(jnp.asarray, params))  # starts as the source

    @functools.partial(problem.jit, donate_argnums=0)
    def step(state, params):
      return tx.update(params, state, params)[1]

    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert jax.tree.leaves(tx.init(jax.eval_shape(lambda: params))) == (
      jax.tree.leaves(shapes)
    )
    after = step(state, params)  # no buffer is in the state twice
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(
      lambda s: jax.typeof(jnp.zeros(s.shape, s.dtype)), shapes
    )
    specs = {n: jax.P(n) for n in params}
    got = optax.tree.map_params(
      tx, lambda _, s: s, shapes, specs, transform_non_params=lambda _: jax.P()
    )
    assert got.source == got.masks == specs

  def test_a_step_unpacks_none(self):
    """A bit a weight is what it costs: most steps do not even read it."""
    params = {"w": jnp.ones((256, 512))}
    temporary = {}
    for where in ("w", {"w": np.tri(256, 512, dtype=bool)}):
      tx = weights.rigl(
        optax.adam(0.1),
        sparsity=0.9,
        every=100,
        until=900,
        key=KEY,
        where=where,
      )
      state = jax.eval_shape(tx.init, params)
      step = jax.jit(lambda s, p, tx=tx: tx.update(p, s, p))
      memory = step.lower(state, params).compile().memory_analysis()
      temporary[type(where)] = memory.temp_size_in_bytes
    # As masks of bool it would be 131,072.
    assert temporary[dict] - temporary[str] < 256 * 512 // 8

  def test_nnx(self):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    source = weights.random_masks(KEY, params, sparsity=0.5)
    tx = weights.rigl(
      optax.sgd(0.1), sparsity=0.75, every=1, until=9, key=KEY, where=source
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(model, weights.sparse_params(optimizer.opt_state, params))

    @nnx.jit
    def step(model, optimizer):
      grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8))) ** 2))(model)
      optimizer.update(model, grads)

    for _ in range(3):
      step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    masks = weights.masks(optimizer.opt_state, params)
    assert masks["kernel"][...].sum() == 8 and masks["bias"][...].all()
    assert not (masks["kernel"][...] & ~source["kernel"][...]).any()
    problem.assert_zeros(params, masks)

  def test_vmap(self):
    params = {"w": problem.numbers(3, 8, 4)}
    source = {"w": np.arange(32).reshape(8, 4) % 3 > 0}
    tx = weights.set_(
      optax.sgd(0.1), sparsity=0.5, every=1, key=KEY, where=source
    )

    @problem.jit
    def trained(params):
      state = tx.init(params)
      for _ in range(2):
        ups, state = tx.update(params, state, params)
        params = optax.apply_updates(params, ups)
      return weights.masks(state, params)

    got = jax.vmap(trained)(params)["w"]
    for i in range(3):
      want = trained({"w": params["w"][i]})["w"]
      np.testing.assert_array_equal(got[i], want)
      assert want.sum() == 16 and not (want & ~source["w"]).any()

  @parameterized.parameters(*common.AXIS_TYPES)
  def test_eight_devices(self, axis_type):
    # `a` is packed along its shards, `b` stays bool.
    params = {"a": problem.numbers(32, 8), "b": problem.numbers(4, 8, seed=1)}
    specs = {"a": jax.P("x", "y"), "b": jax.P("x", "y")}
    rng = np.random.default_rng(0)
    source = {n: rng.random(p.shape) < 0.5 for n, p in params.items()}
    make = functools.partial(
      weights.rigl, optax.sgd(0.1), sparsity=0.75, every=1, until=9, key=KEY
    )
    tx = make(where=source)

    def begun(params, source):
      @problem.jit
      def begin(params):
        state = make(where=source).init(params)
        return weights.sparse_params(state, params), state

      return begin(params)

    @problem.jit
    def step(params, state, grads):
      ups, state = tx.update(grads, state, params)
      return optax.apply_updates(params, ups), state

    want = first = begun(params, source)
    for _ in range(2):
      want = step(*want, params)
    mesh = common.mesh_of(axis_type)
    with jax.set_mesh(mesh):
      put = {n: common.place(p, mesh, specs[n]) for n, p in params.items()}
      # Wherever the source lies.
      apart = {n: common.place(m, mesh, jax.P("y")) for n, m in source.items()}
      problem.assert_bits(
        problem.copied(begun(put, apart)), problem.copied(first)
      )
      now = begun(put, source)
      program = step.lower(*now, put).compile()
      for _ in range(2):
        now = program(*now, put)
      problem.assert_bits(problem.copied(now), problem.copied(want))
      if axis_type == common.AXIS_TYPES[1]:
        assert now[1].source["a"].sharding.spec == specs["a"]
    assert not common.moved(program)

  def test_keep_masked_has_none(self):
    tx = weights.keep_masked({"a": SOURCE["a"]})
    assert tx.init(problem.start()).source is None


class BadSourcesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("dtype", {"a": np.ones((16, 8))}, "tree of boolean masks, got float64"),
    ("number", 3, "where must be a pattern, a function, or a tree.*got 3"),
    ("empty", {}, "where must have masks, got {}"),
    ("name", {"c": np.eye(3, dtype=bool)}, r"where\['c'\] must be the mask"),
    ("shape", {"a": np.eye(3, dtype=bool)}, r"where\['a'\] must be the mask"),
    ("only_ones", {"bias": np.ones(24, bool)}, "where must select"),
    ("none", {"a": None}, "where must have masks"),
  )
  def test_at_init_at_the_latest(self, where, message):
    with pytest.raises(ValueError, match=message):
      tx = weights.static(optax.sgd(0.1), sparsity=0.5, key=KEY, where=where)
      jax.eval_shape(tx.init, problem.start())

  def test_masks_without_values(self):
    def init(source):
      tx = weights.static(optax.sgd(0.1), sparsity=0.5, key=KEY, where=source)
      return tx.init(problem.start())

    with pytest.raises(ValueError, match="where must be concrete masks"):
      jax.eval_shape(init, SOURCE)
    jax.eval_shape(lambda: init(SOURCE))  # made inside of jit, of known masks


class ExploredTest(parameterized.TestCase):
  def test_equals_the_union_of_all_masks(self):
    run = run_of("rigl_itop")
    share = problem.jit(weights.explored_share)
    ever = {n: np.zeros(SHAPES[n], bool) for n in problem.SPARSE}
    shares = []
    for t in range(STEPS + 1):
      for n in ever:
        ever[n] |= run.masks[t][n]
      want = sum(m.sum() for m in ever.values()) / sum(
        m.size for m in ever.values()
      )
      shares.append(float(share(run.states[t], run.params[t])))
      assert abs(shares[-1] - want) < 1e-6  # a quotient in f32
    assert shares[0] < shares[-1] < 0.5 + 0.1  # not more than the source has
    one = weights.explored_share(run.states[-1], run.params[-1], where="^a$")
    assert abs(float(one) - ever["a"].mean()) < 1e-6

  def test_it_is_rigl(self):
    settings = dict(sparsity=0.75, every=2, until=9, key=KEY)
    rigl = weights.rigl(
      optax.sgd(0.1), drop_fraction=0.5, track_explored=True, **settings
    )
    itop = weights.rigl_itop(optax.sgd(0.1), **settings)
    want, got = problem.Run(rigl, 4), problem.Run(itop, 4)
    problem.assert_bits(got.states[-1], want.states[-1])

  def test_bad_input(self):
    tx = weights.rigl(
      optax.sgd(0.1), sparsity=0.5, every=2, until=9, key=KEY, where="^a$"
    )
    state = jax.eval_shape(tx.init, problem.start())
    with pytest.raises(ValueError, match="must have tracked"):
      weights.explored_share(state, problem.start())
