"""Predict rows of fitted groups and of new groups, with standard errors.

    eta = offset + x'beta + z'b,   mean = eta, 1 / (1 + exp(-eta)) or exp(eta)

    Var(eta^ - eta) = z'G z + a'Cov(beta^) a,   a = x - X'W Z G z,
    G = Cov(b given y, beta) = Lambda (I + Lambda'Z'W Z Lambda)^-1 Lambda',   Sigma = Lambda Lambda'

x and z belong to the row to predict; X, Z and W belong to the fitted rows of its group. W is
diagonal. Its entries are minus the second derivatives of log p(y given eta) in eta. A new group has
no fitted rows: its b is 0, G is Sigma, and X'W Z is 0. The formula is the error variance of best
linear unbiased prediction.
Cov(beta^) includes the error from estimating the variances. G, Sigma and the residual variance are
computed at the estimates, and do not include this error.

References:
  Henderson (1975). Best linear unbiased estimation and prediction under a selection model.
  Biometrics 31(2).
"""

from typing import Any, NamedTuple

import numpy as np

from shrinkmeta.formulas.build import NewRows, new_rows
from shrinkmeta.mixed.answers.model import Model, effects


class Predictions(NamedTuple):
  """Predictions for N rows.

  Attributes:
    mean: [N], the mean of the response. For a logistic model it is the probability of success in
      one trial, and for a Poisson model the expected count.
    low, high: [N], the ends of the interval of this mean.
    eta: [N], the linear predictor.
    se: [N], the standard error of eta. It is nan if the estimator is
      "predictive", or if the fit is perfect.
    new_low, new_high: [N], the ends of the interval of a new observation,
      Var = se^2 + s^2 / w, where w is the weight of the row, or 1. They are nan if the family is
      not gaussian, or if w is not known: see the argument `weights` of `predict`.
    known: [N] bool, whether all groups of the row have rows in the fitted data.
  """

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  eta: np.ndarray
  se: np.ndarray
  new_low: np.ndarray
  new_high: np.ndarray
  known: np.ndarray


def predict(
  model: Model,
  table: Any = None,
  *,
  level: float = 0.95,
  offset: float | np.ndarray | None = None,
  weights: float | np.ndarray | None = None,
) -> Predictions:
  """Predict the response of rows in fitted groups or in new groups.

  For every family the ends of an interval are the means at `eta` plus and minus a normal quantile
  times a standard error. The standard error treats the estimated variances as the true ones, so
  with few groups the intervals are too narrow. In simulations with five groups of four rows, 95 %
  intervals held 83 % of the means of new groups and 92 % of new observations in new groups. With
  fifteen groups they held 92 % and 94 %.

  Args:
    model: a fitted model.
    table: the rows to predict, in a form that `fit` accepts. None predicts the fitted rows. A
      group is new if its label is missing or does not occur in the fitted data; `known` is then
      False. The effects of a new group are predicted as 0, and their variance enters the standard
      error.
    level: the confidence level of the intervals, such as 0.95.
    offset: the offset of the rows [N], or one number for all rows. It is needed if the fit got its
      offset as numbers, and only then allowed. The offset of a column or an expression is computed
      from `table`.
    weights: the weights of the rows, in the same way. If those of new rows are not known, because
      the table lacks their column or the fit got numbers and you give none, `new_low` and
      `new_high` are nan. Families other than gaussian need none.

  Returns:
    The predictions. For a new group of a family other than gaussian, `mean` is the mean of a group
    whose effects are 0. It is the median over groups and not their average. With the variance v of
    z'b, the average of a Poisson model is exp(v / 2) times `mean`.

  Raises:
    ValueError: a predictor is absent, is missing in a row, or has a level that the fitted data do
      not have; a row puts a fitted group into a different coarser group; `offset` or `weights` are
      given, but the fit did not get them as numbers; or `level` is not between 0 and 1.

  >>> from shrinkmeta.mixed.answers.model import fit
  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
  >>> found = predict(fit("y ~ (1 | g)", data), {"g": ["a", "elsewhere"]})
  >>> found.mean.round(2), found.se.round(1), found.known
  (array([1.56, 4.  ]), array([0.4, 2.9]), array([ True, False]))
  """
  import scipy.special

  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, such as 0.95; got {level}.")
  fit, design = model.estimates, model.design
  if table is None and not (offset is None and weights is None):
    name = "weights" if offset is None else "offset"
    raise ValueError(
      f"The fitted rows have the {name} of the fit; leave out {name}, or give table."
    )
  if fit.residual is None and weights is not None:
    raise ValueError(
      f"Weights belong to the intervals of new observations, which {fit.family} fits do not have; "
      "leave out weights."
    )
  if table is None:
    rows = NewRows(
      design.fixed,
      tuple(term.columns for term in design.random),
      tuple(term.index for term in design.random),
      design.offset,
      np.ones(fit.rows) if design.weights is None else design.weights,
    )
  else:
    rows = _nested(model, new_rows(model.template, table, offset, weights))
  beta, modes = np.array(list(fit.fixed.values())), _modes(model)
  eta = rows.offset + rows.fixed @ beta
  for columns, group, mode in zip(rows.columns, rows.groups, modes, strict=True):
    eta = eta + (columns * np.where(group[:, None] >= 0, mode[group], 0.0)).sum(1)
  variance = _variances(model, rows, modes)
  z = float(scipy.special.ndtri(0.5 + level / 2))
  se = np.sqrt(np.maximum(variance, 0.0))
  nan = np.full(len(eta), np.nan)
  new_se = nan if fit.residual is None else np.sqrt(variance + fit.residual**2 / rows.weights)
  mean = lambda x: mean_of(x, fit.family)
  known = np.all([group >= 0 for group in rows.groups], 0)
  ends = (mean(eta - z * se), mean(eta + z * se))
  return Predictions(mean(eta), *ends, eta, se, eta - z * new_se, eta + z * new_se, known)


