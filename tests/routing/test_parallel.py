"""Experts over devices: what a loop over edges gives, on every mesh."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels import aot
from sparsejax import routing
from tests import common
from tests.kernels import test_aot
from tests.oracles import routing as oracle
from tests.routing import problem

AUTO, EXPLICIT = common.AXIS_TYPES
TOKENS, EXPERTS, SIZE = 32, 8, 2
MESHES = {
  "expert": (8, ("expert",)),
  "data x expert": ((2, 4), ("data", "expert")),
  "expert x data": ((4, 2), ("expert", "data")),
  "data": (8, ("data",)),
  "one device": (1, ("expert",)),
}


@functools.cache
def mesh_of(name, axis_type):
  shape, names = MESHES[name]
  shape = shape if isinstance(shape, tuple) else (shape,)
  return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(names))


@functools.cache
def edges(seed, size=None):
  """An assignment of the oracle, tokens, and which edges are kept."""
  router = problem.ROUTERS["Mixtral"]
  given, valid = router.draw(seed, TOKENS, EXPERTS)
  routed = router.oracle(given, valid, None)
  return routed, problem.tokens_of(valid, routed), oracle.keep(routed, size)


@functools.cache
def expected(seed, bank, size=None):
  routed, x, kept = edges(seed, size)
  params = problem.parameters(bank, EXPERTS)
  cotangent = problem.normal(2, *x.shape)
  return problem.layer_of(x, routed, bank, params, cotangent, kept)


@functools.cache
def compiled(dispatch, mesh, axis_type, bank, size=None):
  names = mesh_of(mesh, axis_type).axis_names
  options = {} if size is None else {"size": size}
  run = routing.over_devices(
    functools.partial(getattr(routing, dispatch), **options),
    tokens=names,
    experts="expert" if "expert" in names else None,
  )
  return problem.jit(problem.layer(run, bank))


def place(args, mesh, by_expert):
  """x, edges, parameters and cotangent as they are divided."""
  rows, whole = jax.P(mesh.axis_names), jax.P()
  experts = jax.P("expert") if by_expert else whole
  put = lambda tree, spec: jax.tree.map(
    lambda x: common.place(x, mesh, spec if np.ndim(x) else whole), tree
  )
  x, found, params, cotangent = args
  return put(x, rows), put(found, rows), put(params, experts), put(
    cotangent, rows
  )  # fmt: skip


def check(dispatch, mesh_name, axis_type, bank, size=None):
  run = compiled(dispatch, mesh_name, axis_type, bank, size)
  mesh = mesh_of(mesh_name, axis_type)
  params = problem.parameters(bank, EXPERTS)
  for seed in range(2):
    routed, x, kept = edges(seed, size)
    found = problem.found_of(routed, "2")
    weight = np.where(kept, found.weight, 0).astype(np.float32)
    found = problem.changed(found, valid=kept, weight=weight)
    args = x, found, params, problem.normal(2, *x.shape)
    with jax.set_mesh(mesh):
      got = run(*place(args, mesh, "expert" in mesh.axis_names))
    problem.same_layer(got, expected(seed, bank, size))
    rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    assert got[0].sharding.is_equivalent_to(rows, 2)
  assert run._cache_size() == 1


# Every dispatcher, kind of mesh and kind of axes at least once.
QUICK = [
  ("expert_parallel", "data x expert", EXPLICIT, "SwiGLU", None),
  ("ring_of_experts", "expert", AUTO, "plain", None),
  ("dropless", "data", EXPLICIT, "plain", None),
]
SMALL = ("expert_parallel", "expert", AUTO, "GELU", SIZE)
REST = [
  (dispatch, mesh, axis_type, bank, size)
  for i, (dispatch, size) in enumerate(
    (
      ("expert_parallel", None),
      ("expert_parallel", SIZE),
      ("ring_of_experts", None),
    )
  )
  for j, mesh in enumerate(MESHES)
  if mesh != "data"
  for k, axis_type in enumerate(common.AXIS_TYPES)
  for bank in [problem.UNBIASED[(i + j + k) % 3]]
  if (dispatch, mesh, axis_type, bank, size) not in [*QUICK, SMALL]
] + [("dropless", "data", AUTO, "SwiGLU", None)]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_against_the_oracle(case):
  check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL, *REST], ids=str)
def test_against_the_oracle_everywhere(case):
  check(*case)


@pytest.mark.slow
def test_beyond_the_size_edges_count_for_nothing():
  """Without a limit nothing is overwritten: an expert's first edges stay."""
  case = SMALL
  mesh = mesh_of(*case[1:3])
  routed, x, _ = edges(0)
  kept, taken = routed.valid.copy(), {}
  per_device = len(kept) // 8
  for e in np.flatnonzero(kept):
    at = e // per_device, routed.expert[e]
    taken[at] = taken.get(at, 0) + 1
    kept[e] = taken[at] <= SIZE
  assert (kept != routed.valid).any()
  bank, params = case[3], problem.parameters(case[3], EXPERTS)
  args = x, problem.found_of(routed, "2"), params, problem.normal(2, *x.shape)
  with jax.set_mesh(mesh):
    got = compiled(*case)(*place(args, mesh, True))
  problem.same_layer(
    got, problem.layer_of(x, routed, bank, params, args[-1], kept)
  )


