"""Every method against its definition, in a real small training run."""

import functools
import itertools
import math

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import weights
from sparsejax.select import structures
from tests.oracles import select as select_oracle
from tests.oracles import weights as oracle
from tests.weights import problem
from tests.weights.problem import LR
from tests.weights.problem import SPARSE

# Weights are of order 1 and a step adds at most LR times a gradient, itself a
# sum of 32 or fewer terms of order 1. Each of the 20 steps so rounds by about
# 32 * 2^-24 at most; errors add and hardly grow, since the loss contracts.
TOLERANCE = 20 * 32 * 2.0**-24
KEY = jax.random.key(7)
SGD = optax.sgd(LR)


def assert_close(got, want):
  for n in want:
    np.testing.assert_allclose(got[n], want[n], rtol=0, atol=TOLERANCE)


def assert_follows(run, revise, steps):
  """A drop-and-grow run is that of the oracle `revise(t, w, g, m)`.

  Grown weights begin at 0 and move a step later; the others take SGD steps.
  """
  w = problem.f64(run.params[0])
  mask = dict(run.masks[0])
  for t in range(steps):
    grads = problem.oracle_gradient(w)
    for n in SPARSE:
      new = revise(t, n, w[n], grads[n], mask[n])
      moving = mask[n] & new
      w[n] = np.where(moving, w[n] - LR * grads[n], 0.0)
      mask[n] = new
      np.testing.assert_array_equal(run.masks[t + 1][n], new, f"{n} at {t}")
    w["bias"] = w["bias"] - LR * grads["bias"]
    assert_close(run.params[t + 1], w)


def flips(run, name):
  """How many weights each step of `run` masked or unmasked."""
  return [int((a ^ b).sum()) for a, b in itertools.pairwise(run.sparse(name))]


def drops(t, fraction, until, every):
  """The share of weights that RigL exchanges at step t; None between."""
  if t == 0 or t % every or t > until:
    return None
  return select_oracle.cosine(t, fraction, until)


class RiglTest(parameterized.TestCase):
  @functools.cached_property
  def settings(self):
    return dict(
      sparsity=0.75,
      distribution="uniform",
      every=3,
      until=15,
      drop_fraction=0.5,
      key=KEY,
    )

  def test_training_follows_the_paper(self):
    run = problem.Run(weights.rigl(SGD, **self.settings), 20)
    regrown = 0

    def revise(t, n, w, g, m):
      nonlocal regrown
      share = drops(t, 0.5, 15, 3)
      if share is None:
        return m
      drop = math.floor(m.sum() * share)
      new = oracle.rigl_update(w, g, m, drop)
      kept = oracle.rigl_update(w, np.zeros_like(w), m, drop, False)
      regrown += (m & new & ~kept).sum()
      return new

    assert_follows(run, revise, 20)
    assert regrown > 0  # a dropped weight came back at once, as in the paper
    for n, count in ("a", 32), ("b", 48):
      assert {int(m.sum()) for m in run.sparse(n)} == {count}
      assert sum(flips(run, n)[:13]) > 0
      assert sum(flips(run, n)[13:]) == 0  # until=15 exchanges nothing

  def test_grown_weights_have_no_past(self):
    tx = weights.rigl(optax.adam(0.05), **self.settings)
    run = problem.Run(tx, 13)
    grown = 0
    for t in range(13):
      adam = run.states[t + 1].inner[0]
      for n in SPARSE:
        new = run.masks[t + 1][n] & ~run.masks[t][n]
        grown += new.sum()
        for x in run.params[t + 1][n], adam.mu[n], adam.nu[n]:
          assert not problem.bits(x[new]).any()
        stays = run.masks[t + 1][n] & run.masks[t][n]
        assert (adam.mu[n][stays] != 0).all()
    assert grown > 0

  def test_global_ranks_all_layers_at_once(self):
    settings = self.settings | dict(distribution="global")
    run = problem.Run(weights.rigl(SGD, **settings), 7)
    w, mask = problem.f64(run.params[0]), dict(run.masks[0])
    for t in range(7):
      grads = problem.oracle_gradient(w)
      share = drops(t, 0.5, 15, 3)
      old = mask
      if share is not None:
        # One oracle layer: both, one after the other.
        flat = [
          np.concatenate([x[n].ravel() for n in SPARSE])[None]
          for x in (w, grads, mask)
        ]
        drop = math.floor(flat[2].sum() * share)
        whole = oracle.rigl_update(*flat, drop)[0]
        mask = {
          "a": whole[:128].reshape(16, 8),
          "b": whole[128:].reshape(8, 24),
        }
      for n in SPARSE:
        moving = mask[n] & old[n]
        w[n] = np.where(moving, w[n] - LR * grads[n], 0.0)
        np.testing.assert_array_equal(run.masks[t + 1][n], mask[n])
      w["bias"] = w["bias"] - LR * grads["bias"]
      assert_close(run.params[t + 1], w)
    totals = [sum(m[n].sum() for n in SPARSE) for m in run.masks]
    assert set(totals) == {80}
    # A layer's own count moves: that is what global means.
    assert len({int(m.sum()) for m in run.sparse("a")}) > 1


