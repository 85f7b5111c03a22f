"""Find theta_hat: minimise the negative log joint of one task with any optax optimiser.

    z_hat = argmin J(z),   theta_hat = phi + s z_hat               (J: task_model.py)

The optimiser sees J / N, the objective per example, so that step sizes do not depend on N.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.base import InnerInfo
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.kinds import shown
from shrinkmeta.config import Inner
from shrinkmeta.curvature.vectors import norm as norm_of
from shrinkmeta.mode.task_model import TaskModel
from shrinkmeta.model.likelihood import masked_log_prob, mean_nll
from shrinkmeta.model.tasks import Batch, num_rows, weights
from shrinkmeta.model.variants import is_random, with_key
from shrinkmeta.quasi_newton import LbfgsState

PyTree = Any

# Inner step i folds i into the task's key for its mini-batch. The draws of a random network, and
# mini-batches after the steps, fold in large numbers of their own (as does per_task.py).
_NETWORK, _AT_END = 2**32 - 4, 2**32 - 1
Steps = int | jax.Array | tuple[int, ...] | None


class Mode(NamedTuple):
  """The mode of one task, and how the inner loop ended."""

  theta: PyTree  # theta_hat, a whole tree
  z: PyTree  # z_hat, a tree with None in the frozen modules
  info: InnerInfo


class Descent(NamedTuple):
  """The state of the inner loop of one task."""

  z: PyTree
  opt_state: optax.OptState
  step: jax.Array  # [] int32, steps made
  done: jax.Array  # [] bool: z meets Inner.tol
  objective: jax.Array  # [] J / N at z or at the start of the last step, nats per example
  grad_norm: jax.Array  # [] norm of grad J / N at the same point; NaN if Inner.tol is None


class Loop(NamedTuple):
  """The inner loop of one task, as pure functions."""

  begin: Callable[[PyTree | None], Descent]  # z to begin from, or None for 0 -> the first state
  step: Callable[[Descent], Descent]  # one inner step
  run: Callable[[Descent, int | jax.Array], Descent]  # runs until that step, or until done
  measures: bool  # whether `run` leaves the objective and the norm of its last z
  info: Callable[[Descent], InnerInfo]  # the report, measured at z on all examples


def posterior_mode(
  inner: Inner,
  model: TaskModel,
  *,
  key: jax.Array | None = None,
  steps: Steps = None,
  start: PyTree | None = None,
  end: Descent | None = None,
  info_at_end: bool = True,
) -> Mode:
  """Find z_hat = argmin J and theta_hat = phi + s z_hat, for one task.

  If every step uses all examples, the outputs of frozen modules are computed once, before the loop.

  Args:
    inner: the optimiser and its steps.
    model: the task model.
    key: draws the mini-batches, and is consumed. It is needed only with inner.batch_size.
    steps: replaces inner.steps. With an int, each number compiles a program, which JAX can
      differentiate backwards if inner.tol is None. With a traced int, one program serves all
      numbers. A tuple of S increasing ints records one run at each of those steps.
    start: z to begin from. None begins from z = 0, where theta = phi.
    end: the last state of this loop, if it was run before. The loop is then not run again.
    info_at_end: False reports the objective and gradient norm that are already known, so this costs
      nothing. Without Inner.tol they are those at the start of the last step.

  Returns:
    the Mode; for a tuple of S steps its leaves are [S, ...].
  """
  steps = inner.steps if steps is None else checked_steps(steps)
  random = key is not None and is_random(model.likelihood)
  fixed_batch = model.frozen and inner.batch_size is None and not random
  task = loop(inner, model.hoisted() if fixed_batch else model, key)

  if isinstance(steps, tuple):
    z, info = _record(inner, task, task.begin(start), steps)
    return Mode(jax.vmap(model.theta)(z), z, info)
  at = task.run(task.begin(start), steps) if end is None else end
  known = not info_at_end or (task.measures and end is None)
  return Mode(model.theta(at.z), at.z, _known_info(inner, at) if known else task.info(at))


def converged(inner: Inner, norm: jax.Array) -> jax.Array:
  """Return whether a loop that ends at this norm of the gradient of J / N counts as converged."""
  return norm <= (inner.tol or 1e-3)


def _known_info(inner: Inner, at: Descent) -> InnerInfo:
  return InnerInfo(at.step, at.objective, at.grad_norm, converged(inner, at.grad_norm))


def _record(
  inner: Inner, task: Loop, begin: Descent, steps: tuple[int, ...]
) -> tuple[PyTree, InnerInfo]:
  """Run the loop once, and return (z, info) at each of the S steps, leaves [S, ...]."""

  def segment(at: Descent, until: jax.Array) -> tuple[Descent, tuple[PyTree, InnerInfo]]:
    at = task.run(at, until)
    return at, (at.z, _known_info(inner, at) if task.measures else task.info(at))

  return jax.lax.scan(segment, begin, jnp.asarray(steps, jnp.int32))[1]


def loop(inner: Inner, model: TaskModel, key: jax.Array | None) -> Loop:
  """Build the inner loop of one task; the arguments are those of `posterior_mode`."""
  batch = model.batch
  if inner.batch_size is not None and key is None:
    raise ValueError("Inner.batch_size draws mini-batches: pass key=jax.random.key(...) along.")
  if inner.batch_size is not None and inner.batch_size > num_rows(batch):
    raise ValueError(
      f"Inner.batch_size is {inner.batch_size}, but the task has {num_rows(batch)} rows; "
      "choose a smaller size, or None for the full batch."
    )
  optimizer = optax.with_extra_args_support(inner.optimizer)
  # In modules with sigma = inf the optimiser moves theta, so that its weight decay and norms refer
  # to theta. In all other modules it moves z.
  free = lambda module: module in model.free or jnp.isposinf(model.params.log_sigma2[module])
  shift = lambda p, v, sign, free: (
    v + sign * p if free is True else jnp.where(free, v + sign * p, v)
  )
  leaf = lambda sign: lambda m, p, v: None if p is None else shift(p, v, sign, free(m))
  moved = lambda z, sign=1.0: jax.tree.map(leaf(sign), model.labels, model.part, z)

  random = key is not None and is_random(model.likelihood)
  measures = inner.tol is not None and inner.batch_size is None and not random
  # A stream of keys of its own: mini-batches are drawn with fold_in(key, step).
  own: Any = jax.random.fold_in(cast(Any, key), _NETWORK) if random else None
  drawn = lambda step: with_key(model.likelihood, jax.random.fold_in(own, step))

  def begin(start: PyTree | None) -> Descent:
    z: PyTree = optax.tree.zeros_like(model.part) if start is None else start
    none = absent(model.n.dtype)
    return Descent(
      z,
      optimizer.init(moved(z)),
      jnp.zeros([], jnp.int32),
      jnp.zeros([], bool),
      none,
      none,
    )

  def at_step(step: jax.Array) -> tuple[TaskModel, Batch]:
    mini = batch
    if inner.batch_size is not None and key is not None:
      mini = draw(jax.random.fold_in(key, step), batch, inner.batch_size)
    return dataclasses.replace(model, likelihood=drawn(step)) if random else model, mini

  def measure(at: Descent) -> tuple[Descent, tuple[jax.Array, PyTree]]:
    """Return (`at` with the objective, the norm and `done` at its z, (J / N, its gradient))."""
    here, mini = at_step(at.step)
    value, grad = here.value_and_grad(at.z, mini)
    if inner.tol is None:
      return at._replace(objective=jax.lax.stop_gradient(value)), (value, grad)
    return _judged(inner, at, value, grad, mini is batch), (value, grad)

  def move(at: Descent, measured: tuple[jax.Array, PyTree], **how: bool) -> Descent:
    """Return `at` with the z and the state of the optimiser after one more step."""
    here, mini = at_step(at.step)
    value, grad = measured
    objective = lambda params: here.objective(moved(params, -1.0), mini)
    updates, opt_state = optimizer.update(
      grad, at.opt_state, moved(at.z), value=value, grad=grad, value_fn=objective, **how
    )
    return at._replace(z=optax.apply_updates(at.z, updates), opt_state=opt_state, step=at.step + 1)

  def move_and_measure(at: Descent, measured: tuple[jax.Array, PyTree]) -> tuple[Descent, Any]:
    """Move, then measure. The line search of L-BFGS has measured the new z, on the same batch."""
    stores = isinstance(at.opt_state, LbfgsState) and at.opt_state.value.dtype == measured[0].dtype
    if not (measures and stores):
      return measure(move(at, measured))
    at = move(at, measured, store_grad=True)
    known = cast(LbfgsState, at.opt_state)
    return _judged(inner, at, known.value, known.grad, True), (known.value, known.grad)

  def step(at: Descent) -> Descent:
    at, measured = measure(at)
    new = move(at, measured)
    if inner.tol is None:
      return new
    z, steps = optax.tree.where(at.done, at.z, new.z), jnp.where(at.done, at.step, new.step)
    return new._replace(z=z, step=steps)

  step = jax.checkpoint(step) if inner.remat else step
  run = functools.partial(_all_steps, step)
  if inner.tol is not None:
    run = functools.partial(_until_done, measure, move_and_measure)
  return Loop(begin, step, run, measures, functools.partial(_info_at_end, inner, model, key))


def _info_at_end(inner: Inner, model: TaskModel, key: jax.Array | None, at: Descent) -> InnerInfo:
  """Return the report at the last z, measured on all examples."""
  if inner.batch_size is None:
    value, grad = model.value_and_grad(at.z, model.batch)
  else:
    nll, g = nll_and_gradient(inner, model, model.theta_part(at.z), key)
    value, grad = model.with_prior(at.z)(nll, g)
  norm = norm_of(jax.lax.stop_gradient(grad))
  return InnerInfo(at.step, value, norm, converged(inner, norm))


def _judged(
  inner: Inner, at: Descent, value: jax.Array, grad: PyTree, all_examples: bool
) -> Descent:
  """Return `at` with the objective, the norm of the gradient, and whether the loop is done."""
  norm = norm_of(jax.lax.stop_gradient(grad))
  done = norm <= inner.tol if all_examples else jnp.zeros([], bool)
  return at._replace(objective=value, grad_norm=norm, done=done)


def _all_steps(step: Callable[[Descent], Descent], at: Descent, until: int | jax.Array) -> Descent:
  # JAX can differentiate a fori_loop backwards only if both bounds are Python integers.
  fixed = isinstance(until, int)
  first, last = (0, until) if fixed else (at.step, jnp.asarray(until, jnp.int32))
  return jax.lax.fori_loop(first, last, lambda _, at: step(at), at)


def _until_done(
  measure: Callable[[Descent], tuple[Descent, Any]],
  move_and_measure: Callable[[Descent, Any], tuple[Descent, Any]],
  at: Descent,
  until: int | jax.Array,
) -> Descent:
  """Measure z after each step. So no step is made after convergence, and the report is known.

  Tasks in slots use `Loop.step`, which measures z before it moves. Otherwise each new task in a
  slot would cost all slots one more evaluation.
  """
  go_on = lambda now: (now[0].step < until) & ~now[0].done
  return jax.lax.while_loop(go_on, lambda now: move_and_measure(*now), measure(at))[0]


def absent(dtype: jax.typing.DTypeLike) -> jax.Array:
  """Return NaN [], which stands in a report for a number that was not computed.

  While the flag `jax_debug_nans` is set, return inf: the flag stops a program at any NaN.
  """
  debug = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue]
  return jnp.full([], jnp.inf if debug else jnp.nan, dtype)


def nll_and_gradient(
  inner: Inner, model: TaskModel, part: PyTree, key: jax.Array | None
) -> tuple[jax.Array, PyTree]:
  """Return the mean over all examples of -log p(y_n | x_n, theta) [] and its gradient, like `part`.

  If inner steps use mini-batches, the sum runs over mini-batches of the same size, one after
  another. This needs the memory of one mini-batch. Layers with batch statistics then see batches of
  the size that the steps used.

  Args:
    inner: its batch_size is the size of a mini-batch. None takes all examples at once.
    model: the task model.
    part: theta, a tree with None in the frozen modules.
    key: the key of the inner loop.
  """
  if inner.batch_size is None or key is None:
    loss = lambda part: mean_nll(model.likelihood, model.whole(part), model.batch)
    return jax.value_and_grad(loss)(part)

  def share(part: PyTree, mini: Batch) -> jax.Array:
    outputs = model.likelihood.predict(model.whole(part), mini.inputs)
    return -masked_log_prob(model.likelihood, outputs, mini) / model.n

  def add(total: tuple[jax.Array, PyTree], mini: Batch) -> tuple[tuple[jax.Array, PyTree], None]:
    return jax.tree.map(jnp.add, total, jax.value_and_grad(share)(part, mini)), None

  zero = (jnp.zeros([], model.n.dtype), optax.tree.zeros_like(part))
  return jax.lax.scan(add, zero, draw_at_end(key, model.batch, inner.batch_size))[0]


def draw(key: jax.Array, batch: Batch, size: int) -> Batch:
  """Draw `size` examples of `batch` without replacement.

  Padding is drawn only if the batch has fewer than `size` examples.
  """
  return jax.tree.map(lambda x: x[0], _draw_batches(key, batch, size, 1))


def draw_at_end(key: jax.Array, batch: Batch, size: int, count: int | None = None) -> Batch:
  """Draw mini-batches [count, size, ...] without replacement, independent of the inner steps.

  Args:
    key: the key of the inner loop. These draws are independent of those of its steps.
    batch: all examples [N, ...].
    size: the number of examples in a mini-batch.
    count: the number of mini-batches. None takes enough mini-batches for all examples. The last
      mini-batch is filled up with examples of the first mini-batch, at weight 0. So batch
      statistics see real examples, and no sum counts an example twice.
  """
  count = -(-num_rows(batch) // size) if count is None else count
  return _draw_batches(jax.random.fold_in(key, _AT_END), batch, size, count)


def _draw_batches(key: jax.Array, batch: Batch, size: int, count: int) -> Batch:
  """Draw mini-batches [count, size, ...]: examples, then padding, then repeats of weight 0."""
  n = num_rows(batch)
  own = jnp.float32 if batch.mask is None else jnp.result_type(batch.mask)
  mask = weights(batch, jnp.promote_types(own, jnp.float32))
  score = jnp.where(mask != 0, jax.random.uniform(key, mask.shape), -1.0)
  rows = jax.lax.top_k(score, min(n, count * size))[1]
  rows = jnp.resize(rows, (count * size,))
  drawn = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch._replace(mask=mask))
  drawn = drawn._replace(mask=jnp.where(jnp.arange(count * size) < n, drawn.mask, 0.0))
  return jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), drawn)


def checked_steps(steps: Any) -> int | jax.Array | tuple[int, ...]:
  """Check a number of steps, or a tuple of steps to record, and return it.

  Args:
    steps: an integer, an integer array [], which may be traced, or a tuple of increasing integers.

  Raises:
    TypeError: `steps` is something else.
    ValueError: a step is negative, or the steps of a tuple do not increase.
  """
  if isinstance(steps, list):
    raise TypeError(f"steps to record are a tuple; got {shown(steps)}. Write tuple(steps).")
  if not isinstance(steps, tuple):
    return scalars.count("steps", steps)
  found = tuple(validate.integer(f"steps[{i}]", step, least=0) for i, step in enumerate(steps))
  if not found or list(found) != sorted(set(found)):
    raise ValueError(f"A tuple of steps must hold increasing integers; got {steps}.")
  return found
