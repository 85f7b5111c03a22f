"""Eliminate the random effects group by group; get determinants, modes, covariances, derivatives.

With b = Lambda u, u ~ N(0, I), the posterior precision of all u is

    H = I + Lambda' Z'WZ Lambda.

H is block diagonal over the groups of the coarsest factor. Within a block, two groups of the same
finer factor share no entry of H. So block Gaussian elimination can eliminate the groups of the
finest factor first, one at a time, and then the groups of the next coarser factor. The "rest" are
other columns, such as the fixed columns and the response. A group with A = Z'WZ and
B = Z'W [coarser columns, rest] has

    H_g = I + Lambda' A Lambda,   E = H_g^-1 Lambda' B.

Its elimination subtracts B' Lambda E from the sums of the coarser columns and of the rest. At the
end the sums of the rest are [rest]' M^-1 [rest] with M = W^-1 + Z Lambda Lambda' Z', and
log det H = sum_g log det H_g. The derivatives go through the same steps backwards.

References:
  Bates, Maechler, Bolker, Walker (2015). Fitting linear mixed-effects models using lme4. Journal of
  Statistical Software 67(1). They compute a sparse Cholesky factor of the same H.
"""

from typing import NamedTuple

import numpy as np

from shrinkmeta.mixed.criteria.blocks import Level, parents, starts_within


class Step(NamedTuple):
  """The matrices from the elimination of one level, for G groups of q effects.

  Attributes:
    scale: [q, q], Lambda.
    own: [G, q, q], A.
    rest: [G, q, m], B: the columns of the coarser levels, finest first, and then the rest.
    precision: [G, q, q], H_g.
    solved: [G, q, m], E.
  """

  scale: np.ndarray
  own: np.ndarray
  rest: np.ndarray
  precision: np.ndarray
  solved: np.ndarray


class Eliminated(NamedTuple):
  """The result of eliminating all levels.

  Attributes:
    log_det: log det H.
    top: [m, m], the matrix [rest]' M^-1 [rest].
    steps: a Step for each level, coarsest first.
  """

  log_det: float
  top: np.ndarray
  steps: list[Step]


def eliminate(
  levels: tuple[Level, ...], scales: list[np.ndarray], sums: list[np.ndarray], top: np.ndarray
) -> Eliminated:
  """Eliminate the random effects of all levels, finest first.

  Args:
    levels: D levels, coarsest first.
    scales: Lambda [q, q] of every level.
    sums: the sums of every level, from `blocks.statistics`.
    top: [m, m], the matrix [rest]' W [rest].

  Returns:
    log det H, [rest]' M^-1 [rest], and the steps.

  Raises:
    numpy.linalg.LinAlgError: if a number is not finite.
  """
  sums, steps, log_det = list(sums), [], 0.0
  m = len(top)
  for d in reversed(range(len(levels))):
    q, scale = len(levels[d].keys), scales[d]
    own, rest = sums[d][:, :, :q], sums[d][:, :, q:]
    precision = np.eye(q) + scale.T @ own @ scale
    log_det += 2 * float(np.log(np.linalg.cholesky(precision).diagonal(0, 1, 2)).sum())
    # With E from an explicit inverse, B' Lambda E would lose the digits of H_g's condition number.
    solved = np.linalg.solve(precision, scale.T @ rest)
    effects = scale @ solved
    at = 0
    for e in reversed(range(d)):
      width = len(levels[e].keys)
      part = rest[:, :, at : at + width].transpose(0, 2, 1) @ effects[:, :, at:]
      sums[e] = sums[e] - np.add.reduceat(part, starts_within(levels[d], levels[e]), axis=0)
      at += width
    top = top - rest[:, :, at:].reshape(-1, m).T @ effects[:, :, at:].reshape(-1, m)
    steps.append(Step(scale, own, rest, precision, solved))
  return Eliminated(log_det, top, steps[::-1])


