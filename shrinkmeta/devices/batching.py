"""Run a function of one task on T tasks: at once, in sequence, in blocks, or over devices.

On an accelerator `vmap` over the tasks is fastest. On a CPU it is fastest only for networks with
few parameters: most of the time then goes into starting operations, and `vmap` starts each
operation once for all tasks.

For a larger network on a CPU, run one task at a time on each device of a mesh, with one host device
per core. `vmap` is slower there for two reasons. It needs T copies of every activation, which do
not fit in a cache. And it turns a convolution with a kernel for each task into XLA's grouped
convolution, which is several times slower (docs/hazards.md#grouped-convolutions).
`experiments/benchmarks` measures these cases.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import shown

PyTree = Any
Batching = Literal["auto", "vmap", "sequential"] | int
TaskFunction = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]

# With batching="auto" on a CPU, tasks run in sequence if `shared` has more numbers than this. The
# limit lies between a small MLP and a small convolutional network. The best limit is not measured.
_SMALL = 4_096


def num_tasks(tasks: PyTree) -> int:
  """Return the number T of tasks, after a check of the leaves.

  Args:
    tasks: a pytree with leaves [T, ...], such as a `Task`. They may be traced.

  Returns:
    T, an int.

  Raises:
    TypeError: if a leaf is not an array.
    ValueError: if there are no leaves, a leaf has no axis, or T differs between leaves.

  >>> num_tasks({"inputs": jnp.ones([5, 3, 2]), "targets": jnp.ones([5, 3])})
  5
  """
  leaves = validate.leaves_with_names(tasks, "tasks")
  if not leaves:
    raise ValueError(f"tasks has no arrays; got {shown(tasks)}. Its leaves must be [T, ...].")
  for name, leaf in leaves:
    validate.array(name, leaf, "an array [T, ...]", numbers=False)
    if jnp.shape(leaf)[:1] != jnp.shape(leaves[0][1])[:1] or not jnp.ndim(leaf):
      raise ValueError(
        f"All leaves of tasks must lead with the same axis T: {leaves[0][0]} has shape "
        f"{jnp.shape(leaves[0][1])}, {name} has shape {jnp.shape(leaf)}."
      )
  return leaves[0][1].shape[0]


def leading(tasks: PyTree) -> int:
  """Return the number T of tasks without the check of `num_tasks`; the leaves are [T, ...]."""
  return jax.tree.leaves(tasks)[0].shape[0]


def check_batching(batching: Batching) -> None:
  """Raise an error unless `batching` is a setting that `over_tasks` knows.

  Args:
    batching: the value of the argument.

  Raises:
    TypeError: if `batching` is neither a string nor an integer.
    ValueError: if `batching` is an unknown string, or an integer that is not positive.

  >>> check_batching(0)
  Traceback (most recent call last):
  ValueError: batching must be "auto", "vmap", "sequential" or a positive number of tasks at once; \
got 0.
  """
  message = (
    'batching must be "auto", "vmap", "sequential" or a positive number of tasks at once; got '
    f"{shown(batching)}."
  )
  if isinstance(batching, bool) or not isinstance(batching, (str, int)):
    raise TypeError(message)
  if batching not in ("auto", "vmap", "sequential") if isinstance(batching, str) else batching < 1:
    raise ValueError(message)


def check_mesh(mesh: Mesh | None) -> None:
  """Raise an error unless `mesh` is None or a Mesh with axes of type Auto.

  Args:
    mesh: the value of the argument. None means one device.

  Raises:
    TypeError: if `mesh` is neither a Mesh nor None.
    ValueError: if an axis of the mesh is not of type Auto.

  >>> check_mesh(jax.devices())
  Traceback (most recent call last):
  TypeError: mesh must be a jax.sharding.Mesh or None; got a list of 1 items. Build it by \
