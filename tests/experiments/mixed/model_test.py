"""Fits against published ones, statsmodels, and a Laplace approximation written out in NumPy."""

import json
import os
import pathlib

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
import statsmodels.formula.api as smf

from experiments.mixed import criteria, groups, model, report, table
from experiments.mixed.formula import INTERCEPT, parse
from tests.compiled import factorisations

pytestmark = pytest.mark.usefixtures("x64")

DATA = pathlib.Path(os.environ.get("SHRINKMETA_DATA", "/nonexistent")) / "mixed"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="SHRINKMETA_DATA has no folder mixed")
SLEEP = "Reaction ~ Days + (Days || Subject)"


def load(name, formula, family="gaussian"):
  parsed = parse(formula)
  return parsed, table.grouped(table.read(DATA / name), parsed, family)


def close(got, want, rel=1e-3):
  assert got == pytest.approx(want, rel=rel)


@needs_data
def test_sleepstudy_by_maximum_likelihood(tmp_path, command):
  """The published fit, through the binary."""
  out = tmp_path / "fit.json"
  flags = {"data": DATA / "sleepstudy.csv", "formula": SLEEP, "json": out}
  flags["plot"] = tmp_path / "fit.png"
  done = command("mixed", *(f"--{k}={v}" for k, v in flags.items()))
  assert done.returncode == 0, done.stderr[-3000:]
  assert "log-likelihood -876.0016" in done.stdout
  found = json.loads(out.read_text())
  close(found["fixed"][INTERCEPT], 251.405)
  close(found["fixed"]["Days"], 10.467)
  close(found["sd"][INTERCEPT], 24.171)
  close(found["sd"]["Days"], 5.799)
  close(found["residual"], 25.556)
  assert found["log_likelihood"] == pytest.approx(-876.0016, abs=1e-3)
  assert found["converged"] and found["singular"] == []
  assert len(found["groups"]) == 18 and (tmp_path / "fit.png").stat().st_size > 10_000


@needs_data
def test_sleepstudy_by_reml_and_its_conditional_modes():
  formula, data = load("sleepstudy.csv", SLEEP)
  found = model.fit(formula, "gaussian", data.batches, "reml")
  frame = pd.read_csv(DATA / "sleepstudy.csv")
  free = smf.mixedlm("Reaction ~ Days", frame, groups="Subject", re_formula="1",
                     vc_formula={"Days": "0 + Days"}).fit(reml=True, method="bfgs")  # fmt: skip
  close(found.fixed[INTERCEPT], free.fe_params["Intercept"])
  close(found.fixed["Days"], free.fe_params["Days"])
  close(found.sd[INTERCEPT], float(np.sqrt(free.cov_re.iloc[0, 0])))
  close(found.sd["Days"], float(np.sqrt(free.vcomp[0])))
  close(found.residual, float(np.sqrt(free.scale)))
  assert found.criterion == pytest.approx(free.llf, abs=1e-3)
  close(found.criterion, -1743.6693 / 2, 1e-6)
  close(found.fixed_se[INTERCEPT], 6.8854, 2e-3)
  close(found.fixed_se["Days"], 1.5596, 2e-3)
  effects = groups.group_effects(formula, "gaussian", found, data.batches)
  by_group = {g: tuple(float(effects[t][0][i]) for t in formula.random)
              for i, g in enumerate(data.groups)}  # fmt: skip
  assert by_group["308"][0] - found.fixed[INTERCEPT] == pytest.approx(1.5127, abs=2e-3)
  assert by_group["335"][1] - found.fixed["Days"] == pytest.approx(-10.9060, abs=2e-3)