def cotangents(
  levels: tuple[Level, ...], found: Eliminated, top: np.ndarray, log_det: float = 1.0
) -> list[np.ndarray]:
  """Return the derivatives of c log det H + sum(top * found.top) with respect to Lambda.

  Args:
    levels: D levels, coarsest first.
    found: the result of eliminating these levels.
    top: [m, m], symmetric, the weights of the entries of found.top.
    log_det: the factor c.

  Returns:
    The derivatives [q, q] of every level.
  """
  gradients, owns, rests = [], [], []
  m = len(top)
  for d, (level, step) in enumerate(zip(levels, found.steps, strict=True)):
    sizes = [len(levels[e].keys) for e in reversed(range(d))]
    outer = top[None]
    if d > 0:
      outer = np.zeros((len(level.starts), sum(sizes) + m, sum(sizes) + m))
      outer[:, sum(sizes) :, sum(sizes) :] = top
    at = 0
    for e, width in zip(reversed(range(d)), sizes, strict=True):
      up = parents(level, levels[e])
      outer[:, at : at + width, at : at + width] = owns[e][up]
      half = rests[e][up] / 2
      outer[:, at : at + width, at + width :] = half
      outer[:, at + width :, at : at + width] = half.transpose(0, 2, 1)
      at += width
    determinant = np.linalg.solve(step.precision, step.scale.T @ step.own)  # H^-1 Lambda' A
    left = step.rest - step.own @ (step.scale @ step.solved)
    product = outer @ step.solved.transpose(0, 2, 1)
    gradients.append(
      -2 * np.einsum("gij,gjk->ik", left, product) + 2 * log_det * determinant.sum(0).T
    )
    if d + 1 < len(levels):
      effects = step.scale @ step.solved
      owns.append(effects @ product @ step.scale.T + log_det * _spread(step))
      rests.append(-2 * effects @ outer)
  return gradients


def modes(
  levels: tuple[Level, ...], found: Eliminated, coefficients: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Solve H u = Lambda' Z'W [rest] coefficients for u.

  Args:
    levels: D levels, coarsest first.
    found: the result of eliminating these levels.
    coefficients: [m], a coefficient for each column of the rest.

  Returns:
    (u, b = Lambda u). Each is a list with an array [G, q] for every level.
  """
  whitened, effects = [], []
  for d, step in enumerate(found.steps):
    m = len(coefficients)
    value = step.solved[:, :, step.solved.shape[2] - m :] @ coefficients
    at = 0
    for e in reversed(range(d)):
      up = effects[e][parents(levels[d], levels[e])]
      width = up.shape[1]
      value = value - (step.solved[:, :, at : at + width] @ up[:, :, None])[:, :, 0]
      at += width
    whitened.append(value)
    effects.append(value @ step.scale.T)
  return whitened, effects


def covariances(levels: tuple[Level, ...], found: Eliminated) -> list[np.ndarray]:
  """Return Cov(b) = Lambda H^-1 Lambda' of every group, jointly with the coarser groups around it.

  Args:
    levels: D levels, coarsest first.
    found: the result of eliminating these levels.

  Returns:
    For every level d an array [G_d, q_d + ... + q_0, q_d + ... + q_0]. The effects of level d come
    first.
  """
  paths: list[np.ndarray] = []
  for d, step in enumerate(found.steps):
    q = step.scale.shape[0]
    own = _spread(step)
    if d == 0:
      paths.append(own)
      continue
    outer = paths[d - 1][parents(levels[d], levels[d - 1])]
    width = outer.shape[1]
    slope = step.scale @ step.solved[:, :, :width]
    joint = np.empty((len(own), q + width, q + width))
    joint[:, q:, q:] = outer
    joint[:, :q, q:] = -slope @ outer
    joint[:, q:, :q] = joint[:, :q, q:].transpose(0, 2, 1)
    joint[:, :q, :q] = own + slope @ outer @ slope.transpose(0, 2, 1)
    paths.append(joint)
  return paths


def _spread(step: Step) -> np.ndarray:
  """Lambda H_g^-1 Lambda' [G, q, q]."""
  return step.scale @ np.linalg.solve(step.precision, step.scale.T[None])


def linear(levels: tuple[Level, ...], effects: list[np.ndarray]) -> np.ndarray:
  """Return Z b, the sum of the random effects of all levels in each sorted row.

  Args:
    levels: D levels, coarsest first.
    effects: b [G, q] of every level.

  Returns:
    Z b [N].
  """
  total = np.zeros(len(levels[0].of_row)) if levels else np.zeros(1)
  for level, b in zip(levels, effects, strict=True):
    for j in range(b.shape[1]):
      total += level.columns[:, j] * b[level.of_row, j]
  return total