sm.task_mesh().
  """
  wanted = "a jax.sharding.Mesh or None"
  validate.instance("mesh", mesh, (Mesh, type(None)), wanted, "Build it by sm.task_mesh().")
  if mesh is not None and any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
    raise ValueError(
      f"The axes of mesh must be of type Auto; got {mesh.axis_types}. Build it by sm.task_mesh()."
    )


def check_automatic(trees: Mapping[str, PyTree]) -> None:
  """Raise ValueError if an array is split over mesh axes of type Explicit, where XLA adds nothing.

  Args:
    trees: {name for the error message: pytree of arrays}.
  """
  for name, leaf in validate.leaves_with_names(trees):
    sharding = jax.typeof(leaf).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    if explicit and any(axes is not None for axes in sharding.spec):
      raise ValueError(
        f"{name} is split over explicit axes of a mesh, {sharding.spec}. Place it on "
        "sm.task_mesh(), or on a mesh whose axis_types are Auto."
      )


def over_tasks(
  f: TaskFunction,
  shared: PyTree,
  tasks: PyTree,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
  first: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
  """Run f(shared, task) -> (a_t, b_t) on every task t, sum the a_t, and stack the b_t.

      sum_t a_t,  [b_1, ..., b_T]

  On a mesh with one axis, the only communication is one sum of the a_t over the devices, of each of
  their dtypes.

  Args:
    f: (shared, task) -> (a_t, b_t). The leaves of the task have no axis T. f must get arrays
      through `shared` and not by closure, so that each device of the mesh has its own copy.
    shared: a pytree of arrays [...] that all tasks share.
    tasks: a pytree with leaves [T, ...].
    batching: how one device runs its tasks. "vmap": all at once. "sequential": one after another,
      with a running sum, so that memory holds one a_t. An integer: blocks of that many tasks, one
      block after another. "auto": "sequential" for large networks on a CPU, otherwise "vmap".
    mesh: the devices, or None for one device. Tasks are split over the first axis. If the size of
      this axis does not divide T, copies of the first task are appended. The a_t of a copy counts
      as 0, and its b_t is dropped. Arrays that `place_state` cut along a second axis stay cut, and
      XLA adds the communication that they need.
    first: (shared, tasks) -> tasks. Each device applies it to all its tasks before f. None leaves
      the tasks as they are.

  Returns:
    (the sum of the a_t, the b_t with leaves [T, ...]). A sum has the dtype of `jnp.sum`: a sum of
    bools counts them.

  Raises:
    TypeError: if an argument is of another type.
    ValueError: if `batching` is unknown, T differs between leaves, or an axis of the mesh, or one
      over which an array is split, is not of type Auto.

  >>> total, each = over_tasks(lambda scale, x: (x, scale * x), 2.0, jnp.array([1.0, 2.0]))
  >>> float(total), each
  (3.0, Array([2., 4.], dtype=float32))
  """
  validate.function("f", f, "(shared, task) -> (a, b)")
  if first is not None:
    validate.function("first", first, "(shared, tasks) -> tasks")
  check_batching(batching)
  check_mesh(mesh)
  for name, leaf in validate.leaves_with_names(shared, "shared"):
    validate.array(name, leaf, "an array")
  num_tasks(tasks)
  return map_tasks(f, shared, tasks, batching, mesh, first)


def map_tasks(
  f: TaskFunction,
  shared: PyTree,
  tasks: PyTree,
  batching: Batching,
  mesh: Mesh | None,
  first: Callable[[PyTree, PyTree], PyTree] | None,
) -> tuple[PyTree, PyTree]:
  """Do what `over_tasks` does, with its check of how arrays are split alone."""
  check_automatic({"shared": shared, "tasks": tasks})
  run = lambda shared, tasks: _local(f, shared, first(shared, tasks) if first else tasks, batching)
  if mesh is None:
    return run(shared, tasks)
  axis, count = mesh.axis_names[0], leading(tasks)
  if missing := -count % mesh.shape[axis]:
    a, b = _filled(f, shared, tasks, batching, mesh, first, missing)
    return a, jax.tree.map(lambda x: x[:count], b)

  def shard(shared: PyTree, tasks: PyTree) -> tuple[PyTree, PyTree]:
    a, b = run(shared, tasks)
    if len(mesh.axis_names) > 1:
      return jax.lax.psum(a, axis), b  # not as one vector: leaves are cut along the other axis
    return _narrowed(_sum_over(axis, _widened(a)), a), b

  split, whole = PartitionSpec(axis), PartitionSpec()
  sharded = jax.shard_map(
    shard,
    mesh=mesh,
    in_specs=(whole, split),
    out_specs=(whole, split),
    axis_names={axis},
    check_vma=False,
  )
  # Outside jit, JAX refuses a shard_map over some axes of a mesh.
  return (jax.jit(sharded) if len(mesh.axis_names) > 1 else sharded)(shared, tasks)


def _sum_over(axis: str, tree: PyTree) -> PyTree:
  """Sum a tree over the devices of a mesh axis: one vector, and one all-reduce, for each dtype."""
  leaves, structure = jax.tree.flatten(tree)
  for dtype in dict.fromkeys(x.dtype for x in leaves):  # in one order in every process
    own = [i for i, x in enumerate(leaves) if x.dtype == dtype]
    flat, unravel = ravel_pytree([leaves[i] for i in own])
    for i, x in zip(own, unravel(jax.lax.psum(flat, axis)), strict=True):
      leaves[i] = x
  return jax.tree.unflatten(structure, leaves)


def _filled(
  f: TaskFunction,
  shared: PyTree,
  tasks: PyTree,
  batching: Batching,
  mesh: Mesh,
  first: Callable[[PyTree, PyTree], PyTree] | None,
  missing: int,
) -> tuple[PyTree, PyTree]:
  """Do what `map_tasks` does, with `missing` copies of the first task appended.

  Returns:
    (the sum of the a_t, without those of the copies; the b_t with leaves [T + missing, ...]).
  """
  count = leading(tasks)
  fill = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[:1], (missing, *x.shape[1:]))])
  real = jnp.arange(count + missing) < count

  def counted(shared: PyTree, item: PyTree) -> tuple[PyTree, PyTree]:
    task, is_real = item
    a, b = f(shared, task)
    return jax.tree.map(lambda x: jnp.where(is_real, x, jnp.zeros_like(x)), a), b

  before = None if first is None else lambda shared, items: (first(shared, items[0]), items[1])
  items = (jax.tree.map(fill, tasks), real)
  return map_tasks(counted, shared, items, batching, mesh, before)


def tasks_at_once(batching: Batching, shared: PyTree, count: int) -> int:
  """Return how many of `count` tasks run at once on one device: see `over_tasks`."""
  if batching == "auto":
    size = sum(np.size(x) for x in jax.tree.leaves(shared))
    one_by_one = jax.default_backend() == "cpu" and size > _SMALL
    batching = "sequential" if one_by_one else "vmap"
  if isinstance(batching, int):
    return min(batching, count)
  return count if batching == "vmap" else 1


def _widened(tree: PyTree) -> PyTree:
  """Cast floats of 16 bits to 32, because a running sum of ones in bfloat16 stops at 256."""

  def wide(x: jax.typing.ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x

  return jax.tree.map(wide, tree)


def _narrowed(tree: PyTree, like: PyTree) -> PyTree:
  """Cast the leaves of `tree` to the dtypes of `like`."""
  return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def _local(
  f: TaskFunction, shared: PyTree, tasks: PyTree, batching: Batching
) -> tuple[PyTree, PyTree]:
  """Do what `map_tasks` does, on one device and without `first`."""
  count = leading(tasks)
  size = tasks_at_once(batching, shared, count)
  add_up = lambda a, b: (jax.tree.map(lambda x: jnp.sum(x, 0), a), b)
  block = lambda tasks: add_up(*jax.vmap(f, in_axes=(None, 0))(shared, tasks))

  if count == 0 or 1 < size == count:
    return block(tasks)
  if size == 1:
    in_a_sum = lambda x: jnp.sum(jnp.asarray(x)[None], 0)  # its dtype: bools and int8 become int32
    as_sums = lambda a, b: (jax.tree.map(in_a_sum, a), b)
    block = lambda tasks: as_sums(*f(shared, tasks))
  block = jax.jit(block, inline=True)  # traced once, for the shapes and for the loop
  whole = count // size * size
  fold = lambda x: x[:whole] if size == 1 else x[:whole].reshape(-1, size, *x.shape[1:])
  blocks = jax.tree.map(fold, tasks)
  first = lambda blocks: jax.tree.map(lambda x: x[0], blocks)
  shapes = jax.eval_shape(lambda blocks: block(first(blocks)), blocks)[0]
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
