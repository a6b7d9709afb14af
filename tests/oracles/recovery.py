"""Reference definition of sparse recovery: penalties, their proximal operators,
ISTA, FISTA, matching pursuit, OMP, IHT and HTP.

Everything here is NumPy in float64, a row at a time. A dictionary [m, d] has an
atom a row, a signal is [..., d] and a code z [..., m], and what is minimized is
1/2 ||x - z W||^2 + the penalty of z.

What the papers leave open and is settled here:

Steps. step_size is 1 / L unless given, L the largest eigenvalue of W W^T, of
all solvers that have one (the IHT paper has 1 and asks for a dictionary of norm
below 1; the HTP paper has 1 too). Every solver starts from 0 and does `steps`
steps; FISTA returns the proximal point, not the extrapolated one.

Penalties. The weight belongs to the penalty, the step t multiplies it: prox(v,
t) = argmin_u 1/2 (u - v)^2 + t penalty(u). Where 0 and another point are
equally good, 0 is taken. With `nonnegative`, u >= 0 as well, and every penalty
here then has the prox of max(v, 0). The norm of CEL0 is that of the atom, one
number or [m]. Groups are consecutive and all of one size.

Ties. Whatever is chosen as the largest, the lower index wins.

Pursuits. Correlations are with the atoms divided by their norms; an atom of
norm 0 has correlation 0. Codes are for the atoms as they are: matching pursuit
adds <d, r> / ||d||^2. OMP never takes an atom twice, and takes k atoms even
where fewer would do; what it then adds has coefficients of rounding size, so
compare values and not supports. Matching pursuit may take an atom again.

Least squares on a support of dependent atoms is the solution of least norm;
compare z W there.
"""

from collections.abc import Callable
import dataclasses
import math

import numpy as np

# --- The smallest value by looking


