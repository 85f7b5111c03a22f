"""The data of a task: a batch of examples to adapt on and one to be judged by."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta import validate

PyTree = Any


class Batch(NamedTuple):
  """N examples. A batch of tasks adds a leading axis T to every leaf.

  Tasks of unequal size are padded to one N; `mask` tells examples from padding. Padding must be
  finite (zeros, say), since it passes through the network before the mask drops it.
  """

  inputs: PyTree  # leaves [N, ...]
  targets: PyTree  # leaves [N, ...]
  mask: jax.Array | None = None  # [N] 1 for an example, 0 for padding; None: all are examples


class Task(NamedTuple):
  """Data of one task: theta is found on `train`, sigma and phi are judged on `val`."""

  train: Batch
  val: Batch


def num_rows(batch: Batch) -> int:
  """N, padding included (static)."""
  return jax.tree.leaves(batch.inputs)[0].shape[0]


def weights(batch: Batch, dtype: jax.typing.DTypeLike) -> jax.Array:
  """The mask as numbers [N]; ones where there is no mask."""
  if batch.mask is None:
    return jnp.ones([num_rows(batch)], dtype)
  return batch.mask.astype(dtype)


def num_examples(batch: Batch, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Number of examples [], padding not counted."""
  return jnp.sum(weights(batch, dtype))


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
    empty = (mask != 0).sum(-1) == 0
    if empty.any():
      where = f" of tasks {empty.nonzero()[0].tolist()}" if empty.ndim else ""
      raise ValueError(f"{name}.mask{where} is 0 everywhere: no example is left. Drop such tasks.")


def check_tasks(tasks: Task) -> None:
  """Raises ValueError unless `tasks` is a Task whose leaves lead with [T, N, ...]."""
  if not isinstance(tasks, Task):
    raise ValueError(f"tasks must be a shrinkmeta.Task(train, val); got {type(tasks)}.")
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
