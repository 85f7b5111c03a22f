"""Linear mixed models agree with a dense density, the library, statsmodels and published fits."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import statsmodels.api

import shrinkmeta as sm
from shrinkmeta.mixed.criteria.blocks import blocks
from shrinkmeta.mixed.criteria.gaussian import Gaussian
from shrinkmeta.mixed.fit import fit
from tests.mixed import designs
from tests.mixed.designs import CASES, DATA, ONE, design, needs_cases, needs_data, read


def close(got, want, rel=1e-3):
  assert got == pytest.approx(want, rel=rel)


def sigmas_of(made, data, theta, residual):
  """Sigma of every term in the units of the data, from the Lambda of every level."""
  found = {}
  for level, scale in zip(data.levels, data.lambdas(theta), strict=True):
    rows = residual * level.back @ scale
    for i, a in enumerate(level.keys):
      for j, b in enumerate(level.keys):
        found[a, b] = (rows @ rows.T)[i, j]
  several = len(data.levels) > 1
  keys = [[f"{t.group} {n}" if several else n for n in t.names] for t in made.random]
  return [np.array([[found[a, b] for b in names] for a in names]) for names in keys]


@pytest.mark.parametrize("reml", (False, True))
@pytest.mark.parametrize("weighted", (False, True))
def test_the_criterion_is_the_dense_density(reml, weighted):
  rng = np.random.default_rng(3)
  more = {"weights": rng.uniform(0.3, 3, 90), "offset": rng.normal(size=90)} if weighted else {}
  made = designs.nested(**more)
  data = blocks(made)
  criterion = Gaussian(data, reml)
  theta = np.array([0.9, 1.1, -0.4, 0.7, 0.6])
  at = criterion.profile(theta)
  beta, sigmas = data.back @ at.beta, sigmas_of(made, data, theta, at.residual)
  want = designs.dense(made, beta, sigmas, at.residual, reml)
  assert -at.value == pytest.approx(want, abs=1e-8)
  # beta and the residual are the best ones at this theta.
  for change in (0.98, 1.02):
    others = sigmas_of(made, data, theta, at.residual * change)
    assert designs.dense(made, beta, others, at.residual * change, reml) < want
  assert reml or designs.dense(made, beta + [0.01, 0], sigmas, at.residual) < want
  elsewhere = np.array([0.3, -0.5])
  got = criterion.log_likelihood(theta, np.linalg.solve(data.back, elsewhere), at.residual)
  assert got == pytest.approx(designs.dense(made, elsewhere, sigmas, at.residual), abs=1e-8)
  numeric = designs.gradient_by_differences(criterion.value, theta)
  np.testing.assert_allclose(at.gradient, numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reml", (False, True))
def test_the_criterion_is_the_evidence_of_the_library(reml, x64):
  """At the same parameters: sm.log_evidence, and sm.restriction for reml."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(4, 5)) + 1, rng.normal(size=(4, 5))
  table = {"x": x.ravel(), "y": y.ravel(), "g": np.repeat(np.arange(4), 5)}
  made = design(table, "y", [ONE, "x"], ("g", [ONE, "x"], False))
  data = blocks(made)
  theta = np.array([0.8, 0.5])
  at = Gaussian(data, reml).profile(theta)
  first, second = (float(s[0, 0]) for s in sigmas_of(made, data, theta, at.residual))
  beta = data.back @ at.beta
  labels = {"0": "0", "x": "x", "s": "s"}
  likelihood = sm.gaussian_with_scale(lambda t, z: (t["0"] + t["x"] * z, t["s"]))
  phi = {"0": jnp.asarray(beta[0]), "x": jnp.asarray(beta[1]), "s": jnp.log(at.residual)}
  logs = {"0": jnp.log(first), "x": jnp.log(second), "s": jnp.asarray(-jnp.inf)}
  batches = sm.Batch(jnp.asarray(x), jnp.asarray(y))
  inner = sm.Inner(steps=200, tol=1e-12)

  def library(phi, logs, batches):
    one = lambda batch: sm.log_evidence(likelihood, labels, phi, logs, batch, inner, frozen=("s",))[
      0
    ]
    value = jnp.sum(jax.lax.map(one, batches))
    if reml:
      value += sm.restriction(likelihood, labels, phi, logs, batches, ("0", "x"), ("s",))
    return value

  assert -at.value == pytest.approx(float(jax.jit(library)(phi, logs, batches)), abs=1e-8)


