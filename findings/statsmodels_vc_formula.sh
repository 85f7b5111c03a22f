#!/usr/bin/env bash
# A reasonable guess: mixedlm("y ~ x", groups=g) has a random intercept per group; adding
# vc_formula={"slope": "0 + x"} adds a random slope to it.
#
# What happens: it replaces the intercept. The fit converges without a warning, has no variance of
# intercepts, and puts them into the residual. The intercept stays only if re_formula="1" is given
# too.
#
# Versions: statsmodels 0.15.0 with pandas 3.1.1.
#
# Why it matters in meta-learning with JAX: a linear mixed model is the exact reference for learned
# sigma: one variance per module. Compared with this fit, a right sigma for the intercept looks
# wrong, and the residual scale is several times too large.
#
# What to do: give re_formula="1" beside vc_formula. shrinkmeta's tests of mixed models do.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  statsmodels==0.15.0 pandas==3.1.1 numpy==2.4.6 scipy==1.17.1
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import numpy as np
import pandas as pd
import statsmodels.formula.api as smf

random = np.random.default_rng(0)
groups, size = 30, 10
g = np.repeat(np.arange(groups), size)
x = random.normal(size=groups * size)
intercept, slope = 2.0 * random.normal(size=groups), 1.0 * random.normal(size=groups)
y = 1 + intercept[g] + (2 + slope[g]) * x + 0.5 * random.normal(size=groups * size)
frame = pd.DataFrame({"y": y, "x": x, "g": g})
parts = {"slope": "0 + x"}
fits = {
  "no vc_formula": smf.mixedlm("y ~ x", frame, groups="g").fit(),
  "vc_formula": smf.mixedlm("y ~ x", frame, groups="g", vc_formula=parts).fit(),
  "vc_formula and re_formula": smf.mixedlm(
    "y ~ x", frame, groups="g", re_formula="1", vc_formula=parts
  ).fit(),
}
for name, fit in fits.items():
  print(
    f"{name:26} converged={fit.converged} var(intercept)={np.ravel(fit.cov_re)} "
    f"var(slope)={fit.vcomp} residual={fit.scale:.2f} log-likelihood={fit.llf:.1f}"
  )
plain, replaced, both = fits.values()
assert plain.cov_re.shape == (1, 1) and both.cov_re.shape == (1, 1), "changed: random intercept"
assert replaced.converged and replaced.cov_re.shape == (0, 0), "changed: vc_formula alone"
assert replaced.llf < both.llf - 50 and replaced.scale > 4 * both.scale, "changed: the fit"
END
