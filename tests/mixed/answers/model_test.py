"""The door and the summary: figures recomputed from their formulas, text that says what to know."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from shrinkmeta import mixed

DATA = pathlib.Path(os.environ.get("SHRINKMETA_DATA", "/nonexistent")) / "mixed"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="SHRINKMETA_DATA has no folder mixed")


def simulated(seed=0, groups=12, rows=8, sd=(1.0, 0.5)):
  rng = np.random.default_rng(seed)
  g = np.repeat(np.arange(groups), rows)
  x = rng.normal(size=len(g))
  level, slope = (s * rng.normal(size=groups) for s in sd)
  y = 1.0 + level[g] + (2.0 + slope[g]) * x + rng.normal(size=len(g))
  return {"y": y, "x": x, "g": [f"s{i}" for i in g]}


@needs_data
def test_sleepstudy_as_lme4_prints_it():
  model = mixed.fit("Reaction ~ Days + (Days | Subject)", DATA / "sleepstudy.csv", estimator="reml")
  found, fit = mixed.summary(model), model.estimates
  assert [row.name for row in found.fixed] == ["(Intercept)", "Days"]
  np.testing.assert_allclose([row.estimate for row in found.fixed], [251.405, 10.467], rtol=1e-4)
  np.testing.assert_allclose(list(fit.fixed_se_conditional.values()), [6.825, 1.546], rtol=1e-3)
  np.testing.assert_allclose([r.estimate for r in found.sd], [24.741, 5.922, 25.592], rtol=1e-4)
  assert found.correlation == {"(Intercept), Days by Subject": pytest.approx(0.066, abs=1e-3)}
  # lme4 1.1-31: REML criterion 1743.628, AIC 1755.628, BIC 1774.786.
  assert found.aic == pytest.approx(1755.628, abs=1e-3)
  assert found.bic == pytest.approx(1774.786, abs=1e-3)
  text = str(model)
  assert "REML criterion 1743.628" in text and "180 rows, 18 groups of 10 to 10" in text
  assert "as lme4 prints them, they are 6.825, 1.546" in text


def test_the_figures_follow_from_their_formulas():
  data = simulated()
  model = mixed.fit("y ~ x + (x | g)", data)
  found, fit = mixed.summary(model), model.estimates
  for row in found.fixed:
    assert row.z == pytest.approx(row.estimate / row.se)
    assert row.p == pytest.approx(2 * scipy.stats.norm.sf(abs(row.z)))
    low, high = scipy.stats.norm.interval(0.95, row.estimate, row.se)
    assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
  assert found.parameters == 6  # two effects, two variances, a covariance, the residual
  assert found.aic == pytest.approx(-2 * fit.log_likelihood + 12)
  assert found.bic == pytest.approx(-2 * fit.log_likelihood + 6 * np.log(96))
  # The average variance of a row, from the dense covariance of the data.
  design = model.design
  z = np.zeros((96, 24))
  for i, g in enumerate(design.random[0].index):
    z[i, 2 * g : 2 * g + 2] = design.random[0].columns[i]
  between = np.diag(z @ np.kron(np.eye(12), fit.covariances[0]) @ z.T).mean()
  assert found.icc == {"g": pytest.approx(between / (between + fit.residual**2))}


def test_shares_of_the_variance():
  rng = np.random.default_rng(3)
  school, pupil = np.repeat(np.arange(10), 30), np.repeat(np.arange(60), 5)
  eta = 0.8 * rng.normal(size=10)[school] + 0.6 * rng.normal(size=60)[pupil]
  data = {"s": school, "p": pupil, "y": eta + rng.normal(size=300)}
  data["k"] = rng.poisson(np.exp(eta))
  data["b"] = rng.uniform(size=300) < 1 / (1 + np.exp(-eta))
  model = mixed.fit("y ~ 1 + (1 | s/p)", data)
  sd, residual = model.estimates.sd, model.estimates.residual
  total = sum(v**2 for v in sd.values()) + residual**2
  assert mixed.summary(model).icc == {
    "s": pytest.approx(sd["s (Intercept)"] ** 2 / total),
    "s:p": pytest.approx(sd["s:p (Intercept)"] ** 2 / total),
  }
  text = str(model)
  assert "10 groups of s of 30 to 30, 60 groups of s:p of 5 to 5" in text
  assert "(Intercept) by s:p" in text
  logistic = mixed.fit("b ~ 1 + (1 | s)", data, family="logistic")
  variance = logistic.estimates.sd["(Intercept)"] ** 2
  assert mixed.summary(logistic).icc["s"] == pytest.approx(variance / (variance + np.pi**2 / 3))
  poisson = mixed.fit("k ~ 1 + (1 | s)", data, family="poisson")
  assert mixed.summary(poisson).icc == {} and "ICC" not in str(poisson)
  assert "Laplace's approximation" in str(poisson)


def test_the_text_says_what_to_know():
  data = simulated(sd=(1.0, 0.0), seed=2)
  data["y"][3], data["g"][7] = np.nan, "N/A"
  singular = mixed.fit("y ~ x + (x || g)", data)
  assert singular.design.dropped == (("y is missing", 1), ("g is missing", 1))
  text = str(singular)
  assert "2 rows left out: y is missing (1), g is missing (1)" in text
  assert "Singular fit: the log-likelihood is highest at a standard deviation of 0 for x." in text
  assert "boundary estimate" in text and "94 rows" in text
  predictive = str(mixed.fit("y ~ x + (1 | g)", data, estimator="predictive"))
  assert "95 %" not in predictive and "nan" not in predictive and "AIC" not in predictive
  profiled = str(mixed.summary(singular, {"(Intercept)": (0.5, 2.0)}))
  assert "by profile" in profiled and "[0.5, 2]" in profiled


def test_wrong_arguments():
  with pytest.raises(ValueError, match="family is 'binomial'; it is one of gaussian, logistic"):
    mixed.fit("y ~ x + (1 | g)", simulated(), family="binomial")
  with pytest.raises(ValueError, match="estimator is 'mle'"):
    mixed.fit("y ~ x + (1 | g)", simulated(), estimator="mle")


def test_the_library_alone_imports_neither_pandas_nor_formulaic():
  code = (
    "import sys, shrinkmeta\n"
    "assert not {'pandas', 'formulaic'} & set(sys.modules)\n"
    "import shrinkmeta.mixed\n"
    "assert not {'pandas', 'formulaic', 'matplotlib'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
