"""Refresh running statistics, such as those of batch norm, from the tasks of a meta-batch.

The statistics are computed at phi and never from the adapted parameters of a task. They are
constants of the network: no gradient with respect to them is taken, and they change only between
updates.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from shrinkmeta.base import MetaState, check_state
from shrinkmeta.checks import validate
from shrinkmeta.checks.kinds import is_key, shown
from shrinkmeta.config import Spec
from shrinkmeta.devices.batching import map_tasks, num_tasks
from shrinkmeta.model.tasks import Batch, Task, divisor, num_examples

PyTree = Any
Statistics = Callable[[PyTree, PyTree, PyTree], PyTree]  # (phi, inputs, constants) -> constants


def refresh(spec: Spec, state: MetaState, tasks: Task, statistics: Statistics) -> MetaState:
  """Return the state with constants that are refreshed from the training inputs of tasks.

      constants <- mean_t statistics(phi, inputs_t, constants)

  The mean is over the tasks of all devices. Tasks without examples and tasks with a result that is
  not finite are left out. If no task remains, the constants stay as they are. All tasks share the
  statistics of the network at phi, so theta_hat is not used.

  Args:
    state: a MetaState of this learner, with constants.
    tasks: T tasks, leaves [T, N, ...]. Padding within a task reaches `statistics`: let the inputs
      say which examples are real, as docs/frameworks.md shows.
    statistics: (phi, inputs [N, ...], constants) -> the new constants of one task. If the constants
      are a dict, it may return only the entries that change, such as {"batch_stats": ...}.

  Returns:
    the MetaState with the new constants, in the dtypes of the old ones.

  Raises:
    TypeError: an argument is of another type.
    ValueError: there are no constants, or `statistics` returns other entries or shapes.

  >>> import shrinkmeta as sm
  >>> centred = lambda theta, x, constants: (x - constants["mean"]) * theta["w"]
  >>> learner = sm.maml(sm.gaussian(centred), {"w": "w"})
  >>> state = learner.init({"w": 1.0}, constants={"mean": jnp.array(0.0)})
  >>> batch = sm.Batch(jnp.full((3, 4), 2.0), jnp.ones((3, 4)))
  >>> half = lambda phi, x, constants: {"mean": 0.5 * constants["mean"] + 0.5 * jnp.mean(x)}
  >>> learner.refresh(state, sm.Task(batch, batch), half).constants["mean"]
  Array(1., dtype=float32)
  """
  check_state("state", state)
  validate.instance("tasks", tasks, Task, "a shrinkmeta.Task(train, val)")
  num_tasks(tasks)  # every leaf leads with them
  validate.function("statistics", statistics, "(phi, inputs [N, ...], constants) -> constants")
  if state.constants is None:
    raise ValueError("state has no constants to refresh: learner.init(params, constants=...).")

  def one(shared: tuple[PyTree, PyTree], batch: Batch) -> tuple[Any, tuple[()]]:
    new = statistics(shared[0], batch.inputs, shared[1])
    _check_alike(new, shared[1])
    leaves = jax.tree.leaves(new)
    ok = num_examples(batch, jnp.float32) > 0
    ok &= jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
    kept = jax.tree.map(lambda x: jnp.where(ok, x, jnp.zeros_like(x)), new)
    return (jax.tree.map(_summable, kept), ok.astype(int)), ()

  shared = jax.lax.stop_gradient((state.phi, state.constants))
  (total, count), _ = map_tasks(one, shared, tasks.train, spec.batching, spec.mesh, None)
  old = _entries(state.constants, total)
  mean = lambda x, c: jnp.where(count > 0, _mean(x, divisor(count), c.dtype), c)
  new = jax.tree.map(mean, total, old)
  partial = isinstance(state.constants, dict)
  return state._replace(constants={**state.constants, **new} if partial else new)


def _summable(x: jax.Array) -> jax.Array:
  """Return what is summed over tasks in the place of x [...], so that the sum loses no digit.

  A float of 16 bits becomes one of 32. Integers become their bytes, int32 [bytes, ...], the lowest
  first: a sum of large integers would overflow, and a float would round them. The mean is exact for
  up to 4 million tasks.
  """
  if jnp.issubdtype(x.dtype, jnp.inexact):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  shifted = [x >> 8 * i for i in range(x.dtype.itemsize)]
  # The last byte has the sign: x is the sum of byte_i 256^i.
  return jnp.stack([*(y & 255 for y in shifted[:-1]), shifted[-1]]).astype(jnp.int32)


def _mean(total: jax.Array, n: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Return the mean over n tasks in a dtype, given their sum as `_summable` writes it.

  Integers are divided byte by byte, as on paper, and rounded to the nearest integer.
  """
  if jnp.issubdtype(dtype, jnp.inexact):
    return (total / n).astype(dtype)
  *lower, top = total.at[0].add(n // 2)
  quotient, rest = jnp.divmod(top, n)
  mean = quotient.astype(dtype)
  for byte in reversed(lower):
    quotient, rest = jnp.divmod(256 * rest + byte, n)
    mean = (mean << 8) + quotient.astype(dtype)
  return mean


def _entries(constants: PyTree, some: PyTree) -> PyTree:
  """The entries of a dict of constants that `some` has; all of any other tree."""
  return {name: constants[name] for name in some} if isinstance(constants, dict) else constants


def _check_alike(new: PyTree, constants: PyTree) -> None:
  """Raise ValueError unless `new` has the structure and shapes of entries of the constants."""
  known = isinstance(constants, dict)
  if known and not (isinstance(new, dict) and new and set(new) <= set(constants)):
    raise ValueError(
      f"statistics must return entries of the constants, {sorted(constants)}; it returned "
      f"{shown(new)}."
    )
  old = _entries(constants, new)
  validate.same_shapes("statistics(phi, inputs, constants)", new, "constants", old)
  for name, leaf in validate.leaves_with_names(new):
    if is_key(leaf):
      raise ValueError(
        f"statistics returned the random key {name!r}, which has no mean over tasks. Return only "
        "the entries of the constants that change, and keep keys in other entries."
      )
