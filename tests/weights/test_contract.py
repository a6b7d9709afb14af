"""What holds of every rule, with every optimizer, container and mesh."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
import tempfile

from absl.testing import parameterized
from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from optax import contrib
import orbax.checkpoint as ocp
import pytest

from sparsejax import masks as masks_lib
from sparsejax import weights
from sparsejax.select import structures
from tests.oracles import select as select_oracle
from tests.weights import problem

KEY = jax.random.key(0)
STEPS = 8
SPECS = {"a": P("fsdp", "tp"), "b": P("fsdp", "tp"), "bias": P("tp")}


def start():
  """On four rows of devices, a shard of `b` ends within a byte of its mask."""
  return {
    "a": problem.numbers(32, 24, seed=1),
    "b": problem.numbers(24, 4, seed=2),
    "bias": problem.numbers(4, seed=3),
  }


def gradient(step):
  """The same on every mesh: what a model makes of it is not at stake."""
  shapes = {n: p.shape for n, p in start().items()}
  return {
    n: problem.numbers(*s, seed=100 + 7 * step + i)
    for i, (n, s) in enumerate(shapes.items())
  }


# ERK gives these to weights of (32, 24) and (24, 4) at density 1/4.
ERK = {"a": 144, "b": 72}


def at(*stages):
  """Counts by the state's count: ((from, a, b), ...)."""

  def counts(count):
    now = [(a, b) for begin, a, b in stages if count >= begin][-1]
    return dict(zip("ab", now))

  return counts


ERK_COUNTS = at((0, ERK["a"], ERK["b"]))


@dataclasses.dataclass(frozen=True)
class Case:
  """A rule and what it promises.

  Attributes:
    make: wraps an optimizer.
    counts: active weights of each sparse parameter at a count of updates.
    enforced: whether masked parameters are zero themselves.
    moves: whether its masks change in the run.
    together: whether only the sum of `counts` is promised.
    straddles: whether a group of the structure lies on two shards of `b`.
  """

  make: Callable
  counts: Callable = ERK_COUNTS
  enforced: bool = True
  moves: bool = True
  together: bool = False
  straddles: bool = False


def growing(make, **settings):
  return functools.partial(
    make, sparsity=0.75, every=2, until=9, key=KEY, **settings
  )


CASES = dict(
  static=Case(
    functools.partial(weights.static, sparsity=0.75, every=2, key=KEY),
    moves=False,
  ),
  gradual_magnitude=Case(
    functools.partial(
      weights.gradual_magnitude, sparsity=0.75, begin=2, until=6, every=2
    ),
    at((0, 768, 96), (5, 264, 33), (7, 192, 24)),
  ),
  set_=Case(growing(weights.set_)),
  rigl=Case(growing(weights.rigl)),
  rigl_global=Case(growing(weights.rigl, distribution="global"), together=True),
  rigl_block=Case(
    growing(weights.rigl, structure=structures.Block((4, 2))), straddles=True
  ),
  rigl_channel=Case(
    growing(
      weights.rigl,
      structure=structures.Channel(),
      distribution="uniform",
      drop_fraction=0.5,
    ),
    at((0, 6 * 32, 1 * 24)),
  ),
  srigl=Case(growing(weights.srigl, ablate=0.0)),
  dst_ee=Case(growing(weights.dst_ee, c=0.1)),
  top_kast=Case(
    functools.partial(weights.top_kast, sparsity=0.75, backward_sparsity=0.5),
    at((0, 192, 24)),
    enforced=False,
  ),
  sr_ste=Case(
    functools.partial(weights.sr_ste, n=1, m=2, decay=0.01),
    at((0, 384, 48)),
    enforced=False,
  ),
  sr_ste_2_4=Case(
    functools.partial(weights.sr_ste, n=2, m=4, decay=0.01),
    at((0, 384, 48)),
    enforced=False,
    straddles=True,
  ),
  mask_decay=Case(
    functools.partial(weights.mask_decay, n=1, m=2, until=6),
    at((0, 384, 48)),
    enforced=False,
  ),
  iss_p=Case(
    functools.partial(weights.iss_p, sparsity=0.75, factor=0.5, until=6),
    at((0, 192, 24)),
    enforced=False,
  ),
  structure_decay=Case(
    functools.partial(weights.structure_decay, n=1, m=4, until=6),
    at((0, 576, 72), (3, 384, 48), (6, 192, 24)),
    enforced=False,
    straddles=True,
  ),
)


