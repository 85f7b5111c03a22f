"""Fit a linear or generalised linear mixed model by maximum likelihood.

    eta = offset + X beta + sum_k Z_k b_k,   b_k of a group ~ N(0, Sigma_k)
    gaussian: y ~ N(eta, s^2 / w),  logistic: y ~ Binomial(n, 1 / (1 + e^-eta)),
    poisson:  y ~ Poisson(e^eta)

This is the hierarchical model of the library. The groups are the tasks, beta is phi, and b + beta
is theta_t. The term `(x || g)` has a diagonal Sigma_k. This is the prior of the rest of the
library, with one sigma for each module. The term `(x | g)` has a full Sigma_k. A model has one
grouping factor, or several nested ones.

==========  ===========================================================================
estimator   maximises
==========  ===========================================================================
ml          the likelihood; Laplace's approximation of it if the family is not gaussian
reml        the likelihood with beta integrated out; gaussian only
predictive  log p of each half of every group, with random effects from the other half
==========  ===========================================================================

If the model has one grouping factor, the name of a random effect is the name of its column, such as
"(Intercept)" or "Days". If the model has several, the name of the factor comes first:
"school:class (Intercept)".
"""

from collections.abc import Sequence

import numpy as np

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import checks, estimates
from shrinkmeta.mixed.criteria import laplace, search
from shrinkmeta.mixed.criteria.blocks import Blocks, blocks
from shrinkmeta.mixed.criteria.families import Family
from shrinkmeta.mixed.criteria.gaussian import Gaussian
from shrinkmeta.mixed.criteria.laplace import Laplace
from shrinkmeta.mixed.criteria.predictive import Predictive
from shrinkmeta.mixed.result import Estimator, Fit, Maximum, report

ESTIMATORS = ("ml", "reml", "predictive")
# With so many, a criterion is smooth and slow: every other point of the grid will do.
_MANY_GROUPS, _MANY_ROWS = 2000, 20000
_PREDICTIVE_STARTS = 3
# With so few rows a maximum with a correlation may be out of reach from starts without one.
_FEW_ROWS, _TILTED_STARTS, _TILT = 200, 3, 0.9
_NEAR_ONE = 0.2  # a diagonal entry of Lambda, to the norm of its row: |correlation| > 0.98
_LOWER = 1e-6  # nats from which another minimum is the better one
_FAR_ETA = float(np.log(9.0))  # a fitted probability of 0.9


def fit(
  design: Design, family: Family = "gaussian", estimator: Estimator = "ml", *, seed: int = 0
) -> Fit:
  """Fit a mixed model to a design.

  The search starts at every local minimum of a grid over the random effects' standard deviations.
  With correlated effects and at most 200 counts or successes it also starts from correlations.
  If the best value of a standard deviation is 0, the fit sets it to 0 and reports it as singular.

  Args:
    design: the matrices of a formula, and the response.
    family: "gaussian", "logistic" or "poisson". A logistic response is 0 or 1, or the number of
      successes in `design.trials`.
    estimator: "ml", "reml" or "predictive".
    seed: the seed that splits every group into halves, for "predictive".

  Returns:
    The fit.

  Raises:
    ValueError: the response does not fit the family; "reml" is used for a family other than
      gaussian; the grouping factors are crossed; a factor has one group only; or the columns are
      linearly dependent or not finite.

  >>> from shrinkmeta.formulas.design import Design, RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> found = fit(Design(y, "yield", one, ("(Intercept)",), (term,), np.zeros(9)), estimator="reml")
  >>> round(found.fixed["(Intercept)"], 2), round(found.sd["(Intercept)"], 2)
  (1528.89, 47.98)

  References:
    Bates, Maechler, Bolker, Walker (2015). Fitting linear mixed-effects models using lme4. Journal
    of Statistical Software 67(1).
  """
  checks.check_response(design, family)
  if estimator not in ESTIMATORS:
    near = str(estimator).lower()
    hint = f" Write {near!r}." if near in ESTIMATORS else ""
    raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}; got {estimator!r}.{hint}")
  if estimator == "reml" and family != "gaussian":
    raise ValueError(f"reml is for the gaussian family; got {family}. Use estimator='ml'.")
  return fit_unchecked(design, family, estimator, seed=seed)


