"""A nested path of sets of modules, from none to all, and statistics over paired tasks."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Path = tuple[tuple[str, ...], ...]


def greedy(
  loss_of: Callable[[Sequence[str]], float], candidates: Sequence[str], sizes: Mapping[str, int]
) -> Path:
  """Return the sets (), (a,), (a, b), ...: each adds the module that lowers the loss most.

  Of modules that tie, the one with the fewest parameters is added first, then the first by path.

  Args:
    loss_of: modules -> their mean loss.
    candidates: the M modules, in the order of their paths.
    sizes: {module: number of parameters}.

  Returns:
    M + 1 nested sets, each in the order of addition.

  >>> greedy(lambda chosen: -len([m for m in chosen if m == "b"]), ("a", "b"), {"a": 1, "b": 1})
  ((), ('b',), ('b', 'a'))
  """
  path: list[tuple[str, ...]] = [()]
  while left := [m for m in candidates if m not in path[-1]]:
    losses = {m: loss_of((*path[-1], m)) for m in left}
    path.append((*path[-1], min(left, key=lambda m: (losses[m], sizes[m]))))
  return tuple(path)


def paired_error(losses: np.ndarray, other: np.ndarray) -> float:
  """Return the standard error of the mean of paired differences, sd / sqrt(T).

  Args:
    losses: of T tasks [T].
    other: of the same tasks [T].

  Returns:
    a number, NaN for one task.

  >>> paired_error(np.array([1.0, 3.0]), np.array([0.0, 0.0]))
  1.0
  """
  difference = losses - other
  if difference.size < 2:
    return float("nan")
  return float(np.std(difference, ddof=1) / np.sqrt(difference.size))


def smallest_good(means: Sequence[float], errors: Sequence[float], tolerance: float | None) -> int:
  """Return the number of the first set of a path that is about as good as the best.

  Args:
    means: the mean loss of every set.
    errors: the standard error of each difference to the best.
    tolerance: the largest difference to the best, in nats; None takes each set's error.

  Returns:
    a number on the path.

  >>> smallest_good([2.0, 1.1, 1.0], [0.3, 0.2, 0.0], None)
  1
  """
  best = min(means)
  allowed = [tolerance] * len(means) if tolerance is not None else errors
  return next(
    i
    for i, (mean, most) in enumerate(zip(means, allowed, strict=True))
    if mean == best or mean - best <= most
  )
