"""Profile intervals and likelihood-ratio tests agree with published ones and dense densities."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from shrinkmeta.mixed.compare import bootstrap, likelihood_ratio, simulate
from shrinkmeta.mixed.fit import fit
from shrinkmeta.mixed.intervals import profile_interval
from tests.mixed import designs
from tests.mixed.designs import DATA, ONE, design, needs_data, read
from tests.mixed.laplace_test import dense_laplace


def test_dyestuff():
  """lme4's profile of the maximum likelihood fit."""
  made = designs.dyestuff()
  found = fit(made)
  assert profile_interval(found, made, ONE) == pytest.approx((12.1975, 84.0634), abs=2e-3)
  assert profile_interval(found, made, "residual") == pytest.approx((38.2301, 67.6577), abs=2e-3)


@needs_data
def test_sleepstudy():
  """lme4's profile of a correlated term."""
  table = read(DATA / "sleepstudy.csv")
  made = design(table, "Reaction", [ONE, "Days"], ("Subject", [ONE, "Days"], True))
  found = fit(made)
  assert profile_interval(found, made, ONE) == pytest.approx((14.3814, 37.7160), abs=2e-3)
  assert profile_interval(found, made, "Days") == pytest.approx((3.8012, 8.7534), abs=2e-3)
  assert profile_interval(found, made, "residual") == pytest.approx((22.8983, 28.8580), abs=2e-3)


@pytest.mark.parametrize("estimator", ("ml", "reml"))
def test_the_likelihood_at_the_ends(estimator):
  """The dense density, maximised at each end over the residual, lies chi2 / 2 below the maximum."""
  made = designs.dyestuff()
  found = fit(made, estimator=estimator)
  low, high = profile_interval(found, made, ONE, 0.8)

  def best(sd):
    def value(log_residual):
      sigma, residual = [np.array([[sd**2]])], np.exp(log_residual)
      if estimator == "reml":
        return -designs.dense(made, None, sigma, residual, reml=True)
      return -designs.dense(made, np.array([made.response.mean()]), sigma, residual)

    return -scipy.optimize.minimize_scalar(value, bounds=(2, 6), method="bounded").fun

  for end in (low, high):
    assert found.criterion - best(end) == pytest.approx(scipy.stats.chi2.ppf(0.8, 1) / 2, abs=1e-4)


def test_counts_at_the_ends_and_on_the_boundary():
  def best(made, sd):
    """The largest dense Laplace likelihood over the mean, at one standard deviation."""
    loss = lambda mean: -dense_laplace(made, "poisson", np.array([mean]), [np.array([[sd**2]])])
    return -scipy.optimize.minimize_scalar(loss, bracket=(0.5, 1.5), tol=1e-12).fun

  rng = np.random.default_rng(1)
  g = np.repeat(np.arange(8), 5)
  y = rng.poisson(np.exp(1 + 0.6 * rng.normal(size=8)[g])) * 1.0
  made = design({"y": y, "g": g}, "y", [ONE], ("g", [ONE], False))
  found = fit(made, "poisson")
  low, high = profile_interval(found, made, ONE)
  assert 0 < low < found.sd[ONE] < high
  half = scipy.stats.chi2.ppf(0.95, 1) / 2
  for end in (low, high):
    assert found.log_likelihood - best(made, end) == pytest.approx(half, abs=1e-5)
  still = made._replace(response=np.tile([2.0, 3.0, 4.0, 3.0, 2.0], 8))
  found = fit(still, "poisson")
  low, high = profile_interval(found, still, ONE)
  assert found.singular == (ONE,) and low == 0
  assert found.log_likelihood - best(still, high) == pytest.approx(half, abs=1e-5)


def test_names_and_levels():
  made = designs.dyestuff()
  found = fit(made)
  with pytest.raises(ValueError, match="no standard deviation 'x'; the fit has .Intercept., resid"):
    profile_interval(found, made, "x")
  with pytest.raises(ValueError, match="level must lie between 0 and 1; got 95"):
    profile_interval(found, made, ONE, 95)
  with pytest.raises(ValueError, match="predictive criterion is not a log likelihood"):
    profile_interval(fit(made, estimator="predictive"), made, ONE)


def models(seed=0):
  """The same response by models from one mean to (x | g)."""
  rng = np.random.default_rng(seed)
  g, x = np.repeat(np.arange(10), 6), rng.normal(size=60)
  table = {"x": x, "g": g, "y": rng.normal(size=60) + 0.5 * rng.normal(size=10)[g]}
  fixed = [ONE, "x"]
  return {
    "mean": design(table, "y", [ONE]),
    "line": design(table, "y", fixed),
    "levels": design(table, "y", fixed, ("g", [ONE], False)),
    "slopes": design(table, "y", fixed, ("g", [ONE, "x"], False)),
    "full": design(table, "y", fixed, ("g", [ONE, "x"], True)),
  }