def fit_unchecked(design: Design, family: Family, estimator: Estimator, *, seed: int = 0) -> Fit:
  """Fit a mixed model whose response may be constant. The bootstrap draws such responses.

  Args:
    design, family, estimator, seed: as for `fit`.

  Returns:
    The fit.

  Raises:
    ValueError: the grouping factors or the columns cannot be fitted, as for `fit`.
  """
  data = blocks(design)
  if estimator == "predictive":
    found = _predictive(data, family, seed)
  elif family == "gaussian":
    found = _gaussian(data, estimator == "reml")
  else:
    found = _laplace(data, family)
  return report(data, family, estimator, found)


def best(
  objective: search.Objective,
  starts: list[np.ndarray],
  hessians: Sequence[np.ndarray | None] | None = None,
  tol: float = 1e-9,
  most: int = 200,
) -> search.Minimum:
  """Search from several starts, and return the lowest minimum.

  Args:
    objective: x -> (value, gradient).
    starts: the values of x from which to start, at least one.
    hessians: an estimate of the Hessian at each start, or None for differences.
    tol, most: as for `search.minimise`.

  Returns:
    The lowest minimum. If two are equally low, the first of them.
  """
  guesses = hessians or [None] * len(starts)
  found = [
    search.minimise(objective, x, h, tol, most) for x, h in zip(starts, guesses, strict=True)
  ]
  return min(found, key=lambda one: round(one.value, 8))


def _tilted(data: Blocks, theta: np.ndarray, correlation: float) -> np.ndarray:
  """theta, which is diagonal, with this correlation between each effect and the first."""
  scales = data.lambdas(theta)
  for level, scale in zip(data.levels, scales, strict=True):
    for low, high in level.correlated:
      for j in range(low + 1, high):
        size = scale[j, j]
        scale[j, low], scale[j, j] = correlation * size, np.sqrt(1 - correlation**2) * size
  return data.pick(scales)


def _from_inside(
  objective: search.Objective, found: search.Minimum, data: Blocks, first: int
) -> search.Minimum:
  """The lower of a minimum with a correlation near 1 or -1 and one that is sought from inside.

  A covariance without full rank is often a local minimum, and most searches start without a
  correlation. This search starts again with that entry of Lambda's diagonal as large as its row, a
  correlation of 0.7.
  """
  scales, moved = data.lambdas(found.x[first:]), False
  for level, scale in zip(data.levels, scales, strict=True):
    for low, high in level.correlated:
      for j in range(low + 1, high):
        size = float(np.linalg.norm(scale[j, :j]))
        if abs(scale[j, j]) < _NEAR_ONE * size:
          scale[j, j], moved = size, True
  if not moved:
    return found
  other = search.minimise(objective, np.concatenate([found.x[:first], data.pick(scales)]))
  return other if other.value < found.value - _LOWER else found


def count(data: Blocks) -> int:
  """Return k, the number of entries of theta.

  Args:
    data: the blocks.

  Returns:
    k.
  """
  return sum(len(level.places[0]) for level in data.levels)


def _gaussian(data: Blocks, reml: bool) -> Maximum:
  criterion = Gaussian(data, reml)
  groups = sum(len(level.starts) for level in data.levels)
  grid = search.GRID if groups <= _MANY_GROUPS else search.GRID[::2]
  starts = search.starts(criterion.value, count(data), data.diagonal, grid)
  objective = criterion.value_and_gradient
  found = _from_inside(objective, best(objective, starts), data, 0)
  minimum, theta, free = estimates.settle(objective, found, data, 0)
  at = criterion.profile(theta)
  return Maximum(
    at.beta,
    theta,
    at.residual,
    estimates.of_gaussian(criterion, theta, minimum, free),
    estimates.conditional(criterion, theta),
    criterion.log_likelihood(theta, at.beta, at.residual),
    -at.value,
    minimum,
    at.residual <= criterion.quiet,
    criterion.unit,
  )


