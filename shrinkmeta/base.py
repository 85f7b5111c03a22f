"""The types that learners take and return: parameters, states, metrics, and the learner itself.

Shapes: T tasks; [] is a scalar. A tree like phi has the structure and shapes of the parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from shrinkmeta.checks import validate
from shrinkmeta.config import Algorithm, Spec
from shrinkmeta.model import modules

PyTree = Any


class MetaParams(NamedTuple):
  """The parameters that all tasks share, or a gradient with respect to them."""

  phi: PyTree  # mean of theta
  log_sigma2: dict[str, jax.Array]  # {module: []} log variance of theta around phi


class WarmStart(NamedTuple):
  """Where the inner loop and the linear solve of each task begin.

  phi and sigma change little from one update to the next. So the results z_hat and w of a task in
  one update are good starting points when the same task comes again: a loop or a solve that stops
  by tolerance then stops sooner. Both trees are like phi, with None in the frozen modules. The
  leaves are [T, ...] for T tasks, and [K, ...] in a buffer of K tasks.

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
      tasks: the positions of the tasks in the buffer, [T] integers.

    Returns:
      a WarmStart, leaves [T, ...].

    >>> import jax.numpy as jnp
    >>> WarmStart({"w": jnp.arange(3)}, {"w": jnp.zeros(3)}).take(jnp.array([2, 0])).z
    {'w': Array([2, 0], dtype=int32)}
    """
    return jax.tree.map(lambda x: x[tasks], self)

  def put(self, tasks: jax.Array, warm: "WarmStart") -> "WarmStart":
    """Return the buffer with the starts of some tasks replaced.

    Args:
      tasks: the positions of the tasks in the buffer, [T] integers.
      warm: the new starts, leaves [T, ...].

    Returns:
      the new buffer, leaves [K, ...].

    >>> import jax.numpy as jnp
    >>> buffer = WarmStart({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)})
    >>> buffer.put(jnp.array([1]), WarmStart({"w": jnp.ones(1)}, {"w": jnp.ones(1)})).z
    {'w': Array([0., 1., 0.], dtype=float32)}
    """
    return jax.tree.map(lambda x, new: x.at[tasks].set(new), self, warm)


class InnerInfo(NamedTuple):
  """How the inner optimisation of one task ended, measured at theta_hat on all examples.

  The metrics of algorithms without an implicit gradient (`maml`, `fomaml`, `reptile`, ...) hold
  cheaper values. `objective` is then that of the last step's start, on its mini-batch, or NaN if no
  step was made. `grad_norm` is that of the same point, and NaN if Inner.tol is None. `fine_tuning`
  and `no_adaptation` report phi's own loss and its gradient norm, with steps = 0.
  """

  steps: jax.Array  # [] int32, inner steps made
  objective: jax.Array  # [] J / N, nats per example
  grad_norm: jax.Array  # [] norm of grad J / N, with respect to z
  converged: jax.Array  # [] bool: grad_norm <= tol (1e-3 where Inner.tol is None)


class SolveInfo(NamedTuple):
  """How a linear solve K w = b ended."""

  residual: jax.Array  # [] |b - K w| / |b|; CG reports its recursion's residual, not a new product
  steps: jax.Array  # [] int32, products with K
  negative_curvature: jax.Array  # [] bool: a direction with p^T K p <= 0 was met
  converged: jax.Array  # [] bool: residual <= tol


class EvidenceInfo(NamedTuple):
  """How the computation of a log evidence ended."""

  inner: InnerInfo  # how the search for the mode ended
  solve: SolveInfo | None  # how the solve for the mode's gradient ended; None from `log_evidence`
  log_det: jax.Array  # [] log det(I + s C s)
  log_det_error: jax.Array  # [] its standard error; 0 where it is exact


class OptState(NamedTuple):
  """The states of the two optimisers."""

  phi: optax.OptState
  log_sigma2: optax.OptState


class MetaState(NamedTuple):
  """The state of a learner between two updates."""

  phi: PyTree  # the parameters that all tasks share
  log_sigma2: dict[str, jax.Array]  # {module: []}; inf: no prior, -inf: frozen
  opt_state: OptState
  step: jax.Array  # [] int32, updates done
  constants: PyTree = None  # what `predict` takes as its third argument; never changed


class Metrics(NamedTuple):
  """What people read of an update of T tasks.

  A failed task counts in no mean.
  """

  loss: jax.Array  # [] mean over tasks of val_nll; NaN without validation data
  phi_loss: jax.Array  # [] what phi follows: loss; training objective; -log evidence; NaN: reptile
  val_nll: jax.Array  # [T] mean validation negative log-likelihood, nats per example
  failed: jax.Array  # [T] bool: a loss or gradient was not finite, or the task had no example
  num_failed: jax.Array  # [] int32, tasks left out of this update
  num_sound: jax.Array  # [] int32, tasks that did not fail
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each; None where no linear system is solved
  mean_inner: InnerInfo  # [] each, mean over the tasks that did not fail
  mean_solve: SolveInfo | None  # [] each; None too where one system joins all tasks
  phi_grad_norm: jax.Array  # []
  sigma_grad: dict[str, jax.Array]  # {module: []} d meta-loss / d log sigma_m^2
  warm: WarmStart | None  # starts for the next update of these tasks; None if `warm` was not given


class Sums(NamedTuple):
  """Sums over those of T tasks that did not fail."""

  grad: MetaParams
  loss: jax.Array  # [] of mean validation negative log-likelihoods
  phi_loss: jax.Array  # [] of what phi follows
  judged: jax.Array  # [] number of val examples (train if val is None; both if phi is "pooled")
  sound: jax.Array  # [] int32, tasks that did not fail
  inner: InnerInfo  # [] each, in the dtype of the parameters
  solve: SolveInfo | None  # likewise; None where no task solves a system of its own
  tasks: jax.Array  # [] int32, T


class PerTask(NamedTuple):
  """The report of each of T tasks."""

  val_nll: jax.Array  # [T] nats per example
  failed: jax.Array  # [T] bool
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each
  warm: WarmStart | None  # leaves [T, ...]


class MetaLearner(NamedTuple):
  """An algorithm as pure functions, for `jax.jit`.

  Each function has its own docstring: `help(learner.update)`. `update(state, tasks)` equals
  `apply(state, *sums(state, tasks))`. If a meta-batch does not fit into memory, call `sums` on
  micro-batches, add their Sums leaf by leaf, concatenate their PerTasks, and call `apply` once.
  `sm.fit(micro_batches=...)` does this.
  """

  init: Callable[..., MetaState]
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
    """The algorithm: a line of `sm.FAMILY`, or one of your own."""
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
