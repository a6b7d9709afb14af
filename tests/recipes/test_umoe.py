"""Pre-mixing attention against a loop, multi-head attention and a mixture."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import recipes
from sparsejax import routing
from tests import common
from tests.oracles import routing as oracle
from tests.routing import pieces

TOKENS, EXPERTS, WIDTH, HEAD, RANK, HIDDEN = 5, 3, 4, 2, 1, 2
VALID = np.array([False, True, True, True, False])
BANK = routing.FeedForward()
QUERIES = ("query", "key", "down", "up")


def arrays_of(seed=0, lead=()):
  bank = pieces.bank(seed + 6, EXPERTS, WIDTH, HIDDEN, gated=False)
  return {
    "x": pieces.draw(seed, *lead, TOKENS, WIDTH),
    "logits": pieces.draw(seed + 1, *lead, TOKENS, EXPERTS),
    "query": pieces.draw(seed + 2, WIDTH, HEAD),
    "key": pieces.draw(seed + 3, WIDTH, HEAD),
    "down": pieces.draw(seed + 4, EXPERTS, WIDTH, RANK),
    "up": pieces.draw(seed + 5, EXPERTS, RANK, HEAD),
    "first": bank["up"],
    "last": bank["down"],
  }


def route(logits, k=2, token_valid=None):
  logits = logits.reshape(-1, EXPERTS)
  if k is None:
    return routing.expert_choice(logits, 3, token_valid=token_valid)
  return routing.top_k(logits, k, renormalize=True, token_valid=token_valid)


def layer(arrays, bank=BANK, k=2, token_valid=None, **options):
  return recipes.premixed_experts(
    arrays["x"],
    route(arrays["logits"], k, token_valid),
    bank,
    {"up": arrays["first"], "down": arrays["last"]},
    {name: arrays[name] for name in QUERIES},
    **options,
  )


def loop(arrays, found, kept, *, causal=True, token_valid=None, eye=False):
  """Edge by edge, key by key."""
  x, y = arrays["x"], np.zeros(arrays["x"].shape)
  valid = np.ones(len(x), bool) if token_valid is None else token_valid
  params = {"up": arrays["first"], "down": arrays["last"]}
  for edge, t, e, weight in found.edges():
    reads = [j for j in range(len(x)) if valid[j] and (j <= t or not causal)]
    reads = [t] if eye else reads
    if not (kept[edge] and reads):
      continue
    q = x[t] @ arrays["query"] + x[t] @ arrays["down"][e] @ arrays["up"][e]
    logits = [q @ (x[j] @ arrays["key"]) / np.sqrt(HEAD) for j in reads]
    mixed = oracle.softmax(logits) @ x[reads]
    y[t] += weight * oracle.ffn(params, e, mixed)
  return y


def same(arrays, like=None, k=2, token_valid=None):
  given = dict(like=like, token_valid=token_valid)
  if k is None:
    return oracle.expert_choice(arrays["logits"], 3, **given)
  return oracle.top_k(arrays["logits"], k, renormalize=True, **given)


@functools.lru_cache
def run(k, causal, masked):
  valid = VALID if masked else None
  f = functools.partial(layer, k=k, causal=causal, token_valid=valid)
  return pieces.jit(pieces.with_gradients(f))


@pytest.mark.parametrize(
  "k,causal,masked", [(2, True, True), (None, False, False)]
)
def test_equals_a_loop(k, causal, masked):
  arrays, valid = arrays_of(), VALID if masked else None
  y, gradients = run(k, causal, masked)(arrays)
  want, numeric = oracle.layer_gradients(
    lambda arrays, like: same(arrays, like, k, valid),
    functools.partial(loop, causal=causal, token_valid=valid),
    jax.tree.map(common.float64, arrays),
  )
  pieces.close(y, want)
  for name, gradient in gradients.items():
    scale = max(1, np.abs(numeric[name]).max())
    pieces.close(gradient / scale, numeric[name] / scale)
  if masked:  # whatever padding holds stays there
    arrays["x"][~VALID] = np.nan
    again = run(k, causal, masked)(arrays)
    jax.tree.map(np.testing.assert_array_equal, again, (y, gradients))


def test_banks_that_gather_nothing_and_sequences():
  arrays = arrays_of(20, lead=(2,))

  def plain(params, rows, sizes):
    return BANK(params, rows, sizes)

  y = pieces.jit(functools.partial(layer, bank=plain))(arrays)
  for i in range(2):
    one = {**arrays, "x": arrays["x"][i], "logits": arrays["logits"][i]}
    found = same(one)
    pieces.close(y[i], loop(one, found, found.valid))


def linear(x):
  return x * 1


def test_linear_experts_are_multi_head_attention():
  # All experts at weights of 1: heads with values and outputs folded.
  arrays = arrays_of(30)
  bank = routing.FeedForward(linear)

  @pieces.jit
  def call(arrays):
    equal = jnp.zeros((TOKENS, EXPERTS))
    found = routing.top_k(
      equal, EXPERTS, renormalize=True, scale=float(EXPERTS)
    )
    params = {"up": arrays["first"], "down": arrays["last"]}
    queries = {name: arrays[name] for name in QUERIES}
    return recipes.premixed_experts(arrays["x"], found, bank, params, queries)

  x = arrays["x"]
  low = np.einsum("td,edr,erh->teh", x, arrays["down"], arrays["up"])
  q = low + (x @ arrays["query"])[:, None]
  k = np.repeat((x @ arrays["key"])[:, None], EXPERTS, 1)
  v = np.einsum("td,edh->teh", x, arrays["first"])
  heads = jax.nn.dot_product_attention(
    *(jnp.asarray(part, jnp.float32) for part in (q, k, v)), is_causal=True
  )
  pieces.close(call(arrays), np.einsum("teh,ehd->td", heads, arrays["last"]))


def test_tokens_that_read_themselves_alone_are_a_mixture():
  # Sequences of one token. Bit for bit: the same products in the same order.
  arrays = arrays_of(40)
  arrays["x"] = arrays["x"][:, None]

  @pieces.jit
  def both(arrays):
    params = {"up": arrays["first"], "down": arrays["last"]}
    found = route(arrays["logits"])
    y = routing.dropless(arrays["x"][:, 0], found, BANK, params)
    return layer(arrays)[:, 0], y

  np.testing.assert_array_equal(*both(arrays))


class Block(nnx.Module):
  def __init__(self, rngs):
    self.ffn = routing.MoE(WIDTH, HIDDEN, EXPERTS, rngs=rngs)
    self.attention = recipes.UMoE(
      self.ffn,
      head=HEAD,
      rank=RANK,
      losses={routing.load_balance: 0.1},
      rngs=rngs,
    )

  def __call__(self, x, token_valid):
    x = x + self.attention(x, token_valid=token_valid)
    return x + self.ffn(x, token_valid=token_valid)


def test_module():
  block = pieces.made(lambda: Block(nnx.Rngs(0)))
  assert block.attention.experts["up"] is block.ffn.experts["up"]
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(block, nnx.Param))]
  assert sum("experts" in path for path in paths) == 3  # once

  @pieces.module_jit
  def call(block, x, valid):
    def loss(block):
      square = (block(x, valid) ** 2).sum()
      return square + routing.auxiliary_loss(block)

    gradients = nnx.grad(loss)(block)
    return block.attention(x, token_valid=valid), gradients

  x = pieces.draw(50, 2, TOKENS, WIDTH)
  valid = np.stack([VALID, ~VALID])
  y, gradients = call(block, x, valid)
  of = block.attention
  params = {name: common.float64(p[...]) for name, p in of.experts.items()}
  arrays = {name: common.float64(of.queries[name][...]) for name in QUERIES}
  for i in range(2):
    rows = common.float64(x[i])
    logits = rows @ common.float64(of.router.kernel[...])
    found = same({"logits": logits}, token_valid=valid[i])
    want = np.zeros((TOKENS, WIDTH))
    for _, t, e, weight in found.edges():
      reads = [j for j in range(t + 1) if valid[i, j]]
      keys = rows[reads] @ arrays["key"]
      a = oracle.softmax(keys @ (rows[t] @ arrays["query"]) / np.sqrt(HEAD))
      want[t] += weight * oracle.ffn(params, e, a @ rows[reads])
    pieces.close(y[i], want)
  assert not of.queries["up"][...].any()  # experts' queries begin alike
  named = dict(nnx.to_flat_state(nnx.state(gradients, nnx.Param)))
  alike = ("attention", "queries", "down")  # has none while "up" is zero
  assert all(np.any(g) for path, g in named.items() if path != alike)
  call(block, x + 1, ~valid)
  assert call.compilations() == 1


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", common.AXIS_TYPES)
def test_eight_devices(axis_type):
  arrays, weights = arrays_of(60), pieces.draw(61, WIDTH, EXPERTS)

  def f(x):
    logits = jnp.einsum("btd,de->bte", x, weights)
    return layer({**arrays, "x": x, "logits": logits})

  x = pieces.draw(62, 8, TOKENS, WIDTH)
  pieces.compare_on_eight_devices(f, x, axis_type)


def test_experts_that_are_shared_are_not_removed():
  block = pieces.made(lambda: Block(nnx.Rngs(0)))
  kept = np.array([0, 2])
  with pytest.raises(ValueError, match=r"^moe must be a MoE .* got a UMoE"):
    routing.prune_experts(block.attention, kept)
  ffn = routing.prune_experts(block.ffn, kept)
  again = recipes.UMoE(ffn, head=HEAD, rank=RANK, rngs=nnx.Rngs(0))
  assert again.experts["up"] is ffn.experts["up"]
  assert again.queries["up"].shape == (2, RANK, HEAD)


def test_bad_input():
  arrays = arrays_of(lead=(2,))
  queries = {name: arrays[name] for name in QUERIES}
  found = route(arrays["logits"])
  call = functools.partial(recipes.premixed_experts, arrays["x"], found, BANK)
  with pytest.raises(ValueError, match='queries must have "query", "key"'):
    call({}, {**queries, "value": arrays["key"]})
  with pytest.raises(ValueError, match=r"token_valid must be bool\[2, 5\]"):
    call({}, queries, token_valid=VALID)
  with pytest.raises(ValueError, match="found must be by token choice"):
    layer(arrays, k=None)
  with pytest.raises(ValueError, match=r"x must be \[..., tokens, d\]"):
    layer({**arrays, "x": arrays["x"][0]})
