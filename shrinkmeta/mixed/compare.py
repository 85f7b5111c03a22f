"""Likelihood-ratio tests of nested mixed models, also if the smaller one has a variance of 0.

    T = 2 (log L of the larger model - log L of the smaller one)

A variance that is 0 under the smaller model lies on the boundary of its range. For such a variance
T is 0 in half of the data sets, and the distribution of T is a mixture of chi-squares:

    f more fixed effects, and v independent variances:
      sum_i Binomial(v, 1/2)(i) chi2_(f + i)
    f more fixed effects, and one more random effect with c covariances with the others:
      chi2_(f + c) / 2 + chi2_(f + c + 1) / 2

Both mixtures hold in the limit of many groups. The first assumes that the estimates of the v
variances are independent. With few groups T is 0 in more than half of the data sets, and p is too
large. In one test with ten groups of six rows, p was 0.26 and the exact value 0.18. `bootstrap`
does not use these mixtures: it refits both models to responses drawn from the smaller one.

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
from shrinkmeta.mixed import checks
from shrinkmeta.mixed.fit import fit, fit_unchecked
from shrinkmeta.mixed.groups import check_same
from shrinkmeta.mixed.result import Estimator, Fit

_EQUAL = 1e-6  # two values of T this close are equal: a search ends within 1e-9 nats of a maximum


class Compared(NamedTuple):
  """One of the two models of a likelihood-ratio test.

  Attributes:
    name: the formula, or "smaller model" or "larger model" if the models were given as matrices.
    parameters: the number of all parameters.
    criterion: the maximised log likelihood, or restricted log likelihood.
  """

  name: str
  parameters: int
  criterion: float


class Ratio(NamedTuple):
  """A likelihood-ratio test; `print(ratio)` shows it as a table.

  Attributes:
    statistic: the value of T.
    p_value: the probability under the smaller model that T is at least `statistic`. A bootstrap
      with n draws gives at least 1 / (n + 1).
    mixture: {degrees of freedom: weight} of the mixture of chi-squares. Empty for a bootstrap.
    draws: the number of draws of the bootstrap. It is 0 for a mixture of chi-squares.
    estimator: the estimator of both models.
    models: the smaller model and the larger one.
  """

  statistic: float
  p_value: float
  mixture: dict[int, float]
  draws: int
  estimator: Estimator
  models: tuple[Compared, Compared]

  def __str__(self) -> str:
    """The table."""
    return text(self)


def text(found: Ratio) -> str:
  """Format a likelihood-ratio test as text.

  Args:
    found: the test.

  Returns:
    A line for each model, the statistic, the p-value and the distribution behind it, without a
    newline at the end.
  """
  width = max(24, *(len(one.name) + 1 for one in found.models))
  kind = "restricted log-likelihood" if found.estimator == "reml" else "log-likelihood"
  lines = [f"{'likelihood-ratio test':<{width}} {'parameters':>10}   {kind}"]
  for one in found.models:
    lines.append(f"{one.name:<{width}} {one.parameters:>10}   {one.criterion:>{len(kind)}.4f}")
  lines += ["", f"2 log ratio = {found.statistic:.4f}, p = {found.p_value:.2g}"]
  if found.draws:
    least = f"1/{found.draws + 1} = {1 / (1 + found.draws):.2g}"
    lines.append(f"p from {found.draws} draws from the smaller model; it is at least {least}")
  elif len(found.mixture) == 1:
    lines.append(f"p from a chi-square with {next(iter(found.mixture))} df")
  else:
    parts = (f"{weight:.4g} of {df} df" for df, weight in found.mixture.items())
    lines.append(f"p from a mixture of chi-squares: {', '.join(parts)}")
  return "\n".join(lines)


def likelihood_ratio(small: Fit, large: Fit) -> Ratio:
  """Test a mixed model against a larger one that contains it, by a mixture of chi-squares.

  Args:
    small: the fit of the smaller model.
    large: the fit of the larger model, with the same rows, family and estimator.

  Returns:
    The statistic, the p-value, the mixture and the two models.

  Raises:
    ValueError: the fits differ in rows, family or estimator; they are REML fits with different
      fixed effects; `large` is not the larger model; `large` adds two or more variances
      together with covariances, for which no mixture is known; or a gaussian fit is perfect, and
      its likelihood has no maximum.

  >>> from shrinkmeta.formulas.design import RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> small = Design(y, "yield", one, ("(Intercept)",), (), np.zeros(9))
  >>> found = likelihood_ratio(fit(small), fit(small._replace(random=(term,))))
  >>> round(found.statistic, 3), found.mixture
  (1.376, {0: 0.5, 1: 0.5})
  """
  f, v, c = check_order(small, large)
  if v > 1 and c > 0:
    raise ValueError(
      f"The larger model has {v} more variances with {c} covariances, and no mixture of "
      "chi-squares is known for that. Add one effect at a time, or use bootstrap."
    )
  statistic = _statistic(small, large)
  mixture = {f + c + i: math.comb(v, i) / 2**v for i in range(v + 1)}
  p = sum(w * _tail(df, statistic) for df, w in mixture.items())
  return Ratio(statistic, p, mixture, 0, small.estimator, _models(small, large))


def check_order(small: Fit, large: Fit) -> tuple[int, int, int]:
  """Count the parameters that the larger model has and the smaller model does not.

  Args:
    small: the fit of the smaller model.
    large: the fit of the larger model.

  Returns:
    The additional fixed effects, variances and covariances.

  Raises:
    ValueError: one of the three numbers is negative, or all are 0.
  """
  f, v, c = (b - a for a, b in zip(small.parameters[:3], large.parameters[:3], strict=True))
  if min(f, v, c) < 0 or f + v + c == 0:
    raise ValueError(
      "Pass the smaller model first, and second a model that contains it. The second model has "
      f"{f} more fixed effects, {v} more variances and {c} more covariances than the first; none "
      "of these numbers may be negative, and one must be positive."
    )
  return f, v, c


def bootstrap(
  small: Design,
  large: Design,
  *,
  family: str = "gaussian",
  estimator: str = "ml",
  draws: int = 200,
  seed: int = 0,
) -> Ratio:
  """Test a mixed model against a larger one by a parametric bootstrap.

      p = (1 + number of draws whose T is at least the observed T) / (1 + draws)

  Drawn responses can be all failures, all successes or all counts 0. If the smaller model has an
  intercept, both likelihoods then go to 1 as the intercept goes to -inf or inf, and T is 0.

  Args:
    small: the design of the smaller model, from which the responses are drawn.
    large: the design of the larger model, with the same response.
    family: the family of both models.
    estimator: "ml", or "reml" if both models have the same fixed effects.
    draws: the number of drawn responses. p is at least 1 / (1 + draws), 0.005 for 200 draws.
    seed: the seed of the draws.

  Returns:
    The statistic, the p-value and the two models.

  Raises:
    ValueError: a design cannot be fitted, or the two fits cannot be compared. If this happens for
      a drawn response, the message gives the number of the draw.

  >>> from shrinkmeta.formulas.design import RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> small = Design(y, "yield", one, ("(Intercept)",), (), np.zeros(9))
  >>> bootstrap(small, small._replace(random=(term,)), draws=19).p_value <= 0.5
  True
  """
  if draws < 1:
    raise ValueError(f"draws must be at least 1; got {draws}.")
  if estimator == "reml":
    checks.check_restricted(small, large)
  null, other = (fit(made, family, estimator) for made in (small, large))  # pyright: ignore
  statistic = _statistic(null, other)
  above = 0
  for i in range(draws):
    try:
      above += _drawn(null, small, large, seed, i) >= statistic - _EQUAL
    except ValueError as error:
      raise ValueError(f"Draw {i + 1} of {draws} has no statistic. {error}") from error
  p = (1 + above) / (1 + draws)
  return Ratio(statistic, p, {}, draws, null.estimator, _models(null, other))


def _drawn(null: Fit, small: Design, large: Design, seed: int, number: int) -> float:
  """T of a response drawn from the smaller model."""
  response = simulate(null, small, seed=seed, number=number)
  one, other = (made._replace(response=response) for made in (small, large))
  extreme = checks.is_extreme(one, null.family)
  if extreme and not checks.outside(np.ones((len(response), 1)), small.fixed):
    return 0.0
  settings = null.family, null.estimator
  return _statistic(fit_unchecked(one, *settings), fit_unchecked(other, *settings))


def simulate(fit: Fit, design: Design, *, seed: int = 0, number: int = 0) -> np.ndarray:
  """Draw random effects and a response from a fitted model.

  Args:
    fit: the fitted model.
    design: the design of this fit.
    seed: the seed of the draws.
    number: the number of the draw. Each number gives another response for the same seed.

  Returns:
    The response [N].

  Raises:
    ValueError: the family is not gaussian and a weight is not 1. The weight multiplies the log
      density of its row, and the result is not the log density of any distribution.

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
    weights = 1.0 if design.weights is None else np.asarray(design.weights, float)
    return eta + fit.residual / np.sqrt(weights) * rng.normal(size=len(eta))
  if design.weights is not None and not np.all(np.asarray(design.weights) == 1):
    raise ValueError(
      f"A {fit.family} response with weights other than 1 cannot be drawn: a weighted log density "
      "is not the log density of a distribution. Repeat rows instead of weighting them."
    )
  if fit.family == "logistic":
    trials = np.ones(len(eta)) if design.trials is None else design.trials
    return rng.binomial(np.asarray(trials, int), scipy.special.expit(eta)).astype(float)
  return rng.poisson(np.exp(eta)).astype(float)


