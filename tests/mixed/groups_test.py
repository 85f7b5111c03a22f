"""Group effects agree with the formula of best linear unbiased prediction and published ones."""

import numpy as np
import pytest
import scipy.optimize

from shrinkmeta.mixed.fit import fit
from shrinkmeta.mixed.groups import effects, unshrunk
from tests.mixed import designs
from tests.mixed.designs import CASES, DATA, ONE, design, needs_cases, needs_data, read


def dense_effects(made, found):
  """{(term, level): (mode [q], covariance [q, q])} by Cov(b, y) Cov(y)^-1 (y - X beta)."""
  v = designs.marginal(made, found.covariances, found.residual)
  left = made.response - made.offset - made.fixed @ np.array(list(found.fixed.values()))
  result = {}
  for k, (term, sigma) in enumerate(zip(made.random, found.covariances, strict=True)):
    for level in range(len(term.levels)):
      both = sigma @ (term.columns * (term.index == level)[:, None]).T
      gain = np.linalg.solve(v, both.T).T
      result[k, level] = (gain @ left, sigma - gain @ both.T)
  return result


@pytest.mark.parametrize("weighted", (False, True))
def test_effects_of_nested_factors_are_the_best_linear_unbiased_predictions(weighted):
  rng = np.random.default_rng(3)
  more = {"weights": rng.uniform(0.3, 3, 90), "offset": rng.normal(size=90)} if weighted else {}
  made = designs.nested(**more)
  found = fit(made, estimator="reml")
  want, got = dense_effects(made, found), effects(found, made)
  assert list(got) == list(found.sd)
  for k, term in enumerate(made.random):
    for j, name in enumerate(term.names):
      one = got[f"{term.group} {name}"]
      assert one.levels == term.levels and one.group == term.group
      np.testing.assert_array_equal(one.rows, np.bincount(term.index))
      modes = [want[k, level][0][j] for level in range(len(term.levels))]
      sds = [np.sqrt(want[k, level][1][j, j]) for level in range(len(term.levels))]
      np.testing.assert_allclose(one.mode, modes, rtol=1e-6, atol=1e-7)
      np.testing.assert_allclose(one.sd, sds, rtol=1e-6)
      np.testing.assert_allclose(one.value, one.mode + found.fixed.get(name, 0.0), rtol=1e-12)


@needs_data
def test_sleepstudy():
  """The modes in REFERENCE.md."""
  table = read(DATA / "sleepstudy.csv")
  made = design(table, "Reaction", [ONE, "Days"], ("Subject", [ONE, "Days"], False))
  got = effects(fit(made, estimator="reml"), made)
  assert got[ONE].levels[:3] == ("308.0", "309.0", "310.0")
  np.testing.assert_allclose(got[ONE].mode[:3], [1.5127, -40.3739, -39.1810], atol=5e-4)
  np.testing.assert_allclose(got["Days"].mode[:3], [9.3235, -8.5992, -5.3878], atol=5e-4)


def test_modes_of_counts_are_maxima():
  rng = np.random.default_rng(5)
  g, x = np.array([0, 2, 1] * 12), rng.normal(size=36)
  eta = 0.5 + 0.4 * x + rng.normal(size=3)[g]
  made = design(
    {"y": rng.poisson(np.exp(eta)), "x": x, "g": g}, "y", [ONE, "x"], ("g", [ONE], False)
  )
  found = fit(made, "poisson")
  got = effects(found, made)[ONE]
  assert got.levels == ("0", "2", "1")
  fixed = made.fixed @ np.array(list(found.fixed.values()))
  for level in range(3):
    rows = made.random[0].index == level
    y, base = made.response[rows], fixed[rows]
    joint = lambda b, y=y, base=base: (
      np.sum(np.exp(base + b) - y * (base + b)) + b**2 / (2 * found.sd[ONE] ** 2)
    )
    best = scipy.optimize.minimize_scalar(joint, options={"xtol": 1e-12}).x
    curvature = np.exp(base + best).sum() + 1 / found.sd[ONE] ** 2
    assert got.mode[level] == pytest.approx(best, abs=1e-6)
    assert got.sd[level] == pytest.approx(curvature**-0.5, rel=1e-6)


