"""Estimate the effects of every group after a fit, with and without shrinkage."""

from typing import NamedTuple

import numpy as np

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import estimates
from shrinkmeta.mixed.criteria.blocks import blocks, key_of
from shrinkmeta.mixed.criteria.elimination import covariances
from shrinkmeta.mixed.criteria.laplace import Laplace
from shrinkmeta.mixed.result import Fit


class Effects(NamedTuple):
  """One random effect b of all L groups of its factor, in the order of `levels`.

  Attributes:
    group: the grouping factor.
    levels: the L labels of the groups.
    rows: [L], the number of rows of every group.
    mode: [L], b^, the mode of b given the other estimates.
    sd: [L], the posterior standard deviation of b given the other estimates. It is 0 if the
      standard deviation of the effect is estimated as 0.
    value: [L], the fixed effect of the same name plus b^, or b^ if there is no such fixed effect.
  """

  group: str
  levels: tuple[str, ...]
  rows: np.ndarray
  mode: np.ndarray
  sd: np.ndarray
  value: np.ndarray


def effects(fit: Fit, design: Design) -> dict[str, Effects]:
  """Compute the conditional modes of all random effects, with posterior standard deviations.

      b^ = argmax log p(y given beta, b) + log p(b given Sigma),   Cov(b) = -(Hessian at b^)^-1

  For the gaussian family b^ is the best linear unbiased prediction.

  Args:
    fit: a fit of the design.
    design: the design.

  Returns:
    {name of the random effect, as in `fit.sd`: Effects}.

  Raises:
    ValueError: the fit belongs to another design.

  >>> from shrinkmeta.formulas.build import design as matrices
  >>> from shrinkmeta.mixed.fit import fit
  >>> grams = [1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605]
  >>> design = matrices("grams ~ (1 | batch)", {"grams": grams, "batch": list("AAABBBCCC")})
  >>> effects(fit(design), design)["(Intercept)"].mode.round(1)
  array([-36.5,  -0.4,  36.8])
  """
  check_same(fit, design)
  data = blocks(design)
  scale = 1.0 if fit.residual is None else fit.residual
  beta = np.array([fit.fixed[name] for name in design.fixed_names])
  eta = data.offset + (np.asarray(design.fixed, float) @ beta)[data.order]
  # In residual standard deviations a linear model is the family of unit variance.
  data = data._replace(
    response=data.response / (1.0 if fit.residual is None else scale),
    offset=eta / scale,
    fixed=np.zeros((len(eta), 0)),
  )
  theta = estimates.theta_of(data, fit.covariances, scale)
  at = Laplace(data, fit.family).mode(np.zeros(0), theta)
  found = {}
  paths = covariances(data.levels, at.found)
  for d, level in enumerate(data.levels):
    q = len(level.keys)
    mode = at.effects[d] @ level.back.T * scale
    spread = level.back @ paths[d][:, :q, :q] @ level.back.T * scale**2
    size = np.diff(np.append(level.starts, len(level.of_row)))
    term = next(term for term in design.random if term.group == level.factor)
    prefix = f"{level.factor} " if len(data.levels) > 1 else ""
    back = lambda values, level=level: _unsorted(values, level.labels)
    for j, key in enumerate(level.keys):
      centre = fit.fixed.get(key.removeprefix(prefix), 0.0)
      sd = np.sqrt(np.maximum(spread[:, j, j], 0.0))
      values = (back(size), back(mode[:, j]), back(sd), back(centre + mode[:, j]))
      found[key] = Effects(level.factor, term.levels, *values)
  return found


