"""What tests of autoencoders share: parameters, and every term's gradients."""

import functools
import json
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import sparse_coding

ROOT = pathlib.Path(__file__).resolve().parent.parent
N, D, M = 6, 5, 9  # rows, width, latents: none divides another


def arrays(seed=0, n=N, d=D, m=M, outputs=None) -> dict[str, np.ndarray]:
  """Parameters by the oracle's names, and rows x, float64 of f32 values."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  found = dict(
    x=draw(n, d),
    encoder=draw(m, d),
    encoder_bias=0.3 * draw(m),
    dictionary=draw(m, outputs or d),
    bias=0.3 * draw(outputs or d),
    theta=np.exp(draw(m) / 2 - 1),
    log_scale=0.3 * draw(m),
    magnitude_bias=0.3 * draw(m),
  )
  return {k: v.astype(np.float64) for k, v in found.items()}


@functools.cache
def authors() -> dict:
  """What the authors' packages give; see its note."""
  path = ROOT / "oracles" / "data" / "sparse_coding_authors.json"
  return json.loads(path.read_text())


def autoencoder(found, sparsifier=None, **settings):
  """An autoencoder with the parameters of `arrays`."""
  f32 = lambda name: jnp.asarray(found[name], jnp.float32)
  m, d = np.shape(found["encoder"])
  sae = sparse_coding.Autoencoder(
    d, m, sparsifier, **settings, rngs=nnx.Rngs(0)
  )
  sae.dictionary[...], sae.bias[...] = f32("dictionary"), f32("bias")
  if sae.kernel is not None:
    sae.kernel[...] = f32("encoder")
  if sae.encoder_bias is not None:
    sae.encoder_bias[...] = f32("encoder_bias")
  if isinstance(sparsifier, sparse_coding.JumpReLU):
    sparsifier.log_threshold[...] = jnp.log(f32("theta"))
  if isinstance(sparsifier, sparse_coding.Gated):
    sparsifier.gate_bias[...] = f32("encoder_bias")
    sparsifier.log_scale[...] = f32("log_scale")
    sparsifier.magnitude_bias[...] = f32("magnitude_bias")
  if sae.skip is not None:
    sae.skip[...] = f32("skip").T
  return sae


NAMES = {
  "kernel": "encoder",
  "sparsifier/gate_bias": "encoder_bias",
  "sparsifier/log_scale": "log_scale",
  "sparsifier/magnitude_bias": "magnitude_bias",
  "sparsifier/log_threshold": "log_theta",
}


def by_name(state) -> dict:
  """A state of parameters, or their gradients, by the oracle's names."""
  flat = {"/".join(p): v[...] for p, v in nnx.to_flat_state(state)}
  return {NAMES.get(name, name): x for name, x in flat.items()}


def parts(sae, x, **given):
  """Each term of the loss: its value, and its gradients by names."""
  graph, params, rest = nnx.split(sae, nnx.Param, ...)

  @jax.jit
  def run(params, rest, x, given):
    def values(params):
      sae = nnx.merge(graph, params, rest, copy=True)
      return sae.loss(x, **given)[1]

    return values(params), jax.jacrev(values)(params)

  found, grads = run(params, rest, jnp.asarray(x, jnp.float32), given)
  return found, {name: by_name(grads[name]) for name in found}


def close(got, want, rtol=2e-5, atol=2e-5):
  """f32 against float64, over sums of a few dozen products."""
  np.testing.assert_allclose(np.asarray(got), want, rtol=rtol, atol=atol)
