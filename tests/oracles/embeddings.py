"""Reference definition of sparse embeddings: SPLADE, FLOPS, an inverted index,
and CSRv2.

Everything here is NumPy in float64 and Python dicts. Codes [n, m] have a text a
row.

What the papers leave open and is settled here:

SPLADE. A row without a valid token is all zeros. What is not valid is not read,
even if it is NaN.

FLOPS. The mean is of |z|, then squared (the paper's and SPLADE's code).

Index. A posting is (document, value) and exists where the value is not 0, in
the order of documents. A query multiplies its nonzero values with the postings
of their latents; a multiply is one such product. Documents that no posting
mentions score 0.

CSRv2.
- k at a step is k_start + (k_end - k_start) * step / steps, exactly, rounded
  with halves to even, and k_end from `steps` on (also if steps is 0). The
  authors' steps is a share, 0.7 by default, of all steps.
- The code is the k largest of pre, through max(., 0), ties to the lower index.
  The authors subtract the decoder's bias from x first; here `center` is 0
  unless given. Their model may standardize x before and undo it after; that is
  the caller's.
- The error is the mean over rows of the sum of squares (theirs is the mean of
  both, so 1 / d of it). Dead latents: those given as `dead`. Auxiliary: their
  k_aux largest pre through max(., 0), decoded without a bias, against the
  residual: sum of squared errors / sum of squares of the residual about its
  mean row; 0 if none is dead or the residual does not vary. Fewer dead than
  k_aux: times dead / k_aux, as in the sparse autoencoders here and unlike the
  authors, who do not scale; scaled=False leaves it out.
- Contrast: codes are divided by their norms (a zero code stays zero), s = exp(
  cosine / temperature). Of row i, P is the sum of s over other rows of its
  label and N over rows of other labels: the loss is the mean of -log(P / (P +
  N)) over rows that have a positive, 0 if none has. Positives are summed inside
  of the logarithm, as in the authors' code; outside=True is the mean over
  positives of -log(s / (P + N)) instead (Khosla et al., Supervised Contrastive
  Learning, equation 2). The authors give the batch twice, concatenated with
  itself, so that each row has a positive; the caller does that here. They bound
  P and N below by 1e-8.
- Total: error + multi * error at 4 k + aux_weight * auxiliary + contrast_weight
  * contrast, the authors' multi 1/8 and 0 by default here, aux_weight 1/32,
  contrast_weight 0.1 in their example. 4 k is at most m.
"""

import fractions
import math

import numpy as np

# --- SPLADE


def splade(logits, valid):
  """max over valid tokens of log(1 + max(logit, 0)): [b, s, V] -> [b, V].

  >>> splade(np.array([[[math.e - 1, -5.0], [1e9, 0.0]]]), [[True, False]])
  array([[1., 0.]])
  """
  logits = np.asarray(logits, np.float64)
  out = np.zeros((logits.shape[0], logits.shape[2]))
  for b, rows in enumerate(logits):
    for s, row in enumerate(rows):
      if valid[b][s]:
        for v, logit in enumerate(row):
          out[b, v] = max(out[b, v], math.log1p(max(logit, 0.0)))
  return out


def flops(z):
  """sum over latents of (mean over rows of |z|)^2.

  >>> flops([[2.0, 0.0], [0.0, -2.0]]), flops([[2.0, 0.0], [2.0, 0.0]])
  (2.0, 4.0)
  """
  z = np.asarray(z, np.float64)
  return float(sum(np.mean(np.abs(column)) ** 2 for column in z.T))


def l1(z):
  """Mean over rows of the sum of |z|."""
  return float(np.mean([np.sum(np.abs(row)) for row in np.asarray(z)]))


def weight_at(step, weight, steps):
  """The weight of a regularizer that grows with the square up to `steps`."""
  return weight * min(step / steps, 1.0) ** 2 if steps else weight


# --- Inverted index


def inverted_index(documents):
  """{latent: [(document, value), ...]} of what is not 0.

  >>> inverted_index([[0.0, 1.0], [0.0, 3.0]])
  {1: [(0, 1.0), (1, 3.0)]}
  """
  index = {}
  for document, row in enumerate(np.asarray(documents, np.float64)):
    for latent, value in enumerate(row):
      if value != 0:
        index.setdefault(latent, []).append((document, float(value)))
  return index


