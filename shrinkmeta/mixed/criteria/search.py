"""Find local minima of a smooth function of a few parameters, from the minima of a grid.

The likelihood of a mixed model may have several maxima, because intercepts, slopes or noise can
explain the same variation. So the criterion is first evaluated on a grid of standard deviations,
relative to the noise. A search starts at every local minimum of the grid.

The criterion depends on Lambda only through Lambda Lambda', so the sign of a diagonal entry of
Lambda does not matter, and the search needs no bounds. A standard deviation of 0 is a stationary
point like others. The search moves away from it if a larger standard deviation is better.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]
Hessian = Callable[[np.ndarray], np.ndarray]
GRID = tuple(10.0 ** (i / 2) for i in range(-4, 7))  # 0.01 to 1000
_MOST_STARTS = 6
_PLAIN = 2  # diagonal entries for which all combinations of the grid are tried
_COARSE = 3  # and for which those of every other point are


class Minimum(NamedTuple):
  """A local minimum.

  Attributes:
    x: [k], the position of the minimum.
    value: the value of the function at x.
    gradient: [k], the gradient at x.
    hessian: [k, k], the Hessian at x.
    converged: whether the search ended because a further step would gain almost nothing.
  """

  x: np.ndarray
  value: float
  gradient: np.ndarray
  hessian: np.ndarray
  converged: bool


def differences(objective: Objective, x: np.ndarray, step: float = 1e-4) -> np.ndarray:
  """Compute the Hessian by central differences of the gradient.

  Args:
    objective: x -> (value, gradient [k]).
    x: [k], the point at which to compute the Hessian.
    step: the step h of the differences. For an entry of x with |x_i| > 1, h is multiplied by |x_i|.

  Returns:
    The Hessian [k, k], made symmetric.
  """
  rows = np.empty((len(x), len(x)))
  for i in range(len(x)):
    h = np.zeros(len(x))
    h[i] = step * max(1.0, abs(x[i]))
    rows[i] = (objective(x + h)[1] - objective(x - h)[1]) / (2 * h[i])
  return (rows + rows.T) / 2


def minimise(
  objective: Objective,
  x: np.ndarray,
  hessian: np.ndarray | None = None,
  tol: float = 1e-9,
  most: int = 200,
) -> Minimum:
  """Find a local minimum by Newton's method with a trust region.

  The Hessian is computed by differences of the gradient, and then updated by BFGS. It is computed
  again when its quadratic model no longer predicts the change of the function.

  Args:
    objective: x -> (value, gradient [k]).
    x: [k], where to start.
    hessian: [k, k], an estimate of the Hessian at x. None computes it by differences.
    tol: the search ends if the quadratic model predicts a smaller decrease than this.
    most: the largest number of steps.

  Returns:
    The minimum.
  """
  if not len(x):
    value, gradient = objective(x)
    return Minimum(x, value, gradient, np.zeros((0, 0)), True)
  unit = np.maximum(np.abs(x), 1.0)  # entries that start large take large steps

  def scaled(z: np.ndarray) -> tuple[float, np.ndarray]:
    value, gradient = objective(z * unit)
    return value, gradient * unit

  guess = None if hessian is None else hessian * np.outer(unit, unit)
  found = _minimise(scaled, x / unit, guess, tol, most)
  return Minimum(
    found.x * unit,
    found.value,
    found.gradient / unit,
    found.hessian / np.outer(unit, unit),
    found.converged,
  )


def _minimise(
  objective: Objective, x: np.ndarray, hessian: np.ndarray | None, tol: float, most: int
) -> Minimum:
  value, gradient = objective(x)
  radius, converged = 1.0, False
  fresh = hessian is None
  if hessian is None:
    hessian = differences(objective, x)
  for _ in range(most):
    step, gain = _trusted(hessian, gradient, radius)
    if gain < max(tol, 1e-13 * abs(value)):
      if fresh:
        new, slope = objective(x + step)
        # The value has no digits left; the gradient has. Not so where the function is flat.
        curved = np.linalg.eigvalsh(hessian)[0] > 1e-6
        if curved and np.abs(slope).max() < np.abs(gradient).max() and new <= value + 1e-9:
          x, value, gradient = x + step, new, slope
        converged = True
        break
      hessian, fresh = differences(objective, x), True
      continue
    new, slope = objective(x + step)
    ratio = (value - new) / gain if np.isfinite(new) and np.isfinite(slope).all() else -1.0
    length = float(np.linalg.norm(step))
    if ratio > 0:
      hessian, fresh = _updated(hessian, step, slope - gradient), False
      x, value, gradient = x + step, new, slope
    if ratio < 0.25:
      radius = length / 4
    elif ratio > 0.75 and length > 0.9 * radius:
      radius *= 3
    if radius < 1e-10 * max(1.0, float(np.abs(x).max())):
      converged = fresh  # a step this small changes the value by its rounding
      break
    if not 0.5 < ratio < 2 and not fresh:
      hessian, fresh = differences(objective, x), True
  if not fresh:
    hessian = differences(objective, x)
  return Minimum(x, value, gradient, hessian, converged)


def held(objective: Objective, x: np.ndarray, free: np.ndarray) -> Objective:
  """Return `objective` as a function of some entries of x, with the other entries held fixed.

  Args:
    objective: x [k] -> (value, gradient [k]).
    x: [k], the values of the fixed entries.
    free: [k] bool, which entries are arguments of the new function.

  Returns:
    The function x[free] -> (value, gradient[free]).
  """

  def of_free(y: np.ndarray) -> tuple[float, np.ndarray]:
    full = x.copy()
    full[free] = y
    value, gradient = objective(full)
    return value, gradient[free]

  return of_free


def starts(value: Callable[[np.ndarray], float], count: int, diagonal: np.ndarray,
           grid: tuple[float, ...] = GRID) -> list[np.ndarray]:  # fmt: skip
  """Choose where to start: at local minima of a grid over the diagonal entries of Lambda.

  One or two diagonal entries take all combinations of grid values. Three or more entries first take
  equal values, and the minima along this line are found. From each of these minima, and from the
  first, middle and last point of the line, one entry after the other moves to its best grid value,
  in two rounds. This misses a valley in which two entries rise together. So three entries also take
  all combinations of every second grid value, and from each minimum found there the search goes
  downhill on the whole grid.

  Args:
    value: theta [k] -> the criterion to minimise.
    count: k, the number of entries of theta.
    diagonal: the positions in theta of the diagonal entries. The other entries are 0.
    grid: the values of the grid, standard deviations relative to the noise.

  Returns:
    At most six starts [k], best first.
  """
  seen: dict[tuple[int, ...], float] = {}

  def at(place: tuple[int, ...]) -> float:
    if place not in seen:
      found = value(theta(place))
      seen[place] = found if np.isfinite(found) else np.inf
    return seen[place]

  def theta(place: tuple[int, ...]) -> np.ndarray:
    x = np.zeros(count)
    x[diagonal] = [grid[i] for i in place]
    return x

  d, n = len(diagonal), len(grid)
  if d == 0:
    return [np.zeros(count)]

  def near(place: tuple[int, ...], step: int) -> list[tuple[int, ...]]:
    moves = itertools.product((-step, 0, step), repeat=d)
    found = (tuple(map(sum, zip(place, move, strict=True))) for move in moves)
    return [p for p in found if all(0 <= i < n for i in p)]

  def valleys(step: int) -> list[tuple[int, ...]]:
    places = itertools.product(range(0, n, step), repeat=d)
    return [p for p in places if all(at(p) <= at(q) + 1e-8 for q in near(p, step))]

  def downhill(place: tuple[int, ...]) -> tuple[int, ...]:
    while at(lower := min(near(place, 1), key=at)) < at(place) - 1e-8:
      place = lower
    return place

  if d <= _PLAIN:
    best = valleys(1)
  else:
    line = [(i,) * d for i in range(n)]
    values = [at(place) for place in line]
    lowest = lambda i: values[i] <= min(values[max(i - 1, 0) : i + 2])
    best = [_along(line[i], at, d, n) for i in range(n) if lowest(i)]
    best += [_along(line[i], at, d, n) for i in (0, n // 2, n - 1)]
    best += [downhill(place) for place in valleys(2)] if d == _COARSE else []
  # Where the criterion is flat, rounding would choose; then the one nearest to 1 comes first.
  middle = lambda place: sum(abs(np.log(grid[i])) for i in place)
  best = sorted(dict.fromkeys(best), key=lambda place: (round(at(place), 8), middle(place)))
  return [theta(place) for place in best[:_MOST_STARTS]]


def _along(place: tuple[int, ...], at: Callable[..., float], d: int, n: int) -> tuple[int, ...]:
  for _ in range(2):
    for j in range(d):
      place = min(((*place[:j], i, *place[j + 1 :]) for i in range(n)), key=at)
  return place


def _updated(hessian: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
  """BFGS; the old Hessian if the curvature along the step is not positive."""
  curved, product = float(step @ change), hessian @ step
  along = float(step @ product)
  if curved <= 1e-12 * float(np.linalg.norm(step) * np.linalg.norm(change)) or along <= 0:
    return hessian
  return hessian + np.outer(change, change) / curved - np.outer(product, product) / along


def _trusted(hessian: np.ndarray, gradient: np.ndarray, radius: float) -> tuple[np.ndarray, float]:
  """The step of at most `radius` that lowers the quadratic model most, and by how much."""
  values, vectors = np.linalg.eigh(hessian)
  g = vectors.T @ gradient
  floor = 1e-12 * float(np.abs(values).max()) + 1e-14
  if values[0] > floor:
    step = -g / values
    if np.linalg.norm(step) <= radius:
      return vectors @ step, float(-(g @ step) - 0.5 * step @ (values * step))
  # |(values + shift)^-1 g| = radius; it falls as the shift grows.
  low = max(0.0, -float(values[0]))
  high = low + float(np.linalg.norm(g)) / radius + floor
  size = lambda shift: float(np.linalg.norm(g / (values + shift)))
  near = low + floor
  if size(near) < radius:  # the gradient does not see the most curved direction
    step = -g / (values + near)
    sign = -1.0 if g[0] > 0 else 1.0
    if values[0] < -floor:
      step[0] += sign * np.sqrt(max(radius**2 - float(step @ step), 0.0))
  else:
    low = near
    for _ in range(60):
      middle = (low + high) / 2
      low, high = (middle, high) if size(middle) > radius else (low, middle)
    step = -g / (values + high)
  return vectors @ step, float(-(g @ step) - 0.5 * step @ (values * step))
