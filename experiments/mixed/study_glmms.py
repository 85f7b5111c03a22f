"""Does the search find the best optimum of Laplace's likelihood? Simulated counts and successes.

    python -m experiments.mixed.study_glmms --designs=500

Designs of `y ~ x + (1 | g)`, `y ~ x + (x || g)` and `y ~ x + (x | g)`, logistic (0 or 1, or
successes of 1 to 20 trials) and Poisson (half of them with an exposure): 5 to 60 groups of 2 to 30
rows, of one size or of many, x with and without a distant origin, standard deviations of 0.3 to 6.

The reference is Laplace's approximation as glmmTMB maximises it: fixed effects, log standard
deviations and the correlation together, by the best of ten runs of L-BFGS from random starts.

A maximum counts as one at infinity if the fixed columns separate the responses, which a linear
program finds, or if a standard deviation of the reference ends at its upper bound, e^8. The fit has
to name what is not determined there, or to say that it did not converge.

Prints how many nats each fit lies below the reference, where that is more than 0.001, and a count.
"""

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
from absl import app

from experiments.mixed import study
from experiments.mixed.reference import Laplace, separated
from experiments.mixed.study import ONE, Reference, Simulated
from experiments.settings import flags as shared
from shrinkmeta import mixed

_SETTINGS = study.define(designs=500, starts=10)
FAMILIES: tuple[mixed.Family, ...] = ("logistic", "poisson")
KINDS = ("intercept", "independent", "correlated")
_LOWEST, _HIGHEST = -9.0, 8.0  # of log standard deviations in the reference
_MOST_FIXED = 30.0  # of fixed effects in the reference
_MOST_ETA = 15.0  # of simulated rows: counts of 3 million


def draw(seed: int, number: int) -> Simulated:
  """Design `number` of a seed."""
  rng = np.random.default_rng((seed, number))
  family, kind = FAMILIES[number % 2], KINDS[number // 2 % len(KINDS)]
  groups = int(rng.integers(5, 61))
  balanced = rng.random() < 0.5
  sizes = np.full(groups, rng.integers(2, 31)) if balanced else rng.integers(2, 31, groups)
  g = np.repeat(np.arange(groups), sizes)
  rows = len(g)
  origin = rng.choice([0.0, 0.0, 3.0])
  x = origin + rng.normal(size=rows)
  level, slope = np.exp(rng.uniform(np.log(0.3), np.log(6.0), 2))
  slope = 0.0 if kind == "intercept" else slope
  correlation = rng.uniform(-0.9, 0.9) if kind == "correlated" else 0.0
  more = bool(rng.random() < 0.5)  # trials, or an exposure
  trials = rng.integers(1, 21, rows).astype(float) if more and family == "logistic" else None
  exposure = np.exp(rng.uniform(-2, 4, rows)) if more and family == "poisson" else np.ones(rows)
  fixed = rng.normal(size=2)
  while True:  # a response that is the same in all rows is an error, and is drawn again
    u = rng.normal(size=(2, groups))
    v = correlation * u[0] + np.sqrt(1 - correlation**2) * u[1]
    eta = fixed[0] + level * u[0][g] + (fixed[1] + slope * v[g]) * (x - origin)
    eta = np.minimum(eta + np.log(exposure), _MOST_ETA)
    if family == "poisson":
      y = rng.poisson(np.exp(eta)).astype(float)
      constant = not y.any()
    else:
      most = np.ones(rows) if trials is None else trials
      y = rng.binomial(most.astype(int), scipy.special.expit(eta)).astype(float)
      constant = not y.any() or bool((y == most).all())
    if not constant:
      break
  columns = {ONE: np.ones(rows), "x": x}
  names = {"intercept": [[ONE]], "independent": [[ONE], ["x"]], "correlated": [[ONE, "x"]]}[kind]
  terms = study.random_terms(g, columns, names)
  both = np.stack([columns[ONE], x], 1)
  design = mixed.Design(y, "y", both, (ONE, "x"), terms, np.log(exposure), trials=trials)
  response = family if not more else "successes of trials" if trials is not None else "rates"
  about = (
    f"{response}, {groups} groups of {sizes.min()} to {sizes.max()}, x from {origin:g}, sds "
    f"{level:.3g} {slope:.3g}"
  )
  return Simulated(design, family, "ml", kind, about)


def reference(simulated: Simulated, starts: int, seed: int) -> Reference:
  """The highest of `starts` searches."""
  laplace = Laplace(simulated.design, simulated.family, simulated.kind == "correlated")
  rng = np.random.default_rng(seed)
  mean = (laplace.y.sum() + 0.5) / (np.sum(laplace.trials * np.exp(laplace.offset)) + 1)
  crude = np.log(mean) if laplace.poisson else scipy.special.logit(mean)
  bounds = [(-_MOST_FIXED, _MOST_FIXED)] * 2 + [(_LOWEST, _HIGHEST)] * laplace.sds
  bounds += [(-8.0, 8.0)] * (laplace.size - len(bounds))
  best, end = np.inf, np.zeros(laplace.size)
  for _ in range(starts):
    point = rng.normal(size=laplace.size)
    point[0] += crude
    point[2 : 2 + laplace.sds] = rng.uniform(-3, 3, laplace.sds)
    laplace.b = np.zeros_like(laplace.b)
    found = scipy.optimize.minimize(
      laplace, point, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12}
    )
    if found.fun < best:
      best, end = found.fun, found.x
  outside = bool((end[2 : 2 + laplace.sds] > _HIGHEST - 1e-3).any())
  return Reference(-best, outside or separated(simulated.design, laplace.poisson))


def main(argv: Sequence[str]) -> None:
  """Fit every design, and compare."""
  shared.no_arguments(argv)
  study.compare(_SETTINGS, draw, reference)


if __name__ == "__main__":
  app.run(main)