def search(index, query, documents):
  """(scores [documents], number of multiplies) of one query [m]."""
  scores, multiplies = np.zeros(documents), 0
  for latent, value in enumerate(query):
    if value != 0:
      for document, weight in index.get(latent, []):
        scores[document] += value * weight
        multiplies += 1
  return scores, multiplies


def scores(queries, documents):
  """[queries, documents], through the index."""
  index = inverted_index(documents)
  return np.array([search(index, q, len(documents))[0] for q in queries])


def multiplies(queries, documents):
  """Products of all queries with the index of the documents."""
  index = inverted_index(documents)
  return sum(search(index, q, len(documents))[1] for q in queries)


# --- CSRv2


def k_at(step, k_start, k_end, steps):
  """The number of latents a code may use at a step.

  >>> [k_at(i, 64, 2, 4) for i in (0, 1, 2, 4, 9)]
  [64, 48, 33, 2, 2]
  """
  if step >= steps:
    return k_end
  return round(k_start + (k_end - k_start) * fractions.Fraction(step, steps))


def pre_activations(x, encoder, bias, center=0.0):
  """(x - center) E^T + bias, [n, m]."""
  x, encoder = np.asarray(x, np.float64), np.asarray(encoder, np.float64)
  return (x - center) @ encoder.T + bias


def top_k(pre, k):
  """The k largest of each row through max(., 0), ties to the lower index."""
  out = np.zeros_like(pre)
  for i, row in enumerate(pre):
    for j in sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]:
      out[i, j] = max(row[j], 0.0)
  return out


def decode(z, dictionary, bias=0.0):
  return np.asarray(z) @ np.asarray(dictionary, np.float64) + bias


def squared_error(x, x_hat):
  """Mean over rows of the sum of squares."""
  return float(np.mean(np.sum((np.asarray(x) - x_hat) ** 2, -1)))


def auxiliary(pre, residual, dictionary, dead, k_aux, scaled=True):
  """How badly the dead latents explain the residual, relative to its spread."""
  dead = np.asarray(dead, bool)
  spread = ((residual - residual.mean(0)) ** 2).sum()
  if not dead.any() or spread == 0:
    return 0.0
  candidates = np.where(dead, pre, -np.inf)
  e_hat = decode(top_k(candidates, min(k_aux, dead.sum())), dictionary)
  scale = min(dead.sum() / k_aux, 1.0) if scaled else 1.0
  return float(scale * ((residual - e_hat) ** 2).sum() / spread)


def contrast(codes, labels, temperature=0.2, outside=False):
  """Supervised contrastive loss of codes [n, m] with a label a row."""
  codes = np.asarray(codes, np.float64)
  norms = np.sqrt((codes**2).sum(-1, keepdims=True))
  unit = codes / np.where(norms > 0, norms, 1.0)
  losses = []
  for i in range(len(unit)):
    s = [math.exp(unit[i] @ u / temperature) for u in unit]
    others = [j for j in range(len(unit)) if j != i]
    positives = [s[j] for j in others if labels[j] == labels[i]]
    if not positives:
      continue
    everything = sum(s[j] for j in others)
    if outside:
      losses.append(np.mean([-math.log(p / everything) for p in positives]))
    else:
      losses.append(-math.log(sum(positives) / everything))
  return float(np.mean(losses)) if losses else 0.0


def csrv2_loss(
  x,
  encoder,
  encoder_bias,
  dictionary,
  bias,
  labels,
  dead,
  k,
  *,
  k_aux,
  aux_weight=1 / 32,
  contrast_weight=0.1,
  temperature=0.2,
  multi=0.0,
  center=0.0,
  twice=False,
  outside=False,
):
  """{error, multi, auxiliary, contrast, total}; twice as the authors do."""
  pre = pre_activations(x, encoder, encoder_bias, center)
  z = top_k(pre, k)
  x_hat = decode(z, dictionary, bias)
  more = decode(top_k(pre, min(4 * k, pre.shape[1])), dictionary, bias)
  codes, labels = np.asarray(z), np.asarray(labels)
  if twice:
    codes, labels = np.tile(codes, (2, 1)), np.tile(labels, 2)
  out = {
    "error": squared_error(x, x_hat),
    "multi": squared_error(x, more),
    "auxiliary": auxiliary(pre, x - x_hat, dictionary, dead, k_aux),
    "contrast": contrast(codes, labels, temperature, outside),
  }
  out["total"] = (
    out["error"]
    + multi * out["multi"]
    + aux_weight * out["auxiliary"]
    + contrast_weight * out["contrast"]
  )
  return out
