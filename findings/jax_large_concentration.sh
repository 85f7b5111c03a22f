#!/usr/bin/env bash
# A reasonable guess: as its concentration grows, the beta-binomial becomes the binomial, the
# negative binomial becomes the Poisson and Student's t becomes the normal, in JAX as in SciPy.
#
# What happens: in float32 they become noise. The probabilities of 0, 1, ..., 10 under a
# beta-binomial of mean 0.5 sum to 1.006 at a concentration of 1e5, to 1.06 at 1e6, to 330 at 1e7
# and to 2e30 at 1e8, where one log-probability is +69. Differences of log-gamma functions cancel.
# Nothing is NaN or infinite. On 200 tasks that do not differ at all, SciPy's log-likelihood is -444
# at a concentration of 100 and -445 from 4000 on. That of float32 is -459 at 3e5, and best at 3e7,
# where it is +2781. float64 is right.
#
# Versions: jax and jaxlib 0.10.2, numpyro 0.22.0, CPU backend. Two public threads say that gammaln
# cancels in float32: one of 2020 about numpyro's GammaPoisson, which is its negative binomial, at
# small rates, and a review of jax.scipy.stats.binom. Stan has open and closed reports of the same
# limits. We found none for JAX's beta-binomial and t, and no word in the documentation.
#
# Why it matters in meta-learning with JAX: these are the closed-form hierarchical models of counts,
# and a concentration of infinity means that tasks do not differ, as sigma = 0 does. An optimizer
# that pools the tasks walks there, and meets a surface of rounding errors: a wrong optimum, and
# likelihood ratios of thousands of nats in favour of it.
#
# What to do: compute such likelihoods in float64, or bound the concentration at 1e4 and compare
# with the limit itself. shrinkmeta has no likelihood of these families; yours may.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpyro==0.22.0 numpy==2.4.6 scipy==1.17.1
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import warnings

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import scipy.stats
from jax.scipy import stats

print("jax", jax.__version__, "numpyro", numpyro.__version__)
warnings.simplefilter("error")
successes, counts, real = np.arange(11), np.arange(100), np.linspace(-12, 12, 2401)


def total(log_p, width=1.0):
  """Return the sum of the probabilities, in float64."""
  log_p = np.asarray(log_p, np.float64)
  assert np.isfinite(log_p).all()
  return float(np.exp(log_p).sum() * width)


families = {
  "beta-binomial": {
    "scipy": lambda c: total(scipy.stats.betabinom.logpmf(successes, 10, c / 2, c / 2)),
    "jax": lambda c: total(stats.betabinom.logpmf(successes, 10, c / 2, c / 2)),
    "numpyro": lambda c: total(dist.BetaBinomial(c / 2, c / 2, 10).log_prob(successes)),
  },
  "negative binomial": {
    "scipy": lambda c: total(scipy.stats.nbinom.logpmf(counts, c, c / (c + 3))),
    "jax": lambda c: total(stats.nbinom.logpmf(counts, c, c / (c + 3))),
    "numpyro": lambda c: total(dist.NegativeBinomial2(3.0, c).log_prob(counts)),
  },
  "Student's t": {
    "scipy": lambda c: total(scipy.stats.t.logpdf(real, c), 0.01),
    "jax": lambda c: total(stats.t.logpdf(real, c), 0.01),
    "numpyro": lambda c: total(dist.StudentT(c, 0.0, 1.0).log_prob(real), 0.01),
  },
}
concentrations = (1e2, 1e4, 1e5, 1e6, 1e7, 1e8)
print("sum of all probabilities".ljust(28), *(f"{c:8.0e}" for c in concentrations))
sums = {}
for family, libraries in families.items():
  for library, f in libraries.items():
    sums[family, library] = [f(c) for c in concentrations]
    print(f"{family:18}{library:10}", *(f"{s:8.3g}" for s in sums[family, library]))
largest = float(stats.betabinom.logpmf(successes, 10, 5e7, 5e7).max())
print(f"largest log-probability of the beta-binomial at 1e8: {largest:.1f}")

tasks = np.random.default_rng(0).binomial(20, 0.3, 200)
grid = np.geomspace(10, 1e8, 43)
exact = [scipy.stats.betabinom.logpmf(tasks, 20, 0.3 * c, 0.7 * c).sum() for c in grid]
single = [float(stats.betabinom.logpmf(tasks, 20, 0.3 * c, 0.7 * c).sum()) for c in grid]
with jax.enable_x64(True):
  double = [float(stats.betabinom.logpmf(tasks, 20, 0.3 * c, 0.7 * c).sum()) for c in grid]
print("200 equal tasks of 20 trials: concentration, log-likelihood of scipy, of jax, of jax in x64")
for row in list(zip(grid, exact, single, double, strict=True))[::3]:
  print("{:10.0f} {:10.1f} {:10.1f} {:10.1f}".format(*row))
print(f"best concentration in float32: {grid[np.argmax(single)]:.1e}")

for (family, library), values in sums.items():
  error = np.abs(np.log(values))
  assert error[:2].max() < 0.01, f"changed: {family}, {library}, small concentrations"
  if library == "scipy":
    assert error.max() < 1e-5, f"changed: {family}, scipy"
  else:
    assert error.max() > 0.5, f"changed: {family}, {library}, large concentrations"
assert largest > 1, "changed: a log-probability above 0"
assert max(single) > max(exact) + 20, "changed: a false optimum"
assert np.allclose(double, exact, rtol=1e-4), "changed: float64"
END
