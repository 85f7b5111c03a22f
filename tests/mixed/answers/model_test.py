"""`mixed.fit` and `mixed.summary`: figures recomputed from formulas, and the notes in the text."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from shrinkmeta import mixed
from shrinkmeta.mixed.answers import summary
from shrinkmeta.mixed.compare import simulate
from tests.mixed import designs

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
  assert "as lme4 prints them, they are 6.825, 1.546" in " ".join(text.split())
  # lmerTest 3.1: df 17.00 and p 3.26e-06 of Days.
  assert [row.df for row in found.fixed] == pytest.approx([17.0, 17.0], abs=0.01)
  assert found.fixed[1].p == pytest.approx(3.26e-6, rel=5e-3)


def test_the_figures_follow_from_their_formulas():
  data = simulated()
  model = mixed.fit("y ~ x + (x | g)", data)
  found, fit = mixed.summary(model), model.estimates
  for row in found.fixed:
    assert row.t == pytest.approx(row.estimate / row.se)
    assert row.p == pytest.approx(2 * scipy.stats.t.sf(abs(row.t), row.df))
    low, high = scipy.stats.t.interval(0.95, row.df, row.estimate, row.se)
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


def test_degrees_of_freedom_of_balanced_designs():
  """Those of the analysis of variance, where every group has as many rows."""
  rng = np.random.default_rng(5)
  g = np.repeat(np.arange(9), 6)
  x, treated = np.tile(np.arange(6.0), 9), g % 3
  y = 2.0 * rng.normal(size=9)[g] + 0.3 * x + rng.normal(size=54)
  data = {"y": y, "x": x, "g": g, "f": treated}
  between = mixed.summary(mixed.fit("y ~ 1 + (1 | g)", data, estimator="reml"))
  assert between.fixed[0].df == pytest.approx(8.0, abs=1e-3)
  split = mixed.summary(mixed.fit("y ~ C(f) + x + (1 | g)", data, estimator="reml"))
  assert [row.df for row in split.fixed[1:]] == pytest.approx([6.0, 6.0, 44.0], abs=0.01)
  # By maximum likelihood the mean square between 9 groups is the sum of squares / 9, of 9 df.
  by_ml = mixed.summary(mixed.fit("y ~ 1 + (1 | g)", data))
  assert by_ml.fixed[0].df == pytest.approx(9.0, abs=1e-3)
  noise = rng.normal(size=(9, 6))
  data["y"] = (noise - noise.mean(1, keepdims=True)).ravel()
  none = mixed.fit("y ~ x + (1 | g)", data, estimator="reml")
  assert none.estimates.singular  # so that it is ordinary regression
  assert mixed.summary(none).fixed[1].df == pytest.approx(52.0, abs=0.01)


def test_degrees_of_freedom_by_dense_matrices():
  """Unbalanced: Satterthwaite's formula from the restricted likelihood of the dense covariance."""
  data = simulated(seed=4, groups=8, rows=5)
  keep = np.r_[0:7, 9:30, 33:40]
  data = {name: np.asarray(values)[keep] for name, values in data.items()}
  model = mixed.fit("y ~ x + (1 | g)", data, estimator="reml")
  design = model.design
  same = design.random[0].index[:, None] == design.random[0].index
  at = np.array([model.estimates.sd["(Intercept)"], model.estimates.residual])

  def covariance(sd):
    v = sd[0] ** 2 * same + sd[1] ** 2 * np.eye(len(keep))
    return v, np.linalg.inv(design.fixed.T @ np.linalg.solve(v, design.fixed))

  def minus_restricted(sd):
    v, c = covariance(sd)
    r = design.response - design.fixed @ (c @ design.fixed.T @ np.linalg.solve(v, design.response))
    return 0.5 * (np.linalg.slogdet(v)[1] - np.linalg.slogdet(c)[1] + r @ np.linalg.solve(v, r))

  h = 1e-3 * np.eye(2)
  hessian = np.array([
    [sum(s * t * minus_restricted(at + s * a + t * b) for s in (1, -1) for t in (1, -1)) for b in h]
    for a in h
  ]) / 4e-6  # fmt: skip
  slope = np.array([np.diag(covariance(at + a)[1] - covariance(at - a)[1]) / 2e-3 for a in h])
  want = 2 * np.diag(covariance(at)[1]) ** 2 / np.diag(slope.T @ np.linalg.inv(hessian) @ slope)
  got = [row.df for row in mixed.summary(model).fixed]
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_profiles_and_comparisons():
  data = simulated()
  small = mixed.fit("y ~ x + (1 | g)", data)
  large = mixed.fit("y ~ x + (x || g)", data)
  intervals = mixed.profile(large)
  assert set(intervals) == {"(Intercept)", "x", "residual"}
  text = str(mixed.summary(large, intervals))
  assert f"[{intervals['x'][0]:.4g}, {intervals['x'][1]:.4g}]" in text and "by profile" in text
  found = mixed.compare(small, large)
  statistic = 2 * (large.estimates.log_likelihood - small.estimates.log_likelihood)
  assert found.statistic == pytest.approx(statistic)
  assert found.p_value == pytest.approx(scipy.stats.chi2.sf(statistic, 1) / 2)
  assert mixed.compare(small, large, draws=9, seed=1).p_value >= 0.1
  data["y"][0] = np.nan
  with pytest.raises(ValueError, match="models are fitted to 96 and 95 rows"):
    mixed.compare(small, mixed.fit("y ~ x + (x || g)", data))


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
  # Another unit of the weights is another unit of the residual, and the same share.
  w = rng.uniform(1, 3, 300)
  shares = [mixed.fit("y ~ (1 | s)", data, weights=c * w) for c in (1.0, 100.0)]
  fit = shares[0].estimates
  between = fit.sd["(Intercept)"] ** 2
  want = between / (between + np.mean(fit.residual**2 / w))
  assert [mixed.summary(m).icc["s"] for m in shares] == pytest.approx([want, want], rel=1e-6)
  logistic = mixed.fit("b ~ 1 + (1 | s)", data, family="logistic")
  variance = logistic.estimates.sd["(Intercept)"] ** 2
  assert mixed.summary(logistic).icc["s"] == pytest.approx(variance / (variance + np.pi**2 / 3))
  poisson = mixed.fit("k ~ 1 + (1 | s)", data, family="poisson")
  assert mixed.summary(poisson).icc == {} and "ICC" not in str(poisson)
  assert "Laplace's approximation" in str(poisson)


