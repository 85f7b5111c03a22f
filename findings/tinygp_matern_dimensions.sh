#!/usr/bin/env bash
# A reasonable guess: Matern32 and Matern52 of tinygp are the Matérn kernels, as in scikit-learn and
# GPyTorch. Whatever their distance, they are covariance functions.
#
# What happens: with one feature they are. With more, the default distance is the sum of absolute
# differences, and the result is not a covariance function. Of 100 points in a square, the matrix of
# Matern52 has 38 negative eigenvalues in float64, down to -0.19, and that of Matern32 has 27. The
# log-likelihood is -inf wherever the noise does not hide them, as if the data were impossible. So a
# fit of the noise to a smooth function with noise of variance 0.01 chooses 0.3 and no error shows.
# Where the log-likelihood is finite it depends on the axes: a rotation of the inputs changes it.
# Exp has the same distance and is a covariance function; ExpSquared has the usual distance. So a
# change from ExpSquared to Matern52 changes the geometry as well.
#
# The reason: put s_i = (w_i^2 - a^2) / (w_i^2 + a^2) for the frequencies w. The transform of
# Matern32 has the sign of 1 - sum(s). It is negative at high frequencies for two or more features.
# That of Matern52 is negative in places, too.
#
# Versions: tinygp 0.3.1, jax 0.10.2, scikit-learn 1.9.1. The docstrings state the distance. Two
# open reports show a NaN and a difference from scikit-learn; one calls it numerically unstable. We
# found no word that the function is not a kernel.
#
# Why it matters in meta-learning with JAX: a Gaussian process is the usual baseline for few-shot
# regression, and its hyperparameters are learnt over tasks. Few, scattered points have a finite
# likelihood, many points have none. The optimum over tasks moves to where all are finite, which is
# much noise, and jitter only hides a negative variance.
#
# What to do: pass distance=tinygp.kernels.distance.L2Distance().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  tinygp==0.3.1 jax==0.10.2 jaxlib==0.10.2 equinox==0.13.8 numpy==2.4.6 scipy==1.17.1 \
  scikit-learn==1.9.1
cd "$folder"
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$folder/venv/bin/python" - <<'END'
import importlib.metadata

import numpy as np
from sklearn.gaussian_process.kernels import Matern
from tinygp import GaussianProcess, kernels
from tinygp.kernels.distance import L2Distance

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("tinygp", "jax", "scikit-learn")))
rng = np.random.default_rng(0)
y = rng.normal(size=100)
turn = np.array([[1, -1], [1, 1]]) / 2**0.5


def negative(matrix):
  """Return how many eigenvalues are negative, and the lowest."""
  values = np.linalg.eigvalsh(np.asarray(matrix))
  return int((values < -1e-6).sum()), values[0]


def log_p(kernel, x, noise):
  return float(GaussianProcess(kernel, x, diag=noise).log_probability(y))


print("100 points: features, negative eigenvalues and the lowest, the same of scikit-learn")
found = {}
for d in (1, 2, 3):
  x = rng.uniform(-2, 2, size=(100, d))
  for nu, kernel in ((1.5, kernels.Matern32), (2.5, kernels.Matern52)):
    name = kernel.__name__
    usual = Matern(nu=nu)(x)
    found[name, d] = negative(kernel()(x, x)), negative(usual)
    error = np.abs(np.asarray(kernel(distance=L2Distance())(x, x)) - usual).max()
    print(f"  {name} {d}  {found[name, d][0][0]:3} {found[name, d][0][1]:8.4f}", end="")
    print(f"  {found[name, d][1][0]:3} {found[name, d][1][1]:8.4f}  L2Distance: off {error:.0e}")
    assert error < 1e-9, "changed: the remedy"

x = rng.uniform(-2, 2, size=(100, 2))
exp = negative(kernels.Exp()(x, x))
print("Exp, two features:", *exp)
print("log-likelihood of noise, two features: variance, default, turned, L2Distance, turned")
usual = kernels.Matern52(distance=L2Distance())
table = {}
for noise in (0.01, 0.1, 1.0):
  pairs = [(kernel, z) for kernel in (kernels.Matern52(), usual) for z in (x, x @ turn)]
  table[noise] = [log_p(kernel, z, noise) for kernel, z in pairs]
  print(f"  {noise:5}", *(f"{value:10.3f}" for value in table[noise]))


x = rng.uniform(-2, 2, size=(100, 2))
y = np.sin(x[:, 0]) + np.cos(x[:, 1]) + 0.1 * rng.normal(size=100)
best = {}
print("a smooth function with noise of variance 0.01: log-likelihood by noise")
for name, kernel in (("default", kernels.Matern52()), ("L2", usual)):
  grid = {noise: log_p(kernel, x, noise) for noise in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}
  best[name] = max(grid, key=grid.get)
  print(f"  {name:8}", *(f"{n}: {v:.1f} " for n, v in grid.items()), "best:", best[name])

assert all(found[name, 1][0][0] == 0 for name in ("Matern32", "Matern52")), "changed: one feature"
assert all(found[key][0][1] < -0.05 for key in found if key[1] == 2), "changed: two features"
assert all(pair[1][0] == 0 for pair in found.values()), "changed: scikit-learn"
assert exp[0] == 0, "changed: Exp"
assert not np.isfinite(table[0.01][:2]).any(), "changed: the log-likelihood is finite"
assert np.isfinite(table[0.01][2:]).all(), "changed: L2Distance"
assert abs(table[1.0][0] - table[1.0][1]) > 0.5, "changed: the axes do not matter"
assert abs(table[1.0][2] - table[1.0][3]) < 1e-6, "changed: the axes matter with L2Distance"
assert best["L2"] <= 0.03 and best["default"] >= 0.1, "changed: the fitted noise"
END
