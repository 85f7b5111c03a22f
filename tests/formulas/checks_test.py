"""Dependent columns are found in any unit, and so are responses that a family cannot have."""

import numpy as np
import pytest

from shrinkmeta.formulas.checks import check_columns, check_response

NAMES = ("(Intercept)", "x", "z")


@pytest.mark.parametrize("x", (lambda t: 1_700_000_000_000 + 600_000 * t, lambda t: 1e-9 * t))
def test_units_do_not_make_columns_depend_on_each_other(x):
  t = np.arange(6.0)
  check_columns(np.stack([t**0, x(t), t**2 % 5], 1), NAMES, "the fixed part")


@pytest.mark.parametrize("z", (lambda x: x + 7, lambda x: 2 * x, lambda x: 0 * x + 0.1))
@pytest.mark.parametrize("unit", (1.0, 1e-9, 1e12))
def test_the_dependent_column_is_named(z, unit):
  x = unit * np.array([1.0, 2.0, 4.0, 3.0])
  with pytest.raises(ValueError, match="depend on each other in 4 rows: 'z'"):
    check_columns(np.stack([x**0, x, z(x)], 1), NAMES, "the fixed part")


def test_the_columns_that_it_depends_on_are_named():
  rng = np.random.default_rng(0)
  a, b, c = rng.normal(size=(3, 20))
  columns = np.stack([a, b, c, a - 3 * c], 1)
  with pytest.raises(ValueError, match="'d' is a combination of 'a', 'c'. Leave one out"):
    check_columns(columns, ("a", "b", "c", "d"), "the fixed part")
  check_columns(columns[:, :3], ("a", "b", "c"), "the fixed part")
  with pytest.raises(ValueError, match="depend on each other in 2 rows"):
    check_columns(columns[:2, :3], ("a", "b", "c"), "the fixed part")


def test_levels_that_do_not_occur_together():
  with pytest.raises(ValueError, match="'f.b.:h.d.' .* is 0 in all 2 rows; these levels do not"):
    names = ("(Intercept)", "f[b]:h[d]")
    check_columns(np.array([[1.0, 0], [1, 0]]), names, "the fixed part", (False, True))


@pytest.mark.parametrize(
  "response, family, trials, message",
  (
    ([0, 1.5], "logistic", None, "must be 0 or 1; 'y' has the value 1.5 among 2 rows. Compare"),
    ([0, 2], "logistic", None, r"cbind\(y, failures\).*I\(y == 2\)"),
    ([0, 0.5], "logistic", None, "For shares, write cbind"),
    (
      [0, 1.5],
      "poisson",
      None,
      r"A Poisson response must be a count.*the value 1.5.*offset\(log\(time\)\)",
    ),
    ([0, -1], "poisson", None, "a count"),
    ([2, 2], "gaussian", None, "is 2 in all 2 rows"),
    ([1, 3], "logistic", [2, 2], "more successes than trials: 3 of 2"),
    ([1, 1.5], "logistic", [2, 2], "whole numbers"),
    ([1, 2], "logistic", [2, 4], "is 0.5 in all 2 rows"),
    ([1, 2], "poisson", [2, 2], "trials belong to a logistic"),
  ),
)
def test_responses_that_a_family_cannot_have(response, family, trials, message):
  trials = None if trials is None else np.array(trials, float)
  with pytest.raises(ValueError, match=message):
    check_response(np.array(response, float), "y", family, trials)
