"""Reference definition of what is measured on sparse codes and dictionaries.

Everything here is NumPy in float64 with plain loops. Codes z [n, m], inputs x
and reconstructions [n, d], a dictionary [m, d] with an atom a row. A latent is
active where its value is not 0. Dead is density <= at_most, dense is density >
above. Shares of nothing are what division gives: 0 / 0 is NaN (no rows, no row
with the feature, inputs that do not vary).

Absorption. A feature of the input, say "starts with S", has a direction p and
main latents that stand for it. It is absorbed in a row if it is present, all of
its main latents are silent and one other latent carries it instead (Chanin et
al., A is for Absorption, 2024). The paper's first measure of "carries" is the
effect of ablating that latent on the model's answer, which needs the model; the
one here is that of SAEBench, which needs only codes. With p^ = p / ||p||,

  present   bool [n], given: the feature is there and the probe says so
            (the true positives of the probe);
  main      distinct indices of latents, given (SAEBench: those that k-sparse
            probing adds while each raises F1 by more than 0.03); may be empty;
  carried   [n, m] = z_j <d_j, p^>, what latent j gives along p of z W;
  cosine    [m] = <d_j, p^> / ||d_j||, 0 for an atom of norm 0;
  total     [n] = <x, p^>, the whole that is to be carried. x is the input of
            the autoencoder, without centering; pass the reconstruction to
            measure shares of that.

Row i is absorbed if present_i, z_ij = 0 for every main j, total_i > 0, and for
the latent t that is not main with the largest carried (ties to the lower index)
both cosine_t >= cosine_threshold and carried_it >= share_threshold * total_i.
absorption = the number of absorbed rows / the number of present rows. Defaults
0.025 and 0.4.

Where this and SAEBench's code differ: the code has z_j * cosine_j for carried,
the same for atoms of norm 1; silent is z < 1e-8 there, so a negative value is
silent; the largest is taken over all latents, main ones too, which is the same
while main ones are silent and the share threshold is above 0; total = 0 divides
by zero there; it compares carried / total with the threshold, so that rounding
may differ at equality.

Absorption fraction (SAEBench), partial absorption by up to `most` latents. Of a
present row: by_main = sum of carried over main; by_others = sum of the `most`
largest carried that are above 0, not main, and of cosine >= cosine_threshold. 0
if by_main >= total or by_others < share_threshold * total; else 1 if by_main <=
0; else a / (a + by_main), a = min(by_others, total - by_main). A row with total
<= 0 is 0 (the code divides by it). The mean over present rows. Defaults 0.1,
0.4 and 3.

Description length. Bits a row: of each latent H2(p) + p * the entropy of floor(
z / bin) over its active rows, p its density. SAEBench's histogram has the rows
that are not active as well. Entries that are multiples of the bin are unsafe in
float32 unless bin is a power of 2.

Matching. cosines of atoms of norm 0 are 0; the mean is over min(m, truth) pairs
of the best one-to-one matching of |cosines|.
"""

import collections
import itertools
import math

import numpy as np


def _f64(*arrays):
  return [np.asarray(a, np.float64) for a in arrays]


# --- Sparsity


def l0(z):
  """Mean number of active latents a row.

  >>> l0([[0.0, 2.0, -1.0], [0.0, 0.0, 3.0]])
  1.5
  """
  return float(np.mean([sum(a != 0 for a in row) for row in z]))


def density(z):
  """Share of the rows in which each latent is active, [m].

  >>> density([[0.0, 2.0, -1.0], [0.0, 0.0, 3.0]]).tolist()
  [0.0, 0.5, 1.0]
  """
  (z,) = _f64(z)
  return np.array([np.mean(z[:, j] != 0) for j in range(z.shape[1])])


def dead_fraction(density, at_most=0.0):
  return float(np.mean([p <= at_most for p in density]))


def dense_fraction(density, above=0.1):
  return float(np.mean([p > above for p in density]))


# --- Fidelity


def squared_error(x, x_hat):
  """Mean over rows of the sum of squares."""
  x, x_hat = _f64(x, x_hat)
  return float(np.mean([sum((a - b) ** 2) for a, b in zip(x, x_hat)]))


def normalized_error(x, x_hat):
  """Sum of squared errors / sum of squares about the mean row."""
  x, x_hat = _f64(x, x_hat)
  mean = np.array([np.mean(x[:, j]) for j in range(x.shape[1])])
  with np.errstate(invalid="ignore", divide="ignore"):
    return float(((x - x_hat) ** 2).sum() / ((x - mean) ** 2).sum())


def explained_variance(x, x_hat):
  return 1.0 - normalized_error(x, x_hat)


def loss_recovered(clean, spliced, ablated):
  """1 where splicing costs nothing, 0 where it costs as much as ablating.

  >>> loss_recovered(2.0, 3.0, 6.0)
  0.75
  """
  clean, spliced, ablated = _f64(clean, spliced, ablated)
  with np.errstate(invalid="ignore", divide="ignore"):
    return float((ablated - spliced) / (ablated - clean))


