"""Routers beside their oracles, banks, and logits with all that is awkward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import routing
from tests.oracles import routing as oracle

# Compilation is most of what these tests cost, and this makes it cheaper. It
# changes the machine code only, not what is computed.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
jit = functools.partial(jax.jit, compiler_options=FAST)
changed = dataclasses.replace
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)

# No count divides another.
TOKENS, EXPERTS, WIDTH, HIDDEN = 11, 6, 3, 2


def normal(seed, *shape):
  draw = np.random.default_rng(seed).standard_normal(shape)
  return draw.astype(np.float32)


def uniform(seed, *shape):
  return np.random.default_rng(seed).random(shape).astype(np.float32)


def grid(seed, *shape):
  """Quarters between -3 and 3: many are equal, and none is merely close."""
  draw = np.random.default_rng(seed).integers(-12, 13, shape) / 4
  return draw.astype(np.float32)


def awkward(seed, tokens=TOKENS, experts=EXPERTS):
  """Logits of which hardly a row is plain, and which tokens are no padding."""
  logits = grid(seed, tokens, experts)
  valid = np.ones(tokens, bool)
  rows = iter(range(1, tokens))
  logits[next(rows)] = 0.5  # all equal
  logits[next(rows)] = np.resize([0.0, -0.0], experts)
  logits[next(rows), experts // 2] = np.nan
  logits[next(rows), 0] = np.inf
  logits[next(rows), ::2] = -np.inf
  logits[next(rows)] = -np.inf
  valid[next(rows)] = False
  row = next(rows)
  valid[row], logits[row] = False, np.nan
  return logits, valid


@dataclasses.dataclass(frozen=True)
class Router:
  """A router of the library and its oracle.

  Attributes:
    route: function of arrays and token_valid, an Assignment.
    oracle: function of arrays, token_valid and an assignment to repeat.
    edges: "1", "2", "all" a token, or "choice" where experts choose: those of
      a kind have equal shapes.
    more: by name what is drawn beside the logits: shapes.
    learned: what has gradients beside the logits.
  """

  route: object
  oracle: object
  edges: str = "2"
  more: tuple = ()
  learned: tuple = ()

  def draw(self, seed, tokens=TOKENS, experts=EXPERTS, plain=False):
    """What it takes, by name, and token_valid."""
    if plain:
      logits, valid = grid(seed, tokens, experts), np.ones(tokens, bool)
    else:
      logits, valid = awkward(seed, tokens, experts)
    given = {"logits": logits}
    sizes = {"T": tokens, "E": experts}
    for i, (name, shape) in enumerate(self.more):
      given[name] = normal(99 + seed + i, *(sizes[x] for x in shape))
    return given, valid


def plain(route, same, edges="2", **options):
  """A router of logits alone, and options that both take."""
  return Router(
    lambda given, valid: route(given["logits"], token_valid=valid, **options),
    lambda given, valid, like: same(
      given["logits"], token_valid=valid, like=like, **options
    ),
    edges,
  )


def _with_bias(**options):
  def route(given, valid):
    return routing.top_k(
      given["logits"], 2, bias=given["bias"], token_valid=valid, **options
    )

  def same(given, valid, like):
    return oracle.top_k(
      given["logits"],
      2,
      bias=given["bias"],
      token_valid=valid,
      like=like,
      **options,
    )

  return Router(route, same, "2", (("bias", "E"),))


def _relu(k_max, edges):
  return Router(
    lambda given, valid: routing.relu(
      given["logits"], given["gain"], k_max=k_max, token_valid=valid
    ),
    lambda given, valid, like: oracle.relu_norm(
      given["logits"], given["gain"], k_max, token_valid=valid, like=like
    ),
    edges,
    (("gain", "E"),),
    ("gain",),
  )


def _dense_to_sparse(k_max, edges, threshold, renormalize):
  return Router(
    lambda given, valid: routing.dense_to_sparse(
      given["logits"],
      0.7,
      threshold,
      gumbel=given["gumbel"],
      k_max=k_max,
      renormalize=renormalize,
      token_valid=valid,
    ),
    lambda given, valid, like: oracle.gumbel_threshold(
      given["logits"],
      given["gumbel"],
      0.7,
      threshold,
      k_max,
      renormalize=renormalize,
      token_valid=valid,
      like=like,
    ),
    edges,
    (("gumbel", "TE"),),
  )


def _noisy():
  def route(given, valid):
    noise = given["noise"] * jax.nn.softplus(given["noise_logits"])
    return routing.top_k(given["logits"] + noise, 2, token_valid=valid)

  def same(given, valid, like):
    return oracle.noisy_top_k(
      given["logits"],
      2,
      given["noise"],
      given["noise_logits"],
      token_valid=valid,
      like=like,
    )

  more = (("noise", "TE"), ("noise_logits", "TE"))
  return Router(route, same, "2", more, ("noise_logits",))


def _per_chunk():
  chunk = np.array([0, 0, 2, 2, 1, 1, 1, 3, 0, -1, 3, 2, 9, 1, 0, 2])

  def route(given, valid):
    logits = given["logits"]
    of = chunk[: len(logits)]
    logits = routing.per_chunk(logits, jnp.array(of), 4, token_valid=valid)
    return routing.top_k(logits, 2, renormalize=True, token_valid=valid)

  def same(given, valid, like):
    logits = given["logits"]
    of = chunk[: len(logits)]
    logits = oracle.per_chunk(logits, of, 4, token_valid=valid)
    return oracle.top_k(
      logits, 2, renormalize=True, token_valid=valid, like=like
    )

  return Router(route, same)


def _by_id():
  ids = np.array([0, 5, 1, -1, 0, 0, 6, 2, 1, 0, 3, 2, 0, 1, 99, 0])

  def of(given):
    return ids[: len(given["logits"])]

  return Router(
    lambda given, valid: routing.by_id(
      jnp.array(of(given)), given["logits"].shape[1], token_valid=valid
    ),
    lambda given, valid, like: oracle.by_modality(
      of(given), given["logits"].shape[1], token_valid=valid
    ),
    "1",
  )


def _depths(scores):
  return Router(
    lambda given, valid: routing.expert_choice(
      given["logits"][:, :1], 4, scores=scores, token_valid=valid
    ),
    lambda given, valid, like: oracle.mixture_of_depths(
      np.asarray(given["logits"])[:, 0],
      4,
      weight=scores,
      token_valid=valid,
      like=like,
    ),
    "one expert",
  )


top_k = functools.partial(plain, routing.top_k, oracle.top_k)
top_p = functools.partial(plain, routing.top_p, oracle.top_p)
expert_choice = functools.partial(
  plain, routing.expert_choice, oracle.expert_choice, "choice"
)
ODD = np.arange(EXPERTS) % 2 == 1
SOME = np.random.default_rng(5).random((TOKENS, EXPERTS)) < 0.4

ROUTERS = {
  "switch": top_k("1", k=1),
  "top 2": top_k(k=2),
  "Mixtral": top_k(k=2, renormalize=True),
  "all, renormalized": top_k("all", k=EXPERTS, renormalize=True),
  "sigmoid": top_k(k=2, scores="sigmoid"),
  "sigmoid, renormalized": top_k(
    k=2, scores="sigmoid", renormalize=True, scale=2.5
  ),
  "bias": _with_bias(),
  "DeepSeek-V3": _with_bias(
    scores="sigmoid", renormalize=True, scale=2.5, groups=(3, 2)
  ),
  "DeepSeek-V2": top_k(k=2, groups=(2, 1), group_best=1, scale=16.0),
  "groups": top_k(k=2, groups=(3, 1)),
  "groups of one": top_k(k=2, groups=(6, 3), scores="sigmoid"),
  "allowed": top_k(k=2, allowed=ODD, renormalize=True),
  "allowed by token": top_k(k=2, allowed=SOME, scores="sigmoid"),
  "forced": top_k(k=2, forced=ODD & (np.arange(EXPERTS) > 2)),
  "forced by token": top_k(
    k=2, forced=SOME, allowed=~ODD, groups=(3, 1), renormalize=True
  ),
  "noisy": _noisy(),
  "top p": top_p("all", p=0.7, k_max=EXPERTS),
  "top p, two": top_p(p=0.5, k_max=2, renormalize=True),
  "top p of 1": top_p("all", p=1.0, k_max=EXPERTS),
  "EvoMoE": _dense_to_sparse(None, "all", 0.1, False),
  "EvoMoE, two": _dense_to_sparse(2, "2", 0.25, True),
  "BlockFFN": _relu(None, "all"),
  "BlockFFN, two": _relu(2, "2"),
  "expert choice": expert_choice(capacity=4),
  "expert choice, sigmoid": expert_choice(capacity=4, scores="sigmoid"),
  "depths": _depths("sigmoid"),
  "depths, identity": _depths("identity"),
  "per chunk": _per_chunk(),
  "by id": _by_id(),
}


def same(found, routed):
  """Holds an assignment against the oracle's."""
  found = jax.tree.map(np.asarray, found)
  valid = routed.valid
  np.testing.assert_array_equal(found.valid, valid)
  for name in ("token", "expert", "rank"):
    got, want = getattr(found, name), getattr(routed, name)
    assert got.dtype == np.int32, name
    np.testing.assert_array_equal(got[valid], want[valid], err_msg=name)
    # In range, whatever they are.
    size = {"token": found.num_tokens, "expert": found.num_experts}.get(name)
    assert (got >= 0).all() and (size is None or (got < size).all()), name
  assert found.weight.dtype == np.float32
  close(found.weight, routed.weight)
  assert not found.weight[~valid].any()
  np.testing.assert_array_equal(found.token_valid, routed.metrics["counted"])
  assert found.num_experts == routed.num_experts