@needs_data
@pytest.mark.parametrize("reml", (False, True))
def test_radon_and_statsmodels(reml):
  formula, data = load("radon.csv", "log_radon ~ floor + (1 | county)")
  found = model.fit(formula, "gaussian", data.batches, "reml" if reml else "ml")
  frame = pd.read_csv(DATA / "radon.csv")
  want = smf.mixedlm("log_radon ~ floor", frame, groups="county").fit(reml=reml, method="cg")
  close(found.fixed[INTERCEPT], want.fe_params["Intercept"])
  close(found.fixed["floor"], want.fe_params["floor"])
  close(found.sd[INTERCEPT], float(np.sqrt(want.cov_re.iloc[0, 0])))
  close(found.residual, float(np.sqrt(want.scale)))
  close(found.criterion, want.llf, 1e-6)
  close(found.sd[INTERCEPT], 0.32822 if reml else 0.32446)


@needs_data
@pytest.mark.parametrize(
  "estimator, sd0, sd1, residual, crit",
  (
    ("ml", 0.09028**0.5, 0.01432**0.5, 0.55364**0.5, 9325.1184),
    ("reml", 0.09195**0.5, 0.01474**0.5, 0.55363**0.5, 9335.7076),
  ),
)
def test_exam(estimator, sd0, sd1, residual, crit):
  formula, data = load("exam.csv", "normexam ~ standLRT + (standLRT || school)")
  found = model.fit(formula, "gaussian", data.batches, estimator)
  close(found.sd[INTERCEPT], sd0)
  close(found.sd["standLRT"], sd1)
  close(found.residual, residual)
  close(found.criterion, -crit / 2, 1e-7)
  frame = pd.read_csv(DATA / "exam.csv")
  want = smf.mixedlm("normexam ~ standLRT", frame, groups="school", re_formula="1",
                     vc_formula={"slope": "0 + standLRT"}).fit(
                       reml=estimator == "reml", method="lbfgs")  # fmt: skip
  close(found.fixed[INTERCEPT], want.fe_params["Intercept"])
  close(found.fixed["standLRT"], want.fe_params["standLRT"])
  close(found.sd[INTERCEPT], float(np.sqrt(want.cov_re.iloc[0, 0])))
  close(found.sd["standLRT"], float(np.sqrt(want.vcomp[0])))
  close(found.residual, float(np.sqrt(want.scale)))
  close(found.criterion, want.llf, 1e-6)


def simulated(tmp_path, family, sd=(0.8, 0.5), groups=30, seed=0):
  rng = np.random.default_rng(seed)
  rows = []
  for g in range(groups):
    level, slope = 0.3 + sd[0] * rng.normal(), -0.5 + sd[1] * rng.normal()
    for _ in range(rng.integers(2, 15)):
      x = rng.normal()
      f = level + slope * x
      y = {
        "gaussian": f + 0.7 * rng.normal(),
        "logistic": float(rng.uniform() < 1 / (1 + np.exp(-f))),
        "poisson": float(rng.poisson(np.exp(f))),
      }[family]
      rows.append((y, x, f"g{g}"))
  path = tmp_path / f"{family}.csv"
  path.write_text("y,x,g\n" + "".join(f"{y},{x},{g}\n" for y, x, g in rows))
  formula = parse("y ~ x + (x || g)")
  return formula, table.grouped(table.read(path), formula, family), pd.read_csv(path)


