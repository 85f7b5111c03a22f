"""The data of a task: a batch of examples to adapt on and one to be judged by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta import validate

PyTree = Any


class Batch(NamedTuple):
  """N examples. A batch of tasks adds a leading axis T to every leaf.

  Tasks of unequal size are padded to one N; `mask` tells examples from padding. Padding must be
  finite (zeros, say), since it passes through the network before the mask drops it.
  """

  inputs: PyTree  # leaves [N, ...]
  targets: PyTree  # leaves [N, ...]
  mask: jax.Array | None = None  # [N] 1 for an example, 0 for padding, or a weight; None: all 1


class Task(NamedTuple):
  """Data of one task: theta is found on `train`, sigma and phi are judged on `val`."""

  train: Batch
  val: Batch | Any  # a Batch; `reptile` and `empirical_bayes`, which need none, take None too


def num_rows(batch: Batch) -> int:
  """N, padding included (static)."""
  return jax.tree.leaves(batch.targets)[0].shape[0]


def weights(batch: Batch, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """The mask as numbers [N], ones where there is none. dtype None: the mask's, float32 at least."""
  if batch.mask is None:
    return jnp.ones([num_rows(batch)], jnp.float32 if dtype is None else dtype)
  return batch.mask.astype(jnp.result_type(batch.mask, jnp.float32) if dtype is None else dtype)


def num_examples(batch: Batch, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Number of examples [], padding not counted."""
  return jnp.sum(weights(batch, dtype))


def divisor(count: jax.Array) -> jax.Array:
  """`count`, to divide a sum over examples by; 1 where nothing counts, since that sum is 0."""
  return jnp.where(count > 0, count, jnp.ones_like(count))


def stack_batches(batches: Sequence[Batch], rows: int | None = None) -> Batch:
  """Tasks of unequal size as one Batch with a leading axis T, padded with zeros and masked.

  Args:
    batches: one task each, leaves [N_t, ...]; not for use under jit.
    rows: N to pad to. None is the least power of two that holds the longest task, so that batches
      of tasks of many sizes have few shapes, each of which compiles once.

  >>> import jax.numpy as jnp
  >>> tasks = [Batch(jnp.ones([n, 2]), jnp.ones([n])) for n in (1, 3)]
  >>> stack_batches(tasks).mask
  Array([[1., 0., 0., 0.],
         [1., 1., 1., 0.]], dtype=float32)
  """
  if not batches:
    raise ValueError("There are no tasks to stack.")
  for i, batch in enumerate(batches):
    check_batch(f"batches[{i}]", batch)
  longest = max(map(num_rows, batches))
  n = 1 << (longest - 1).bit_length() if rows is None else rows
  if n < longest:
    raise ValueError(f"rows is {n}, but the longest task has {longest}; give at least that.")

  def pad(name: str, *leaves: jax.Array) -> jax.Array:
    shapes = {jnp.shape(x)[1:] for x in leaves}
    if len(shapes) > 1:
      raise ValueError(f"{name} differ in shape after the axis N of examples: {sorted(shapes)}.")
    widths = lambda x: [(0, n - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
    return jnp.asarray(np.stack([np.pad(np.asarray(x), widths(x)) for x in leaves]))

  inputs = jax.tree.map(lambda *x: pad("inputs", *x), *[b.inputs for b in batches])
  targets = jax.tree.map(lambda *x: pad("targets", *x), *[b.targets for b in batches])
  mask = pad("masks", *[weights(b, jnp.float32) for b in batches])
  return Batch(inputs, targets, mask)


def stack_tasks(tasks: Sequence[Task], rows: int | None = None) -> Task:
  """`stack_batches` of both parts; each has its own N where `rows` is None."""
  train = stack_batches([task.train for task in tasks], rows)
  val = [task.val for task in tasks if task.val is not None]
  if val and len(val) < len(tasks):
    raise ValueError(f"val is None in {len(tasks) - len(val)} of {len(tasks)} tasks: all or none.")
  return Task(train, stack_batches(val, rows) if val else None)


def check_batch(name: str, batch: Batch, lead: tuple[str, ...] = ("N",)) -> None:
  """Raises ValueError unless every leaf leads with the axes `lead` and holds finite numbers.

  Shapes are checked while tracing too; values only where they are known (outside jit). `lead` is
  ("N",) for one task and ("T", "N") for a batch of tasks.
  """
  want = "[" + ", ".join(lead) + ", ...]"
  if not isinstance(batch, Batch):
    raise ValueError(
      f"{name} must be a shrinkmeta.Batch(inputs, targets, mask); got {type(batch)}."
    )
  leaves = validate.leaves_with_names(batch, name)
  if not jax.tree.leaves(batch.inputs) or not jax.tree.leaves(batch.targets):
    raise ValueError(
      f"{name} has no inputs or no targets: {batch}. Give arrays that lead with {want}."
    )
  first, shape = leaves[0][0], tuple(jnp.shape(leaves[0][1])[: len(lead)])
  for leaf_name, leaf in leaves:
    if jnp.ndim(leaf) < len(lead):
      raise ValueError(f"{leaf_name} must lead with {want}; its shape is {jnp.shape(leaf)}.")
    if tuple(jnp.shape(leaf)[: len(lead)]) != shape:
      raise ValueError(
        f"All leaves of {name} must lead with the same {want}: {first} leads with {shape}, "
        f"{leaf_name} has shape {jnp.shape(leaf)}."
      )
  if 0 in shape:
    raise ValueError(f"{name} is empty: {first} leads with {want} = {shape}. Drop empty tasks.")
  if batch.mask is not None and jnp.ndim(batch.mask) != len(lead):
    raise ValueError(f"{name}.mask must have shape {shape}; got {jnp.shape(batch.mask)}.")
  validate.finite(name, batch)
  if batch.mask is not None and (mask := validate.known(batch.mask)) is not None:
    whole = np.issubdtype(mask.dtype, np.integer)
    if (mask < 0).any() or (whole and (mask > 1).any()):
      raise ValueError(
        f"{name}.mask must be 1 for an example and 0 for padding (or a float, the weight of an "
        f"example); got {mask.dtype} from {mask.min()} to {mask.max()}."
      )
    empty = (mask != 0).sum(-1) == 0
    if empty.any():
      where = f" of tasks {empty.nonzero()[0].tolist()}" if empty.ndim else ""
      raise ValueError(f"{name}.mask{where} is 0 everywhere: no example is left. Drop such tasks.")


def check_tasks(tasks: Task, needs_val: bool = True) -> None:
  """Raises ValueError unless `tasks` is a Task whose leaves lead with [T, N, ...]."""
  if not isinstance(tasks, Task):
    raise ValueError(f"tasks must be a shrinkmeta.Task(train, val); got {type(tasks)}.")
  if tasks.val is None and not needs_val:
    check_batch("tasks.train", tasks.train, ("T", "N"))
    return
  if tasks.val is None:
    raise ValueError(
      "tasks.val is None. This learner judges theta on examples kept apart: split the data."
    )
  check_batch("tasks.train", tasks.train, ("T", "N"))
  check_batch("tasks.val", tasks.val, ("T", "N"))
  counts = [jax.tree.leaves(part.inputs)[0].shape[0] for part in tasks]
  if counts[0] != counts[1]:
    raise ValueError(
      f"tasks.train has {counts[0]} tasks and tasks.val {counts[1]}; they must agree."
    )
