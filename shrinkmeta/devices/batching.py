"""How a function of one task runs over T of them: at once, in sequence, in blocks, over devices.

On a CPU `vmap` of a network works through T copies of every activation, which no cache holds, and
turns XLA's convolution with a kernel per task into a grouped one, several times slower; a task at a
time, over a mesh with one host device a core, is the fast way there. For small parameters the cost
is that of starting operations, and `vmap` starts them once. On an accelerator `vmap` is the way.
Figures: `experiments/benchmarks`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

PyTree = Any
Batching = Literal["auto", "vmap", "sequential"] | int
TaskFunction = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

# "auto" on a CPU: with more shared numbers than this one task after another, else all at once. Put
# between a small MLP and a small convolutional net; not the outcome of a sweep.
_SMALL = 4_096


def num_tasks(tasks: PyTree) -> int:
  """T, the leading axis of every leaf."""
  return jax.tree.leaves(tasks)[0].shape[0]


def check_batching(batching: Batching) -> None:
  """Raises ValueError unless `batching` is one of the names or a positive number of tasks."""
  count = isinstance(batching, int) and not isinstance(batching, bool) and batching > 0
  if not count and batching not in ("auto", "vmap", "sequential"):
    raise ValueError(
      'batching must be "auto", "vmap", "sequential" or a positive number of tasks at once; got '
      f"{batching!r}."
    )


def over_tasks(
  f: TaskFunction,
  shared: PyTree,
  tasks: PyTree,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
  first: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
  """Runs f(shared, task) -> (a, b) on every task; returns the sum of the a, and the b stacked [T].

  Args:
    f: one task, leaves without the T axis. Arrays come in through `shared`, not by closure, so
      that a mesh can hand every device its copy.
    shared: the same for all tasks.
    tasks: leaves lead with [T].
    batching: within each device of the mesh, "vmap", all at once; "sequential", one after another,
      the sum carried along, so that memory holds one task's a; an int, blocks of so many at once,
      one block after another; "auto", by backend: see the head of this file.
    mesh: tasks are split over its first axis; None uses one device. The only communication is one
      sum of a. A number of tasks that the axis does not divide is filled up with copies of the
      first, which count 0 and whose b is dropped. A second axis is XLA's: see `placement.py`.
    first: (shared, tasks) -> tasks, applied on each device to all the tasks it has, before f.
  """
  check_batching(batching)
  run = lambda shared, tasks: _local(f, shared, first(shared, tasks) if first else tasks, batching)
  if mesh is None:
    return run(shared, tasks)
  if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
    raise ValueError(
      f"The axes of mesh must be of type Auto; got {mesh.axis_types}: take sm.task_mesh()."
    )
  axis, count = mesh.axis_names[0], num_tasks(tasks)
  if missing := -count % mesh.shape[axis]:
    a, b = _filled(f, shared, tasks, batching, mesh, first, missing)
    return a, jax.tree.map(lambda x: x[:count], b)

  def shard(shared: PyTree, tasks: PyTree) -> tuple[PyTree, PyTree]:
    a, b = run(shared, tasks)
    if len(mesh.axis_names) > 1:
      return jax.lax.psum(a, axis), b  # leaf by leaf, as leaves are cut along other axes
    flat, unravel = ravel_pytree(_widened(a))
    return _narrowed(unravel(jax.lax.psum(flat, axis)), a), b  # one vector, so one all-reduce

  split, whole = PartitionSpec(axis), PartitionSpec()
  return jax.shard_map(
    shard,
    mesh=mesh,
    in_specs=(whole, split),
    out_specs=(whole, split),
    axis_names={axis},
    check_vma=False,
  )(shared, tasks)


def _filled(
  f: TaskFunction,
  shared: PyTree,
  tasks: PyTree,
  batching: Batching,
  mesh: Mesh,
  first: Callable[[PyTree, PyTree], PyTree] | None,
  missing: int,
) -> tuple[PyTree, PyTree]:
  """`over_tasks` with `missing` more tasks, of no account, at the end."""
  count = num_tasks(tasks)
  fill = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
  real = jnp.arange(count + missing) < count

  def counted(shared: PyTree, item: PyTree) -> tuple[PyTree, PyTree]:
    task, is_real = item
    a, b = f(shared, task)
    return jax.tree.map(lambda x: jnp.where(is_real, x, jnp.zeros_like(x)), a), b

  before = None if first is None else lambda shared, items: (first(shared, items[0]), items[1])
  items = (jax.tree.map(fill, tasks), real)
  return over_tasks(counted, shared, items, batching, mesh, before)


def tasks_at_once(batching: Batching, shared: PyTree, count: int) -> int:
  """How many of `count` tasks run at once on one device."""
  if batching == "auto":
    size = sum(np.size(x) for x in jax.tree.leaves(shared))
    one_by_one = jax.default_backend() == "cpu" and size > _SMALL
    batching = "sequential" if one_by_one else "vmap"
  if isinstance(batching, int):
    return min(batching, count)
  return count if batching == "vmap" else 1


def _widened(tree: PyTree) -> PyTree:
  """Floats of 16 bits as ones of 32: a running sum of ones would end at 256 in bfloat16."""

  def wide(x: jax.typing.ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x

  return jax.tree.map(wide, tree)


def _narrowed(tree: PyTree, like: PyTree) -> PyTree:
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _local(
  f: TaskFunction, shared: PyTree, tasks: PyTree, batching: Batching
) -> tuple[PyTree, PyTree]:
  count = num_tasks(tasks)
  size = tasks_at_once(batching, shared, count)

  def block(tasks: PyTree) -> tuple[PyTree, PyTree]:
    a, b = jax.vmap(f, in_axes=(None, 0))(shared, tasks)
    return jax.tree.map(lambda x: jnp.sum(x, 0), a), b

  if size == count:
    return block(tasks)
  if size == 1:
    block = lambda tasks: f(shared, tasks)
  whole = count // size * size
  fold = lambda x: x[:whole] if size == 1 else x[:whole].reshape(-1, size, *x.shape[1:])
  blocks = jax.tree.map(fold, tasks)
  shapes = jax.eval_shape(block, jax.tree.map(lambda x: x[0], blocks))[0]
  zero = _widened(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

  def step(total: PyTree, tasks: PyTree) -> tuple[PyTree, PyTree]:
    a, b = block(tasks)
    return jax.tree.map(jnp.add, total, _widened(a)), b

  total, b = jax.lax.scan(step, zero, blocks)
  if size > 1:
    b = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), b)
  if whole < count:
    a, rest = block(jax.tree.map(lambda x: x[whole:], tasks))
    total = jax.tree.map(jnp.add, total, _widened(a))
    b = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), b, rest)
  return _narrowed(total, shapes), b