def shrinkage(x, x_hat):
  """sum ||x_hat||^2 / sum <x_hat, x>: below 1, x_hat is too short.

  1 / it is the factor by which x_hat would have to grow to be closest to x.

  >>> shrinkage([[1.0, 2.0]], [[0.5, 1.0]])
  0.5
  """
  x, x_hat = _f64(x, x_hat)
  with np.errstate(invalid="ignore", divide="ignore"):
    return float(np.float64((x_hat**2).sum()) / (x_hat * x).sum())


# --- Dictionaries


def cosines(a, b):
  """[rows of a, rows of b]; 0 for a row of norm 0."""
  a, b = _f64(a, b)
  out = np.zeros((len(a), len(b)))
  for i, u in enumerate(a):
    for j, v in enumerate(b):
      norm = math.sqrt(u @ u) * math.sqrt(v @ v)
      out[i, j] = u @ v / norm if norm else 0.0
  return out


def mcc(dictionary, truth):
  """Mean |cosine| of the best matching, by trying all of them.

  >>> mcc([[0.0, -2.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])
  1.0
  """
  size = np.abs(cosines(dictionary, truth))
  if len(size) > len(size[0]):
    size = size.T
  return float(
    max(
      np.mean([size[i, j] for i, j in enumerate(columns)])
      for columns in itertools.permutations(range(len(size[0])), len(size))
    )
  )


# --- Absorption


def _carried(z, dictionary, probe):
  """(carried [n, m], cosine [m], unit probe [d])."""
  z, dictionary, probe = _f64(z, dictionary, probe)
  unit = probe / math.sqrt(probe @ probe)
  along = np.array([d @ unit for d in dictionary])
  norms = np.array([math.sqrt(d @ d) for d in dictionary])
  cosine = np.where(norms > 0, along / np.where(norms > 0, norms, 1), 0.0)
  return z * along, cosine, unit


def absorbed(
  x,
  z,
  dictionary,
  probe,
  present,
  main,
  *,
  cosine_threshold=0.025,
  share_threshold=0.4,
):
  """bool [n]: the rows in which one latent stands in for silent main ones.

  x [n, d], z [n, m], dictionary [m, d], probe [d], present bool [n], main a
  list of latents. See the module for the definition.
  """
  carried, cosine, unit = _carried(z, dictionary, probe)
  others = [j for j in range(carried.shape[1]) if j not in set(main)]
  out = []
  for i, row in enumerate(np.asarray(x, np.float64)):
    total = row @ unit
    silent = all(z[i][j] == 0 for j in main)
    if not (present[i] and silent and total > 0 and others):
      out.append(False)
      continue
    top = max(others, key=lambda j: (carried[i, j], -j))
    out.append(
      bool(
        cosine[top] >= cosine_threshold
        and carried[i, top] >= share_threshold * total
      )
    )
  return np.array(out, bool)


def absorption(x, z, dictionary, probe, present, main, **thresholds):
  """The share of the present rows that are `absorbed`."""
  rows = absorbed(x, z, dictionary, probe, present, main, **thresholds)
  there = sum(bool(p) for p in present)
  return float(rows.sum() / there) if there else math.nan


def absorption_fraction(
  x,
  z,
  dictionary,
  probe,
  present,
  main,
  *,
  cosine_threshold=0.1,
  share_threshold=0.4,
  most=3,
):
  """Mean over the present rows of the part that other latents took over."""
  carried, cosine, unit = _carried(z, dictionary, probe)
  out = []
  for i, row in enumerate(np.asarray(x, np.float64)):
    if not present[i]:
      continue
    total = row @ unit
    by_main = sum(carried[i, j] for j in main)
    helpers = [
      carried[i, j]
      for j in range(carried.shape[1])
      if j not in set(main)
      and cosine[j] >= cosine_threshold
      and carried[i, j] > 0
    ]
    by_others = sum(sorted(helpers, reverse=True)[:most])
    if total <= 0 or by_main >= total or by_others < share_threshold * total:
      out.append(0.0)
    elif by_main <= 0:
      out.append(1.0)
    else:
      taken = min(by_others, total - by_main)
      out.append(taken / (taken + by_main))
  return float(np.mean(out)) if out else math.nan


# --- Description length


def entropy(counts):
  """Bits of a draw from counts.

  >>> entropy([2, 1, 1]), entropy([5]), entropy([])
  (1.5, 0.0, 0.0)
  """
  total = sum(counts)
  return sum(c / total * math.log2(total / c) for c in counts if c) + 0.0


def description_length(z, bin):
  """Bits a row of z, each latent coded alone: whether, then how much.

  >>> description_length([[0.0], [1.0], [2.0], [2.5]], 1.0).hex()[:8]
  '0x1.8000'
  """
  (z,) = _f64(z)
  bits = 0.0
  for column in z.T:
    active = [a for a in column if a != 0]
    share = len(active) / len(column)
    sizes = collections.Counter(math.floor(a / bin) for a in active)
    bits += entropy([len(active), len(column) - len(active)])
    bits += share * entropy(list(sizes.values()))
  return bits
