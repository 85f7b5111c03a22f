"""Sort the rows of a design by group, scale its columns, and compute sums over groups.

A model has one grouping factor, or several, each nested in the next coarser one. The rows are
sorted by the coarsest factor first, so the rows of every group of every factor are contiguous.
`np.add.reduceat` then computes a sum for each group, without padding groups to the longest.

The search uses scaled coordinates, in which the entries of all columns are near 1 in size:

    X = Xq A^-1,    Xq'Xq = N I              so  beta = A beta_q
    Z_k = S_k T_k^-1                         so  Sigma_k = T_k Sigma_s T_k'

The mean square of every column of S_k is 1. If X has an intercept, its other columns are centred
first. If a correlated term has an intercept, its other columns are centred too, which only changes
the entries of its full covariance. The columns of an uncorrelated term are scaled and not centred,
because centring would correlate its effects.

beta_q are the fixed effects in scaled coordinates, and Sigma_s is the covariance of the scaled
effects of a term. Lambda [q, q] is lower triangular, and Lambda Lambda' is the covariance of the
scaled effects of a grouping factor, for the gaussian family in units of s^2. theta lists the
entries of every Lambda that are estimated. It is not the theta of docs/model.md.

There are N rows, P fixed columns and D grouping factors, called levels, coarsest first. Level d has
G_d groups with q_d random effects each.

The code uses NumPy in float64. XLA would compile a program for the shapes of every data set, and
the compilation would take longer than the whole fit.
"""

from typing import NamedTuple

import numpy as np

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import checks

INTERCEPT = "(Intercept)"


class Level(NamedTuple):
  """A grouping factor with the columns of all its random terms.

  Attributes:
    factor: the name of the grouping factor.
    of_row: [N], the group of every sorted row.
    starts: [G], the first sorted row of every group.
    labels: [G], the index of every group in the labels of the design.
    columns: [N, q], the scaled columns S in sorted rows.
    back: [q, q], the matrix T. T times the scaled effects gives the effects in the units of the
      data.
    places: ([n], [n]), the row and the column in Lambda [q, q] of the n entries of theta.
    keys: the q names of the effects, as in `Fit.sd`.
    correlated: (first column, last column + 1) of every correlated term.
  """

  factor: str
  of_row: np.ndarray
  starts: np.ndarray
  labels: np.ndarray
  columns: np.ndarray
  back: np.ndarray
  places: tuple[np.ndarray, np.ndarray]
  keys: tuple[str, ...]
  correlated: tuple[tuple[int, int], ...]


class Blocks(NamedTuple):
  """A design in sorted rows and scaled columns.

  Attributes:
    design: the original design.
    order: [N], the row of the design that each sorted row comes from.
    levels: the D grouping factors, coarsest first.
    fixed: [N, P], the matrix Xq.
    back: [P, P], the matrix A. Fixed effects in the units of the data are A beta_q.
    response, offset, weights, trials: [N], in sorted rows. Weights and trials are ones if the
      design has none.
  """

  design: Design
  order: np.ndarray
  levels: tuple[Level, ...]
  fixed: np.ndarray
  back: np.ndarray
  response: np.ndarray
  offset: np.ndarray
  weights: np.ndarray
  trials: np.ndarray

  @property
  def diagonal(self) -> np.ndarray:
    """The positions in theta of the diagonal entries of Lambda, in the order of `keys`."""
    rows, columns = (
      np.concatenate([level.places[i] for level in self.levels] or [np.zeros(0, int)])
      for i in (0, 1)
    )
    return np.flatnonzero(rows == columns)

  @property
  def keys(self) -> tuple[str, ...]:
    """The names of the random effects of all levels."""
    return tuple(key for level in self.levels for key in level.keys)

  def lambdas(self, theta: np.ndarray) -> list[np.ndarray]:
    """Return Lambda(theta) [q, q] of every level: lower triangular, with a block for each term."""
    found, at = [], 0
    for level in self.levels:
      matrix = np.zeros((len(level.keys),) * 2)
      rows, columns = level.places
      matrix[rows, columns] = theta[at : at + len(rows)]
      at += len(rows)
      found.append(matrix)
    return found

  def pick(self, matrices: list[np.ndarray]) -> np.ndarray:
    """Invert `lambdas`: return theta from the matrices [q, q] of all levels."""
    picked = [m[level.places] for level, m in zip(self.levels, matrices, strict=True)]
    return np.concatenate([*picked, np.zeros(0)])


