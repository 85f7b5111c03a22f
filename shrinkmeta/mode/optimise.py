"""How theta_hat is found: any optax optimiser on the negative log joint of one task.

    J(z) = -log p(D | phi + s z) + precision |z|^2 / 2          (coordinates: whitening.py)

The optimiser sees J / N, the objective per example, so that step sizes do not depend on N.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shrinkmeta.mode.whitening import Whitening, to_theta
from shrinkmeta.model.density import masked_log_prob
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.tasks import Batch, divisor, num_examples, num_rows, weights

PyTree = Any
_AT_END = 2**32 - 1  # folded into a key whose inner step i draws with i folded in


@dataclasses.dataclass(frozen=True)
class Inner:
  """The inner optimisation of one task; static, so another value is another compiled program.

  Attributes:
    optimizer: any optax optimiser. Schedules count inner steps; `value`, `grad` and `value_fn` are
      passed to those that want them (L-BFGS, Polyak step sizes). For finite sigma it moves z, for
      sigma = inf theta.
    steps: number of steps; with `tol` the largest number.
    tol: stop once the norm of grad J / N is at most this; None runs all steps. A loop that may
      stop early can be differentiated forwards and implicitly, not backwards through its steps.
      With batch_size all steps are run: a batch tells too little of J.
    batch_size: None is the full batch; else every step draws that many examples without
      replacement, from a key that the caller passes. With a prior let the rate decrease: at the
      mode the gradients of single batches are not 0, and a constant rate ends in noise around it.
      InnerInfo is of all examples, in such batches one after the other.
    remat: recompute each step in the backward pass (`jax.checkpoint`) instead of storing it;
      for gradients through the steps.
  """

  optimizer: optax.GradientTransformation = dataclasses.field(default_factory=optax.lbfgs)
  steps: int = 100
  tol: float | None = None
  batch_size: int | None = None
  remat: bool = False

  def __post_init__(self) -> None:
    if self.steps < 0:
      raise ValueError(f"Inner.steps must not be negative; got {self.steps}.")
    if self.tol is not None and not self.tol > 0:
      raise ValueError(f"Inner.tol must be positive, or None to run all steps; got {self.tol}.")
    if self.batch_size is not None and self.batch_size < 1:
      raise ValueError(f"Inner.batch_size must be positive, or None; got {self.batch_size}.")


class InnerInfo(NamedTuple):
  """How the optimisation of one task ended: at theta_hat, on all examples.

  In the metrics of rows whose gradient asks for no mode (`maml`, `fomaml`, `reptile`, ...) the
  objective is that where the last step began, on its batch, NaN where no step was taken, and
  `grad_norm` is NaN unless Inner.tol asks for it: the true ones would cost as much as a step.
  """

  steps: jax.Array  # [] int32, taken
  objective: jax.Array  # [] J / N
  grad_norm: jax.Array  # [] norm of grad J / N, with respect to z
  converged: jax.Array  # [] bool: grad_norm <= tol (1e-3 where Inner.tol is None)


class Descent(NamedTuple):
  """The state of one task's loop."""

  z: PyTree
  opt_state: optax.OptState
  step: jax.Array  # [] int32
  done: jax.Array  # [] bool, the tolerance was met at z
  objective: jax.Array  # [] J / N where the last step began
  grad_norm: jax.Array  # [] there; NaN without Inner.tol


class Loop(NamedTuple):
  """One task's loop: where it begins, a step of it, how it stands. Pure functions."""

  begin: Callable[[PyTree], Descent]
  step: Callable[[Descent], Descent]
  info: Callable[[Descent], InnerInfo]  # at z, on all examples


def objective(
  likelihood: Likelihood, phi: PyTree, white: Whitening, data: Batch
) -> Callable[[PyTree, Batch], jax.Array]:
  """(z, batch) -> J / N [], the likelihood estimated from `batch`, N counted on `data`."""
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  n = divisor(num_examples(data, dtype))

  def per_example(z: PyTree, batch: Batch) -> jax.Array:
    nll = mean_nll(likelihood, to_theta(phi, white.scale, z), batch)
    return nll + _neg_log_prior(white, z) / n

  return per_example


def _neg_log_prior(white: Whitening, z: PyTree) -> jax.Array:
  """precision |z|^2 / 2 []."""
  half = lambda p, v: 0.0 if _none(p) else 0.5 * p * jnp.sum(jnp.square(v))
  return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(half, white.precision, z))))


def _none(precision: jax.Array | float) -> bool:
  """Whether there is no prior for sure: see `Whitening`."""
  return isinstance(precision, float) and precision == 0.0


