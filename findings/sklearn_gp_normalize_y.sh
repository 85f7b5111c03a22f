#!/usr/bin/env bash
# A reasonable guess: alpha of GaussianProcessRegressor is the noise variance of y, whether or not
# normalize_y=True. The fit is then the same whatever the unit of y.
#
# What happens: alpha is added after y has been divided by its standard deviation, so it counts in
# units of the variance of y. With a noise of 0.5 and a signal of spread 30 the right alpha, 0.25,
# acts as a noise of 15: the error is six times as large and the error bars 22 times as wide. With
# the same data divided by 1000, alpha = 2.5e-7 acts as a noise of 1.5e-5 instead of 5e-4: the
# curve goes through every point, and a 95 % interval covers the truth in 5 % of the places. No
# warning appears.
#
# Versions: scikit-learn 1.9.1. The documentation calls alpha the variance of additional noise on
# the training observations, and says of normalize_y that predictions are scaled back. We found no
# issue of scikit-learn about the two together; one of a package built upon it explains the scaling.
#
# Why it matters in meta-learning with JAX: a Gaussian process of each task is the usual exact
# reference on sines and other regression tasks, and noise is known there. Each task has another
# spread, so normalize_y=True gives each another noise. The reference looks beaten where tasks are
# large, and overconfident where they are small.
#
# What to do: pass alpha = noise variance / y.var(), or standardise y once for all tasks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import warnings

import numpy as np
import sklearn
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

print("scikit-learn", sklearn.__version__)
warnings.simplefilter("error")
random = np.random.default_rng(0)
x = np.sort(random.uniform(0, 10, 60))[:, None]
signal = 50 * np.sin(x[:, 0])
noise = 0.5 * random.normal(size=60)
grid = np.linspace(0.5, 9.5, 181)[:, None]


def fit(unit, alpha_of, normalize_y):
  """Return error, width and coverage, in the unit of the signal, with the same prior."""
  y, truth = unit * (signal + noise), unit * 50 * np.sin(grid[:, 0])
  prior = ConstantKernel(1.0 if normalize_y else y.var()) * RBF(1.0)
  shift = 0.0 if normalize_y else y.mean()
  model = GaussianProcessRegressor(
    prior, alpha=alpha_of(y, unit), normalize_y=normalize_y, optimizer=None
  )
  mean, scale = model.fit(x, y - shift).predict(grid, return_std=True)
  error = mean + shift - truth
  covered = np.abs(error) < 1.96 * scale
  return np.sqrt(np.mean(error**2)) / unit, scale.mean() / unit, covered.mean()


def variance(y, unit):
  return (0.5 * unit) ** 2


def relative(y, unit):
  return (0.5 * unit) ** 2 / y.var()


ways = {
  "y as it is": (variance, False),
  "normalize_y": (variance, True),
  "normalize_y, alpha / y.var()": (relative, True),
}
found = {}
print(f"spread of y: {signal.std():.1f}, noise: 0.5; all in the unit of the signal")
for unit in (1.0, 1e-3):
  for way, (alpha_of, normalize_y) in ways.items():
    found[unit, way] = row = fit(unit, alpha_of, normalize_y)
    print(
      "y times {:5g}, {:29} error {:.3f}, width {:.4f}, coverage {:.2f}".format(unit, way, *row)
    )

exact = found[1.0, "y as it is"]
assert exact[2] > 0.8, "changed: the exact fit"
for (unit, way), row in found.items():
  if way != "normalize_y":
    assert np.allclose(row, exact, rtol=0.01), f"changed: {way}, unit {unit:g}"
wide, narrow = found[1.0, "normalize_y"], found[1e-3, "normalize_y"]
assert wide[0] > 2 * exact[0] and wide[1] > 5 * exact[1], "changed: a large spread"
assert narrow[1] < 0.5 * exact[1] and narrow[2] < 0.7, "changed: a small spread"
END
