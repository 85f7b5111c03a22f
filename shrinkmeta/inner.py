"""How theta_hat is found: any optax optimiser on the negative log joint of one task.

    J(z) = -log p(D | phi + s z) + precision |z|^2 / 2          (coordinates: whitening.py)

The optimiser sees J / N, the objective per example, so that step sizes do not depend on N.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shrinkmeta.density import masked_log_prob
from shrinkmeta.likelihood import Likelihood
from shrinkmeta.tasks import Batch, num_examples, num_rows, weights
from shrinkmeta.whitening import Whitening, to_theta

PyTree = Any


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
    batch_size: None is the full batch; else every step draws that many examples without
      replacement, from a key that the caller passes.
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
  """How the optimisation of one task ended; all of it at theta_hat, on the full batch."""

  steps: jax.Array  # [] int32, taken
  objective: jax.Array  # [] J / N
  grad_norm: jax.Array  # [] norm of grad J / N, with respect to z
  converged: jax.Array  # [] bool: grad_norm <= tol (1e-3 where Inner.tol is None)


class _Carry(NamedTuple):
  z: PyTree
  opt_state: optax.OptState
  step: jax.Array  # [] int32
  done: jax.Array  # [] bool, the tolerance was met at z


def objective(
  likelihood: Likelihood, phi: PyTree, white: Whitening, data: Batch
) -> Callable[[PyTree, Batch], jax.Array]:
  """(z, batch) -> J / N [], the likelihood estimated from `batch`, N counted on `data`."""
  dtype = jnp.result_type(jax.tree.leaves(phi)[0])
  n = jnp.maximum(num_examples(data, dtype), 1.0)

  def per_example(z: PyTree, batch: Batch) -> jax.Array:
    theta = to_theta(phi, white.scale, z)
    log_p = masked_log_prob(likelihood, likelihood.predict(theta, batch.inputs), batch)
    square = jax.tree.map(lambda p, v: p * jnp.sum(jnp.square(v)), white.precision, z)
    prior = 0.5 * sum(jax.tree.leaves(square), jnp.zeros([], dtype))
    return prior / n - log_p / jnp.maximum(num_examples(batch, dtype), 1.0)

  return per_example


def draw(key: jax.Array, batch: Batch, size: int) -> Batch:
  """`size` examples of `batch` without replacement; padding only once the examples run out."""
  mask = weights(batch, jnp.float32)
  score = jnp.where(mask != 0, jax.random.uniform(key, mask.shape), -1.0)
  rows = jax.lax.top_k(score, size)[1]
  return jax.tree.map(lambda x: x[rows], batch._replace(mask=mask))


def minimise(
  inner: Inner,
  likelihood: Likelihood,
  phi: PyTree,
  white: Whitening,
  batch: Batch,
  *,
  steps: int | jax.Array | tuple[int, ...] | None = None,
  key: jax.Array | None = None,
) -> tuple[PyTree, InnerInfo]:
  """z_hat = argmin J, from z = 0, for one task.

  Args:
    inner, likelihood, phi, white, batch: as above; `batch` without the T axis.
    steps: replaces inner.steps. An int fixes the program and can be differentiated backwards; a
      traced int does not recompile; an increasing tuple [S] records one run at those steps.
    key: consumed by the mini-batches; needed with inner.batch_size, else ignored.

  Returns:
    z, with the structure of phi, and its InnerInfo; for a tuple of steps every leaf leads with [S].
  """
  steps = inner.steps if steps is None else steps
  _check_steps(steps)
  if inner.batch_size is not None and key is None:
    raise ValueError("Inner.batch_size draws mini-batches: pass key=jax.random.key(...) along.")
  if inner.batch_size is not None and inner.batch_size > num_rows(batch):
    raise ValueError(
      f"Inner.batch_size is {inner.batch_size}, but the task has {num_rows(batch)} rows; "
      "choose a smaller size, or None for the full batch."
    )
  loss = objective(likelihood, phi, white, batch)
  optimizer = optax.with_extra_args_support(inner.optimizer)

  def step(carry: _Carry) -> _Carry:
    mini = batch
    if inner.batch_size is not None and key is not None:
      mini = draw(jax.random.fold_in(key, carry.step), batch, inner.batch_size)
    value_fn = lambda z: loss(z, mini)
    value, grad = jax.value_and_grad(value_fn)(carry.z)
    updates, opt_state = optimizer.update(
      grad, carry.opt_state, carry.z, value=value, grad=grad, value_fn=value_fn
    )
    z = optax.apply_updates(carry.z, updates)
    if inner.tol is None:
      return _Carry(z, opt_state, carry.step + 1, carry.done)
    done = optax.tree.norm(grad) <= inner.tol
    return _Carry(
      optax.tree.where(done, carry.z, z), opt_state, carry.step + jnp.where(done, 0, 1), done
    )

  step = jax.checkpoint(step) if inner.remat else step

  def run(carry: _Carry, until: int | jax.Array) -> _Carry:
    if inner.tol is None:
      start = 0 if isinstance(until, int) else carry.step
      return jax.lax.fori_loop(start, until, lambda _, c: step(c), carry)
    return jax.lax.while_loop(lambda c: (c.step < until) & ~c.done, step, carry)

  def info(carry: _Carry) -> InnerInfo:
    value, grad = jax.value_and_grad(lambda z: loss(z, batch))(carry.z)
    norm = optax.tree.norm(jax.lax.stop_gradient(grad))
    return InnerInfo(carry.step, value, norm, norm <= (inner.tol or 1e-3))

  z = optax.tree.zeros_like(phi)
  start = _Carry(z, optimizer.init(z), jnp.zeros([], jnp.int32), jnp.zeros([], bool))
  if not isinstance(steps, tuple):
    end = run(start, steps)
    return end.z, info(end)

  def segment(carry: _Carry, until: jax.Array) -> tuple[_Carry, tuple[PyTree, InnerInfo]]:
    carry = run(carry, until)
    return carry, (carry.z, info(carry))

  return jax.lax.scan(segment, start, jnp.asarray(steps, jnp.int32))[1]


def _check_steps(steps: Any) -> None:
  if isinstance(steps, tuple):
    ordered = all(isinstance(s, int) for s in steps) and list(steps) == sorted(set(steps))
    if not steps or not ordered or steps[0] < 0:
      raise ValueError(f"A tuple of steps must hold increasing ints, none negative; got {steps}.")
  elif isinstance(steps, int) and steps < 0:
    raise ValueError(f"steps must not be negative; got {steps}.")