class SetTest(parameterized.TestCase):
  def make(self, key=KEY):
    return weights.set_(
      SGD,
      sparsity=0.75,
      distribution="uniform",
      every=2,
      drop_fraction=0.3,
      key=key,
    )

  def test_training(self):
    run = problem.Run(self.make(), 9)

    def revise(t, n, w, g, m):
      new = run.masks[t + 1][n]
      if t == 0 or t % 2:
        return m
      drop = math.floor(0.3 * m.sum())
      # Growth is a draw, so take it as it is; what survives is not.
      survive = oracle.set_update(w, m, drop, np.where(new, 1.0, 0.0))
      np.testing.assert_array_equal(survive, new)
      return survive

    assert_follows(run, revise, 9)
    for n, count in ("a", 32), ("b", 48):
      assert {int(m.sum()) for m in run.sparse(n)} == {count}
      assert all(flips(run, n)[2::2])

  def test_the_key_decides(self):
    run, again = (problem.Run(self.make(), 5) for _ in range(2))
    problem.assert_bits(run.masks, again.masks)
    # Another key in the state alone already draws otherwise.
    key = jax.random.key_data(jax.random.key(8))
    params, state = run.params[0], run.states[0]._replace(key=key)
    for _ in range(3):
      params, state, _, masks = run.step(params, state)
    assert (masks["a"] != run.masks[3]["a"]).any()
    first = jit_init(self.make(jax.random.key(8))).masks["a"]
    assert (first != run.states[0].masks["a"]).any()

  def test_growth_is_uniform(self):
    tx = self.make()
    params = problem.start()
    state = jit_init(tx)._replace(count=jnp.int32(2))
    params = problem.jit(weights.sparse_params)(state, params)
    grads = jax.tree.map(jnp.ones_like, params)
    draws = 2000

    @problem.jit
    @jax.vmap
    def grown(key):
      _, new = tx.update(grads, state._replace(key=key), params)
      return weights.masks(new, params)

    keys = jax.random.split(jax.random.key(3), draws)
    new = jax.device_get(grown(jax.random.key_data(keys)))
    before = problem.copied(weights.masks(state, params))
    for n in SPARSE:
      drop = math.floor(0.3 * before[n].sum())
      # What every draw has in common.
      survivors = new[n].all(0)
      assert survivors.sum() == before[n].sum() - drop
      assert not (survivors & ~before[n]).any()
      free = ~survivors
      size, p = free.sum(), drop / free.sum()
      counts = new[n][:, free].sum(0)
      assert counts.sum() == draws * drop
      # Without replacement the counts' covariance is this multiple of that of
      # Pearson's statistic, which is then chi-square with size - 1 degrees.
      spread = draws * p * (1 - p) * size / (size - 1)
      statistic = ((counts - draws * p) ** 2).sum() / spread
      freedom = size - 1
      assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def jit_init(tx):
  return problem.jit(tx.init)(problem.start())