def test_all_tokens_to_one_expert():
  """The device of which gets the rows of all others."""
  case = QUICK[0]
  mesh = mesh_of(*case[1:3])
  routed, x, _ = edges(0)
  routed = problem.changed(routed, expert=np.full_like(routed.expert, 5))
  bank, params = case[3], problem.parameters(case[3], EXPERTS)
  args = x, problem.found_of(routed, "2"), params, problem.normal(2, *x.shape)
  with jax.set_mesh(mesh):
    got = compiled(*case)(*place(args, mesh, True))
  problem.same_layer(got, problem.layer_of(x, routed, bank, params, args[-1]))


# --- What is refused.


def call(tokens, experts, dispatch=routing.expert_parallel, count=EXPERTS,
         number=TOKENS, choices=2, size=None):  # fmt: skip
  given = {} if size is None else {"size": size}
  whole = routing.over_devices(
    functools.partial(dispatch, **given), tokens=tokens, experts=experts
  )

  def f(x, logits, params):
    if choices is None:
      found = routing.expert_choice(logits, 2)
    else:
      found = routing.top_k(logits, choices)
    return whole(x, found, problem.plain_bank, params)

  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = {"up": spec(count, 3, 2), "gate": spec(count, 3, 2)}
  params["down"] = spec(count, 2, 3)
  with jax.set_mesh(mesh_of("data x expert", AUTO)):
    jax.eval_shape(f, spec(number, 3), spec(number, count), params)


@pytest.mark.parametrize(
  "argument, given",
  [
    ("tokens", dict(tokens="data", experts="expert")),
    ("mesh", dict(tokens=("expert", "model"), experts="expert")),
    ("tokens", dict(tokens=("data", "expert"), experts="expert", number=12)),
    ("experts", dict(tokens="expert", experts="expert", count=6)),
    ("found", dict(tokens="expert", experts="expert", choices=None)),
    ("size", dict(tokens="expert", experts="expert", size=0)),
  ],
)
def test_errors_name_the_argument(argument, given):
  with pytest.raises(ValueError, match=rf"^{argument}\b.*got"):
    call(**given)


# --- For TPUs.


