"""Profile-likelihood intervals of standard deviations.

    profile(c) = max over all other parameters of log L with sd = c
    {c : max over c' of profile(c') - profile(c) <= q / 2}

q is the quantile at `level` of the chi-square distribution with one degree of freedom.

Wald's interval in `Fit.sd_interval` is symmetric on the log scale and never contains 0. With few
groups the likelihood is skewed. Then report the profile interval.

References:
  Bates, Maechler, Bolker, Walker (2015). Journal of Statistical Software 67(1), section 5.1.
"""

from collections.abc import Callable

import numpy as np
import scipy.special

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import estimates
from shrinkmeta.mixed.criteria import search
from shrinkmeta.mixed.criteria.blocks import Blocks, blocks
from shrinkmeta.mixed.criteria.gaussian import Gaussian
from shrinkmeta.mixed.criteria.laplace import Laplace
from shrinkmeta.mixed.groups import check_same
from shrinkmeta.mixed.result import Fit

RESIDUAL = "residual"
_GROWTH, _FAR = 1.5, 1e6


def profile_interval(
  fit: Fit, design: Design, name: str, level: float = 0.95
) -> tuple[float, float]:
  """Compute the profile-likelihood interval of one standard deviation.

  The interval uses the criterion of the fit: the likelihood or the restricted likelihood.

  Args:
    fit: a fit by "ml" or "reml".
    design: the design of this fit.
    name: the name of a random effect, as in `fit.sd`, or "residual".
    level: the confidence level, such as 0.95.

  Returns:
    (low, high). low is 0 if the interval contains 0. high is inf if the profile never falls far
    enough.

  Raises:
    ValueError: no standard deviation has this name, the estimator is "predictive", the fit is
      perfect, or `level` is not between 0 and 1.

  >>> from shrinkmeta.formulas.build import design as matrices
  >>> from shrinkmeta.mixed.fit import fit
  >>> grams = [1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605]
  >>> design = matrices("grams ~ (1 | batch)", {"grams": grams, "batch": list("AAABBBCCC")})
  >>> low, high = profile_interval(fit(design), design, "(Intercept)")
  >>> round(low, 1), round(high, 1)
  (0.0, 128.2)
  """
  check_same(fit, design)
  names = [*fit.sd] + ([RESIDUAL] if fit.residual is not None else [])
  if name not in names:
    raise ValueError(f"There is no standard deviation {name!r}; the fit has {', '.join(names)}.")
  if fit.estimator == "predictive":
    raise ValueError(
      "The predictive criterion is not a log likelihood, so it has no intervals; fit by 'ml'."
    )
  if fit.perfect:
    raise ValueError(
      "The fit is perfect: it repeats every response. So the likelihood has no maximum, or hardly "
      "one, and no profile can be computed. Leave effects out, or add rows to the groups."
    )
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1; got {level}.")
  data = blocks(design, centred=False, first=name)
  allowed = float(scipy.special.chdtri(1, 1 - level)) / 2
  if fit.family == "gaussian":
    at = _gaussian(fit, data, name)
  else:
    at = _laplace(fit, data, name)
  value = fit.residual if name == RESIDUAL else fit.sd[name]
  assert value is not None
  # From 0 the way up begins at a standard deviation of little effect on eta.
  unit = value or 0.05 * _place(data, name)[1] * (fit.residual or 1.0)

  def fall(c: float) -> float:
    return at(c) + fit.criterion - allowed

  low = 0.0
  if value > 0 and (name == RESIDUAL or fall(0.0) > 0):
    low = _crossing(fall, unit, 1 / _GROWTH)
  return low, _crossing(fall, unit, _GROWTH)


def _crossing(fall: Callable[[float], float], start: float, growth: float) -> float:
  """Where `fall` passes 0, on the way from `start` by factors of `growth`; inf or 0 if nowhere."""
  inside, outside = start, start * growth
  while fall(outside) < 0:
    inside, outside = outside, outside * growth
    if not start / _FAR < outside < start * _FAR:
      return float("inf") if growth > 1 else 0.0
  while abs(outside / inside - 1) > 1e-6:
    middle = float(np.sqrt(inside * outside))
    inside, outside = (inside, middle) if fall(middle) > 0 else (middle, outside)
  return float(np.sqrt(inside * outside))


def _gaussian(fit: Fit, data: Blocks, name: str) -> Callable[[float], float]:
  """c -> -profile(c), over theta and log s, with sd = s T_jj theta_j held at c."""
  criterion = Gaussian(data, fit.estimator == "reml")
  assert fit.residual is not None
  start = np.append(estimates.theta_of(data, fit.covariances, fit.residual), np.log(fit.residual))
  k = len(start) - 1
  free = np.ones(k + 1, bool)
  j, unit = k, 1.0
  if name != RESIDUAL:
    j, unit = _place(data, name)
  free[j] = False
  memory = [start]

  def at(c: float) -> float:
    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
      full = np.empty(k + 1)
      full[free] = z
      full[j] = np.log(c) if name == RESIDUAL else c / unit * np.exp(-full[k])
      try:
        found = criterion.profile(full[:k], full[k])
      except np.linalg.LinAlgError:
        return np.inf, np.zeros_like(z)
      gradient = np.append(found.gradient, criterion.freedom - found.squares)
      if name != RESIDUAL:
        gradient[k] -= gradient[j] * full[j]
      return found.value, gradient[free]

    found = search.minimise(objective, memory[-1][free])
    memory.append(memory[-1].copy())
    memory[-1][free] = found.x
    return found.value

  return at


def _laplace(fit: Fit, data: Blocks, name: str) -> Callable[[float], float]:
  """c -> -profile(c), over beta and theta, with sd = T_jj theta_j held at c."""
  criterion, p = Laplace(data, fit.family), data.fixed.shape[1]
  beta = np.linalg.solve(data.back, np.array([*fit.fixed.values()])) if p else np.zeros(0)
  start = np.append(beta, estimates.theta_of(data, fit.covariances, 1.0))
  place, unit = _place(data, name)
  j = p + place
  free = np.arange(len(start)) != j
  memory = [start]

  def at(c: float) -> float:
    x = memory[-1].copy()
    x[j] = c / unit
    found = search.minimise(search.held(criterion.value_and_gradient, x, free), x[free])
    x[free] = found.x
    memory.append(x)
    return found.value

  return at


def _place(data: Blocks, name: str) -> tuple[int, float]:
  """(where the diagonal entry of an effect stands in theta, T_jj)."""
  for level in data.levels:
    if name in level.keys:
      j = level.keys.index(name)
      return int(data.diagonal[data.keys.index(name)]), float(level.back[j, j])
  raise AssertionError(name)