def beginning(tx, enforced):
  def begin(params):
    state = tx.init(params)
    if enforced:
      params = weights.sparse_params(state, params)
    return params, state, *problem.look(params, state)

  return begin


def stepping(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, *problem.look(params, state)

  return step


def types(tree):
  """Shapes, dtypes, weak types and explicit shardings."""
  return jax.tree.map(jax.typeof, tree)


class Reference:
  """A run on one device: params, state, seen and masks, before and after."""

  def __init__(self, name):
    case = CASES[name]
    self.tx = case.make(optax.adam(0.05))
    begin = problem.jit(beginning(self.tx, case.enforced))
    self.step = problem.jit(stepping(self.tx), donate_argnums=(0, 1))
    now = begin(start())
    self.types = types(now[:2])
    self.history = [problem.copied(now)]
    for t in range(STEPS):
      now = self.step(*now[:2], gradient(t))
      self.history.append(problem.copied(now))
    self.types_after = types(now[:2])
    self.cache_size = self.step._cache_size()
    self.params, self.states, self.seen, self.masks = zip(*self.history)

  def resumed(self, params, state, begin):
    """What the run ends in when it goes on from there."""
    now = jax.tree.map(jnp.array, (params, state))
    for t in range(begin, STEPS):
      now = self.step(*now[:2], gradient(t))
    return problem.copied(now)

  def at_once(self, t, grads):
    """One step from step t on, with other gradients."""
    now = jax.tree.map(jnp.array, self.history[t][:2])
    return problem.copied(self.step(*now, grads))


reference = functools.cache(Reference)


# Near to others in the table, for make test-all.
RARER_ON_MESHES = (
  "dst_ee",
  "gradual_magnitude",
  "iss_p",
  "mask_decay",
  "rigl_block",
  "rigl_channel",
  "rigl_global",
  "structure_decay",
)


class EveryRuleTest(parameterized.TestCase):
  """One compiled run of each rule, looked at from all sides."""

  @parameterized.named_parameters((n, n) for n in CASES)
  def test_contract(self, name):
    case, run = CASES[name], reference(name)
    with self.subTest("no recompilation, though donated"):
      assert run.cache_size == 1
    with self.subTest("the state keeps its types"):
      assert run.types == run.types_after
      assert run.states[-1].count == STEPS
    self.check_every_step(case, run)
    self.check_copies(run)
    self.check_not_finite(case, run)
    self.check_restored(run)
    if name not in RARER_ON_MESHES:
      with self.subTest("eight devices"):
        check_eight_devices(name, "explicit")

  def check_every_step(self, case, run):
    dropped = 0
    for t in range(STEPS + 1):
      masks = run.masks[t]
      assert masks["bias"].all()
      with self.subTest("masked weights are +0.0", count=t):
        leak = run.states[t].leak
        if leak is None or leak == 0:
          problem.assert_zeros(run.seen[t], masks)
        if case.enforced:
          problem.assert_zeros(run.params[t], masks)
          problem.assert_bits(run.params[t], run.seen[t])
        assert run.states[t].violations == 0
      with self.subTest("counts are exact", count=t):
        got = {n: int(masks[n].sum()) for n in "ab"}
        want = case.counts(t)
        if case.together:
          got, want = sum(got.values()), sum(want.values())
        assert got == want
        if run.states[t].backward is not None:  # at sparsity 1/2
          wider = problem.unpacked(run.states[t].backward, start())
          assert {n: int(wider[n].sum()) for n in "ab"} == {"a": 384, "b": 48}
      if t:
        dropped += sum((run.masks[t - 1][n] & ~masks[n]).sum() for n in "ab")
    assert (dropped > 0) == case.moves

  def check_copies(self, run):
    with self.subTest("an average is masked for evaluation"):
      average = jax.tree.map(lambda *x: -sum(x) / len(x), *run.params)
      seen, masks = problem.jit(problem.look)(average, run.states[-1])
      problem.assert_zeros(seen, masks)
      for n in average:
        m = np.asarray(masks[n])
        np.testing.assert_array_equal(seen[n][m], average[n][m])

  def check_not_finite(self, case, run):
    t = 6 if case.enforced else 4  # an update of all rules that have any
    masks = run.masks[t]["a"]
    for where, value in (masks, np.nan), (~masks, np.nan), (masks, np.inf):
      with self.subTest("gradients that are not finite", value=value):
        grads = gradient(t)
        grads["a"][tuple(np.argwhere(where)[0])] = value
        params, state, _, after = run.at_once(t, grads)
        np.testing.assert_array_equal(after["a"], masks)
        # Other parameters are none the worse for it.
        want = run.masks[t if case.together else t + 1]["b"]
        np.testing.assert_array_equal(after["b"], want)
        if case.enforced:
          problem.assert_zeros(params, after)
        if state.backward is not None:
          backward = run.states[t].backward["a"]
          problem.assert_bits(state.backward["a"], backward)

  def check_restored(self, run):
    with self.subTest("a restored run goes on bit for bit"):
      saved = jax.tree.map(jnp.array, run.history[3][:2])
      with (
        tempfile.TemporaryDirectory() as folder,
        ocp.StandardCheckpointer() as checkpointer,
      ):
        checkpointer.save(folder + "/checkpoint", saved)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(lambda: saved)
        restored = checkpointer.restore(folder + "/checkpoint", abstract)
      problem.assert_bits(problem.copied(restored), run.history[3][:2])
      problem.assert_bits(run.resumed(*restored, 3), run.history[-1])

  @parameterized.named_parameters((n, n) for n in RARER_ON_MESHES)
  @pytest.mark.slow
  def test_on_an_explicit_mesh_too(self, name):
    check_eight_devices(name, "explicit")

  @parameterized.named_parameters((n, n) for n in ("rigl", "sr_ste"))
  def test_on_an_auto_mesh(self, name):
    check_eight_devices(name, "auto")

  @parameterized.named_parameters(
    (n, n) for n in CASES if n not in ("rigl", "sr_ste")
  )
  @pytest.mark.slow
  def test_on_an_auto_mesh_too(self, name):
    check_eight_devices(name, "auto")


def check_eight_devices(name, kind):
  """The run on a mesh is that on one device, to the bit, where it was."""
  case, run = CASES[name], reference(name)
  mesh, sharding = a_mesh(kind)
  with jax.set_mesh(mesh):
    place = functools.partial(jax.device_put, device=sharding)
    now = problem.jit(beginning(run.tx, case.enforced))(place(start()))
    problem.assert_bits(problem.copied(now), run.history[0])
    first = 0
    if kind == "auto":  # the compiler says where it likes to have the state
      now = problem.jit(stepping(run.tx))(*now[:2], place(gradient(0)))
      first = 1
    before = now
    step = problem.jit(stepping(run.tx))
    step = step.lower(*now[:2], place(gradient(first))).compile()
    for t in range(first, STEPS):
      now = step(*now[:2], place(gradient(t)))
      problem.assert_bits(problem.copied(now), run.history[t + 1])
    # Nothing that would compile it again, and parameters where they were.
    assert types(before[:2]) == types(now[:2])
    assert specs(before[:2]) == specs(now[:2])
    assert specs(now[0]) == SPECS
    if kind == "explicit":
      assert specs(now[3]) == SPECS
      assert now[1].masks["a"].sharding.spec == SPECS["a"]
  gathered = all_gathers(step.as_text())
  for dtype, size in gathered:
    # Only of `b`: nothing of `a`, whose shards have eight rows, is gathered.
    assert size <= 24 * 4, gathered
    assert dtype == "pred" or case.straddles, gathered


def specs(tree):
  return jax.tree.map(lambda x: x.sharding.spec, tree)


def a_mesh(kind):
  """A mesh of four by two, and the parameters' shardings on it."""
  axis_type = dict(
    auto=jax.sharding.AxisType.Auto, explicit=jax.sharding.AxisType.Explicit
  )[kind]
  mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(axis_type,) * 2)
  return mesh, {n: jax.NamedSharding(mesh, s) for n, s in SPECS.items()}


