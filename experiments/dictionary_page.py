"""A page of what latents are active on: one HTML file, which loads nothing."""

from collections.abc import Sequence
import html

import numpy as np
import tokenizers

from experiments import activations
from experiments import dictionary_figures
from sparsejax import sparse_coding

AROUND = 12  # tokens that are shown on each side of the most active one
NEAREST = 3  # other atoms
STYLE = """\
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; }
section { border-top: 1px solid #ccc; padding: .5em 0; }
h2 { font-size: 1em; } p { margin: .2em 0; } .about { color: #555; }"""


def page(
  title: str,
  sae: sparse_coding.Autoencoder,
  store: activations.Store,
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  *,
  latents: int = 100,
  passages: int = 5,
) -> str:
  """The passages on which latents are most active, as HTML.

  Args:
    title: of the page.
    sae: that has been told `eval()`.
    store: the activations of texts.
    texts: as the store numbers them.
    tokenizer: that made their tokens.
    latents: how many are shown, evenly from the densest to the least dense that
      is alive.
    passages: of each, in different texts.
  """
  codes = dictionary_figures.codes(sae, store)
  density = (codes != 0).mean(0)
  order = np.argsort(-density, kind="stable")[: np.count_nonzero(density)]
  evenly = np.linspace(0, len(order) - 1, min(latents, len(order)))
  chosen = order[evenly.astype(int)]
  atoms = np.asarray(sae.dictionary[...])
  atoms = atoms / np.maximum(np.linalg.norm(atoms, axis=1, keepdims=True), 1e-9)
  shown = [f"<a href='#{i}'>{i}</a>" for i in chosen]
  parts = [
    f"<!doctype html><html lang='en'><meta charset='utf-8'>"
    f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    f"<h1>{html.escape(title)}</h1>"
    f"<p class='about'>{len(order)} of {len(density)} latents are active on "
    f"{len(store)} tokens; these {len(chosen)} are from the densest to the "
    "rarest. Shades are activations over the largest of the latent.</p>"
    f"<p>{' '.join(shown)}</p>"
  ]
  known = set(chosen.tolist())
  for latent in chosen:
    cosines = atoms @ atoms[latent]
    cosines[latent] = -np.inf
    near = np.argsort(-cosines)[:NEAREST]
    links = ", ".join(
      (f"<a href='#{i}'>{i}</a>" if i in known else str(i))
      + f" ({cosines[i]:.2f})"
      for i in near.tolist()
    )
    values = codes[:, latent].astype(np.float32)
    parts.append(
      f"<section id='{latent}'><h2>Latent {latent}</h2><p class='about'>"
      f"active on {density[latent]:.2%} of tokens, at most {values.max():.3g}; "
      f"nearest atoms (cosine): {links}</p>"
    )
    for row in strongest(values, store.text, passages):
      parts.append(passage(row, values, store, texts, tokenizer))
    parts.append("</section>")
  return "\n".join([*parts, "</html>\n"])


def strongest(values: np.ndarray, text: np.ndarray, most: int) -> list[int]:
  """The rows with the largest values, at most one of each text.

  >>> strongest(np.array([1.0, 3.0, 2.0, 0.0]), np.array([0, 0, 1, 2]), 3)
  [1, 2]
  """
  found = {}
  for row in np.argsort(-values, kind="stable"):
    if len(found) == most or not values[row] > 0:
      break
    found.setdefault(int(text[row]), int(row))
  return list(found.values())


def passage(
  row: int,
  values: np.ndarray,
  store: activations.Store,
  texts: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
) -> str:
  """A row's token and those around it, shaded."""
  mine = np.flatnonzero(store.text == store.text[row])
  tokens = tokenizer.encode(texts[store.text[row]]).tokens
  center, shown = store.token[row], []
  for other in mine:
    at = store.token[other]
    if abs(at - center) <= AROUND:
      share = values[other] / values.max()
      # Parts of a word stand together.
      word = tokens[at].removeprefix("##")
      space = "" if word != tokens[at] else " "
      shade = f" style='background: rgb(255 140 0 / {share:.2f})'"
      shown.append(
        f"{space}<span{shade if share > 0 else ''}>{html.escape(word)}</span>"
      )
  return f"<p>…{''.join(shown)} …</p>"