def residuals(model: Model) -> tuple[np.ndarray, np.ndarray]:
  """Return the fitted means and the Pearson residuals of the fitted rows.

      (y - m) / sqrt(v)
      gaussian: m = eta,        v = s^2 / w
      logistic: m = n p,        v = n p (1 - p) / w,   p = 1 / (1 + exp(-eta))
      poisson:  m = exp(eta),   v = m / w

  y is the response, w the weight of a row, n its number of trials, and s the residual standard
  deviation. w and n are 1 where the model has none.

  Args:
    model: a fitted model.

  Returns:
    (the fitted means m [N], the residuals [N]).

  >>> from shrinkmeta.mixed.answers.model import fit
  >>> data = {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")}
  >>> residuals(fit("y ~ (1 | g)", data))[0].round(2)
  array([1.56, 1.56, 3.03, 3.03, 7.41, 7.41])
  """
  fit, design = model.estimates, model.design
  mean = mean_of(_fitted(model, _modes(model)), fit.family)
  weights = np.ones(len(mean)) if design.weights is None else design.weights
  if fit.residual is not None:
    variance = fit.residual**2 / weights
  elif fit.family == "poisson":
    variance = mean / weights
  else:
    trials = np.ones(len(mean)) if design.trials is None else design.trials
    variance, mean = trials * mean * (1 - mean) / weights, trials * mean
  return mean, (design.response - mean) / np.sqrt(variance)


def mean_of(eta: np.ndarray, family: str) -> np.ndarray:
  """Return the mean of a response, or the probability of success in one trial, from eta.

  Args:
    eta: the linear predictor, of any shape.
    family: "gaussian", "logistic" or "poisson".

  Returns:
    The means, in the shape of `eta`.
  """
  import scipy.special

  if family == "gaussian":
    return eta
  return np.exp(eta) if family == "poisson" else scipy.special.expit(eta)


def _modes(model: Model) -> list[np.ndarray]:
  """[L, q] the modes of the effects of each random term."""
  found, several = effects(model), len(model.estimates.groups) > 1
  key = lambda group, name: f"{group} {name}" if several else name
  return [
    np.stack([found[key(term.group, name)].mode for name in term.names], 1)
    for term in model.design.random
  ]


def _fitted(model: Model, modes: list[np.ndarray]) -> np.ndarray:
  """eta [N] of the rows that were fitted."""
  design = model.design
  eta = design.offset + design.fixed @ np.array(list(model.estimates.fixed.values()))
  return eta + sum(
    (term.columns * mode[term.index]).sum(1)
    for term, mode in zip(design.random, modes, strict=True)
  )