# --- Banks: one of the library, and what it is in the oracle.


def plain_bank(params, rows, sizes):
  """Experts as a function of rows that knows of nothing else."""
  expert = jnp.repeat(
    jnp.arange(len(sizes)), sizes, total_repeat_length=len(rows)
  )
  hidden = jnp.einsum("md,mdh->mh", rows, params["up"][expert])
  hidden *= jax.nn.silu(jnp.einsum("md,mdh->mh", rows, params["gate"][expert]))
  return jnp.einsum("mh,mhd->md", hidden, params["down"][expert])


def _ffn(activation):
  return lambda params, expert, row: oracle.ffn(params, expert, row, activation)


def biased_ffn(params, expert, row, activation="relu"):
  """`oracle.ffn` with a bias of whichever of its products has one."""

  def layer(name, x):
    bias = params.get(f"{name}_bias")
    return x @ params[name][expert] + (0 if bias is None else bias[expert])

  hidden = layer("up", row)
  if "gate" in params:
    hidden = oracle.activate(layer("gate", row), activation) * hidden
  else:
    hidden = oracle.activate(hidden, activation)
  return layer("down", hidden)


# gated or not, the library's, the oracle's
BANKS = {
  "SwiGLU": (True, routing.FeedForward(jax.nn.silu), _ffn("silu")),
  "GELU": (False, routing.FeedForward(jax.nn.gelu), _ffn("gelu")),
  "plain": (True, plain_bank, _ffn("silu")),
  "biased": (True, routing.FeedForward(jax.nn.relu), biased_ffn),
}
UNBIASED = [name for name in BANKS if name != "biased"]