def _laplace(data: Blocks, family: Family) -> Maximum:
  criterion, p = Laplace(data, family), data.fixed.shape[1]
  k, rows = count(data), len(data.response)
  effects: dict[tuple[float, ...], np.ndarray] = {}
  curvatures: dict[tuple[float, ...], np.ndarray] = {}

  def value(theta: np.ndarray) -> float:
    near = next(reversed(effects.values()), None)
    found, beta, cross = criterion.penalised(theta, near)
    effects[tuple(theta)] = beta
    curvature = np.eye(p + k) * np.trace(cross) / max(p, 1) if p else np.eye(k)
    curvature[:p, :p] = cross
    curvatures[tuple(theta)] = curvature
    return found

  grid = laplace.GRID if rows <= _MANY_ROWS else laplace.GRID[::2]
  starts = search.starts(value, k, data.diagonal, grid)
  if not data.levels:
    value(starts[0])
  guesses: list[np.ndarray | None] = [curvatures[tuple(theta)] for theta in starts]
  if rows <= _FEW_ROWS and any(level.correlated for level in data.levels):
    for correlation in (_TILT, -_TILT):
      tilted = lambda theta, c=correlation: _tilted(data, theta, c)
      along = search.starts(lambda theta, f=tilted: value(f(theta)), k, data.diagonal, grid)
      starts += [tilted(theta) for theta in along[:_TILTED_STARTS]]
  guesses += [None] * (len(starts) - len(guesses))
  points = [np.concatenate([effects[tuple(theta)], theta]) for theta in starts]
  objective = criterion.value_and_gradient
  found = _from_inside(objective, best(objective, points, guesses), data, p)
  minimum, x, free = estimates.settle(objective, found, data, p)
  beta, theta = x[:p], x[p:]
  cross, mode = criterion.penalised(theta, beta)[2], criterion.mode(beta, theta)
  return Maximum(
    beta,
    theta,
    None,
    estimates.of_hessian(data, x, minimum, free),
    np.linalg.pinv(cross, hermitian=True),
    -minimum.value,
    -minimum.value,
    minimum._replace(converged=minimum.converged and mode.converged),
    family == "logistic" and _separates(data, mode.eta),
  )


def _separates(data: Blocks, eta: np.ndarray) -> bool:
  """Whether every row has successes alone or failures alone, and eta is far on their side."""
  far = np.where(eta > 0, data.response == data.trials, data.response == 0)
  return bool((far & (np.abs(eta) > _FAR_ETA)).all())


def _predictive(data: Blocks, family: Family, seed: int) -> Maximum:
  criterion, p = Predictive(data, family, seed), data.fixed.shape[1]
  if family == "gaussian":
    beta = np.zeros(p)
  else:
    beta = Laplace(data, family).penalised(np.zeros(count(data)))[1]
  value = lambda theta: criterion.value(np.concatenate([beta, theta]))
  grid = search.GRID if family == "gaussian" else laplace.GRID
  starts = search.starts(value, count(data), data.diagonal, grid)
  objective = criterion.value_and_gradient
  points = [np.concatenate([beta, theta]) for theta in starts[:_PREDICTIVE_STARTS]]
  found = best(objective, points, tol=1e-7, most=60)  # differences of differences cost much
  minimum, x, _ = estimates.settle(objective, found, data, p)
  beta, theta, residual = x[:p], x[p:], None
  if family == "gaussian":
    residual = criterion.residual(x)
    beta = criterion.start + beta * criterion.unit
    log_p = Gaussian(data, False).log_likelihood(theta, beta, residual)
  else:
    log_p = -Laplace(data, family).value_and_gradient(x)[0]
  nan = np.full((p, p), np.nan)
  return Maximum(beta, theta, residual, None, nan, log_p, -minimum.value, minimum)
