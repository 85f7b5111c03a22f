"""The types that travel: parameters, states, what a learner is, and what it reports.

Shapes: T tasks; [] is a scalar. A tree like phi has the structure and shapes of the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from shrinkmeta import validate
from shrinkmeta.config import Algorithm, Spec
from shrinkmeta.model import modules

PyTree = Any


class MetaParams(NamedTuple):
  """What all tasks share, or a gradient with respect to it."""

  phi: PyTree  # mean of theta
  log_sigma2: dict[str, jax.Array]  # {module: []} log variance of theta around phi


class WarmStart(NamedTuple):
  """Where a task's loop and solve ended: a start for the next time the same task comes.

  phi and sigma move little from one update to the next, and so do z_hat and w of a task in whitened
  coordinates. Tasks that recur may begin there; a loop or a solve that stops by tolerance then
  stops sooner. Both trees are like phi, with None for frozen modules. Of T tasks the leaves lead
  with [T], and a buffer of K tasks leads with [K].

  >>> import jax.numpy as jnp
  >>> buffer = WarmStart(z={"w": jnp.zeros(3)}, w={"w": jnp.zeros(3)})  # of three tasks
  >>> ended = WarmStart(z={"w": jnp.ones(1)}, w={"w": jnp.ones(1)})
  >>> buffer.put(jnp.array([2]), ended).take(jnp.array([1, 2])).z["w"].tolist()
  [0.0, 1.0]
  """

  z: PyTree  # the mode, theta = phi + sigma * z
  w: PyTree  # the solution of the linear system

  def take(self, tasks: jax.Array) -> "WarmStart":
    """Return the starts of some tasks of a buffer.

    Args:
      tasks: their numbers in the buffer, [T] integers.

    Returns:
      a WarmStart whose leaves lead with [T].

    >>> import jax.numpy as jnp
    >>> WarmStart({"w": jnp.arange(3)}, {"w": jnp.zeros(3)}).take(jnp.array([2, 0])).z
    {'w': Array([2, 0], dtype=int32)}
    """
    return jax.tree.map(lambda x: x[tasks], self)

  def put(self, tasks: jax.Array, warm: "WarmStart") -> "WarmStart":
    """Return the buffer with the starts of some tasks replaced.

    Args:
      tasks: their numbers in the buffer, [T] integers.
      warm: the new starts, leaves [T, ...].

    Returns:
      a buffer of the size of this one.

    >>> import jax.numpy as jnp
    >>> buffer = WarmStart({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)})
    >>> buffer.put(jnp.array([1]), WarmStart({"w": jnp.ones(1)}, {"w": jnp.ones(1)})).z
    {'w': Array([0., 1., 0.], dtype=float32)}
    """
    return jax.tree.map(lambda x, new: x.at[tasks].set(new), self, warm)


class InnerInfo(NamedTuple):
  """How the optimisation of one task ended: at theta_hat, on all examples.

  The algorithms whose gradient needs no mode (`maml`, `fomaml`, `reptile`, ...) report other values
  in their metrics, because the true ones would cost as much as a step. Their objective is the one
  at the start of the last step, on its mini-batch, and NaN where no step was taken. Their
  `grad_norm` is NaN unless Inner.tol asks for it.
  """

  steps: jax.Array  # [] int32, taken
  objective: jax.Array  # [] J / N, nats per example
  grad_norm: jax.Array  # [] norm of grad J / N, with respect to z
  converged: jax.Array  # [] bool: grad_norm <= tol (1e-3 where Inner.tol is None)


class SolveInfo(NamedTuple):
  """How a linear solve K w = b ended."""

  residual: jax.Array  # [] |b - K w| / |b|; CG reports that of its recursion, without rounding
  steps: jax.Array  # [] int32, products with K spent
  negative_curvature: jax.Array  # [] bool: a direction with p^T K p <= 0 was met
  converged: jax.Array  # [] bool: residual <= tol


class EvidenceInfo(NamedTuple):
  """How a log evidence was found."""

  inner: InnerInfo  # of the mode
  solve: SolveInfo | None  # of the gradient through the mode; None from `log_evidence`
  log_det: jax.Array  # [] log det(I + s C s)
  log_det_error: jax.Array  # [] its standard error; 0 where it is exact


class OptState(NamedTuple):
  """The states of the two optimisers."""

  phi: optax.OptState
  log_sigma2: optax.OptState


class MetaState(NamedTuple):
  """All that the next update needs."""

  phi: PyTree  # the parameters that all tasks share
  log_sigma2: dict[str, jax.Array]  # {module: []}; inf: no prior, -inf: frozen
  opt_state: OptState
  step: jax.Array  # [] int32, updates done


class Metrics(NamedTuple):
  """What people read of an update of T tasks.

  A failed task counts in no mean.
  """

  loss: jax.Array  # [] mean over tasks of val_nll; NaN without validation data
  phi_loss: jax.Array  # [] what phi follows: loss; training objective; -log evidence; NaN: reptile
  val_nll: jax.Array  # [T] mean validation negative log-likelihood, nats per example
  failed: jax.Array  # [T] bool: not finite, or no example; left out of this update
  num_failed: jax.Array  # [] int32
  num_sound: jax.Array  # [] int32, the others
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each; None where no linear system is solved
  mean_inner: InnerInfo  # [] each, over sound tasks
  mean_solve: SolveInfo | None  # [] each; None too where one system joins all tasks
  phi_grad_norm: jax.Array  # []
  sigma_grad: dict[str, jax.Array]  # {module: []} d meta-loss / d log sigma_m^2
  warm: WarmStart | None  # where these tasks may begin next time; None unless a start was given


class Sums(NamedTuple):
  """Sums over the sound ones of T tasks."""

  grad: MetaParams
  loss: jax.Array  # [] of mean validation negative log-likelihoods
  phi_loss: jax.Array  # [] of what phi follows
  judged: jax.Array  # [] examples in phi's loss: of val, of train without val, of both if pooled
  sound: jax.Array  # [] int32, tasks that count
  inner: InnerInfo  # [] each, in the dtype of the parameters
  solve: SolveInfo | None  # likewise; None where no task solves a system of its own
  tasks: jax.Array  # [] int32, T


class PerTask(NamedTuple):
  """What is known of each of T tasks."""

  val_nll: jax.Array  # [T] nats per example
  failed: jax.Array  # [T] bool
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each
  warm: WarmStart | None  # leaves [T, ...]


class MetaLearner(NamedTuple):
  """An algorithm as pure functions; `jax.jit` them at the edge.

  Each function has a docstring of its own: `help(learner.update)`. An update is
  `apply(state, *sums(state, tasks))`, for all tasks of a meta-batch at once. Where they do not fit,
  `sums` takes micro-batches of them: the Sums add up leaf by leaf, the PerTasks are concatenated.
  `sm.fit` does so.
  """

  init: Callable[[PyTree], MetaState]
  update: Callable[..., tuple[MetaState, Metrics]]
  adapt: Callable[..., tuple[PyTree, InnerInfo]]
  meta_gradient: Callable[..., tuple[MetaParams, Metrics]]
  adapt_tasks: Callable[..., tuple[PyTree, InnerInfo]]
  no_start: Callable[[MetaState, int], WarmStart]
  sums: Callable[..., tuple[Sums, PerTask]]
  apply: Callable[[MetaState, Sums, PerTask], tuple[MetaState, Metrics]]
  keep: Callable[..., tuple["MetaLearner", MetaState]]
  spec: Spec

  @property
  def labels(self) -> modules.Labels:
    """The module of every parameter."""
    return self.spec.labels

  @property
  def algorithm(self) -> Algorithm:
    """The line of the table of algorithms."""
    return self.spec.algorithm


def check_learner(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is a MetaLearner.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.

  Raises:
    TypeError: it is something else, such as the function that builds a learner.
  """
  hint = "Build one: sm.sigma_imaml(likelihood, labels)."
  validate.instance(name, value, MetaLearner, "a shrinkmeta.MetaLearner", hint)


def check_state(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is a MetaState.

  Args:
    name: the argument, as the caller knows it.
    value: what was passed.

  Raises:
    TypeError: it is something else, such as the parameters alone.
  """
  hint = "Make one: learner.init(params)."
  validate.instance(name, value, MetaState, "a shrinkmeta.MetaState", hint)