def blocks(design: Design, centred: bool = True, first: str | None = None) -> Blocks:
  """Sort the rows of a design by group, and scale its columns.

  Args:
    design: the matrices of a formula.
    centred: whether to centre the columns of correlated terms. If False, T is diagonal, and row j
      of Lambda belongs to effect j only.
    first: the name, as in `Fit.sd`, of the effect to put first in its correlated term. The standard
      deviation of this effect is then a single entry of theta, in scaled units.

  Returns:
    The blocks.

  Raises:
    ValueError: grouping factors are crossed, a factor has one group only, a number is not finite,
      or the fixed columns are linearly dependent or at least as many as the rows.
  """
  checks.check(design)
  factors: dict[str, list[int]] = {}
  for i, term in enumerate(design.random):
    factors.setdefault(term.group, []).append(i)
  sizes = {name: len(design.random[members[0]].levels) for name, members in factors.items()}
  names = sorted(factors, key=lambda name: sizes[name])
  indices = [np.asarray(design.random[factors[name][0]].index) for name in names]
  rows = len(design.response)
  for coarse, fine, outer, inner in zip(names, names[1:], indices, indices[1:], strict=False):
    checks.check_nested(coarse, fine, outer, inner)
  order = np.lexsort(indices[::-1]) if indices else np.arange(rows)
  prefix = len(names) > 1
  levels = tuple(
    _level(design, name, factors[name], index[order], order, prefix, centred, first)
    for name, index in zip(names, indices, strict=True)
  )
  keys = [key for level in levels for key in level.keys]
  if twice := sorted({key for key in keys if keys.count(key) > 1}):
    raise ValueError(
      f"The random part has {', '.join(twice)} twice in one grouping factor; write each once."
    )
  fixed, back = _fixed(design)
  sorted_ = lambda x: np.ones(rows) if x is None else np.asarray(x, float)[order]
  return Blocks(
    design,
    order,
    levels,
    fixed[order],
    back,
    sorted_(design.response),
    sorted_(design.offset),
    sorted_(design.weights),
    sorted_(design.trials),
  )


def key_of(group: str, name: str, prefix: bool) -> str:
  """Return the name of a random effect: its column, after its factor if `prefix` is True."""
  return f"{group} {name}" if prefix else name


def starts_within(fine: Level, coarse: Level) -> np.ndarray:
  """Return the first group of the finer level in every group of the coarser level, [G_coarse]."""
  return np.searchsorted(fine.starts, coarse.starts)


def parents(fine: Level, coarse: Level) -> np.ndarray:
  """Return the group of the coarser level that contains each finer group, [G_fine]."""
  return coarse.of_row[fine.starts]


def statistics(
  levels: tuple[Level, ...], rest: np.ndarray, weights: np.ndarray | None, sides: np.ndarray
) -> list[np.ndarray]:
  """Compute, for every level d, sums over the rows of each group.

      [Z_d' W Z_d, Z_d' W Z_(d-1), ..., Z_d' W Z_0, Z_d' W rest, Z_d' sides]   [G_d, q_d, ...]

  Args:
    levels: the D levels, coarsest first.
    rest: [N, m], other columns, such as the fixed columns and the response.
    weights: [N], the diagonal of W. None means ones.
    sides: [N, r], columns that are not multiplied by the weights.

  Returns:
    D arrays [G_d, q_d, q_d + ... + q_0 + m + r].
  """
  found = []
  for d, level in enumerate(levels):
    coarser = [levels[e].columns for e in reversed(range(d))]
    others = [column for block in (*coarser, rest) for column in block.T]
    q = len(level.keys)
    own = level.columns if weights is None else level.columns * weights[:, None]
    sums = np.empty((len(level.starts), q, q + len(others) + sides.shape[1]))
    for i in range(q):
      for j in range(i + 1):
        sums[:, i, j] = np.add.reduceat(own[:, i] * level.columns[:, j], level.starts)
        sums[:, j, i] = sums[:, i, j]
      for j, column in enumerate(others, q):
        sums[:, i, j] = np.add.reduceat(own[:, i] * column, level.starts)
      for j, column in enumerate(sides.T, q + len(others)):
        sums[:, i, j] = np.add.reduceat(level.columns[:, i] * column, level.starts)
    found.append(sums)
  return found


