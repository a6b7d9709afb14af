"""Reference definitions of SliceGPT, on networks that are small enough to read.

NumPy in float64. A kernel is w [inputs, outputs], y = x @ w + b; the paper
writes the same. Rows are rotated as x @ q; column j of q is direction j, and
the first `width` directions are kept.

A network has sublayers 0, 1, ..., K - 1 (even: a linear mixture over tokens,
odd: an MLP with ReLU; two make a block) and norms 0, 1, ..., K. Norm k is read
by sublayer k, the last one by the head. Its parameters are a dictionary:

  embedding [V, d], positions [T, d],
  k/gain [d], k/bias [d] (layer norm only),               of each norm
  k/in [d, h], k/in_bias [h], k/out [h, d], k/out_bias [d], of each sublayer
  head [d, n], head_bias [n].

`post` puts norms behind the sum of residual and sublayer, as in BERT; without
it they are ahead of a sublayer, and the residual passes them by. `centered`
makes them layer norms, without it they are RMS norms. Rotation k is that of
norm k, so there are K + 1 rotations and widths, two a block and the head's.

Cutting is defined twice, and both are the same function:
- `dense` with `projections` leaves all shapes alone and puts q_k[:, :r] @
  q_k[:, :r].T in front of each norm k;
- `sliced` has the smaller arrays, and `run` computes with them.

Paper: SliceGPT, Ashkboos et al. 2024 (arXiv 2401.15024). What it leaves open,
or its code does otherwise, and is settled here:
- The rotation of a norm decomposes what the norm puts out, without its gain and
  bias (signal="norm"), as in the paper. The authors' code decomposes what goes
  into the norm (signal="stream"): then tokens count by their squared length.
  Nothing else differs between the two.
- Second moments are means over valid tokens; the mean is not subtracted. (The
  authors sum over tokens, and set those of padding to zero.)
- Their code adds 0.01 times the mean of the diagonal to the diagonal. It moves
  no eigenvector, and all eigenvalues by the same, so it is left out: energies
  of what does not vary are zero.
- An eigenvector has two signs; here its entry of largest magnitude is positive
  (of several the first). The function that the network computes does not depend
  on signs, nor on which eigenvectors are taken of equal eigenvalues, unless the
  cut goes between these.
- In order: signal k is that of the network cut at 0, ..., k - 1, not yet at k.
- A norm of a cut signal divides by the root of its sum of squares over the
  ORIGINAL width, with the epsilon that it had. (So in the authors' code, but
  there epsilon becomes 1e-5, whatever the model's was.)
- A layer norm is an RMS norm of the centered signal. What writes to it is
  centered (embeddings, output kernels and biases, and with `post` the residual
  with its bias), then rotated. So one direction always has no energy. RMS norms
  have no centering: the authors' code subtracts the mean of Llama's embeddings
  all the same, which changes the model by as much as they have one.
- `post` is not in the paper, and not in the code. The residual there reads what
  the norm puts out, so its matrix has the norm's gain in it and is dense even
  with nothing cut, and it brings a bias of its own.
- The authors leave the last width, the head's, at d unless told otherwise.
  Here it is one of `widths`.
- Widths: see `width`.
- Tied embeddings are untied: the two are rotated differently.
"""

import numpy as np


def _float64(x):
  return np.asarray(x).astype(np.float64)


def second_moments(rows, valid=None):
  """The mean of x^T x [d, d] over rows [..., d], where `valid` [...].

  >>> second_moments([[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]], [True, True, False])
  array([[5., 1.],
         [1., 2.]])
  """
  rows = _float64(rows)
  total = np.zeros((rows.shape[-1], rows.shape[-1]))
  count = 0
  for i in np.ndindex(*rows.shape[:-1]):
    if valid is None or np.asarray(valid)[i]:
      total += np.outer(rows[i], rows[i])
      count += 1
  return total / count


def rotation(second):
  """(q [d, d], energies [d]): eigenvectors in falling order of eigenvalue.

  >>> q, energies = rotation([[1.0, 0.0], [0.0, 4.0]])
  >>> q.tolist(), energies.tolist()
  ([[0.0, 1.0], [1.0, 0.0]], [4.0, 1.0])
  >>> q, energies = rotation([[2.0, -1.0], [-1.0, 3.5]])
  >>> (q * np.sqrt(5)).round(9).tolist(), energies.round(9).tolist()
  ([[-1.0, 2.0], [2.0, 1.0]], [4.0, 1.5])
  """
  energies, q = np.linalg.eigh(_float64(second))
  energies, q = energies[::-1], q[:, ::-1].copy()
  for j in range(len(energies)):
    largest = 0
    for i in range(len(energies)):
      if abs(q[i, j]) > abs(q[largest, j]):
        largest = i
    if q[largest, j] < 0:
      q[:, j] = -q[:, j]
  return q, energies


