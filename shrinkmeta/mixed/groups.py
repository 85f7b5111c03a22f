"""The effects of every group after a fit: shrunk towards the fixed effects, and unshrunk."""

from typing import NamedTuple

import numpy as np

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import estimates
from shrinkmeta.mixed.criteria.blocks import blocks, key_of
from shrinkmeta.mixed.criteria.elimination import covariances
from shrinkmeta.mixed.criteria.laplace import Laplace
from shrinkmeta.mixed.result import Fit


class Effects(NamedTuple):
  """A random effect of all L groups of its factor, in the order of the design's labels.

  Attributes:
    group: the grouping factor.
    levels: the L labels.
    rows: [L] rows of every group.
    mode: [L] b^, the mode of the deviation from the fixed effect, given the estimates.
    sd: [L] posterior standard deviation of b given the estimates; 0 where the effect's sd is 0.
    value: [L] the fixed effect of the same name plus b^, or b^ if there is none.
  """

  group: str
  levels: tuple[str, ...]
  rows: np.ndarray
  mode: np.ndarray
  sd: np.ndarray
  value: np.ndarray


def effects(fit: Fit, design: Design) -> dict[str, Effects]:
  """The conditional modes of all random effects, with posterior standard deviations.

      b^ = argmax log p(y given beta, b) + log p(b given Sigma),   Cov(b) = -(Hessian at b^)^-1

  For a gaussian these are the best linear unbiased predictions.

  Args:
    fit: a fit of the design.
    design: the design.

  Returns:
    {name, as in `fit.sd`: Effects}.

  Raises:
    ValueError: if the fit is of another design.

  >>> from shrinkmeta.mixed.fit import fit
  >>> from shrinkmeta.formulas.design import RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> design = Design(y, "yield", one, ("(Intercept)",), (term,), np.zeros(9))
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
  """Every group's own least-squares estimate of its effects.

      theta_g = argmin over theta, gamma of |y_g - offset_g - F_g gamma - Z_g theta|^2

  Z_g holds the columns of the factor's random effects and F_g the fixed columns that have none.
  A fixed column whose coefficient the group cannot tell from the others, such as one that is
  constant within the group, takes its fitted value in place of gamma. So theta_g is comparable with
  `Effects.value`.

  Args:
    fit: a fit of the design.
    design: the design.

  Returns:
    {name, as in `fit.sd`: [L]}, nan where a group's rows leave the estimate open; all nan if the
    family is not gaussian, for which least squares is no estimate.

  Raises:
    ValueError: if the fit is of another design.

  >>> from shrinkmeta.mixed.fit import fit
  >>> from shrinkmeta.formulas.design import RandomTerm
  >>> y = np.array([1545, 1440, 1440, 1540, 1555, 1490, 1595, 1550, 1605.0])
  >>> one, batch = np.ones((9, 1)), np.repeat(np.arange(3), 3)
  >>> term = RandomTerm("batch", ("A", "B", "C"), batch, ("(Intercept)",), one, False)
  >>> design = Design(y, "yield", one, ("(Intercept)",), (term,), np.zeros(9))
  >>> unshrunk(fit(design), design)["(Intercept)"].round(1)
  array([1475. , 1528.3, 1583.3])
  """
  check_same(fit, design)
  prefix = len(fit.groups) > 1
  y = np.asarray(design.response - design.offset, float)
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
      order = np.argsort(index, kind="stable")
      for g, rows in enumerate(
        np.split(order, np.cumsum(np.bincount(index, minlength=count))[:-1])
      ):
        values[g] = _least_squares(own[rows], fixed[rows], y[rows] * root[rows], fitted)
    for j, name in enumerate(names):
      found[key_of(factor, name, prefix)] = values[:, j]
  return found


def _least_squares(
  own: np.ndarray, fixed: np.ndarray, y: np.ndarray, fitted: np.ndarray
) -> np.ndarray:
  """theta [q] of one group; `fitted` [f] for the fixed columns that it leaves open."""
  if fixed.shape[1]:
    loose = _open(np.concatenate([own, fixed], 1))[own.shape[1] :]
    y = y - fixed[:, loose] @ fitted[loose]
    fixed = fixed[:, ~loose]
  x = np.concatenate([own, fixed], 1)
  size = np.linalg.norm(x, axis=0)
  size = np.where(size > 0, size, 1.0)
  theta = np.linalg.lstsq(x / size, y, rcond=1e-12)[0] / size
  return np.where(_open(x), np.nan, theta)[: own.shape[1]]


def _open(x: np.ndarray) -> np.ndarray:
  """[c] bool: columns of x that a linear combination of 0 involves."""
  size = np.linalg.norm(x, axis=0)
  scaled = x / np.where(size > 0, size, 1.0)
  _, values, v = np.linalg.svd(scaled)
  null = np.ones(x.shape[1], bool)
  null[: len(values)] = values <= 1e-11 * values.max(initial=1.0)
  return np.asarray((np.abs(v[null]) > 1e-6).any(0))


def check_same(fit: Fit, design: Design) -> None:
  """Raise unless names and sizes agree.

  Args:
    fit: a fit.
    design: the design that it should be of.

  Raises:
    ValueError: what the two have.
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
