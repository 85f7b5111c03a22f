#!/usr/bin/env bash
# A reasonable guess: a level of a factor that the fit has not seen is an error in new data, or a
# row of NaN. The warning says so: such values are "cast to nan". Rows with NaN are dropped.
#
# What happens: the row stays, with 0 in every column of the factor. That is the row of the reference
# level, so a prediction for the unknown level is silently the one for the reference level. A real
# NaN in the same place drops the row.
#
# Versions: formulaic 1.2.2 with pandas 3.1.1.
#
# Why it matters in meta-learning: new data have new sites, speakers or patients. Their prediction
# must come from the distribution of the groups, not from the group that sorts first.
#
# What to do: compare the levels of new data with those of the fit before the formula sees them.
# shrinkmeta.mixed raises an error for an unknown level of a predictor, and takes a random effect of
# 0 with its standard deviation for an unknown group.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  formulaic==1.2.2 pandas==3.1.1 numpy==2.4.6 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import warnings

import formulaic
import numpy as np
import pandas as pd

fitted = pd.DataFrame({"site": ["a", "b", "c"] * 2, "x": np.arange(6.0)})
spec = formulaic.model_matrix("site + x", fitted).model_spec
with warnings.catch_warnings(record=True) as told:
  warnings.simplefilter("always")
  unknown = spec.get_model_matrix(pd.DataFrame({"site": ["a", "z"], "x": [1.0, 1.0]}))
missing = spec.get_model_matrix(pd.DataFrame({"site": ["a", None], "x": [1.0, 1.0]}))
print("with the unknown level z:", unknown.to_numpy().tolist())
print("with a missing value:    ", missing.to_numpy().tolist())
print("warnings:", [str(one.message)[:60] + "..." for one in told])
assert len(unknown) == 2 and len(missing) == 1, "changed: which rows stay"
assert (unknown.to_numpy()[0] == unknown.to_numpy()[1]).all(), "changed: the row of an unknown level"
assert any("cast to nan" in str(one.message) for one in told), "changed: the warning"
END
