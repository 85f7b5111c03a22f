"""Place arrays on devices: split tasks over the devices, and copy or cut the state.

The same program, `jax.jit(learner.update)`, runs on one device and on many. The functions of this
file place its arrays. The mesh has one axis, "tasks", over which the tasks are split. If the state
does not fit on one device, the mesh has a second axis, "model". Rules then say how leaves of the
state are cut along "model", and XLA adds the communication.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import is_key, shown
from shrinkmeta.devices.batching import check_mesh, num_tasks
from shrinkmeta.model.tasks import Batch, Task, weights

PyTree = Any
Tasks = TypeVar("Tasks")
Rules = Mapping[str, PartitionSpec]  # {regular expression on a leaf's path: how it is cut}


def task_mesh(devices: Sequence[Any] | None = None, model: int = 1) -> Mesh:
  """Build the mesh of devices that a learner takes as `mesh`.

  Args:
    devices: a list of JAX devices. None: all devices of all processes.
    model: the number of devices in a group. The tasks are split over the groups. The devices of a
      group hold one copy of the state together, cut along the axis "model". With 1 there is no
      axis "model", and every device holds a copy of the state.

  Returns:
    A Mesh with the axis "tasks", and the axis "model" if `model` is more than 1.

  Raises:
    TypeError: if `devices` is not a list of devices, or `model` is not an integer.
    ValueError: if there are no devices, or `model` does not divide their number.

  >>> task_mesh(jax.devices()[:1]).axis_names
  ('tasks',)
  """
  devices = jax.devices() if devices is None else devices
  if not isinstance(devices, Sequence) or not all(hasattr(d, "process_index") for d in devices):
    raise TypeError(
      f"devices must be a list of JAX devices, such as jax.devices(); got {shown(devices)}."
    )
  if not devices:
    raise ValueError("devices is empty: a mesh needs at least one device.")
  model = validate.integer("model", model)
  if model < 1 or len(devices) % model:
    raise ValueError(f"model must divide the number of devices, {len(devices)}; got {model}.")
  shape, names = (len(devices),), ("tasks",)
  if model > 1:
    shape, names = (len(devices) // model, model), ("tasks", "model")
  auto = (jax.sharding.AxisType.Auto,) * len(names)
  if len({device.process_index for device in devices}) == 1:
    return jax.make_mesh(shape, names, auto, devices=devices)
  # `jax.make_mesh` would not place the devices of one process side by side, so the tasks of a
  # process would not be side by side either (docs/hazards.md#device-order).
  by_process = sorted(devices, key=lambda device: device.process_index)
  return Mesh(np.array(by_process, object).reshape(shape), names, axis_types=auto)


def place_state(state: PyTree, mesh: Mesh | None, rules: Rules | None = None) -> PyTree:
  """Place a state, or any pytree that all tasks share, on the devices of the mesh.

  Args:
    state: a pytree of arrays [...].
    mesh: the devices. None returns the state unchanged.
    rules: {regular expression: how to cut a leaf}, such as
      {"head/kernel": PartitionSpec(None, "model")}. A leaf follows the first rule whose expression
      `re.search` finds in its path, such as "phi/head/kernel" or "opt_state/phi/0/mu/head/kernel".
      Leaves without a rule are copied to every device.

  Returns:
    The state with the same values.

  Raises:
    TypeError: if an argument is of another type.
    ValueError: if a rule matches no leaf, or does not fit a leaf that it matches.

  >>> place_state({"w": 1.0}, task_mesh(jax.devices()[:1]))
  {'w': Array(1., dtype=float32, weak_type=True)}
  """
  check_mesh(mesh)
  rules = {} if rules is None else rules
  validate.instance("rules", rules, Mapping, "a dict {regular expression: PartitionSpec}")
  for rule, spec in rules.items():
    scalars.regex("a key of rules", rule)
    validate.instance(f"rules[{rule!r}]", spec, PartitionSpec, "a jax.sharding.PartitionSpec")
  if mesh is None:
    return state
  met = set()

  def sharding(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
    name = validate.path_name(path)
    for rule, spec in rules.items():
      # No rule applies to a scalar. A rule for a module also matches "log_sigma2/<module>", a
      # scalar that cannot be cut.
      if jnp.ndim(leaf) and re.search(rule, name):
        met.add(rule)
        _check_rule(rule, spec, name, leaf, mesh)
        return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())

  shardings = jax.tree_util.tree_map_with_path(sharding, state)
  if unmet := sorted(set(rules) - met):
    names = [name for name, _ in validate.leaves_with_names(state)]
    raise ValueError(f"No leaf of the state matches the rules {unmet}; its leaves are {names}.")
  # `device_put` takes the words of a key, and of several processes no typed key
  # (docs/hazards.md#typed-keys).
  words = jax.tree.map(lambda x: np.asarray(jax.random.key_data(x)) if is_key(x) else x, state)
  as_before = lambda x, old: (
    jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if is_key(old) else x
  )
  return jax.tree.map(as_before, jax.device_put(_own(words), shardings), state)


def _check_rule(rule: str, spec: PartitionSpec, name: str, leaf: jax.Array, mesh: Mesh) -> None:
  """Raise ValueError unless `spec` can cut a leaf [...] on the mesh."""
  fits = len(spec) <= leaf.ndim and all(
    part is None or (part in mesh.axis_names and size % mesh.shape[part] == 0)
    for part, size in zip(spec, leaf.shape, strict=False)
  )
  if not fits:
    raise ValueError(
      f"Rule {rule!r} cuts {name}, of shape {leaf.shape}, as {spec}. That does not fit a mesh of "
      f"{dict(mesh.shape)}: the axes must be axes of the mesh and divide the shape."
    )


def share_of_tasks(count: int, mesh: Mesh | None) -> tuple[int, int, int]:
  """Return which of `count` tasks this process must read.

  The tasks are split in order over the axis "tasks" of the mesh. After padding, all devices along
  this axis have the same number of tasks.

  Args:
    count: the number of tasks of all processes together.
    mesh: the devices, or None for one device.

  Returns:
    (the index of the first task to read, the number of tasks to read, this number after padding).

  Raises:
    TypeError: if an argument is of another type.
    ValueError: if `count` is not positive, or the devices of this process are not side by side on
      the mesh.

  >>> share_of_tasks(7, None)
  (0, 7, 7)
  """
  count = validate.integer("count", count, least=1)
  check_mesh(mesh)
  if mesh is None:
    return 0, count, count
  devices = mesh.devices.reshape(mesh.devices.shape[0], -1)[:, 0]
  mine = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
  if not mine or mine != list(range(mine[0], mine[-1] + 1)):
    raise ValueError(
      f"Process {jax.process_index()} has the places {mine} on the mesh's first axis. It needs at "
      "least one, and neighbouring ones. Build the mesh by sm.task_mesh()."
    )
  each = -(-count // len(devices))
  first, share = mine[0] * each, len(mine) * each
  return first, min(share, max(0, count - first)), share


def place_tasks(
  tasks: Tasks, mesh: Mesh | None, share: int | None = None, count: int | None = None
) -> Tasks:
  """Place the tasks of this process on its devices, as part of arrays over the whole mesh.

  Args:
    tasks: the T tasks that `share_of_tasks` assigns to this process: a Task, or the Batch for
      `learner.adapt_tasks`, leaves [T, N, ...]. If no padding tasks are needed, it may be any
      pytree with leaves [T, ...], such as a WarmStart.
    mesh: the devices. None does not move the tasks.
    share: the number of tasks of this process after padding, at least T. Padding tasks have no
      examples. None: T, so that no task is appended.
    count: the number of real tasks, which come first in `tasks`. None: all are real. 0: this
      process holds no real task and passes one only as a template for padding.

  Returns:
    The same tree, leaves [T', N, ...]. T' is the number of tasks of all processes, padding
    included.

  Raises:
    TypeError: if an argument is of another type.
    ValueError: if T differs between leaves, or `count` or `share` does not fit T, or `share`
      does not fit the devices.

  >>> batch = Batch(jnp.ones([2, 3, 1]), jnp.ones([2, 3]))
  >>> place_tasks(Task(batch, batch), None, share=3).val.mask
  Array([[1., 1., 1.],
         [1., 1., 1.],
         [0., 0., 0.]], dtype=float32)
  """
  check_mesh(mesh)
  total = num_tasks(tasks)
  count, share = total if count is None else count, total if share is None else share
  count = validate.integer("count", count, least=0)
  share = validate.integer("share", share, least=1)
  if share < total:
    raise ValueError(
      f"share is {share}, but {total} tasks came; share counts them and the padding. Pass share="
      f"{total} or more, or cut the tasks first: jax.tree.map(lambda x: x[:{share}], tasks)."
    )
  if count > total:
    raise ValueError(f"count is {count}; it must be at most the number of tasks, {total}.")
  # All processes must run the same program. If one of them pads, all need masks. A process does not
  # know whether another one pads, so with several processes all have masks.
  if share > count or jax.process_count() > 1:
    wanted = "a shrinkmeta.Task, or a Batch, to be filled up"
    validate.instance("tasks", tasks, (Task, Batch), wanted)
    tasks = fill_tasks(tasks, count, share)
  if mesh is None:
    return tasks
  devices = mesh.shape[mesh.axis_names[0]]
  if jax.process_count() == 1 and share % devices:
    raise ValueError(
      f"{share} tasks cannot be split evenly over the {devices} devices of the mesh. Pass "
      f"share={share + -share % devices}: tasks without examples then fill up the devices."
    )
  spec = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
  if jax.process_count() == 1:
    # `_own` copies, because JAX may share NumPy's memory (docs/hazards.md#shared-memory).
    return jax.device_put(_own(tasks), spec)
  local = lambda x: jax.make_array_from_process_local_data(spec, np.array(x))
  return jax.tree.map(local, tasks)


def _own(tree: PyTree) -> PyTree:
  """Copy the leaves that are NumPy arrays.

  On a CPU JAX may share the memory of a NumPy array. A later write to the NumPy array would then
  change the JAX array (docs/hazards.md#shared-memory).
  """
  return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)


def fill_tasks(tasks: Tasks, count: int, total: int) -> Tasks:
  """Append copies of the last task, with masks of 0, to make `total` tasks.

  Args:
    tasks: a Task or a Batch with leaves [T, N, ...].
    count: the number of real tasks. The masks of all tasks after them become 0.
    total: the number of tasks to return.

  Returns:
    A Task or a Batch with leaves [total, N, ...], and masks [total, N].

  >>> batch = Batch(jnp.ones([1, 3, 1]), jnp.ones([1, 3]))
  >>> fill_tasks(Task(batch, None), 1, 2).train.mask
  Array([[1., 1., 1.],
         [0., 0., 0.]], dtype=float32)
  """
  index = np.minimum(np.arange(total), num_tasks(tasks) - 1)
  real = (np.arange(total) < count)[:, None]

  def fill(batch: Batch) -> Batch:
    mask = jax.vmap(weights)(batch)
    batch = jax.tree.map(lambda x: x[index], batch)
    return batch._replace(mask=mask[index] * real)

  return jax.tree.map(fill, tasks, is_leaf=lambda x: isinstance(x, Batch))