def all_gathers(text):
  """Dtypes and sizes of what all all-gathers in a compiled program give."""
  found = re.findall(r"= \(?(\w+)\[([\d,]*)\].* all-gather(?:-start)?\(", text)
  return [
    (dtype, math.prod(int(d) for d in shape.split(",") if d))
    for dtype, shape in found
  ]


class MeshTest(parameterized.TestCase):
  def test_erk_of_these_shapes(self):
    densities = select_oracle.erk({"a": (32, 24), "b": (24, 4)}, 0.25)
    np.testing.assert_allclose(densities["a"] * 768, ERK["a"])
    np.testing.assert_allclose(densities["b"] * 96, ERK["b"])

  @parameterized.parameters("auto", "explicit")
  def test_init_outside_of_jit(self, kind):
    """The same masks, sharded as the parameters; and no recompilation."""
    tx = weights.static(
      optax.adam(0.05), structure=structures.NM(1, 2), key=KEY
    )
    want = problem.copied(problem.jit(tx.init)(start()))
    mesh, sharding = a_mesh(kind)
    with jax.set_mesh(mesh):
      params = jax.device_put(start(), sharding)
      state = tx.init(params)
      problem.assert_bits(problem.copied(state), want)
      assert state.masks["a"].sharding.spec == SPECS["a"]
      assert state.masks["bias"].sharding.spec == SPECS["bias"]
      step = problem.jit(stepping(tx))
      now = params, state
      for t in range(3):
        now = step(*now[:2], jax.device_put(gradient(t), sharding))
      assert step._cache_size() == 1