class SriglTest(parameterized.TestCase):
  def test_training_follows_the_paper(self):
    tx = weights.srigl(
      SGD,
      ablate=0.5,
      sparsity=0.75,
      distribution="uniform",
      every=3,
      until=15,
      drop_fraction=0.5,
      key=KEY,
    )
    run = problem.Run(tx, 14)
    target = {"a": 4, "b": 2}
    ablated = 0

    def revise(t, n, w, g, m):
      nonlocal ablated
      share = drops(t, 0.5, 15, 3)
      if share is None:
        return m
      drop = math.floor(target[n] * m.shape[1] * share)
      new, live, fan_in = oracle.srigl_update(w, g, m, drop, 0.5, target[n])
      ablated += m.shape[1] - len(live)
      # The paper's words, apart from its algorithm.
      got = run.masks[t + 1][n]
      assert (got[:, live].sum(0) == fan_in).all()
      dead = np.setdiff1d(np.arange(m.shape[1]), live)
      assert not problem.bits(run.params[t + 1][n][:, dead]).any()
      assert fan_in == target[n] * m.shape[1] // len(live)
      return new

    for n in SPARSE:
      assert (run.masks[0][n].sum(0) == target[n]).all()
    assert_follows(run, revise, 14)
    assert ablated > 0

  def test_gamma_zero_removes_nobody(self):
    tx = weights.srigl(
      SGD, ablate=0.0, sparsity=0.75, every=2, until=9, key=KEY
    )
    run = problem.Run(tx, 7)
    for n in SPARSE:
      fan_in = {int(c) for m in run.sparse(n) for c in m.sum(0)}
      assert len(fan_in) == 1 and 0 not in fan_in
      assert sum(flips(run, n)) > 0


class DstEeTest(parameterized.TestCase):
  def run_with(self, c, steps=16, **settings):
    make = functools.partial(weights.dst_ee, c=c, epsilon=0.5)
    if c is None:
      make = weights.rigl
    tx = make(
      SGD,
      sparsity=0.75,
      distribution="uniform",
      every=3,
      until=18,
      drop_fraction=0.5,
      key=KEY,
      **settings,
    )
    return problem.Run(tx, steps)

  def test_training_follows_the_paper(self):
    c = 0.02
    run, rigl = self.run_with(c, 13), self.run_with(None, 13)
    visits = {n: run.masks[0][n].astype(int) for n in SPARSE}

    def revise(t, n, w, g, m):
      share = drops(t, 0.5, 18, 3)
      if share is None:
        return m
      drop = math.floor(m.sum() * share)
      new, visits[n] = oracle.dst_ee_update(w, g, m, drop, visits[n], t, c, 0.5)
      return new

    assert_follows(run, revise, 13)
    for n in SPARSE:
      np.testing.assert_array_equal(run.states[-1].memory[n], visits[n])
    # The bonus is neither nothing nor everything.
    assert (run.masks[-1]["a"] != rigl.masks[-1]["a"]).any()

  def test_without_exploration_it_is_rigl(self):
    run, rigl = self.run_with(0.0), self.run_with(None)
    problem.assert_bits(run.masks, rigl.masks)
    problem.assert_bits(run.params, rigl.params)

  def test_exploration_grows_with_c(self):
    shares = []
    for c in 0.0, 0.02, 1e3:
      run = self.run_with(c, track_explored=True)
      ever = problem.unpacked(run.states[-1].explored, problem.start())
      for n in SPARSE:
        np.testing.assert_array_equal(ever[n], np.any(run.sparse(n), 0))
      shares.append(sum(ever[n].sum() for n in SPARSE) / 320)
    assert shares[0] < shares[1] < shares[2]
    # The last run grows what was never active, as long as there is any.
    for n in SPARSE:
      for t in range(16):
        before, after = run.masks[t][n], run.masks[t + 1][n]
        visited = np.any(run.sparse(n)[: t + 1], 0)
        again = (after & ~before & visited).sum()
        assert again == 0 or np.any(run.sparse(n)[: t + 2], 0).all()


