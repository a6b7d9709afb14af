"""BERT against what transformers and sentence-transformers give."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.models import bert
from experiments.models import pretrained
from sparsejax import masks
from sparsejax import paths
from sparsejax import weights
from tests.models import problem

SMALL = bert.Config(**problem.BERT, max_position_embeddings=12)


@pytest.fixture(scope="module")
def table(reference):
  return reference("minilm")


@pytest.fixture(scope="module")
def batch(minilm, table):
  """Tokens and valid of all texts, the longest of which is cut to 256."""
  texts = [case["text"] for case in table["cases"]]
  return pretrained.encode(minilm.tokenizer, texts)


@pytest.fixture(scope="module")
def hidden(minilm_hidden, batch):
  return np.asarray(minilm_hidden(*batch))


@pytest.fixture(scope="module")
def embeddings(hidden, batch):
  return np.asarray(bert.mean_embedding(hidden, batch[1]))


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def assert_shown(hidden, case):
  rows = hidden[case["rows"]]
  close(rows[:, :8], case["hidden"])
  close(np.linalg.norm(rows, axis=-1), case["hidden_norms"])


def test_tokens_equal_the_reference(batch, table):
  tokens, valid = batch
  assert tokens.shape == (8, 256)
  for row, kept, case in zip(tokens, valid, table["cases"]):
    assert row[kept].tolist() == case["tokens"]
    assert not row[~kept].any()


def test_hidden_states_equal_the_reference(hidden, table):
  assert hidden.dtype == jnp.float32
  for states, case in zip(hidden, table["cases"]):
    assert_shown(states, case)


def test_embeddings_equal_the_reference(embeddings, table):
  assert embeddings.dtype == jnp.float32
  for embedding, case in zip(embeddings, table["cases"]):
    close(embedding[:8], case["embedding"])
    close(embedding.sum(), case["sum"])
  close(embeddings @ embeddings.T, table["similarities"])


def test_a_pair_of_texts_equals_the_reference(minilm_hidden, minilm, table):
  pair = table["pair"]
  encoded = minilm.tokenizer.encode(*pair["texts"])
  assert encoded.ids == pair["tokens"]
  assert encoded.type_ids == pair["types"]
  tokens, types = (jnp.array([x]) for x in (encoded.ids, encoded.type_ids))
  assert_shown(np.asarray(minilm_hidden(tokens, None, types))[0], pair)


def test_padding_changes_no_embedding(minilm_hidden, batch, embeddings):
  tokens, valid = batch
  counts = valid.sum(1)
  short = tokens[:7, :64], valid[:7, :64]
  assert counts[:7].max() <= 64
  np.testing.assert_allclose(
    bert.mean_embedding(minilm_hidden(*short), short[1]),
    embeddings[:7],
    rtol=0,
    atol=2e-6,
  )
  alone = tokens[1:2, : counts[1]], None
  every = np.ones((1, counts[1]), bool)
  np.testing.assert_allclose(
    bert.mean_embedding(minilm_hidden(*alone), every),
    embeddings[1:2],
    rtol=0,
    atol=2e-6,
  )
  # What stands in the padding changes no bit.
  other = np.where(valid, tokens, 999)
  again = bert.mean_embedding(minilm_hidden(other, valid), valid)
  np.testing.assert_array_equal(again, embeddings)


def test_bfloat16_is_near(batch, embeddings):
  model = pretrained.load("minilm", dtype=jnp.bfloat16).model
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert {x.dtype.name for x in params} == {"bfloat16"}
  tokens, valid = (x[:7, :64] for x in batch)
  hidden = nnx.jit(lambda model, *inputs: model(*inputs))(model, tokens, valid)
  assert hidden.dtype == jnp.bfloat16
  near = bert.mean_embedding(hidden, valid)
  assert near.dtype == jnp.float32
  cosine = (np.asarray(near) * embeddings[:7]).sum(1)
  assert (cosine > 0.9995).all(), cosine


def test_mean_embedding_of_nothing_is_zero():
  hidden = jnp.full((2, 3, 4), jnp.nan).at[:, :2].set(1)
  valid = jnp.array([[True, True, False], [False] * 3])
  embedding = jax.jit(bert.mean_embedding)(hidden, valid)
  np.testing.assert_array_equal(embedding, [[0.5] * 4, [0] * 4])


def test_more_tokens_than_positions_are_refused():
  model = bert.Bert(SMALL, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"at most 12 positions.* got 13"):
    model(jnp.zeros((1, 13), int))


def test_attention_fn_takes_the_place_of_jax_nns():
  tokens = jnp.arange(12).reshape(2, 6)
  valid = jnp.arange(6) < jnp.array([[6], [4]])
  outputs = [
    bert.Bert(SMALL, attention_fn=attention_fn, rngs=nnx.Rngs(0))(tokens, valid)
    for attention_fn in (
      jax.nn.dot_product_attention,
      nnx.dot_product_attention,
      lambda q, k, v, mask: v,
    )
  ]
  np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
  assert np.abs(outputs[0] - outputs[2]).max() > 1e-3


def test_sparse_weights_are_the_kernels():
  config = dataclasses.replace(SMALL, num_hidden_layers=1)
  model = bert.Bert(config, rngs=nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  tx = weights.static(optax.sgd(1.0), sparsity=0.5, key=jax.random.key(0))
  state = jax.jit(tx.init)(params)
  made, _ = paths.named(masks.masks(state, params))
  sparse = {name for name, mask in made.items() if not np.all(mask)}
  attention = ("query", "key", "value", "out")
  assert sparse == {
    f"blocks/0/{name}/kernel"
    for name in ("up", "down", *(f"attention/{n}" for n in attention))
  }
  nnx.update(model, weights.sparse_params(state, params))
  leaves, _ = paths.named(nnx.state(model, nnx.Param))
  zeros = sum(int((leaves[name] == 0).sum()) for name in sparse)
  assert zeros == (4 * 16 + 2 * 24) * 16 // 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hidden_act": "swish"}, "hidden_act='swish' is not supported"),
    ({"position_embedding_type": "relative_key"}, "it takes 'absolute'"),
    ({"is_decoder": True}, "is_decoder=True is not supported"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"num_attention_heads": 3}, "multiple of num_attention_heads; got 16 and"),
    ({"hidden_size": "16"}, "hidden_size must be an integer above 0; got '16'"),
    ({"layer_norm_eps": 0}, "layer_norm_eps must be a number above 0; got 0"),
  ],
)
def test_config_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    bert.Config.read(problem.BERT | changes)


@pytest.mark.parametrize("name", problem.BERT)
def test_config_misses(name):
  settings = {key: value for key, value in problem.BERT.items() if key != name}
  with pytest.raises(ValueError, match=f"{name} is missing"):
    bert.Config.read(settings)


def test_config_has_defaults_and_ignores_what_it_does_not_use():
  config = bert.Config.read(problem.BERT | {"classifier_dropout": None})
  assert (config.max_position_embeddings, config.hidden_act) == (512, "gelu")
