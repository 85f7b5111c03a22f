"""The predictive log-likelihood of one half of every group, given the other half.

    l_PLL(beta, theta, s) = log p(y_B given eta(b^(A))) + log p(y_A given eta(b^(B)))

The rows of every group are split into halves A and B. b^(A) is the mode of the random effects given
the rows of A. This is the objective l_PLL of the rest of the library, in which every random effect
is a module. For the gaussian family b^ depends only on Lambda and beta, and the best s^2 is the
mean of the squared errors. So s is profiled out.

The gradient is computed by central differences, because there are few parameters.
"""

import numpy as np

from shrinkmeta.mixed.criteria.blocks import Blocks
from shrinkmeta.mixed.criteria.families import Family
from shrinkmeta.mixed.criteria.laplace import Laplace

_STEP = 1e-5


class Predictive:
  """The predictive criterion of one data set, as a function of x = (beta [P], theta [k]).

  For the gaussian family, a least-squares fit without random effects is subtracted from the
  response, and the rest is divided by its root mean square. `start` [P] has the coefficients of
  this fit, and `unit` is the root mean square. The fixed effects are `start` + `unit` * beta.
  """

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
    """Return eta [N] of all rows twice: at the mode given half A, and at the mode given half B."""
    return [part.mode(x[: self.fixed], x[self.fixed :]).eta for part in self.parts]

  def value(self, x: np.ndarray) -> float:
    """Return -l_PLL at x = (beta, theta)."""
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
    """Return the best s of the gaussian family, in the units of the data."""
    n = len(self.blocks.response)
    value = 2 * self.value(x) + self.log_weights - n
    return float(np.exp(value / (2 * n)) / np.sqrt(2 * np.pi))

  def value_and_gradient(self, x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return -l_PLL and its gradient [P + k] at x."""
    gradient = np.empty(len(x))
    for i in range(len(x)):
      h = np.zeros(len(x))
      h[i] = _STEP * max(1.0, abs(x[i]))
      gradient[i] = (self.value(x + h) - self.value(x - h)) / (2 * h[i])
    return self.value(x), gradient


def halves(blocks: Blocks, seed: int) -> np.ndarray:
  """Draw at random one half of the rows of every group of the finest factor.

  Args:
    blocks: the data.
    seed: the seed of the draw.

  Returns:
    [N] bool, whether each sorted row is in the half.
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
