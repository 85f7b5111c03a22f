"""Generalised linear mixed models agree with a dense Laplace approximation."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats

from shrinkmeta.mixed.criteria.blocks import blocks
from shrinkmeta.mixed.criteria.laplace import Laplace
from shrinkmeta.mixed.fit import fit
from tests.mixed import designs
from tests.mixed.designs import CASES, ONE, design, needs_cases, read


def close(got, want, rel=1e-3):
  assert got == pytest.approx(want, rel=rel)


def dense_laplace(made, family, beta, sigmas):
  """The approximation in the effects themselves, all at once: mode by BFGS, one determinant."""
  weights = np.ones(len(made.response)) if made.weights is None else made.weights
  trials = np.ones(len(made.response)) if made.trials is None else made.trials
  blocks_of, precisions = [], []
  for term, sigma in zip(made.random, sigmas, strict=True):
    for level in range(len(term.levels)):
      blocks_of.append(term.columns * (term.index == level)[:, None])
      precisions.append(np.linalg.inv(sigma))
  z = np.concatenate(blocks_of, 1)
  precision = np.zeros((z.shape[1],) * 2)
  at = 0
  for block in precisions:
    precision[at : at + len(block), at : at + len(block)] = block
    at += len(block)
  fixed = made.offset + made.fixed @ beta

  def parts(b):
    eta = fixed + z @ b
    mean = trials / (1 + np.exp(-eta)) if family == "logistic" else np.exp(eta)
    curvature = mean * (1 - mean / trials) if family == "logistic" else mean
    return eta, weights * (made.response - mean), weights * curvature

  b = np.zeros(z.shape[1])
  for _ in range(60):
    _, score, curvature = parts(b)
    gradient = z.T @ score - precision @ b
    b = b + np.linalg.solve(precision + z.T @ (curvature[:, None] * z), gradient)
  assert np.abs(gradient).max() < 1e-9 * max(1.0, made.response.max())
  eta, _, curvature = parts(b)
  if family == "logistic":
    log_p = scipy.stats.binom.logpmf(made.response, trials, 1 / (1 + np.exp(-eta)))
  else:
    log_p = scipy.stats.poisson.logpmf(made.response, np.exp(eta))
  hessian = precision + z.T @ (curvature[:, None] * z)
  value = weights @ log_p - b @ precision @ b / 2 + np.linalg.slogdet(precision)[1] / 2
  return value - np.linalg.slogdet(hessian)[1] / 2


CASE = {
  "logistic": {"response": "wins"},
  "poisson": {"response": "count"},
}


@pytest.mark.parametrize("family", CASE)
@pytest.mark.parametrize("weighted", (False, True))
def test_the_criterion_and_its_gradient(family, weighted):
  rng = np.random.default_rng(4)
  more = {"weights": rng.uniform(0.5, 2, 90), "offset": 0.3 * rng.normal(size=90)}
  made = designs.nested(**CASE[family], **(more if weighted else {}))
  data = blocks(made)
  criterion = Laplace(data, family)
  x = np.array([0.2, -0.3, 0.7, 0.8, -0.3, 0.4, 0.5])
  sigmas = []
  for level, scale in zip(data.levels, data.lambdas(x[2:]), strict=True):
    rows = level.back @ scale
    sigmas.append(rows @ rows.T)
  split = [sigmas[0], sigmas[1][:2, :2], sigmas[1][2:, 2:]]
  want = dense_laplace(made, family, data.back @ x[:2], split)
  value, gradient = criterion.value_and_gradient(x)
  assert -value == pytest.approx(want, abs=1e-8)
  numeric = designs.gradient_by_differences(lambda v: criterion.value_and_gradient(v)[0], x, 1e-4)
  np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", CASE)
def test_a_fit_is_a_maximum_with_the_errors_of_its_hessian(family):
  rng = np.random.default_rng(12)
  g = np.repeat(np.arange(12), 7)
  x = rng.normal(size=84)
  eta = 0.4 + 0.8 * x + rng.normal(size=12)[g]
  y = rng.poisson(np.exp(eta)) if family == "poisson" else rng.random(84) < 1 / (1 + np.exp(-eta))
  made = design({"x": x, "y": y * 1.0, "g": g}, "y", [ONE, "x"], ("g", [ONE], False))
  found = fit(made, family)
  assert found.converged and found.residual is None and found.criterion == found.log_likelihood
  value = lambda v: -dense_laplace(made, family, v[:2], [np.array([[np.exp(2 * v[2])]])])
  at = np.array([*found.fixed.values(), np.log(found.sd[ONE])])
  assert -value(at) == pytest.approx(found.log_likelihood, abs=1e-8)
  gradient = lambda v: designs.gradient_by_differences(value, v, 1e-4)
  assert np.abs(gradient(at)).max() < 1e-4
  hessian = np.stack([(gradient(at + h) - gradient(at - h)) / 2e-3 for h in 1e-3 * np.eye(3)])
  covariance = np.linalg.inv((hessian + hessian.T) / 2)
  np.testing.assert_allclose(found.fixed_covariance, covariance[:2, :2], rtol=1e-4)
  low, high = found.sd_interval[ONE]
  close(np.log(high / low) / (2 * 1.959964), np.sqrt(covariance[2, 2]), 1e-4)


def test_laplace_is_near_the_integral():
  """60 trials a group: the integral over the intercept by quadrature."""
  rng = np.random.default_rng(1)
  g = np.repeat(np.arange(10), 2)
  eta = 0.3 + rng.normal(size=10)[g]
  wins = rng.binomial(30, 1 / (1 + np.exp(-eta))).astype(float)
  table = {"wins": wins, "g": g}
  found = fit(
    design(table, "wins", [ONE], ("g", [ONE], False), trials=np.full(20, 30.0)), "logistic"
  )

  def exact(mean, sd):
    total = 0.0
    for group in range(10):
      mine = wins[g == group]
      density = lambda b, mine=mine: (
        np.exp(scipy.stats.binom.logpmf(mine, 30, 1 / (1 + np.exp(-mean - b))).sum())
        * scipy.stats.norm.pdf(b, 0, sd)
      )
      total += np.log(scipy.integrate.quad(density, -8 * sd, 8 * sd, limit=200)[0])
    return total

  assert found.log_likelihood == pytest.approx(exact(found.fixed[ONE], found.sd[ONE]), abs=0.05)


@needs_cases
def test_a_large_sd():
  """glmmTMB's maximum; at its SD many inner problems take damped steps."""
  table = read(CASES / "logistic_large_sd.csv")
  made = design(table, "y", [ONE, "x"], ("g", [ONE], False))
  found = fit(made, "logistic")
  assert found.log_likelihood == pytest.approx(-73.56444, abs=1e-4)
  close((found.fixed[ONE], found.fixed["x"], found.sd[ONE]), (2.9439, -0.3521, 4.273), 5e-4)
  assert found.converged and not found.undetermined
  criterion = Laplace(blocks(made), "logistic")
  for sd in np.geomspace(0.01, 100, 30):
    criterion.mode(np.array([2.9, -0.35]), np.array([sd]))
  assert criterion.failed == 0


