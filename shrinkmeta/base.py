"""The types that learners take and return: parameters, states, metrics, and the learner itself.

T is the number of tasks. The shape [] is that of a scalar. A tree like phi is a pytree with the
structure and shapes of the parameters.
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
  """The parameters that all tasks share, or a gradient with respect to them.

  Attributes:
    phi: the prior mean of theta.
    log_sigma2: {module: []}, the log of the prior variance of theta around phi.
  """

  phi: PyTree
  log_sigma2: dict[str, jax.Array]


class WarmStart(NamedTuple):
  """The points at which the inner loop and the linear solve of each task begin.

  phi and sigma change little from one update to the next. So the results z_hat and w of a task are
  good starting points when the same task comes again. A loop or a solve that stops by a tolerance
  then needs fewer steps. Both trees are like phi, with None in the frozen modules. The leaves are
  [T, ...] for the T tasks of an update, and [K, ...] in a buffer of K tasks.

  Attributes:
    z: z_hat, the mode: theta_hat = phi + s z_hat, where s is sigma of every parameter.
    w: the solution of the linear system K w = s g.

  >>> import jax.numpy as jnp
  >>> buffer = WarmStart(z={"w": jnp.zeros(3)}, w={"w": jnp.zeros(3)})  # of three tasks
  >>> ended = WarmStart(z={"w": jnp.ones(1)}, w={"w": jnp.ones(1)})
  >>> buffer.put(jnp.array([2]), ended).take(jnp.array([1, 2])).z["w"].tolist()
  [0.0, 1.0]
  """

  z: PyTree
  w: PyTree

  def take(self, tasks: jax.Array) -> "WarmStart":
    """Take the starting points of T tasks from this buffer of K tasks.

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
    """Return this buffer of K tasks with the starting points of T tasks replaced.

    Args:
      tasks: the positions of the tasks in the buffer, [T] integers.
      warm: the new starting points, leaves [T, ...].

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

  In the metrics of an algorithm without an implicit gradient (`maml`, `fomaml`, `reptile`, ...),
  `objective` and `grad_norm` are measured before the last step, on the mini-batch of that step,
  because this costs nothing. In these metrics `objective` is NaN if no step was made. If Inner.tol
  is None, `grad_norm` is NaN and `converged` is False in these metrics.

  Updates of `fine_tuning` and `no_adaptation` make no inner steps. In their metrics `objective` is
  the loss of phi on the train and val examples of the task, nats per example. `grad_norm` is the
  norm of the gradient of this loss with respect to phi. `steps` is 0 and `converged` is False.

  Attributes:
    steps: [] int32, the number of inner steps made.
    objective: [] J / N, nats per example.
    grad_norm: [] the norm of the gradient of J / N with respect to z.
    converged: [] bool, grad_norm <= Inner.tol, or <= 1e-3 if Inner.tol is None.
  """

  steps: jax.Array
  objective: jax.Array
  grad_norm: jax.Array
  converged: jax.Array


class SolveInfo(NamedTuple):
  """How a linear solve K w = b ended.

  Attributes:
    residual: [] |b - K w| / |b|. CG and the Neumann series update b - K w from step to step, so
      rounding can make the true residual larger. NaN for the solver "identity".
    steps: [] int32, the number of products with K.
    negative_curvature: [] bool. CG: it met a direction p with p^T K p <= 0. "dual": Lambda has a
      negative eigenvalue.
    converged: [] bool, residual <= tol.
  """

  residual: jax.Array
  steps: jax.Array
  negative_curvature: jax.Array
  converged: jax.Array


class EvidenceInfo(NamedTuple):
  """How the computation of a log evidence ended.

  Attributes:
    inner: the end of the inner loop that finds the mode.
    solve: the end of the solve for the mode's derivative; None from `log_evidence`.
    log_det: [] log det(I + s C s).
    log_det_error: [] the standard error of log_det; 0 if log_det is exact.
  """

  inner: InnerInfo
  solve: SolveInfo | None
  log_det: jax.Array
  log_det_error: jax.Array


class OptState(NamedTuple):
  """The states of the optimisers of phi and of log sigma^2."""

  phi: optax.OptState
  log_sigma2: optax.OptState


class MetaState(NamedTuple):
  """The state of a learner between two updates.

  Attributes:
    phi: the parameters that all tasks share.
    log_sigma2: {module: []}, the log of the variance sigma^2. In a module with inf theta has no
      prior. A module with -inf is frozen.
    opt_state: the states of the optimisers of phi and of log sigma^2.
    step: [] int32, the number of updates done.
    constants: what `predict` takes as its third argument, or None. No update changes them.
  """

  phi: PyTree
  log_sigma2: dict[str, jax.Array]
  opt_state: OptState
  step: jax.Array
  constants: PyTree = None