def mean_nll(likelihood: Likelihood, theta: PyTree, batch: Batch) -> jax.Array:
  """Mean over examples of -log p(x_n | theta) []."""
  log_p = masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)
  dtype = jnp.result_type(jax.tree.leaves(theta)[0])
  if log_p.dtype != dtype:
    raise ValueError(
      f"log p(D | theta) is {log_p.dtype}, the parameters are {dtype}: data or predict promote it. "
      f"Cast inputs and targets to {dtype}, or the parameters to {log_p.dtype}."
    )
  return -log_p / divisor(num_examples(batch, log_p.dtype))


def draw(key: jax.Array, batch: Batch, size: int) -> Batch:
  """`size` examples of `batch` without replacement; padding only once the examples run out."""
  return jax.tree.map(lambda x: x[0], _draw_batches(key, batch, size, 1))


def draw_at_end(key: jax.Array, batch: Batch, size: int, count: int | None = None) -> Batch:
  """Batches [count, size, ...] of a task whose steps draw with `key`, without replacement.

  Args:
    count: None: as many as hold all examples. The last is filled up with examples of the first, of
      weight 0: statistics of a batch see examples, and no sum counts one twice.
  """
  count = -(-num_rows(batch) // size) if count is None else count
  return _draw_batches(jax.random.fold_in(key, _AT_END), batch, size, count)


def _draw_batches(key: jax.Array, batch: Batch, size: int, count: int) -> Batch:
  n = num_rows(batch)
  own = jnp.float32 if batch.mask is None else jnp.result_type(batch.mask)
  mask = weights(batch, jnp.promote_types(own, jnp.float32))
  score = jnp.where(mask != 0, jax.random.uniform(key, mask.shape), -1.0)
  rows = jax.lax.top_k(score, min(n, count * size))[1]
  rows = jnp.resize(rows, (count * size,))
  drawn = jax.tree.map(lambda x: x[rows], batch._replace(mask=mask))
  drawn = drawn._replace(mask=jnp.where(jnp.arange(count * size) < n, drawn.mask, 0.0))
  return jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), drawn)


def nll_and_gradient(
  inner: Inner, likelihood: Likelihood, theta: PyTree, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, PyTree]:
  """Mean over all examples of -log p(x_n | theta) [] and its gradient, a tree like theta.

  In batches of inner.batch_size where steps take such, one after the other: in the memory of one,
  and under batch statistics with those that the steps have seen.
  """
  if inner.batch_size is None or key is None:
    return jax.value_and_grad(lambda t: mean_nll(likelihood, t, batch))(theta)
  dtype = jnp.result_type(jax.tree.leaves(theta)[0])
  n = divisor(num_examples(batch, dtype))

  def share(theta: PyTree, mini: Batch) -> jax.Array:
    return -masked_log_prob(likelihood, likelihood.predict(theta, mini.inputs), mini) / n

  def add(total: tuple[jax.Array, PyTree], mini: Batch) -> tuple[tuple[jax.Array, PyTree], None]:
    return jax.tree.map(jnp.add, total, jax.value_and_grad(share)(theta, mini)), None

  zero = (jnp.zeros([], dtype), optax.tree.zeros_like(theta))
  return jax.lax.scan(add, zero, draw_at_end(key, batch, inner.batch_size))[0]


def value_and_grad_z(
  white: Whitening, z: PyTree, nll: jax.Array, g: PyTree, n: jax.Array
) -> tuple[jax.Array, PyTree]:
  """J / N and s * grad_theta + precision * z / N: the prior's half needs no autodiff.

  Args:
    nll, g: mean negative log-likelihood at theta = phi + s z and its gradient in theta.
    n: number of examples [].
  """
  pull = lambda s, p, g, v: s * g if _none(p) else s * g + p * v / n
  grad = jax.tree.map(pull, white.scale, white.precision, g, z)
  return nll + _neg_log_prior(white, z) / n, grad


def info_at(inner: Inner, steps: jax.Array, value_and_grad: tuple[jax.Array, PyTree]) -> InnerInfo:
  """The report of a loop that ended with J / N and its gradient in z."""
  value, grad = value_and_grad
  return _report(inner, steps, value, optax.tree.norm(jax.lax.stop_gradient(grad)))


def _report(inner: Inner, steps: jax.Array, value: jax.Array, norm: jax.Array) -> InnerInfo:
  return InnerInfo(steps, value, norm, norm <= (inner.tol or 1e-3))