@needs_cases
def test_separation_in_the_nests():
  table = read(CASES / "separation_se.csv")
  names = [ONE, "control", "sucrose", "protein"]
  found = fit(design(table, "emergence", names, ("nest", [ONE], False)), "logistic")
  assert found.undetermined == ("sucrose",) and found.fixed_se["sucrose"] == np.inf
  close([found.fixed_se[n] for n in names if n != "sucrose"], [0.5753, 0.6466, 0.6435], 3e-4)
  close(found.sd_interval[ONE], (0.3044, 2.18), 1e-3)


@pytest.mark.parametrize("family", CASE)
def test_a_separated_column_leaves_the_others_as_they_are_without_its_rows(family):
  """Rows whose indicator goes to infinity say nothing of the rest."""
  rng = np.random.default_rng(2)
  g, x = np.repeat(np.arange(15), 8), rng.normal(size=120)
  treated = (np.arange(120) % 8 == 0) * 1.0
  eta = 0.5 + 0.7 * x + rng.normal(size=15)[g]
  if family == "poisson":
    y = np.where(treated == 1, 0, rng.poisson(np.exp(eta)))
  else:
    y = np.where(treated == 1, 1, rng.random(120) < 1 / (1 + np.exp(-eta)))
  table = {"x": x, "t": treated, "g": g, "y": y * 1.0}
  whole = fit(design(table, "y", [ONE, "x", "t"], ("g", [ONE], False)), family)
  rest = {name: values[treated == 0] for name, values in table.items()}
  part = fit(design(rest, "y", [ONE, "x"], ("g", [ONE], False)), family)
  assert whole.undetermined == ("t",) and part.undetermined == ()
  assert whole.fixed_se["t"] == np.inf and np.isnan(whole.fixed_covariance[2]).all()
  assert whole.log_likelihood == pytest.approx(part.log_likelihood, abs=1e-5)
  for name in (ONE, "x"):
    close(whole.fixed[name], part.fixed[name], 1e-5)
    close(whole.fixed_se[name], part.fixed_se[name], 1e-5)
  close(whole.sd_interval[ONE], part.sd_interval[ONE], 1e-4)
  assert whole.converged