def _nested(model: Model, rows: NewRows) -> NewRows:
  """A known group of a finer factor lies in its group of the coarser ones; a new group is -1."""
  groups = [group.copy() for group in rows.groups]
  for j, inner in enumerate(model.design.random):
    for i, outer in enumerate(model.design.random):
      if len(outer.levels) < len(inner.levels):
        parent = np.zeros(len(inner.levels), int)
        parent[inner.index] = outer.index
        known, missing = groups[j] >= 0, groups[i] == -1
        wrong = known & ~missing & (parent[groups[j]] != groups[i])
        for row in np.flatnonzero(wrong).tolist():
          label, was = inner.levels[groups[j][row]], outer.levels[parent[groups[j][row]]]
          at = groups[i][row]
          now = repr(outer.levels[at]) if at >= 0 else "that the data of the fit do not have"
          raise ValueError(
            f"Row {row + 1} has {inner.group} {label!r} in {outer.group} {now}; in the data of the "
            f"fit it is in {was!r}. Give a new group another label."
          )
        lost = known & missing
        groups[i][lost] = parent[groups[j][lost]]
  return rows._replace(groups=tuple(np.maximum(group, -1) for group in groups))


def _variances(model: Model, rows: NewRows, modes: list[np.ndarray]) -> np.ndarray:
  """Var(eta^ - eta) [N]."""
  fit, design = model.estimates, model.design
  variance = np.zeros(len(rows.offset))
  for columns, group, sigma in zip(rows.columns, rows.groups, fit.covariances, strict=True):
    own = np.einsum("ni,ij,nj->n", columns, sigma, columns)
    variance += np.where(group < 0, own, 0.0)
  slopes = rows.fixed.copy()  # a
  coarsest = min(range(len(modes)), key=lambda k: len(design.random[k].levels))
  weights = _weights(model, modes)
  fitted = _places(design.random[coarsest].index)
  for group, new in _places(rows.groups[coarsest]).items():
    if group < 0:
      continue
    at = fitted[group]
    z, new_z, scale = [], [], []
    for k, term in enumerate(design.random):
      present, local = np.unique(term.index[at], return_inverse=True)
      z.append(_spread(term.columns[at], local, len(present)))
      place = np.searchsorted(present, rows.groups[k][new])
      place = np.where(rows.groups[k][new] < 0, -1, place)
      new_z.append(_spread(rows.columns[k][new], place, len(present)))
      scale.append(np.kron(np.eye(len(present)), _root(fit.covariances[k])))
    root = _block_diagonal(scale)
    zs, new_zs = np.concatenate(z, 1) @ root, np.concatenate(new_z, 1) @ root
    weighted = zs * weights[at][:, None]
    solved = np.linalg.solve(np.eye(len(root)) + zs.T @ weighted, new_zs.T)
    variance[new] += (new_zs.T * solved).sum(0)
    slopes[new] -= (design.fixed[at].T @ weighted @ solved).T
  if slopes.shape[1]:
    variance += np.einsum("ni,ij,nj->n", slopes, fit.fixed_covariance, slopes)
  return variance


def _weights(model: Model, modes: list[np.ndarray]) -> np.ndarray:
  """W [N]: minus the second derivative of log p(y given eta)."""
  fit, design = model.estimates, model.design
  weights = np.ones(fit.rows) if design.weights is None else design.weights
  if fit.residual is not None:
    return weights / fit.residual**2
  mean = mean_of(_fitted(model, modes), fit.family)
  if fit.family == "poisson":
    return weights * mean
  trials = 1.0 if design.trials is None else design.trials
  return weights * trials * mean * (1 - mean)


def _places(index: np.ndarray) -> dict[int, np.ndarray]:
  """{group: its rows}."""
  order = np.argsort(index, kind="stable")
  groups, starts = np.unique(index[order], return_index=True)
  return dict(zip(groups.tolist(), np.split(order, starts[1:]), strict=True))


def _spread(columns: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
  """[n, count q]: the columns of each row in the place of its group; 0 for a group of -1."""
  wide = np.zeros((len(columns), count, columns.shape[1]))
  rows = np.flatnonzero(group >= 0)
  wide[rows, group[rows]] = columns[rows]
  return wide.reshape(len(columns), -1)


def _root(sigma: np.ndarray) -> np.ndarray:
  """Lambda with Lambda Lambda' = Sigma, also if Sigma is singular."""
  values, vectors = np.linalg.eigh(sigma)
  return vectors * np.sqrt(np.maximum(values, 0.0))


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
  size = sum(len(block) for block in blocks)
  found, at = np.zeros((size, size)), 0
  for block in blocks:
    found[at : at + len(block), at : at + len(block)] = block
    at += len(block)
  return found
