"""What the tasks of a meta-step add up to.

Of every task the gradient and the losses, of sound tasks only: a task whose loss or gradient is not
finite, or that has no example, adds nothing and is counted. Sums add up: of the devices of a mesh,
of the blocks on a device, and, leaf by leaf, of micro-batches of tasks, where all tasks of a
meta-step do not fit at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta.curvature.solvers import SolveInfo
from shrinkmeta.devices.batching import num_tasks, over_tasks, tasks_at_once
from shrinkmeta.gradients.evidence import restriction
from shrinkmeta.gradients.implicit import MetaParams
from shrinkmeta.gradients.joint import joint_sigma_gradient
from shrinkmeta.gradients.per_task import Algorithm, Item, Spec, gradient_of, key_of_loop, moving_of
from shrinkmeta.mode.frozen import Frozen
from shrinkmeta.mode.optimise import InnerInfo
from shrinkmeta.mode.task_model import run_loops
from shrinkmeta.mode.warm_start import WarmStart
from shrinkmeta.model.tasks import Batch, Task, num_examples, weights

PyTree = Any


class Sums(NamedTuple):
  """Sums over the sound ones of T tasks."""

  grad: MetaParams
  loss: jax.Array  # [] of mean validation negative log-likelihoods
  phi_loss: jax.Array  # [] of what phi follows
  judged: jax.Array  # [] examples in phi's loss: of val, of train without one, of both if pooled
  sound: jax.Array  # [] int32, tasks that count
  inner: InnerInfo  # [] each, of the parameters' dtype
  solve: SolveInfo | None  # likewise; None where each task solves no system of its own
  tasks: jax.Array  # [] int32, T


class PerTask(NamedTuple):
  """What is known of each task, leaves [T]."""

  val_nll: jax.Array
  failed: jax.Array  # bool
  inner: InnerInfo
  solve: SolveInfo | None
  warm: WarmStart | None


def in_blocks(spec: Spec) -> bool:
  """Whether tasks leave their block of tasks as soon as their loops have ended."""
  return isinstance(spec.batching, int) and spec.inner.tol is not None


def key_of(key: jax.Array | None, number: jax.Array) -> jax.Array | None:
  """The key of one task."""
  return None if key is None else jax.random.fold_in(key, number)


def run_first(
  spec: Spec,
  frozen: Frozen,
  steps: Any,
  of_loop: Callable[[Any], Any],
  shared: tuple[MetaParams, Any],
  items: Item,
) -> Item:
  """The inner loops of tasks in blocks, each leaving its block when it has converged.

  Args:
    of_loop: a task's key -> what its loop draws with.
  """
  params, key = shared
  slots = tasks_at_once(spec.batching, shared, num_tasks(items))
  if slots in (1, num_tasks(items)):
    return items  # none waits for a place
  own = lambda number: of_loop(key_of(key, number))
  keys = None if key is None else jax.vmap(own)(items.number)
  starts = None if items.start is None else items.start.z
  train, model = items.task.train, moving_of(spec, params, frozen)
  return items._replace(end=run_loops(spec.inner, model, train, keys, starts, steps, slots))


def sums_over_tasks(
  spec: Spec,
  params: MetaParams,
  frozen: Frozen,
  tasks: Task,
  key: jax.Array | None,
  warm: WarmStart | None,
  first: jax.typing.ArrayLike = 0,
) -> tuple[Sums, PerTask]:
  """Runs the row's function on every task, by the learner's batching and mesh.

  Args:
    frozen: modules that need no work.
    first: the number of the first of these tasks among those of the meta-step.
  """
  row, of_task = spec.algorithm, gradient_of(spec)
  follows_objective = row.phi in ("map", "evidence") and row.sigma == "learned"
  dtype = jnp.result_type(jax.tree.leaves(params.phi)[0])

  def one(shared: tuple[MetaParams, Any], item: Item) -> tuple[Any, Any]:
    params, key = shared
    result = of_task(spec, params, item, key_of(key, item.number), frozen)
    counts = jnp.stack([num_examples(part, dtype) for part in item.task if part is not None])
    judged = (result.grad, result.val_nll) if item.task.val is not None else result.grad
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((judged, result.ends))]
    # A gradient may be finite where its objective is not, as with a label out of range.
    inner_info = result.inner
    finite.append(jnp.isfinite(inner_info.objective) | (inner_info.steps == 0))
    if follows_objective:
      finite.append(jnp.isfinite(result.phi_loss))
    ok = jnp.all(jnp.stack(finite)) & jnp.all(counts > 0)
    numbers = jax.tree.map(lambda x: x.astype(dtype), (result.inner, result.solve))
    examples = jnp.sum(counts) if row.phi == "pooled" else counts[-1]
    kept = (result.grad, result.val_nll, result.phi_loss, examples, jnp.ones([], jnp.int32))
    # A task that failed begins anew, and has no part in a joint solve.
    again = (result.warm, result.ends)
    kept, (warm, ends) = jax.tree.map(
      lambda x: jnp.where(ok, x, jnp.zeros_like(x)), ((*kept, *numbers), again)
    )
    return kept, (result.val_nll, ~ok, result.inner, result.solve, warm, ends)

  count = num_tasks(tasks)
  items = Item(jnp.asarray(first) + jnp.arange(count), tasks, warm, None)
  has_mode = row.gradient == "implicit"
  of_loop = functools.partial(key_of_loop, spec)
  queued = has_mode and in_blocks(spec)
  loops = functools.partial(run_first, spec, frozen, None, of_loop) if queued else None
  added, (val_nll, failed, inner_info, solve, warm, ends) = over_tasks(
    one, (params, key), items, spec.batching, spec.mesh, loops
  )
  sums = Sums(*added, tasks=jnp.full([], count, jnp.int32))
  if ends is not None:
    sound = _emptied(tasks.train, failed)
    d_sigma, info = joint_sigma_gradient(
      spec.implicit,
      spec.likelihood,
      spec.labels,
      params,
      sound,
      ends.z,
      ends.g,
      frozen=frozen,
      log_p_phi=spec.log_p_phi,
    )
    sums = sums._replace(grad=sums.grad._replace(log_sigma2=d_sigma))
    solve = jax.tree.map(lambda x: jnp.broadcast_to(x, val_nll.shape), info)
  if spec.restricted:
    sums = _restricted(spec, params, frozen, _emptied(tasks.train, failed), sums)
  return sums, PerTask(val_nll, failed, inner_info, solve, warm)


def sees_all_tasks(spec: Spec) -> bool:
  """Whether a term joins the tasks of a meta-step, so that they cannot come in micro-batches."""
  return spec.sigma_gradient == "joint" or bool(spec.restricted)


def needs_validation(row: Algorithm) -> bool:
  """Reptile and the evidence look at no validation example."""
  return row.phi != "evidence" and (row.phi, row.gradient) != ("map", "none")


def _restricted(spec: Spec, params: MetaParams, frozen: Frozen, batches: Batch, sums: Sums) -> Sums:
  """The sums with REML's term, of all tasks together."""
  term = lambda params: (
    -restriction(
      spec.likelihood,
      spec.labels,
      params.phi,
      params.log_sigma2,
      batches,
      spec.restricted,
      frozen,
    )
  )
  value, slope = jax.value_and_grad(term)(params)
  # Not finite where the tasks together leave an integrated entry of phi open: no step then.
  finite = [jnp.all(jnp.isfinite(x)) for x in (value, *jax.tree.leaves(slope))]
  determined = jnp.all(jnp.stack(finite))
  grad = jax.tree.map(
    lambda a, b: jnp.where(determined, a + b, jnp.zeros_like(a)), sums.grad, slope
  )
  sound = jnp.where(determined, sums.sound, 0)
  return sums._replace(grad=grad, phi_loss=sums.phi_loss + value, sound=sound)


def _emptied(batches: Batch, failed: jax.Array) -> Batch:
  """The batches [T, ...] without examples in tasks that failed [T].

  They hold those of a sound task, masked: a network need not have a derivative at inputs of 0.
  """
  of_task = lambda x: failed.reshape(-1, *[1] * (x.ndim - 1))
  sound = jnp.argmin(failed)
  mask = jax.vmap(weights)(batches)
  batches = jax.tree.map(lambda x: jnp.where(of_task(x), x[sound], x), batches)
  return batches._replace(mask=jnp.where(of_task(mask), jnp.zeros_like(mask), mask))