class ViolationsTest(parameterized.TestCase):
  def test_a_later_link_of_a_chain_is_refused_while_tracing(self):
    tx = optax.chain(CASES["rigl"].make(optax.sgd(0.1)), optax.scale(0.5))

    def begin(params):
      return weights.sparse_params(tx.init(params), params)

    with pytest.raises(ValueError, match=r"last link of optax\.chain"):
      jax.eval_shape(begin, start())
    with pytest.raises(ValueError, match="last link"):
      jax.eval_shape(lambda p: weights.masks(tx.init(p), p), start())

  # Weight decay leaves so little of a masked weight that within about twenty
  # steps it underflows to zero, and the masks have healed.
  @parameterized.parameters(
    (2, lambda u, p: u - 0.01 * p), (100, lambda u, p: 0.5 * u)
  )
  def test_a_change_outside_of_a_chain_is_counted(self, every, change):
    tx = weights.rigl(
      optax.sgd(0.1),
      sparsity=0.75,
      every=every,
      until=400,
      key=KEY,
    )

    @problem.jit
    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      updates = jax.tree.map(change, updates, params)
      return optax.apply_updates(params, updates), state

    params = start()
    state = problem.jit(tx.init)(params)
    params = problem.jit(weights.sparse_params)(state, params)
    for t in range(2 * every + 3):
      params, state = step(params, state, gradient(t % 5))
    assert state.violations > 0
    with pytest.raises(ValueError, match="masked weights are not zero"):
      weights.masks(state, params)
    assert weights.summary(state, params).violations == state.violations

  def test_schedule_free_outside_is_counted(self):
    tx = contrib.schedule_free(
      CASES["rigl"].make(optax.sgd(0.1)), learning_rate=0.1
    )

    @problem.jit
    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    params = start()
    state = problem.jit(tx.init)(params)
    params = problem.jit(weights.sparse_params)(state, params)
    for t in range(7):
      params, state = step(params, state, gradient(t))
    with pytest.raises(ValueError, match="masked weights are not zero"):
      weights.masks(state, params)

  def test_parameters_replaced_in_a_static_run_are_counted(self):
    run = reference("static")
    params, state = run.history[5][:2]
    params = params | {"a": params["a"] + 1}
    _, state, _, _ = problem.copied(
      run.step(*jax.tree.map(jnp.array, (params, state)), gradient(5))
    )
    assert state.violations == 0  # it looks every two steps
    params = params | {"a": params["a"] + 1}
    _, state, _, _ = problem.copied(
      run.step(*jax.tree.map(jnp.array, (params, state)), gradient(6))
    )
    assert state.violations == 768 - 144


