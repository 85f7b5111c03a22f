"""Sum the gradients and losses of the tasks of an update.

A task fails if its loss or the norm of its gradient is not finite, or if it has no example. A
failed task adds nothing to the sums; the metrics count it. The sums run over the tasks of a block,
the blocks of a device and the devices of a mesh. If a meta-batch does not fit into memory at once,
add the Sums of its micro-batches leaf by leaf.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from shrinkmeta.base import InnerInfo, MetaParams, PerTask, Sums, WarmStart
from shrinkmeta.config import Frozen, Spec
from shrinkmeta.curvature.closed_over import Consts, open_likelihood
from shrinkmeta.devices.batching import leading, map_tasks, tasks_at_once
from shrinkmeta.gradients.implicit import differentiable_mode
from shrinkmeta.gradients.joint import joint_sigma_gradient
from shrinkmeta.gradients.per_task import (
  Item,
  TaskResult,
  clipped,
  gradient_of,
  key_of_loop,
  norm_of,
)
from shrinkmeta.gradients.restriction import restriction_of
from shrinkmeta.mode.optimise import Descent, Steps, posterior_mode
from shrinkmeta.mode.slots import run_loops
from shrinkmeta.mode.task_model import TaskModel, task_model
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, Task, num_examples, weights
from shrinkmeta.model.variants import deterministic, with_constants

PyTree = Any


class Shared(NamedTuple):
  """What all tasks of an update share."""

  params: MetaParams
  key: jax.Array | None  # of the update
  constants: PyTree  # what `predict` takes as its third argument, or None


def network_of(spec: Spec, shared: Shared) -> Likelihood:
  """Return the likelihood with the constants filled in, as a function of (theta, inputs).

  If the algorithm needs a posterior mode, a network of `sm.with_randomness` runs without its key.
  """
  likelihood = deterministic(spec.likelihood) if spec.has_mode else spec.likelihood
  return likelihood if shared.constants is None else with_constants(likelihood, shared.constants)


def model_of(spec: Spec, shared: Shared, batch: Batch, frozen: Frozen) -> TaskModel:
  """Return the task model of one task, given a learner's spec and the task's training data."""
  likelihood, prior = network_of(spec, shared), spec.algorithm.prior
  return task_model(likelihood, spec.labels, shared.params, batch, frozen, spec.free, prior)


def in_blocks(spec: Spec) -> bool:
  """Return whether tasks run in blocks in which a waiting task replaces one that has converged."""
  return isinstance(spec.batching, int) and spec.inner.tol is not None


def key_of(key: jax.Array | None, number: jax.Array) -> jax.Array | None:
  """Return the key of the task at position `number` of the meta-batch, or None."""
  return None if key is None else jax.random.fold_in(key, number)


def theta_hat(
  spec: Spec,
  frozen: Frozen,
  shared: Shared,
  batch: Batch,
  steps: Steps,
  end: Descent | None = None,
) -> tuple[PyTree, InnerInfo]:
  """Return (theta_hat, info) of one task, differentiable as documented in `learner.adapt`.

  Args:
    spec: the spec of the learner.
    frozen: modules that stay at phi.
    shared: the parameters, the constants, and the key of this task.
    batch: the task's training data.
    steps: replaces inner.steps.
    end: the last state of the task's loop, if it was run before.
  """
  if not spec.has_mode or isinstance(steps, tuple):
    model = model_of(spec, shared, batch, frozen)
    mode = posterior_mode(spec.inner, model, key=shared.key, steps=steps, end=end)
    return mode.theta, mode.info
  consts, rebuild = open_likelihood(network_of(spec, shared), shared.params.phi, batch)

  def make(params: MetaParams, batch: Batch, consts: Consts) -> TaskModel:
    model = model_of(spec, Shared(params, None, None), batch, frozen)
    return dataclasses.replace(model, likelihood=rebuild(consts))

  given = (shared.params, batch, consts, steps, shared.key, end)
  return differentiable_mode(spec.inner, spec.implicit, make, *given)


def run_first(
  spec: Spec,
  frozen: Frozen,
  steps: Any,
  of_loop: Callable[[Any], Any],
  shared: Shared,
  items: Item,
) -> Item:
  """Run the inner loops of T tasks in slots; a waiting task takes the slot of a converged one.

  Args:
    spec: the spec of the learner.
    frozen: modules that stay at phi.
    steps: replaces inner.steps.
    of_loop: the key of a task -> the key of its inner loop.
    shared: the parameters, the key of the update and the constants.
    items: leaves [T, ...].

  Returns:
    the items, with the last state of each loop as `end`. If there is one slot, or one for every
    task, the items are unchanged: their loops then run later.
  """
  params, key, _ = shared
  slots = tasks_at_once(spec.batching, shared, leading(items))
  if slots in (1, leading(items)):
    return items  # a queue of tasks would save no steps
  own = lambda number: of_loop(key_of(key, number))
  keys = None if key is None else jax.vmap(own)(items.number)
  starts = None if items.start is None else items.start.z
  batches = items.task.train
  if spec.has_mode:  # the implicit rule needs the modes, not the path to them
    params, batches, starts = jax.lax.stop_gradient((params, batches, starts))
  make = lambda batch: model_of(spec, shared._replace(params=params), batch, frozen)
  return items._replace(end=run_loops(spec.inner, make, batches, keys, starts, steps, slots))


def sums_over_tasks(
  spec: Spec,
  shared: Shared,
  frozen: Frozen,
  tasks: Task,
  warm: WarmStart | None,
  first: jax.typing.ArrayLike = 0,
) -> tuple[Sums, PerTask]:
  """Compute the meta-gradient of every task, and sum them with the learner's batching and mesh.

  Args:
    spec: the spec of the learner.
    shared: the parameters, the key of the update and the constants.
    frozen: modules that stay at phi.
    tasks: leaves [T, N, ...].
    warm: where the inner loops and solves begin, leaves [T, ...], or None.
    first: the position [] of the first of these tasks in the meta-batch.
  """

  def one(shared: Shared, item: Item) -> tuple[Any, Any]:
    own = key_of(shared.key, item.number)
    model = model_of(spec, shared, item.task.train, frozen)
    result = gradient_of(spec)(spec, model, item, own)
    norm = norm_of(spec, result.grad)
    if spec.clip is not None:
      result = result._replace(grad=clipped(result.grad, norm, spec.clip))
    return _if_sound(spec, result, norm, item.task, model)

  queued = spec.has_mode and in_blocks(spec)
  of_loop = functools.partial(key_of_loop, spec)
  loops = functools.partial(run_first, spec, frozen, None, of_loop) if queued else None
  count = leading(tasks)
  items = Item(jnp.asarray(first) + jnp.arange(count), tasks, warm, None)
  added, (val_nll, norm, failed, inner_info, solve, warm, ends) = map_tasks(
    one, shared, items, spec.batching, spec.mesh, loops
  )
  sums = Sums(*added, tasks=jnp.full([], count, jnp.int32))
  sums = sums._replace(sound=sums.sound.astype(jnp.int32))
  if ends is not None or spec.restricted:
    batches = _emptied(tasks.train, failed)
    params = shared.params
    make = lambda params, batch: model_of(spec, shared._replace(params=params), batch, frozen)
    if ends is not None:
      model = make(params, jax.tree.map(lambda x: x[0], batches))
      d_sigma, info = joint_sigma_gradient(
        spec.implicit, model, batches, ends.z, ends.g, log_p_phi=spec.log_p_phi
      )
      sums = sums._replace(grad=sums.grad._replace(log_sigma2=d_sigma))
      solve = jax.tree.map(lambda x: jnp.broadcast_to(x, val_nll.shape), info)
    if spec.restricted:
      sums = _restricted(spec.restricted, make, params, batches, sums)
  return sums, PerTask(val_nll, norm, failed, inner_info, solve, warm)


def _if_sound(
  spec: Spec, result: TaskResult, norm: jax.Array, task: Task, model: TaskModel
) -> tuple[Any, Any]:
  """Return (the terms of a task in the sums, 0 if the task failed; the report of the task)."""
  algorithm = spec.algorithm
  follows_objective = algorithm.phi in ("map", "evidence") and algorithm.sigma == "learned"
  dtype, counts = model.n.dtype, model.count[None]
  if task.val is not None:
    counts = jnp.stack([model.count, num_examples(task.val, dtype)])
  # The norm is not finite if an entry of the gradient is not: see `norm_of`.
  judged = (norm, result.val_nll) if task.val is not None else norm
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((judged, result.ends))]
  # The gradient can be finite although the objective is not, as for a label out of range. Without
  # Inner.tol, a loop that reports only on its steps has no objective after 0 steps.
  inner_info = result.inner
  measured = spec.has_mode or algorithm.phi == "pooled" or spec.inner.tol is not None
  finite.append(jnp.isfinite(inner_info.objective) | ((inner_info.steps == 0) & (not measured)))
  if follows_objective:
    finite.append(jnp.isfinite(result.phi_loss))
  ok = jnp.all(jnp.stack(finite)) & jnp.all(counts > 0)
  # At least 32 bits, because a running sum of ones in bfloat16 stops at 256.
  wide = lambda x, dtype: x.astype(jnp.promote_types(dtype, jnp.float32))
  numbers = jax.tree.map(lambda x: wide(x, dtype), (result.inner, result.solve))
  examples = jnp.sum(counts) if algorithm.phi == "pooled" else counts[-1]
  # A float, exact below 2^24 tasks: devices send one message for each dtype.
  one = jnp.ones([], dtype)
  terms = (result.grad, result.val_nll, result.phi_loss, examples, one)
  kept = jax.tree.map(lambda x: wide(x, x.dtype), terms)
  # A failed task begins at 0 in its next update, and does not enter a joint solve.
  again = (result.warm, result.ends)
  kept, (warm, ends) = jax.tree.map(
    lambda x: jnp.where(ok, x, jnp.zeros_like(x)), ((*kept, *numbers), again)
  )
  return kept, (result.val_nll, norm, ~ok, result.inner, result.solve, warm, ends)


def _restricted(
  integrated: tuple[str, ...],
  make: Callable[[MetaParams, Batch], TaskModel],
  params: MetaParams,
  batches: Batch,
  sums: Sums,
) -> Sums:
  """Add REML's term to the sums; it depends on all tasks together.

  If the tasks together do not determine an integrated entry of phi, the term is not finite. Then
  the gradient is NaN, and `apply` takes no step.
  """
  term = lambda params: -restriction_of(functools.partial(make, params), batches, integrated)
  value, slope = jax.value_and_grad(term)(params)
  grad = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(value), a + b, jnp.nan), sums.grad, slope)
  return sums._replace(grad=grad, phi_loss=sums.phi_loss + value)


def _emptied(batches: Batch, failed: jax.Array) -> Batch:
  """Return the batches, leaves [T, N, ...], with all examples masked in tasks that failed [T].

  The masked examples are those of a task that did not fail. Inputs of 0 would not do: a network may
  have no derivative there.
  """
  of_task = lambda x: failed.reshape(-1, *[1] * (x.ndim - 1))
  sound = jnp.argmin(failed)
  mask = jax.vmap(weights)(batches)
  batches = jax.tree.map(lambda x: jnp.where(of_task(x), x[sound], x), batches)
  return batches._replace(mask=jnp.where(of_task(mask), jnp.zeros_like(mask), mask))
