"""The log densities of the response given the linear predictor eta, with their derivatives."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import scipy.special

from shrinkmeta.mixed.criteria.blocks import Blocks

Family = Literal["gaussian", "logistic", "poisson"]


class Density(NamedTuple):
  """The log density log p(y given eta) of every row, with derivatives for Newton's method.

  Attributes:
    log_prob: eta [N] -> log p [N], with the constants that `density` states.
    slopes: eta [N] -> (s, w, w'). s is the score d log p / d eta, w is -d^2 log p / d eta^2, and w'
      is the derivative of w.
    start: [N], values of eta near the data, from which to start.
  """

  log_prob: Callable[[np.ndarray], np.ndarray]
  slopes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
  start: np.ndarray


def density(blocks: Blocks, family: Family) -> Density:
  """Return the log density of the response, as a function of eta.

      logistic: y ~ Binomial(n, 1 / (1 + exp(-eta))),   n = 1 where there are no trials
      poisson:  y ~ Poisson(exp eta)
      gaussian: log p = -(y - eta)^2 / 2

  The gaussian log density has no constant, and its residual standard deviation is 1. The other two
  include all constants. The weight of a row multiplies its log density.

  Args:
    blocks: the data.
    family: the family of the response.

  Returns:
    The log density and its derivatives.
  """
  y, n, weights = blocks.response, blocks.trials, blocks.weights
  if family == "gaussian":
    log_normal = lambda eta: -0.5 * weights * np.square(y - eta)
    return Density(log_normal, lambda eta: (weights * (y - eta), weights, np.zeros_like(y)), y)
  if family == "logistic":
    constant = scipy.special.gammaln(n + 1) - scipy.special.gammaln(y + 1)
    constant -= scipy.special.gammaln(n - y + 1)

    def log_prob(eta: np.ndarray) -> np.ndarray:
      return weights * (y * eta - n * np.logaddexp(0.0, eta) + constant)

    def slopes(eta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
      mean = scipy.special.expit(eta)
      w = weights * n * mean * scipy.special.expit(-eta)
      return weights * (y - n * mean), w, w * (1 - 2 * mean)

    return Density(log_prob, slopes, np.log((y + 0.5) / (n - y + 0.5)))
  # Less their values at eta = log y, the terms of a large count are small enough to be added.
  log_y = np.log(np.maximum(y, 1.0))
  constant = y * log_y - y - scipy.special.gammaln(y + 1)

  def log_rate(eta: np.ndarray) -> np.ndarray:
    rate = np.exp(np.minimum(eta, 700.0))  # finite, for rows of weight 0
    return weights * (y * (eta - log_y) - (rate - y) + constant)

  def slopes_of_rate(eta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    w = weights * np.exp(np.minimum(eta, 700.0))
    return weights * y - w, w, w

  return Density(log_rate, slopes_of_rate, np.log(y + 0.5))
