"""How well half of every group's rows, with the parameters, predicts the other half.

    l_PLL(beta, theta, s) = log p(y_B given eta(b^(A))) + log p(y_A given eta(b^(B)))

b^(A) is the mode of the random effects given the rows of half A. It is the library's predictive
objective, with a module for every random effect. For the gaussian family b^ depends on Lambda and
beta alone, and the best residual is s^2 = mean of the squared errors, so that s is profiled out.

The gradient comes from central differences: the parameters are few.
"""

import numpy as np

from shrinkmeta.mixed.criteria.blocks import Blocks
from shrinkmeta.mixed.criteria.families import Family
from shrinkmeta.mixed.criteria.laplace import Laplace

_STEP = 1e-5


class Predictive:
  """The criterion of a data set, as a function of x = (beta [P], theta [k])."""

  def __init__(self, blocks: Blocks, family: Family, seed: int):
    """Cut the groups of the finest factor in halves.

    Args:
      blocks: the data.
      family: of the response.
      seed: of the halves; the odd row of a group goes to either.
    """
    self.blocks, self.family, self.fixed = blocks, family, blocks.fixed.shape[1]
    self.unit, self.start = 1.0, np.zeros(self.fixed)
    self.log_weights = float(np.log(blocks.weights).sum())
    if family == "gaussian":
      root = np.sqrt(blocks.weights)
      y = blocks.response - blocks.offset
      x = blocks.fixed
      self.start = np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0]
      left = y - x @ self.start
      self.unit = float(np.sqrt(np.mean(np.square(left)))) or 1.0
      self.blocks = blocks._replace(response=left / self.unit, offset=np.zeros(len(y)))
    first = halves(blocks, seed)
    weighted = lambda half: self.blocks._replace(weights=blocks.weights * half)
    self.parts = [Laplace(weighted(half), family) for half in (first, ~first)]

  def eta(self, x: np.ndarray) -> list[np.ndarray]:
    """[N] from the modes of each half, for all rows."""
    return [part.mode(x[: self.fixed], x[self.fixed :]).eta for part in self.parts]

  def value(self, x: np.ndarray) -> float:
    """-l_PLL at (beta, theta); of a gaussian in units of `unit`, less `start`."""
    try:
      etas = self.eta(x)
    except np.linalg.LinAlgError:
      return np.inf
    others = self.parts[::-1]
    total = -sum(
      float(other.density.log_prob(eta).sum()) for other, eta in zip(others, etas, strict=True)
    )
    if self.family != "gaussian":
      return total
    n = len(self.blocks.response)  # the total is half the sum of squares
    return (n * np.log(2 * np.pi * 2 * total / n * self.unit**2) + n - self.log_weights) / 2

  def residual(self, x: np.ndarray) -> float:
    """s in the units of the data."""
    n = len(self.blocks.response)
    value = 2 * self.value(x) + self.log_weights - n
    return float(np.exp(value / (2 * n)) / np.sqrt(2 * np.pi))

  def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
    """-l_PLL and its gradient [P + k]."""
    gradient = np.empty(len(x))
    for i in range(len(x)):
      h = np.zeros(len(x))
      h[i] = _STEP * max(1.0, abs(x[i]))
      gradient[i] = (self.value(x + h) - self.value(x - h)) / (2 * h[i])
    return self.value(x), gradient


def halves(blocks: Blocks, seed: int) -> np.ndarray:
  """The rows of one half of every group of the finest factor, drawn at random.

  Args:
    blocks: the data.
    seed: of the draw.

  Returns:
    [N] bool, sorted as the rows of the blocks.
  """
  rng = np.random.default_rng(seed)
  rows = len(blocks.response)
  of_row = blocks.levels[-1].of_row if blocks.levels else np.zeros(rows, int)
  starts = blocks.levels[-1].starts if blocks.levels else np.zeros(1, int)
  order = np.lexsort((rng.random(rows), of_row))
  place = np.empty(rows, int)
  place[order] = np.arange(rows)
  size = np.diff(np.append(starts, rows))
  odd = rng.integers(0, 2, len(size)) * (size % 2)
  return place - starts[of_row] < (size // 2 + odd)[of_row]