class GradualMagnitudeTest(parameterized.TestCase):
  BEGIN, UNTIL, EVERY = 2, 14, 3

  def run_with(self, inner, initial):
    tx = weights.gradual_magnitude(
      inner,
      sparsity=0.85,
      begin=self.BEGIN,
      until=self.UNTIL,
      every=self.EVERY,
      initial_sparsity=initial,
    )
    return problem.Run(tx, 17)

  def kept(self, t, initial):
    """How many weights each layer keeps after an update at step t."""
    s = select_oracle.cubic(t, initial, 0.85, self.BEGIN, self.UNTIL)
    quotas = [round(128 * (1 - s), 9), round(192 * (1 - s), 9)]
    assert sum(quotas) % 1 != 0.5  # whose rounding is left open
    total = round(sum(quotas))
    return dict(zip(SPARSE, select_oracle.largest_remainder(quotas, total)))

  def updates(self):
    return range(self.BEGIN, self.UNTIL + 1, self.EVERY)

  def assert_schedule(self, run, initial):
    kept = {n: int(run.masks[0][n].sum()) for n in SPARSE}
    if initial:
      assert kept == self.kept(0, initial)
    else:
      assert kept == {"a": 128, "b": 192}
    for t in range(len(run)):
      if t in self.updates():
        kept = self.kept(t, initial)
      assert {n: int(run.masks[t + 1][n].sum()) for n in SPARSE} == kept, t
      # Within one weight of the layer's own share of the cubic.
      if t in self.updates():
        s = select_oracle.cubic(t, initial, 0.85, self.BEGIN, self.UNTIL)
        for n, size in ("a", 128), ("b", 192):
          assert abs(kept[n] - (1 - s) * size) < 1
      problem.assert_zeros(
        run.params[t + 1], run.masks[t + 1] | {"bias": np.ones(24, bool)}
      )
    assert kept == {"a": 19, "b": 29}

  def test_training_follows_the_paper(self):
    run = self.run_with(optax.sgd(LR / 2, momentum=0.5), 0.2)
    self.assert_schedule(run, 0.2)
    w, mask = problem.f64(run.params[0]), dict(run.masks[0])
    for n in SPARSE:
      first = oracle.gradual_magnitude_mask(
        problem.start()[n], 1 - self.kept(0, 0.2)[n] / mask[n].size
      )
      np.testing.assert_array_equal(first, mask[n])
    trace = {n: np.zeros_like(w[n]) for n in w}
    for t in range(len(run)):
      grads = problem.oracle_gradient(w)
      for n in SPARSE:
        if t in self.updates():
          s = 1 - self.kept(t, 0.2)[n] / mask[n].size
          mask[n] = oracle.gradual_magnitude_mask(w[n], s)
          np.testing.assert_array_equal(run.masks[t + 1][n], mask[n])
        grads[n] = grads[n] * mask[n]
      for n in w:
        trace[n] = 0.5 * trace[n] + grads[n]
        w[n] = w[n] - LR / 2 * trace[n]
        w[n] = w[n] * mask[n] if n in mask and n in SPARSE else w[n]
      assert_close(run.params[t + 1], w)

  def test_zeros_under_adam(self):
    self.assert_schedule(self.run_with(optax.adam(0.05), 0.0), 0.0)


class StaticTest(parameterized.TestCase):
  def test_erk_with_saturation(self):
    shapes = {"a": (2, 4), "b": (24, 24), "c": (16, 24)}
    params = {n: problem.numbers(*s) for n, s in shapes.items()}
    densities = select_oracle.erk(shapes, 0.2)
    assert densities["a"] == 1 and densities["b"] < densities["c"] < 1
    total = round(0.2 * (8 + 576 + 384))
    quotas = [densities[n] * math.prod(shapes[n]) for n in shapes]
    want = select_oracle.largest_remainder(quotas, total)

    def draw(seed):
      key = jax.random.key(seed)
      tx = weights.static(SGD, sparsity=0.8, distribution="erk", key=key)
      return weights.masks(tx.init(params), params)

    draw = problem.jit(draw)
    masks, again, other = draw(0), draw(0), draw(1)
    assert [int(masks[n].sum()) for n in shapes] == want
    problem.assert_bits(masks, again)
    assert (masks["b"] != other["b"]).any()

  def test_training_with_a_fixed_mask(self):
    tx = weights.static(SGD, sparsity=0.8, key=KEY, every=3)
    run = problem.Run(tx, 8)
    assert_follows(run, lambda t, n, w, g, m: m, 8)
    densities = select_oracle.erk({"a": (16, 8), "b": (8, 24)}, 0.2)
    for n, size in ("a", 128), ("b", 192):
      assert abs(run.masks[0][n].sum() - densities[n] * size) < 1
    assert sum(run.masks[0][n].sum() for n in SPARSE) == 64

  def test_zeros_under_adam(self):
    tx = weights.static(optax.adam(0.1), sparsity=0.8, key=KEY)
    run = problem.Run(tx, 5)
    for params, masks in zip(run.params, run.masks):
      problem.assert_bits(masks, run.masks[0])
      problem.assert_zeros(params, masks)


