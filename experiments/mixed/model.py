"""The maximum of a criterion: estimates, their errors and intervals, in the units of the data."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import shrinkmeta as sm
from experiments.mixed.criteria import (
  Estimator,
  Family,
  build,
  halves,
  log_likelihood,
  predictive,
  restricted,
  to_parameters,
  unpack,
)
from experiments.mixed.formula import Formula

_SMALLEST = 1e-7  # sigma over that of the scaled response, at which the search ends
_QUIETEST = 1e-6  # likewise, of the residual: float64 has no digits left for a smaller one
_SMALL = 1e-3  # of sigma, likewise, below which 0 is tried
_START = 0.5  # likewise, where it begins
_NO_WORSE = 1e-4  # what 0 may lose of the criterion, all examples together: the search's own error


class Fit(NamedTuple):
  """A maximum. Standard deviations, errors and intervals are in the units of the data.

  Errors and intervals are nan if the criterion is l_PLL. It is no log likelihood of phi and sigma,
  so its curvature does not say how far the estimates are off.
  """

  fixed: dict[str, float]
  fixed_se: dict[str, float]
  sd: dict[str, float]  # 0: a boundary estimate
  sd_interval: dict[str, tuple[float, float]]  # 95 %, Wald on the log scale; nan on the boundary
  residual: float | None
  residual_interval: tuple[float, float] | None
  criterion: float  # what was maximised: log likelihood, restricted one, or l_PLL
  log_likelihood: float  # (Laplace's where the family is not gaussian), at these estimates
  singular: tuple[str, ...]  # terms whose sd is 0
  undetermined: tuple[str, ...]  # what the data leave open, or nearly so
  converged: bool
  gradient: float  # largest entry at the maximum, of the criterion per example, scaled data


@functools.cache
def _compiled(
  formula: Formula, family: Family, estimator: Estimator, boundary: tuple[str, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Return the negated criterion, (vector, data) -> (value, gradient), and its Hessian."""
  model = build(formula, family)

  def criterion(v: jax.Array, data: Any) -> jax.Array:
    parameters = unpack(model, v, boundary)
    if estimator == "predictive":
      return -predictive(model, parameters, data, boundary)
    kind = log_likelihood if estimator == "ml" else restricted
    return -kind(model, parameters, data, boundary)

  value_and_grad = jax.jit(jax.value_and_grad(criterion))

  def hessian(v: np.ndarray, data: Any) -> np.ndarray:
    """By central differences of the gradient."""
    rows = []
    for i in range(v.size):
      h = 1e-4 * np.eye(v.size)[i]
      rows.append((value_and_grad(v + h, data)[1] - value_and_grad(v - h, data)[1]) / 2e-4)
    full = np.asarray(jnp.stack(rows))
    return (full + full.T) / 2

  return value_and_grad, hessian


@functools.cache
def _likelihood(formula: Formula, family: Family, boundary: tuple[str, ...]) -> Callable[..., Any]:
  """`log_likelihood` of (parameters, batches), compiled."""
  model = build(formula, family)
  return jax.jit(lambda parameters, batches: log_likelihood(model, parameters, batches, boundary))


class _Units(NamedTuple):
  """Effects subtracted from the response, then factors, so that the search has numbers near 1."""

  response: float
  fixed: dict[str, float]  # effects of the scaled terms, taken from the response first
  terms: dict[str, float]

  def scaled(self, batches: sm.Batch) -> sm.Batch:
    inputs = {term: x / self.terms[term] for term, x in batches.inputs.items()}
    targets = batches.targets - sum(b * inputs[term] for term, b in self.fixed.items())
    return batches._replace(inputs=inputs, targets=targets / self.response)