@test_aot.needs_tpu
def test_compiles_for_tpu():
  """Rows are sent as they are there: no copy of all to all devices."""
  target, tokens, experts, width, hidden = "v6e:2x2", 4096, 16, 512, 1024
  mesh = aot.make_mesh((4,), ("expert",), (AUTO,), target=target)
  by_device = jax.NamedSharding(mesh, jax.P("expert"))
  spec = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=by_device
  )
  size = routing.capacity_of(2 * tokens // 4, experts, 2.0)
  dispatch = routing.over_devices(
    functools.partial(routing.expert_parallel, size=size),
    tokens="expert",
    experts="expert",
  )

  def loss(params, x, logits):
    found, _ = routing.limit(routing.top_k(logits, 2), size)
    y = dispatch(x, found, routing.FeedForward(), params)
    return (y.astype(jnp.float32) ** 2).sum()

  params = {
    "up": spec(experts, width, hidden),
    "gate": spec(experts, width, hidden),
    "down": spec(experts, hidden, width),
  }
  compiled = aot.compile_for(
    jax.grad(loss, (0, 1, 2)),
    params,
    spec(tokens, width),
    spec(tokens, experts, dtype=jnp.float32),
    target=target,
    mesh=mesh,
  )
  assert compiled.chips == 4
  assert "ragged-all-to-all" in compiled.text
  assert len(compiled.kernels) >= 5


def step_for(target, shape, *, length=4096, factor=None):
  """A training step of a mixture of 64 experts, compiled; 4096 tokens a chip.

  Experts, and their share of AdamW's state, are divided over the second axis of
  the mesh, tokens over both. With a factor, what is beyond is dropped.
  """
  width, hidden, experts, k = 2048, 1408, 64, 6
  names = ("data", "expert")
  mesh = aot.make_mesh(shape, names, target=target)
  chips = math.prod(shape)
  size = None
  if factor is not None:  # of a chip's own tokens
    size = routing.capacity_of(length * k, experts, factor)

  def local(x, found, *args, **along):
    if size is not None:
      found, _ = routing.limit(found, size)
    return routing.expert_parallel(x, found, *args, **along, size=size)

  def make():
    return routing.MoE(
      width,
      hidden,
      experts,
      router=functools.partial(routing.top_k, k=k, renormalize=True),
      dispatch=routing.over_devices(local, tokens=names, experts="expert"),
      losses={routing.load_balance: 0.01},
      dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )

  graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
  tx = optax.adamw(1e-3)

  def place(path, x):
    spec = jax.P("expert") if "experts" in str(path) else jax.P()
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  args = jax.tree.map_with_path(
    place, (params, jax.eval_shape(tx.init, params), rest)
  )
  rows = jax.NamedSharding(mesh, jax.P(names))
  x = jax.ShapeDtypeStruct((chips, length, width), jnp.bfloat16, sharding=rows)

  def step(params, opt_state, rest, x):
    def loss(params, x):
      moe = nnx.merge(graph, params, rest, copy=True)
      y = moe(x)
      mean = jnp.square(y.astype(jnp.float32)).mean()
      return mean + routing.auxiliary_loss(moe)

    grads, of_x = jax.grad(loss, (0, 1))(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, of_x

  step = jax.jit(step, donate_argnums=(0, 1))
  return aot.compile_for(step, *args, x, target=target)


@test_aot.needs_tpu
@pytest.mark.parametrize(
  "factor", [None, pytest.param(1.25, marks=pytest.mark.soak)]
)
def test_compiles_for_64_chips(factor):
  """Four times sixteen: rows are sent four times, and nothing is gathered."""
  compiled = step_for("v5p:4x4x4", (4, 16), factor=factor)
  print(compiled)  # the table of docs/routing.md, with -s
  assert compiled.chips == 64
  edges, row = 4096 * 6, 2048 * 2
  room = edges if factor is None else min(edges, 4 * 480)
  found = compiled.collectives
  rows = found.pop("ragged-all-to-all")
  # To the experts and back, and so do the gradients.
  assert rows == aot.Collective(4, 2 * (16 * room + edges) * row)
  # Gradients of a chip's four experts, over those that have the same.
  weights = 4 * 3 * 2048 * 1408 * 2
  assert weights <= found.pop("all-reduce").bytes < weights + 2**20
  assert sum(x.bytes for x in found.values()) < 2**20, found
  needed = ("argument", "output", "temp", "generated_code")
  memory = sum(compiled.memory[name] for name in needed)
  assert memory - compiled.memory["alias"] < (20e9 if factor is None else 10e9)
