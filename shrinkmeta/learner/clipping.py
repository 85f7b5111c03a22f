"""Limit how much one task counts in an update."""

import math

from shrinkmeta.base import MetaLearner, check_learner
from shrinkmeta.checks import scalars
from shrinkmeta.learner.learner import learner_of


def clip_tasks(learner: MetaLearner, norm: float) -> MetaLearner:
  """Return the learner whose updates limit the norm of the gradient of each task.

      g = mean over tasks t of  min(1, norm / |g_t|) g_t

  g_t is the gradient of the validation loss of task t with respect to phi and, if it is learned,
  log sigma^2. The derivative of many inner steps is a product of as many matrices, and in a few
  tasks it can be twenty times as large as in the others. Such tasks then decide the direction of
  an update, which is noise. `optax.clip_by_global_norm` comes too late: it clips the mean.
  `metrics.task_grad_norm` has |g_t| of every task before it is clipped, [T]. If the largest are ten
  times their median, begin with the median. Well below it all tasks count alike, and only the
  directions of their gradients matter.

  Clipped gradients are the derivative of no loss. Tasks with large gradients count less, so sigma
  and phi settle elsewhere (docs/limits.md, "Clipped tasks"). This function takes only learners in
  which phi follows the validation loss. It refuses `sm.sigma_reptile`, `sm.empirical_bayes`,
  `sm.fine_tuning` and `sm.reptile`.

  Args:
    learner: the learner, for example `sm.maml(...)`. Its states stay valid.
    norm: the largest norm of the gradient of one task, in nats per example and unit of phi.

  Returns:
    the MetaLearner. `adapt` is the same. A function of `learner` that you replaced is not kept:
    replace it in the result.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: `norm` is not positive and finite, or phi of this learner does not follow the
      validation loss.

  >>> import jax.numpy as jnp
  >>> import optax
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: theta["level"] + 0 * x)
  >>> learner = sm.maml(likelihood, {"level": "level"}, phi_optimizer=optax.sgd(1.0))
  >>> y = jnp.array([[1.0], [1.0], [-100.0]])  # three tasks of one example, one far away
  >>> tasks = sm.Task(sm.Batch(y, y), sm.Batch(y, y))
  >>> state = learner.init({"level": 0.0})
  >>> for each in (learner, sm.clip_tasks(learner, 0.35)):
  ...   after, metrics = each.update(state, tasks)
  ...   print(round(float(after.phi["level"]), 2), metrics.task_grad_norm.round(2))
  -11.39 [ 0.35  0.35 34.87]
  0.12 [ 0.35  0.35 34.87]

  References: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
  ICML 2013, section 3.2, for the norm; there one gradient is clipped, here that of every task.
  """
  check_learner("learner", learner)
  limit, algorithm = scalars.number("norm", norm), learner.algorithm
  if not 0 < limit < math.inf:
    raise ValueError(f"norm must be positive and finite; got {norm}.")
  if algorithm.phi != "predictive":
    raise ValueError(
      "clip_tasks takes learners in which phi follows the validation loss, such as sm.maml and "
      f"sm.sigma_imaml; this one has {algorithm}. Limit the step of its optimisers instead: "
      "optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))."
    )
  return learner_of(learner.spec._replace(clip=limit))