def _units(batches: sm.Batch, formula: Formula, family: Family) -> _Units:
  rows = np.asarray(batches.mask) > 0
  size = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x)[rows]))))
  terms = {term: size(x) or 1.0 for term, x in batches.inputs.items()}
  plain = _Units(1.0, dict.fromkeys(formula.fixed, 0.0), terms)
  if family != "gaussian":
    return plain
  # By what least squares leaves: beside a large fixed effect, sigma and noise are specks.
  effects = _least_squares(formula, plain.scaled(batches), family)
  units = plain._replace(fixed=dict(zip(formula.fixed, map(float, effects), strict=True)))
  sd = lambda y: float(np.std(np.asarray(y)[rows]))
  left = sd(units.scaled(batches).targets)
  return units._replace(response=max(left, 1e-10 * sd(batches.targets)))  # not 0 of an exact fit


def fit(
  formula: Formula,
  family: Family,
  batches: sm.Batch,
  estimator: Estimator = "ml",
  key: jax.Array | None = None,
) -> Fit:
  """The maximum of a criterion; a term whose sigma is best at 0 is set to 0 and reported as such.

  Args:
    batches: float64, as `table.grouped` makes them.
    key: of the halves, for "predictive".

  Raises:
    ValueError: reml of a family other than gaussian; predictive without a key.
  """
  if estimator == "reml" and family != "gaussian":
    raise ValueError("reml is for the gaussian family; use --estimator=ml.")
  if estimator == "predictive" and key is None:
    raise ValueError("The predictive estimator cuts groups in halves: pass a key.")
  units = _units(batches, formula, family)
  scaled, boundary = units.scaled(batches), ()
  data = scaled if key is None or estimator != "predictive" else halves(scaled, key)
  count = float(np.sum(np.asarray(scaled.mask)))
  found = _search(formula, family, estimator, boundary, data, scaled, count)
  kept = ()
  while term := _smallest(formula, boundary, kept, found.x):
    zero = _search(formula, family, estimator, (*boundary, term), data, scaled, count)
    # Small is not 0: beside a slope that varies widely an intercept may be as small and certain.
    if (zero.fun - found.fun) * count > _NO_WORSE:
      kept = (*kept, term)
    else:
      boundary, found = (*boundary, term), zero
  return _report(formula, family, estimator, boundary, found, data, batches, units, count)