def test_dyestuff():
  """The published maximum likelihood fit."""
  found = fit(designs.dyestuff())
  assert -2 * found.log_likelihood == pytest.approx(327.3271, abs=1e-4)
  close(found.fixed[ONE], 1527.5, 1e-6)
  close(found.fixed_se[ONE], 17.6946, 1e-5)
  close(found.sd[ONE], 37.2603, 1e-5)
  close(found.residual, 49.5101, 1e-5)
  close(found.sd_interval[ONE], (17.216, 80.641), 1e-4)
  assert found.converged and not found.singular and not found.undetermined
  assert (found.rows, found.groups, found.parameters) == (30, {"batch": 6}, (1, 1, 0, 1))
  restricted = fit(designs.dyestuff(), estimator="reml")
  assert -2 * restricted.criterion == pytest.approx(319.6543, abs=1e-4)
  close(restricted.sd[ONE], 42.0006, 1e-5)


@needs_data
@pytest.mark.parametrize(
  "correlated,estimator,criterion,sds,correlation,residual",
  (
    (True, "ml", -875.9697, (23.7806, 5.7168), 0.081, 25.5918),
    (True, "reml", -871.8141, (24.7407, 5.9221), 0.066, 25.5918),
    (False, "ml", -876.0016, (24.1713, 5.7994), None, 25.5561),
    (False, "reml", -871.8346, (25.0513, 5.9882), None, 25.5653),
  ),
)
def test_sleepstudy(correlated, estimator, criterion, sds, correlation, residual):
  made = design(
    read(DATA / "sleepstudy.csv"), "Reaction", [ONE, "Days"], ("Subject", [ONE, "Days"], correlated)
  )
  found = fit(made, estimator=estimator)
  assert found.criterion == pytest.approx(criterion, abs=1e-4)
  close(tuple(found.sd.values()), sds, 1e-4)
  close(found.residual, residual, 1e-5)
  close(tuple(found.fixed.values()), (251.4051, 10.46729), 1e-6)
  assert list(found.sd) == [ONE, "Days"]
  if correlated:
    assert found.correlation[ONE, "Days"] == pytest.approx(correlation, abs=1e-3)
  else:
    assert found.correlation == {}
    want = (6.8854, 1.5596) if estimator == "reml" else (6.7077, 1.5193)
    close(tuple(found.fixed_se_conditional.values()), want, 1e-4)


@needs_data
@pytest.mark.parametrize(
  "file,response,x,group,terms,correlated,reml,ml",
  (
    ("radon", "log_radon", "floor", "county", [ONE], False, 2171.3053, 2163.6506),
    ("radon", "log_radon", "floor", "county", [ONE, "floor"], True, 2168.3246, 2161.1088),
    ("exam", "normexam", "standLRT", "school", [ONE, "standLRT"], True, 9327.6003, 9316.8710),
  ),
)
def test_published_criteria(file, response, x, group, terms, correlated, reml, ml):
  made = design(read(DATA / f"{file}.csv"), response, [ONE, x], (group, terms, correlated))
  assert -2 * fit(made, estimator="reml").criterion == pytest.approx(reml, abs=2e-4)
  assert -2 * fit(made).criterion == pytest.approx(ml, abs=2e-4)


@pytest.mark.parametrize("reml", (False, True))
def test_errors_of_the_observed_information_are_those_of_the_dense_hessian(reml):
  """The Hessian of the dense density with respect to beta and log standard deviations."""
  rng = np.random.default_rng(5)
  sizes = np.array([3, 4, 5, 6, 7, 8])
  g = np.repeat(np.arange(6), sizes)
  x = rng.normal(size=len(g)) + g
  y = 1 + x + rng.normal(size=6)[g] + 0.5 * rng.normal(size=len(g))
  made = design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE], False))
  found = fit(made, estimator="reml" if reml else "ml")

  def value(v):
    sigma = np.array([[np.exp(2 * v[2])]])
    total = designs.dense(made, v[:2], [sigma], np.exp(v[3]))
    if reml:
      cov = designs.marginal(made, [sigma], np.exp(v[3]))
      total -= np.linalg.slogdet(made.fixed.T @ np.linalg.solve(cov, made.fixed))[1] / 2
    return -total

  at = np.array([*found.fixed.values(), np.log(found.sd[ONE]), np.log(found.residual)])
  gradient = lambda v: designs.gradient_by_differences(value, v, 1e-4)
  assert np.abs(gradient(at)).max() < 1e-5
  hessian = np.stack([(gradient(at + h) - gradient(at - h)) / 2e-3 for h in 1e-3 * np.eye(4)])
  covariance = np.linalg.inv((hessian + hessian.T) / 2)
  np.testing.assert_allclose(found.fixed_covariance, covariance[:2, :2], rtol=1e-4)
  se = np.sqrt(np.diag(covariance))
  close(tuple(found.fixed_se.values()), tuple(se[:2]), 1e-4)
  low, high = found.sd_interval[ONE]
  close(np.log(high / low) / (2 * 1.959964), se[2], 1e-4)
  low, high = found.residual_interval
  close(np.log(high / low) / (2 * 1.959964), se[3], 1e-4)
  cov = designs.marginal(made, [np.array([[found.sd[ONE] ** 2]])], found.residual)
  given = np.linalg.inv(made.fixed.T @ np.linalg.solve(cov, made.fixed))
  close(tuple(found.fixed_se_conditional.values()), tuple(np.sqrt(np.diag(given))), 1e-6)
  assert found.fixed_se["x"] > 1.0001 * found.fixed_se_conditional["x"]


