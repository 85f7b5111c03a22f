"""Does the search find the best optimum? A comparison with 30 starts on simulated designs.

    python -m experiments.mixed.study_starts --designs=300

Designs of `y ~ x + (x || g)`, `y ~ x + (x | g)` and `y ~ x + (1 | g) + (0 + x | g) + (0 + w | g)`:
there are 2 to 20 groups of 2 to 10 rows. x has several units, and sometimes a distant origin.
Standard deviations range from 0 to far above the noise. Fits are by maximum likelihood or by
restricted likelihood. The reference computes the profiled likelihood from one dense covariance
matrix of all rows. It takes the best of 30 runs of L-BFGS from random starts.

The command prints the fits that lie more than 0.001 nats below the reference, and their number.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import scipy.optimize
from absl import app

from experiments.mixed import study
from experiments.mixed.study import ONE, Reference, Simulated
from experiments.settings import flags as shared
from shrinkmeta import mixed

_SETTINGS = study.define(designs=300, starts=30)
ESTIMATORS: tuple[mixed.Estimator, ...] = ("ml", "reml")
KINDS = ("independent", "correlated", "three")
_LOWEST, _HIGHEST = -7.0, 10.0  # of log relative standard deviations in the reference


def draw(seed: int, number: int) -> Simulated:
  """Return design `number` of a seed."""
  rng = np.random.default_rng((seed, number))
  groups = int(rng.integers(2, 21))
  sizes = rng.integers(2, 11, groups)
  g = np.repeat(np.arange(groups), sizes)
  rows = len(g)
  origin, unit = rng.choice([0.0, 3.0, 14.0, 100.0]), rng.choice([1e-3, 1.0, 1e3])
  steps = np.concatenate([np.arange(size) for size in sizes])
  x = origin + (steps if rng.random() < 0.5 else 3 * rng.random(rows))
  w = rng.normal(size=rows)
  size = lambda: rng.choice([0.0, *10 ** rng.uniform(-1, 2.5, 3)])
  level, slope, third = size(), size(), size()
  u = rng.normal(size=(3, groups))
  noise = 10 ** rng.uniform(-2, 2)
  middle = origin if rng.random() < 0.5 else 0.0  # where levels and slopes are independent
  y = 1 + 0.5 * x + level * u[0][g] + slope * u[1][g] * (x - middle) + third * u[2][g] * w
  y = noise * (y + rng.normal(size=rows))
  kind = KINDS[number % len(KINDS)]
  one = np.ones(rows)
  columns = {ONE: one, "x": x * unit, "w": w}
  names = [[ONE, "x"]] if kind == "correlated" else [[ONE], ["x"]]
  names += [["w"]] if kind == "three" else []
  terms = study.random_terms(g, columns, names)
  fixed = np.stack([one, x * unit], 1)
  design = mixed.Design(y, "y", fixed, (ONE, "x"), terms, np.zeros(rows))
  about = (
    f"{groups} groups, {rows} rows, x from {origin:g} by {unit:g}, sds {level:.3g} {slope:.3g}"
  )
  estimator = ESTIMATORS[number // len(KINDS) % 2]
  return Simulated(design, "gaussian", estimator, kind, about)


def reference(simulated: Simulated, starts: int, seed: int) -> Reference:
  """Return the highest log likelihood, or restricted log likelihood, of `starts` searches."""
  design, reml = simulated.design, simulated.estimator == "reml"
  g = design.random[0].index
  columns = np.concatenate([term.columns for term in design.random], 1)
  scale = np.sqrt(np.mean(np.square(columns), 0))
  same = (g[:, None] == g).astype(float)
  products = [np.outer(z, z) * same for z in (columns / scale).T]
  cross = np.outer(columns[:, 0] / scale[0], columns[:, 1] / scale[1]) * same
  cross = cross + cross.T  # of a correlated term
  x, y = design.fixed, design.response
  n, p = x.shape
  basis = np.linalg.qr(np.stack([x[:, 0], x[:, 1] - x[:, 1].mean()], 1))
  units = np.linalg.slogdet(basis[1])[1]
  q, freedom = basis[0], n - p if reml else n
  unit = float(np.std(y - q @ (q.T @ y)))

  def value(v: np.ndarray) -> float:
    """-log L at (log sd_1, log sd_2, log sd_3 or atanh correlation)."""
    sds = np.exp(v[: len(products)])
    total = np.eye(n) + sum(s**2 * m for s, m in zip(sds, products, strict=True))
    if simulated.kind == "correlated":
      total = total + np.tanh(v[2]) * sds[0] * sds[1] * cross
    try:
      factor = np.linalg.cholesky(total)
    except np.linalg.LinAlgError:
      return 1e10
    solved = scipy.linalg.solve_triangular(factor, np.column_stack([q, y / unit]), lower=True)
    qx, r = np.linalg.qr(solved[:, :p])
    left = solved[:, p] - qx @ (qx.T @ solved[:, p])
    found = 2 * np.log(np.diag(factor)).sum()
    found += freedom * (1 + np.log(2 * np.pi * unit**2 * (left @ left) / freedom))
    if reml:
      found += 2 * np.log(np.abs(np.diag(r))).sum() + 2 * units
    return found / 2

  rng = np.random.default_rng(seed)
  sds = rng.uniform(-4, 8, (starts, len(products)))
  points = np.column_stack([sds, rng.normal(size=starts)] if len(products) == 2 else [sds])
  if simulated.kind == "independent":
    points = sds
  bounds = [(_LOWEST, _HIGHEST)] * len(products)
  bounds += [(-6.0, 6.0)] if simulated.kind == "correlated" else []
  run = lambda point: scipy.optimize.minimize(value, point, method="L-BFGS-B", bounds=bounds).fun
  return Reference(-min(map(run, points)))


def main(argv: Sequence[str]) -> None:
  """Fit every design, and compare."""
  shared.no_arguments(argv)
  study.compare(_SETTINGS, draw, reference)


if __name__ == "__main__":
  app.run(main)