class Metrics(NamedTuple):
  """The report of one update of T tasks.

  All means are over the tasks that did not fail.

  Attributes:
    loss: [] the mean over tasks of val_nll, nats per example; NaN without validation data.
    phi_loss: [] the loss that phi follows, mean over tasks, minus the weighted log p(phi) if there
      is one. Algorithm.phi "predictive": val_nll. "pooled": the mean NLL of all examples. "map":
      the negative log joint of the training data without the prior's normaliser, nats per task.
      "evidence": minus the log evidence, nats per task. NaN for `reptile`, which computes no loss.
    val_nll: [T] the mean validation negative log-likelihood, nats per example.
    failed: [T] bool, whether a loss or gradient was not finite, or the task had no example.
    num_failed: [] int32, the number of tasks left out of this update.
    num_sound: [] int32, the number of tasks that did not fail.
    inner: [T] each, how the inner loops ended.
    solve: [T] each, how the linear solves ended; None if the algorithm solves no linear system.
    mean_inner: [] each, the mean over tasks of `inner`.
    mean_solve: [] each, the mean of `solve`; None also if one linear system couples all tasks.
    phi_grad_norm: [] the norm of the gradient of the meta-loss with respect to phi.
    task_grad_norm: [T] the norm of the gradient of each task with respect to phi and, if it is
      learned, log sigma^2; before `sm.clip_tasks`. With `sigma_gradient="joint"`, phi alone.
    sigma_grad: {module: []}, d meta-loss / d log sigma_m^2.
    warm: the starting points for the next update of these tasks; None if the caller passed none.
  """

  loss: jax.Array
  phi_loss: jax.Array
  val_nll: jax.Array
  failed: jax.Array
  num_failed: jax.Array
  num_sound: jax.Array
  inner: InnerInfo
  solve: SolveInfo | None
  mean_inner: InnerInfo
  mean_solve: SolveInfo | None
  phi_grad_norm: jax.Array
  task_grad_norm: jax.Array
  sigma_grad: dict[str, jax.Array]
  warm: WarmStart | None


class Sums(NamedTuple):
  """Sums over T tasks, without the tasks that failed.

  Floats have at least 32 bits also if the parameters have 16, so that Sums can be added to Sums.
  """

  grad: MetaParams  # the gradients
  loss: jax.Array  # [] the sum of val_nll
  phi_loss: jax.Array  # [] the loss that phi follows: see Metrics
  judged: jax.Array  # [] examples in the loss: val, or train if val is None; both if "pooled"
  sound: jax.Array  # [] int32, the tasks that did not fail
  inner: InnerInfo  # [] each, floats
  solve: SolveInfo | None  # [] each, likewise; None if no task solves a linear system of its own
  tasks: jax.Array  # [] int32, T, failed tasks included


class PerTask(NamedTuple):
  """The report of each of T tasks; `Metrics` explains the fields."""

  val_nll: jax.Array  # [T] mean validation negative log-likelihood, nats per example
  grad_norm: jax.Array  # [T] norm of the gradient, before it is clipped
  failed: jax.Array  # [T] bool
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each
  warm: WarmStart | None  # leaves [T, ...]


class Programs(dict[Any, Any]):
  """{build: what `build` made of a learner}. A copy of a learner begins with none."""

  def __reduce__(self) -> tuple[type["Programs"], tuple[()]]:
    return Programs, ()

  def __repr__(self) -> str:
    return "Programs()"


class MetaLearner(NamedTuple):
  """An algorithm as pure functions, for `jax.jit`.

  Each function has its own docstring: `help(learner.update)`. `update(state, tasks)` equals
  `apply(state, *sums(state, tasks))`. If a meta-batch does not fit into memory, cut it into
  micro-batches. Call `sums` on each, add their Sums leaf by leaf, concatenate their PerTasks, and
  call `apply` once. `sm.fit(micro_batches=...)` does this. With `sigma_gradient="joint"`
  or `restricted` an update needs all its tasks at once, so `sums` refuses a second micro-batch.

  Attributes:
    init: the first state, from the first parameters.
    update: one step of phi and sigma, from T tasks.
    adapt: theta_hat of one task.
    meta_gradient: the gradient of T tasks, without a step.
    adapt_tasks: theta_hat of T tasks.
    no_start: the starting points of K tasks that have not been adapted yet: zeros.
    sums: the sums over T tasks of which an update is made.
    apply: the step of an update, from sums.
    keep: the learner and the state with all but some modules frozen.
    refresh: the state with constants that are computed anew from the training inputs of tasks.
    spec: the settings of which the learner was built.
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
  refresh: Callable[..., MetaState]
  spec: Spec

  @property
  def labels(self) -> modules.Labels:
    """The module of every parameter, a pytree of strings."""
    return self.spec.labels

  @property
  def algorithm(self) -> Algorithm:
    """The algorithm: an entry of `sm.FAMILY`, or an Algorithm of your own."""
    return self.spec.algorithm


def check_learner(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is a MetaLearner.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument.

  Raises:
    TypeError: if `value` is something else, such as the function that builds a learner.
  """
  hint = "Build one: sm.sigma_imaml(likelihood, labels)."
  validate.instance(name, value, MetaLearner, "a shrinkmeta.MetaLearner", hint)


def check_state(name: str, value: Any) -> None:
  """Raise TypeError unless `value` is a MetaState.

  Args:
    name: the name of the argument, for the error message.
    value: the value of the argument.

  Raises:
    TypeError: if `value` is something else, such as the parameters alone.
  """
  hint = "Make one: learner.init(params)."
  validate.instance(name, value, MetaState, "a shrinkmeta.MetaState", hint)
