#!/usr/bin/env bash
# A reasonable guess: draws of jax.random.wald, the inverse Gaussian distribution, are positive and
# have the distribution of numpy's wald, up to the rounding of float32.
#
# What happens: for a large mean many are negative: 0.4 % at a mean of 1000 and 17 % at 10,000.
# Others are 0. The median at 10,000 is 3.6 instead of 2.2. At a mean of 1 or 100 the draws are
# right. Two large numbers are subtracted. A shape other than 1 is a scaling, so what counts is mean
# / shape.
#
# Versions: jax and jaxlib 0.10.2, numpy 2.4.6, CPU backend. The docstring of jax.random.wald names
# the whole real line as the domain of the density. NumPy repaired the same formula in 2025, where
# it failed from 1e8 on in float64. We found no report for JAX.
#
# Why it matters in meta-learning with JAX: the Bayesian lasso, a prior that shrinks coefficients
# over tasks, is sampled with such draws: the inverse variance of a coefficient b has a mean over
# shape of sigma / (lambda |b|), which is large exactly for the coefficients that are near 0. The
# variances become negative. Below nothing is NaN, and the sampler goes on. A square root or a
# logarithm of such a draw is NaN.
#
# What to do: draw in float64, where the same begins near 1e8, or clip the mean at 100 times the
# shape. shrinkmeta makes no such draws.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 scipy==1.17.1
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import warnings

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
warnings.simplefilter("error")
key, rng, n = jax.random.key(0), np.random.default_rng(0), 100_000
found = {}
print("   mean            draws <= 0   1 %, 10 % and 50 % quantiles")
for mean in (1.0, 100.0, 1e3, 1e4, 1e5):
  draws = {"numpy": rng.wald(mean, 1.0, n), "float32": jax.random.wald(key, mean, (n,))}
  with jax.enable_x64(True):
    draws["float64"] = jax.random.wald(key, mean, (n,), dtype=jnp.float64)
  for name, x in draws.items():
    x = np.asarray(x)
    found[mean, name] = (x <= 0).mean(), *np.quantile(x, [0.01, 0.1, 0.5])
    share, *rest = found[mean, name]
    print(f"{mean:8.0f} {name:8} {share:12.5f}  ", np.round(rest, 3))

# The scales of a Bayesian lasso: 1 / tau^2 has mean sigma * lambda / |b| and shape lambda^2.
sigma, penalty = 1.0, 1.0
print("coefficient b, share of draws of tau^2 that are not positive")
share = {}
for b in (1.0, 1e-2, 1e-3, 1e-4):
  ratio = sigma / (penalty * b)
  inverse = penalty**2 * jax.random.wald(key, jnp.full(n, ratio))
  share[b] = float((inverse <= 0).mean())
  print(f"  {b:6} {share[b]:.4f}")

for (mean, name), (low, *quantiles) in found.items():
  if name != "float32":
    assert low == 0, f"changed: {mean} {name}"
    assert np.allclose(quantiles, found[mean, "numpy"][1:], rtol=0.05), f"changed: {mean} {name}"
assert found[100.0, "float32"][0] == 0, "changed: a mean of 100"
assert 0.001 < found[1e3, "float32"][0] < 0.02, "changed: a mean of 1000"
assert found[1e4, "float32"][0] > 0.1, "changed: a mean of 10,000"
assert found[1e4, "float32"][3] > 3, "changed: the median at 10,000"
assert share[1e-2] == 0 and share[1e-4] > 0.1, "changed: the lasso"
END
