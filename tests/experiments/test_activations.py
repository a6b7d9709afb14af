"""Stores of activations: what is read is what was written, or is refused."""

import json
import shutil

from flax import nnx
import grain
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments import activations
from experiments import prune
from experiments.models import bert
from experiments.models import pretrained

WORDS = ("gives", "the", "of", "x", "and", "nothing", "than", "mean", "sum")
ABOUT = {"model": "none", "layer": "blocks/0"}


def parts(rows=23, width=5, size=4):
  """Rows of texts with `size` tokens each."""
  x = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
  at = np.arange(rows)
  return [
    (x[i : i + size], at[i : i + size] // size, at[i : i + size] % size)
    for i in range(0, rows, size)
  ]


@pytest.fixture
def path(tmp_path):
  activations.write(tmp_path / "store", parts(), ABOUT, shard=7)
  return tmp_path / "store"


@pytest.mark.parametrize("dtype", activations.DTYPES)
def test_rows_are_read_as_they_were_written(tmp_path, dtype):
  activations.write(tmp_path / "s", parts(), ABOUT, dtype=dtype, shard=7)
  store = activations.Store(tmp_path / "s", ABOUT)
  whole = np.concatenate([x for x, *_ in parts()])
  kept = whole.astype(jnp.dtype(dtype)).astype(np.float32)
  assert len(store) == 23 and store.width == 5
  assert store.meta["shards"] == {"00000": 8, "00001": 8, "00002": 7}
  np.testing.assert_array_equal(store[np.arange(23)], kept)
  index = np.array([[22, 0, 7], [8, 8, 15]])  # any order, any shape
  np.testing.assert_array_equal(store[index], kept[index])
  np.testing.assert_array_equal(store[16], kept[16])
  assert store[index].dtype == np.float32
  np.testing.assert_array_equal(store.text, np.arange(23) // 4)
  np.testing.assert_array_equal(store.token, np.arange(23) % 4)
  for wrong in (-1, 23):
    with pytest.raises(IndexError, match=r"\[0, 23\)"):
      store[wrong]


def test_batches_are_shuffled_by_the_seed_and_go_on_where_they_stopped(path):
  store = activations.Store(path)
  batches = lambda seed: iter(store.batches(4, seed).to_iter_dataset())
  take = lambda it, n: np.stack([next(it) for _ in range(n)])
  whole = take(batches(0), 12)
  # An epoch is five batches of different rows, and the next has another order.
  first, second = whole[:5].reshape(-1, 5), whole[5:10].reshape(-1, 5)
  assert len(np.unique(first, axis=0)) == 20
  assert (first != second).any() and (whole != take(batches(1), 12)).any()
  stopped = batches(0)
  take(stopped, 7)
  state = json.loads(json.dumps(stopped.get_state()))
  resumed = batches(0)
  resumed.set_state(state)
  np.testing.assert_array_equal(take(resumed, 5), whole[7:])
  assert isinstance(resumed, grain.DatasetIterator)


@pytest.mark.parametrize("name", ["00001", "token"])
@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_refused(path, name, change):
  whole = (path / name).read_bytes()
  (path / name).write_bytes(whole[:-1] if change < 0 else whole + b"0")
  got, size = len(whole) + change, len(whole)
  with pytest.raises(ValueError, match=f"{name} has {got} bytes .* {size}"):
    activations.Store(path)


def test_damage_is_named(path):
  with pytest.raises(ValueError, match=r"layer='blocks/0', not of 'blocks/1'"):
    activations.Store(path, {"layer": "blocks/1"})
  (path / "00002").unlink()
  with pytest.raises(ValueError, match="00002 has 0 bytes and should have 70"):
    activations.Store(path)
  for text, error in (("{", "is damaged"), ('{"rows": 3}', "lacks fields")):
    (path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=error):
      activations.Store(path)
  shutil.rmtree(path)
  with pytest.raises(ValueError, match=r"has no meta\.json"):
    activations.Store(path)


@pytest.mark.parametrize(
  ("value", "dtype"),
  [(np.nan, "float32"), (np.inf, "bfloat16"), (1e6, "float16")],
)
def test_what_is_not_finite_leaves_nothing(tmp_path, value, dtype):
  rows = parts()
  rows[2][0][3, 1] = value
  error = f"finite in {dtype}; those of token 3 of text 2"
  with pytest.raises(ValueError, match=error):
    activations.write(tmp_path / "store", rows, ABOUT, dtype=dtype)
  assert not list(tmp_path.iterdir())
  kept = [(jnp.asarray(x).astype(dtype), *place) for x, *place in rows]
  with pytest.raises(ValueError, match=error):
    next(activations.streamed(kept, 4, window=12))


def test_wrong_parts_are_refused(tmp_path):
  for given, error in (([], "got none"), (parts() + parts(width=6), r"n, 5\]")):
    with pytest.raises(ValueError, match=error):
      activations.write(tmp_path / "store", given, ABOUT)
  with pytest.raises(ValueError, match="got 'int8'"):
    activations.write(tmp_path / "store", parts(), ABOUT, dtype="int8")


def test_paragraphs(tmp_path):
  text = "What this says is long enough to be taken."
  (tmp_path / "a.py").write_text(
    f'"""{text}\n\n  Short.\n\n  {text[:20]}\n  {text[20:]} Twice."""\n'
    f'def f():\n  """{text}"""\n\nasync def g():\n  """{text} Not it."""\n'
  )
  (tmp_path / "b.py").write_text("no python (")
  found = activations.paragraphs(tmp_path)
  assert found[0] == text and found[-1] == f"{text} Not it."
  assert len(found) == 3 and all("\n" not in x for x in found)
  (tmp_path / "a.py").unlink()
  with pytest.raises(ValueError, match="no Python file with a docstring"):
    activations.paragraphs(tmp_path)


@pytest.fixture(scope="module")
def loaded():
  config = bert.Config(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=16,
  )
  words = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(words, unk_token="[UNK]")
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model = bert.Bert(config, rngs=nnx.Rngs(0))
  return pretrained.Pretrained(model, tokenizer, config)


def test_collected_rows_are_those_of_the_model(loaded, tmp_path):
  texts = [" ".join(WORDS[:n]) for n in (5, 1, 8)]
  store = activations.collect(
    tmp_path / "store", loaded, "blocks/0", texts, length=6, dtype="float32"
  )
  assert len(store) == 5 + 1 + 6  # no padding, and the longest is cut
  batches = prune.batches_of(loaded.tokenizer, texts, 6)
  (inputs,) = prune.first_inputs(loaded.model, batches)
  hidden = nnx.jit(lambda block, x: block(*x))(loaded.model.blocks[0], inputs)
  for row, (number, length) in enumerate(((1, 1), (0, 5), (2, 6))):
    mine = np.flatnonzero(store.text == number)
    assert store.token[mine].tolist() == list(range(length))
    # Two programs, and f32 sums of 8.
    np.testing.assert_allclose(store[mine], hidden[row, :length], atol=1e-5)


def test_a_store_is_made_once_and_of_one_model(loaded, tmp_path, monkeypatch):
  collect = lambda loaded=loaded, texts=("the sum", "of x"), **given: (
    activations.collect(
      tmp_path / "s", loaded, "blocks/1", list(texts), length=6, **given
    )
  )
  before = collect()
  with monkeypatch.context() as patch:
    patch.setattr(activations, "rows", None)
    np.testing.assert_array_equal(collect()[np.arange(4)], before[range(4)])
  error = "in 'float16', not in 'float32'; give another directory"
  with pytest.raises(ValueError, match=error):
    collect(dtype="float32")
  with pytest.raises(ValueError, match="of text="):
    collect(texts=["the mean", "of x"])
  other = nnx.clone(loaded.model)
  other.embed.embedding[...] += 1
  with pytest.raises(ValueError, match="of weights="):
    collect(loaded._replace(model=other))
  with pytest.raises(ValueError, match="where must choose a module"):
    activations.collect(tmp_path / "t", loaded, "blocks/2", ["the sum"])
  assert not (tmp_path / "t").exists()


def test_a_model_that_gives_nan_is_refused(loaded, tmp_path):
  model = nnx.clone(loaded.model)
  model.embed.embedding[...] = model.embed.embedding[...].at[2].set(jnp.nan)
  with pytest.raises(ValueError, match="finite in float16"):
    activations.collect(
      tmp_path / "s", loaded._replace(model=model), "blocks/0", ["sum", "the"]
    )


def test_streamed_batches_have_each_row_once():
  take = lambda seed, **given: np.stack(
    [*activations.streamed(parts(45), 4, seed=seed, **given)]
  )
  found = take(0, window=16)
  assert found.shape == (11, 4, 5)  # 45 rows: one is left out
  whole = np.concatenate([x for x, *_ in parts(45)])
  place = [np.flatnonzero((whole == x).all(1)) for x in found.reshape(-1, 5)]
  order = np.concatenate(place)
  assert len(order) == len(set(order)) == 44
  # Nothing comes before the window has reached it.
  assert (order[:8] < 16).all() and (order != np.sort(order)).any()
  np.testing.assert_array_equal(found, take(0, window=16))
  assert (found != take(1, window=16)).any()
  with pytest.raises(ValueError, match=r"must be at least 2 \* 4, got 7"):
    take(0, window=7)
  assert not [*activations.streamed([], 4, window=8)]
