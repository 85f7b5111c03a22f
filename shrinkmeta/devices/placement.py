"""Where arrays lie: tasks are split over devices, the state is copied to all of them or cut.

One device and a pod run the same program, `jax.jit(learner.update)`, on arrays placed here. The
mesh has one axis, "tasks"; for models that no device holds whole it has a second, "model", along
which large leaves of the state are cut as rules say and XLA puts in the communication.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shrinkmeta import validate
from shrinkmeta.devices.batching import num_tasks
from shrinkmeta.model.tasks import Batch, Task, weights

PyTree = Any
Rules = Mapping[str, PartitionSpec]  # {regular expression: how leaves whose path it finds are cut}


def task_mesh(devices: Sequence[Any] | None = None, model: int = 1) -> Mesh:
  """A mesh over `devices`; None is all that JAX has, of all processes.

  Give it to a learner as `mesh`.

  Args:
    model: devices that share one copy of the state; the others split the tasks. 1 leaves the axis
      out: every device has a copy of the state.

  >>> task_mesh(jax.devices()[:1]).axis_names
  ('tasks',)
  """
  devices = jax.devices() if devices is None else devices
  if model < 1 or len(devices) % model:
    raise ValueError(f"model must divide the number of devices, {len(devices)}; got {model}.")
  shape, names = (len(devices),), ("tasks",)
  if model > 1:
    shape, names = (len(devices) // model, model), ("tasks", "model")
  auto = (jax.sharding.AxisType.Auto,) * len(names)
  if len({device.process_index for device in devices}) == 1:
    return jax.make_mesh(shape, names, auto, devices=devices)
  # In the order of a ring through a torus, that of make_mesh, a process would have its devices here
  # and there, and so tasks that are not side by side.
  by_process = sorted(devices, key=lambda device: device.process_index)
  return Mesh(np.array(by_process, object).reshape(shape), names, axis_types=auto)


def place_state(state: PyTree, mesh: Mesh | None, rules: Rules | None = None) -> PyTree:
  """The state, or any tree that all tasks share, on the devices of the mesh.

  Args:
    mesh: None leaves everything where it is.
    rules: for a mesh with the axis "model": the first whose expression is found in a leaf's path,
      such as "phi/head/kernel" or "opt_state/phi/0/mu/head/kernel", tells how the leaf is cut,
      {"head/kernel": PartitionSpec(None, "model")}; leaves that none finds are copied.

  Raises:
    ValueError: a rule that no leaf meets, or that does not fit one it meets.
  """
  if mesh is None:
    return state
  rules = rules or {}
  met = set()

  def sharding(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
    name = validate.path_name(path)
    for rule, spec in rules.items():
      if leaf.ndim and re.search(rule, name):  # sigma of a module has the module's name in its own
        met.add(rule)
        _check_rule(rule, spec, name, leaf, mesh)
        return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())

  shardings = jax.tree_util.tree_map_with_path(sharding, state)
  if unmet := sorted(set(rules) - met):
    names = [name for name, _ in validate.leaves_with_names(state)]
    raise ValueError(f"No leaf of the state is found by the rules {unmet}; its leaves are {names}.")
  return jax.device_put(state, shardings)


def _check_rule(rule: str, spec: PartitionSpec, name: str, leaf: jax.Array, mesh: Mesh) -> None:
  fits = len(spec) <= leaf.ndim and all(
    part is None or (part in mesh.axis_names and size % mesh.shape[part] == 0)
    for part, size in zip(spec, leaf.shape, strict=False)
  )
  if not fits:
    raise ValueError(
      f"Rule {rule!r} cuts {name}, of shape {leaf.shape}, as {spec}, which it cannot on a mesh of "
      f"{dict(mesh.shape)}: axes are to be of the mesh, and to divide the shape."
    )


def share_of_tasks(count: int, mesh: Mesh | None) -> tuple[int, int, int]:
  """Which of `count` tasks this process reads: (the first, how many, up to how many it fills up).

  Tasks are split over the axis "tasks" in order, the same number for every device.

  >>> share_of_tasks(7, None)
  (0, 7, 7)
  """
  if mesh is None:
    return 0, count, count
  devices = mesh.devices.reshape(mesh.devices.shape[0], -1)[:, 0]
  mine = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
  if not mine or mine != list(range(mine[0], mine[-1] + 1)):
    raise ValueError(
      f"Process {jax.process_index()} has the places {mine} of the mesh's axis of tasks; it needs "
      "one or more, side by side. Build the mesh by sm.task_mesh()."
    )
  each = -(-count // len(devices))
  first, share = mine[0] * each, len(mine) * each
  return first, min(share, max(0, count - first)), share


def place_tasks(
  tasks: Task, mesh: Mesh | None, share: int | None = None, count: int | None = None
) -> Task:
  """Tasks of this process as part of one array over all devices of the mesh.

  Args:
    tasks: those that `share_of_tasks` names, leaves lead with their number.
    share: number to fill up to, with tasks without examples; None: there are enough.
    count: how many of `tasks` count, None for all: 0 where a process has only a pattern to fill
      up with.
  """
  total = num_tasks(tasks)
  count = total if count is None else count
  # All processes run one program: where one fills up, all have masks.
  if (share or total) > count or jax.process_count() > 1:
    tasks = fill_tasks(tasks, count, share or total)
  if mesh is None:
    return tasks
  spec = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
  if jax.process_count() == 1:
    return jax.device_put(tasks, spec)
  local = lambda x: jax.make_array_from_process_local_data(spec, np.asarray(x))
  return jax.tree.map(local, tasks)


def fill_tasks(tasks: Task, count: int, total: int) -> Task:
  """The first `count` tasks, followed by copies of the last whose masks are 0: `total` in all."""
  index = np.minimum(np.arange(total), num_tasks(tasks) - 1)
  real = (np.arange(total) < count)[:, None]

  def fill(batch: Batch) -> Batch:
    mask = jax.vmap(weights)(batch)
    batch = jax.tree.map(lambda x: x[index], batch)
    return batch._replace(mask=mask[index] * real)

  return jax.tree.map(fill, tasks, is_leaf=lambda x: isinstance(x, Batch))