def test_a_factor_with_a_separated_level_names_that_level():
  """The baseline is the separated level: all coefficients move with the intercept."""
  rng = np.random.default_rng(3)
  g, kind = np.repeat(np.arange(10), 9), np.tile(np.repeat(np.arange(3), 3), 10)
  y = np.where(kind == 0, 1, rng.random(90) < 0.5) * 1.0
  table = {"b": kind == 1, "c": kind == 2, "g": g, "y": y}
  found = fit(design(table, "y", [ONE, "b", "c"], ("g", [ONE], False)), "logistic")
  assert found.undetermined[:3] == (ONE, "b", "c")
  other = fit(
    design(table | {"a": kind == 0, "b": kind == 1}, "y", ["b", "c", "a"], ("g", [ONE], False)),
    "logistic",
  )
  assert other.undetermined[0] == "a" and "b" not in other.undetermined
  assert found.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)


def test_a_maximum_behind_a_correlation_of_one():
  """Pairs of 0 or 1 with two effects; the best of 30 random starts of another likelihood."""
  rng = np.random.default_rng(12)
  g, x, u = np.repeat(np.arange(20), 2), 3 + rng.normal(size=40), rng.normal(size=(2, 20))
  eta = 4 * u[0][g] + (0.5 + u[1][g]) * (x - 3)
  y = (rng.random(40) < 1 / (1 + np.exp(-eta))) * 1.0
  made = design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE, "x"], True))
  found = fit(made, "logistic")
  assert found.converged and found.log_likelihood > -19.5493
  assert -0.95 < found.correlation[ONE, "x"] < -0.93


def test_a_maximum_with_a_correlation_apart_from_the_others():
  """Eight pairs of 0 or 1; the best of 12 random starts of another likelihood."""
  x = np.array([3.3236, 2.3966, 1.7363, 4.1403, 3.8352, 2.7291, 3.3589, 4.4348,
                2.3024, 2.468, 2.2559, 3.7348, 3.3153, 2.9701, 1.3924, 2.835])  # fmt: skip
  y = np.array([1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0.0])
  table = {"x": x, "y": y, "g": np.repeat(np.arange(8), 2)}
  found = fit(design(table, "y", [ONE, "x"], ("g", [ONE, "x"], True)), "logistic")
  assert found.converged and found.log_likelihood == pytest.approx(-6.66768, abs=1e-4)


