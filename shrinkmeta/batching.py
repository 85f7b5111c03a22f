"""How a function of one task runs over T of them: at once, in sequence, over devices.

On a CPU `vmap` turns convolutions with a kernel per task into grouped ones, which XLA runs slowly:
"sequential" over a mesh with one host device per core is the fast way there. On an accelerator
"vmap" is.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

PyTree = Any
Batching = Literal["vmap", "sequential"]


def num_tasks(tasks: PyTree) -> int:
  """T, the leading axis of every leaf."""
  return jax.tree.leaves(tasks)[0].shape[0]


def over_tasks(
  f: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
  shared: PyTree,
  tasks: PyTree,
  batching: Batching = "vmap",
  mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree]:
  """Runs f(shared, task) -> (a, b) on every task; returns the sum of the a, and the b stacked [T].

  Args:
    f: one task, leaves without the T axis. Arrays come in through `shared`, not by closure, so
      that a mesh can hand every device its copy.
    shared: the same for all tasks.
    tasks: leaves lead with [T].
    batching: "vmap", all at once; "sequential", one after another, the sum carried along, so that
      memory holds one task's a. Either way within each device of the mesh.
    mesh: tasks are split over the devices of this one-axis mesh; None uses one device. The only
      communication is one sum of a.
  """
  if batching not in ("vmap", "sequential"):
    raise ValueError(f'batching must be "vmap" or "sequential"; got {batching!r}.')

  def local(shared: PyTree, tasks: PyTree) -> tuple[PyTree, PyTree]:
    if batching == "vmap":
      a, b = jax.vmap(f, in_axes=(None, 0))(shared, tasks)
      return jax.tree.map(lambda x: jnp.sum(x, 0), a), b
    first = jax.tree.map(lambda x: x[0], tasks)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, shared, first)[0])

    def step(total: PyTree, task: PyTree) -> tuple[PyTree, PyTree]:
      a, b = f(shared, task)
      return jax.tree.map(jnp.add, total, a), b

    return jax.lax.scan(step, zero, tasks)

  if mesh is None:
    return local(shared, tasks)
  if len(mesh.axis_names) != 1:
    raise ValueError(f"mesh must have one axis, over which tasks are split; got {mesh.axis_names}.")
  if num_tasks(tasks) % mesh.size:
    raise ValueError(
      f"{num_tasks(tasks)} tasks do not split over the {mesh.size} devices of the mesh; use a "
      "multiple of the number of devices, or a smaller mesh."
    )
  axis = mesh.axis_names[0]

  def shard(shared: PyTree, tasks: PyTree) -> tuple[PyTree, PyTree]:
    a, b = local(shared, tasks)
    flat, unravel = ravel_pytree(a)
    return unravel(jax.lax.psum(flat, axis)), b  # one vector, so one all-reduce

  split, whole = PartitionSpec(axis), PartitionSpec()
  run = jax.shard_map(
    shard, mesh=mesh, in_specs=(whole, split), out_specs=(whole, split), check_vma=False
  )
  return run(shared, tasks)