def test_only_models_of_the_same_data_that_contain_each_other_are_compared():
  data = simulated()
  rng = np.random.default_rng(3)
  x = np.asarray(data["x"])
  data |= {
    "z": rng.normal(size=len(x)),
    "w": rng.uniform(1, 2, len(x)),
    "far": 1e3 * x + 1e9,
    "s": [f"{g} again" for g in data["g"]],
    "pair": [g[:2] for g in data["g"]],
  }
  model = lambda formula, **more: mixed.fit(formula, data, **more)
  one = model("y ~ x + (1 | g)")
  for other, message in (
    (model("y ~ x + offset(0.01 * z) + (x | g)"), "not contain the offset"),
    (model("y ~ x + z + (1 | g)", weights="w"), "different weights, or their rows"),
    (model("I(2 * y) ~ x + z + (1 | g)"), "different responses"),
  ):
    with pytest.raises(ValueError, match=message):
      mixed.compare(one, other)
  with pytest.raises(ValueError, match="not contain the fixed effect 'w' of the smaller one"):
    mixed.compare(model("y ~ w + (1 | g)"), model("y ~ x + z + (1 | g)"))
  with pytest.raises(ValueError, match=r"effect 'x' by g of the smaller one.*AIC"):
    mixed.compare(model("y ~ x + (0 + x | g)"), model("y ~ x + z + (1 | g)"), draws=3)
  with pytest.raises(ValueError, match=r"effect '\(Intercept\)' by pair"):
    mixed.compare(model("y ~ x + (1 | pair)"), model("y ~ x + z + (1 | g)"))
  # The same models, written in other ways.
  want = mixed.compare(one, model("y ~ x + z + (1 | g)")).statistic
  for small, large in (
    ("y ~ scale(x) + (1 | g)", "y ~ x + z + (1 | g)"),
    ("y ~ far + (1 | s)", "y ~ far + z + (1 | g)"),
    ("y ~ x + (1 | g)", "y ~ poly(x, 1) + z + (1 | s)"),
  ):
    assert mixed.compare(model(small), model(large)).statistic == pytest.approx(want, abs=1e-6)
  slope = mixed.compare(model("y ~ offset(x) + (1 | g)"), one)  # H0: the slope is 1
  assert slope.mixture == {1: 1.0}


