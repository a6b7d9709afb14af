"""Bad input: an error that names the argument, and nothing lost."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax import weights
from sparsejax.select import schedules
from sparsejax.select import structures

KEY = jax.random.key(0)
SGD = optax.sgd(0.1)
BLOCK = structures.Block((3, 3))


def shapes(**more):
  both = {"a": (16, 8), "b": (8, 24), "bias": (24,)} | more
  return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in both.items()}


def started(make, params=None, **settings):
  """What a rule raises when it is made or first used; nothing is computed."""
  tx = make(SGD, **settings)
  return tx, jax.eval_shape(tx.init, shapes() if params is None else params)


def rigl(inner, **settings):
  return weights.rigl(
    inner, **(dict(sparsity=0.75, every=2, until=9, key=KEY) | settings)
  )


def ramp(step):
  return 0.1 + step / 100


class SettingsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("high", rigl, dict(sparsity=1.1), r"sparsity must be in \[0, 1\].*1.1"),
    ("low", rigl, dict(sparsity=-1), r"sparsity must be in \[0, 1\].*-1"),
    (
      "scheduled",
      rigl,
      dict(sparsity=lambda step: 0.5 + step),
      r"sparsity of \w+ at step 2 must be in \[0, 1\], got 2.5",
    ),
    (
      "final_sparsity",
      weights.gradual_magnitude,
      dict(sparsity=2, begin=0, until=100),
      r"sparsity must be in \[0, 1\], got 2",
    ),
    (
      "initial_sparsity",
      weights.gradual_magnitude,
      dict(sparsity=0.5, begin=0, until=100, initial_sparsity=-1),
      r"initial_sparsity must be in \[0, 1\], got -1",
    ),
    (
      "gradual_until",
      weights.gradual_magnitude,
      dict(sparsity=0.5, begin=0, until=150),
      "until must be after begin by a multiple of every.*until=150",
    ),
    (
      "drop_fraction",
      rigl,
      dict(drop_fraction=1.5),
      r"drop_fraction must be in \[0, 1\], got 1.5",
    ),
    (
      "drop_fraction_schedule",
      rigl,
      dict(drop_fraction=lambda step: 1.5),
      "drop_fraction",
    ),
    (
      "set_drop_fraction",
      weights.set_,
      dict(sparsity=0.5, key=KEY, drop_fraction=-0.5),
      r"drop_fraction must be in \[0, 1\], got -0.5",
    ),
    ("every", rigl, dict(every=0), "every must be at least 1, got 0"),
    ("until", rigl, dict(until=0), "until must be at least 1, got 0"),
    (
      "distribution",
      rigl,
      dict(distribution="erkk"),
      "distribution must be .*uniform.*got 'erkk'",
    ),
    (
      "distribution_and_paths",
      rigl,
      dict(sparsity={"a": 0.5}, distribution="er"),
      "distribution must not be given where sparsity is by path",
    ),
    ("key", rigl, dict(key=None), "key must be given .*got None"),
    ("int_key", rigl, dict(key=0), "key must be a PRNG key .*got 0"),
    (
      "set_key",
      weights.set_,
      dict(sparsity=0.5, key=None),
      "key must be given",
    ),
    (
      "static_int_key",
      weights.static,
      dict(sparsity=0.5, key=17),
      "key must be a PRNG key .*got 17",
    ),
    ("ablate", weights.srigl, dict(ablate=2), r"ablate must be in \[0, 1\]"),
    ("c", weights.dst_ee, dict(c=-1), "c must not be negative, got -1"),
    (
      "epsilon",
      weights.dst_ee,
      dict(epsilon=0),
      "epsilon must be positive, got 0",
    ),
    (
      "backward_sparsity",
      weights.top_kast,
      dict(sparsity=0.5, backward_sparsity=0.75),
      r"backward_sparsity must be in \[0, sparsity=0.5\], got 0.75",
    ),
    ("n", weights.sr_ste, dict(n=5, m=4), "n=5, m=4"),
    ("m", weights.sr_ste, dict(n=0, m=0), "got n=0, m=0"),
    (
      "kind",
      weights.mask_decay,
      dict(until=9, kind="cubic"),
      'kind must be "linear" or "exponential", got \'cubic\'',
    ),
    (
      "kind_of_structure",
      weights.structure_decay,
      dict(until=9, kind="cubic"),
      'kind must be "stepwise" or "geometric", got \'cubic\'',
    ),
    (
      "decay_until",
      weights.mask_decay,
      dict(until=3, begin=3),
      "until must be after begin=3, got 3",
    ),
    (
      "structure_until",
      weights.structure_decay,
      dict(until=3, begin=3),
      "until must be after begin=3, got 3",
    ),
    ("where", rigl, dict(where="attention"), "where .*'attention'"),
    ("nowhere", rigl, dict(where=lambda n, p: False), "where must select"),
    ("axes", rigl, dict(axes={"c": structures.Axes()}), "axes .*'c'"),
    (
      "stack_axis",
      rigl,
      dict(axes=structures.Axes(stack=(5,))),
      "axis must be in",
    ),
    (
      "axes_twice",
      rigl,
      dict(axes=structures.Axes(stack=(0,))),
      "axes must name each axis once",
    ),
    (
      "sparsity_path",
      rigl,
      dict(sparsity={"c": 0.5}),
      "sparsity has a pattern that matches no weight.*'c'",
    ),
    (
      "structure_path",
      rigl,
      dict(structure={"c": BLOCK}),
      "structure has a pattern that matches no weight.*'c'",
    ),
    (
      "block",
      rigl,
      dict(structure=BLOCK),
      r"structure of a: Block shape \(3, 3\) must divide .*\(16, 8\)",
    ),
    (
      "m_does_not_divide",
      weights.sr_ste,
      dict(n=1, m=3),
      r"structure of a: m must divide axis 0 .*m=3 for shape \(16, 8\)",
    ),
    (
      "stage_does_not_divide",
      weights.structure_decay,
      dict(n=2, m=8, until=9, kind="geometric"),
      "structure of .: m must divide",
    ),
    (
      "useless_sparsity",
      weights.static,
      dict(sparsity=0.5, structure=structures.NM(2, 4), key=KEY),
      "sparsity must be None where every structure is n:m.*0.5",
    ),
    (
      "useless_distribution",
      weights.static,
      dict(distribution="erk", structure=structures.NM(2, 4), key=KEY),
      "distribution must be None where every structure is n:m.*'erk'",
    ),
    (
      "no_sparsity",
      weights.static,
      dict(key=KEY),
      r"sparsity must be given for \['a', 'b'\]",
    ),
    (
      "no_sparsity_in_part",
      weights.static,
      dict(structure={"a": structures.NM(2, 4)}, key=KEY),
      r"sparsity must be given for \['b'\]",
    ),
    (
      "endless_schedule",
      weights.set_,
      dict(sparsity=0.5, key=KEY, drop_fraction=ramp),
      "until must be given with a schedule",
    ),
    (
      "global_fan_in",
      rigl,
      dict(structure=structures.ConstantFanIn(), distribution="global"),
      'distribution="global" must have one structure',
    ),
    (
      "global_mixture",
      rigl,
      dict(structure={"a": structures.Channel()}, distribution="global"),
      'distribution="global" must have one structure',
    ),
    (
      "unreachable_density",
      rigl,
      dict(sparsity=0.99, distribution="uniform_plus"),
      "density is too low .*got 0.01",
    ),
  )
  def test_bad_settings(self, make, settings, message):
    if make in (weights.srigl, weights.dst_ee):
      settings = dict(sparsity=0.5, until=9, key=KEY) | settings
    with pytest.raises(ValueError, match=message):
      started(make, **settings)

  def test_unused_settings(self):
    for make in rigl, weights.sr_ste, weights.static:
      with pytest.raises(TypeError):
        make(SGD, drop_fractions=0.5, key=KEY)

  def test_two_billion_weights_in_one(self):
    with pytest.raises(ValueError, match=r"huge must have fewer than 2\*\*31"):
      started(rigl, shapes(huge=(2**16, 2**15)), distribution="uniform")

  def test_old_keys_serve(self):
    _, old = started(rigl, key=jax.random.PRNGKey(0))
    _, new = started(rigl, key=jax.random.key(0))
    assert old.key.dtype == new.key.dtype == jnp.uint32
    assert old.key.shape == new.key.shape

  def test_pattern_finds_nothing_in_what_optax_hides(self):
    # With optax.masked or partition the rest of the tree is not there.
    tx = optax.masked(rigl(SGD), {"a": True, "b": False, "bias": False})
    state = jax.eval_shape(tx.init, shapes())
    assert jax.tree.leaves(state.inner_state.masks)[0].shape == (2, 8)


class UseTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("rigl", rigl), ("sr_ste", weights.sr_ste), ("top_kast", None)
  )
  def test_missing_params(self, make):
    if make is None:
      make = functools.partial(
        weights.top_kast, sparsity=0.5, backward_sparsity=0.2
      )
    tx, state = started(make)
    with pytest.raises(ValueError, match="params must be given to update"):
      jax.eval_shape(tx.update, shapes(), state)
    with pytest.raises(ValueError, match="params must be given to update"):
      jax.eval_shape(optax.chain(tx).update, shapes(), (state,))

  def test_state_of_another_model(self):
    tx, state = started(rigl)
    wider = shapes(a=(32, 8))
    renamed = shapes()
    renamed["c"] = renamed.pop("a")
    for params in wider, renamed:
      for use in (
        lambda s, p: tx.update(p, s, p),
        weights.masks,
        weights.sparse_params,
      ):
        with pytest.raises(ValueError, match="opt_state is of another model"):
          jax.eval_shape(use, state, params)

  def test_weights_that_came_later(self):
    tx, state = started(rigl)
    params = shapes(c=(4, 4))
    with pytest.raises(ValueError, match="opt_state"):
      jax.eval_shape(tx.update, params, state, params)

  def test_no_sparsifier(self):
    params = {"a": jnp.ones((4, 4))}
    state = optax.adam(0.1).init(params)
    for use in weights.masks, weights.sparse_params, weights.summary:
      with pytest.raises(ValueError, match="opt_state must hold"):
        use(state, params)

  def test_not_the_last_link(self):
    tx = optax.chain(optax.clip(1.0), rigl(SGD), optax.scale(0.5))
    state = jax.eval_shape(tx.init, shapes())
    for use in weights.masks, weights.sparse_params:
      with pytest.raises(ValueError, match="must be the last link"):
        jax.eval_shape(use, state, shapes())

  def test_the_last_link_of_a_nested_chain(self):
    tx = optax.chain(optax.clip(1.0), optax.chain(optax.identity(), rigl(SGD)))
    state = jax.eval_shape(tx.init, shapes())
    got = jax.eval_shape(weights.masks, state, shapes())
    assert got["a"].shape == (16, 8) and got["a"].dtype == bool

  def test_a_nested_chain_that_is_not_the_last_link(self):
    tx = optax.chain(optax.chain(rigl(SGD)), optax.scale(0.5))
    state = jax.eval_shape(tx.init, shapes())
    with pytest.raises(ValueError, match="must be the last link"):
      jax.eval_shape(weights.masks, state, shapes())

  @parameterized.named_parameters(
    ("name", {"c": np.ones((16, 8), bool)}, "masks.'c'. must be"),
    ("shape", {"a": np.ones((8, 8), bool)}, "masks.'a'. must be"),
    ("dtype", {"a": np.ones((16, 8))}, "masks.'a'. must be a boolean"),
  )
  def test_masks_to_keep(self, masks, message):
    tx = weights.keep_masked(masks)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(tx.init, shapes())

  def test_masks_to_keep_without_params(self):
    tx = weights.keep_masked({"a": np.ones((16, 8), bool)})
    state = jax.eval_shape(tx.init, shapes())
    with pytest.raises(ValueError, match="params must be given to update"):
      jax.eval_shape(tx.update, shapes(), state)

  def test_schedules_may_be_of_optax(self):
    _, state = started(
      rigl,
      sparsity=schedules.cubic(0.0, 0.9, 0, 8),
      drop_fraction=optax.cosine_decay_schedule(0.3, 9),
    )
    assert state.masks["a"].shape == (2, 8)
