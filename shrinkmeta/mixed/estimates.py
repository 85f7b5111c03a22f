"""Compute covariances of the estimates from the Hessian of the criterion at its minimum.

The Hessian is the observed information. In some directions the criterion may be flat. For example,
a column that separates the successes from the failures has no finite best coefficient. A flat
direction is left out of the Hessian before it is inverted. The estimates that change along it are
reported as undetermined. The other estimates keep the standard errors that they would have if the
parameters could not move along this direction.

For the gaussian family the criterion is profiled: beta and s are functions of theta. Let J be the
Hessian of the profiled criterion, and D the derivative of (beta, log s) with respect to theta. Then
the inverse of the whole Hessian is

    Cov(theta) = J^-1,   Cov(beta, log s) = Cov(beta, log s given theta) + D J^-1 D'
"""

from typing import NamedTuple

import numpy as np

from shrinkmeta.mixed.criteria import search
from shrinkmeta.mixed.criteria.blocks import Blocks, key_of
from shrinkmeta.mixed.criteria.gaussian import Gaussian

_SMALL = 1e-2  # of an entry of Lambda, below which 0 is tried
_NOTHING = 1e-10  # of an entry of Lambda, which is rounding
_NO_WORSE = 1e-6  # nats that 0 may lose
_FLAT = 1e-4  # nats per unit squared, below which the criterion is flat in a direction
_TOUCHED = 1e-3  # share of a flat direction above which a parameter counts as in it


class Information(NamedTuple):
  """The covariances of the parameters and the flat directions, from the curvature at the minimum.

  Attributes:
    beta: [P, P], the covariance of the fixed effects, in the coordinates of the blocks.
    theta: [k, k], the covariance of theta. Rows and columns of entries fixed at 0 are 0.
    log_residual: the variance of log s. None if the family has no residual.
    mixed: [k], the covariance of theta and log s.
    flat_beta, flat_theta, flat_residual: [r, P], [r, k], [r], the parts of the r flat directions
      for beta, theta and log s.
  """

  beta: np.ndarray
  theta: np.ndarray
  log_residual: float | None
  mixed: np.ndarray
  flat_beta: np.ndarray
  flat_theta: np.ndarray
  flat_residual: np.ndarray


def settle(
  objective: search.Objective, found: search.Minimum, blocks: Blocks, first: int
) -> tuple[search.Minimum, np.ndarray, np.ndarray]:
  """Set standard deviations to 0 if 0 is their best value, and make the diagonal of Lambda >= 0.

  Args:
    objective: x -> (value, gradient), with theta = x[first:].
    found: the best minimum of `objective`.
    blocks: the data.
    first: the position in x at which theta begins.

  Returns:
    (the minimum over the free entries of x; x with all entries; for each entry of x, whether it is
    free, that is, not fixed at 0).
  """
  diagonal = blocks.diagonal + first
  free = np.ones(len(found.x), bool)
  x, value = _tidy(found.x, blocks, first), found.value
  tried: set[int] = set()
  while True:
    small = [i for i in diagonal if free[i] and i not in tried and abs(x[i]) < _SMALL]
    if not small:
      break
    i = min(small, key=lambda i: abs(x[i]))
    tried.add(i)
    zero, without = x.copy(), free.copy()
    zero[i], without[i] = 0.0, False
    trial = search.minimise(search.held(objective, zero, without), zero[without])
    if trial.value - value <= _NO_WORSE:
      zero[without] = trial.x
      x, free, value = _tidy(zero, blocks, first), without, trial.value
  # The usual form of Lambda may have moved a value to a place that was set to 0.
  x[first:] = np.where(np.abs(x[first:]) < _NOTHING, 0.0, x[first:])
  free[first:] = x[first:] != 0
  if free.all() and np.allclose(np.abs(x), np.abs(found.x), rtol=1e-12, atol=0):
    signs = np.sign(x) * np.sign(found.x)  # the columns of Lambda that changed their sign
    hessian, gradient = found.hessian * np.outer(signs, signs), found.gradient * signs
    return found._replace(x=x, gradient=gradient, hessian=hessian), x, free
  final = search.minimise(search.held(objective, x, free), x[free])
  x[free] = final.x
  x = _tidy(x, blocks, first)
  of_free = search.held(objective, x, free)
  value, gradient = of_free(x[free])
  hessian = search.differences(of_free, x[free])
  return search.Minimum(x[free], value, gradient, hessian, final.converged), x, free


def _tidy(x: np.ndarray, blocks: Blocks, first: int) -> np.ndarray:
  """The same Lambda Lambda' from a Lambda with no negative diagonal, a column of 0 for a 0."""
  scales = [triangular(scale @ scale.T) for scale in blocks.lambdas(x[first:])]
  return np.concatenate([x[:first], blocks.pick(scales)])


def triangular(target: np.ndarray) -> np.ndarray:
  """Compute the Cholesky factor of a matrix that may be singular.

  Args:
    target: [q, q], positive semidefinite.

  Returns:
    L [q, q], lower triangular, with L L' = target. A pivot of 0 gives a column of zeros.

  >>> triangular(np.array([[4.0, 2.0], [2.0, 1.0]]))
  array([[2., 0.],
         [1., 0.]])
  """
  factor = np.zeros_like(target)
  for j in range(len(target)):
    left = target[j:, j] - factor[j:, :j] @ factor[j, :j]
    if left[0] > 1e-15 * target[j, j]:
      factor[j:, j] = left / np.sqrt(left[0])
  return factor