def rigl(inner, **settings):
  return weights.rigl(
    inner,
    sparsity=0.75,
    distribution="uniform",
    every=2,
    until=20,
    drop_fraction=0.5,
    key=KEY,
    **settings,
  )


def sr_ste(inner, **settings):
  return weights.sr_ste(inner, decay=0.01, **settings)


def partitioned(rule):
  labels = {"a": "sparse", "b": "sparse", "bias": "rest"}
  transforms = {"sparse": rule(optax.adam(0.05)), "rest": optax.sgd(0.1)}
  return optax.partition(transforms, labels)


def multi_steps(inner):
  return optax.MultiSteps(inner, 2).gradient_transformation()


OPTIMIZERS = dict(
  clip_before=lambda rule: optax.chain(
    optax.clip_by_global_norm(0.5), rule(optax.adam(0.05))
  ),
  clip_inside=lambda rule: rule(
    optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
  ),
  hyperparams_outside=lambda rule: optax.inject_hyperparams(
    lambda learning_rate: rule(optax.adam(learning_rate))
  )(learning_rate=0.05),
  hyperparams_inside=lambda rule: rule(
    optax.inject_hyperparams(optax.adam)(learning_rate=0.05)
  ),
  multi_steps_outside=lambda rule: multi_steps(rule(optax.adam(0.05))),
  multi_steps_inside=lambda rule: rule(multi_steps(optax.adam(0.05))),
  apply_if_finite=lambda rule: optax.apply_if_finite(rule(optax.adam(0.05)), 3),
  apply_if_finite_inside=lambda rule: rule(
    optax.apply_if_finite(optax.adam(0.05), 3)
  ),
  partition=partitioned,
  schedule_free=lambda rule: rule(
    contrib.schedule_free(optax.sgd(0.2), learning_rate=0.2)
  ),
  adafactor=lambda rule: rule(optax.adafactor(0.05, min_dim_size_to_factor=8)),
  muon=lambda rule: rule(contrib.muon(0.02)),
  lion=lambda rule: rule(optax.lion(0.02)),
  momentum=lambda rule: rule(optax.sgd(0.1, momentum=0.9)),
)


# Near to others in the table, for make test-all.
RARER = ("clip_inside", "hyperparams_inside", "apply_if_finite_inside")


