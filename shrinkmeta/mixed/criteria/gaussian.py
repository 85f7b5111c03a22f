"""The likelihood of a linear mixed model, with fixed effects and residual profiled out.

    y = offset + X beta + Z b + e,   b ~ N(0, s^2 Lambda Lambda'),   e_i ~ N(0, s^2 / w_i)

All rows are scaled by sqrt w, and the offset is subtracted from y. Let M = I + Z Lambda Lambda' Z',
let beta(theta) be the generalised least squares estimate, and let
r^2(theta) = (y - X beta)' M^-1 (y - X beta). For n rows and p fixed effects,

    -2 log L(theta)      = log det M + n (1 + log(2 pi r^2 / n))                       - sum log w
    -2 log L_REML(theta) = log det M + log det X'M^-1X + (n - p)(1 + log(2 pi r^2 / (n - p)))
                                                                                       - sum log w

L is evaluated at s^2 = r^2 / n, and L_REML at s^2 = r^2 / (n - p). Both depend on the data only
through sums over groups. So the work of one evaluation grows with the number of groups, and not
with the number of rows. Lambda is diagonal for an uncorrelated term (x || g). This is the prior of
the rest of the library, with one sigma for each module. For a correlated term (x | g) Lambda is
lower triangular.

References:
  Bates, Maechler, Bolker, Walker (2015). Journal of Statistical Software 67(1), equations 34 to 42.
"""

from typing import NamedTuple

import numpy as np

from shrinkmeta.mixed.criteria.blocks import Blocks, statistics
from shrinkmeta.mixed.criteria.elimination import Eliminated, cotangents, eliminate

_LEAST = 1e-13  # of r^2, relative to that of X alone: below it float64 has no digits left


class Profile(NamedTuple):
  """The criterion at one theta, in the coordinates of the blocks.

  Attributes:
    value: -log L or -log L_REML.
    gradient: [k], the derivative of `value` with respect to theta.
    beta: [P], the generalised least squares estimate.
    residual: s, in the units of the data.
    squares: r^2 / s^2.
    cross: [P, P], the matrix X'M^-1X.
    found: the result of eliminating the random effects at theta.
  """

  value: float
  gradient: np.ndarray
  beta: np.ndarray
  residual: float
  squares: float
  cross: np.ndarray
  found: Eliminated


class Gaussian:
  """The sums over the groups of a data set, and the likelihoods computed from them."""

  def __init__(self, blocks: Blocks, reml: bool):
    """Take the sums over groups.

    Args:
      blocks: the data.
      reml: maximise the restricted likelihood.
    """
    self.blocks, self.reml = blocks, reml
    root = np.sqrt(blocks.weights)
    x, y = blocks.fixed * root[:, None], (blocks.response - blocks.offset) * root
    # The response less its own regression: beside a large fixed effect, variances are specks.
    start = np.linalg.lstsq(x, y, rcond=None)[0] if x.shape[1] else np.zeros(0)
    left = y - x @ start
    size = float(np.sqrt(np.mean(np.square(left))))
    # Neither rounding of y nor of r^2 leaves a meaning to a smaller residual.
    rounding = 1e-12 * float(np.abs(y).max(initial=0.0))
    self.quiet = max(rounding, 1e-6 * size)
    self.unit, self.start = (1.0 if size <= rounding else size), start
    rest = np.column_stack([x, left / self.unit])
    self.rows, self.fixed = x.shape
    levels = blocks.levels
    if np.ptp(root) > 0 or root[0] != 1:
      levels = tuple(lv._replace(columns=lv.columns * root[:, None]) for lv in levels)
    self.levels = levels
    self.sums = statistics(levels, rest, None, np.zeros((self.rows, 0)))
    self.top = rest.T @ rest
    self.floor = _LEAST * float(self.top[-1, -1])
    self.log_weights = float(np.log(blocks.weights).sum())
    # log det of X in the units of the data over that of Xq; REML depends on it.
    self.log_units = -float(np.linalg.slogdet(blocks.back)[1]) if self.fixed else 0.0

  @property
  def freedom(self) -> int:
    """The degrees of freedom: n, or n - p for the restricted likelihood."""
    return self.rows - self.fixed if self.reml else self.rows

  def profile(
    self, theta: np.ndarray, log_residual: float | None = None, slope: bool = True
  ) -> Profile:
    """Evaluate the criterion and its gradient at theta.

    Args:
      theta: [k], the entries of Lambda.
      log_residual: a fixed value of log s, in the units of the data. None takes the best s.
      slope: whether to compute the gradient. If False, the gradient is empty.

    Returns:
      The value, the gradient with respect to theta, and the estimates of beta and s.
    """
    scales, p, n = self.blocks.lambdas(theta), self.fixed, self.freedom
    found = eliminate(self.levels, scales, self.sums, self.top)
    cross, side = found.top[:p, :p], found.top[:p, p]
    beta = np.linalg.solve(cross, side) if p else side
    rss = float(max(found.top[p, p] - side @ beta, 0.0)) + self.floor
    squared = rss / n if log_residual is None else np.exp(2 * log_residual) / self.unit**2
    value = found.log_det + n * np.log(2 * np.pi * squared * self.unit**2) + rss / squared
    value -= self.log_weights
    vector = np.append(-beta, 1.0)
    top = np.outer(vector, vector) / squared
    if self.reml and p:
      value += float(np.linalg.slogdet(cross)[1]) + 2 * self.log_units
      top[:p, :p] += np.linalg.inv(cross)
    gradient = np.zeros(0)
    if slope:
      gradient = self.blocks.pick(cotangents(self.levels, found, top))
    residual = float(np.sqrt(squared)) * self.unit
    effects = self.start + beta * self.unit
    return Profile(value / 2, gradient / 2, effects, residual, float(rss / squared), cross, found)

  def value_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
    """Return -log L or -log L_REML at theta, and its gradient [k]."""
    try:
      found = self.profile(theta)
    except np.linalg.LinAlgError:
      return np.inf, np.zeros_like(theta)
    return found.value, found.gradient

  def value(self, theta: np.ndarray) -> float:
    """Return -log L or -log L_REML at theta."""
    try:
      return self.profile(theta, slope=False).value
    except np.linalg.LinAlgError:
      return np.inf

  def log_likelihood(self, theta: np.ndarray, beta: np.ndarray, residual: float) -> float:
    """Return the log likelihood (not the restricted one) at given parameters.

    Args:
      theta: [k], the entries of Lambda.
      beta: [P], the fixed effects, in the coordinates of the blocks.
      residual: s in the units of the data.

    Returns:
      log p(y given beta, Lambda, s).
    """
    found = eliminate(self.levels, self.blocks.lambdas(theta), self.sums, self.top)
    vector = np.append(-(beta - self.start) / self.unit, 1.0)
    rss = float(vector @ found.top @ vector) * self.unit**2
    total = found.log_det + self.rows * np.log(2 * np.pi * residual**2) + rss / residual**2
    return float(-total + self.log_weights) / 2
