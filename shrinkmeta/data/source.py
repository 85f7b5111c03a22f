"""A source of tasks for `fit`, from tasks that are held in memory.

Episode i is one draw of one task, i = 0, 1, 2, ... There are K tasks, and K episodes make an epoch.
Episode i is task p(i mod K), where p is the random permutation of epoch i // K. An episode depends
only on i and the key, so it is the same in a meta-batch of any size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.model.tasks import (
  Batch,
  Task,
  check_batch,
  check_no_keys,
  check_tasks,
  num_rows,
  weights,
)

PyTree = Any
Source = Callable[[int, int], Task]  # (first, count) -> episodes first to first + count - 1
_ORDER, _SPLIT = 1, 2  # seed words: independent numbers for the order and for the splits


def source(
  tasks: Sequence[Batch] | Sequence[Task] | Task,
  *,
  key: jax.Array,
  rows: tuple[int, int] | None = None,
  split: Literal["random", "fixed"] = "random",
  buckets: int | None = None,
) -> Source:
  """Build a source that draws every task in memory once an epoch, in a new order each epoch.

  A Batch is the data of one task without a split. The source draws its train and val examples
  without replacement. If the task has fewer examples than `rows` asks for, all are split in the
  proportion of `rows`.

  Args:
    tasks: a list with one Batch or Task for each task, leaves [N_t, ...], where N_t may differ. Or
      one Task with leaves [K, N, ...]. Examples with mask 0 are left out.
    key: the key of the random order and the random splits.
    rows: (train examples, val examples) to draw from a Batch. With 0 val examples, val is None,
      which `reptile` and `empirical_bayes` accept. Leave `rows` None for Tasks: they already have
      train and val.
    split: "random" draws a new split of a Batch in every epoch. "fixed" keeps one split.
    buckets: the largest number of shapes [N, ...] that tasks are padded to. A program compiles once
      for each shape. None pads all tasks to the longest. Padding has mask 0.

  Returns:
    A function (first, count) -> Task for `fit`. The Task holds the episodes first to
    first + count - 1, leaves [count, N, ...].

  Raises:
    TypeError: if an argument is of another type.
    ValueError: if tasks do not agree, or a Batch has too few examples: it needs two, or one if
      `rows` asks for 0 val examples. The message names the task.

  Example:
    >>> batch = lambda n: Batch(jnp.ones([n, 2]), jnp.ones([n]))
    >>> tasks = source([batch(n) for n in (3, 8, 9)], rows=(4, 2), key=jax.random.key(0))
    >>> tasks(0, 2).train.inputs.shape, tasks(0, 2).val.inputs.shape
    ((2, 4, 2), (2, 2, 2))
  """
  validate.instance("key", key, (jax.Array, np.ndarray), "a key of jax.random.key")
  if split not in ("random", "fixed"):
    raise ValueError(f'split must be "random" or "fixed"; got {split!r}.')
  if buckets is not None:
    buckets = validate.integer("buckets", buckets, least=1)
    if buckets > 1 and jax.process_count() > 1:
      raise ValueError("Several processes run one program: leave buckets None.")
  items = _items(tasks)
  whole = isinstance(items[0], Batch)
  if whole != (rows is not None):
    raise ValueError(
      "A list of Batches needs rows=(examples of train, examples of val); Tasks need rows=None; "
      f"got rows={rows} and a list of {type(items[0]).__name__}s."
    )
  if rows is not None:
    rows = _checked_rows(rows)
  parts = [_kept(item) for item in items]
  _check_alike(parts, whole)
  sizes = [_sizes(i, part, rows) for i, part in enumerate(parts)]
  lengths = _lengths(sizes, buckets or 1)

  @functools.lru_cache(maxsize=4)  # a meta-batch may reach from one epoch into the next
  def epoch(number: int) -> tuple[jax.Array, np.ndarray]:
    own = jax.random.fold_in(key, number)
    return own, _random(own, _ORDER).permutation(len(parts))

  def episode(number: int) -> tuple[int, list[Batch]]:
    """Return the number of the task, and its Batches: train, and val if there is one."""
    own, order = epoch(number // len(parts))
    i = int(order[number % len(parts)])
    if rows is None:
      return i, parts[i]
    (n, m), (batch,) = sizes[i], parts[i]
    drawn = _random(own if split == "random" else key, _SPLIT, i).permutation(num_rows(batch))
    pick = lambda numbers: jax.tree.map(lambda x: x[numbers], batch)
    return i, [pick(drawn[:n]), *([pick(drawn[n : n + m])] if m else [])]

  def draw(first: int, count: int) -> Task:
    first = validate.integer("first", first, least=0)
    count = validate.integer("count", count, least=1)
    chosen = [episode(number) for number in range(first, first + count)]
    length = next(x for x in lengths if all(np.less_equal(sizes[i], x).all() for i, _ in chosen))
    columns = zip(*(batches for _, batches in chosen), strict=True)
    padded = [_stacked(column, n) for column, n in zip(columns, length, strict=False)]
    return Task(padded[0], padded[1] if len(padded) > 1 else None)

  return draw


def _items(tasks: Any) -> Sequence[Any]:
  """Return the tasks as a list of Batches or of Tasks, after a check of each."""
  if isinstance(tasks, Task):
    check_tasks(tasks, needs_val=False)
    for name, part in _named("tasks", tasks):
      check_no_keys(name, part)
    count = jax.tree.leaves(tasks)[0].shape[0]
    tasks = jax.tree.map(np.asarray, tasks)
    return [jax.tree.map(lambda x, i=i: x[i], tasks) for i in range(count)]
  wanted = "a list with one shrinkmeta.Batch or shrinkmeta.Task a task, or one Task [T, N, ...]"
  if not isinstance(tasks, (list, tuple)) or isinstance(tasks, Batch):
    raise TypeError(f"tasks must be {wanted}; got {shown(tasks)}.")
  if not tasks:
    raise ValueError("tasks is an empty list: there is nothing to draw from.")
  kind = Batch if isinstance(tasks[0], Batch) else Task
  for i, item in enumerate(tasks):
    validate.instance(f"tasks[{i}]", item, kind, f"a shrinkmeta.{kind.__name__}, as tasks[0] is")
    for name, part in _named(f"tasks[{i}]", item):
      check_batch(name, part)
      check_no_keys(name, part)
    if kind is Task and (item[1] is None) != (tasks[0][1] is None):
      raise ValueError(f"tasks[{i}].val and tasks[0].val: one is None. Give a val to all or none.")
  return tasks


def _named(name: str, task: Batch | Task) -> list[tuple[str, Batch]]:
  """Return the Batches of a task, each with its name for error messages."""
  if isinstance(task, Batch):
    return [(name, task)]
  both = [(f"{name}.train", task.train), (f"{name}.val", task.val)]
  return both[: 1 if task.val is None else 2]


def _checked_rows(rows: Any) -> tuple[int, int]:
  """Return `rows`, (an integer of at least 1, an integer of at least 0), or raise an error."""
  if not isinstance(rows, (tuple, list)) or len(rows) != 2:
    raise TypeError(f"rows must be (examples of train, examples of val); got {shown(rows)}.")
  train = validate.integer("rows[0]", rows[0], least=1)
  return train, validate.integer("rows[1]", rows[1], least=0)


def _kept(item: Batch | Task) -> list[Batch]:
  """Return the Batches of a task as masked NumPy arrays, without the examples of mask 0."""
  found = []
  for batch in [item] if isinstance(item, Batch) else [part for part in item if part is not None]:
    mask = np.asarray(weights(batch))
    rows = np.flatnonzero(mask)
    found.append(jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], batch._replace(mask=mask)))
  return found


def _check_alike(parts: Sequence[Sequence[Batch]], whole: bool) -> None:
  """Raise ValueError unless all tasks agree in structure, dtypes and the axes after N."""
  names = ("",) if whole else (".train", ".val")
  for k, part in enumerate(names[: len(parts[0])]):
    first = validate.leaves_with_names(parts[0][k])
    for i, batches in enumerate(parts):
      leaves = validate.leaves_with_names(batches[k])
      if [name for name, _ in leaves] != [name for name, _ in first]:
        raise ValueError(f"tasks[{i}]{part} and tasks[0]{part} differ in structure.")
      for (name, x), (_, y) in zip(leaves, first, strict=True):
        if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
          raise ValueError(
            f"tasks[{i}]{part}.{name} is {x.dtype} {['N', *x.shape[1:]]}, but tasks[0]{part}."
            f"{name} is {y.dtype} {['N', *y.shape[1:]]}. All tasks must agree in all but N."
          )


def _sizes(i: int, part: Sequence[Batch], rows: tuple[int, int] | None) -> tuple[int, int]:
  """Return (train examples, val examples), the two numbers of task i."""
  if rows is None:
    return num_rows(part[0]), num_rows(part[1]) if len(part) > 1 else 0
  (n, m), have = rows, num_rows(part[0])
  if have < (needed := 2 if m else 1):
    raise ValueError(
      f"tasks[{i}] has {have} example{'s' * (have != 1)}; a split needs {needed}. Drop the task."
    )
  if have >= n + m:
    return n, m
  train = min(max(1, have * n // (n + m)), have - 1) if m else have
  return train, have - train


def _lengths(sizes: Sequence[tuple[int, int]], buckets: int) -> list[tuple[int, int]]:
  """Return at most `buckets` lengths (of train, of val) to pad tasks to, the shortest first.

  Tasks are sorted by size and cut into `buckets` groups with about the same number of tasks. The
  length of a group fits all tasks of this group and of the groups before it.
  """
  ordered = np.array(sorted(sizes, key=sum))
  most = np.maximum.accumulate(ordered)
  ends = [-(-len(sizes) * (b + 1) // buckets) - 1 for b in range(buckets)]
  return sorted({(int(most[end][0]), int(most[end][1])) for end in ends if end >= 0})


def _random(key: jax.Array, *numbers: int) -> np.random.Generator:
  """Return a NumPy generator that a key and some numbers seed."""
  return np.random.default_rng([*np.ravel(jax.random.key_data(key)).tolist(), *numbers])


def _stacked(batches: Sequence[Batch], n: int) -> Batch:
  """Stack Batches [N_t, ...] in one Batch [T, n, ...], padded with zeros."""

  def stack(*leaves: np.ndarray) -> jax.Array:
    out = np.zeros((len(leaves), n, *leaves[0].shape[1:]), leaves[0].dtype)
    for row, leaf in zip(out, leaves, strict=True):
      row[: len(leaf)] = leaf
    return jnp.asarray(out)

  return jax.tree.map(stack, *batches)