@pytest.mark.parametrize("family", ("logistic", "poisson"))
def test_other_families_against_laplace_in_numpy(tmp_path, family):
  formula, data, frame = simulated(tmp_path, family)
  found = model.fit(formula, family, data.batches)
  designs = [
    (np.column_stack([np.ones(len(rows)), rows.x]), rows.y.to_numpy())
    for _, rows in frame.groupby("g", sort=False)
  ]

  def minus_log_likelihood(v):
    beta, sigma, total = v[:2], np.exp(v[2:]), 0.0
    for x, y in designs:
      u = np.zeros(2)
      for _ in range(100):  # Newton on the mode
        f = x @ (beta + sigma * u)
        mean = 1 / (1 + np.exp(-f)) if family == "logistic" else np.exp(f)
        weight = mean * (1 - mean) if family == "logistic" else mean
        a = x * sigma
        hessian = np.eye(2) + a.T @ (a * weight[:, None])
        step = np.linalg.solve(hessian, a.T @ (y - mean) - u)
        u = u + step
        if np.abs(step).max() < 1e-12:
          break
      f = x @ (beta + sigma * u)
      if family == "logistic":
        log_p = np.sum(y * f - np.logaddexp(0, f))
      else:
        log_p = np.sum(scipy.stats.poisson.logpmf(y, np.exp(f)))
      total += log_p - u @ u / 2 - np.linalg.slogdet(hessian)[1] / 2
    return -total

  want = scipy.optimize.minimize(
    minus_log_likelihood, np.array([0.0, 0.0, -0.5, -0.5]), method="Nelder-Mead",
    options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 2000},
  )  # fmt: skip
  got = [
    found.fixed[INTERCEPT],
    found.fixed["x"],
    np.log(found.sd[INTERCEPT]),
    np.log(found.sd["x"]),
  ]
  np.testing.assert_allclose(got, want.x, atol=2e-4)
  assert found.log_likelihood == pytest.approx(-want.fun, abs=1e-6) and found.converged


def beside_a_trend(slope, sd):
  """y = slope x + u_g + e, e 0 on average in each of 40 groups: formula, batches and a frame."""
  rng = np.random.default_rng(0)
  x, level, noise = np.arange(10.0), sd * rng.normal(size=(40, 1)), rng.normal(size=(40, 10))
  y = slope * x + level + noise - noise.mean(1, keepdims=True)
  names = np.repeat([f"g{g}" for g in range(40)], 10)
  frame = pd.DataFrame({"y": y.ravel(), "x": np.tile(x, 40), "g": names})
  formula = parse("y ~ x + (1 | g)")
  columns = {name: [str(v) for v in frame[name]] for name in frame}
  return formula, table.grouped(columns, formula, "gaussian").batches, frame


@pytest.mark.parametrize("estimator", ("ml", "reml"))
def test_a_small_sd_beside_a_large_fixed_effect_is_not_0(estimator):
  """sd 5 where the response, trend included, has 30,000."""
  formula, batches, frame = beside_a_trend(1e4, 5.0)
  found = model.fit(formula, "gaussian", batches, estimator)
  want = smf.mixedlm("y ~ x", frame, groups="g").fit(reml=estimator == "reml", method="bfgs")
  assert found.singular == () and found.converged
  close(found.sd[INTERCEPT], float(np.sqrt(want.cov_re.iloc[0, 0])))
  close(found.residual, float(np.sqrt(want.scale)))
  close(found.fixed["x"], want.fe_params["x"], 1e-7)
  close(found.fixed_se["x"], want.bse_fe["x"])
  assert found.criterion == pytest.approx(want.llf, abs=1e-4)


def test_a_trend_makes_no_singular_fit_regular():
  formula, batches, frame = beside_a_trend(1e4, 0.0)
  found = model.fit(formula, "gaussian", batches)
  assert found.singular == (INTERCEPT,) and found.sd[INTERCEPT] == 0.0 and found.converged
  assert found.log_likelihood == pytest.approx(smf.ols("y ~ x", frame).fit().llf, abs=1e-6)


def test_a_small_sd_beside_a_large_random_slope_is_not_0(tmp_path):
  """Levels of sd 1 and noise 0.1 beside slopes of sd 500: the likelihood says that 1 is not 0."""
  rng = np.random.default_rng(6)
  level, slope = rng.normal(size=(40, 1)), 500 * rng.normal(size=(40, 1))
  x = rng.uniform(-5, 5, size=(40, 10))
  y = level + slope * x + 0.1 * rng.normal(size=x.shape)
  names = np.repeat([f"g{g}" for g in range(40)], 10)
  path = tmp_path / "slopes.csv"
  pd.DataFrame({"y": y.ravel(), "x": x.ravel(), "g": names}).to_csv(path, index=False)
  formula = parse("y ~ x + (x || g)")
  data = table.grouped(table.read(path), formula, "gaussian")
  found = model.fit(formula, "gaussian", data.batches)
  assert found.singular == () and found.converged
  # Groups tell their level, slope and noise all but exactly: the estimates are these numbers' own.
  close(found.sd[INTERCEPT], float(np.std(level)), 0.05)
  close(found.sd["x"], float(np.std(slope)), 0.01)
  close(found.residual, 0.1, 0.1)