@pytest.mark.parametrize(
  "small,large,mixture",
  (
    ("mean", "line", {1: 1.0}),
    ("mean", "levels", {1: 0.5, 2: 0.5}),
    ("line", "levels", {0: 0.5, 1: 0.5}),
    ("line", "slopes", {0: 0.25, 1: 0.5, 2: 0.25}),
    ("levels", "full", {1: 0.5, 2: 0.5}),
    ("slopes", "full", {1: 1.0}),
  ),
)
def test_the_mixture(small, large, mixture):
  made = models()
  one, two = fit(made[small]), fit(made[large])
  found = likelihood_ratio(one, two)
  assert found.mixture == mixture
  statistic = 2 * (two.log_likelihood - one.log_likelihood)
  assert found.statistic == pytest.approx(max(statistic, 0), abs=1e-9)
  tail = lambda df: scipy.stats.chi2.sf(statistic, df) if df else float(statistic <= 0)
  want = sum(weight * tail(df) for df, weight in mixture.items())
  assert found.p_value == pytest.approx(want, abs=1e-9)


def test_fits_that_cannot_be_compared():
  made = models()
  fits = {name: fit(one) for name, one in made.items()}
  with pytest.raises(ValueError, match="^Pass the smaller model first.* has -1 more fixed effects"):
    likelihood_ratio(fits["line"], fits["mean"])
  with pytest.raises(ValueError, match="2 more variances with 1 covariances.*bootstrap"):
    likelihood_ratio(fits["line"], fits["full"])
  with pytest.raises(ValueError, match="'ml', 60.* and .*'reml', 60"):
    likelihood_ratio(fits["line"], fit(made["levels"], estimator="reml"))
  restricted = [fit(made[name], estimator="reml") for name in ("mean", "levels")]
  with pytest.raises(ValueError, match="Restricted likelihoods of different fixed columns"):
    likelihood_ratio(*restricted)
  large = made["slopes"]._replace(fixed=made["line"].fixed * [1.0, 100.0])
  with pytest.raises(ValueError, match=r"\(Intercept\), x; .* only in their units.* by 'ml'"):
    bootstrap(made["levels"], large, estimator="reml", draws=3)


def test_the_p_value_is_uniform_where_there_is_no_variance():
  """P(p <= 0.1) of 300 data sets without variation between groups: 0.1 by the mixture."""
  rng = np.random.default_rng(5)
  g = np.repeat(np.arange(12), 5)
  small, count = 0, 300
  for _ in range(count):
    table = {"g": g, "y": rng.normal(size=60)}
    null = fit(design(table, "y", [ONE]))
    small += (
      likelihood_ratio(null, fit(design(table, "y", [ONE], ("g", [ONE], False)))).p_value <= 0.1
    )
  assert abs(small / count - 0.1) < 3.5 * np.sqrt(0.09 / count)


def drawn_ratios(made, draws):
  """Likelihood ratios [draws] of one variance where it is 0, by their exact spectral form.

  Crainiceanu, Ruppert (2004), Journal of the Royal Statistical Society B 66(1), theorem 1.
  """
  n, p = made.fixed.shape
  z = np.eye(len(made.random[0].levels))[made.random[0].index]
  off = z - made.fixed @ np.linalg.lstsq(made.fixed, z, rcond=None)[0]
  mu = np.maximum(np.linalg.eigvalsh(z.T @ off), 0.0)
  rng = np.random.default_rng(2)
  squares = rng.chisquare(1, (draws, len(mu)))
  rest = rng.chisquare(n - p - len(mu), draws)
  largest = np.zeros(draws)
  for ratio in np.logspace(-4, 2, 400):  # of the variances; at 0 the statistic is 0
    shrunk = 1 / (1 + ratio * mu)
    within = squares @ shrunk + rest
    gain = n * np.log1p(squares @ (1 - shrunk) / within)
    penalty = np.log1p(ratio * z.sum(0)).sum()
    largest = np.maximum(largest, gain - penalty)
  return largest


def test_the_bootstrap_has_the_exact_distribution():
  """With ten groups the mixture of chi-squares is conservative: 0.26 for 0.18."""
  made = models(2)
  by_theory = likelihood_ratio(fit(made["line"]), fit(made["levels"]))
  draws = 300
  drawn = bootstrap(made["line"], made["levels"], draws=draws, seed=1)
  assert drawn.statistic == pytest.approx(by_theory.statistic)
  exact = np.mean(drawn_ratios(made["levels"], 20_000) >= by_theory.statistic)
  assert abs(drawn.p_value - exact) < 3.5 * np.sqrt(exact * (1 - exact) / draws)
  assert exact < by_theory.p_value - 0.03
  made = models(3)
  again = bootstrap(made["line"], made["levels"], draws=5, seed=1)
  assert again == bootstrap(made["line"], made["levels"], draws=5, seed=1)
  steep = made["line"].response + 10 * made["line"].fixed[:, 1]
  small, large = (made[name]._replace(response=steep) for name in ("mean", "line"))
  clear = bootstrap(small, large, draws=3)
  assert clear.statistic > 20 and clear.p_value == 0.25  # no draw reaches it: p = 1 / (1 + 3)