@functools.cache
def parameters(bank, experts=EXPERTS, width=WIDTH, hidden=HIDDEN):
  shapes = {"up": (width, hidden), "down": (hidden, width)}
  if BANKS[bank][0]:
    shapes["gate"] = (width, hidden)
  if bank == "biased":
    shapes |= {f"{name}_bias": n[1:] for name, n in shapes.items()}
  return {
    name: normal(7 + i, experts, *shape)
    for i, (name, shape) in enumerate(sorted(shapes.items()))
  }


def tokens_of(valid, routed, width=WIDTH, seed=3):
  """Rows [tokens, width]; NaN where a token is padding or goes nowhere."""
  x = normal(seed, len(valid), width)
  x[~routed.metrics["counted"]] = np.nan
  return x


def found_of(routed, edges):
  """The oracle's assignment as one of the library."""
  choices = None
  if edges not in ("choice", "one expert"):
    choices = len(routed.token) // routed.num_tokens
  p = np.zeros((routed.num_tokens, routed.num_experts), np.float32)
  return routing.Assignment(
    token=routed.token.astype(np.int32),
    expert=routed.expert.astype(np.int32),
    rank=routed.rank.astype(np.int32),
    weight=routed.weight.astype(np.float32),
    valid=routed.valid,
    logits=p,
    probabilities=p,
    token_valid=routed.metrics["counted"],
    unsound=np.int32(0),
    choices=choices,
  )


def layer(dispatch, bank):
  """f(x, found, params, cotangent) -> y, and gradients by name."""

  def f(x, found, params, cotangent):
    def run(x, weight, params):
      edges = dataclasses.replace(found, weight=weight)
      return dispatch(x, edges, BANKS[bank][1], params)

    y, pull = jax.vjp(run, x, found.weight, params)
    return y, dict(zip(("x", "weight", "params"), pull(cotangent)))

  return f


def layer_of(x, routed, bank, params, cotangent, kept=None):
  """What `layer` returns, of the oracle: y, and gradients by name."""
  kept = routed.valid if kept is None else kept
  run = BANKS[bank][2]
  # Only what is read has a gradient; the rest may be NaN.
  clean = np.where(np.isnan(x), 0, x)
  arrays = {"x": clean, **params}

  def loss(arrays):
    y = oracle.dispatch(arrays["x"], routed, run, arrays, kept)
    return (y * cotangent).sum()

  found = oracle.numerical_gradients(loss, arrays)
  weight = oracle.weight_gradient(clean, routed, run, params, cotangent, kept)
  y = oracle.dispatch(x, routed, run, params, kept)
  return y, dict(
    x=found["x"], weight=weight, params={n: found[n] for n in params}
  )


def same_layer(got, want, name=""):
  """Holds what `layer` returns against `layer_of`."""
  same = functools.partial(close, rtol=1e-4, atol=1e-5, err_msg=name)
  jax.tree.map(same, got, want)