def _models(small: Fit, large: Fit) -> tuple[Compared, Compared]:
  one, other = (sum(fit.parameters) for fit in (small, large))
  return (
    Compared("smaller model", one, small.criterion),
    Compared("larger model", other, large.criterion),
  )


def check_comparable(small: Fit, large: Fit) -> None:
  """Raise ValueError unless the likelihoods of two fits can be compared."""
  settings = lambda one: (one.family, one.estimator, one.rows)
  if settings(small) != settings(large):
    raise ValueError(
      f"The fits have (family, estimator, rows) {settings(small)} and {settings(large)}; these "
      "must be the same."
    )
  if small.estimator == "predictive":
    raise ValueError("The predictive criterion is not a log likelihood; fit both models by 'ml'.")
  if small.estimator == "reml" and len(small.fixed) != len(large.fixed):
    raise checks.other_fixed(tuple(small.fixed), tuple(large.fixed))
  if small.residual is not None and (small.perfect or large.perfect):
    raise ValueError(
      f"The {'smaller' if small.perfect else 'larger'} model repeats the response to its last "
      "digits, so that its likelihood has no maximum, and a ratio of likelihoods says nothing."
    )


def _statistic(small: Fit, large: Fit) -> float:
  """Return T of two fits, after a check that they can be compared. T of equal fits is 0."""
  check_comparable(small, large)
  statistic = 2 * (large.criterion - small.criterion)
  if statistic < -1e-4:
    raise ValueError(
      f"The larger model has the lower likelihood, {large.criterion:.4f} to {small.criterion:.4f}, "
      "so it does not contain the smaller one. Compare nested models only."
    )
  return statistic if statistic > _EQUAL else 0.0


def _tail(df: int, statistic: float) -> float:
  """The probability that chi2_df is at least `statistic`; chi2_0 is 0."""
  if df == 0:
    return float(statistic <= 0)
  return float(scipy.special.chdtrc(df, statistic))