def test_a_singular_fit_is_a_boundary_estimate(tmp_path):
  formula, data, _ = simulated(tmp_path, "gaussian", sd=(0.9, 0.0), seed=1)
  found = model.fit(formula, "gaussian", data.batches)
  assert found.singular == ("x",) and found.sd["x"] == 0.0 and found.sd[INTERCEPT] > 0.3
  assert np.isnan(found.sd_interval["x"]).all() and found.converged
  # No worse than any positive value.
  likelihood = model._likelihood(formula, "gaussian", ())
  for sd in (0.01, 0.05, 0.2):
    other = criteria.to_parameters(formula, found.fixed, found.sd | {"x": sd}, found.residual)
    assert float(likelihood(other, data.batches)) <= found.log_likelihood + 1e-9


def test_no_variation_at_all_is_ordinary_least_squares(tmp_path):
  formula, data, frame = simulated(tmp_path, "gaussian", sd=(0.0, 0.0), seed=8)
  found = model.fit(formula, "gaussian", data.batches)
  reml = model.fit(formula, "gaussian", data.batches, "reml")
  assert set(reml.singular) == set(found.singular) == {INTERCEPT, "x"}
  want = smf.ols("y ~ x", frame).fit()
  close(found.fixed["x"], want.params["x"], 1e-6)
  close(found.residual, float(np.sqrt(want.ssr / want.nobs)), 1e-6)
  close(reml.residual, float(np.sqrt(want.scale)), 1e-6)
  assert found.log_likelihood == pytest.approx(want.llf, abs=1e-6)


def test_the_predictive_estimate_is_near_the_others(tmp_path):
  formula, data, _ = simulated(tmp_path, "gaussian", groups=150)
  key = jax.random.key(0)
  found = model.fit(formula, "gaussian", data.batches, "predictive", key)
  ml = model.fit(formula, "gaussian", data.batches)
  assert found.converged and found.criterion != ml.criterion
  assert 0.6 < found.sd[INTERCEPT] / ml.sd[INTERCEPT] < 1.6
  assert found.log_likelihood < ml.log_likelihood
  with pytest.raises(ValueError, match="pass a key"):
    model.fit(formula, "gaussian", data.batches, "predictive")


def test_the_predictive_estimate_has_no_errors_and_no_intervals(tmp_path):
  """Its criterion is no log likelihood of phi and sigma."""
  formula, data, _ = simulated(tmp_path, "gaussian")
  out = {}
  for estimator in ("ml", "predictive"):
    found = model.fit(formula, "gaussian", data.batches, estimator, jax.random.key(0))
    effects = groups.group_effects(formula, "gaussian", found, data.batches)
    own = groups.unshrunk(formula, data.batches)
    written = report.as_json(found, data, effects, own, {})
    report.plot(tmp_path / f"{estimator}.png", found, formula, data, effects, own)
    out[estimator] = written, report.text(found, formula, data, "gaussian", estimator)
    assert found.undetermined == ()
  written, printed = out["predictive"]
  assert "95 %" not in printed and "nan" not in printed and "[" not in printed
  assert [line.split() for line in printed.split("\n")][2] == ["fixed", "effect", "estimate"]
  assert written["fixed_se"] == written["sd_interval"] == {INTERCEPT: None, "x": None}
  assert written["residual_interval"] is None and written["residual"] > 0
  written, printed = out["ml"]
  assert "95 % interval" in printed and printed.count("[") == 3
  assert min(written["fixed_se"].values()) > 0
  low, high = written["residual_interval"]
  assert low < written["residual"] < high