@pytest.mark.parametrize("seed", (0, 1))
def test_three_effects_of_counts_without_their_fixed_effects(seed):
  """Here the fixed effects of one sd, far from those of the next, once led to rates of 0."""
  rng = np.random.default_rng(seed)
  g = np.arange(150) % 20
  x, z = rng.normal(size=(2, 150))
  y = rng.poisson(np.exp(1 + 0.5 * x + 0.5 * rng.normal(size=20)[g])) * 1.0
  table = {"x": x, "z": z, "y": y, "g": g}
  made = design(table, "y", [ONE], ("g", [ONE, "x", "z"], True))
  found = fit(made, "poisson")
  assert found.converged
  value = dense_laplace(made, "poisson", [found.fixed[ONE]], found.covariances)
  assert found.log_likelihood == pytest.approx(value, abs=1e-6)
  smaller = fit(design(table, "y", [ONE], ("g", [ONE, "x"], True)), "poisson")
  assert found.log_likelihood >= smaller.log_likelihood


def test_a_start_far_away_costs_nothing():
  """The maximum over the effects, from a start whose rates overflow or vanish."""
  made = designs.nested(**CASE["poisson"])
  criterion = Laplace(blocks(made), "poisson")
  theta = np.array([0.7, 0.8, -0.3, 0.4, 0.5])
  want, at, _ = criterion.penalised(theta)
  for far in (-5e3, 30.0, 900.0):
    value, beta, _ = criterion.penalised(theta, np.full(2, far))
    assert value == pytest.approx(want, abs=1e-5)
    np.testing.assert_allclose(beta, at, atol=1e-3)


def test_groups_of_one_kind_alone_have_no_finite_sd():
  """Pairs of two successes or two failures: the likelihood itself rises with the sd."""
  both = lambda sd: scipy.integrate.quad(
    lambda u: scipy.stats.norm.pdf(u) * scipy.special.expit(sd * u) ** 2, -9, 9, limit=200
  )[0]
  assert both(2) < both(8) < both(32) < both(128) < 0.5
  table = {"y": np.repeat(np.arange(20) % 2, 2) * 1.0, "g": np.repeat(np.arange(20), 2)}
  found = fit(design(table, "y", [ONE], ("g", [ONE], False)), "logistic")
  assert found.perfect and found.undetermined == (ONE, "sd of (Intercept)")
  assert np.isnan(found.sd_interval[ONE]).all() and np.isnan(found.fixed_se[ONE])
  table["y"][0] = 1 - table["y"][0]
  mixed = fit(design(table, "y", [ONE], ("g", [ONE], False)), "logistic")
  assert not mixed.perfect and mixed.fixed_se[ONE] > 0 and mixed.sd_interval[ONE][0] > 0


def test_without_variation_between_groups_it_is_a_generalised_linear_model():
  import statsmodels.api

  rng = np.random.default_rng(9)
  x = rng.normal(size=60)
  y = rng.poisson(np.exp(0.3 + 0.5 * x)) * 1.0
  table = {"x": x, "y": y, "g": np.tile(np.arange(6), 10)}
  other = statsmodels.api.GLM(
    y, np.stack([np.ones(60), x], 1), family=statsmodels.api.families.Poisson()
  ).fit()
  plain = fit(design(table, "y", [ONE, "x"]), "poisson")
  assert plain.log_likelihood == pytest.approx(other.llf, abs=1e-7)
  np.testing.assert_allclose(list(plain.fixed_se.values()), other.bse, rtol=1e-5)
  np.testing.assert_allclose(list(plain.fixed_se_conditional.values()), other.bse, rtol=1e-5)
  mixed = fit(design(table, "y", [ONE, "x"], ("g", [ONE], False)), "poisson")
  if mixed.singular:
    assert mixed.log_likelihood == pytest.approx(other.llf, abs=1e-6)
  assert mixed.log_likelihood >= other.llf - 1e-6


