#!/usr/bin/env bash
# A reasonable guess: a column of True and False is a factor with two levels, as in R's formulas and
# in patsy, which statsmodels uses. `y ~ 0 + treated` then has a mean for each of the two.
#
# What happens: formulaic takes it for a number, 0 or 1. `0 + treated` is one column, so the model
# predicts 0 for every row that is False: here the residual standard deviation is 7.1 where patsy's
# model has 1.0. `0 + treated:x` has a slope for True and none for False. With an intercept nothing
# is lost, so the difference shows in models without one only. The same words in a column of
# "yes" and "no" are a factor in both.
#
# Versions: formulaic 1.2.2 and patsy 1.0.2 with pandas 3.1.1 and numpy 2.4.6.
#
# Why it matters in meta-learning: mixed models give each group an effect for each of two conditions
# by (0 + treated | group). With one column, a group that is not treated has no effect at all.
#
# What to do: write C(treated), or make the column a categorical. shrinkmeta.formulas takes a
# boolean column for a factor.
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

rng = np.random.default_rng(0)
treated = np.arange(200) % 2 == 0
table = pd.DataFrame({"treated": treated, "x": rng.normal(size=200)})
table["words"] = np.where(treated, "yes", "no")
y = np.where(treated, 12.0, 10.0) + rng.normal(size=200)
columns, spread = {}, {}
for formula in ("treated", "0 + treated", "0 + treated:x", "0 + C(treated)", "0 + words"):
  ours = formulaic.model_matrix(formula, table)
  other = patsy.dmatrix(formula, table, return_type="dataframe")
  for name, matrix in (("formulaic", ours), ("patsy", other)):
    values = np.asarray(matrix, float)
    residual = y - values @ np.linalg.lstsq(values, y, rcond=None)[0]
    columns[formula, name] = list(matrix.columns)
    spread[formula, name] = float(np.sqrt(np.mean(residual**2)))
    print(f"{formula:15} {name:10} residual {spread[formula, name]:6.3f}  {columns[formula, name]}")

for formula in ("treated", "0 + C(treated)", "0 + words"):
  assert abs(spread[formula, "formulaic"] - spread[formula, "patsy"]) < 1e-9, f"changed: {formula}"
assert columns["0 + treated", "formulaic"] == ["treated"], "changed: the columns"
assert spread["0 + treated", "formulaic"] > 6 and spread["0 + treated", "patsy"] < 1.1, "changed"
assert [len(columns["0 + treated:x", n]) for n in ("formulaic", "patsy")] == [1, 2], "changed: x"
END