def grid_argmin(function, low, high, points=401, rounds=6):
  """A global minimizer in a box: a grid, then ever finer grids about the best.

  function takes [n, dims] and gives [n]; low and high are [dims]. The grid has
  to be fine enough that the best point of it is in the right valley. Good to
  about 1e-7, half of float64's digits, as values alone can be.

  >>> grid_argmin(lambda u: (u[:, 0] - 0.3) ** 2, [-2], [2]).round(6).tolist()
  [0.3]
  """
  low, high = np.array(low, np.float64), np.array(high, np.float64)
  for _ in range(rounds):
    axes = [np.linspace(a, b, points) for a, b in zip(low, high)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    grid = grid.reshape(-1, len(axes))
    best = grid[np.argmin(function(grid))]
    width = 4 * (high - low) / (points - 1)
    low, high = best - width / 2, best + width / 2
  return best


def prox_by_search(penalty, v, t, nonnegative=False):
  """argmin of 1/2 ||u - v||^2 + t penalty(u) for a short v [dims].

  The penalty is symmetric and grows with each |u_i|, so the minimizer lies
  between 0 and v. Points with zeros in them are tried apart, as a penalty may
  jump there.
  """
  v = np.asarray(v, np.float64)
  sign = np.where(v < 0, -1.0, 1.0)
  top = np.maximum(v, 0.0) if nonnegative else np.abs(v)

  def cost(u):
    return 0.5 * ((u - top) ** 2).sum(-1) + t * np.array(
      [penalty(r) for r in u]
    )

  points, rounds = (201, 7) if len(v) == 1 else (41, 9)
  found = grid_argmin(cost, np.zeros_like(top), top, points, rounds)
  found = np.maximum(found, 0.0)
  corners = [
    np.where([(c >> i) & 1 for i in range(len(v))], 0.0, found)
    for c in range(2 ** len(v))
  ][::-1]  # All zeros first: it wins ties.
  return sign * min(corners, key=lambda u: cost(u[None])[0])


# --- Penalties


@dataclasses.dataclass(frozen=True)
class Penalty:
  """value(z [m]) -> number; prox(v [m], t) -> [m]."""

  value: Callable
  prox: Callable


def _each(function, v, *others):
  """function of every entry of v."""
  v = np.asarray(v, np.float64)
  others = [np.broadcast_to(o, v.shape) for o in others]
  return np.array(
    [function(*a) for a in zip(v.ravel(), *(o.ravel() for o in others))],
    np.float64,
  ).reshape(v.shape)


def soft(v, t):
  """The prox of t |u|.

  >>> soft([-3.0, 0.5, 1.0, 4.0], 1.0).tolist()
  [-2.0, 0.0, 0.0, 3.0]
  """
  return _each(lambda a: math.copysign(max(abs(a) - t, 0.0), a) + 0.0, v)


def hard(v, t):
  """The prox of t [u != 0]: what exceeds sqrt(2 t) stays.

  >>> hard([-3.0, 2.0, 2.1], 2.0).tolist()
  [-3.0, 0.0, 2.1]
  """
  return _each(lambda a: a if a * a > 2 * t else 0.0, v)


def lq_threshold(t, q):
  """(v below which the prox of t |u|^q is 0, the u it jumps to there).

  At the jump both 0 = u - v + t q u^(q-1) and v^2 / 2 = (u - v)^2 / 2 + t u^q.

  >>> lq_threshold(1.0, 0.5)
  (1.5, 1.0)
  """
  jump = (2 * t * (1 - q)) ** (1 / (2 - q))
  return (jump + t * q * jump ** (q - 1) if t else 0.0), jump


def lq(v, t, q):
  """The prox of t |u|^q, 0 < q < 1: the larger root, by halving intervals."""
  threshold, jump = lq_threshold(t, q)

  def one(a):
    size = abs(a)
    if size <= threshold:
      return 0.0
    if t == 0:
      return a
    low, high = jump, size  # The slope is below 0 at low, above at high.
    for _ in range(200):
      middle = (low + high) / 2
      if middle - size + t * q * middle ** (q - 1) < 0:
        low = middle
      else:
        high = middle
    return math.copysign((low + high) / 2, a)

  return _each(one, v)


def half(v, t):
  """`lq` at q = 1/2 in closed form: the largest root of s^3 - v s + t / 2."""
  threshold, _ = lq_threshold(t, 0.5)

  def one(a):
    size = abs(a)
    if size <= threshold:
      return 0.0
    angle = math.acos(-0.75 * t / size * math.sqrt(3 / size)) / 3
    return math.copysign((2 * math.sqrt(size / 3) * math.cos(angle)) ** 2, a)

  return _each(one, v)


def cel0_value(u, weight, norm):
  """CEL0 of each entry: rises from 0 to the weight at sqrt(2 weight) / norm."""

  def one(a, n):
    if n == 0:
      return 0.0
    edge = math.sqrt(2 * weight) / n
    if abs(a) > edge:
      return weight
    return weight - n * n / 2 * (abs(a) - edge) ** 2

  return _each(one, u, norm)


def cel0(v, t, weight, norm):
  """The prox of t CEL0.

  Below t norm^2 = 1 a steeper line between 0 and the identity (firm
  thresholding), from there on the hard threshold sqrt(2 t weight). An atom of
  norm 0 is not penalized.
  """

  def one(a, n):
    size = abs(a)
    if t * n * n >= 1:
      return a if size * size > 2 * t * weight else 0.0
    line = (size - t * n * math.sqrt(2 * weight)) / (1 - t * n * n)
    return math.copysign(min(size, max(line, 0.0)), a) + 0.0

  return _each(one, v, norm)


def group(v, t, size):
  """The prox of t sum of group norms: each group is shortened by t.

  >>> group([3.0, 4.0, 0.1, 0.2], 1.0, 2).tolist()
  [2.4000000000000004, 3.2, 0.0, 0.0]
  """
  v = np.asarray(v, np.float64)
  out = np.zeros_like(v)
  for start in range(0, len(v), size):
    part = v[start : start + size]
    length = math.sqrt(sum(a * a for a in part))
    if length > t:
      out[start : start + size] = part * ((length - t) / length)
  return out


def penalty(name, weight, *, nonnegative=False, q=0.5, norm=1.0, size=1):
  """The penalty called l1, l0, lq, cel0, group or none, times its weight."""
  value, prox = {
    "none": (lambda z: 0.0, lambda v, t: np.array(v, np.float64)),
    "l1": (
      lambda z: weight * sum(abs(a) for a in z),
      lambda v, t: soft(v, t * weight),
    ),
    "l0": (
      lambda z: weight * sum(a != 0 for a in z),
      lambda v, t: hard(v, t * weight),
    ),
    "lq": (
      lambda z: weight * sum(abs(a) ** q for a in z),
      lambda v, t: lq(v, t * weight, q),
    ),
    "cel0": (
      lambda z: float(cel0_value(z, weight, norm).sum()),
      lambda v, t: cel0(v, t, weight, norm),
    ),
    "group": (
      lambda z: (
        weight
        * sum(
          math.sqrt(sum(a * a for a in z[i : i + size]))
          for i in range(0, len(z), size)
        )
      ),
      lambda v, t: group(v, t * weight, size),
    ),
  }[name]
  if not nonnegative:
    return Penalty(value, prox)
  return Penalty(
    lambda z: math.inf if min(z) < 0 else value(z),
    lambda v, t: prox(np.maximum(v, 0.0), t),
  )


# --- Solvers


def lipschitz(dictionary):
  """The largest eigenvalue of W W^T."""
  dictionary = np.asarray(dictionary, np.float64)
  return float(np.linalg.eigvalsh(dictionary @ dictionary.T)[-1])


def objective(dictionary, signal, z, penalty=None):
  """1/2 ||x - z W||^2 + the penalty, of each row: [...]."""
  dictionary, signal, z = (
    np.asarray(a, np.float64) for a in (dictionary, signal, z)
  )
  error = 0.5 * ((signal - z @ dictionary) ** 2).sum(-1)
  if penalty is None:
    return error
  values = [penalty.value(row) for row in z.reshape(-1, z.shape[-1])]
  return error + np.reshape(values, error.shape)


def _rows(solve_row, dictionary, signal):
  dictionary = np.asarray(dictionary, np.float64)
  signal = np.asarray(signal, np.float64)
  rows = signal.reshape(-1, signal.shape[-1])
  codes = np.array([solve_row(dictionary, x) for x in rows], np.float64)
  return codes.reshape(*signal.shape[:-1], len(dictionary))


def ista_path(dictionary, signal, penalty, steps, step_size=None):
  """The codes of one signal [d] after 0, 1, ..., steps steps."""
  t = 1 / lipschitz(dictionary) if step_size is None else step_size
  path = [np.zeros(len(dictionary))]
  for _ in range(steps):
    z = path[-1]
    gradient = dictionary @ (z @ dictionary - signal)
    path.append(penalty.prox(z - t * gradient, t))
  return path


def fista_path(dictionary, signal, penalty, steps, step_size=None):
  """The same with Nesterov's extrapolation, Beck and Teboulle's FISTA."""
  t = 1 / lipschitz(dictionary) if step_size is None else step_size
  path = [np.zeros(len(dictionary))]
  ahead, momentum = path[0], 1.0
  for _ in range(steps):
    gradient = dictionary @ (ahead @ dictionary - signal)
    path.append(penalty.prox(ahead - t * gradient, t))
    following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
    ahead = path[-1] + (momentum - 1) / following * (path[-1] - path[-2])
    momentum = following
  return path


def ista(dictionary, signal, penalty, steps, step_size=None):
  """z <- prox(z - t W (z W - x), t), from 0."""
  return _rows(
    lambda w, x: ista_path(w, x, penalty, steps, step_size)[-1],
    dictionary,
    signal,
  )


def fista(dictionary, signal, penalty, steps, step_size=None):
  return _rows(
    lambda w, x: fista_path(w, x, penalty, steps, step_size)[-1],
    dictionary,
    signal,
  )


def _correlations(dictionary, residual):
  """(<d, r> / ||d||, ||d||) of every atom."""
  norms = [math.sqrt(sum(a * a for a in atom)) for atom in dictionary]
  return np.array(
    [d @ residual / n if n else 0.0 for d, n in zip(dictionary, norms)]
  ), np.array(norms)


def _refit(dictionary, x, support):
  z = np.zeros(len(dictionary))
  if len(support):
    z[support] = np.linalg.lstsq(dictionary[support].T, x, rcond=None)[0]
  return z


def omp_path(dictionary, x, k):
  """[(support in the order of choice, code)] after 0, 1, ..., k atoms."""
  support, path = [], [([], np.zeros(len(dictionary)))]
  for _ in range(k):
    size = np.abs(_correlations(dictionary, x - path[-1][1] @ dictionary)[0])
    size[support] = -1.0
    support = [*support, int(np.argmax(size))]
    path.append((support, _refit(dictionary, x, support)))
  return path


def omp(dictionary, signal, k):
  """Orthogonal matching pursuit."""
  return _rows(lambda w, x: omp_path(w, x, k)[-1][1], dictionary, signal)


def matching_pursuit_path(dictionary, x, k, signed=False):
  """[(atom, code, residual)] after each of k atoms.

  signed takes the largest correlation rather than the largest |correlation|,
  as MP-SAE's encoder does.
  """
  z, r, path = np.zeros(len(dictionary)), np.array(x, np.float64), []
  for _ in range(k):
    c, norms = _correlations(dictionary, r)
    j = int(np.argmax(c if signed else np.abs(c)))
    step = c[j] / norms[j] if norms[j] else 0.0
    z = z.copy()
    z[j] += step
    r = r - step * dictionary[j]
    path.append((j, z, r))
  return path


def matching_pursuit(dictionary, signal, k, signed=False):
  if k == 0:
    return _rows(lambda w, x: np.zeros(len(w)), dictionary, signal)
  return _rows(
    lambda w, x: matching_pursuit_path(w, x, k, signed)[-1][1],
    dictionary,
    signal,
  )


def largest(v, k):
  """The indices, ascending, of the k largest |v|, ties to the lower index.

  >>> largest([1.0, -3.0, 3.0, 1.0], 3)
  [0, 1, 2]
  """
  order = sorted(range(len(v)), key=lambda j: (-abs(v[j]), j))
  return sorted(order[:k])


def iht_path(dictionary, x, k, steps, step_size=None, refit=False):
  """The codes after 0, 1, ..., steps steps of IHT, or with refit of HTP."""
  t = 1 / lipschitz(dictionary) if step_size is None else step_size
  path = [np.zeros(len(dictionary))]
  for _ in range(steps):
    z = path[-1]
    v = z + t * (dictionary @ (x - z @ dictionary))
    support = largest(v, k)
    if refit:
      path.append(_refit(dictionary, x, support))
    else:
      path.append(np.where(np.isin(np.arange(len(v)), support), v, 0.0))
  return path


def iht(dictionary, signal, k, steps, step_size=None):
  """Iterative hard thresholding: z <- the k largest of z + t W (x - z W)."""
  return _rows(
    lambda w, x: iht_path(w, x, k, steps, step_size)[-1], dictionary, signal
  )


def htp(dictionary, signal, k, steps, step_size=None):
  """Hard thresholding pursuit: least squares on IHT's support each step."""
  return _rows(
    lambda w, x: iht_path(w, x, k, steps, step_size, True)[-1],
    dictionary,
    signal,
  )