class TopKastTest(parameterized.TestCase):
  def run_with(self, inner, decay=0.01):
    tx = weights.top_kast(
      inner, sparsity=0.75, backward_sparsity=0.5, decay=decay
    )
    return problem.Run(tx, 10, enforced=False)

  def assert_sets(self, run):
    moved = 0
    for t in range(len(run)):
      wider = problem.unpacked(run.states[t].backward, run.params[t])
      for n, size in ("a", 128), ("b", 192):
        a, b = run.masks[t][n], wider[n]
        assert a.sum() == size // 4 and b.sum() == size // 2
        assert not (a & ~b).any()
        before = problem.bits(run.params[t][n])[~b]
        after = problem.bits(run.params[t + 1][n])[~b]
        np.testing.assert_array_equal(before, after)
        moved += (run.params[t + 1][n] != run.params[t][n])[b & ~a].sum()
        # What the next forward pass uses is of the new weights.
        want = oracle.top_kast_masks(run.params[t][n], 0.25, 0.5)
        np.testing.assert_array_equal(a, want[0])
        np.testing.assert_array_equal(b, want[1])
    assert moved > 0

  def test_training_follows_the_paper(self):
    run = self.run_with(SGD)
    self.assert_sets(run)
    w = problem.f64(problem.start())
    for t in range(len(run)):
      masked = dict(w)
      for n in SPARSE:
        masked[n] = w[n] * oracle.top_kast_masks(w[n], 0.25, 0.5)[0]
      grads = problem.oracle_gradient(masked)
      for n in SPARSE:
        w[n] = oracle.top_kast_step(w[n], grads[n], 0.25, 0.5, LR, 0.01)
      w["bias"] = w["bias"] - LR * grads["bias"]
      assert_close(run.params[t + 1], w)
    assert sum(map(sum, (flips(run, n) for n in SPARSE))) > 0

  def test_nothing_moves_outside_under_adamw(self):
    self.assert_sets(self.run_with(optax.adamw(0.1, weight_decay=0.1)))


class SrSteTest(parameterized.TestCase):
  @parameterized.parameters((2, 4, 0.05), (1, 8, 0.05), (2, 4, 0.0))
  def test_training_follows_the_paper(self, n, m, decay):
    tx = weights.sr_ste(SGD, n=n, m=m, decay=decay)
    run = problem.Run(tx, 10, enforced=False)
    w = problem.f64(problem.start())
    for t in range(len(run)):
      masked = dict(w)
      for name in SPARSE:
        # The mask of this forward pass is of these weights.
        mask = select_oracle.nm_mask(np.abs(w[name]), n, m, 0)
        np.testing.assert_array_equal(run.masks[t][name], mask)
        masked[name] = w[name] * mask
        groups = run.seen[t][name].reshape(-1, m, w[name].shape[1])
        assert ((groups != 0).sum(1) == n).all()
      assert_close(run.seen[t], masked)
      grads = problem.oracle_gradient(masked)
      for name in SPARSE:
        w[name] = oracle.sr_ste_step(w[name], grads[name], n, m, 0, LR, decay)
      w["bias"] = w["bias"] - LR * grads["bias"]
      assert_close(run.params[t + 1], w)
    assert sum(map(sum, (flips(run, name) for name in SPARSE))) > 0

  def test_without_decay_it_is_straight_through(self):
    """Bit for bit: the plain optimizer on the gradient at masked weights."""
    tx = weights.sr_ste(optax.adam(0.05), decay=0.0)
    run = problem.Run(tx, 6, enforced=False)
    inner = optax.adam(0.05)

    @problem.jit
    def step(params, state, masks):
      seen = jax.tree.map(lambda p, m: jnp.where(m, p, 0.0), params, masks)
      grads = jax.grad(problem.loss)(seen)
      updates, state = inner.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    params, state = problem.start(), inner.init(problem.start())
    for t in range(6):
      params, state = step(params, state, run.masks[t])
      problem.assert_bits(run.params[t + 1], problem.copied(params))

  def test_sad_counts_flips(self):
    tx = weights.sr_ste(SGD, decay=0.0)
    run = problem.Run(tx, 6, enforced=False)
    tensors = [run.masks[0], run.masks[3], run.masks[6]]
    got = sum(
      int(weights.sad(before, after))
      for before, after in itertools.pairwise(tensors)
    )
    want = sum(oracle.sad([m[n] for m in tensors]) for n in SPARSE)
    assert got == want > 0