def theta_of(blocks: Blocks, covariances: tuple[np.ndarray, ...], scale: float) -> np.ndarray:
  """Compute theta from the covariances of the random terms.

  Args:
    blocks: the data.
    covariances: Sigma_k of every random term of the design, in the units of the data.
    scale: s, or 1 if the family has no residual.

  Returns:
    theta [k], the entries of Lambda. For every level, T Lambda Lambda' T' s^2 is the covariance of
    its effects in the units of the data, and T is `Level.back`.
  """
  entries: dict[tuple[str, str], float] = {}
  for term, sigma in zip(blocks.design.random, covariances, strict=True):
    keys = [key_of(term.group, name, len(blocks.levels) > 1) for name in term.names]
    entries |= {(a, b): sigma[i, j] for i, a in enumerate(keys) for j, b in enumerate(keys)}
  scales = []
  for level in blocks.levels:
    sigma = np.array([[entries.get((a, b), 0.0) for b in level.keys] for a in level.keys])
    inverse = np.linalg.inv(level.back)
    scales.append(triangular(inverse @ sigma @ inverse.T / scale**2))
  return blocks.pick(scales)


def sizes(blocks: Blocks, theta: np.ndarray) -> np.ndarray:
  """Return for each entry of theta the norm of its row of Lambda, or 1 if the norm is 0, [k]."""
  found = []
  for level, scale in zip(blocks.levels, blocks.lambdas(theta), strict=True):
    norms = np.linalg.norm(scale, axis=1)
    found.append(np.where(norms > 0, norms, 1.0)[level.places[0]])
  return np.concatenate([*found, np.zeros(0)])


def inverse(hessian: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Invert a Hessian without its flat directions.

  Args:
    hessian: [n, n].
    scale: [n], the size of a typical change of each entry. It makes the entries comparable.

  Returns:
    (the covariance [n, n], the r flat directions [r, n]).
  """
  values, vectors = np.linalg.eigh(hessian * np.outer(scale, scale))
  flat = values < _FLAT
  kept = vectors[:, ~flat] * scale[:, None]
  return (kept / values[~flat]) @ kept.T, (vectors[:, flat] * scale[:, None]).T


def of_gaussian(criterion: Gaussian, theta: np.ndarray, minimum: search.Minimum,
                free: np.ndarray) -> Information:  # fmt: skip
  """Compute the covariances of the parameters of a linear mixed model.

  Args:
    criterion: the profiled criterion.
    theta: [k], the minimum.
    minimum: the minimum over the free entries of theta.
    free: [k] bool, which entries of theta are free. The others are fixed at 0.

  Returns:
    The covariances, in the coordinates of the blocks.
  """
  blocks, k, p = criterion.blocks, len(theta), criterion.fixed
  scale = sizes(blocks, theta)
  part, flat = inverse(minimum.hessian, scale[free])
  covariance, directions = np.zeros((k, k)), np.zeros((len(flat), k))
  covariance[np.ix_(free, free)], directions[:, free] = part, flat
  slopes = np.zeros((p + 1, k))
  for i in np.flatnonzero(free):
    h = np.zeros(k)
    h[i] = 1e-4 * max(1.0, abs(theta[i]))
    up, down = criterion.profile(theta + h), criterion.profile(theta - h)
    slopes[:p, i] = (up.beta - down.beta) / (2 * h[i])
    slopes[p, i] = np.log(up.residual / down.residual) / (2 * h[i])
  at = criterion.profile(theta)
  fixed = conditional(criterion, theta) + slopes[:p] @ covariance @ slopes[:p].T
  return Information(
    fixed,
    covariance,
    float(1 / (2 * criterion.freedom) + slopes[p] @ covariance @ slopes[p]),
    covariance @ slopes[p],
    directions @ slopes[:p].T / at.residual,
    directions,
    directions @ slopes[p],
  )


def conditional(criterion: Gaussian, theta: np.ndarray) -> np.ndarray:
  """Compute Cov(beta) = s^2 (X'M^-1X)^-1 of a linear mixed model, at given variances.

  Args:
    criterion: the profiled criterion of the data.
    theta: [k], the entries of Lambda.

  Returns:
    Cov(beta) [P, P], in the coordinates of the blocks.
  """
  at = criterion.profile(theta)
  return at.residual**2 * np.linalg.inv(at.cross)


def of_hessian(blocks: Blocks, x: np.ndarray, minimum: search.Minimum,
               free: np.ndarray) -> Information:  # fmt: skip
  """Compute the covariances of the parameters of a criterion of x = (beta, theta).

  Args:
    blocks: the data.
    x: [P + k], the minimum.
    minimum: the minimum over the free entries of x.
    free: [P + k] bool, which entries of x are free. The others are fixed at 0.

  Returns:
    The covariances, in the coordinates of the blocks.
  """
  p, n = blocks.fixed.shape[1], len(x)
  scale = np.concatenate([np.ones(p), sizes(blocks, x[p:])])
  part, flat = inverse(minimum.hessian, scale[free])
  covariance, directions = np.zeros((n, n)), np.zeros((len(flat), n))
  covariance[np.ix_(free, free)], directions[:, free] = part, flat
  return Information(
    covariance[:p, :p],
    covariance[p:, p:],
    None,
    np.zeros(n - p),
    directions[:, :p],
    directions[:, p:],
    np.zeros(len(flat)),
  )


def touched(weights: np.ndarray, flat: np.ndarray, size: float) -> bool:
  """Tell whether a linear function of the parameters changes along one of the flat directions.

  Args:
    weights: [n], the coefficients of the linear function.
    flat: [r, n], the flat directions.
    size: the size of a large change of the function, such as the norm of `weights`.

  Returns:
    True if the change along a flat direction is more than 0.001 `size`.
  """
  return len(flat) > 0 and bool((np.abs(flat @ weights) > _TOUCHED * size).any())
