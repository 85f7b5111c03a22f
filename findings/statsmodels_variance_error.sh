#!/usr/bin/env bash
# A reasonable guess: the table of a MixedLM fit shows the variance between groups with its standard
# error, and result.params and result.bse hold the same two numbers.
#
# What happens: three scales. The coefficient of the table is the variance. params and bse hold the
# variance and its error divided by the residual variance. The error of the table is bse times the
# residual standard deviation, which is the error of nothing: it has the unit of y, and a variance
# has the unit of y squared. With y in metres the fit below says 2.9e-4 +- 2.6e-3, in centimetres
# 2.92 +- 0.26, in millimetres 292 +- 2.6: the variance is 0.1, 11 or 111 errors from 0. Truly it
# is 3.8. In metres a warning adds that the estimate may be on the boundary, 0: every variance
# below 0.01 gets it, whatever its error. In the other units there is no warning. The rows of the
# fixed effects are right.
#
# Versions: statsmodels 0.15.0 with pandas 3.1.1. Public issues of 2015 and 2017, both open, report
# that params differs from the table. We found no report of the error's unit. The documentation
# calls bse_re standard errors of variance parameters, and does not state a scale.
#
# Why it matters in meta-learning with JAX: this variance is sigma squared of a module, and its
# error says whether the tasks differ there at all. Here the unit of y decides that. A learned
# sigma that is right can lie 30 such errors away from the reference, or look like 0.
#
# What to do: take variances from result.cov_re, vcomp and scale. For their errors use a profile
# likelihood or a bootstrap over groups. shrinkmeta's comparisons use the former only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  statsmodels==0.15.0 pandas==3.1.1 numpy==2.4.6 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import warnings

import numpy as np
import pandas as pd
import statsmodels
import statsmodels.formula.api as smf

print("statsmodels", statsmodels.__version__, "pandas", pd.__version__)
random = np.random.default_rng(0)
groups, size = 40, 20
g = np.repeat(np.arange(groups), size)
metres = 0.01 * (170 + 2 * random.normal(size=groups)[g] + 3 * random.normal(size=groups * size))
found = {}
print("unit         variance   its error     table: coefficient, error        params          bse")
for unit, factor in (("metres", 1.0), ("centimetres", 100.0), ("millimetres", 1000.0)):
  y = factor * metres
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fit = smf.mixedlm("y ~ 1", pd.DataFrame({"y": y, "g": g}), groups="g").fit()
  boundary = [str(w.message) for w in caught]
  assert boundary == ["The MLE may be on the boundary of the parameter space."] * (factor == 1), (
    "changed: the warning"
  )
  assert fit.converged
  # Balanced groups: the estimate and its standard error are those of the analysis of variance.
  means = y.reshape(groups, size).mean(1)
  between = size * means.var(ddof=1)
  within = ((y - means[g]) ** 2).sum() / (groups * (size - 1))
  variance = (between - within) / size
  error = np.sqrt(2 * between**2 / (groups - 1) + 2 * within**2 / (groups * (size - 1))) / size
  table = np.sqrt(fit.scale) * fit.bse["g Var"]
  shown = fit.summary().tables[1].loc["g Var"]
  assert abs(float(shown["Std.Err."]) - table) < 1e-3, "changed: the error of the table"
  assert abs(float(shown["Coef."]) - fit.cov_re.iloc[0, 0]) < 1e-3, "changed: the coefficient"
  found[unit] = variance, error, fit.cov_re.iloc[0, 0], table, fit.params["g Var"], fit.bse["g Var"]
  print(
    "{:11} {:10.3e} {:11.3e} {:15} {:>15} {:14.3f} {:12.3f}".format(
      unit, variance, error, shown["Coef."], shown["Std.Err."], *found[unit][4:]
    )
  )
  print(
    f"{'':11} the variance is {variance / error:.1f} of its errors from 0, by the table "
    f"{fit.cov_re.iloc[0, 0] / table:.2f}; warnings: {len(boundary)}"
  )

m, cm, mm = found.values()
for variance, error, coefficient, table, relative, _ in found.values():
  assert np.isclose(coefficient, variance, rtol=1e-2), "changed: cov_re"
  assert np.isclose(variance / error, m[0] / m[1]), "changed: the analysis of variance"
  assert np.isclose(relative, m[4], rtol=1e-2), "changed: params"
assert np.isclose(mm[2] / cm[2], 100, rtol=1e-2), "changed: the unit of the variance"
assert np.isclose(mm[3] / cm[3], 10, rtol=5e-2), "changed: the unit of its error"
assert m[2] / m[3] < 0.2 and mm[2] / mm[3] > 40, "changed: the conclusion depends on the unit"
END