class MaskDecayTest(parameterized.TestCase):
  BEGIN, UNTIL = 2, 10

  @parameterized.parameters("linear", "exponential")
  def test_training_follows_the_paper(self, kind):
    tx = weights.mask_decay(
      SGD, n=1, m=4, begin=self.BEGIN, until=self.UNTIL, kind=kind
    )
    run = problem.Run(tx, 13, enforced=False)
    span = self.UNTIL - self.BEGIN
    rate = 1 / span if kind == "linear" else math.log(100) / span
    w = problem.f64(problem.start())
    mask = {n: select_oracle.nm_mask(np.abs(w[n]), 1, 4, 0) for n in SPARSE}
    for t in range(len(run)):
      beta = oracle.mask_decay_beta(t, rate, kind, self.BEGIN)
      beta = 0.0 if t >= self.UNTIL else beta
      np.testing.assert_allclose(run.states[t].leak, beta, atol=1e-7)
      seen = dict(w)
      for n in SPARSE:
        np.testing.assert_array_equal(run.masks[t][n], mask[n])
        seen[n] = oracle.mask_decay_forward(w[n], mask[n], beta)
      assert_close(run.seen[t], seen)
      grads = problem.oracle_gradient(seen)
      for n in SPARSE:
        passed = oracle.mask_decay_gradient(grads[n], mask[n], beta)
        w[n] = w[n] - LR * passed
        if t + 1 <= self.UNTIL:
          mask[n] = select_oracle.nm_mask(np.abs(w[n]), 1, 4, 0)
      w["bias"] = w["bias"] - LR * grads["bias"]
      assert_close(run.params[t + 1], w)
    for t in range(self.UNTIL, len(run) + 1):
      problem.assert_zeros(run.seen[t], run.masks[t])
      for n in SPARSE:
        groups = run.seen[t][n].reshape(-1, 4, w[n].shape[1])
        assert ((groups != 0).sum(1) == 1).all()
    # Beyond the end a masked weight receives nothing at all.
    for t in range(self.UNTIL, len(run)):
      for n in SPARSE:
        still = ~run.masks[t][n]
        np.testing.assert_array_equal(
          run.params[t + 1][n][still], run.params[t][n][still]
        )


class StructureDecayTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 4, "stepwise"),
    (1, 8, "stepwise"),
    (2, 4, "stepwise"),
    (2, 8, "stepwise"),
    (4, 8, "stepwise"),
    (7, 8, "stepwise"),
    (1, 2, "stepwise"),
    (1, 16, "stepwise"),
    (1, 2, "geometric"),
    (2, 4, "geometric"),
  )
  def test_patterns(self, n, m, kind):
    got = weights.decay_patterns(n, m, kind)
    assert got == oracle.structure_decay_patterns(n, m, kind)
    assert got[-1] == (n, m)
    densities = [a / b for a, b in got]
    assert densities == sorted(densities, reverse=True)

  @parameterized.parameters(
    (1, 8, "stepwise", None), (1, 2, "geometric", "^a$")
  )
  def test_training_follows_the_paper(self, n, m, kind, where):
    begin, until = 2, 11
    tx = weights.structure_decay(
      SGD, n=n, m=m, begin=begin, until=until, kind=kind, where=where
    )
    run = problem.Run(tx, 13, enforced=False)
    patterns = oracle.structure_decay_patterns(n, m, kind)
    assert len(patterns) == 4
    names = SPARSE if where is None else ("a",)
    w = problem.f64(problem.start())
    for t in range(len(run) + 1):
      stage = min((t - begin) // 3, 3)  # equal intervals, the last at `until`
      masked, mask = dict(w), {}
      for name in names:
        mask = np.ones(w[name].shape, bool)
        if t >= begin:
          mask = select_oracle.nm_mask(np.abs(w[name]), *patterns[stage], 0)
        np.testing.assert_array_equal(run.masks[t][name], mask, f"step {t}")
        masked[name] = w[name] * mask
      assert_close(run.seen[t], masked)
      grads = problem.oracle_gradient(masked)
      for name in w:  # straight-through: the whole gradient
        w[name] = w[name] - LR * grads[name]
      if t < len(run):
        assert_close(run.params[t + 1], w)


NOTHING = dict(
  static=functools.partial(weights.static, sparsity=0.0, key=KEY),
  static_nm=functools.partial(
    weights.static, structure=structures.NM(4, 4), key=KEY
  ),
  static_block=functools.partial(
    weights.static,
    sparsity=0.0,
    structure=structures.Block((4, 4)),
    key=KEY,
  ),
  gradual_magnitude=functools.partial(
    weights.gradual_magnitude, sparsity=0.0, begin=0, until=4, every=2
  ),
  set_=functools.partial(weights.set_, sparsity=0.0, every=2, key=KEY),
  rigl=functools.partial(weights.rigl, sparsity=0.0, every=2, until=6, key=KEY),
  rigl_global=functools.partial(
    weights.rigl,
    sparsity=0.0,
    every=2,
    until=6,
    distribution="global",
    key=KEY,
  ),
  srigl=functools.partial(
    weights.srigl, sparsity=0.0, every=2, until=6, key=KEY
  ),
  dst_ee=functools.partial(
    weights.dst_ee, sparsity=0.0, every=2, until=6, key=KEY
  ),
  top_kast=functools.partial(
    weights.top_kast, sparsity=0.0, backward_sparsity=0.0, decay=0.0
  ),
  sr_ste=functools.partial(weights.sr_ste, n=4, m=4),
  mask_decay=functools.partial(weights.mask_decay, n=4, m=4, until=3),
  structure_decay=functools.partial(weights.structure_decay, n=4, m=4, until=3),
)


# Near to others in the table, for make test-all.
RARER = ("static", "rigl_global", "dst_ee")


class NothingMaskedTest(parameterized.TestCase):
  @functools.cached_property
  def plain(self):
    inner = optax.adamw(0.05)

    @problem.jit
    def step(params, state):
      grads = jax.grad(problem.loss)(params)
      updates, state = inner.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    params, state = problem.start(), inner.init(problem.start())
    for _ in range(5):
      params, state = step(params, state)
    return problem.copied((params, state))

  @parameterized.named_parameters((n, n) for n in NOTHING if n not in RARER)
  def test_it_is_the_inner_optimizer_bit_for_bit(self, name):
    self.check(name)

  @parameterized.named_parameters((n, n) for n in RARER)
  @pytest.mark.slow
  def test_it_too_is_the_inner_optimizer_bit_for_bit(self, name):
    self.check(name)

  def check(self, name):
    run = problem.Run(NOTHING[name](optax.adamw(0.05)), 5, enforced=False)
    for masks in run.masks:
      assert all(m.all() for m in masks.values())
    params, inner = self.plain
    problem.assert_bits(run.params[-1], params)
    problem.assert_bits(run.states[-1].inner, inner)


class ItopTest(parameterized.TestCase):
  def test_explored_is_the_union_of_all_masks(self):
    tx = weights.rigl(
      SGD, sparsity=0.8, every=2, until=10, key=KEY, track_explored=True
    )
    run = problem.Run(tx, 12)
    for t in range(len(run) + 1):
      times = [[m[n] for n in SPARSE] for m in run.masks[: t + 1]]
      want = oracle.explored_share(times)
      ever = problem.unpacked(run.states[t].explored, run.params[t])
      assert sum(ever[n].sum() for n in SPARSE) / 320 == want
    assert 0.2 < want < 1
    rows = weights.summary(run.states[-1], run.params[-1]).layers
    for n in SPARSE:
      assert rows[n].explored == np.any(run.sparse(n), 0).mean()
      assert rows[n].flipped == flips(run, n)[10]
      assert rows[n].nonzero == run.masks[-1][n].sum()
    assert rows["bias"].flipped == 0
