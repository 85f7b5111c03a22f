"""The search finds known minima of functions."""

import numpy as np
import pytest

from shrinkmeta.mixed.criteria import search


def rosenbrock(x):
  a, b = 1 - x[0], x[1] - x[0] ** 2
  return a**2 + 100 * b**2, np.array([-2 * a - 400 * x[0] * b, 200 * b])


def test_a_curved_valley():
  found = search.minimise(rosenbrock, np.array([-1.2, 1.0]))
  assert found.converged
  np.testing.assert_allclose(found.x, [1.0, 1.0], atol=1e-8)
  # It is that of the point before the last step, 2e-5 away.
  np.testing.assert_allclose(found.hessian, [[802, -400], [-400, 200]], rtol=1e-4)


def test_a_saddle_is_left():
  """0 is stationary, and a maximum along the first entry."""
  even = lambda x: (
    x[0] ** 4 - x[0] ** 2 + x[1] ** 2,
    np.array([4 * x[0] ** 3 - 2 * x[0], 2 * x[1]]),
  )
  found = search.minimise(even, np.zeros(2))
  assert abs(found.x[0]) == pytest.approx(0.5**0.5, abs=1e-8) and found.converged


def test_values_that_are_not_finite_shorten_the_step():
  def log(x):
    if x[0] <= 0:
      return np.inf, np.zeros(1)
    return x[0] - np.log(x[0]), np.array([1 - 1 / x[0]])

  found = search.minimise(log, np.array([50.0]))
  assert found.converged and found.x[0] == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("entries", (1, 2, 3))
def test_all_valleys_get_a_start(entries):
  """Two valleys in log x, at 0.1 and at 100, along every entry."""
  valley = lambda u: -np.exp(-((u + 1) ** 2)) - 1.2 * np.exp(-((u - 2) ** 2))
  value = lambda x: float(valley(np.log10(np.abs(x))).sum())
  found = search.starts(value, entries, np.arange(entries))
  np.testing.assert_allclose(found[0], 100.0, rtol=1e-12)
  assert any(np.allclose(x, 0.1) for x in found) == (entries < 3)
  assert len(found) <= 6


def test_a_valley_in_which_two_entries_rise_together_gets_a_start():
  def value(x):
    u = np.log10(np.abs(x))
    wide = 0.3 * np.square(u - [-1.0, 1.5, 1.5]).sum()
    narrow = 4 * (u[0] - u[1]) ** 2 + 0.3 * (u[0] + u[1] - 5) ** 2 + (u[2] - 0.5) ** 2 - 0.2
    return min(wide, narrow)

  found = search.starts(value, 3, np.arange(3))
  np.testing.assert_allclose(np.log10(found[0]), [2.5, 2.5, 0.5], atol=1e-12)
  np.testing.assert_allclose(np.log10(found[1]), [-1.0, 1.5, 1.5], atol=1e-12)


def test_held_entries_stay():
  of_free = search.held(rosenbrock, np.array([3.0, 0.0]), np.array([False, True]))
  found = search.minimise(of_free, np.array([0.0]))
  np.testing.assert_allclose(found.x, [9.0])
