"""Llama against what transformers gives, for one set of random weights."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import llama
from experiments.models import pretrained
from sparsejax import paths
from sparsejax.weights import plans
from tests.models import problem


@pytest.fixture(scope="module")
def table(reference):
  return reference("llama")


@nnx.jit
def run(model, tokens, valid=None):
  return model(tokens, valid)


def variant(directory, name, changes):
  """Makes the directory that of a variant in make_reference.py."""
  directory.set(**changes)
  tensors = directory.tensors()
  if name == "tied":
    del tensors["lm_head.weight"]
  if name == "biased":
    for tensor in list(tensors):
      if "proj" in tensor:
        bias = 0.1 * np.sin(np.arange(len(tensors[tensor])))
        tensors[tensor.replace("weight", "bias")] = bias.astype(np.float32)
  directory.save(tensors)


@pytest.mark.parametrize(
  "name", ["plain", "tied", "biased", "linear", "llama3"]
)
def test_logits_equal_the_reference(llama_directory, table, name):
  case = table["variants"][name]
  variant(llama_directory, name, case["config"])
  model, _, config = pretrained.load(llama_directory.path)
  assert config.tie_word_embeddings == (name == "tied")
  valid = np.array(table["valid"], bool)
  logits = np.asarray(run(model, jnp.array(table["tokens"]), valid))
  assert logits.shape == (2, 12, 64)
  last = logits[(0, 1), valid.sum(1) - 1]
  np.testing.assert_allclose(last, case["logits"], rtol=0, atol=1e-4)
  norms = np.linalg.norm(logits, axis=-1)[valid]
  expected = np.array(case["norms"])[valid]
  np.testing.assert_allclose(norms, expected, rtol=0, atol=1e-4)


def test_every_variant_of_the_table_differs(table):
  logits = [case["logits"] for case in table["variants"].values()]
  for i, a in enumerate(logits):
    assert all(np.abs(np.subtract(a, b)).max() > 1e-2 for b in logits[:i])


def test_older_names_of_rope_scaling(llama_directory, table):
  new = table["variants"]["llama3"]["config"]["rope_parameters"]
  old = {key: value for key, value in new.items() if key != "rope_theta"}
  old["type"] = old.pop("rope_type")
  assert llama.Rope.read(
    {"rope_theta": new["rope_theta"], "rope_scaling": old}
  ) == llama.Rope.read({"rope_parameters": new})
  assert llama.Rope.read({"rope_scaling": None}) == llama.Rope()


def test_no_token_sees_what_comes_or_padding(llama_directory):
  model = pretrained.load(llama_directory.path).model
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 64)
  other = tokens.at[:, 8].set((tokens[:, 8] + 1) % 64)
  logits, others = run(model, tokens), run(model, other)
  np.testing.assert_array_equal(logits[:, :8], others[:, :8])
  assert (logits[:, 8:] != others[:, 8:]).any(-1).all()
  valid = jnp.ones((2, 12), bool).at[:, 8].set(False)
  seen = np.asarray(valid[0])
  padded, others = run(model, tokens, valid), run(model, other, valid)
  np.testing.assert_array_equal(padded[:, seen], others[:, seen])
  # Rotary positions tell distances alone: padding on the left is none.
  shifted = jnp.pad(tokens[:, :8], ((0, 0), (4, 0)))
  left = run(model, shifted, jnp.arange(12)[None] >= jnp.array([[4], [4]]))
  np.testing.assert_allclose(left[:, 4:], logits[:, :8], atol=1e-4)


def test_bfloat16_is_near(llama_directory):
  tokens = jnp.arange(12).reshape(1, 12)
  logits = run(pretrained.load(llama_directory.path).model, tokens)
  loaded = pretrained.load(llama_directory.path, dtype=jnp.bfloat16)
  near = run(loaded.model, tokens)
  assert near.dtype == jnp.bfloat16
  error = np.abs(near.astype(jnp.float32) - logits).max()
  assert 0 < error < 0.05 * np.abs(logits).max()


def test_attention_fn_gets_the_shared_keys(llama_directory):
  shapes = []

  def attention_fn(q, k, v, mask):
    shapes.append((q.shape, k.shape, v.shape, mask.shape))
    return jax.nn.dot_product_attention(q, k, v, mask=mask)

  directory = llama_directory.path
  model = pretrained.load(directory, attention_fn=attention_fn).model
  model(jnp.zeros((1, 6), int))
  queries, keys = (1, 6, 4, 8), (1, 6, 2, 8)
  assert shapes == [(queries, keys, keys, (1, 1, 6, 6))] * 2


def test_sparse_weights_are_the_kernels(llama_directory):
  model = pretrained.load(llama_directory.path).model
  params, _ = paths.named(nnx.state(model, nnx.Param))
  sparse = set(plans.sparse_names(params, where=None))
  assert sparse == {"readout/kernel"} | {
    f"blocks/{i}/{name}/kernel"
    for i in range(2)
    for name in ("gate", "up", "down")
    + tuple(f"attention/{n}" for n in ("query", "key", "value", "out"))
  }


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it takes"),
    ({"sliding_window": 4096}, "sliding_window=4096 is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
    (
      {"rope_parameters": {"partial_rotary_factor": 0.25}},
      "partial_rotary_factor=0.25",
    ),
    (
      {"rope_scaling": {"rope_type": "linear"}},
      "factor is missing beside rope_type='linear'",
    ),
    (
      {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
      "low_freq_factor is missing beside rope_type='llama3'",
    ),
    (
      {
        "rope_scaling": {
          "rope_type": "llama3",
          "factor": 8.0,
          "low_freq_factor": 4.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192,
        }
      },
      "high_freq_factor must be above low_freq_factor; got 4.0 and 4.0",
    ),
    (
      {"rope_scaling": "linear"},
      "rope_scaling must be an object; got 'linear'",
    ),
    ({"num_key_value_heads": 3}, "multiple of num_key_value_heads; got 4 and"),
    ({"num_attention_heads": 5}, "multiple of num_attention_heads; got 32 and"),
    ({"head_dim": 7}, "head_dim must be even .* got 7"),
    (
      {"num_attention_heads": 0},
      "num_attention_heads must be an integer above",
    ),
    ({"hidden_size": "32"}, "hidden_size must be an integer above 0; got '32'"),
    ({"attention_bias": 1}, "attention_bias must be a bool; got 1"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0"),
  ],
)
def test_config_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    llama.Config.read(problem.LLAMA | changes)


@pytest.mark.parametrize("name", problem.LLAMA)
def test_config_misses(name):
  settings = {key: value for key, value in problem.LLAMA.items() if key != name}
  with pytest.raises(ValueError, match=f"{name} is missing"):
    llama.Config.read(settings)


def test_config_has_defaults():
  config = llama.Config.read(
    problem.LLAMA | {"head_dim": None, "rope_scaling": None}
  )
  assert (config.num_key_value_heads, config.head_dim) == (4, 8)
  assert config.rope == llama.Rope()
  assert not config.tie_word_embeddings
