"""Fit a formula to a table; summaries, effects, intervals and tests of the fitted model."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas import build
from shrinkmeta.formulas.design import Design, RandomTerm
from shrinkmeta.mixed import checks, groups
from shrinkmeta.mixed.answers import summary as figures
from shrinkmeta.mixed.compare import (
  Ratio,
  bootstrap,
  check_comparable,
  check_order,
  likelihood_ratio,
)
from shrinkmeta.mixed.criteria.families import Family
from shrinkmeta.mixed.fit import fit as fit_design
from shrinkmeta.mixed.groups import Effects
from shrinkmeta.mixed.intervals import profile_interval
from shrinkmeta.mixed.result import Estimator, Fit

# What others call the families.
_NAMES = {"binomial": "logistic", "bernoulli": "logistic", "normal": "gaussian"}


class Model(NamedTuple):
  """A fitted mixed model; `print(model)` shows its summary.

  Attributes:
    estimates: the fixed effects, the standard deviations and the likelihood: see `Fit`.
    design: the matrices, and the number of rows that were left out.
    template: what `predict` needs to build the columns of new rows.
    formula: the formula, as the user wrote it.
  """

  estimates: Fit
  design: Design
  template: build.Template
  formula: str

  def __str__(self) -> str:
    """The summary."""
    return str(summary(self))


def fit(
  formula: str,
  table: Any,
  *,
  family: Family = "gaussian",
  estimator: Estimator = "ml",
  weights: str | float | np.ndarray | None = None,
  trials: str | float | np.ndarray | None = None,
  offset: str | float | np.ndarray | None = None,
  seed: int = 0,
) -> Model:
  """Fit a mixed model to a table.

  Args:
    formula: the formula, such as "y ~ x + (x | g)". docs/mixed.md lists what it may contain.
    table: the path of a text file, {name: values}, a pandas DataFrame, or a Table from `read`.
    family: "gaussian", "logistic" (a response of 0 and 1, or counts with trials) or "poisson".
    estimator: "ml" maximises the likelihood, and "reml" the restricted likelihood (gaussian only).
      "predictive" maximises the log-likelihood of each half of every group given the other half.
    weights: the weights of the rows, all above 0. Give a column, an expression such as "1 / se^2",
      numbers [N], or one number for all rows.
    trials: the numbers of trials, in the same forms as `weights`. Give them if the response counts
      the successes of a logistic model.
    offset: a known term of the linear predictor, in the same forms as `weights`. It is added to
      every offset(...) in the formula.
    seed: the seed that splits every group into halves, for "predictive".

  Returns:
    A Model. The fit leaves out rows with a missing value in a column that the model uses.
    `model.design.dropped` counts them.

  Raises:
    ImportError: formulaic is not installed.
    ValueError: the formula or the table cannot be used. The message says what to write.

  >>> from shrinkmeta import mixed
  >>> grams = [1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605]
  >>> data = {"yield": grams, "batch": list("AAABBBCCC")}
  >>> model = mixed.fit("yield ~ 1 + (1 | batch)", data, estimator="reml")
  >>> round(model.estimates.fixed["(Intercept)"], 2), round(model.estimates.sd["(Intercept)"], 2)
  (1528.89, 47.98)
  """
  if family not in checks.FAMILIES:
    meant = _NAMES.get(str(family).lower())
    hint = f" Write {meant!r}." if meant else ""
    if re.match("nb|neg|quasipoisson", str(family).lower()):  # such as nbinom2, NegativeBinomial
      hint = (
        " For counts with overdispersion write 'poisson', and give every row an effect of its own: "
        "(1 | group/row), where the column row has another label in each row. See docs/mixed.md, "
        "section Limits."
      )
    wanted = ", ".join(checks.FAMILIES)
    raise ValueError(f"family must be one of {wanted}; got {family!r}.{hint}")
  design, template = build.prepare(
    formula, table, family=family, weights=weights, trials=trials, offset=offset
  )
  return Model(fit_design(design, family, estimator, seed=seed), design, template, formula)


def summary(
  model: Model, profile: Mapping[str, tuple[float, float]] | None = None
) -> figures.Summary:
  """Summarise a fitted model; `print(summary(model))` shows the summary as tables.

  Args:
    model: a fitted model.
    profile: the result of `profile`, or None. The summary shows its intervals next to Wald's.

  Returns:
    A Summary.

  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
  >>> found = summary(fit("y ~ (1 | g)", data))
  >>> round(found.aic, 2), round(found.icc["g"], 3), found.groups
  (27.43, 0.95, {'g': (3, 2, 2)})
  >>> str(found).splitlines()[0]
  'y by g, gaussian, ml: 6 rows, 3 groups of 2 to 2'
  """
  return figures.of(model.estimates, model.design, profile)


def effects(model: Model) -> Mapping[str, Effects]:
  """Return the estimated random effects of all groups, with posterior standard deviations.

  Args:
    model: a fitted model.

  Returns:
    {name of the random effect, as in `Fit.sd`: Effects}.

  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
  >>> effects(fit("y ~ (1 | g)", data))["(Intercept)"].value.round(2)
  array([1.56, 3.03, 7.41])
  """
  return groups.effects(model.estimates, model.design)


def unshrunk(model: Model) -> Mapping[str, np.ndarray]:
  """Return the least-squares estimates from the rows of each group alone, without shrinkage.

  Args:
    model: a fitted model.

  Returns:
    {name of the random effect, as in `Fit.sd`: estimates [L]}. An estimate is nan if the rows of
    the group do not determine it. All are nan if the family is not gaussian.

  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
  >>> unshrunk(fit("y ~ (1 | g)", data))["(Intercept)"]
  array([1.5, 3. , 7.5])
  """
  return groups.unshrunk(model.estimates, model.design)


def profile(model: Model, level: float = 0.95) -> dict[str, tuple[float, float]]:
  """Compute profile-likelihood intervals of all standard deviations.

  With few groups these intervals are better than Wald's intervals in the summary.

  Args:
    model: a model fitted by "ml" or "reml".
    level: the confidence level, such as 0.95.

  Returns:
    {name as in `Fit.sd`, or "residual": (low, high)}.

  Raises:
    ValueError: the estimator is "predictive", or the fit is perfect.

  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
  >>> low, high = profile(fit("y ~ (1 | g)", data))["(Intercept)"]
  >>> round(low, 1), round(high, 1)
  (1.3, 7.5)
  """
  names = [*model.estimates.sd] + ["residual"] * (model.estimates.residual is not None)
  return {n: profile_interval(model.estimates, model.design, n, level) for n in names}


def compare(small: Model, large: Model, *, draws: int = 0, seed: int = 0) -> Ratio:
  """Test a model against a larger model that contains it, by a likelihood-ratio test.

  Args:
    small: the smaller model.
    large: the larger model, fitted to the same rows.
    draws: 0 computes the p-value from a mixture of chi-squares. A positive number computes it by
      a parametric bootstrap with this many responses, drawn from the smaller model. This p-value
      is at least 1 / (1 + draws). A drawn response that is all failures, all successes or all
      counts 0 has the statistic 0, if the smaller model has an intercept.
    seed: the seed of the bootstrap.

  Returns:
    A Ratio: the statistic, the p-value and the two models. `print` shows it as a table.

  Raises:
    ValueError: the models differ in their rows, weights, families or estimators; the larger
      model does not contain the smaller one; or the fixed columns of two REML fits differ, if
      only in their units.

  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "x": [0, 1, 0, 1, 0, 1], "g": list("aabbcc")}
  >>> found = compare(fit("y ~ (1 | g)", data), fit("y ~ x + (1 | g)", data))
  >>> round(found.statistic, 2), round(found.p_value, 2)
  (3.3, 0.07)
  >>> print(found)
  likelihood-ratio test    parameters   log-likelihood
  y ~ (1 | g)                       3         -10.7131
  y ~ x + (1 | g)                   4          -9.0652
  <BLANKLINE>
  2 log ratio = 3.2958, p = 0.069
  p from a chi-square with 1 df
  """
  one, other = small.estimates, large.estimates
  if one.rows != other.rows:
    raise ValueError(
      f"The models are fitted to {one.rows} and {other.rows} rows. If a column of one model has "
      "missing values, leave these rows out of both models."
    )
  for name, what in (("response", "responses"), ("weights",) * 2, ("trials",) * 2):
    if not _same(getattr(small.design, name), getattr(large.design, name)):
      raise ValueError(
        f"The two models have different {what}, or their rows are in another order, so their "
        "likelihoods are not those of one data set."
      )
  # The messages on families and sizes say more than that on columns, so they come first.
  check_comparable(one, other)
  check_order(one, other)
  if one.estimator == "reml":
    checks.check_restricted(small.design, large.design)
  _check_contained(small.design, large.design)
  if draws:
    settings = {"family": one.family, "estimator": one.estimator}
    found = bootstrap(small.design, large.design, draws=draws, seed=seed, **settings)
  else:
    found = likelihood_ratio(one, other)
  first, second = found.models
  named = (first._replace(name=small.formula), second._replace(name=large.formula))
  return found._replace(models=named)


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
  if one is None or other is None:
    return one is other
  return np.array_equal(one, other)


def _check_contained(small: Design, large: Design) -> None:
  """Raise unless the columns of the larger model span those of the smaller one."""
  columns = np.column_stack([small.fixed, small.offset - large.offset])
  names = (*(f"fixed effect {name!r}" for name in small.fixed_names), "offset")
  lost = [names[j] for j in checks.outside(columns, large.fixed)]
  for term in small.random:
    same = [other for other in large.random if _same_groups(term.index, other.index)]
    lost += [f"{what} by {term.group}" for what in _lost_effects(term, same)]
  if lost:
    raise ValueError(
      f"The larger model does not contain the {lost[0]} of the smaller one, so the chi-squares of "
      "nested models do not hold. Compare such models by the AIC or BIC of their summaries."
    )


def _lost_effects(term: RandomTerm, same: list[RandomTerm]) -> list[str]:
  """Describe the effects of a term of the smaller model that the larger one does not contain.

  Effects with one full covariance must lie in one such covariance of the larger model. An effect
  without correlations may also be a multiple of one effect of an uncorrelated term.

  Args:
    term: the term.
    same: the terms of the larger model with the same groups.
  """
  every = np.column_stack([np.zeros((len(term.index), 0)), *(other.columns for other in same)])
  if gone := checks.outside(term.columns, every):
    return [f"random effect {term.names[j]!r}" for j in gone]
  parts = [part for other in same for part in _covariances(other)]
  names_of = [term.names] if term.correlated else [(name,) for name in term.names]
  return [
    f"random effect{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
    f"{' with their correlation' * (len(names) > 1)}"
    for columns, names in zip(_covariances(term), names_of, strict=True)
    if all(checks.outside(columns, part) for part in parts)
  ]


def _covariances(term: RandomTerm) -> list[np.ndarray]:
  """The columns [N, q] of each full covariance of a term: all together, or one after another."""
  return [term.columns] if term.correlated else [c[:, None] for c in term.columns.T]


def _same_groups(one: np.ndarray, other: np.ndarray) -> bool:
  one, other = np.asarray(one, int), np.asarray(other, int)  # int8 cannot count the pairs
  pairs = len(np.unique(one * (int(other.max()) + 1) + other))
  return pairs == len(np.unique(one)) == len(np.unique(other))