def test_models_whose_covariances_are_not_nested_are_not_compared():
  """The columns of the larger model span those of the smaller one, but not as one covariance."""
  data = simulated()
  rng = np.random.default_rng(3)
  data |= {"w": rng.normal(size=len(data["y"])), "z": rng.normal(size=len(data["y"]))}
  model = lambda formula: mixed.fit(f"y ~ {formula}", data)
  for small, large, lost in (
    ("x + (x || g)", "x + w + (I(x + 3) || g)", "effect 'x' by g"),
    (
      "x + (x | g)",
      "x + (x || g) + (0 + z + w | g)",
      r"\(Intercept\)', 'x' with their corr.* by g",
    ),
    ("x + (0 + x + z | g)", "x + (x + w | g) + (0 + z | g)", "effects 'x', 'z' with their"),
  ):
    with pytest.raises(ValueError, match=f"does not contain the random .*{lost}"):
      mixed.compare(model(small), model(large))
  for small, large in (
    ("x + (x || g)", "x + w + (I(2 * x) || g)"),
    ("x + (x || g)", "x + (I(x + 3) | g)"),
    ("x + (x | g)", "x + w + (I(x - 3) | g)"),
    ("x + (x || g)", "x + w + (1 | g) + (0 + z + x | g)"),
  ):
    assert mixed.compare(model(small), model(large)).statistic >= 0


def test_rare_events_are_compared_by_a_bootstrap():
  """A drawn response without an event has T = 0, and counts as less than the observed T."""
  rng = np.random.default_rng(0)
  data = {"g": np.repeat(np.arange(6), 5), "x": rng.normal(size=30), "y": np.zeros(30)}
  data["y"][[3, 11]] = 1
  for family in ("logistic", "poisson"):
    model = lambda formula, **more: mixed.fit(formula, data | more, family=family)  # noqa: B023
    small, large = model("y ~ 1 + (1 | g)"), model("y ~ x + (1 | g)")
    drawn = [simulate(small.estimates, small.design, number=i) for i in range(15)]
    events = [y for y in drawn if y.any()]
    assert len(events) < 15
    ratios = [
      mixed.compare(model("y ~ 1 + (1 | g)", y=y), model("y ~ x + (1 | g)", y=y)).statistic
      for y in events
    ]
    found = mixed.compare(small, large, draws=15)
    assert found.p_value == (1 + np.sum(np.array(ratios) >= found.statistic)) / 16


def test_restricted_likelihoods_are_compared_by_columns():
  data = simulated()
  model = lambda formula, **more: mixed.fit(formula, data | more, estimator="reml")
  x = np.asarray(data["x"])
  small, large = model("y ~ x + (1 | g)"), model("y ~ x + (x | g)")
  restricted = [
    designs.dense(one.design, None, one.estimates.covariances, one.estimates.residual, reml=True)
    for one in (small, large)
  ]
  want = pytest.approx(2 * (restricted[1] - restricted[0]), abs=1e-6)
  assert mixed.compare(small, large).statistic == want
  # Another origin or order leaves det X'X as it is.
  assert mixed.compare(model("y ~ I(x - 3) + (1 | g)"), large).statistic == want
  assert mixed.compare(small, model("y ~ 0 + x + one + (x | g)", one=x * 0 + 1)).statistic == want
  for other in (100 * x, x[::-1]):  # det X'X of the second is the same
    for draws in (0, 3):
      with pytest.raises(ValueError, match="Use the same fixed columns in both models, or fit"):
        mixed.compare(small, model("y ~ x + (x | g)", x=other), draws=draws)