@pytest.mark.parametrize("reml", (False, True))
def test_a_correlated_term_with_statsmodels(reml):
  rng = np.random.default_rng(7)
  g = np.repeat(np.arange(25), 6)
  x = rng.normal(size=150) + 3
  levels = rng.normal(size=(25, 2)) @ np.array([[1.0, 0.4], [0.0, 0.6]])
  y = 2 + x + levels[g, 0] + levels[g, 1] * x + 0.7 * rng.normal(size=150)
  made = design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE, "x"], True))
  found = fit(made, estimator="reml" if reml else "ml")
  other = statsmodels.api.MixedLM(y, made.fixed, g, made.fixed)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # so near the optimum its line search finds no better point
    other = other.fit(reml=reml, method="bfgs", gtol=1e-10, maxiter=1000)
  assert found.criterion == pytest.approx(other.llf, abs=1e-8)
  np.testing.assert_allclose(found.covariances[0], np.asarray(other.cov_re), rtol=1e-6)
  np.testing.assert_allclose(list(found.fixed.values()), other.fe_params, rtol=1e-8)


def test_nested_factors_have_keys_of_factor_and_column():
  made = designs.nested()
  found = fit(made, estimator="reml")
  keys = ["a (Intercept)", "a:b (Intercept)", "a:b x", "a:b w"]
  assert list(found.sd) == keys and found.groups == {"a": 5, "a:b": 15}
  assert list(found.correlation) == [("a:b (Intercept)", "a:b x")]
  want = designs.dense(made, None, found.covariances, found.residual, reml=True)
  assert found.criterion == pytest.approx(want, abs=1e-7)
  beta = np.array(list(found.fixed.values()))
  want = designs.dense(made, beta, found.covariances, found.residual)
  assert found.log_likelihood == pytest.approx(want, abs=1e-7)
  for k, sigma in enumerate(found.covariances):  # and no other variances near by do better
    for factor in (0.9, 1.1):
      others = [factor * s if j == k else s for j, s in enumerate(found.covariances)]
      assert designs.dense(made, None, others, found.residual, reml=True) < found.criterion
    assert sigma.shape == (len(made.random[k].names),) * 2


@needs_cases
@pytest.mark.parametrize(
  "file,estimator,criterion,sds,residual",
  (
    ("local_optimum", "reml", -64.12932, (2.33780, 0.65597), 0.45729),
    ("local_optimum", "ml", -64.27254, (2.17206, 0.60973), 0.45820),
    ("local_optimum_24rows", "reml", -44.38828, (31.744, 10.344), 0.1343),
    ("local_optimum_24rows", "ml", -50.13469, None, None),
  ),
)
def test_the_better_of_two_optima(file, estimator, criterion, sds, residual):
  made = design(read(CASES / f"{file}.csv"), "y", [ONE, "x"], ("g", [ONE, "x"], False))
  found = fit(made, estimator=estimator)
  assert found.criterion == pytest.approx(criterion, abs=1e-4)
  assert found.converged and found.singular == ()
  if sds:
    close(tuple(found.sd.values()), sds, 1e-4)
    close(found.residual, residual, 1e-3)
  if estimator == "reml" and file == "local_optimum":
    close(tuple(found.fixed_se.values()), (0.8401, 0.2351), 1e-3)