def test_an_sd_of_0_has_effects_of_0():
  g = np.repeat(np.arange(6), 4)
  made = design({"y": np.tile([1.0, -1.0, 2.0, -2.0], 6), "g": g}, "y", [ONE], ("g", [ONE], False))
  found = fit(made)
  got = effects(found, made)[ONE]
  assert found.singular == (ONE,) and not got.mode.any() and not got.sd.any()
  np.testing.assert_allclose(got.value, found.fixed[ONE])


@needs_cases
def test_unshrunk_estimates_of_all_trees():
  table = read(CASES / "unshrunk.csv")
  made = design(table, "size", [ONE, "Time", "ozone"], ("tree", [ONE, "Time"], False))
  found = fit(made)
  own, shrunk = unshrunk(found, made), effects(found, made)
  assert all(np.isfinite(values).all() and len(values) == 79 for values in own.values())
  for level in (0, 78):  # with ozone, and without
    rows = made.random[0].index == level
    slope, intercept = np.polyfit(table["Time"][rows], table["size"][rows], 1)
    assert own["Time"][level] == pytest.approx(slope, rel=1e-8)
    less = found.fixed["ozone"] * table["ozone"][rows][0]
    assert own[ONE][level] == pytest.approx(intercept - less, rel=1e-8)
  assert np.corrcoef(own[ONE], shrunk[ONE].value)[0, 1] > 0.7


def test_unshrunk_estimates():
  """x varies in groups 0 and 1, is constant in 2 and 3; group 3 has one row, 4 has two."""
  rng = np.random.default_rng(1)
  g = np.repeat(np.arange(5), [6, 6, 6, 1, 2])
  x = rng.normal(size=21)
  x[g == 2], x[g == 3] = 0.0, 2.0
  t = rng.normal(size=21)
  t[g == 3] = 0.0
  y = g + x + t + rng.normal(size=21)
  made = design({"x": x, "t": t, "y": y, "g": g}, "y", [ONE, "x", "t"], ("g", [ONE, "t"], False))
  found = fit(made)
  own = unshrunk(found, made)
  for level in (0, 1):  # the group tells x from the rest
    rows = g == level
    beta = np.linalg.lstsq(np.stack([np.ones(6), t[rows], x[rows]], 1), y[rows], rcond=None)[0]
    np.testing.assert_allclose([own[ONE][level], own["t"][level]], beta[:2], rtol=1e-9)
  for level in (2, 4):  # x takes its fitted value
    rows = g == level
    z = np.stack([np.ones(rows.sum()), t[rows]], 1)
    beta = np.linalg.lstsq(z, y[rows] - found.fixed["x"] * x[rows], rcond=None)[0]
    np.testing.assert_allclose([own[ONE][level], own["t"][level]], beta, rtol=1e-9)
  assert own[ONE][3] == pytest.approx(y[g == 3][0] - 2 * found.fixed["x"])
  assert np.isnan(own["t"][3])


def test_unshrunk_is_the_limit_of_shrunk_as_the_sd_grows():
  rng = np.random.default_rng(2)
  g, covariate = np.repeat(np.arange(5), 4), np.repeat(rng.normal(size=5), 4)
  y = 100 * np.repeat(rng.normal(size=5), 4) + covariate + 0.01 * rng.normal(size=20)
  made = design({"c": covariate, "y": y, "g": g}, "y", [ONE, "c"], ("g", [ONE], False))
  found = fit(made)
  np.testing.assert_allclose(effects(found, made)[ONE].value, unshrunk(found, made)[ONE], atol=1e-4)


def test_weights_offsets_and_other_families():
  g, y = np.repeat([0, 1], 2), np.array([1.0, 3.0, 2.0, 6.0])
  made = design(
    {"y": y, "g": g}, "y", [ONE], ("g", [ONE], False), weights=np.array([1.0, 3, 1, 1]),
    offset=np.array([0.0, 0, 1, 1]),
  )  # fmt: skip
  np.testing.assert_allclose(unshrunk(fit(made), made)[ONE], [2.5, 3.0])
  counts = made._replace(weights=None)
  own = unshrunk(fit(counts, "poisson"), counts)
  assert np.isnan(own[ONE]).all()


def test_another_design_is_refused():
  made = designs.dyestuff()
  other = designs.nested()
  with pytest.raises(ValueError, match="the design has .Intercept., x, 90 rows"):
    effects(fit(made), other)