def width(d, sparsity, multiple=8):
  """How many of d directions are kept.

  d - round(sparsity * d), halves to even, then down to a multiple (but not to
  zero). The authors round (1 - sparsity) * d down, then down to a multiple of
  8. With a sparsity of 0 all d are kept, be they a multiple or not.

  >>> width(64, 0.25), width(100, 0.25), width(100, 0.25, 1), width(12, 0.5)
  (48, 72, 75, 6)
  >>> width(100, 0.0), width(10, 0.25, 1)
  (100, 8)
  """
  kept = d - round(sparsity * d)
  if kept == d or kept < multiple:
    return kept
  return kept - kept % multiple


def projection(q, r):
  """The projection onto the first r directions, [d, d].

  >>> projection([[0.0, 1.0], [1.0, 0.0]], 1).tolist()
  [[0.0, 0.0], [0.0, 1.0]]
  """
  q = _float64(q)[:, :r]
  return q @ q.T


def centering(d):
  """x @ centering(d) is x less its mean.

  >>> ([1.0, 5.0] @ centering(2)).tolist()
  [-2.0, 2.0]
  """
  return np.eye(d) - 1.0 / d


def rms(x, d=None, eps=0.0):
  """x over the root of (its sum of squares / d + eps), without a gain.

  `d` is the width before cutting, by default that of x.

  >>> rms([3.0, 4.0], 1).tolist()
  [0.6, 0.8]
  >>> rms([3.0, 4.0], 4, eps=0.0) @ np.ones(2)
  np.float64(2.8)
  """
  x = _float64(x)
  mean = (x * x).sum(-1, keepdims=True) / (d or x.shape[-1])
  return x / np.sqrt(mean + eps)


def reading(kernel, bias, q, r, gain=None, norm_bias=None):
  """(kernel [r, outputs], bias): of what reads a norm, its gain folded in.

  `bias` and `norm_bias` may be None, which is zeros.

  >>> q = [[0.0, 1.0], [1.0, 0.0]]
  >>> kernel, bias = reading(
  ...   [[1.0, 2.0], [3.0, 4.0]], [0.5, 0.5], q, 1, [1.0, 2.0], [1.0, 0.0]
  ... )
  >>> kernel.tolist(), bias.tolist()
  ([[6.0, 8.0]], [1.5, 2.5])
  """
  kernel, q = _float64(kernel), _float64(q)
  bias = np.zeros(kernel.shape[1]) if bias is None else _float64(bias)
  if norm_bias is not None:
    bias = bias + _float64(norm_bias) @ kernel
  if gain is not None:
    kernel = np.diag(_float64(gain)) @ kernel
  return (q.T @ kernel)[:r], bias


def writing(table, q, r, centered=False):
  """table [..., r]: of what writes to the signal ahead of a norm.

  A table is an embedding, a kernel's outputs or a bias.

  >>> writing([[1.0, 5.0]], [[0.0, 1.0], [1.0, 0.0]], 1).tolist()
  [[5.0]]
  >>> writing([1.0, 5.0], [[0.0, 1.0], [1.0, 0.0]], 1, centered=True).tolist()
  [2.0]
  """
  table = _float64(table)
  if centered:
    table = table @ centering(table.shape[-1])
  return (table @ _float64(q))[..., :r]


def residual(q, r, next_q, next_r, gain=None, norm_bias=None, centered=False):
  """(matrix [r, next_r], bias [next_r]) from one norm's basis to the next's.

  With `post` it has the gain and bias of the norm that it reads (and is
  centered for the next, where this is a layer norm); without, neither.

  >>> one, other = np.eye(2), np.array([[0.6, -0.8], [0.8, 0.6]])
  >>> residual(one, 2, other, 1)[0].tolist()
  [[0.6], [0.8]]
  >>> matrix, bias = residual(one, 2, one, 2, [1.0, 3.0], [0.0, 1.0], True)
  >>> matrix.tolist(), bias.tolist()
  ([[0.5, -0.5], [-1.5, 1.5]], [-0.5, 0.5])
  """
  identity = np.eye(len(_float64(q)))
  matrix, bias = reading(identity, None, q, r, gain, norm_bias)
  return (
    writing(matrix, next_q, next_r, centered),
    writing(bias, next_q, next_r, centered),
  )


def norms(params):
  """K + 1, the number of norms and so of rotations."""
  return 1 + sum(name.endswith("/in") for name in params)


def _inner(k, h, mixing):
  """What is between the kernels in and out; mixing [(B,) T, T]."""
  return np.maximum(h, 0.0) if k % 2 else _float64(mixing) @ h


