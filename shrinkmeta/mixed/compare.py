"""Likelihood-ratio tests of nested mixed models, at the boundary too.

    T = 2 (log L of the larger model - log L of the smaller one)

A variance that is 0 under the smaller model lies on the boundary of its range, so that T is 0 in
half of the data sets and a mixture of chi-squares over all:

    f more fixed effects and v independent variances     sum_i Binomial(v, 1/2)(i) chi2_(f + i)
    one more effect with c covariances with the others   chi2_(f + c) / 2 + chi2_(f + c + 1) / 2

Both rows are limits for many groups. The first takes the estimates of the v variances as
independent. With few groups T is 0 in more than half of the data sets, and p is too large: 0.26
where the exact value is 0.18, in one test with ten groups of six rows. `bootstrap` needs no such
theory: it refits both models to responses drawn from the smaller one.

References:
  Crainiceanu, Ruppert (2004). Journal of the Royal Statistical Society B 66, 165-185.
  Self, Liang (1987). Journal of the American Statistical Association 82, 605-610.
  Stram, Lee (1994). Variance components testing in the longitudinal mixed effects model. Biometrics
  50, 1171-1177.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.special

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed.fit import fit
from shrinkmeta.mixed.groups import check_same
from shrinkmeta.mixed.result import Fit


class Ratio(NamedTuple):
  """A likelihood-ratio test.

  Attributes:
    statistic: T.
    p_value: the probability of a larger T under the smaller model.
    mixture: {degrees of freedom: weight} of the chi-squares; empty for a bootstrap.
  """

  statistic: float
  p_value: float
  mixture: dict[int, float]


def likelihood_ratio(small: Fit, large: Fit) -> Ratio:
  """Test a mixed model against a larger one that contains it.

  Args:
    small: the fit of the smaller model.
    large: the fit of the larger model, to the same rows, by the same family and estimator.

  Returns:
    The test.

  Raises:
    ValueError: fits that cannot be compared: other rows, families or estimators; restricted
      likelihoods of other fixed effects; a larger model that is not larger; two or more new
      variances with covariances, for which no mixture is known; a perfect fit of a gaussian
      response, whose likelihood has no maximum.

  >>> from shrinkmeta.formulas.design import RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> small = Design(y, "yield", one, ("(Intercept)",), (), np.zeros(9))
  >>> found = likelihood_ratio(fit(small), fit(small._replace(random=(term,))))
  >>> round(found.statistic, 3), found.mixture
  (1.376, {0: 0.5, 1: 0.5})
  """
  f, v, c = (b - a for a, b in zip(small.parameters[:3], large.parameters[:3], strict=True))
  if min(f, v, c) < 0 or f + v + c == 0:
    raise ValueError(
      f"The larger model has {f} more fixed effects, {v} more variances and {c} more covariances; "
      "none may be negative, and one must be positive. Pass the smaller model first."
    )
  if v > 1 and c > 0:
    raise ValueError(
      f"The larger model has {v} more variances with {c} covariances, and no mixture of "
      "chi-squares is known for that. Add one effect at a time, or use bootstrap."
    )
  statistic = _statistic(small, large)
  mixture = {f + c + i: math.comb(v, i) / 2**v for i in range(v + 1)}
  return Ratio(statistic, sum(w * _tail(df, statistic) for df, w in mixture.items()), mixture)


def bootstrap(
  small: Design,
  large: Design,
  *,
  family: str = "gaussian",
  estimator: str = "ml",
  draws: int = 200,
  seed: int = 0,
) -> Ratio:
  """Test a mixed model against a larger one by responses drawn from the fitted smaller one.

  Args:
    small: the design of the smaller model.
    large: the design of the larger model, with the same response.
    family: of both.
    estimator: "ml", or "reml" if the fixed effects are the same.
    draws: number of responses; 200 resolve a p-value to 0.005.
    seed: of the draws.

  Returns:
    The test; p = (1 + number of draws with a T at least as large) / (1 + draws).

  Raises:
    ValueError: designs that cannot be fitted or compared.

  >>> from shrinkmeta.formulas.design import RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> small = Design(y, "yield", one, ("(Intercept)",), (), np.zeros(9))
  >>> bootstrap(small, small._replace(random=(term,)), draws=19).p_value <= 0.5
  True
  """
  if draws < 1:
    raise ValueError(f"draws is {draws}; at least one is needed.")
  both = lambda a, b: (fit(a, family, estimator), fit(b, family, estimator))  # pyright: ignore
  null, other = both(small, large)
  statistic = _statistic(null, other)
  above = 0
  for i in range(draws):
    response = simulate(null, small, seed=seed, number=i)
    one, two = both(small._replace(response=response), large._replace(response=response))
    above += _statistic(one, two) >= statistic
  return Ratio(statistic, (1 + above) / (1 + draws), {})


def simulate(fit: Fit, design: Design, *, seed: int = 0, number: int = 0) -> np.ndarray:
  """Draw a response from a fitted model, with new effects of all groups.

  Args:
    fit: a fit.
    design: its design.
    seed: of the draws.
    number: which draw of the seed.

  Returns:
    [N] the response.

  Raises:
    ValueError: weights of a family other than gaussian: a row of weight 2 has no distribution.

  >>> from shrinkmeta.mixed.fit import fit
  >>> y, one = np.array([1.0, 2.0, 4.0]), np.ones((3, 1))
  >>> design = Design(y, "y", one, ("(Intercept)",), (), np.zeros(3))
  >>> simulate(fit(design), design).shape
  (3,)
  """
  check_same(fit, design)
  rng = np.random.default_rng((seed, number))
  eta = np.asarray(design.offset, float) + design.fixed @ np.array([*fit.fixed.values()])
  for term, sigma in zip(design.random, fit.covariances, strict=True):
    values, vectors = np.linalg.eigh(sigma)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    b = rng.normal(size=(len(term.levels), len(sigma))) @ root.T
    eta = eta + np.sum(term.columns * b[term.index], 1)
  if fit.residual is not None:
    weights = 1.0 if design.weights is None else np.asarray(design.weights)
    return eta + fit.residual / np.sqrt(weights) * rng.normal(size=len(eta))
  if design.weights is not None and not np.all(np.asarray(design.weights) == 1):
    raise ValueError(
      f"The weights multiply log densities of a {fit.family} response, which has no distribution "
      "to draw from. Repeat rows in place of weights."
    )
  if fit.family == "logistic":
    trials = np.ones(len(eta)) if design.trials is None else design.trials
    return rng.binomial(np.asarray(trials, int), scipy.special.expit(eta)).astype(float)
  return rng.poisson(np.exp(eta)).astype(float)


def _statistic(small: Fit, large: Fit) -> float:
  """T of two fits that can be compared."""
  settings = lambda one: (one.family, one.estimator, one.rows)
  if settings(small) != settings(large):
    raise ValueError(
      f"The fits are of (family, estimator, rows) {settings(small)} and {settings(large)}; these "
      "must be the same."
    )
  if small.estimator == "predictive":
    raise ValueError("The predictive criterion is no log likelihood; fit both models with 'ml'.")
  if small.estimator == "reml" and set(small.fixed) != set(large.fixed):
    raise ValueError(
      f"The fixed effects are {', '.join(small.fixed)} and {', '.join(large.fixed)}, and "
      "restricted likelihoods of other fixed effects are of other data; fit both models with 'ml'."
    )
  if small.residual is not None and (small.perfect or large.perfect):
    raise ValueError(
      f"The {'smaller' if small.perfect else 'larger'} model repeats the response to its last "
      "digits, so that its likelihood has no maximum, and a ratio of likelihoods says nothing."
    )
  statistic = 2 * (large.criterion - small.criterion)
  if statistic < -1e-4:
    raise ValueError(
      f"The larger model has the lower likelihood, {large.criterion:.4f} to {small.criterion:.4f}, "
      "so it does not contain the smaller one. Compare models of which one is a case of the other."
    )
  return max(statistic, 0.0)


def _tail(df: int, statistic: float) -> float:
  """The probability that chi2_df is at least `statistic`; chi2_0 is 0."""
  if df == 0:
    return float(statistic <= 0)
  return float(scipy.special.chdtrc(df, statistic))
