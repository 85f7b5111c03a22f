"""Predictions and their standard errors agree with dense linear algebra."""

import numpy as np
import pandas as pd
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
  weights = np.array([0.5, 1.0, 2.0, 4.0, 9.0])
  found = mixed.predict(model, NEW | {"w": weights})
  np.testing.assert_allclose(found.mean, new_x @ beta + new_z @ b, rtol=1e-6)
  np.testing.assert_allclose(found.se, np.sqrt(variance), rtol=1e-5)
  np.testing.assert_allclose(found.high - found.mean, 1.959964 * found.se, rtol=1e-6)
  new = np.sqrt(variance + fit.residual**2 / weights)
  np.testing.assert_allclose(found.new_high - found.mean, 1.959964 * new, rtol=1e-6)
  assert found.known.tolist() == [True, True, False, False, False]
  narrow = mixed.predict(model, NEW | {"w": weights}, level=0.5)
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
  # A school that the data do not have is another school too. A missing label is not.
  with pytest.raises(ValueError, match="'a2b1' in a that the data of the fit do not have; .* 'a2'"):
    mixed.predict(model, {"x": [1.0], "a": ["new"], "class": ["a2b1"]})
  lost = mixed.predict(model, {"x": [1.0], "a": [None], "class": ["a2b1"]})
  assert lost.mean == whole.mean and lost.known.all()
  new = mixed.predict(model, {"x": [1.0], "a": ["new"], "class": ["new b1"]})
  assert not new.known.any() and new.se > whole.se


@pytest.mark.parametrize("label", (None, np.nan, pd.NA, pd.NaT, ""))
def test_a_row_without_a_label_is_of_a_new_group(label):
  model = mixed.fit("y ~ x + (1 | a)", simulated())
  found = mixed.predict(model, {"x": [1.0, 1.0], "a": ["a1", label]})
  assert found.known.tolist() == [True, False]
  for other in ({"x": [1.0]}, {"x": [1.0], "a": ["elsewhere"]}):
    new = mixed.predict(model, other)
    assert not new.known[0]
    np.testing.assert_allclose((found.eta[1], found.se[1]), (new.eta[0], new.se[0]), rtol=1e-9)


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


@pytest.mark.parametrize(
  "text,weights",
  (("w", "w"), ("1 / v^2", "1 / v^2"), ("exp(center(v))", "exp(center(v))"), (None, None)),
)
def test_weights_of_new_observations(text, weights):
  """Var = se^2 + s^2 / w, for fitted rows and for new ones, in every form of the weights."""
  data = simulated()
  data["v"] = v = data["w"] ** -0.5
  values = {"w": data["w"], "1 / v^2": data["w"], "exp(center(v))": np.exp(v - v.mean())}
  w = values.get(text, np.ones(72))
  model = mixed.fit("y ~ x + (1 | a)", data, weights=weights)
  numbers = mixed.fit("y ~ x + (1 | a)", data, weights=w)
  few = {name: column[:5] for name, column in data.items()}
  s = model.estimates.residual
  for found, used in (
    (mixed.predict(model), w),
    (mixed.predict(numbers), w),
    (mixed.predict(model, few), w[:5]),
    (mixed.predict(numbers, few, weights=w[:5]), w[:5]),
    (mixed.predict(numbers, few, weights=2.5), 2.5),
  ):
    spread = 1.959964 * np.sqrt(found.se**2 + s**2 / used)
    np.testing.assert_allclose(found.new_high - found.eta, spread, rtol=1e-6)
    np.testing.assert_allclose(found.eta - found.new_low, spread, rtol=1e-6)
  unknown = mixed.predict(numbers, few)
  assert np.isnan(unknown.new_low).all() and np.isnan(unknown.new_high).all()
  np.testing.assert_allclose(unknown.high, mixed.predict(model, few).high, rtol=1e-6)


def test_weights_that_new_rows_do_not_have():
  data = simulated()
  model = mixed.fit("y ~ x + (1 | a)", data, weights="w")
  known, unknown = (mixed.predict(model, new) for new in (NEW | {"w": np.ones(5)}, NEW))
  assert np.isnan(unknown.new_low).all() and np.isnan(unknown.new_high).all()
  np.testing.assert_array_equal(unknown.low, known.low)  # the mean needs no weights
  with pytest.raises(ValueError, match="All weights must be above 0"):
    mixed.predict(model, NEW | {"w": [1, 1, 0, 1, 1]})
  with pytest.raises(ValueError, match="'w' is missing in row 2"):
    mixed.predict(model, NEW | {"w": [1, None, 1, 1, 1]})
  counts = mixed.fit("n ~ x + (1 | a)", data, family="poisson", weights="w")
  assert np.isnan(mixed.predict(counts, NEW).new_low).all()  # eta needs no weights
  with pytest.raises(ValueError, match="which poisson fits do not have"):
    mixed.predict(counts, NEW, weights=np.ones(5))


