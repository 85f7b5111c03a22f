"""The result of fitting a mixed model, in the units of the data."""

from typing import Literal, NamedTuple

import numpy as np

from shrinkmeta.mixed import estimates
from shrinkmeta.mixed.criteria import search
from shrinkmeta.mixed.criteria.blocks import Blocks, Level, key_of
from shrinkmeta.mixed.criteria.families import Family

Estimator = Literal["ml", "reml", "predictive"]
_NORMAL = 1.959963984540054  # 97.5 % of a standard normal
_NAN = (float("nan"), float("nan"))
_ROUNDING = 1e-10  # of a standard deviation that is 0, from the change of coordinates
# A log standard deviation that is known to a factor of 20 is hardly known; so is an effect of 100
# units of eta, or of 1,000 standard deviations of the response, for a column of size 1.
_WIDE_LOG, _WIDE_ETA, _WIDE_SPREADS = 3.0, 100.0, 1000.0
_STILL = 1e-6  # the largest gradient, per row and in scaled coordinates, of a fit that converged
_STILL_BY_DIFFERENCES = 1e-4  # nats that a Newton step may gain, where differences are the gradient


class Fit(NamedTuple):
  """A fitted mixed model, in the units of the data.

  If the estimator is "predictive", standard errors and intervals are nan. Its criterion is not a
  log likelihood, so the inverse of its Hessian is not a covariance of the estimates. Standard
  errors and intervals are also nan if the fit is `perfect`.

  Attributes:
    family, estimator: the arguments of `fit`.
    fixed: {name: estimate} of the fixed effects.
    fixed_se: {name: standard error}, from the observed information of all parameters. inf for an
      effect that the data do not determine.
    fixed_se_conditional: {name: standard error} at given variances, as lme4 prints them for linear
      models.
    fixed_covariance: [P, P], the covariance of the fixed effects. nan for undetermined effects.
    sd: {name: standard deviation} of the random effects. It is 0 if the maximum is at 0.
    sd_interval: {name: (low, high)}, Wald's 95 % interval on the log scale. nan if the sd is 0.
    correlation: {(name, name): correlation} of the effects of a correlated term. nan if the sd of
      one of the two is 0.
    correlation_interval: {(name, name): (low, high)}, Wald's 95 % interval on Fisher's z scale. nan
      if the correlation is -1, 1 or nan, or if the data do not determine it.
    residual, residual_interval: the residual standard deviation and its interval. None if the
      family is not gaussian.
    log_likelihood: the log likelihood at the estimates, not restricted, with all constants. It is
      Laplace's approximation if the family is not gaussian.
    criterion: the maximised criterion: the log likelihood, the restricted log likelihood, or l_PLL.
    singular: the names of the effects whose sd is 0.
    undetermined: the parameters that the data do not determine, or hardly determine: names of fixed
      effects, "sd of NAME", "residual".
    converged: whether the search ended at a maximum.
    gradient: the largest entry of the criterion's gradient at the end, divided by N, in scaled
      coordinates.
    rows: the number of rows N.
    groups: {grouping factor: number of groups}.
    parameters: the numbers of fixed effects, variances, covariances and residual variances that
      were estimated.
    covariances: Sigma_k [q_k, q_k] of every random term of the design.
    singular_correlation: the grouping factors with a singular covariance in which no standard
      deviation is 0. A correlation of 1 is an example.
    perfect: whether the fit repeats every response. A gaussian fit does if its residual is as small
      as rounding: the likelihood grows without end as the residual goes to 0. A logistic fit does
      if the fitted probability of every response is above 0.9 (complete separation): the
      likelihood grows, or hardly falls, as fixed effects and standard deviations go to infinity.
  """

  family: Family
  estimator: Estimator
  fixed: dict[str, float]
  fixed_se: dict[str, float]
  fixed_se_conditional: dict[str, float]
  fixed_covariance: np.ndarray
  sd: dict[str, float]
  sd_interval: dict[str, tuple[float, float]]
  correlation: dict[tuple[str, str], float]
  correlation_interval: dict[tuple[str, str], tuple[float, float]]
  residual: float | None
  residual_interval: tuple[float, float] | None
  log_likelihood: float
  criterion: float
  singular: tuple[str, ...]
  undetermined: tuple[str, ...]
  converged: bool
  gradient: float
  rows: int
  groups: dict[str, int]
  parameters: tuple[int, int, int, int]
  covariances: tuple[np.ndarray, ...]
  singular_correlation: tuple[str, ...]
  perfect: bool


