"""What a learner is: pure functions, the state that they hand on and what they report."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from shrinkmeta.curvature.solvers import SolveInfo
from shrinkmeta.gradients.implicit import MetaParams
from shrinkmeta.gradients.per_task import Algorithm, Spec
from shrinkmeta.gradients.total import PerTask, Sums
from shrinkmeta.mode.optimise import InnerInfo
from shrinkmeta.mode.warm_start import WarmStart
from shrinkmeta.model import modules

PyTree = Any


class OptState(NamedTuple):
  """The optimisers' states."""

  phi: optax.OptState
  log_sigma2: optax.OptState


class MetaState(NamedTuple):
  """All that the next step needs."""

  phi: PyTree
  log_sigma2: dict[str, jax.Array]  # {module: []}; inf: no prior, -inf: frozen
  opt_state: OptState
  step: jax.Array  # [] int32


class Metrics(NamedTuple):
  """What people read. T is the number of tasks; a failed task counts in no mean."""

  loss: jax.Array  # [] mean over tasks of val_nll; nan without validation data
  phi_loss: jax.Array  # [] what phi follows: loss; training objective; -log evidence; nan: reptile
  val_nll: jax.Array  # [T] mean validation negative log-likelihood of an example, nats
  failed: jax.Array  # [T] bool: not finite, or no example; left out of this step
  num_failed: jax.Array  # [] int32
  num_sound: jax.Array  # [] int32, the others
  inner: InnerInfo  # [T] each
  solve: SolveInfo | None  # [T] each; None where no linear system is solved
  mean_inner: InnerInfo  # [] each, over sound tasks
  mean_solve: SolveInfo | None  # [] each; None too where one system joins all tasks
  phi_grad_norm: jax.Array  # []
  sigma_grad: dict[str, jax.Array]  # {module: []} d meta-loss / d log sigma_m^2
  warm: WarmStart | None  # where these tasks may begin next time; None unless a start was given


class MetaLearner(NamedTuple):
  """An algorithm as pure functions; `jax.jit` them at the edge.

  init(params) -> MetaState
  update(state, tasks, key=None, warm=None) -> (MetaState, Metrics)
  adapt(state, batch, steps=None, key=None) -> (theta, InnerInfo), for one task
  meta_gradient(state, tasks, key=None, warm=None) -> (MetaParams, Metrics)
  adapt_tasks(state, batches, steps=None, key=None) -> (thetas, InnerInfo), for T tasks
  no_start(state, count) -> WarmStart, of `count` tasks not seen before
  sums(state, tasks, key=None, warm=None, first=0) -> (Sums, PerTask)
  apply(state, sums, per_task) -> (MetaState, Metrics)

  `key` is needed with a batch_size, of Inner or Implicit, or a stochastic log-determinant only.
  `steps` replaces the learner's own: an int, or an increasing tuple [S] that records one run, so
  that theta and info lead with [S]. `warm` starts recurring tasks of a row with a mode where they
  ended before: see `warm.py`.

  `adapt_tasks` runs tasks as `update` does, by the learner's batching and mesh. Frozen modules are
  not copied T times: their leaves of `thetas` are None, and `sm.merge(thetas, state.phi)` is whole.

  `update` is `apply(state, *sums(state, tasks))`, for all tasks of a meta-step at once. Where they
  do not fit, `sums` takes micro-batches of them, `first` being the number of a micro-batch's first
  task: the Sums add up leaf by leaf, the PerTasks are concatenated. `fit` does so.
  """

  init: Callable[[PyTree], MetaState]
  update: Callable[..., tuple[MetaState, Metrics]]
  adapt: Callable[..., tuple[PyTree, InnerInfo]]
  meta_gradient: Callable[..., tuple[MetaParams, Metrics]]
  adapt_tasks: Callable[..., tuple[PyTree, InnerInfo]]
  no_start: Callable[[MetaState, int], WarmStart]
  sums: Callable[..., tuple[Sums, PerTask]]
  apply: Callable[[MetaState, Sums, PerTask], tuple[MetaState, Metrics]]
  spec: Spec

  @property
  def labels(self) -> modules.Labels:
    """The module of every parameter."""
    return self.spec.labels

  @property
  def algorithm(self) -> Algorithm:
    """The line of the table."""
    return self.spec.algorithm
