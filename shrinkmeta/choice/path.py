"""A nested path of sets of modules, from no module to all, and statistics paired over tasks."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Path = tuple[tuple[str, ...], ...]


def greedy(
  loss_of: Callable[[Sequence[str]], float], candidates: Sequence[str], sizes: Mapping[str, int]
) -> Path:
  """Return the nested sets (), (a,), (a, b), ..., adding the module with the lowest loss each time.

  If two modules give the same loss, the module with fewer parameters comes first. If the numbers of
  parameters are equal too, the module that is earlier in `candidates` comes first.

  Args:
    loss_of: a function of a set of task-specific modules that returns the mean loss of the set.
    candidates: the M modules, in the order of their paths.
    sizes: {module: number of parameters}.

  Returns:
    M + 1 nested sets. Each lists its modules in the order in which they were added.

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
    losses: the losses of T tasks [T].
    other: other losses of the same tasks [T].

  Returns:
    the standard error, or NaN for a single task.

  >>> paired_error(np.array([1.0, 3.0]), np.array([0.0, 0.0]))
  1.0
  """
  difference = losses - other
  if difference.size < 2:
    return float("nan")
  return float(np.std(difference, ddof=1) / np.sqrt(difference.size))


def smallest_good(means: Sequence[float], errors: Sequence[float], tolerance: float | None) -> int:
  """Return the position of the first set of a path whose loss is close enough to the best loss.

  Args:
    means: the mean loss of every set, in nats per example.
    errors: the standard error of the difference between each set and the best set.
    tolerance: the largest allowed difference to the best loss, in nats per example. None allows the
      difference of a set to be as large as its standard error.

  Returns:
    the position of the set on the path, from 0.

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