def two_optima(seed):
  """y ~ x + (x || g), x far from 0: by levels or by slopes, or by noise."""
  rng = np.random.default_rng(seed)
  x = np.tile(np.arange(14.0, 20.0), 8)
  g = np.repeat(np.arange(8), 6)
  y = x + 17 * rng.normal(size=8)[g] + rng.normal(size=8)[g] * x + 0.3 * rng.normal(size=48)
  return design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE, "x"], False))


@pytest.mark.parametrize("seed", range(3))
def test_no_point_of_a_fine_grid_is_better(seed):
  made = two_optima(seed)
  found = fit(made, estimator="reml")
  criterion = Gaussian(blocks(made), True)
  grid = np.append(0.0, np.geomspace(1e-3, 1e4, 40))
  best = max(-criterion.value(np.array([a, b])) for a in grid for b in grid)
  assert best <= found.criterion + 1e-9 and best > found.criterion - 1


@needs_cases
def test_predictors_of_size_1e12():
  table = read(CASES / "rank_gdp.csv")
  found = fit(
    design(table, "y", [ONE, "gdp", "share"], ("country", [ONE], False)), estimator="reml"
  )
  assert found.criterion == pytest.approx(-44.6609, abs=1e-4)
  close(tuple(found.fixed.values()), (1.682502, 1.417985e-13, 48.71059), 1e-5)
  close((found.sd[ONE], found.residual), (0.453925, 0.251857), 1e-5)
  table = read(CASES / "rank_timestamp.csv")
  found = fit(design(table, "y", [ONE, "t_ms"], ("id", [ONE], False)), estimator="reml")
  close(found.fixed["t_ms"], 6.412336e-10, 1e-6)
  close(found.fixed_se["t_ms"], 4.219e-11, 1e-3)
  close((found.sd[ONE], found.residual), (1.094528, 0.337535), 1e-5)


@pytest.mark.parametrize("correlated", (False, True))
def test_units_and_origins_do_not_matter(correlated):
  """The same data in milliseconds since 1970: the same fit in other units."""
  rng = np.random.default_rng(2)
  g, t = np.repeat(np.arange(12), 8), np.tile(np.arange(8.0), 12)
  y = 1 + 0.5 * t + rng.normal(size=12)[g] + 0.3 * rng.normal(size=12)[g] * t
  y += 0.4 * rng.normal(size=96)
  terms = [ONE, "t"] if correlated else [ONE]
  make = lambda t: design({"t": t, "y": y, "g": g}, "y", [ONE, "t"], ("g", terms, correlated))
  plain, shifted = fit(make(t)), fit(make(1.7e12 + 6e8 * t))
  assert shifted.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-5)
  close(shifted.fixed["t"] * 6e8, plain.fixed["t"], 1e-6)
  close(shifted.fixed_se["t"] * 6e8, plain.fixed_se["t"], 1e-5)
  close(shifted.residual, plain.residual, 1e-5)
  if correlated:
    close(shifted.sd["t"] * 6e8, plain.sd["t"], 1e-4)


def test_a_small_sd_beside_a_large_fixed_effect_is_not_0():
  rng = np.random.default_rng(11)
  g = np.repeat(np.arange(30), 6)
  x = rng.normal(size=180)
  y = 1e6 * x + 1e-2 * rng.normal(size=30)[g] + 1e-2 * rng.normal(size=180)
  found = fit(design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE], False)))
  close(found.sd[ONE], 1e-2, 0.3)
  close(found.residual, 1e-2, 0.2)
  assert found.converged and not found.singular and not found.undetermined


def test_a_singular_fit_is_ordinary_least_squares():
  rng = np.random.default_rng(1)
  g = np.repeat(np.arange(6), 4)
  within = np.tile([1.0, -1.0, 2.0, -2.0], 6)  # group means alike: no variance between groups
  x = rng.normal(size=24)
  made = design({"x": x, "y": within, "g": g}, "y", [ONE, "x"], ("g", [ONE], False))
  found = fit(made)
  assert found.singular == (ONE,) and found.sd[ONE] == 0 and np.isnan(found.sd_interval[ONE]).all()
  beta, rss = np.linalg.lstsq(made.fixed, within, rcond=None)[:2]
  np.testing.assert_allclose(list(found.fixed.values()), beta, rtol=1e-9, atol=1e-12)
  close(found.residual, np.sqrt(rss[0] / 24), 1e-9)
  assert found.converged and not found.undetermined


