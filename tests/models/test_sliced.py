"""Sliced models against the oracle, against themselves uncut, and counted."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import bert
from experiments.models import llama
from experiments.models import pretrained
from experiments.models import sliced
from experiments.tasks import docstrings
from sparsejax import capture
from sparsejax import paths
from tests.models import problem
from tests.oracles import slicing as oracle

BERT = bert.Config(**problem.BERT, max_position_embeddings=12)
LLAMA = llama.Config(
  **problem.LLAMA | {"hidden_size": 16}, num_key_value_heads=2, head_dim=6
)
MODELS = {
  "bert": (bert.Bert, BERT),
  "llama": (llama.Llama, LLAMA),
  "tied": (
    llama.Llama,
    dataclasses.replace(
      LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
  ),
}


def put(make, arrays):
  """The model that `make` makes, with these arrays by path, else zeros."""
  graph, shapes = nnx.split(nnx.eval_shape(make))
  params, rebuild = paths.named(shapes)
  assert set(arrays) <= set(params)
  return nnx.merge(graph, rebuild({
    name: jnp.asarray(arrays.get(name, np.zeros(x.shape)), x.dtype)
    for name, x in params.items()
  }))  # fmt: skip


def model_of(name, spoiled=None, **given):
  """Random, also in its gains and biases; NaN in what is spoiled."""
  kind, config = MODELS[name]
  make = lambda: kind(config, rngs=nnx.Rngs(0), **given)
  params, _ = paths.named(nnx.state(nnx.eval_shape(make), nnx.Param))
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.standard_normal(x.shape) / x.shape[0] ** 0.5
    if x.ndim == 2
    else rng.uniform(0.5, 2, x.shape) * rng.choice([-1, 1], x.shape)
    for name, x in params.items()
  }
  if spoiled is not None:
    arrays[spoiled] *= np.nan
  return put(make, arrays)


def batch_of(seed=0, rows=6, length=10):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 32, (rows, length))
  valid = np.arange(length) < rng.integers(4, length + 1, (rows, 1))
  return tokens, valid


run = nnx.jit(lambda model, *batch: model(*batch))


def shape(model, *batch):
  """That of the outputs, which are not computed."""
  return nnx.eval_shape(lambda model: model(*batch), model).shape


def size(model):
  return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def bert_size(config, widths):
  """Parameters of a sliced BERT, by formula."""
  d, inner = config.hidden_size, config.intermediate_size
  tables = config.vocab_size + config.max_position_embeddings
  total = (tables + config.type_vocab_size) * widths[0] + widths[-1] * d + d
  for i in range(config.num_hidden_layers):
    ahead, between, behind = widths[2 * i : 2 * i + 3]
    total += 3 * (ahead + 1) * d + (d + 1 + ahead) * between
    total += (between + 1) * inner + (inner + 1 + between) * behind
  return total


def llama_size(config, widths):
  """Parameters of a sliced Llama, by formula; the head is never tied."""
  queries = config.num_attention_heads * config.head_dim
  shared = config.num_key_value_heads * config.head_dim
  inner = config.intermediate_size
  total = config.vocab_size * (widths[0] + widths[-1])
  for i in range(config.num_hidden_layers):
    ahead, between, behind = widths[2 * i : 2 * i + 3]
    a, m = config.attention_bias, config.mlp_bias
    total += (ahead + a) * (queries + 2 * shared)
    total += (queries + a + ahead) * between
    total += 2 * (between + m) * inner + (inner + m + between) * behind
  return total


@pytest.mark.parametrize("name", ["bert", "tied"])
def test_nothing_cut_is_the_same_function(name):
  model, batch = model_of(name), batch_of()
  found = sliced.slice_(model, [batch], 0.0)
  assert found.widths == (16,) * 5 and found.rows == batch[1].sum()
  np.testing.assert_allclose(found.energies, 1, rtol=1e-5)
  want = run(model, *batch)
  scale = np.abs(want).max()
  np.testing.assert_allclose(
    run(found.model, *batch), want, rtol=0, atol=1e-5 * max(scale, 1)
  )
  # And for any other rotation.
  rng = np.random.default_rng(1)
  turns = [
    np.linalg.qr(rng.standard_normal((16, 16)))[0].astype(np.float32)
    for _ in range(5)
  ]
  np.testing.assert_allclose(
    run(sliced.rebuild(model, turns), *batch),
    want,
    rtol=0,
    atol=1e-5 * max(scale, 1),
  )


@pytest.mark.parametrize("name", MODELS)
def test_cut_models_are_as_small_as_they_say(name):
  model, batch = model_of(name), batch_of()
  found = sliced.slice_(model, [batch], 0.25, multiple=4)
  of_family = bert_size if name == "bert" else llama_size
  wide = (12,) * 4 + (16,)  # the last signal as it was
  qs = [jnp.eye(16)[:, :width] for width in wide]
  for cut, widths in (
    (found.model, found.widths),
    (sliced.rebuild(model, qs), wide),
  ):
    assert size(cut) == of_family(MODELS[name][1], widths)
    assert shape(cut, *batch) == shape(model, *batch)
  assert found.widths == (12,) * 5
  assert all(0 < x <= 1 + 1e-6 for x in found.energies)
  attention = found.model.blocks[0].attention
  assert attention.query.kernel.shape[0] == 12
  assert (
    attention.out.kernel.shape[0] == model.blocks[0].attention.out.in_features
  )


# The oracle's networks mix tokens by a constant matrix, and have ReLU.
VOCABULARY, TOKENS, D, INNER = 23, 5, 12, 10
CUT = (12, 9, 7, 8, 10)


def network(centered, seed=0):
  """Parameters whose signals vary more along some directions than others."""
  rng = np.random.default_rng(seed)
  spread = rng.standard_normal((D, D)) * np.exp(-np.arange(D) / 4)[:, None]
  written = lambda *shape: rng.standard_normal((*shape, D)) @ spread / 2
  p = {"embedding": written(VOCABULARY), "positions": written(TOKENS)}
  if not centered:  # Llama has neither positions nor biases of attention
    p["positions"] *= 0
  for k, h in enumerate((D, INNER) * 2):
    p[f"{k}/in"] = rng.standard_normal((D, h)) / np.sqrt(D)
    p[f"{k}/out"] = written(h)
    biased = centered or k % 2
    p[f"{k}/in_bias"] = rng.standard_normal(h) / 2 * biased
    p[f"{k}/out_bias"] = written() * biased
  for k in range(5):
    p[f"{k}/gain"] = np.exp(rng.standard_normal(D) / 2)
    if centered:
      p[f"{k}/bias"] = rng.standard_normal(D) / 2
  # BERT ends with its norm, Llama with logits.
  p["head"] = np.eye(D) if centered else rng.standard_normal((D, VOCABULARY))
  p["head_bias"] = np.zeros(p["head"].shape[1])
  return p


def mix(q, k, v, mask):
  """Attention that looks at neither q nor k."""
  return jnp.einsum("st,bthd->bshd", mixing(), v)


def mixing():
  rows = np.tril(np.random.default_rng(9).random((TOKENS, TOKENS)))
  return rows / rows.sum(1, keepdims=True)


def as_bert(p):
  config = bert.Config(
    vocab_size=VOCABULARY,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=INNER,
    max_position_embeddings=TOKENS,
    layer_norm_eps=1e-5,
    hidden_act="relu",
  )
  arrays = {
    "embed/embedding": p["embedding"],
    "embed_positions/embedding": p["positions"],
  }
  norms = ["embed_norm"]
  for i in range(2):
    norms += [f"blocks/{i}/attention_norm", f"blocks/{i}/mlp_norm"]
    for layer, name in {
      "attention/value": f"{2 * i}/in",
      "attention/out": f"{2 * i}/out",
      "up": f"{2 * i + 1}/in",
      "down": f"{2 * i + 1}/out",
    }.items():
      arrays[f"blocks/{i}/{layer}/kernel"] = p[name]
      arrays[f"blocks/{i}/{layer}/bias"] = p[f"{name}_bias"]
  for k, name in enumerate(norms):
    arrays[f"{name}/scale"] = p[f"{k}/gain"]
    arrays[f"{name}/bias"] = p[f"{k}/bias"]
  make = lambda: bert.Bert(config, attention_fn=mix, rngs=nnx.Rngs(0))
  return put(make, arrays)


def as_llama(p):
  config = llama.Config(
    vocab_size=VOCABULARY,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=4,
    intermediate_size=INNER,
    rms_norm_eps=1e-5,
    mlp_bias=True,
  )
  arrays = {
    "embed/embedding": p["embedding"],
    "readout/kernel": p["head"],
  }
  names = []
  steep = 1e4  # silu(steep * x) / steep is ReLU, nearly
  for i in range(2):
    block = f"blocks/{i}"
    names += [f"{block}/attention_norm", f"{block}/mlp_norm"]
    arrays |= {
      f"{block}/attention/value/kernel": p[f"{2 * i}/in"],
      f"{block}/attention/out/kernel": p[f"{2 * i}/out"],
      f"{block}/gate/kernel": p[f"{2 * i + 1}/in"] * steep,
      f"{block}/gate/bias": p[f"{2 * i + 1}/in_bias"] * steep,
      f"{block}/up/kernel": np.zeros((D, INNER)),
      f"{block}/up/bias": np.ones(INNER),
      f"{block}/down/kernel": p[f"{2 * i + 1}/out"] / steep,
      f"{block}/down/bias": p[f"{2 * i + 1}/out_bias"],
    }
  for k, name in enumerate([*names, "norm"]):
    arrays[f"{name}/scale"] = p[f"{k}/gain"]
  make = lambda: llama.Llama(config, attention_fn=mix, rngs=nnx.Rngs(0))
  return put(make, arrays)


@pytest.mark.parametrize("post", [True, False], ids=["bert", "llama"])
def test_rotations_and_what_is_left_equal_the_oracle(post):
  # A seed where no cut goes between energies that f32 cannot tell apart.
  p = network(post, seed=1)
  model = (as_bert if post else as_llama)(p)
  rng = np.random.default_rng(2)
  tokens = rng.integers(0, VOCABULARY, (8, TOKENS))
  valid = np.arange(TOKENS) < rng.integers(2, TOKENS + 1, (8, 1))
  kind = {"post": post, "centered": post}
  np.testing.assert_allclose(
    run(model, tokens, valid),
    oracle.dense(p, tokens, mixing(), **kind),
    rtol=1e-3,
    atol=2e-3,
  )
  halves = [(tokens[:4], valid[:4]), (tokens[4:], valid[4:])]
  found, rows = sliced.rotations(model, halves, CUT)
  want = oracle.rotations(p, tokens, mixing(), CUT, valid=valid, **kind)
  assert rows == valid.sum()
  for (q, energies), (of_oracle, those), r in zip(found, want, CUT):
    np.testing.assert_allclose(energies, those, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(
      q[:, :r] @ q[:, :r].T, oracle.projection(of_oracle, r), atol=5e-3
    )
  cut = sliced.rebuild(model, [q[:, :r] for (q, _), r in zip(found, CUT)])
  those = oracle.sliced(p, [np.asarray(q) for q, _ in found], CUT, **kind)
  np.testing.assert_allclose(
    run(cut, tokens, valid),
    oracle.run(those, tokens, mixing(), D, post=post),
    rtol=1e-3,
    atol=2e-3,
  )


def test_principal_directions_lose_less_than_others():
  model, rng = as_bert(network(True, seed=3)), np.random.default_rng(4)
  tokens, held = rng.integers(0, VOCABULARY, (2, 8, TOKENS))
  valid = np.ones(tokens.shape, bool)
  want = run(model, held, valid)
  halves = [(tokens[:4], valid[:4]), (tokens[4:], valid[4:])]
  # The last signal is all of what is put out, and is left.
  found = sliced.slice_(model, halves, 0.25, multiple=1, readout=False)
  assert found.widths == (9,) * 4 + (12,)
  widths = found.widths
  turns = [
    np.linalg.qr(rng.standard_normal((D, D)))[0][:, :r].astype(np.float32)
    for r in widths
  ]
  error = lambda model: float(((run(model, held, valid) - want) ** 2).mean())
  of_found, of_random, of_none = (
    error(x)
    for x in (
      found.model,
      sliced.rebuild(model, turns),
      sliced.rebuild(model, [jnp.eye(D)[:, :r] for r in widths]),
    )
  )
  assert of_found < 0.5 * min(of_random, of_none)


def test_what_is_sliced_goes_on():
  """Half precision, shapes without arrays, and what layers read."""
  model, (tokens, valid) = (
    model_of("bert", param_dtype=jnp.bfloat16),
    batch_of(),
  )
  found = sliced.slice_(model, [(tokens, valid)], 0.5)
  params = jax.tree.leaves(nnx.state(found.model, nnx.Param))
  assert {x.dtype.name for x in params} == {"bfloat16"}
  shapes = nnx.eval_shape(
    lambda: sliced.rebuild(model, [jnp.zeros((16, r)) for r in found.widths])
  )
  assert jax.tree.map(jnp.shape, nnx.state(shapes)) == jax.tree.map(
    jnp.shape, nnx.state(found.model)
  )
  outputs, xs = jax.eval_shape(
    lambda: capture.inputs(lambda m: m(tokens, valid), found.model)
  )
  assert outputs.dtype == jnp.bfloat16
  assert xs["blocks/1/up/kernel"].shape[-1] == 8
  assert xs["blocks/1/mlp_residual/kernel"].shape[-1] == 8


def test_errors():
  model, batch = model_of("bert"), batch_of()
  spoiled = model_of("bert", "blocks/0/down/bias")
  for match, call in (
    ("sparsity", lambda: sliced.slice_(model, [batch], 1.0)),
    ("batches must hold at least one", lambda: sliced.slice_(
      model, [], 0.25)),
    ("directions to keep: 12, got 2", lambda: sliced.slice_(
      model, [(batch[0], np.arange(60).reshape(6, 10) < 2)], 0.25, multiple=4)),
    ("ahead of blocks/0/mlp_norm", lambda: sliced.slice_(
      spoiled, [batch], 0.25)),
    ("model must be a Bert or a Llama", lambda: sliced.slice_(
      nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [batch], 0.25)),
    ("widths must be 5", lambda: sliced.rotations(model, [batch], [16] * 4)),
    ("qs must be 5", lambda: sliced.rebuild(model, [jnp.eye(16)])),
    ("at most 12 positions", lambda: sliced.slice_(
      model, [(np.ones((1, 13), int),)], 0.0)),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=match):
      call()


@pytest.mark.slow
def test_minilm(minilm, minilm_hidden):
  pairs = docstrings.load()
  order = docstrings.split(pairs, calibration=128, evaluation=32, seed=0)
  texts = [pairs.docstrings[i] for i in np.concatenate(order)]
  minilm.tokenizer.enable_truncation(48)
  tokens, valid = pretrained.encode(minilm.tokenizer, texts, length=48)
  minilm.tokenizer.enable_truncation(256)
  batches = [(tokens[i : i + 16], valid[i : i + 16]) for i in range(0, 160, 16)]
  held = batches[8:]
  want = [np.asarray(minilm_hidden(*batch)) for batch in held]
  same = sliced.slice_(minilm.model, batches[:8], 0.0)
  for batch, hidden in zip(held, want):
    got = np.asarray(run(same.model, *batch))[batch[1]]
    np.testing.assert_allclose(got, hidden[batch[1]], rtol=0, atol=1e-4)
  cut = sliced.slice_(minilm.model, batches[:8], 0.25)
  assert cut.widths == (288,) * 13
  assert size(cut.model) == bert_size(minilm.config, cut.widths)
  cosines = [
    (
      bert.mean_embedding(run(cut.model, *batch), batch[1])
      * bert.mean_embedding(hidden, batch[1])
    ).sum(-1)
    for batch, hidden in zip(held, want)
  ]
  assert np.mean(cosines) > 0.9
