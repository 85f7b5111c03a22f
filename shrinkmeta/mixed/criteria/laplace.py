"""Laplace's approximation to the likelihood of a generalised linear mixed model.

    eta = offset + X beta + Z Lambda u,   u ~ N(0, I)
    log L(beta, theta) = log p(y given eta(u^)) - |u^|^2 / 2 - log det H / 2,
    H = I + Lambda' Z' W(u^) Z Lambda

u^ is the mode of log p(y given eta(u)) - |u|^2 / 2. W is diagonal, with entries
w = -d^2 log p / d eta^2. log p includes all its constants, as in glmmTMB and in the library's
`log_evidence`. The integral over all effects of a group is approximated jointly. Lambda is diagonal
for an uncorrelated term (x || g), and lower triangular for a correlated term (x | g).

The gradient of this approximation is exact. Let s be the score d log p / d eta and w' the
derivative of w. Let h_i = z_i' Lambda H^-1 Lambda' z_i, v = h w' / 2, H a = Lambda' Z' v, and
t = v - W Z Lambda a - s. Then

    d(-log L) / d beta   = X' t
    d(-log L) / d Lambda = sum over groups of Z't u' + Z's a'  +  d(log det H / 2) / d Lambda at W

All sorted rows are in one array, without padding of groups. So the memory is a few numbers for each
row and column, for groups of any size.
"""

from typing import NamedTuple

import numpy as np

from shrinkmeta.mixed.criteria.blocks import Blocks, statistics
from shrinkmeta.mixed.criteria.elimination import (
  Eliminated,
  cotangents,
  covariances,
  eliminate,
  linear,
  modes,
)
from shrinkmeta.mixed.criteria.families import Family, density

GRID = tuple(10.0 ** (i / 2) for i in range(-3, 4))  # 0.03 to 30, on the scale of eta
_CLOSE = 1e-8  # a Newton step this short leaves an error of its square
_STEPS = 100
_SAFE = 0.1  # a step that changes eta by less changes no weight by much, and needs no halving


class Mode(NamedTuple):
  """The mode of the random effects.

  Attributes:
    u: [G, q] for every level, the mode u^.
    effects: [G, q] for every level, Lambda u.
    eta: [N], the linear predictor.
    sums: the sums of every level, from which `found` was computed.
    found: the result of eliminating the random effects at the mode.
    height: log p(y given eta) - |u|^2 / 2.
    converged: whether Newton's method converged.
  """

  u: list[np.ndarray]
  effects: list[np.ndarray]
  eta: np.ndarray
  sums: list[np.ndarray]
  found: Eliminated
  height: float
  converged: bool