def test_a_correlation_of_1_is_said():
  rng = np.random.default_rng(8)
  g, x = np.repeat(np.arange(15), 5), rng.normal(size=75)
  u = rng.normal(size=15)[g]
  y = u + u * x + 0.5 * rng.normal(size=75)
  found = fit(design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE, "x"], True)))
  if abs(found.correlation[ONE, "x"]) > 1 - 1e-9:
    assert found.singular_correlation == ("g",) and found.singular == ()
  assert found.correlation[ONE, "x"] > 0.95 and found.converged


def test_what_one_row_a_group_leaves_open_is_named():
  rng = np.random.default_rng(4)
  x = rng.normal(size=20)
  table = {"x": x, "y": x + rng.normal(size=20), "g": np.arange(20)}
  found = fit(design(table, "y", [ONE, "x"], ("g", [ONE], False)), estimator="reml")
  assert found.undetermined == ("sd of (Intercept)", "residual")
  least = np.linalg.lstsq(np.stack([np.ones(20), x], 1), table["y"], rcond=None)
  np.testing.assert_allclose(list(found.fixed.values()), least[0], rtol=1e-9)
  variance = found.sd[ONE] ** 2 + found.residual**2
  close(variance, least[1][0] / 18, 1e-6)
  close(found.fixed_se["x"], np.sqrt(variance / np.square(x - x.mean()).sum()), 1e-6)


@needs_cases
def test_one_long_group_costs_its_rows():
  made = design(read(CASES / "unbalanced.csv"), "y", [ONE, "x"], ("g", [ONE], False))
  assert fit(made, estimator="reml").criterion == pytest.approx(-9059.1212, abs=1e-4)


def test_no_random_part_and_no_fixed_part():
  rng = np.random.default_rng(6)
  table = {"x": rng.normal(size=40), "y": rng.normal(size=40), "g": np.repeat(np.arange(8), 5)}
  plain = fit(design(table, "y", [ONE, "x"]))
  other = statsmodels.api.OLS(table["y"], np.stack([np.ones(40), table["x"]], 1)).fit()
  assert plain.log_likelihood == pytest.approx(other.llf, abs=1e-9)
  assert plain.sd == {} and plain.groups == {}
  random = fit(design(table, "y", [], ("g", [ONE], False)))
  assert random.fixed == {} and random.fixed_covariance.shape == (0, 0)
  sigma = [np.array([[random.sd[ONE] ** 2]])]
  made = design(table, "y", [], ("g", [ONE], False))
  want = designs.dense(made, np.zeros(0), sigma, random.residual)
  assert random.log_likelihood == pytest.approx(want, abs=1e-8)


def test_an_exact_fit_has_no_interval_of_a_correlation():
  g, x = np.repeat(np.arange(6), 5), np.tile(np.arange(5.0), 6)
  level, slope = np.random.default_rng(3).normal(size=(2, 6))
  made = design({"x": x, "y": level[g] + slope[g] * x, "g": g}, "y", [ONE, "x"],
                ("g", [ONE, "x"], True))  # fmt: skip
  found = fit(made)
  assert found.perfect and len(found.correlation) == 1
  (correlation,), (interval,) = found.correlation.values(), found.correlation_interval.values()
  assert abs(correlation) < 1 and np.isnan(interval).all()


@pytest.mark.parametrize("random", (False, True))
def test_an_exact_fit_leaves_the_residual_open(random):
  g, x = np.repeat(np.arange(6), 5), np.tile(np.arange(5.0), 6)
  y = 1 + 2 * x + random * (g - 2.5) * 3
  found = fit(design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE], False)))
  assert found.perfect and found.undetermined == ("residual",)
  for errors in (found.fixed_se, found.fixed_se_conditional):
    assert np.isnan(list(errors.values())).all()
  assert np.isnan(found.sd_interval[ONE]).all() and np.isnan(found.residual_interval).all()
  noisy = y + 1e-4 * np.sin(np.arange(30))
  close_by = fit(design({"x": x, "y": noisy, "g": g}, "y", [ONE, "x"], ("g", [ONE], False)))
  assert not close_by.perfect and close_by.fixed_se["x"] > 0
  close(found.fixed["x"], 2.0, 1e-6)
  if random:
    sd = 3 * np.sqrt(np.mean(np.square(np.arange(6) - 2.5)))
    close(close_by.sd[ONE], sd, 1e-3)
    close(found.sd[ONE], sd, 0.1)  # the end of its search is rounding: SciPy 1.17 and 1.18 differ