def test_the_criterion_does_not_depend_on_where_it_was_before():
  """u of a small theta, taken as the start at a larger one, would be a rate of e^200."""
  y = np.concatenate([np.arange(18.0), [9000.0, 7.0]])
  table = {"y": y, "g": np.repeat(np.arange(5), 4), "x": np.linspace(-1, 1, 20)}
  made = blocks(design(table, "y", [ONE, "x"], ("g", [ONE], False)))
  before, fresh = Laplace(made, "poisson"), Laplace(made, "poisson")
  before.value_and_gradient(np.array([0.0, 0.0, 0.01]))
  assert np.abs(before.warm[0]).max() > 40
  at = np.array([0.5, 0.5, 5.0])
  value, gradient = before.value_and_gradient(at)
  want = fresh.value_and_gradient(at)
  assert value == pytest.approx(want[0], abs=1e-8)
  np.testing.assert_allclose(gradient, want[1], atol=1e-7)


def test_large_counts():
  rng = np.random.default_rng(10)
  g = np.repeat(np.arange(8), 5)
  level = 12 + 0.3 * rng.normal(size=8)[g]
  table = {"y": rng.poisson(np.exp(level)) * 1.0, "g": g}
  found = fit(design(table, "y", [ONE], ("g", [ONE], False)), "poisson")
  assert found.converged
  close(found.fixed[ONE], level.mean(), 0.02)
  want = dense_laplace(
    design(table, "y", [ONE], ("g", [ONE], False)),
    "poisson",
    np.array([found.fixed[ONE]]),
    [found.covariances[0]],
  )
  assert found.log_likelihood == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("family", ("gaussian", "logistic", "poisson"))
def test_the_predictive_estimate(family):
  """Its criterion, by hand, at its own estimates; seeds cut the groups in other halves."""
  from shrinkmeta.mixed.criteria.predictive import halves

  rng = np.random.default_rng(14)
  g, x = np.repeat(np.arange(20), 6), rng.normal(size=120)
  eta = 0.2 + 0.5 * x + rng.normal(size=20)[g]
  y = {
    "gaussian": eta + 0.5 * rng.normal(size=120),
    "logistic": (rng.random(120) < 1 / (1 + np.exp(-eta))) * 1.0,
    "poisson": rng.poisson(np.exp(eta)) * 1.0,
  }[family]
  made = design({"x": x, "y": y, "g": g}, "y", [ONE, "x"], ("g", [ONE], False))
  found = fit(made, family, "predictive", seed=1)
  assert found.converged and np.isnan(list(found.fixed_se.values())).all()
  assert np.isnan(found.sd_interval[ONE]).all() and found.undetermined == ()
  data = blocks(made)
  half = np.empty(120, bool)
  half[data.order] = halves(data, 1)
  assert (np.bincount(g[half]) == 3).all()
  fixed = made.fixed @ np.array(list(found.fixed.values()))

  def log_p(eta, rows):
    if family == "gaussian":
      return scipy.stats.norm.logpdf(y[rows], eta, found.residual)
    if family == "logistic":
      return scipy.stats.bernoulli.logpmf(y[rows], 1 / (1 + np.exp(-eta)))
    return scipy.stats.poisson.logpmf(y[rows], np.exp(eta))

  total = 0.0
  for train, val in ((half, ~half), (~half, half)):
    for group in range(20):
      mine, others = train & (g == group), val & (g == group)
      joint = lambda b, mine=mine: (
        -log_p(fixed[mine] + b, mine).sum() + b**2 / (2 * found.sd[ONE] ** 2)
      )
      best = scipy.optimize.minimize_scalar(joint, options={"xtol": 1e-12}).x
      total += log_p(fixed[others] + best, others).sum()
  assert found.criterion == pytest.approx(total, abs=1e-6)
  assert fit(made, family, "predictive", seed=2).criterion != found.criterion
  if family == "gaussian":
    want = designs.dense(
      made, np.array(list(found.fixed.values())), found.covariances, found.residual
    )
  else:
    want = dense_laplace(made, family, np.array(list(found.fixed.values())), found.covariances)
  assert found.log_likelihood == pytest.approx(want, abs=1e-6)