class Laplace:
  """Laplace's approximation for one data set, as a function of x = (beta [P], theta [k])."""

  def __init__(self, blocks: Blocks, family: Family):
    """Prepare the density.

    Args:
      blocks: the data.
      family: "logistic" or "poisson".
    """
    self.blocks, self.levels = blocks, blocks.levels
    self.density = density(blocks, family)
    self.rows, self.fixed = blocks.fixed.shape
    self.zeros = [np.zeros((len(level.starts), len(level.keys))) for level in self.levels]
    self.warm, self.effects = self.zeros, self.zeros
    near = self.density.start - blocks.offset
    self.start = np.linalg.lstsq(blocks.fixed, near, rcond=None)[0] if self.fixed else np.zeros(0)
    self.failed = 0

  def _by_block(self, values: np.ndarray, u: list[np.ndarray]) -> np.ndarray:
    """log p - |u|^2 / 2 of every group of the coarsest factor."""
    coarse = self.levels[0]
    with np.errstate(over="ignore"):
      total = np.add.reduceat(values, coarse.starts)
    for level, x in zip(self.levels, u, strict=True):
      np.subtract.at(total, coarse.of_row[level.starts], 0.5 * np.square(x).sum(1))
    return total

  def mode(self, beta: np.ndarray, theta: np.ndarray) -> Mode:
    """Find the mode of the random effects by Newton's method.

    If a long step would lower log p - |u|^2 / 2 of a group of the coarsest factor, the step of this
    group is halved until it does not. A group that never rises stays where it is.

    Args:
      beta: [P], the fixed effects.
      theta: [k], the entries of Lambda.

    Returns:
      The mode and the curvature at the mode.

    Raises:
      numpy.linalg.LinAlgError: if a number is not finite.
    """
    levels, scales = self.levels, self.blocks.lambdas(theta)
    base = self.blocks.offset + self.blocks.fixed @ beta
    none = np.zeros((self.rows, 0))
    place = lambda u: [x @ scale.T for x, scale in zip(u, scales, strict=True)]

    def heights(u: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
      eta = base + linear(levels, place(u)) if levels else base
      values = self.density.log_prob(eta)
      return eta, self._by_block(values, u) if levels else np.array([values.sum()])

    u, close = self.zeros, not levels
    eta, height = heights(u)
    if levels:
      # The last mode, in those blocks where it is the higher start. u of a small theta is large,
      # and Lambda u of a larger theta may then be so far off that its rates overflow.
      warm, risen = heights(self.warm)
      higher = risen > height
      of_rows = lambda places: higher[levels[0].of_row[places]]
      eta, height = np.where(of_rows(slice(None)), warm, eta), np.where(higher, risen, height)
      u = [
        np.where(of_rows(level.starts)[:, None], x, 0.0)
        for level, x in zip(levels, self.warm, strict=True)
      ]
    for _ in range(_STEPS):
      score, weight, _ = self.density.slopes(eta)
      sides = (score + weight * (eta - base))[:, None]
      sums = statistics(levels, none, weight, sides)
      found = eliminate(levels, scales, sums, np.zeros((1, 1)))
      if close:
        break
      new, _ = modes(levels, found, np.ones(1))
      step = [x - y for x, y in zip(new, u, strict=True)]
      length = max(float(np.abs(x).max()) for x in step)
      size = max(float(np.abs(x).max()) for x in new)
      along = np.abs(linear(levels, place(step)))
      unsafe = np.maximum.reduceat(along, levels[0].starts) > _SAFE
      u, eta, height = self._damped(heights, u, step, height, unsafe)
      close = length < _CLOSE * max(1.0, size)
    self.warm = u
    self.failed += not close
    return Mode(u, place(u), eta, sums, found, float(height.sum()), close)  # pyright: ignore

  def _damped(self, heights, u, step, height, unsafe):  # pyright: ignore
    """A step in every block, halved where it is long and does not rise."""
    coarse = self.levels[0]
    shares = np.ones(len(coarse.starts))
    rounding = 1e-12 * np.abs(height) + 1e-12
    for tries in range(41):
      moved = [
        x + shares[coarse.of_row[level.starts]][:, None] * dx
        for level, x, dx in zip(self.levels, u, step, strict=True)
      ]
      eta, new = heights(moved)
      worse = unsafe & ~(new >= height - rounding)
      if not worse.any():
        break
      # A block that never rises stays where it is.
      shares = np.where(worse, shares / 2 if tries < 39 else 0.0, shares)
    return moved, eta, new  # pyright: ignore

  def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return -log L at (beta, theta), and its gradient [P + k]."""
    beta, theta = x[: self.fixed], x[self.fixed :]
    try:
      at = self.mode(beta, theta)
    except np.linalg.LinAlgError:
      return np.inf, np.zeros_like(x)
    value = 0.5 * at.found.log_det - at.height
    if not np.isfinite(value):
      return np.inf, np.zeros_like(x)
    score, weight, change = self.density.slopes(at.eta)
    fixed = self.blocks.fixed
    if not self.levels:
      return value, -fixed.T @ score
    v = 0.5 * self._leverages(at.found) * change
    sums = [s.copy() for s in at.sums]
    for level, s in zip(self.levels, sums, strict=True):
      s[:, :, -1] = _per_group(level, v)
    scales = self.blocks.lambdas(theta)
    a, moved = modes(
      self.levels, eliminate(self.levels, scales, sums, np.zeros((1, 1))), np.ones(1)
    )
    t = v - weight * linear(self.levels, moved) - score
    determinant = cotangents(self.levels, at.found, np.zeros((1, 1)), 0.5)
    gradients = [
      d + _per_group(level, t).T @ u + _per_group(level, score).T @ back
      for d, level, u, back in zip(determinant, self.levels, at.u, a, strict=True)
    ]
    return value, np.concatenate([fixed.T @ t, self.blocks.pick(gradients)])

  def _leverages(self, found: Eliminated) -> np.ndarray:
    """[N] z_i' Lambda H^-1 Lambda' z_i."""
    finest = self.levels[-1]
    columns = [c for level in reversed(self.levels) for c in level.columns.T]
    path = covariances(self.levels, found)[-1]
    total = np.zeros(self.rows)
    for i, one in enumerate(columns):
      for j, other in enumerate(columns[: i + 1]):
        total += (1 if i == j else 2) * path[finest.of_row, i, j] * one * other
    return total

  def penalised(self, theta: np.ndarray, beta: np.ndarray | None = None):
    """Maximise log p(y given eta) - |u|^2 / 2 over beta and u together, for a fixed theta.

    Args:
      theta: [k], the entries of Lambda.
      beta: [P], where to start, if that is higher than the linear regression of `Density.start`.

    Returns:
      (-log L at the maximum, beta [P] at the maximum, X'W X after elimination of the random effects
      [P, P]).
    """
    levels, scales, fixed = self.levels, self.blocks.lambdas(theta), self.blocks.fixed
    p, offset = self.fixed, self.blocks.offset
    u = self.zeros

    def at(beta: np.ndarray, u: list[np.ndarray]) -> tuple[np.ndarray, float]:
      eta = offset + fixed @ beta
      if levels:
        eta = eta + linear(levels, [x @ s.T for x, s in zip(u, scales, strict=True)])
      return eta, float(self.density.log_prob(eta).sum()) - 0.5 * sum(
        float((x**2).sum()) for x in u
      )

    given, beta = beta, self.start
    eta, height = at(beta, u)
    if given is not None and (other := at(given, u))[1] > height:
      beta, (eta, height) = given, other
    # The effects of the last theta, if they are better than none.
    near = [_whitened(b, scale) for b, scale in zip(self.effects, scales, strict=True)]
    other = at(beta, near)
    if other[1] > height:
      u, (eta, height) = near, other
    for _ in range(25):
      score, weight, _ = self.density.slopes(eta)
      side = score + weight * (eta - offset)
      sums = statistics(levels, fixed, weight, side[:, None])
      top = np.zeros((p + 1, p + 1))
      top[:p, :p], top[:p, p] = (fixed * weight[:, None]).T @ fixed, fixed.T @ side
      found = eliminate(levels, scales, sums, top)
      cross = found.top[:p, :p]
      solved = np.linalg.lstsq(cross, found.top[:p, p], rcond=None)[0] if p else beta
      new, _ = modes(levels, found, np.append(-solved, 1.0))
      for halvings in range(30):
        share = 0.5**halvings
        moved = beta + share * (solved - beta)
        placed = [x + share * (y - x) for x, y in zip(u, new, strict=True)]
        there, risen = at(moved, placed)
        if risen >= height - 1e-12 * abs(height) or np.abs(there - eta).max() < _SAFE:
          break
      else:
        break  # no share of the step rises, so it is not taken
      gain, beta, u, eta, height = risen - height, moved, placed, there, risen
      if gain < 1e-6:
        break
    self.effects = [x @ scale.T for x, scale in zip(u, scales, strict=True)]
    return 0.5 * found.log_det - height, beta, cross  # pyright: ignore


def _whitened(effects: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """u with Lambda u = effects, as far as Lambda reaches."""
  return effects @ np.linalg.pinv(scale).T


def _per_group(level, values: np.ndarray) -> np.ndarray:
  """Z' values [G, q]."""
  products = (np.add.reduceat(c * values, level.starts) for c in level.columns.T)
  return np.stack(list(products), 1)
