"""Satterthwaite's degrees of freedom of the fixed effects of a linear mixed model.

    df = 2 v^2 / (g'A g),   v = Var(beta^_j) at given variances,   g = dv / dx,   A = Cov(x^)

x holds the variance parameters: the entries of Lambda, and log s. The residual variance is s^2, and
the covariance of the random effects is s^2 Lambda Lambda'. A is the inverse of the observed
information of x. In balanced designs, df by REML equals the degrees of freedom of the analysis of
variance. By maximum likelihood df is larger, because the estimates of the variances do not allow
for the estimation of the fixed effects. df of the mean of G groups is G - 1 by REML, and G by
maximum likelihood.

References:
  Satterthwaite (1946). An approximate distribution of estimates of variance components. Biometrics
  Bulletin 2(6).
  Kuznetsova, Brockhoff, Christensen (2017). lmerTest package: tests in linear mixed effects models.
  Journal of Statistical Software 82(13).
"""

import numpy as np

from shrinkmeta.formulas.design import Design
from shrinkmeta.mixed import estimates
from shrinkmeta.mixed.criteria import search
from shrinkmeta.mixed.criteria.blocks import blocks
from shrinkmeta.mixed.criteria.gaussian import Gaussian
from shrinkmeta.mixed.result import Fit

_STEP = 1e-4


def degrees_of_freedom(fit: Fit, design: Design) -> np.ndarray:
  """Compute Satterthwaite's degrees of freedom of every fixed effect.

  Args:
    fit: a fit of a gaussian response by "ml" or "reml".
    design: the design of this fit.

  Returns:
    The degrees of freedom [P]. They are nan if the data do not determine the variances.

  >>> from shrinkmeta.formulas.build import design
  >>> from shrinkmeta.mixed.fit import fit
  >>> made = design("y ~ (1 | g)", {"y": [1, 2, 3, 3, 7, 8.0], "g": list("aabbcc")})
  >>> degrees_of_freedom(fit(made, "gaussian", "reml"), made).round(3)
  array([2.])
  """
  assert fit.residual is not None
  data = blocks(design)
  criterion = Gaussian(data, fit.estimator == "reml")
  theta = estimates.theta_of(data, fit.covariances, fit.residual)
  x = np.append(theta, np.log(fit.residual))
  free = np.append(theta != 0, True)

  def objective(y: np.ndarray) -> tuple[float, np.ndarray]:
    found = criterion.profile(y[:-1], y[-1])
    return found.value, np.append(found.gradient, criterion.freedom - found.squares)

  def variances(y: np.ndarray) -> np.ndarray:
    cross = criterion.profile(y[:-1], y[-1]).cross
    return np.exp(2 * y[-1]) * np.diag(data.back @ np.linalg.inv(cross) @ data.back.T)

  hessian = search.differences(search.held(objective, x, free), x[free])
  scale = np.append(estimates.sizes(data, theta), 1.0)[free]
  covariance, flat = estimates.inverse(hessian, scale)
  if len(flat):
    return np.full(len(design.fixed_names), np.nan)
  slopes = []
  for i in np.flatnonzero(free):
    h = np.zeros(len(x))
    h[i] = _STEP * max(1.0, abs(x[i]))
    slopes.append((variances(x + h) - variances(x - h)) / (2 * h[i]))
  g = np.stack(slopes)  # [k, P]
  spread = np.einsum("ij,ik,kj->j", g, covariance, g)
  with np.errstate(divide="ignore"):
    return 2 * np.square(variances(x)) / spread