def loop(
  inner: Inner,
  likelihood: Likelihood,
  phi: PyTree,
  white: Whitening,
  batch: Batch,
  key: jax.Array | None,
) -> Loop:
  """The loop of `inner` on one task; arguments as for `minimise`."""
  if inner.batch_size is not None and key is None:
    raise ValueError("Inner.batch_size draws mini-batches: pass key=jax.random.key(...) along.")
  if inner.batch_size is not None and inner.batch_size > num_rows(batch):
    raise ValueError(
      f"Inner.batch_size is {inner.batch_size}, but the task has {num_rows(batch)} rows; "
      "choose a smaller size, or None for the full batch."
    )
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  n = divisor(num_examples(batch, dtype))
  loss = objective(likelihood, phi, white, batch)
  optimizer = optax.with_extra_args_support(inner.optimizer)

  def value_and_grad(z: PyTree, mini: Batch) -> tuple[jax.Array, PyTree]:
    theta = to_theta(phi, white.scale, z)
    nll, g = jax.value_and_grad(lambda t: mean_nll(likelihood, t, mini))(theta)
    return value_and_grad_z(white, z, nll, g, n)

  def begin(z: PyTree) -> Descent:
    nan = jnp.full([], jnp.nan, dtype)
    return Descent(z, optimizer.init(z), jnp.zeros([], jnp.int32), jnp.zeros([], bool), nan, nan)

  def step(at: Descent) -> Descent:
    mini = batch
    if inner.batch_size is not None and key is not None:
      mini = draw(jax.random.fold_in(key, at.step), batch, inner.batch_size)
    value, grad = value_and_grad(at.z, mini)
    updates, opt_state = optimizer.update(
      grad, at.opt_state, at.z, value=value, grad=grad, value_fn=lambda z: loss(z, mini)
    )
    z = optax.apply_updates(at.z, updates)
    value = jax.lax.stop_gradient(value)
    if inner.tol is None:
      return Descent(z, opt_state, at.step + 1, at.done, value, at.grad_norm)
    norm = optax.tree.norm(jax.lax.stop_gradient(grad))
    done = norm <= inner.tol if mini is batch else jnp.zeros([], bool)
    z, steps = optax.tree.where(done, at.z, z), at.step + jnp.where(done, 0, 1)
    return Descent(z, opt_state, steps, done, value, norm)

  def info(at: Descent) -> InnerInfo:
    nll, g = nll_and_gradient(inner, likelihood, to_theta(phi, white.scale, at.z), batch, key)
    return info_at(inner, at.step, value_and_grad_z(white, at.z, nll, g, n))

  return Loop(begin, jax.checkpoint(step) if inner.remat else step, info)


def minimise(
  inner: Inner,
  likelihood: Likelihood,
  phi: PyTree,
  white: Whitening,
  batch: Batch,
  *,
  steps: int | jax.Array | tuple[int, ...] | None = None,
  key: jax.Array | None = None,
  start: PyTree | None = None,
  end: Descent | None = None,
  info_at_end: bool = True,
) -> tuple[PyTree, InnerInfo]:
  """z_hat = argmin J, for one task.

  Args:
    inner, likelihood, phi, white, batch: as above; `batch` without the T axis.
    steps: replaces inner.steps. An int fixes the program and can be differentiated backwards; a
      traced int does not recompile; an increasing tuple [S] records one run at those steps.
    key: consumed by the mini-batches; needed with inner.batch_size, else ignored.
    start: z to begin from; None is 0, theta = phi.
    end: where this loop ended, if it was run already; then nothing is left but to report it.
    info_at_end: False takes objective and gradient from where the last step began, for nothing.

  Returns:
    z, with the structure of phi, and its InnerInfo; for a tuple of steps every leaf leads with [S].
  """
  steps = inner.steps if steps is None else steps
  steps = int(steps) if isinstance(steps, np.integer) else steps
  _check_steps(steps)
  task = loop(inner, likelihood, phi, white, batch, key)

  def ended(at: Descent) -> tuple[PyTree, InnerInfo]:
    if info_at_end:
      return at.z, task.info(at)
    return at.z, _report(inner, at.step, at.objective, at.grad_norm)

  if end is not None:
    return ended(end)

  def run(at: Descent, until: int | jax.Array) -> Descent:
    if inner.tol is None:
      counted = isinstance(until, int)
      begin, until = (0, until) if counted else (at.step, jnp.asarray(until, jnp.int32))
      return jax.lax.fori_loop(begin, until, lambda _, d: task.step(d), at)
    return jax.lax.while_loop(lambda d: (d.step < until) & ~d.done, task.step, at)

  begin = task.begin(optax.tree.zeros_like(phi) if start is None else start)
  if not isinstance(steps, tuple):
    return ended(run(begin, steps))

  def segment(at: Descent, until: jax.Array) -> tuple[Descent, tuple[PyTree, InnerInfo]]:
    at = run(at, until)
    return at, (at.z, task.info(at))

  return jax.lax.scan(segment, begin, jnp.asarray(steps, jnp.int32))[1]


def _check_steps(steps: Any) -> None:
  if isinstance(steps, list):
    raise ValueError(f"Steps to record are a tuple; got the list {steps}.")
  if isinstance(steps, tuple):
    ordered = all(isinstance(s, int) for s in steps) and list(steps) == sorted(set(steps))
    if not steps or not ordered or steps[0] < 0:
      raise ValueError(f"A tuple of steps must hold increasing ints, none negative; got {steps}.")
  elif isinstance(steps, int) and steps < 0:
    raise ValueError(f"steps must not be negative; got {steps}.")
