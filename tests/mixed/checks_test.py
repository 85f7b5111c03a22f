"""Designs that cannot be fitted raise errors that name the fault and the remedy."""

import numpy as np
import pytest

from shrinkmeta.mixed.compare import simulate
from shrinkmeta.mixed.fit import fit
from shrinkmeta.mixed.groups import effects, unshrunk
from tests.mixed import designs
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
  with pytest.raises(
    ValueError, match="estimator must be one of ml, reml, predictive; got 'map'.$"
  ):
    fit(plain(), "gaussian", "map")
  with pytest.raises(ValueError, match="got 'REML'. Write 'reml'.$"):
    fit(plain(), "gaussian", "REML")


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


def test_a_constant_response_is_refused_unless_an_offset_varies():
  rng = np.random.default_rng(1)
  offset = rng.normal(size=24)
  three = plain(y=np.full(24, 3.0))
  with pytest.raises(ValueError, match="'y' is 3 in all 24 rows; there is nothing to explain"):
    fit(three)
  with pytest.raises(ValueError, match="'y' is 3 in all 24 rows"):
    fit(three._replace(offset=np.full(24, 0.5)))
  # An offset is subtracted from a gaussian response.
  found, want = fit(three._replace(offset=offset)), fit(plain(y=3.0 - offset))
  assert found.fixed == pytest.approx(want.fixed, abs=1e-9)
  assert found.log_likelihood == pytest.approx(want.log_likelihood, abs=1e-9)
  # One event in each row: the rate is the number of events by the time in all rows.
  once = design(table(y=np.ones(24)), "y", [ONE])._replace(offset=offset)
  rate = np.exp(fit(once, "poisson").fixed[ONE])
  assert rate == pytest.approx(24 / np.exp(offset).sum(), rel=1e-6)
  # No rate explains counts of 0, and no odds explain failures alone, whatever the offset.
  for family in ("poisson", "logistic"):
    with pytest.raises(ValueError, match="'y' is 0 in all 24 rows"):
      fit(plain(y=np.zeros(24))._replace(offset=offset), family)
  with pytest.raises(ValueError, match="'y' is 5 in all 24 rows"):
    fit(plain(y=np.full(24, 5.0))._replace(offset=offset, trials=np.full(24, 5.0)), "logistic")


def narrow(made, kind):
  """The design with all whole numbers in a narrow type."""
  terms = tuple(t._replace(index=t.index.astype(kind)) for t in made.random)
  whole = {name: getattr(made, name).astype(kind) for name in ("response", "fixed", "offset")}
  return made._replace(random=terms, weights=made.weights.astype(kind), **whole)


@pytest.mark.parametrize("kind", (np.int8, np.uint8, np.uint64))
def test_narrow_whole_numbers(kind):
  """128 groups, of which int8 can hold the index and not the count; sums and squares above 127."""
  rng = np.random.default_rng(0)
  g = np.repeat(np.arange(128), 3)
  levels = rng.integers(0, 20, 128)[g]
  rows = {"a": g // 16, "b": g, "x": rng.integers(0, 100, 384)}
  rows["y"] = levels + rng.integers(0, 20, 384)
  offset, weights = rng.integers(80, 100, 384) * 1.0, rng.integers(1, 100, 384) * 1.0
  terms = (("a", [ONE], False), ("b", [ONE], False))
  wide = design(rows, "y", [ONE, "x"], *terms, offset=offset, weights=weights)
  small = narrow(wide, kind)
  want, found = fit(wide), fit(small)
  beta = np.array(list(found.fixed.values()))
  dense = designs.dense(wide, beta, found.covariances, found.residual)
  assert found.log_likelihood == pytest.approx(dense, abs=1e-6) and found.undetermined == ()
  assert found.log_likelihood == pytest.approx(want.log_likelihood, abs=1e-9)
  for key, one in effects(want, wide).items():
    other = effects(found, small)[key]
    np.testing.assert_allclose(other.mode, one.mode, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(other.rows, one.rows)
    np.testing.assert_allclose(unshrunk(found, small)[key], unshrunk(want, wide)[key], rtol=1e-9)
  np.testing.assert_allclose(simulate(found, small), simulate(want, wide), rtol=1e-6)


def test_an_index_that_is_too_narrow_is_refused():
  g = np.repeat(np.arange(200), 3)
  made = design({"y": np.random.default_rng(0).normal(size=600), "g": g}, "y", [ONE],
                ("g", [ONE], False))  # fmt: skip
  term = made.random[0]
  wrapped = made._replace(random=(term._replace(index=term.index.astype(np.int8)),))
  with pytest.raises(ValueError, match="from -128 to 127; for 200 groups .* 0 to 199.* is int8"):
    fit(wrapped)
