#!/usr/bin/env bash
# A reasonable guess: scale(x) in a formula is one function, so that a model fitted by statsmodels
# and a model with the same formula in another library have the same slope.
#
# What happens: formulaic divides by the standard deviation with N - 1, as R's scale does. patsy,
# which statsmodels uses, divides by the one with N, and there scale is another name of
# standardize. The slopes differ by sqrt(N / (N - 1)): 15 % with 4 rows, 5 % with 10. In one thing
# they agree: where x has a missing value, the column is NaN in every row, and all rows are dropped.
# The matrix is empty, without an error, where `x` alone loses one row.
#
# Versions: formulaic 1.2.2 and patsy 1.0.2 with pandas 3.1.1 and numpy 2.4.6. Public issues of 2021
# and 2024 report the empty matrix of patsy and are open.
#
# Why it matters in meta-learning: coefficients of standardised covariates are compared between
# studies and between libraries, and the tables of single tasks are short.
#
# What to do: state which one a table of results used, or drop rows with missing values and
# standardise before the formula. To compare with statsmodels, multiply its slope by
# sqrt(N / (N - 1)). shrinkmeta.formulas drops the rows first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  formulaic==1.2.2 patsy==1.0.2 packaging==25.0 pandas==3.1.1 numpy==2.4.6 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" -W error - <<'END'
import formulaic
import numpy as np
import pandas as pd
import patsy

for rows in (4, 10, 100):
  x = np.random.default_rng(rows).normal(size=rows)
  y, table = 3.0 + 2.0 * x, pd.DataFrame({"x": x})
  slope = lambda matrix: np.linalg.lstsq(np.asarray(matrix, float), y, rcond=None)[0][1]
  ours = slope(formulaic.model_matrix("scale(x)", table))
  other = slope(patsy.dmatrix("scale(x)", table))
  print(f"N = {rows:3}: slope formulaic {ours:.4f}, patsy {other:.4f}, ratio {ours / other:.4f}")
  assert np.isclose(ours, 2.0 * x.std(ddof=1)), "changed: formulaic"
  assert np.isclose(other, 2.0 * x.std(ddof=0)), "changed: patsy"

table.loc[3, "x"] = np.nan
shapes = {
  (name, formula): make(formula, table).shape
  for name, make in (("formulaic", formulaic.model_matrix), ("patsy", patsy.dmatrix))
  for formula in ("x", "scale(x)")
}
for words, shape in shapes.items():
  print("one missing value among 100 rows:", *words, shape)
  assert shape == (99 if words[1] == "x" else 0, 2), "changed: a missing value"
END