def by_halves(family, intercept):
  """(smaller design, larger design, closed form of T) of rows with x = 1 and as many with x = -1.

  The larger model has a mean of its own for each half. With an intercept the smaller model has one
  mean. Without one it is p = 1 / (1 + exp(-b x)), so a success at x = 1 and a failure at x = -1
  have one probability.
  """
  half = 10 if intercept else 2
  x = np.repeat([1.0, -1.0], half)
  y = np.zeros(2 * half)
  y[[0, 1] if intercept else [0]] = 1
  table = {"x": x, "y": y}
  small = design(table, "y", [ONE] if intercept else ["x"])

  def log_l(count, rows):  # of a mean of its own, at its maximum
    mean = count / rows
    if family == "poisson":
      return scipy.special.xlogy(count, mean) - count
    return scipy.special.xlogy(count, mean) + scipy.special.xlogy(rows - count, 1 - mean)

  def ratio(y):
    up, down = y[x > 0].sum(), y[x < 0].sum()
    one = up + down if intercept else up + half - down
    return 2 * (log_l(up, half) + log_l(down, half) - log_l(one, 2 * half))

  return small, design(table, "y", [ONE, "x"]), ratio


@pytest.mark.parametrize(
  "family,intercept", (("logistic", True), ("poisson", True), ("logistic", False))
)
def test_a_bootstrap_counts_constant_draws_and_ties(family, intercept):
  """T of constant draws is 0 with an intercept, and not without; equal tables have equal T."""
  small, large, ratio = by_halves(family, intercept)
  null = fit(small, family)
  responses = [simulate(null, small, number=i) for i in range(60)]
  want = np.array([ratio(y) for y in responses])
  constant = np.array([np.ptp(y) == 0 for y in responses])
  observed = ratio(small.response)
  assert constant.sum() >= 2 and (np.abs(want - observed) < 1e-9).sum() >= 2
  assert (want[constant] == 0).all() if intercept else (want[constant] > observed).all()
  found = bootstrap(small, large, family=family, draws=60)
  assert found.statistic == pytest.approx(observed, abs=1e-6)
  assert found.p_value == (1 + (want >= observed - 1e-9).sum()) / 61


def test_a_likelihood_ratio_of_0_is_not_a_rounding_error():
  """Groups that are alike: the variance is 0, T is 0, and so P(T >= 0) is 1."""
  for seed in range(6):
    counts = np.random.default_rng(seed).poisson(2.0, 5) + 1.0
    table = {"y": np.tile(counts, 6), "g": np.repeat(np.arange(6), 5)}
    small, large = design(table, "y", [ONE]), design(table, "y", [ONE], ("g", [ONE], False))
    found = likelihood_ratio(fit(small, "poisson"), fit(large, "poisson"))
    assert (found.statistic, found.p_value) == (0, 1)


def test_an_error_of_a_draw_names_the_draw():
  small, large, _ = by_halves("logistic", True)
  small, large = (made._replace(weights=np.full(20, 2.0)) for made in (small, large))
  with pytest.raises(ValueError, match="^Draw 1 of 5 has no statistic. A logistic response with w"):
    bootstrap(small, large, family="logistic", draws=5)


@pytest.mark.parametrize("family", ("gaussian", "logistic", "poisson"))
def test_simulated_responses_have_the_moments_of_the_model(family):
  responses = {"gaussian": "y", "logistic": "wins", "poisson": "count"}
  made = designs.nested(response=responses[family])
  if family == "gaussian":
    made = made._replace(weights=np.random.default_rng(2).uniform(0.2, 5.0, len(made.response)))
  found = fit(made, family)
  draws = np.stack([simulate(found, made, number=i) for i in range(400)])
  assert (draws[0] == simulate(found, made)).all() and (draws[0] != draws[1]).any()
  if family == "gaussian":
    v = designs.marginal(made, found.covariances, found.residual)
    beta = np.array(list(found.fixed.values()))
    z = (draws.mean(0) - made.fixed @ beta) / np.sqrt(np.diag(v) / 400)
    assert np.abs(z).max() < 4.5
    ratio = draws.var(0) / np.diag(v)
    assert abs(ratio.mean() - 1) < 0.05
    root = np.linalg.cholesky(v)
    white = np.linalg.solve(root, (draws - made.fixed @ beta).T)  # [N, draws], N(0, 1)
    assert np.abs(white.var(1) - 1).max() < 4.5 * np.sqrt(2 / 400)
  else:
    assert (draws == np.round(draws)).all() and draws.min() >= 0
    if family == "logistic":
      assert (draws <= made.trials).all()


def test_weights_of_counts_cannot_be_simulated():
  made = designs.nested(response="count", weights=np.full(90, 2.0))
  with pytest.raises(ValueError, match="is not the log density of a distribution"):
    simulate(fit(made, "poisson"), made)