def _dense(params, tokens, mixing, cut, post, centered, eps):
  """The output, with `cut` applied to the signal [B, T, d] ahead of norm k."""
  p = {name: _float64(x) for name, x in params.items()}
  tokens = np.asarray(tokens)
  x = p["embedding"][tokens] + p["positions"][: tokens.shape[-1]]
  last = norms(p) - 1
  for k in range(last + 1):
    if centered:
      x = x - x.mean(-1, keepdims=True)
    x = cut(k, x)
    y = rms(x, eps=eps) * p[f"{k}/gain"]
    if centered:
      y = y + p[f"{k}/bias"]
    if k == last:
      return y @ p["head"] + p["head_bias"]
    h = _inner(k, y @ p[f"{k}/in"] + p[f"{k}/in_bias"], mixing)
    x = (y if post else x) + h @ p[f"{k}/out"] + p[f"{k}/out_bias"]


def dense(
  params,
  tokens,
  mixing,
  *,
  post=False,
  centered=False,
  eps=1e-5,
  projections=None,
):
  """The network's output [B, T, n] for tokens [B, T].

  `projections` [K + 1][d, d] are put ahead of the norms.
  """

  def cut(k, x):
    return x if projections is None else x @ _float64(projections[k])

  return _dense(params, tokens, mixing, cut, post, centered, eps)


def rotations(
  params,
  tokens,
  mixing,
  widths,
  *,
  valid=None,
  signal="norm",
  post=False,
  centered=False,
  eps=1e-5,
):
  """A list of (q, energies), one a norm, of the network cut to `widths`."""
  if signal not in ("norm", "stream"):
    raise ValueError(f"signal {signal!r}")
  found = []

  def cut(k, x):
    seen = rms(x, eps=eps) if signal == "norm" else x
    found.append(rotation(second_moments(seen, valid)))
    return x @ projection(found[-1][0], widths[k])

  _dense(params, tokens, mixing, cut, post, centered, eps)
  return found


def sliced(params, qs, widths, *, post=False, centered=False):
  """The parameters cut to r_k = widths[k], with rotations qs [K + 1][d, d].

  embedding [V, r_0], positions [T, r_0],
  k/in [r_k, h], k/in_bias [h], k/out [h, r_k+1], k/out_bias [r_k+1],
  k/residual [r_k, r_k+1], k/residual_bias [r_k+1] (post only),
  head [r_K, n], head_bias [n].
  """
  last = norms(params) - 1
  if len(qs) != last + 1 or len(widths) != last + 1:
    raise ValueError(f"{last + 1} norms, {len(qs)} rotations, {widths}")
  out = {}
  for name in ("embedding", "positions"):
    out[name] = writing(params[name], qs[0], widths[0], centered)
  for k in range(last + 1):
    here = qs[k], widths[k]
    norm = params[f"{k}/gain"], params[f"{k}/bias"] if centered else None
    if k == last:
      out["head"], out["head_bias"] = reading(
        params["head"], params["head_bias"], *here, *norm
      )
      return out
    then = qs[k + 1], widths[k + 1]
    out[f"{k}/in"], out[f"{k}/in_bias"] = reading(
      params[f"{k}/in"], params[f"{k}/in_bias"], *here, *norm
    )
    for name in (f"{k}/out", f"{k}/out_bias"):
      out[name] = writing(params[name], *then, centered)
    if post:
      out[f"{k}/residual"], out[f"{k}/residual_bias"] = residual(
        *here, *then, *norm, centered
      )
    else:
      out[f"{k}/residual"], _ = residual(*here, *then)


def run(params, tokens, mixing, d, *, post=False, eps=1e-5):
  """The output [B, T, n] of `sliced` parameters; d is the width before."""
  p = {name: _float64(x) for name, x in params.items()}
  tokens = np.asarray(tokens)
  x = p["embedding"][tokens] + p["positions"][: tokens.shape[-1]]
  last = norms(p) - 1
  for k in range(last + 1):
    u = rms(x, d, eps)
    if k == last:
      return u @ p["head"] + p["head_bias"]
    h = _inner(k, u @ p[f"{k}/in"] + p[f"{k}/in_bias"], mixing)
    passed = (u if post else x) @ p[f"{k}/residual"]
    if post:
      passed = passed + p[f"{k}/residual_bias"]
    x = passed + h @ p[f"{k}/out"] + p[f"{k}/out_bias"]


def parameter_count(widths, inner, vocabulary, positions, outputs, post=False):
  """Of `sliced`, with the inner width h of each sublayer.

  With d = 2, one sublayer of 3, 5 tokens, 4 positions and 7 outputs: 10 + 8,
  6 + 3 + 6 + 2 + 4, 14 + 7; after cutting to 1 and 1: 5 + 4, 3 + 3 + 3 + 1 + 1,
  7 + 7.

  >>> (
  ...   parameter_count([2, 2], [3], 5, 4, 7),
  ...   parameter_count([1, 1], [3], 5, 4, 7),
  ... )
  (60, 34)
  """
  total = (vocabulary + positions) * widths[0]
  for k, h in enumerate(inner):
    r, then = widths[k], widths[k + 1]
    total += r * h + h + h * then + then + r * then
    if post:
      total += then
  return total + widths[-1] * outputs + outputs
