"""How many neurons fire, and labels that are random."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import mlp
from experiments.models import transformer
from experiments.procedures import firing

TEXT = {"narrow": 6, "wide": 10, "steps": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text"
  path.write_bytes(np.random.default_rng(0).bytes(50_000))
  return str(path)


def test_densities_are_those_of_hidden_activations(path):
  """By hand: what is positive before the ReLU, of each block."""
  found = firing.emergence(3, path=path, **TEXT)
  assert tuple(found) == firing.ARMS
  _, validation = firing._text(path)
  init, _, _ = firing._transformer(TEXT["narrow"], TEXT["steps"])
  params, _ = init(3)
  model = transformer.Transformer(
    vocabulary=256,
    width=64,
    depth=2,
    heads=4,
    hidden=TEXT["narrow"],
    activation="relu",
    rngs=nnx.Rngs(0),
  )
  nnx.update(model, params)
  x, shares = model.embed(validation[:, :-1].astype(jnp.int32)), []
  for block in model.blocks:
    x = x + block.attention(block.attention_norm(x))
    hidden = block.up(block.mlp_norm(x))
    assert hidden.shape[-1] == TEXT["narrow"]
    shares.append(float((hidden > 0).mean()))
    x = x + block.down(jnp.maximum(hidden, 0))
  # Rounding may differ between the programs: a few of 49,152 next to zero.
  expected = pytest.approx(np.mean(shares), abs=1e-3)
  assert found["narrow_start"]["density"] == expected


def test_training_changes_what_fires_and_a_seed_repeats_it(path):
  first = firing.emergence(3, path=path, **TEXT)
  assert firing.emergence(3, path=path, **TEXT) == first
  for name in ("narrow", "wide", "random"):
    times = [first[f"{name}_{time}"]["loss"] for time in firing.TIMES]
    assert len(set(times)) == 4  # each later than the one before
  # The same initial weights, on other text.
  start = first["narrow_start"], first["random_start"]
  assert start[0]["loss"] != start[1]["loss"]


def test_labels_are_random_of_the_share_alone():
  labels = np.arange(1_000) % 10
  noisy = firing.mislabeled(labels, 0.4, 5)
  # Four hundred are drawn, of which about a tenth stay what they were.
  assert 330 <= (noisy != labels).sum() <= 390
  assert set(noisy) == set(range(10)) and noisy.dtype == labels.dtype
  assert (firing.mislabeled(labels, 0.4, 5) == noisy).all()
  assert (firing.mislabeled(labels, 0.4, 6) != noisy).any()
  assert (firing.mislabeled(labels, 0.0, 5) == labels).all()
  assert (labels == np.arange(1_000) % 10).all()  # is left as it was


def test_an_mlp_keeps_the_largest_of_each_hidden_layer():
  make = lambda **given: mlp.MLP(
    inputs=5, classes=3, width=7, depth=2, rngs=nnx.Rngs(0), **given
  )
  x = jax.random.normal(jax.random.key(0), (4, 5))
  few, all_of_them, dense = make(top_k=2), make(top_k=7), make()
  y = x
  for layer in few.hidden:
    y = np.maximum(layer(y), 0)
    y = jnp.where(y >= np.sort(y)[:, -2:-1], y, 0)
    assert ((y > 0).sum(-1) <= 2).all()
  np.testing.assert_allclose(few(x), few.readout(y), rtol=1e-6)
  np.testing.assert_array_equal(all_of_them(x), dense(x))
  assert not np.allclose(few(x), dense(x))


def test_a_transformer_says_what_its_mlps_take():
  given = {"vocabulary": 5, "width": 4, "depth": 1, "heads": 1}
  given["rngs"] = nnx.Rngs(0)
  with pytest.raises(ValueError, match=r"activation takes .* got 'gelu'"):
    transformer.Transformer(activation="gelu", **given)
  with pytest.raises(ValueError, match=r"hidden takes 0 or more; got -1"):
    transformer.Transformer(hidden=-1, **given)
  plain = transformer.Transformer(**given)
  assert plain.blocks[0].up.kernel.shape == (4, 16)