class EveryOptimizerTest(parameterized.TestCase):
  @parameterized.named_parameters(
    (f"{rule.__name__}_{n}", rule, n)
    for rule in (rigl, sr_ste)
    for n in OPTIMIZERS
    if n not in RARER
  )
  def test_contract(self, rule, name):
    self.check(rule, name)

  @parameterized.named_parameters(
    (f"{rule.__name__}_{n}", rule, n) for rule in (rigl, sr_ste) for n in RARER
  )
  @pytest.mark.slow
  def test_contract_too(self, rule, name):
    self.check(rule, name)

  def check(self, rule, name):
    # One sparse weight is enough here, and half the time.
    tx = OPTIMIZERS[name](functools.partial(rule, where="^a$"))
    enforced = rule is rigl

    @functools.partial(problem.jit, donate_argnums=(0, 1))
    def step(params, state, scale):
      grads = jax.grad(problem.loss)(weights.sparse_params(state, params))
      grads = jax.tree.map(lambda g: scale * g, grads)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return params, state, *problem.look(params, state)

    begin = problem.jit(beginning(tx, enforced))
    now = begin(problem.start())
    past, before = problem.copied(now), types(now[:2])
    grown = moved = 0
    for t in range(9):
      broken = "finite" in name and t == 4
      now = step(*now[:2], jnp.float32(np.nan if broken else 1.0))
      new = params, state, seen, masks = problem.copied(now)
      (found,) = masks_lib.find_states(state)
      assert found.violations == 0
      problem.assert_zeros(seen, masks)
      counts = {"a": 32 if enforced else 64}
      assert {n: int(masks[n].sum()) for n in counts} == counts
      for n in counts:
        moved += (masks[n] ^ past[3][n]).sum()
      if broken:  # neither weights nor masks know of it
        problem.assert_bits(params, past[0])
        problem.assert_bits(masks, past[3])
      if enforced:
        problem.assert_zeros(params, masks)
        for n in counts:
          new_here = masks[n] & ~past[3][n]
          grown += new_here.sum()
          for x in jax.tree.leaves(found.inner):
            # Whatever the optimizer remembers, it forgot of grown weights.
            if x.shape == masks[n].shape and x.dtype == np.float32:
              assert not x[new_here].any()
      past = new
    assert np.isfinite(past[0]["a"]).all()
    assert step._cache_size() == 1
    assert types(now[:2]) == before
    assert moved > 0 and (grown > 0) == enforced
    if name == "schedule_free":
      evaluated = contrib.schedule_free_eval_params(found.inner, past[0])
      assert any(
        (np.asarray(evaluated[n])[~masks[n]] != 0).any() for n in counts
      )
      evaluated = weights.sparse_params(now[1], evaluated)
      problem.assert_zeros(evaluated, masks)

  def test_optax_maps_over_our_parameters(self):
    """Which is how a state is sharded: each buffer as its parameter."""
    tx = weights.dst_ee(
      optax.adam(0.1),
      sparsity=0.5,
      every=9,
      until=9,
      key=KEY,
      track_explored=True,
    )
    state = jax.eval_shape(tx.init, problem.start())
    specs = {n: P(n) for n in problem.start()}
    got = optax.tree.map_params(
      tx, lambda _, s: s, state, specs, transform_non_params=lambda _: P()
    )
    assert got.masks == got.explored == got.memory == specs
    assert got.inner[0].mu == got.inner[0].nu == specs
    assert got.count == got.key == got.inner[0].count == P()


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(16, 8, rngs=rngs)
    self.norm = nnx.LayerNorm(8, rngs=rngs)
    self.second = nnx.Linear(8, 24, rngs=rngs)

  def __call__(self, x):
    return self.second(jnp.tanh(self.norm(self.first(x))))


class DenseMlp(nn.Module):
  boxed: bool

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    if self.boxed:
      init = nn.with_partitioning(init, (None, None))
    hidden = jnp.tanh(nn.Dense(8, kernel_init=init)(x))
    return nn.Dense(24, kernel_init=init)(hidden)


def distance(y):
  return jnp.mean((y - problem.Y) ** 2)