@pytest.mark.parametrize(
  "text,options",
  (("y ~ x + offset(center(z)) + (1 | a)", {}), ("y ~ x + (1 | a)", {"offset": "center(z)"})),
)
def test_offsets_of_new_rows_use_the_means_of_the_fit(text, options):
  data = simulated()
  data["z"] = 5 + data["w"]
  model = mixed.fit(text, data, **options)
  plain = mixed.fit("y ~ x + (1 | a)", data, offset=data["z"] - data["z"].mean())
  few = {name: column[:5] for name, column in data.items()}
  np.testing.assert_allclose(mixed.predict(model).eta, mixed.predict(plain).eta)
  np.testing.assert_allclose(mixed.predict(model, few).eta, mixed.predict(plain).eta[:5])


@pytest.mark.parametrize(
  "text,options,message",
  (
    ("y ~ x + (1 | a)", {}, "has no argument offset; leave out offset"),
    ("y ~ x + offset(w) + (1 | a)", {}, r"no argument offset and offset\(...\) in its formula"),
    ("y ~ x + (1 | a)", {"offset": "w"}, "has offset='w', computed from the table; leave out off"),
    ("y ~ x + (1 | a)", {"offset": "log(w)"}, r"has offset='log\(w\)', computed from the table"),
  ),
)
def test_offsets_that_would_have_no_effect(text, options, message):
  model = mixed.fit(text, simulated(), **options)
  new = NEW | {"w": np.ones(5)}
  for table in (new, NEW):
    with pytest.raises(ValueError, match=message):
      mixed.predict(model, table, offset=np.full(5, 100.0))
  with pytest.raises(ValueError, match="The fitted rows have the offset of the fit"):
    mixed.predict(model, offset=np.zeros(72))
  with pytest.raises(ValueError, match="has no argument weights; leave out weights"):
    mixed.predict(model, new, weights=np.ones(5))
  with pytest.raises(ValueError, match="The fitted rows have the weights of the fit"):
    mixed.predict(model, weights=np.ones(72))


def test_numbers_of_new_rows():
  model = mixed.fit("y ~ x + (1 | a)", simulated(), offset=np.zeros(72), weights=np.ones(72))
  base = mixed.predict(model, NEW, offset=np.zeros(5)).eta
  for offset in (2.0, np.full(5, 2.0), [2] * 5, np.ma.array(np.full(5, 2.0))):
    np.testing.assert_allclose(mixed.predict(model, NEW, offset=offset).eta, base + 2.0)
  for offset in (np.zeros(4), np.zeros((5, 1)), np.zeros(72)):
    with pytest.raises(ValueError, match=r"offset has shape .*; wanted \(5,\)"):
      mixed.predict(model, NEW, offset=offset)
  with pytest.raises(ValueError, match=r"weights has shape \(4,\); wanted \(5,\)"):
    mixed.predict(model, NEW, offset=0.0, weights=np.ones(4))
  with pytest.raises(ValueError, match="as numbers: pass offset .* got 'x'"):
    mixed.predict(model, NEW, offset="x")
  with pytest.raises(ValueError, match="pass offset for the new rows too"):
    mixed.predict(model, NEW)


TIMES = np.array(["2020-01-01", "2020-01-02T12:00", "2020-01-03T06:30:15.5"], "datetime64[ms]")


@pytest.mark.parametrize(
  "fitted,others",
  (
    ([1.5, 3.0, 7.0], [pd.Categorical, np.float32, np.float16, pd.Series, pd.CategoricalIndex]),
    ([0.1, 0.2, 0.7], [pd.Categorical, np.float32, lambda v: pd.Categorical(np.float32(v))]),
    ([1, 2, 3], [pd.Categorical, float, np.int8, lambda v: pd.Series(v, dtype="Int64")]),
    ([10**16, 2 * 10**15, 5], [pd.Categorical, float]),
    (TIMES, [pd.Categorical, pd.Series, "M8[ns]", lambda v: v.astype(object), lambda v: [*v]]),
    (TIMES - TIMES[0], [pd.Categorical, pd.Series, "m8[ns]", lambda v: v.astype(object)]),
    (["a", "b", "ä"], [pd.Categorical, lambda v: [x.encode() for x in v], np.ma.array]),
    ([True, False], [pd.Categorical, lambda v: pd.Series(v, dtype="boolean")]),
  ),
)
def test_a_group_is_known_in_every_type_of_column(fitted, others):
  rng = np.random.default_rng(0)
  values = np.asarray(fitted)
  data = {"y": rng.normal(size=4 * len(values)), "g": np.repeat(values, 4)}
  model = mixed.fit("y ~ (1 | g)", data)
  want = mixed.predict(model).eta[::4]
  for other in [np.asarray, *others]:
    column = other(values) if callable(other) and other is not float else values.astype(other)
    found = mixed.predict(model, {"g": column})
    assert found.known.all(), column
    np.testing.assert_allclose(found.eta, want)
    for i in range(len(values)):  # a label does not depend on the other rows
      assert mixed.predict(model, {"g": column[i : i + 1]}).known.all(), column
