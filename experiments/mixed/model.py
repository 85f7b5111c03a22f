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
from experiments.mixed.formula import INTERCEPT, Formula

_SMALLEST = 1e-4  # sigma over that of the scaled response, at which the search ends
_START = 0.5  # likewise, where it begins


class Fit(NamedTuple):
  """A maximum. Standard deviations, errors and intervals are in the units of the data."""

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
  """Of the criterion a example, negated: (vector, data) -> (value, gradient), and its Hessian."""
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
  """Factors by which response and terms are divided, so that the search meets numbers near 1."""

  response: float
  centre: float  # taken from the response first; 0 without a fixed intercept
  terms: dict[str, float]

  def scaled(self, batches: sm.Batch) -> sm.Batch:
    inputs = {term: x / self.terms[term] for term, x in batches.inputs.items()}
    targets = (batches.targets - self.centre) / self.response
    return batches._replace(inputs=inputs, targets=targets)


def _units(batches: sm.Batch, formula: Formula, family: Family) -> _Units:
  rows = np.asarray(batches.mask) > 0
  size = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x)[rows]))))
  terms = {term: size(x) or 1.0 for term, x in batches.inputs.items()}
  y = np.asarray(batches.targets)[rows]
  if family != "gaussian":
    return _Units(1.0, 0.0, terms)
  return _Units(float(np.std(y)), float(np.mean(y)) if INTERCEPT in formula.fixed else 0.0, terms)


def fit(
  formula: Formula,
  family: Family,
  batches: sm.Batch,
  estimator: Estimator = "ml",
  key: jax.Array | None = None,
) -> Fit:
  """The maximum of a criterion; a term whose sigma runs to 0 is set to 0 and reported as such.

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
  while sunk := _sunk(formula, boundary, found.x):
    boundary = boundary + sunk
    found = _search(formula, family, estimator, boundary, data, scaled, count)
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
  bounds += [(None, None)] * len(residual)
  options = {"maxiter": 500, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
  found = scipy.optimize.minimize(
    objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
  )
  # A line search sees the criterion, whose rounding hides the last of the gradient where counts are
  # large; a Newton step sees the gradient.
  try:
    x = found.x - np.linalg.solve(hessian(found.x, data) / count, found.jac)
  except np.linalg.LinAlgError:
    return found
  value, grad = objective(x)
  inside = all(low is None or v >= low for v, (low, _) in zip(x, bounds, strict=True))
  if inside and np.abs(grad).max() < np.abs(found.jac).max():
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


def _sunk(formula: Formula, boundary: tuple[str, ...], v: np.ndarray) -> tuple[str, ...]:
  """Terms whose sigma ended at the lower bound, or so close that it makes no difference."""
  random = [term for term in formula.random if term not in boundary]
  values = v[len(formula.fixed) : len(formula.fixed) + len(random)]
  return tuple(t for t, x in zip(random, values, strict=True) if x < 2 * np.log(10 * _SMALLEST))


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
  se = np.sqrt(np.where(np.diag(covariance) > 0, np.diag(covariance), np.nan))
  random = [term for term in formula.random if term not in boundary]
  fixed, fixed_se, sd, interval = {}, {}, {}, {}
  ratio = lambda term: units.response / units.terms[term]
  for i, term in enumerate(formula.fixed):
    centre = units.centre if term == INTERCEPT else 0.0
    fixed[term], fixed_se[term] = float(v[i] * ratio(term) + centre), float(se[i] * ratio(term))
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
  undetermined = tuple(n for n, e, limit in zip(names, se, limits, strict=False) if wide(e, limit))
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
