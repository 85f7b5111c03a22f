"""Laplace's likelihood of a generalised linear mixed model, written apart from the library.

    log L = sum_g [log p(y_g given b_g) - b_g' P b_g / 2 + log det P / 2 - log det H_g / 2]

at the mode of every group's effects b_g, with P = Sigma^-1 and H_g = P + Z_g' W Z_g there. Fixed
effects and log standard deviations are its arguments together, and all constants of log p are in
it, as in glmmTMB. The library works with u = Lambda^-1 b instead, in scaled and sorted columns.
"""

import numpy as np
import scipy.optimize
import scipy.special

from shrinkmeta import mixed

_MOST_STEPS = 300  # of Newton's method; far above the mode of a Poisson rate it steps by 1 of eta
_CLOSE = 1e-10  # the last Newton step of a mode, relative to the effects
_GAIN = 1e-16  # or what it promises in nats: where effects are large, their rounding is larger


class Laplace:
  """-log L and its gradient at v = (beta [2], log standard deviations [q], atanh correlation).

  Groups stand together in the rows. beta belongs to the intercept and to x less its mean.

  With s the score of a row, w its weight and w' the derivative of w by eta, K = H^-1,
  t_i = z_i' K z_i w'_i / 2 and a = K Z't of a group,

      d(-log L) / d beta  = X' (t - s - w Z a)
      d(-log L) / d Sigma = sum_g [P - P (b b' + K - a b' - b a') P] / 2,   P = Sigma^-1
  """

  def __init__(self, design: mixed.Design, family: mixed.Family, correlated: bool):
    """Take the arrays of a design whose random terms have one factor and at most two columns."""
    self.poisson = family == "poisson"
    self.y, self.offset = design.response, design.offset
    self.trials = np.ones(len(self.y)) if design.trials is None else design.trials
    self.x = design.fixed - [0.0, design.fixed[:, 1].mean()]
    self.z = np.concatenate([term.columns for term in design.random], 1)
    self.g = design.random[0].index
    self.starts = np.flatnonzero(np.diff(self.g, prepend=-1))
    self.sds = self.z.shape[1]
    self.size = 2 + self.sds + correlated
    self.b = np.zeros((len(self.starts), self.sds))

  def covariance(self, v: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Sigma [q, q], and its derivatives by the entries of v behind beta."""
    sds = np.exp(v[2 : 2 + self.sds])
    correlation = np.eye(self.sds)
    rho = np.tanh(v[-1]) if self.size > 2 + self.sds else 0.0
    if self.sds == 2:
      correlation[0, 1] = correlation[1, 0] = rho
    sigma = correlation * np.outer(sds, sds)
    units = np.eye(self.sds)
    slopes = [sigma * (unit[:, None] + unit) for unit in units]
    if self.size > 2 + self.sds:
      slopes.append((1 - rho**2) * np.outer(sds, sds) * (1 - units))
    return sigma, slopes

  def log_prob(self, eta: np.ndarray) -> float:
    """The log probability of all rows."""
    y, n = self.y, self.trials
    if self.poisson:
      log_y = np.log(np.maximum(y, 1.0))  # subtracted, so that large counts lose no digits
      rows = y * (eta - log_y) - np.exp(eta) + y * log_y - scipy.special.gammaln(y + 1)
    else:
      rows = y * eta - n * np.logaddexp(0, eta) - scipy.special.betaln(y + 1, n - y + 1)
      rows -= np.log(n + 1)
    return float(rows.sum())

  def slopes(self, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, weight and the derivative of the weight of every row."""
    if self.poisson:
      mean = np.exp(eta)
      return self.y - mean, mean, mean
    p, q = scipy.special.expit(eta), scipy.special.expit(-eta)
    weight = self.trials * p * q
    return self.y - self.trials * p, weight, weight * (q - p)

  def by_group(self, rows: np.ndarray) -> np.ndarray:
    """Sums over the rows of every group."""
    return np.add.reduceat(rows, self.starts)

  def hessian(self, weight: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """H [G, q, q]."""
    return self.by_group(weight[:, None, None] * self.z[:, :, None] * self.z[:, None]) + precision

  def mode(self, base: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """The modes b [G, q], by Newton's method.

    The third derivative of a row's log probability is at most its second. So a step that changes
    eta of a group's rows by r at most never fails to rise after it is shortened by log(1 + r) / r.
    """
    b = self.b
    for _ in range(_MOST_STEPS):
      eta = base + (self.z * b[self.g]).sum(1)
      score, weight, _ = self.slopes(eta)
      side = self.by_group(score[:, None] * self.z) - b @ precision
      step = np.linalg.solve(self.hessian(weight, precision), side[:, :, None])[:, :, 0]
      change = np.maximum.reduceat(np.abs((self.z * step[self.g]).sum(1)), self.starts)
      share = np.where(change > 1e-8, np.log1p(change) / np.maximum(change, 1e-8), 1.0)
      b = b + share[:, None] * step
      close = (np.abs(step) <= _CLOSE * (1 + np.abs(b))).all(1)
      if (close | ((side * step).sum(1) <= _GAIN)).all():
        self.b = b
        return b
    raise np.linalg.LinAlgError(f"No mode after {_MOST_STEPS} Newton steps.")

  def __call__(self, v: np.ndarray) -> tuple[float, np.ndarray]:
    """-log L and its gradient; 1e10 at a trial point whose modes are out of reach.

    Such a point has rates so large that a Hessian has no digits, or that Newton's steps are many.
    """
    try:
      return self._at(v)
    except np.linalg.LinAlgError:
      return 1e10, np.zeros(self.size)

  def _at(self, v: np.ndarray) -> tuple[float, np.ndarray]:
    sigma, slopes = self.covariance(v)
    precision = np.linalg.inv(sigma)
    base = self.offset + self.x @ v[:2]
    b = self.mode(base, precision)
    eta = base + (self.z * b[self.g]).sum(1)
    score, weight, change = self.slopes(eta)
    hessian = self.hessian(weight, precision)
    value = 0.5 * (np.sum(b @ precision * b) + np.linalg.slogdet(hessian)[1].sum())
    value += 0.5 * len(b) * np.linalg.slogdet(sigma)[1] - self.log_prob(eta)
    inverse = np.linalg.inv(hessian)
    t = 0.5 * change * np.einsum("ni,nij,nj->n", self.z, inverse[self.g], self.z)
    a = (inverse @ self.by_group(t[:, None] * self.z)[:, :, None])[:, :, 0]
    fixed = self.x.T @ (t - score - weight * (self.z * a[self.g]).sum(1))
    inner = 0.5 * (b.T @ b + inverse.sum(0) - a.T @ b - b.T @ a)
    of_sigma = precision @ (0.5 * len(b) * sigma - inner) @ precision
    return value, np.append(fixed, [np.sum(of_sigma * slope) for slope in slopes])


def separated(design: mixed.Design, poisson: bool) -> bool:
  """Whether a change of the fixed effects without end makes the responses ever more probable."""
  y, x = design.response, design.fixed
  most = np.full(len(y), np.inf) if poisson else 1.0 if design.trials is None else design.trials
  low, high = y == 0, y == most
  inside = ~low & ~high
  signed = np.concatenate([-x[low], x[high]])  # of these rows eta may rise, or fall, without end
  if not len(signed):
    return False
  found = scipy.optimize.linprog(
    -signed.sum(0),
    A_ub=-signed,
    b_ub=np.zeros(len(signed)),
    A_eq=x[inside] if inside.any() else None,
    b_eq=np.zeros(inside.sum()) if inside.any() else None,
    bounds=[(-1, 1)] * x.shape[1],
  )
  return -found.fun > 1e-6