def _level(
  design: Design,
  factor: str,
  members: list[int],
  index: np.ndarray,
  order: np.ndarray,
  prefix: bool,
  centred: bool,
  first: str | None,
) -> Level:
  """A level from the random terms of one factor; `index` [N] is sorted as `order` says."""
  starts = np.flatnonzero(np.r_[True, index[1:] != index[:-1]])
  keys, columns, backs, places, correlated = [], [], [], [], []
  at = 0
  for i in members:
    term = design.random[i]
    q = len(term.names)
    sequence = list(range(q))
    named = [key_of(factor, name, prefix) for name in term.names]
    if first in named:
      sequence.insert(0, sequence.pop(named.index(first)))
    scaled, back = _scaled(
      np.asarray(term.columns, float)[:, sequence], term.correlated and centred
    )
    keys += [named[j] for j in sequence]
    columns.append(scaled[order])
    backs.append(back)
    full = term.correlated and q > 1
    places.append(np.stack(np.tril_indices(q) if full else (np.arange(q),) * 2) + at)
    correlated += [(at, at + q)] if full else []
    at += q
  back = np.zeros((at, at))
  for block, (low, high) in zip(backs, _ranges([len(b) for b in backs]), strict=True):
    back[low:high, low:high] = block
  rows, cols = np.concatenate(places, 1)
  of_row = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(index)]))
  return Level(
    factor,
    of_row,
    starts,
    index[starts],
    np.concatenate(columns, 1),
    back,
    (rows, cols),
    tuple(keys),
    tuple(correlated),
  )


def _ranges(sizes: list[int]) -> list[tuple[int, int]]:
  ends = np.cumsum([0, *sizes])
  return [(int(low), int(high)) for low, high in zip(ends, ends[1:], strict=False)]


def _scaled(columns: np.ndarray, centred: bool) -> tuple[np.ndarray, np.ndarray]:
  """(S, T): columns = S T^-1."""
  q = columns.shape[1]
  constant = np.flatnonzero((np.ptp(columns, 0) == 0) & (columns[0] != 0))
  shift = np.eye(q)  # centred columns = columns @ shift
  if centred and q > 1 and len(constant):
    one = int(constant[0])
    for j in set(range(q)) - {one}:
      shift[one, j] = -columns[:, j].mean() / columns[0, one]
  moved = columns @ shift
  size = np.sqrt(np.mean(np.square(moved), 0))
  size = np.where(size > 0, size, 1.0)
  return moved / size, shift / size


def _fixed(design: Design) -> tuple[np.ndarray, np.ndarray]:
  """(Xq, A) of the fixed columns, whose rank is judged by scaled, centred columns."""
  x, names = np.asarray(design.fixed, float), design.fixed_names
  rows, p = x.shape
  if p == 0:
    return x, np.zeros((0, 0))
  constant = np.flatnonzero((np.ptp(x, 0) == 0) & (x[0] != 0))
  shift = np.eye(p)
  one = int(constant[0]) if len(constant) else -1
  largest = np.abs(x).max(0)
  if one >= 0:
    for j in set(range(p)) - {one}:
      shift[one, j] = -x[:, j].mean() / x[0, one]
  moved = x.copy()
  for j in range(p):
    if one >= 0 and j != one:
      moved[:, j] = x[:, j] - x[:, j].mean()
  # A column's values carry a relative rounding error, which a small spread makes larger.
  size = np.sqrt(np.mean(np.square(moved), 0))
  spread = size / np.where(largest > 0, largest, 1.0)
  rounding = 4 * np.finfo(float).eps
  dependent = spread <= rounding
  least = rounding * np.sqrt(max(rows, p)) / spread[~dependent].min(initial=1.0)
  _, values, v = np.linalg.svd(moved / np.where(size > 0, size, 1.0), full_matrices=False)
  if not dependent.any() and values[-1] <= least * values[0]:
    dependent = np.abs(v[-1]) > 1e-3 * np.abs(v[-1]).max()
    if one >= 0 and dependent.sum() == 1:
      dependent[one] = True
  if dependent.any():
    which = ", ".join(name for name, bad in zip(names, dependent, strict=True) if bad)
    raise ValueError(
      f"The columns of the fixed part depend on each other in {rows} rows: {which}; leave one out."
    )
  q, r = np.linalg.qr(moved / size)
  back = (shift / size) @ np.linalg.inv(r) * np.sqrt(rows)
  return q * np.sqrt(rows), back