def test_a_comparison_with_narrow_indices():
  """The pairs i * 31 + i of equal groups are multiples of 32: int8 holds 8 of them."""
  data = simulated(groups=31, rows=4)
  small, large = mixed.fit("y ~ x + (1 | g)", data), mixed.fit("y ~ x + (x || g)", data)
  narrowed = []
  for model in (small, large):
    terms = [t._replace(index=t.index.astype(np.int8)) for t in model.design.random]
    narrowed.append(model._replace(design=model.design._replace(random=tuple(terms))))
  assert mixed.compare(*narrowed) == mixed.compare(small, large)


def test_effects_are_named_after_their_own_factor():
  """Names with spaces and " by ": the summary does not take them for parts of other names."""
  rng = np.random.default_rng(2)
  g = np.repeat(np.arange(24), 8)
  table = {"site": g // 4, "site id": g, "x by z": rng.normal(size=192), "w": rng.normal(size=192)}
  table["y"] = 3 * rng.normal(size=6)[g // 4] + rng.normal(size=24)[g] + rng.normal(size=192)
  table["y"] += rng.normal(size=24)[g] * table["x by z"] + rng.normal(size=24)[g] * table["w"]
  made = designs.design(
    table, "y", [designs.ONE], ("site", [designs.ONE], False), ("site id", [designs.ONE], False),
    ("site id", ["x by z", "w"], True),
  )  # fmt: skip
  fit = mixed.fit_design(made)
  found = summary.of(fit, made)
  effects = {
    "(Intercept) by site": "site (Intercept)",
    "(Intercept) by site id": "site id (Intercept)",
    "x by z by site id": "site id x by z",
    "w by site id": "site id w",
  }
  want = {label: fit.sd[key] for label, key in effects.items()} | {"residual": fit.residual}
  assert {row.name: row.estimate for row in found.sd} == want
  assert list(found.correlation) == ["x by z, w by site id"]
  assert list(found.correlation_interval) == ["x by z, w by site id"]
  assert "\n(Intercept) by site id " in str(found)


def test_a_standard_deviation_of_0_in_a_correlated_term_is_0():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(25, 10))
  x -= x.mean(1, keepdims=True)
  y = (0.3 + 0.6 * rng.normal(size=(25, 1))) * x + rng.normal(size=x.shape)
  y -= y.mean(1, keepdims=True)  # the groups do not differ in their level
  data = {"y": y.ravel(), "x": x.ravel(), "g": np.repeat(np.arange(25), 10)}
  fit = mixed.fit("y ~ x + (x | g)", data).estimates
  assert fit.singular == ("(Intercept)",) and fit.sd["(Intercept)"] == 0
  assert np.isnan(list(fit.correlation.values())).all() and fit.singular_correlation == ()
  apart = mixed.fit("y ~ x + (x || g)", data).estimates
  assert fit.sd["x"] == pytest.approx(apart.sd["x"], rel=1e-6)
  # One row in each of most groups: nothing varies, and both standard deviations are 0.
  few = rng.normal(size=300)
  data = {"y": few + rng.normal(size=300), "x": few, "g": np.minimum(np.arange(300), 250)}
  both = mixed.fit("y ~ x + (x | g)", data).estimates
  for sd, (low, _) in zip(both.sd.values(), both.sd_interval.values(), strict=True):
    assert sd > 1e-6 or (sd == 0 and np.isnan(low))


def test_no_fixed_effects_and_wide_numbers():
  data = simulated()
  text = str(mixed.fit("y ~ 0 + (x | g)", data, estimator="reml"))
  assert "fixed effect" not in text and "restricted log-likelihood" in text
  z = 2 * data["x"] + np.repeat(np.arange(12), 8) + 1e-5 * data["y"]
  close = mixed.fit("z ~ x + (1 | g)", data | {"z": z})
  row = next(line for line in str(close).splitlines() if line.startswith("x "))
  assert len(row.split("[")[0].split()) >= 5  # a space before every number


def test_a_perfect_fit_has_no_errors():
  data = simulated()
  g = np.repeat(np.arange(12), 8)
  data |= {"z": 2 * data["x"] + g % 5, "won": g % 2}
  model = mixed.fit("z ~ x + (1 | g)", data)
  text = " ".join(str(model).split())
  assert "PERFECT FIT: the model repeats the response" in text and "x 2 " in text
  assert "nan" not in text and "AIC 1" not in text and "Standard errors" not in text
  assert "NOT DETERMINED by these data, or hardly: residual." in text
  assert np.isnan(mixed.predict(model).se).all()
  with pytest.raises(ValueError, match="fit is perfect.*no profile can be computed"):
    mixed.profile(model)
  with pytest.raises(ValueError, match="The larger model repeats the response to its last digits"):
    mixed.compare(mixed.fit("z ~ 1 + (1 | g)", data), model)
  won = " ".join(str(mixed.fit("won ~ x + (1 | g)", data, family="logistic")).split())
  assert "COMPLETE SEPARATION: fixed effects and groups tell all successes" in won
  assert "or hardly: (Intercept), x, sd of (Intercept)." in won and "nan" not in won


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


def test_an_effect_of_each_row_measures_overdispersion():
  """Log rates with the standard deviations 0.5 between hospitals and 0.6 between rows."""
  rng = np.random.default_rng(0)
  hospital = np.repeat(np.arange(40), 12)
  eta = 1 + 0.5 * rng.normal(size=40)[hospital] + 0.6 * rng.normal(size=480)
  data = {"y": rng.poisson(np.exp(eta)), "hospital": hospital, "row": np.arange(480)}
  plain = mixed.fit("y ~ 1 + (1 | hospital)", data, family="poisson")
  model = mixed.fit("y ~ 1 + (1 | hospital/row)", data, family="poisson")
  fit = model.estimates
  assert list(fit.sd.values()) == pytest.approx([0.5, 0.6], abs=0.1)
  assert fit.log_likelihood > plain.estimates.log_likelihood + 50
  new = mixed.predict(model, {"hospital": [3, 99]})  # new rows, of a known and of a new hospital
  level = fit.fixed["(Intercept)"]
  found = mixed.effects(model)["hospital (Intercept)"]
  mode = found.mode[found.levels.index("3")]
  assert new.eta == pytest.approx([level + mode, level])
  variance = sum(sd**2 for sd in fit.sd.values())
  over_groups = new.mean[1] * np.exp(variance / 2)  # docs/mixed.md: not the mean of a new group
  assert over_groups == pytest.approx(np.mean(data["y"]), rel=0.05)


def test_wrong_arguments():
  with pytest.raises(ValueError, match="must be one of gaussian, .*'binomial'. Write 'logistic'"):
    mixed.fit("y ~ x + (1 | g)", simulated(), family="binomial")
  for family in ("nbinom", "negative binomial", "NegativeBinomial", "quasipoisson"):
    with pytest.raises(ValueError, match=r"write 'poisson', .*: \(1 \| group/row\).*docs/mixed.md"):
      mixed.fit("y ~ x + (1 | g)", simulated(), family=family)
  with pytest.raises(ValueError, match="must be one of gaussian, logistic, poisson; got 'gamma'.$"):
    mixed.fit("y ~ x + (1 | g)", simulated(), family="gamma")
  with pytest.raises(ValueError, match="estimator must be .*'mle'"):
    mixed.fit("y ~ x + (1 | g)", simulated(), estimator="mle")


def test_the_library_alone_imports_neither_pandas_nor_formulaic():
  code = (
    "import sys, shrinkmeta\n"
    "assert not {'pandas', 'formulaic'} & set(sys.modules)\n"
    "import shrinkmeta.mixed\n"
    "assert not {'pandas', 'formulaic', 'matplotlib'} & set(sys.modules)\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_the_interval_of_a_correlation():
  """By the Hessian of the dense likelihood in log sd, atanh(correlation) and log residual."""
  data = simulated(groups=10, rows=6)
  model = mixed.fit("y ~ x + (x | g)", data)
  fit, design = model.estimates, model.design
  pair = ("(Intercept)", "x")
  z = np.zeros((60, 20))
  for i, g in enumerate(design.random[0].index):
    z[i, 2 * g : 2 * g + 2] = design.random[0].columns[i]

  def minus_log_likelihood(at):
    one, other, rho, residual = np.exp(at[0]), np.exp(at[1]), np.tanh(at[2]), np.exp(at[3])
    sigma = np.array([[one**2, rho * one * other], [rho * one * other, other**2]])
    v = z @ np.kron(np.eye(10), sigma) @ z.T + residual**2 * np.eye(60)
    x, y = design.fixed, design.response
    r = y - x @ np.linalg.solve(x.T @ np.linalg.solve(v, x), x.T @ np.linalg.solve(v, y))
    return 0.5 * (np.linalg.slogdet(v)[1] + r @ np.linalg.solve(v, r))

  rho = fit.correlation[pair]
  at = np.array([*np.log(list(fit.sd.values())), np.arctanh(rho), np.log(fit.residual)])
  h = 1e-3 * np.eye(4)
  hessian = np.array([
    [
      sum(s * t * minus_log_likelihood(at + s * a + t * b) for s in (1, -1) for t in (1, -1))
      for b in h
    ]
    for a in h
  ]) / 4e-6  # fmt: skip
  width = scipy.stats.norm.ppf(0.975) * np.sqrt(np.linalg.inv(hessian)[2, 2])
  want = np.tanh([at[2] - width, at[2] + width])
  np.testing.assert_allclose(fit.correlation_interval[pair], want, rtol=1e-4)
  found = mixed.summary(model)
  assert found.correlation_interval == {"(Intercept), x by g": fit.correlation_interval[pair]}
  assert f"{rho:.4f}   [{want[0]:.4g}, {want[1]:.4g}]" in str(found)


def test_a_comparison_is_printed_as_a_table():
  data = simulated(sd=(1.0, 0.3))
  small, large = (mixed.fit(f"y ~ x + ({term} | g)", data) for term in ("1", "x"))
  found = mixed.compare(small, large)
  one, other = (line.split() for line in str(found).splitlines()[1:3])
  assert one[-2:] == ["4", f"{small.estimates.log_likelihood:.4f}"]
  assert other[-2:] == ["6", f"{large.estimates.log_likelihood:.4f}"]
  assert " ".join(one[:-2]) == small.formula and " ".join(other[:-2]) == large.formula
  assert f"2 log ratio = {found.statistic:.4f}, p = {found.p_value:.2g}" in str(found)
  assert str(found).endswith("p from a mixture of chi-squares: 0.5 of 1 df, 0.5 of 2 df")
  drawn = mixed.compare(small, large, draws=9)
  assert drawn.draws == 9 and (drawn.statistic, drawn.models) == (found.statistic, found.models)
  assert str(drawn).endswith("p from 9 draws from the smaller model; it is at least 1/10 = 0.1")
  restricted = (mixed.fit(m.formula, data, estimator="reml") for m in (small, large))
  assert "parameters   restricted log-likelihood" in str(mixed.compare(*restricted))
  for draws in (0, 9):
    with pytest.raises(ValueError, match="^Pass the smaller model first"):
      mixed.compare(large, small, draws=draws)


def test_equal_counts_in_different_exposures_have_something_to_explain():
  """One event in every row: the rate is N / sum of the exposures, by hand."""
  rng = np.random.default_rng(0)
  exposure = rng.uniform(1.0, 9.0, 30)
  data = {"c": np.ones(30), "t": exposure, "g": np.repeat(np.arange(6), 5)}
  model = mixed.fit("c ~ 1 + offset(log(t)) + (1 | g)", data, family="poisson")
  np.testing.assert_allclose(
    model.estimates.fixed["(Intercept)"], np.log(30 / exposure.sum()), rtol=1e-5
  )
  with pytest.raises(ValueError, match="nothing to explain"):
    mixed.fit("c ~ 1 + (1 | g)", data, family="poisson")
  with pytest.raises(ValueError, match="nothing to explain"):
    mixed.fit("c ~ 1 + offset(log(t)) + (1 | g)", data | {"c": np.zeros(30)}, family="poisson")