def unshrunk(fit: Fit, design: Design) -> dict[str, np.ndarray]:
  """Estimate the effects of each group by least squares, from the rows of this group alone.

      theta_g = argmin over theta, gamma of |sqrt(w_g) (y_g - offset_g - F_g gamma - Z_g theta)|^2

  w_g are the weights of the rows. Z_g holds the columns of the factor's random effects. F_g holds
  the fixed columns that are not columns of Z_g. The rows of a group may not determine the
  coefficient of a column of F_g, for example if the column is constant in the group. This
  coefficient is then set to its estimate in `fit`. So theta_g is comparable with `Effects.value`.

  Args:
    fit: a fit of the design.
    design: the design.

  Returns:
    {name of the random effect, as in `fit.sd`: theta_g [L]}. An estimate is nan if the rows of the
    group do not determine it. All are nan if the family is not gaussian.

  Raises:
    ValueError: the fit belongs to another design.

  >>> from shrinkmeta.formulas.build import design as matrices
  >>> from shrinkmeta.mixed.fit import fit
  >>> grams = [1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605]
  >>> design = matrices("grams ~ (1 | batch)", {"grams": grams, "batch": list("AAABBBCCC")})
  >>> unshrunk(fit(design), design)["(Intercept)"].round(1)
  array([1475. , 1528.3, 1583.3])
  """
  check_same(fit, design)
  prefix = len(fit.groups) > 1
  y = np.asarray(design.response, float) - np.asarray(design.offset, float)
  weights = np.ones(len(y)) if design.weights is None else design.weights
  root = np.sqrt(np.asarray(weights, float))
  found: dict[str, np.ndarray] = {}
  for factor in fit.groups:
    terms = [term for term in design.random if term.group == factor]
    names = [name for term in terms for name in term.names]
    own = np.concatenate([term.columns for term in terms], 1) * root[:, None]
    others = [i for i, name in enumerate(design.fixed_names) if name not in names]
    fixed = np.asarray(design.fixed, float)[:, others] * root[:, None]
    fitted = np.array([fit.fixed[design.fixed_names[i]] for i in others])
    index, count = terms[0].index, len(terms[0].levels)
    values = np.full((count, len(names)), np.nan)
    if fit.family == "gaussian":
      order, size = np.argsort(index, kind="stable"), np.bincount(index, minlength=count)
      ends = np.cumsum(size)
      for rows in np.unique(size):  # all groups of one size at once
        which = np.flatnonzero(size == rows)
        at = order[(ends[which] - rows)[:, None] + np.arange(rows)]
        values[which] = _least_squares(own[at], fixed[at], (y * root)[at], fitted)
    for j, name in enumerate(names):
      found[key_of(factor, name, prefix)] = values[:, j]
  return found


def _least_squares(
  own: np.ndarray, fixed: np.ndarray, y: np.ndarray, fitted: np.ndarray
) -> np.ndarray:
  """theta [B, q] of B groups of n rows, from own [B, n, q], fixed [B, n, f] and y [B, n].

  `fitted` [f] is for the fixed columns that a group leaves open.
  """
  q = own.shape[2]
  x = np.concatenate([own, fixed], 2)
  if fixed.shape[2]:
    loose = _solve(x, y)[1][:, q:]
    y = y - (fixed @ (loose * fitted)[:, :, None])[:, :, 0]
    x = np.concatenate([own, fixed * ~loose[:, None]], 2)
  theta, open_ = _solve(x, y)
  return np.where(open_, np.nan, theta)[:, :q]


def _solve(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(least squares [B, c], whether a linear combination of 0 involves the column [B, c])."""
  rows, c = x.shape[1:]
  size = np.linalg.norm(x, axis=1)
  size = np.where(size > 0, size, 1.0)
  u, values, v = np.linalg.svd(x / size[:, None], full_matrices=rows < c)
  least = 1e-11 * np.maximum(values.max(1, initial=0.0), 1.0)[:, None]
  kept = np.where(values > least, 1 / np.where(values > least, values, 1.0), 0.0)
  rank = kept.shape[1]
  coordinates = kept * (u[:, :, :rank].transpose(0, 2, 1) @ y[:, :, None])[:, :, 0]
  theta = (v[:, :rank].transpose(0, 2, 1) @ coordinates[:, :, None])[:, :, 0] / size
  null = np.ones(v.shape[:2], bool)
  null[:, :rank] = kept == 0
  return theta, np.asarray((np.abs(v) * null[:, :, None] > 1e-6).any(1))


def check_same(fit: Fit, design: Design) -> None:
  """Raise ValueError unless a fit and a design have the same names and sizes.

  Args:
    fit: a fit.
    design: the design to which the fit should belong.

  Raises:
    ValueError: the fixed effects, the number of rows or the groups differ.
  """
  groups = {term.group: len(term.levels) for term in design.random}
  got, want = (tuple(fit.fixed), fit.rows), (design.fixed_names, len(design.response))
  if got != want or fit.groups != groups:
    raise ValueError(
      f"The fit has fixed effects {', '.join(got[0])}, {fit.rows} rows and groups {fit.groups}; "
      f"the design has {', '.join(want[0])}, {want[1]} rows and groups {groups}. Pass the design "
      "of the fit."
    )


def _unsorted(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Values of the sorted groups, in the order of the design's labels."""
  found = np.empty_like(values)
  found[labels] = values
  return found
