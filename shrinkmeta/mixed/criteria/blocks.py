"""A design sorted into blocks of rows, its columns scaled, and its sums over groups.

The grouping factors of a model are one factor, or each is nested in the next coarser one. The rows
are sorted by the coarsest factor first, so that the rows of every group of every factor stand
together. A sum over groups is then `np.add.reduceat`, and a long group costs its own rows alone.

The search works in coordinates of its own, in which all columns are near 1:

    X = Xq A^-1,    Xq'Xq = N I              so  beta = A beta_q
    Z_k = S_k T_k^-1, mean square of S_k 1   so  Sigma_k = T_k Sigma_s T_k'

X is centred first where it holds an intercept. Columns of a correlated term are centred where the
term has an intercept: a full covariance then only changes its entries. The columns of an
uncorrelated term are only scaled, because its diagonal covariance is tied to its zero.

N rows, P fixed columns, D grouping factors ("levels"), coarsest first; level d has G_d groups with
q_d random columns each.

Everything is NumPy in float64. The sums are small and every data set has shapes of its own, for
which XLA would compile anew, in more time than the whole fit takes.
"""

from typing import NamedTuple

import numpy as np

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import checks

INTERCEPT = "(Intercept)"


class Level(NamedTuple):
  """A grouping factor with the columns of all its random terms.

  Attributes:
    factor: its name.
    of_row: [N] the group of every sorted row.
    starts: [G] the first sorted row of every group.
    labels: [G] the place of every group among the labels of the design.
    columns: [N, q] S, the scaled columns, sorted as the rows are.
    back: [q, q] T, so that effects in the units of the data are T b_s.
    places: ([n], [n]) row and column in Lambda [q, q] of the n entries of theta.
    keys: q names of the effects, as the fit calls them.
    correlated: (first, last + 1) of the columns of every correlated term.
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
    design: where it comes from.
    order: [N] the row of the design behind every sorted row.
    levels: the D grouping factors, coarsest first.
    fixed: [N, P] Xq.
    back: [P, P] A, so that fixed effects in the units of the data are A beta_q.
    response, offset, weights, trials: [N], sorted; weights and trials are ones if there are none.
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
    """Where in theta the diagonal entries of Lambda stand, in the order of `keys`."""
    rows, columns = (
      np.concatenate([level.places[i] for level in self.levels] or [np.zeros(0, int)])
      for i in (0, 1)
    )
    return np.flatnonzero(rows == columns)

  @property
  def keys(self) -> tuple[str, ...]:
    """Names of the random effects of all levels."""
    return tuple(key for level in self.levels for key in level.keys)

  def lambdas(self, theta: np.ndarray) -> list[np.ndarray]:
    """Lambda(theta) [q, q] of every level: lower triangular, one block a term."""
    found, at = [], 0
    for level in self.levels:
      matrix = np.zeros((len(level.keys),) * 2)
      rows, columns = level.places
      matrix[rows, columns] = theta[at : at + len(rows)]
      at += len(rows)
      found.append(matrix)
    return found

  def pick(self, matrices: list[np.ndarray]) -> np.ndarray:
    """The entries of theta from matrices [q, q], one a level; the inverse of `lambdas`."""
    picked = [m[level.places] for level, m in zip(self.levels, matrices, strict=True)]
    return np.concatenate([*picked, np.zeros(0)])


def blocks(design: Design, centred: bool = True, first: str | None = None) -> Blocks:
  """Sort a design into blocks, and scale its columns.

  Args:
    design: the matrices of a formula.
    centred: centre the columns of correlated terms. Without it T is diagonal, and row j of Lambda
      belongs to the effect j alone.
    first: the name, as in `Fit.sd`, of an effect that stands first in its correlated term, so that
      its standard deviation is one entry of theta.

  Returns:
    The blocks.

  Raises:
    ValueError: grouping factors that are crossed; a factor with one level; a number that is not
      finite; columns that depend on each other, or are more than the rows.
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
  """The name of a random effect: its column, behind its factor where a model has several."""
  return f"{group} {name}" if prefix else name


def starts_within(fine: Level, coarse: Level) -> np.ndarray:
  """[G_coarse] the first group of a finer level in every group of a coarser one."""
  return np.searchsorted(fine.starts, coarse.starts)


def parents(fine: Level, coarse: Level) -> np.ndarray:
  """[G_fine] the group of a coarser level that holds every group of a finer one."""
  return coarse.of_row[fine.starts]


def statistics(
  levels: tuple[Level, ...], rest: np.ndarray, weights: np.ndarray | None, sides: np.ndarray
) -> list[np.ndarray]:
  """Sums over the rows of every group, for every level d.

      [Z_d' W Z_d, Z_d' W Z_(d-1), ..., Z_d' W Z_0, Z_d' W rest, Z_d' sides]   [G_d, q_d, ...]

  Args:
    levels: the levels.
    rest: [N, m] other columns.
    weights: [N] the diagonal of W; None for ones.
    sides: [N, r] columns that come without the weights.

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
