#!/usr/bin/env bash
# A reasonable guess: a model matrix is a matrix of real numbers, so that the column of a:b is the
# product of the numbers in a and b, whatever integers the table stores them in.
#
# What happens: the product is computed in the integers of the table. With int8 columns, as pandas'
# downcast="integer" and compact files give them, 120 * 2 becomes -16, without a warning. The
# columns of a and b themselves are right, so nothing looks wrong but the estimate. patsy, which
# statsmodels uses, computes in floats.
#
# Versions: formulaic 1.2.2 and patsy 1.0.2 with pandas 3.1.1 and numpy 2.4.6.
#
# Why it matters in meta-learning: tables of many groups are long, so their integers are made small.
# An interaction that wraps around is a wrong covariate for every group.
#
# What to do: make numeric columns float64 before the formula sees them. shrinkmeta.formulas does.
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

a, b = np.array([120, 100, 127, 3, 4, 5]), np.array([2, 3, 1, 2, 1, 3])
y = 1.0 + 0.5 * a * b
small = pd.DataFrame({"a": a, "b": b}).apply(pd.to_numeric, downcast="integer")
assert set(small.dtypes) == {np.dtype("int8")}, "changed: downcast"
slopes = {}
for name, matrix in (
  ("formulaic", np.asarray(formulaic.model_matrix("a:b", small), float)),
  ("patsy", np.asarray(patsy.dmatrix("a:b", small))),
):
  slopes[name] = np.linalg.lstsq(matrix, y, rcond=None)[0][1]
  print(f"{name:10} a:b = {matrix[:, 1].astype(int).tolist()}  slope {slopes[name]:.3f}")
print("product   a:b =", (a * b).tolist(), " slope 0.500")
wrapped = formulaic.model_matrix("a:b", small)["a:b"].to_numpy()
assert wrapped[0] == -16 and wrapped.dtype == np.int8, "changed: the product"
assert abs(slopes["patsy"] - 0.5) < 1e-9 and abs(slopes["formulaic"] - 0.5) > 0.2, "changed: slopes"
END
