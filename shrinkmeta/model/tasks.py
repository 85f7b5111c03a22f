"""The data of a task: one batch of examples for adaptation, and one for validation.

Papers on few-shot learning call `train` the support set and `val` the query set. T is the number of
tasks. N is the number of examples of one task, padding included.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import is_key, model_hint, shown

PyTree = Any


class Batch(NamedTuple):
  """N examples of one task.

  If a Batch holds T tasks, every leaf has a leading axis T.

  Tasks of unequal size are padded to the same N, and `mask` tells examples from padding. Padding
  must be finite, for example zeros, because the network reads it before the mask removes it.

  Attributes:
    inputs: a pytree with leaves [N, ...].
    targets: a pytree with leaves [N, ...].
    mask: [N], the weight of every example: 1 for an example, 0 for padding, or another float >= 0.
      None gives every example the weight 1.

  >>> Batch(jnp.ones([4, 3]), jnp.ones([4])).mask is None
  True
  """

  inputs: PyTree  # leaves [N, ...]
  targets: PyTree  # leaves [N, ...]
  mask: jax.Array | None = None  # [N]


class Task(NamedTuple):
  """The data of one task.

  If a Task holds T tasks, every leaf has a leading axis T.

  Attributes:
    train: the examples that theta is adapted on, leaves [N, ...].
    val: the examples of the validation loss, leaves [N', ...]. N' may differ from N. `reptile` and
      `empirical_bayes` do not need validation examples and accept None.

  >>> train, val = Batch(jnp.ones([4, 3]), jnp.ones([4])), Batch(jnp.ones([9, 3]), jnp.ones([9]))
  >>> num_rows(Task(train, val).val)
  9
  """

  train: Batch
  val: Batch | Any


def num_rows(batch: Batch) -> int:
  """Return the number N of examples of a batch [N, ...], padding included, as an int."""
  return jax.tree.leaves(batch.targets)[0].shape[0]


def weights(batch: Batch, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
  """Return the weights of the examples.

  Args:
    batch: the examples, leaves [N, ...].
    dtype: the dtype of the result. None: the dtype of the mask, promoted with float32; float32
      if there is no mask.

  Returns:
    The weights [N], which are ones if the batch has no mask.
  """
  if batch.mask is None:
    return jnp.ones([num_rows(batch)], jnp.float32 if dtype is None else dtype)
  return batch.mask.astype(jnp.result_type(batch.mask, jnp.float32) if dtype is None else dtype)


def num_examples(batch: Batch, dtype: jax.typing.DTypeLike) -> jax.Array:
  """Return the number of examples of a batch [N, ...], the sum [] of their weights."""
  return jnp.sum(weights(batch, dtype))


def divisor(count: jax.Array) -> jax.Array:
  """Return the number [] that divides a sum over `count` [] examples to give their mean.

  It is `count`, or 1 if `count` is 0. The sum over no examples is 0, so its mean is then 0.
  """
  return jnp.where(count > 0, count, jnp.ones_like(count))


def stack_batches(batches: Sequence[Batch], rows: int | None = None) -> Batch:
  """Stack tasks of unequal size in one Batch, padded with zeros and masked.

  This function reads the values of the arrays, so it does not run under jit.

  Args:
    batches: a list with one Batch for each task, leaves [N_t, ...]. The axes after N_t, the dtypes
      and the structures must agree.
    rows: the number N of examples that every task is padded to. None: the least power of two that
      is at least the length of the longest task. The results then have few different shapes, and a
      program compiles once for each shape.

  Returns:
    A Batch with leaves [T, N, ...] and a mask [T, N].

  Raises:
    TypeError: if `batches` is not a list of Batches, or `rows` is not an integer.
    ValueError: if there is no task, N is less than the length of the longest task, or the tasks do
      not agree.

  >>> tasks = [Batch(jnp.ones([n, 2]), jnp.ones([n])) for n in (1, 3)]
  >>> stack_batches(tasks).mask
  Array([[1., 0., 0., 0.],
         [1., 1., 1., 0.]], dtype=float32)
  """
  _check_list("batches", batches, "Batch")
  for i, batch in enumerate(batches):
    check_batch(f"batches[{i}]", batch)
    check_no_keys(f"batches[{i}]", batch)
  longest = max(map(num_rows, batches))
  n = 1 << (longest - 1).bit_length() if rows is None else validate.integer("rows", rows)
  if n < longest:
    raise ValueError(f"rows is {n}, but the longest task has {longest}; give at least that.")

  def pad(*leaves: jax.Array) -> jax.Array:
    widths = lambda x: [(0, n - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
    return jnp.asarray(np.stack([np.pad(np.asarray(x), widths(x)) for x in leaves]))

  for part in ("inputs", "targets"):
    _check_alike(part, [getattr(batch, part) for batch in batches])
  inputs, targets = (jax.tree.map(pad, *[batch[part] for batch in batches]) for part in (0, 1))
  return Batch(inputs, targets, pad(*[weights(batch) for batch in batches]))


def stack_tasks(tasks: Sequence[Task], rows: int | None = None) -> Task:
  """Stack tasks of unequal size in one Task, padded with zeros and masked.

  Args:
    tasks: a list of Tasks, each with leaves [N_t, ...].
    rows: the number of examples that `train` and `val` are both padded to. None chooses a number
      for each of the two separately: see `stack_batches`.

  Returns:
    A Task with leaves [T, N, ...]. val is None if no task has validation examples.

  Raises:
    TypeError: if `tasks` is not a list of Tasks.
    ValueError: if val is None in some tasks and not in others, or for the reasons of
      `stack_batches`.

  >>> tasks = [Task(Batch(jnp.ones([n, 2]), jnp.ones([n])), None) for n in (1, 3)]
  >>> stack_tasks(tasks).train.inputs.shape
  (2, 4, 2)
  """
  _check_list("tasks", tasks, "Task")
  for i, task in enumerate(tasks):
    validate.instance(f"tasks[{i}]", task, Task, "a shrinkmeta.Task(train, val)", _task_hint(task))
  train = stack_batches([task.train for task in tasks], rows)
  val = [task.val for task in tasks if task.val is not None]
  if val and len(val) < len(tasks):
    raise ValueError(
      f"val is None in {len(tasks) - len(val)} of {len(tasks)} tasks. Give a val to all or to none."
    )
  return Task(train, stack_batches(val, rows) if val else None)


def check_batch(name: str, batch: Batch, lead: tuple[str, ...] = ("N",)) -> None:
  """Check that all leaves of a batch have the same leading axes and hold finite numbers.

  Types and shapes are always checked. Values are checked only outside jit.

  Args:
    name: the name of the argument, for the error message.
    batch: the value of the argument.
    lead: the names of the leading axes, ("N",) for one task and ("T", "N") for T tasks.

  Raises:
    TypeError: if `batch` is not a Batch, or a leaf is not an array.
    ValueError: if shapes do not fit, an entry is NaN or infinite, a weight is not allowed, or a
      task has no example.

  >>> check_batch("batch", Batch(jnp.ones([4, 3]), jnp.ones([5])))
  Traceback (most recent call last):
  ValueError: All leaves of batch must lead with the same [N, ...]: batch/inputs leads with (4,), \
batch/targets has shape (5,).
  """
  want = "[" + ", ".join(lead) + ", ...]"
  if not isinstance(batch, Batch):
    hint = _batch_hint(name, batch)
    validate.instance(name, batch, Batch, "a shrinkmeta.Batch(inputs, targets, mask)", hint)
  if batch.mask is not None:
    validate.array(f"{name}.mask", batch.mask, f"an array [{', '.join(lead)}] or None")
    if jnp.issubdtype(jnp.result_type(batch.mask), jnp.complexfloating):
      raise TypeError(f"{name}.mask must be bool, integer or float; got {shown(batch.mask)}.")
  leaves = validate.leaves_with_names(batch, name)
  for leaf_name, leaf in leaves:
    validate.array(leaf_name, leaf, f"an array that leads with {want}", numbers=False)
  if not jax.tree.leaves(batch.inputs) or not jax.tree.leaves(batch.targets):
    raise ValueError(
      f"{name} has no inputs or no targets: inputs is {shown(batch.inputs)}, targets is "
      f"{shown(batch.targets)}. Give arrays that lead with {want}."
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
    _check_mask(f"{name}.mask", mask)


def check_inputs(inputs: PyTree) -> None:
  """Check that `inputs` is a pytree of arrays [N, ...].

  Args:
    inputs: the value of the argument.

  Raises:
    TypeError: if a leaf is not an array.
    ValueError: if there are no leaves, or a leaf has no axis.

  >>> check_inputs([])
  Traceback (most recent call last):
  ValueError: inputs has no arrays; got a list of 0 items. Its leaves must be [N, ...].
  """
  if came := model_hint(inputs):
    raise TypeError(f"inputs must be arrays [N, ...]; got {came}")
  leaves = validate.leaves_with_names(inputs, "inputs")
  if not leaves:
    raise ValueError(f"inputs has no arrays; got {shown(inputs)}. Its leaves must be [N, ...].")
  for name, leaf in leaves:
    validate.array(name, leaf, "an array [N, ...]", numbers=False)
    if jnp.ndim(leaf) == 0:
      raise ValueError(f"{name} must be an array [N, ...]; its shape is ().")


def _check_mask(name: str, mask: np.ndarray) -> None:
  """Raise ValueError if a mask [N] or [T, N] has a wrong weight, or a task has no example.

  Weights must be at least 0. Those of an integer mask must be 0 or 1.
  """
  whole = np.issubdtype(mask.dtype, np.integer)
  if (mask < 0).any() or (whole and (mask > 1).any()):
    raise ValueError(
      f"{name} must be 1 for an example and 0 for padding (or a float, the weight of an "
      f"example); got {mask.dtype} from {mask.min()} to {mask.max()}."
    )
  empty = (mask != 0).sum(-1) == 0
  if empty.any():
    where = f" of tasks {empty.nonzero()[0].tolist()}" if empty.ndim else ""
    raise ValueError(f"{name}{where} is 0 everywhere: no example is left. Drop such tasks.")


def check_tasks(tasks: Task, needs_val: bool = True) -> None:
  """Check that `tasks` is a Task with leaves [T, N, ...] and finite numbers.

  Args:
    tasks: the value of the argument. Its leaves must be [T, N, ...].
    needs_val: whether the algorithm needs validation examples. If it does not, val may be None.

  Raises:
    TypeError: if `tasks` is not a Task of Batches.
    ValueError: if val is None but needed, if T differs between train and val, or for the reasons
      of `check_batch`.

  >>> check_tasks(Task(Batch(jnp.ones([2, 4]), jnp.ones([2, 4])), None))
  Traceback (most recent call last):
  ValueError: tasks.val is None. This algorithm needs validation examples: split the data.
  """
  if not isinstance(tasks, Task):
    validate.instance("tasks", tasks, Task, "a shrinkmeta.Task(train, val)", _task_hint(tasks))
  check_batch("tasks.train", tasks.train, ("T", "N"))
  if tasks.val is None:
    if not needs_val:
      return
    raise ValueError("tasks.val is None. This algorithm needs validation examples: split the data.")
  check_batch("tasks.val", tasks.val, ("T", "N"))
  counts = [jax.tree.leaves(part.inputs)[0].shape[0] for part in tasks]
  if counts[0] != counts[1]:
    raise ValueError(
      f"tasks.train has {counts[0]} tasks and tasks.val {counts[1]}; they must agree."
    )


def check_no_keys(name: str, batch: Batch) -> None:
  """Raise TypeError if a leaf holds random keys, which NumPy cannot stack or draw from."""
  for path, leaf in validate.leaves_with_names(batch, name):
    if is_key(leaf):
      raise TypeError(
        f"{path} holds random keys, which are no data of NumPy. Keep their integers, "
        "jax.random.key_data(keys), and let predict make keys again: jax.random.wrap_key_data."
      )


def _batch_hint(name: str, value: Any) -> str:
  """Say what to do about a value that is not a Batch."""
  if isinstance(value, Task):
    return f"Pass one part of it: {name}.train or {name}.val."
  if isinstance(value, (list, tuple)) and value and all(isinstance(x, Batch) for x in value):
    return f"Stack them: sm.stack_batches({name})."
  return "Wrap the arrays: sm.Batch(inputs, targets)."


def _task_hint(value: Any) -> str:
  """Say what to do about a value that is not a Task."""
  if isinstance(value, (list, tuple)) and value and all(isinstance(x, Task) for x in value):
    return "Stack them: sm.stack_tasks(tasks)."
  return "Give the examples to adapt on and those to validate on: sm.Task(train, val)."


def _check_list(name: str, items: Any, of: str) -> None:
  """Raise an error unless `items` is a list or tuple with an item, and not a Batch or Task."""
  if not isinstance(items, Sequence) or isinstance(items, (str, Batch, Task)):
    raise TypeError(f"{name} must be a list with one {of} a task; got {shown(items)}.")
  if not items:
    raise ValueError("There are no tasks to stack.")


def _check_alike(part: str, trees: Sequence[PyTree]) -> None:
  """Raise ValueError unless structure, dtypes and axes after N_t agree in leaves [N_t, ...]."""
  first = jax.tree.structure(trees[0])
  for i, tree in enumerate(trees):
    if jax.tree.structure(tree) != first:
      raise ValueError(
        f"batches[{i}].{part} and batches[0].{part} differ in structure: {shown(tree)} and "
        f"{shown(trees[0])}."
      )
  for columns in zip(*(validate.leaves_with_names(tree, part) for tree in trees), strict=True):
    name = columns[0][0]
    shapes = {jnp.shape(x)[1:] for _, x in columns}
    if len(shapes) > 1:
      raise ValueError(f"{name} differ in shape after the axis N of examples: {sorted(shapes)}.")
    dtypes = {str(jnp.result_type(x)) for _, x in columns}
    if len(dtypes) > 1:
      raise ValueError(f"{name} differ in dtype: {sorted(dtypes)}. Cast them to one dtype.")
