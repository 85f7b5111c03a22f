"""Predictions and their standard errors agree with dense linear algebra."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from shrinkmeta import mixed

NEW = {
  "x": [0.5, -1.0, 2.0, 0.0, 1.0],
  "a": ["a0", "a3", "a1", "elsewhere", None],
  "b": ["b1", "b0", "nowhere", "b1", "b2"],
}


def simulated(family="gaussian"):
  rng = np.random.default_rng(0)
  a, b = np.repeat(np.arange(6), 12), np.tile(np.repeat(np.arange(3), 4), 6)
  x = rng.normal(size=72)
  eta = 0.5 + 0.8 * rng.normal(size=6)[a] + (0.7 + 0.6 * rng.normal(size=6)[a]) * x
  eta += 0.7 * rng.normal(size=18)[3 * a + b]
  n = rng.integers(3, 9, 72)
  y = {
    "gaussian": eta + 0.5 * rng.normal(size=72),
    "logistic": rng.binomial(n, scipy.special.expit(eta)),
    "poisson": rng.poisson(np.exp(eta)),
  }[family]
  return {
    "y": y, "x": x, "n": n, "w": rng.uniform(0.5, 2, 72),
    "a": [f"a{i}" for i in a], "b": [f"b{i}" for i in b],
  }  # fmt: skip


def dense(model):
  """Z [N, m] and Sigma [m, m] of all random effects, by term and level."""
  blocks, sigmas = [], []
  for term, sigma in zip(model.design.random, model.estimates.covariances, strict=True):
    q = len(term.names)
    z = np.zeros((len(term.index), q * len(term.levels)))
    for i, (level, columns) in enumerate(zip(term.index, term.columns, strict=True)):
      z[i, q * level : q * (level + 1)] = columns
    blocks.append(z)
    sigmas += [sigma] * len(term.levels)
  return np.concatenate(blocks, 1), scipy.linalg.block_diag(*sigmas)


def new_columns(model):
  """(X, Z of known groups, variance of unknown groups) of NEW."""
  x = np.stack([np.ones(5), NEW["x"]], 1)
  z = np.zeros((5, dense(model)[0].shape[1]))
  more, at = np.zeros(5), 0
  for term, sigma in zip(model.design.random, model.estimates.covariances, strict=True):
    q = len(term.names)
    for i in range(5):
      label = str(NEW["a"][i]) + (f":{NEW['b'][i]}" if ":" in term.group else "")
      columns = x[i] if term.names == ("(Intercept)", "x") else x[i, :1]
      if label in term.levels:
        place = at + q * term.levels.index(label)
        z[i, place : place + q] = columns
      else:
        more[i] += columns @ sigma @ columns
    at += q * len(term.levels)
  return x, z, more


@pytest.mark.parametrize("estimator", ("ml", "reml"))
def test_errors_of_best_linear_unbiased_prediction(estimator):
  data = simulated()
  model = mixed.fit("y ~ x + (x | a) + (1 | a:b)", data, estimator=estimator, weights="w")
  fit, design = model.estimates, model.design
  z, sigma = dense(model)
  v = z @ sigma @ z.T + np.diag(fit.residual**2 / data["w"])
  beta = np.array(list(fit.fixed.values()))
  b = sigma @ z.T @ np.linalg.solve(v, design.response - design.fixed @ beta)
  new_x, new_z, more = new_columns(model)
  a = new_x.T - design.fixed.T @ np.linalg.solve(v, z @ sigma @ new_z.T)
  gap = sigma - sigma @ z.T @ np.linalg.solve(v, z @ sigma)
  variance = np.diag(new_z @ gap @ new_z.T) + np.diag(a.T @ fit.fixed_covariance @ a) + more
  found = mixed.predict(model, NEW)
  np.testing.assert_allclose(found.mean, new_x @ beta + new_z @ b, rtol=1e-6)
  np.testing.assert_allclose(found.se, np.sqrt(variance), rtol=1e-5)
  np.testing.assert_allclose(found.high - found.mean, 1.959964 * found.se, rtol=1e-6)
  new = np.sqrt(variance + fit.residual**2)
  np.testing.assert_allclose(found.new_high - found.mean, 1.959964 * new, rtol=1e-6)
  assert found.known.tolist() == [True, True, False, False, False]
  narrow = mixed.predict(model, NEW, level=0.5)
  np.testing.assert_allclose((found.high - found.low) / (narrow.high - narrow.low), 2.905847, 1e-5)
  mean, residuals = mixed.residuals(model)
  np.testing.assert_allclose(mean, design.fixed @ beta + z @ b, rtol=1e-6)
  want = (design.response - mean) * np.sqrt(data["w"]) / fit.residual
  np.testing.assert_allclose(residuals, want, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(mixed.predict(model).mean, mean)


@pytest.mark.parametrize("family", ("logistic", "poisson"))
def test_other_families_at_the_mode(family):
  data = simulated(family)
  options = {"trials": "n"} if family == "logistic" else {}
  text = "y ~ x + offset(0.1 * x) + (x | a) + (1 | a:b)"
  model = mixed.fit(text, data, family=family, **options)
  fit, design = model.estimates, model.design
  z, sigma = dense(model)
  keep = np.linalg.eigvalsh(sigma).min() > 0
  assert keep, "choose data whose fit is regular"
  mean = scipy.special.expit if family == "logistic" else np.exp
  n = data["n"] if family == "logistic" else 1.0
  beta = np.array(list(fit.fixed.values()))
  fixed = design.fixed @ beta + 0.1 * data["x"]
  b = np.zeros(len(sigma))
  for _ in range(50):  # Newton's method for the modes
    m = mean(fixed + z @ b)
    w = n * m * (1 - m) if family == "logistic" else m
    h = z.T @ (w[:, None] * z) + np.linalg.inv(sigma)
    b = b + np.linalg.solve(h, z.T @ (design.response - n * m) - np.linalg.solve(sigma, b))
  new_x, new_z, more = new_columns(model)
  g = np.linalg.inv(h)
  a = new_x.T - design.fixed.T @ (w[:, None] * z) @ g @ new_z.T
  variance = np.diag(new_z @ g @ new_z.T) + np.diag(a.T @ fit.fixed_covariance @ a) + more
  found = mixed.predict(model, NEW)
  eta = new_x @ beta + 0.1 * np.array(NEW["x"]) + new_z @ b
  np.testing.assert_allclose(found.eta, eta, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found.se, np.sqrt(variance), rtol=1e-4)
  np.testing.assert_allclose(found.mean, mean(found.eta))
  np.testing.assert_allclose(found.low, mean(found.eta - 1.959964 * found.se), rtol=1e-6)
  assert np.isnan(found.new_low).all()
  fitted, residuals = mixed.residuals(model)
  m = n * mean(fixed + z @ b)
  np.testing.assert_allclose(fitted, m, rtol=1e-4)
  variance = m * (1 - m / n) if family == "logistic" else m
  np.testing.assert_allclose(residuals, (design.response - m) / np.sqrt(variance), atol=1e-4)


def test_a_class_brings_its_school():
  """Labels of classes that are unique say which school a row is in, if the school is missing."""
  data = simulated()
  data["class"] = [f"{a}{b}" for a, b in zip(data["a"], data["b"], strict=True)]
  model = mixed.fit("y ~ x + (1 | a) + (1 | class)", data)
  whole = mixed.predict(model, {"x": [1.0], "a": ["a2"], "class": ["a2b1"]})
  part = mixed.predict(model, {"x": [1.0], "class": ["a2b1"]})
  assert part.mean == whole.mean and part.se == whole.se
  with pytest.raises(ValueError, match="Row 1 has class 'a2b1' in a 'a3'; .* is in 'a2'"):
    mixed.predict(model, {"x": [1.0], "a": ["a3"], "class": ["a2b1"]})


@pytest.mark.parametrize(
  "groups,fits,means,rows",
  ((15, 40, (0.86, 0.94), (0.91, 0.96)), (5, 60, (0.78, 0.88), (0.88, 0.94))),
)
def test_how_often_intervals_of_new_groups_hold(groups, fits, means, rows):
  """95 % intervals are a little too narrow with fifteen groups, and more so with five.

  The mean of a new group has the distribution N(0, 1), and a new observation in it N(0, 2).
  """
  rng = np.random.default_rng(1)
  of_mean, of_row = [], []
  for _ in range(fits):
    g = np.repeat(np.arange(groups), 4)
    y = rng.normal(size=groups)[g] + rng.normal(size=4 * groups)
    model = mixed.fit("y ~ 1 + (1 | g)", {"y": y, "g": g}, estimator="reml")
    found = mixed.predict(model, {"g": ["new"]})
    inside = lambda low, high: scipy.special.ndtr(high[0]) - scipy.special.ndtr(low[0])
    of_mean.append(inside(found.low, found.high))
    of_row.append(inside(found.new_low / np.sqrt(2), found.new_high / np.sqrt(2)))
  assert means[0] < np.mean(of_mean) < means[1]
  assert rows[0] < np.mean(of_row) < rows[1]


def test_what_cannot_be_predicted():
  model = mixed.fit("y ~ x + (1 | a)", simulated())
  with pytest.raises(ValueError, match="no column 'x'"):
    mixed.predict(model, {"a": ["a1"]})
  with pytest.raises(ValueError, match="level must lie between 0 and 1.*got 95"):
    mixed.predict(model, NEW, level=95)