class ContainersTest(parameterized.TestCase):
  def test_nnx(self):
    model = Mlp(nnx.Rngs(0))
    tx = rigl(optax.adam(0.05), where="second/kernel")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, weights.sparse_params(optimizer.opt_state, params))
    graph, state = nnx.split((model, optimizer))

    @problem.jit
    def step(state):
      model, optimizer = nnx.merge(graph, state)
      grads = nnx.grad(lambda model: distance(model(problem.X)))(model)
      optimizer.update(model, grads)
      return nnx.state((model, optimizer))

    first = weights.masks(optimizer.opt_state, params)
    for _ in range(5):
      state = step(state)
    assert step._cache_size() == 1
    nnx.update((model, optimizer), state)
    params = nnx.state(model, nnx.Param)
    masks = weights.masks(optimizer.opt_state, params)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    problem.assert_zeros(params, masks)
    counts = [int(m.sum()) for m in jax.tree.leaves(masks)]
    assert sorted(counts) == sorted([8, 128, 8, 8, 24, 48])
    assert (first.second.kernel[...] != masks.second.kernel[...]).any()
    rows = weights.summary(optimizer.opt_state, params).layers
    assert rows["second/kernel"].density == 0.25
    assert rows["first/kernel"].density == 1

  @parameterized.parameters(False, True)
  def test_linen_train_state(self, boxed):
    model = DenseMlp(boxed)

    @problem.jit
    def begin():
      params = model.init(jax.random.key(0), problem.X)["params"]
      state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=tx
      )
      return state.replace(
        step=jnp.int32(0),  # flax begins with a Python integer
        params=weights.sparse_params(state.opt_state, state.params),
      )

    tx = rigl(optax.adam(0.05))
    state = begin()

    @problem.jit
    def step(state):
      def loss(params):
        return distance(state.apply_fn({"params": params}, problem.X))

      return state.apply_gradients(grads=jax.grad(loss)(state.params))

    first = weights.masks(state.opt_state, state.params)
    for _ in range(5):
      state = step(state)
    assert step._cache_size() == 1
    masks = weights.masks(state.opt_state, state.params)
    assert jax.tree.structure(masks) == jax.tree.structure(state.params)
    problem.assert_zeros(state.params, masks)
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [8, 32, 24, 48]
    assert int(weights.sad(first, masks)) > 0
    rows = weights.summary(state.opt_state, state.params).layers
    assert rows["Dense_0/kernel"].density == 0.25

  def trained(self, tx, params, steps=5):
    """Trains on any tree; returns what `look` gives after every step."""
    begin = problem.jit(beginning(tx, True))

    @problem.jit
    def step(params, state):
      grads = jax.grad(
        lambda p: sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(p))
      )(params)
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      return params, state, *problem.look(params, state)

    now = begin(params)
    history = [problem.copied(now)]
    for _ in range(steps):
      now = step(*now[:2])
      history.append(problem.copied(now))
      problem.assert_zeros(now[0], now[3])
      for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(now[0])):
        assert x.dtype == y.dtype
    assert step._cache_size() == 1
    assert jax.tree.structure(now[3]) == jax.tree.structure(params)
    first, last = history[0][3], history[-1][3]
    assert int(weights.sad(first, last)) > 0
    return history

  @parameterized.named_parameters(
    ("list", lambda w, b: [w, b]),
    ("tuple", lambda w, b: (b, (w,))),
    ("bare_array", lambda w, b: w),
  )
  def test_plain_containers(self, build):
    params = build(problem.numbers(16, 8), problem.numbers(8, seed=1))
    history = self.trained(rigl(optax.adam(0.05)), params)
    for _, _, _, masks in history:
      counts = {m.shape: int(m.sum()) for m in jax.tree.leaves(masks)}
      assert counts[16, 8] == 32 and counts.get((8,), 8) == 8

  def test_scanned_stack(self):
    """Each layer of a stack has a budget of its own and exchanges alone."""
    params = {
      "layers": problem.numbers(3, 16, 8),
      "head": problem.numbers(8, 4),
    }
    params["layers"] *= np.array([0.01, 1, 100], np.float32)[:, None, None]
    tx = weights.rigl(
      optax.sgd(0.01),
      sparsity=0.75,
      distribution="uniform",
      every=2,
      until=9,
      key=KEY,
      axes={"layers": structures.Axes(stack=(0,))},
    )
    history = self.trained(tx, params)
    for _, _, _, masks in history:
      assert masks["layers"].sum((1, 2)).tolist() == [32, 32, 32]
      assert masks["head"].sum() == 8
    changed = history[0][3]["layers"] ^ history[-1][3]["layers"]
    assert changed.any((1, 2)).all()

  def test_convolutions_and_masks_that_do_not_pack(self):
    params = {"conv": problem.numbers(3, 3, 4, 8), "odd": problem.numbers(5, 6)}
    history = self.trained(rigl(optax.adam(0.05)), params)
    for _, state, _, masks in history:
      assert masks["conv"].sum() == 72 and masks["odd"].sum() in (7, 8)
      assert state.masks["conv"].dtype == bool
      assert state.masks["odd"].dtype == bool

  def test_bfloat16(self):
    params = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16),
      {"w": problem.numbers(16, 8), "b": problem.numbers(8)},
    )
    history = self.trained(rigl(optax.adam(0.05)), params)
    for now, state, _, masks in history:
      assert masks["w"].sum() == 32
      assert now["w"].dtype == jnp.bfloat16
      assert state.inner[0].mu["w"].dtype == jnp.bfloat16
      assert not np.signbit(now["w"][~masks["w"]].astype(np.float32)).any()

  @parameterized.named_parameters((n, n) for n in CASES)
  def test_init_of_shapes(self, name):
    tx = CASES[name].make(optax.adam(0.05))
    shapes = jax.eval_shape(start)
    got = tx.init(shapes)
    want = jax.eval_shape(tx.init, start())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.leaves(got) == jax.tree.leaves(want)
    masks = got.masks
    assert masks["a"].shape == (4, 24) and masks["a"].dtype == jnp.uint8
