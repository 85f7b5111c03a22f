"""Designs that cannot be fitted raise errors that name the fault and the remedy."""

import numpy as np
import pytest

from shrinkmeta.mixed.fit import fit
from tests.mixed.designs import ONE, design


def table(**changes):
  rng = np.random.default_rng(0)
  found = {"x": rng.normal(size=24), "y": rng.normal(size=24), "g": np.repeat(np.arange(6), 4)}
  found |= {"h": np.tile(np.arange(4), 6), "one": np.zeros(24, int)}
  return found | changes


def plain(**changes):
  return design(table(**changes), "y", [ONE, "x"], ("g", [ONE], False))


def replaced(index, value, size=24):
  found = np.random.default_rng(1).normal(size=size)
  found[index] = value
  return found


CASES = {
  "nan in y": (lambda: plain(y=replaced(3, np.nan)), "gaussian", "response 'y' is nan in row 4"),
  "inf in x": (lambda: plain(x=replaced(0, np.inf)), "gaussian", "column 'x' is inf in row 1"),
  "one level": (
    lambda: design(table(), "y", [ONE], ("one", [ONE], False)),
    "gaussian",
    "'one' has one level, '0', in 24 rows",
  ),
  "crossed": (
    lambda: design(table(), "y", [ONE], ("g", [ONE], False), ("h", [ONE], False)),
    "gaussian",
    "'h' and 'g' are crossed.*write .1 . h/g..*fixed part",
  ),
  "twice": (
    lambda: design(table(), "y", [ONE], ("g", [ONE], False), ("g", [ONE, "x"], True)),
    "gaussian",
    r"has \(Intercept\) twice in one grouping factor",
  ),
  "dependent": (
    lambda: design(table(x2=2 * table()["x"] + 1), "y", [ONE, "x", "x2"], ("g", [ONE], False)),
    "gaussian",
    "depend on each other in 24 rows: x, x2",
  ),
  "constant": (
    lambda: design(table(c=np.full(24, 3.0)), "y", [ONE, "c"], ("g", [ONE], False)),
    "gaussian",
    "depend on each other in 24 rows: c",
  ),
  "zero column": (
    lambda: design(table(z=np.zeros(24)), "y", [ONE], ("g", ["z"], False)),
    "gaussian",
    "random column 'z' of 'g' is 0 in all 24 rows",
  ),
  "columns": (
    lambda: design(
      {name: values[:3] for name, values in table(g=np.arange(24) % 2).items()},
      "y", [ONE, "x", "h"], ("g", [ONE], False),
    ),
    "gaussian",
    "3 columns for 3 rows",
  ),
  "halves": (lambda: plain(y=replaced(2, 0.5)), "logistic", "0 or 1; 'y' is .* in row 1 of 24"),
  "negative": (lambda: plain(y=np.arange(24) - 1.0), "poisson", "count; 'y' is -1 in row 1"),
  "constant y": (lambda: plain(y=np.ones(24)), "logistic", "'y' is 1 in all 24 rows"),
  "weights": (
    lambda: plain()._replace(weights=np.arange(24.0)),
    "gaussian",
    "weight of row 1 is 0.0; weights must be positive",
  ),
  "trials": (
    lambda: plain(y=np.arange(24) % 2)._replace(trials=np.full(24, 0.5)),
    "logistic",
    "trials of row 1 are 0.5",
  ),
  "more than trials": (
    lambda: plain(y=np.arange(24))._replace(trials=np.full(24, 5.0)),
    "logistic",
    "from 0 to its trials; 'y' is 6 in row 7",
  ),
  "trials of counts": (
    lambda: plain(y=np.arange(24))._replace(trials=np.full(24, 30.0)),
    "poisson",
    "trials belong to a logistic response",
  ),
  "family": (plain, "gamma", "family must be one of gaussian, logistic, poisson; got 'gamma'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_error_says(name):
  make, family, message = CASES[name]
  with pytest.raises(ValueError, match=message):
    fit(make(), family)


def test_estimators():
  with pytest.raises(ValueError, match="reml is for the gaussian family; got poisson"):
    fit(plain(y=np.arange(24)), "poisson", "reml")
  with pytest.raises(ValueError, match="estimator must be one of ml, reml, predictive; got 'map'"):
    fit(plain(), "gaussian", "map")


def test_an_empty_group_is_refused():
  made = plain()
  term = made.random[0]
  with pytest.raises(ValueError, match="names 7 groups, and 6 have rows"):
    fit(made._replace(random=(term._replace(levels=(*term.levels, "z")),)))


def test_a_weight_counts_rows_and_an_offset_is_added():
  rng = np.random.default_rng(3)
  counts = rng.poisson(2.0, size=24) * 1.0
  once = plain(y=counts)
  weights = rng.integers(1, 4, 24)
  rows = np.repeat(np.arange(24), weights)
  again = design(
    {k: v[rows] for k, v in table(y=counts).items()}, "y", [ONE, "x"], ("g", [ONE], False)
  )
  weighted = fit(once._replace(weights=weights * 1.0), "poisson")
  repeated = fit(again, "poisson")
  assert weighted.log_likelihood == pytest.approx(repeated.log_likelihood, abs=1e-8)
  assert weighted.fixed["x"] == pytest.approx(repeated.fixed["x"], abs=1e-6)
  shifted = fit(once._replace(offset=np.full(24, 0.7)), "poisson")
  assert shifted.fixed[ONE] == pytest.approx(fit(once, "poisson").fixed[ONE] - 0.7, abs=1e-6)