class Maximum(NamedTuple):
  """A maximum in the coordinates of the blocks.

  Attributes:
    beta: [P], the fixed effects.
    theta: [k], the entries of Lambda.
    residual: s, in the units of the data. None if the family is not gaussian.
    information: the covariances of the parameters. None if the criterion is not a log likelihood.
    conditional: [P, P], the covariance of beta at given variances.
    log_likelihood, criterion: as in `Fit`.
    minimum: the minimum at which the search ended.
    perfect: as in `Fit`.
    spread: the root mean square of the residuals of least squares without random effects. 1 if they
      are 0, if the family is not gaussian, or if the estimator is "predictive".
  """

  beta: np.ndarray
  theta: np.ndarray
  residual: float | None
  information: estimates.Information | None
  conditional: np.ndarray
  log_likelihood: float
  criterion: float
  minimum: search.Minimum
  perfect: bool = False
  spread: float = 1.0


def report(data: Blocks, family: Family, estimator: Estimator, found: Maximum) -> Fit:
  """Convert a maximum to a Fit, in the units of the data.

  Args:
    data: the blocks.
    family, estimator: the arguments of `fit`.
    found: the maximum.

  Returns:
    The fit.
  """
  design, rows = data.design, len(data.response)
  names = design.fixed_names
  covariance = np.full((len(names),) * 2, np.nan)
  error = np.full(len(names), np.nan)
  open_: list[str] = []
  known = None if found.perfect else found.information
  if known is not None:
    covariance = data.back @ known.beta @ data.back.T
    error = np.sqrt(np.diag(covariance))
    size = np.sqrt(np.mean(np.square(np.asarray(design.fixed, float)), 0)) if names else np.zeros(0)
    unit = _WIDE_ETA if found.residual is None else _WIDE_SPREADS * found.spread
    for j, name in enumerate(names):
      row = data.back[j]
      flat = estimates.touched(row, known.flat_beta, float(np.linalg.norm(row)))
      if flat or not error[j] * size[j] < unit:
        open_.append(name)
        if flat:
          covariance[j], covariance[:, j], error[j] = np.nan, np.nan, np.inf
  random = _Random(data, found, known)
  residual_interval = None
  if found.residual is not None:
    residual_interval = _NAN
    if known is not None:
      flat = bool((np.abs(known.flat_residual) > 1e-3).any())
      se = float(np.sqrt(known.log_residual or 0.0))
      residual_interval = _NAN if flat else _log_interval(found.residual, se)
      if flat or not se < _WIDE_LOG:
        random.open.append("residual")
  if found.perfect:
    both = [*names, *(f"sd of {name}" for name, sd in random.sd.items() if sd > 0)]
    open_ += both if found.residual is None else ["residual"]
  allowed = _STILL if found.information is not None else _STILL_BY_DIFFERENCES
  largest = float(np.abs(found.minimum.gradient).max(initial=0.0)) / rows
  fixed = data.back @ found.beta
  conditional = error  # nan
  if not found.perfect:
    conditional = np.sqrt(np.diag(data.back @ found.conditional @ data.back.T))
  table = lambda values: dict(zip(names, map(float, values), strict=True))
  return Fit(
    family,
    estimator,
    table(fixed),
    table(error),
    table(conditional),
    covariance,
    random.sd,
    random.interval,
    random.correlation,
    random.correlation_interval,
    found.residual,
    residual_interval,
    float(found.log_likelihood),
    float(found.criterion),
    tuple(name for name, sd in random.sd.items() if sd == 0),
    tuple(open_ + random.open),
    found.minimum.converged and (largest < _STILL or _gain(found.minimum) < allowed),
    largest,
    rows,
    {level.factor: len(level.starts) for level in data.levels},
    (
      len(names),
      len(data.keys),
      len(found.theta) - len(data.keys),
      int(found.residual is not None),
    ),
    random.covariances,
    random.degenerate,
    found.perfect,
  )


def _gain(minimum: search.Minimum) -> float:
  """Nats that a Newton step would gain in the directions that are curved."""
  values, vectors = np.linalg.eigh(minimum.hessian)
  curved = values > 1e-12 * np.abs(values).max(initial=0.0)
  along = vectors.T @ minimum.gradient
  return float(np.sum(np.square(along[curved]) / values[curved]) / 2)


def _log_interval(value: float, se: float) -> tuple[float, float]:
  return float(value * np.exp(-_NORMAL * se)), float(value * np.exp(_NORMAL * se))