def test_large_counts_and_responses_far_from_zero(tmp_path):
  rng = np.random.default_rng(4)
  rows = [
    (g, x, rng.poisson(np.exp(5.0 + level + 0.3 * x)))
    for g, level in enumerate(0.4 * rng.normal(size=12))
    for x in rng.normal(size=6)
  ]
  formula = parse("y ~ x + (1 | g)")
  column = lambda i: [str(row[i]) for row in rows]
  columns = {"g": column(0), "x": column(1), "y": column(2)}
  found = model.fit(formula, "poisson", table.grouped(columns, formula, "poisson").batches)
  assert found.converged and abs(found.fixed["x"] - 0.3) < 0.05 and 0.2 < found.sd[INTERCEPT] < 0.7
  assert found.undetermined == ()
  plain = model.fit(formula, "gaussian", table.grouped(columns, formula, "gaussian").batches)
  columns["y"] = [str(float(y) + 1e6) for y in columns["y"]]
  moved = model.fit(formula, "gaussian", table.grouped(columns, formula, "gaussian").batches)
  assert plain.converged and moved.converged
  close(moved.fixed[INTERCEPT] - 1e6, plain.fixed[INTERCEPT], 1e-4)
  close(moved.sd[INTERCEPT], plain.sd[INTERCEPT], 1e-4)


def test_what_the_data_leave_open_is_said():
  formula = parse("y ~ 1 + (1 | g)")
  rng = np.random.default_rng(5)
  columns = {"y": [str(v) for v in rng.normal(size=20)], "g": [f"g{i}" for i in range(20)]}
  found = model.fit(formula, "gaussian", table.grouped(columns, formula, "gaussian").batches)
  assert {"residual", f"sd of {INTERCEPT}"} & set(found.undetermined) or found.singular
  x = rng.normal(size=40)
  columns = {"y": [str(int(v > 0)) for v in x], "x": [str(v) for v in x],
             "g": [f"g{i % 4}" for i in range(40)]}  # fmt: skip
  formula = parse("y ~ x + (1 | g)")
  found = model.fit(formula, "logistic", table.grouped(columns, formula, "logistic").batches)
  assert "x" in found.undetermined


@pytest.mark.parametrize(
  "arguments, message",
  (
    ((), "Give --data and --formula"),
    (("--data=nothing.csv", "--formula=y ~ (1 | g)"), "no file nothing.csv"),
    (("--data=nothing.csv", "--formula=y ~ (x | g)"), "correlated"),
    (
      ("--data=nothing.csv", "--formula=y ~ (1 | g)", "--plot=p.xyz"),
      "p.xyz must end in one of .png",
    ),
    (("--data=nothing.csv", "--formula=y ~ (1 | g)", "--plot=p.PNG"), "no file nothing.csv"),
  ),
)
def test_the_binary_says_what_is_wrong(arguments, message, command):
  done = command("mixed", *arguments)
  assert done.returncode != 0 and message in done.stdout + done.stderr


def test_reml_is_for_gaussians(tmp_path):
  formula, data, _ = simulated(tmp_path, "poisson")
  with pytest.raises(ValueError, match="reml is for"):
    model.fit(formula, "poisson", data.batches, "reml")


@pytest.mark.parametrize("estimator", ("ml", "reml"))
def test_factorisations_wait_for_each_other(estimator):
  formula = parse("y ~ x + (x || g)")
  rows = np.arange(24)
  columns = {"y": np.sin(rows), "x": np.cos(rows), "g": rows % 6}
  data = table.grouped({k: [str(v) for v in c] for k, c in columns.items()}, formula, "gaussian")
  value_and_grad, _ = model._compiled(formula, "gaussian", estimator, ())
  count, pairs = factorisations(value_and_grad.lower(np.zeros(5), data.batches).compile())
  assert count >= 4
  assert not pairs