def _search(
  formula: Formula,
  family: Family,
  estimator: Estimator,
  boundary: tuple[str, ...],
  data: Any,
  scaled: sm.Batch,
  count: float,
) -> Any:
  value_and_grad, hessian = _compiled(formula, family, estimator, boundary)

  def objective(v: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = value_and_grad(v, data)
    return float(value) / count, np.asarray(grad) / count

  random = [term for term in formula.random if term not in boundary]
  residual = [np.log(0.7)] if family == "gaussian" else []
  start = np.concatenate(
    [_least_squares(formula, scaled, family), np.full(len(random), 2 * np.log(_START)), residual]
  )
  lowest = [2 * np.log(_SMALLEST)] * len(random)
  bounds = [(None, None)] * len(formula.fixed) + [(x, None) for x in lowest]
  bounds += [(np.log(_QUIETEST), None)] * len(residual)
  options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
  found = scipy.optimize.minimize(
    objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
  )
  # A line search sees the criterion, whose rounding hides the last of the gradient where counts are
  # large; a Newton step sees the gradient.
  for _ in range(3):
    try:
      x = found.x - np.linalg.solve(hessian(found.x, data) / count, found.jac)
    except np.linalg.LinAlgError:
      break
    value, grad = objective(x)
    inside = all(low is None or v >= low for v, (low, _) in zip(x, bounds, strict=True))
    if not (inside and np.abs(grad).max() < np.abs(found.jac).max()):
      break
    found.x, found.fun, found.jac = x, value, grad
  return found


def _least_squares(formula: Formula, batches: sm.Batch, family: Family) -> np.ndarray:
  """Fixed effects of a fit without groups, roughly, on the scale of f: where the search begins."""
  if not formula.fixed:
    return np.zeros(0)
  rows = np.asarray(batches.mask) > 0
  x = np.stack([np.asarray(batches.inputs[term])[rows] for term in formula.fixed], 1)
  y = np.asarray(batches.targets)[rows]
  f = np.log(y + 0.5) if family == "poisson" else 2.0 * y - 1.0 if family == "logistic" else y
  return np.linalg.lstsq(x, f, rcond=None)[0]


def _smallest(
  formula: Formula, boundary: tuple[str, ...], kept: tuple[str, ...], v: np.ndarray
) -> str | None:
  """The term of the smallest sigma, if that is small and neither on the boundary nor kept."""
  random = [term for term in formula.random if term not in boundary]
  values = zip(v[len(formula.fixed) :], random, strict=False)
  small = [(x, term) for x, term in values if x < 2 * np.log(_SMALL) and term not in kept]
  return min(small)[1] if small else None


def _report(
  formula: Formula,
  family: Family,
  estimator: Estimator,
  boundary: tuple[str, ...],
  found: Any,
  data: Any,
  batches: sm.Batch,
  units: _Units,
  count: float,
) -> Fit:
  """The fit in the units of the data."""
  value_and_grad, hessian = _compiled(formula, family, estimator, boundary)
  v = found.x
  _, grad = value_and_grad(v, data)
  try:
    covariance = np.linalg.inv(hessian(v, data))
  except np.linalg.LinAlgError:
    covariance = np.full((v.size, v.size), np.nan)
  width = np.sqrt(np.where(np.diag(covariance) > 0, np.diag(covariance), np.nan))
  se = np.full_like(width, np.nan) if estimator == "predictive" else width
  random = [term for term in formula.random if term not in boundary]
  fixed, fixed_se, sd, interval = {}, {}, {}, {}
  ratio = lambda term: units.response / units.terms[term]
  for i, term in enumerate(formula.fixed):
    value = v[i] * ratio(term) + units.fixed[term] / units.terms[term]
    fixed[term], fixed_se[term] = float(value), float(se[i] * ratio(term))
  for term in formula.random:
    if term in boundary:
      sd[term], interval[term] = 0.0, (float("nan"), float("nan"))
      continue
    i = len(formula.fixed) + random.index(term)
    sd[term], interval[term] = _log_interval(0.5 * v[i], 0.5 * se[i], ratio(term))
  # Of a log sd 3 is a factor of 400 up and down; of a scaled effect 1,000 is beyond any data.
  names = [*formula.fixed, *(f"sd of {term}" for term in random)]
  names += ["residual"] if family == "gaussian" else []
  limits = [1e3] * len(formula.fixed) + [6.0] * len(random) + [3.0]
  wide = lambda value, limit: not value < limit
  undetermined = tuple(
    n for n, e, limit in zip(names, width, limits, strict=False) if wide(e, limit)
  )
  residual = residual_interval = None
  if family == "gaussian":
    residual, residual_interval = _log_interval(v[-1], se[-1], units.response)
  original = to_parameters(formula, fixed, sd, residual)
  log_p = float(_likelihood(formula, family, boundary)(original, batches))
  criterion = -float(found.fun) * count
  if family == "gaussian":  # from the scaled response's density to the response's
    criterion -= count * np.log(units.response)
  if estimator == "reml" and formula.fixed:
    criterion += sum(np.log(ratio(term)) for term in formula.fixed)
  largest = float(np.max(np.abs(np.asarray(grad)))) / count
  return Fit(
    fixed,
    fixed_se,
    sd,
    interval,
    residual,
    residual_interval,
    criterion,
    log_p,
    boundary,
    undetermined,
    bool(largest < 1e-6),
    largest,
  )


def _log_interval(log: float, se: float, unit: float) -> tuple[float, tuple[float, float]]:
  low, high = log - 1.96 * se, log + 1.96 * se
  return float(np.exp(log) * unit), (float(np.exp(low) * unit), float(np.exp(high) * unit))