class _Random:
  """Standard deviations, intervals and correlations of the random effects."""

  def __init__(self, data: Blocks, found: Maximum, known: estimates.Information | None):
    self.sd: dict[str, float] = {}
    self.interval: dict[str, tuple[float, float]] = {}
    self.correlation: dict[tuple[str, str], float] = {}
    self.correlation_interval: dict[tuple[str, str], tuple[float, float]] = {}
    self.open: list[str] = []
    degenerate, by_column, at = [], {}, 0
    scale = 1.0 if found.residual is None else found.residual
    for level, matrix in zip(data.levels, data.lambdas(found.theta), strict=True):
      rows = level.back @ matrix * scale
      size = scale * max(1.0, float(np.linalg.norm(matrix)))
      rows[np.linalg.norm(rows, axis=1) < _ROUNDING * size * np.linalg.norm(level.back, axis=1)] = (
        0.0
      )
      covariance = rows @ rows.T
      sds = np.sqrt(np.diag(covariance))
      places = slice(at, at + len(level.places[0]))
      at = places.stop
      for j, key in enumerate(level.keys):
        by_column[key] = covariance[j]
        self.sd[key] = float(sds[j])
        self.interval[key] = _NAN
        if sds[j] > 0 and known is not None:
          self._interval(key, level, rows[j] / scale, j, places, known)
      for low, high in level.correlated:
        for i in range(low, high):
          for j in range(low, i):
            product = sds[i] * sds[j]
            value = float(covariance[i, j] / product) if product > 0 else float("nan")
            pair = level.keys[j], level.keys[i]
            self.correlation[pair] = value
            self.correlation_interval[pair] = _NAN
            if known is not None and abs(value) < 1 - _ROUNDING:
              slope = _slope_of_z(level, rows / scale, i, j, len(found.theta), places)
              self.correlation_interval[pair] = _z_interval(value, slope, known)
        some = np.diag(matrix)[low:high] == 0
        if some.any() and (sds[low:high] > 0).all():
          degenerate.append(level.factor)
    self.degenerate = tuple(dict.fromkeys(degenerate))
    self.covariances = _by_term(data, by_column)

  def _interval(self, key: str, level: Level, row: np.ndarray, j: int, places: slice,
                known: estimates.Information) -> None:  # fmt: skip
    """By the derivative of log sd_j = log s + log |row j of T Lambda| with respect to theta."""
    r, c = level.places
    slope = np.zeros(known.theta.shape[0])
    slope[places] = row[c] * level.back[j, r] / float(row @ row)
    variance = float(slope @ known.theta @ slope)
    along = known.flat_theta @ slope
    if known.log_residual is not None:
      variance += known.log_residual + 2 * float(slope @ known.mixed)
      along = along + known.flat_residual
    flat = bool((np.abs(along) > 1e-3).any())
    se = float(np.sqrt(max(variance, 0.0)))
    self.interval[key] = _NAN if flat else _log_interval(self.sd[key], se)
    if flat or not se < _WIDE_LOG:
      self.open.append(f"sd of {key}")


def _slope_of_z(
  level: Level, rows: np.ndarray, i: int, j: int, k: int, places: slice
) -> np.ndarray:
  """The derivative [k] of z = atanh(rho_ij) with respect to theta; `rows` is T Lambda.

  d rho / d row_i = (row_j / |row_j| - rho row_i / |row_i|) / |row_i|,   dz = d rho / (1 - rho^2)
  """
  r, c = level.places
  one, other = np.linalg.norm(rows[i]), np.linalg.norm(rows[j])
  rho = float(rows[i] @ rows[j] / (one * other))
  by_i = (rows[j] / other - rho * rows[i] / one) / one
  by_j = (rows[i] / one - rho * rows[j] / other) / other
  slope = np.zeros(k)
  slope[places] = (level.back[i, r] * by_i[c] + level.back[j, r] * by_j[c]) / (1 - rho**2)
  return slope


def _z_interval(rho: float, slope: np.ndarray, known: estimates.Information) -> tuple[float, float]:
  """Wald's interval of z = atanh(rho), as an interval of rho."""
  if estimates.touched(slope, known.flat_theta, 1.0):
    return _NAN
  width = _NORMAL * float(np.sqrt(max(float(slope @ known.theta @ slope), 0.0)))
  return float(np.tanh(np.arctanh(rho) - width)), float(np.tanh(np.arctanh(rho) + width))


def _by_term(data: Blocks, by_column: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
  """Sigma_k of every term of the design, in the order of its columns."""
  place = {key: j for level in data.levels for j, key in enumerate(level.keys)}
  found = []
  for term in data.design.random:
    keys = [key_of(term.group, name, len(data.levels) > 1) for name in term.names]
    found.append(np.array([[by_column[a][place[b]] for b in keys] for a in keys]))
  return tuple(found)
