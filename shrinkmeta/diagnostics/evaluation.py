"""Evaluate a learner on new tasks: the loss of each task, and the mean with its 95 % interval.

T is the number of tasks, N the number of validation examples of one task.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # loads scipy.special, half a second, at its first use

from shrinkmeta.base import MetaLearner, MetaState
from shrinkmeta.checks import scalars, validate
from shrinkmeta.devices.batching import map_tasks
from shrinkmeta.learner.kept import kept
from shrinkmeta.mode.frozen import check_own, merge
from shrinkmeta.model.likelihood import masked_log_prob
from shrinkmeta.model.outputs import check_targets, labels_of
from shrinkmeta.model.tasks import Batch, Task, check_tasks, divisor, num_examples, weights
from shrinkmeta.model.variants import log_prob_with_scale, with_constants

PyTree = Any


class Interval(NamedTuple):
  """A mean over tasks, and its 95 % interval by Student's t.

      mean -+ t(0.975, T - 1) sd / sqrt(T)

  The interval of a mean accuracy is cut off below 0 and above 1. The true mean lies between 0 and
  1, so this does not change the coverage. If all tasks have the same accuracy, both ends equal it:
  such tasks say nothing about the spread between tasks.

  Attributes:
    mean: the mean; NaN without tasks.
    low: the lower end of the interval; NaN with fewer than two tasks.
    high: the upper end of the interval; NaN with fewer than two tasks.

  >>> print(Interval(0.5, 0.45, 0.55))
  0.5 [0.45, 0.55]
  """

  mean: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


class Evaluation(NamedTuple):
  """The result of `evaluate`; `print` shows the means in one line.

  A task failed if its loss is not finite. The mean loss and the mean accuracy leave failed tasks
  out; `share_converged` does not. The printed line gives the number of failed tasks.

  Attributes:
    val_nll: [T] mean validation negative log-likelihood at theta_hat, nats per example.
    accuracy: [T] share of examples whose largest logit is that of the target; NaN in failed tasks.
      None unless the targets are integers [N, ...], the outputs are [N, ..., C], and all targets
      with a weight lie in [0, C).
    converged: [T] bool, whether the inner loop converged. None if no inner step was made.

  >>> found = Evaluation(np.array([0.4, 0.6, np.nan]), None, np.array([True, True, False]))
  >>> print(found)
  3 tasks: loss 0.5 [-0.7706, 1.771] nats per example, converged 67 %, 1 failed
  """

  val_nll: np.ndarray
  accuracy: np.ndarray | None
  converged: np.ndarray | None

  @property
  def loss(self) -> Interval:
    """The mean of val_nll over the tasks that did not fail, nats per example."""
    return _interval(self.val_nll)

  @property
  def mean_accuracy(self) -> Interval | None:
    """The mean accuracy over the tasks that did not fail, or None."""
    return None if self.accuracy is None else _interval(self.accuracy, 0.0, 1.0)

  @property
  def share_converged(self) -> float | None:
    """The share of tasks whose inner loop converged, or None if no inner step was made."""
    return None if self.converged is None else float(np.mean(self.converged))

  @property
  def num_failed(self) -> int:
    """The number of tasks whose loss is not finite."""
    return int(np.sum(~np.isfinite(self.val_nll)))

  def __str__(self) -> str:
    parts = [f"loss {self.loss} nats per example"]
    if self.mean_accuracy is not None:
      parts.append(f"accuracy {self.mean_accuracy}")
    if self.share_converged is not None:
      parts.append(f"converged {100 * self.share_converged:.0f} %")
    if self.num_failed:
      parts.append(f"{self.num_failed} failed")
    return f"{len(self.val_nll)} tasks: {', '.join(parts)}"


class Difference(NamedTuple):
  """The result of `paired`: a minus b, task by task; `print` shows it in one line.

  Attributes:
    loss: the mean difference of val_nll, nats per example. Below 0, a is better.
    accuracy: the mean difference of the accuracy, or None if a or b has none.
    num_tasks: the number of tasks that failed neither in a nor in b.
  """

  loss: Interval
  accuracy: Interval | None
  num_tasks: int

  def __str__(self) -> str:
    accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy}"
    return f"{self.num_tasks} tasks, a - b: loss {self.loss} nats per example{accuracy}"


def evaluate(
  learner: MetaLearner,
  state: MetaState,
  tasks: Task,
  *,
  steps: int | None = None,
  key: jax.Array | None = None,
) -> Evaluation:
  """Adapt to the training data of every task and measure the loss on its validation data.

      val_nll_t = -1/N sum_n log p(y_tn | x_tn, theta_hat_t)

  The program compiles at the first call with a learner, a number `steps` and shapes of tasks. Later
  calls with the same three reuse it, as long as the learner exists.

  Args:
    learner: the learner. Tasks run with its batching and mesh.
    state: a state of this learner.
    tasks: T tasks, leaves [T, N, ...], with validation data.
    steps: replaces the learner's own number of inner steps. 0 measures the loss at phi.
    key: a random key, needed only with Inner.batch_size; consumed.

  Returns:
    An Evaluation; `paired` compares two of them.

  Raises:
    TypeError, ValueError: an argument is wrong; the message names it. So is a target that is out of
      range, such as a label of a class that predict has no logit for.

  Example:
    >>> import optax
    >>> import shrinkmeta as sm
    >>> linear = sm.gaussian(lambda theta, x: x * theta["w"])
    >>> learner = sm.sigma_imaml(linear, {"w": "w"}, inner=sm.Inner(optax.sgd(0.1), 100))
    >>> x = jnp.ones((3, 4))
    >>> tasks = sm.Task(sm.Batch(x, 0.0 * x), sm.Batch(x, x))
    >>> print(evaluate(learner, learner.init({"w": 0.0}), tasks))
    3 tasks: loss 1.419 [1.419, 1.419] nats per example, converged 100 %
  """
  wanted = "a learner, as shrinkmeta.sigma_imaml(...) returns it"
  validate.instance("learner", learner, MetaLearner, wanted)
  validate.instance("state", state, MetaState, "a MetaState, as learner.init(params) returns it")
  steps = None if steps is None else validate.integer("steps", steps, least=0)
  scalars.key("key", key)
  check_tasks(tasks, needs_val=False)
  if tasks.val is None:
    raise ValueError("tasks.val is None. evaluate needs validation examples: split the data.")
  check_own(learner.spec, state.log_sigma2)
  if jax.process_count() > 1:
    raise ValueError("evaluate reads the losses of all tasks: call it in a run of one process.")
  val_nll, accuracy, converged = jax.device_get(
    jax.jit(kept(learner, _program), static_argnames="steps")(state, tasks, key, steps=steps)
  )
  # A program knows no value of a target, so a wrong one only makes the loss of its task infinite.
  if validate.readable(val_nll) and not np.all(np.isfinite(val_nll)):
    likelihood = with_constants(learner.spec.likelihood, state.constants)
    check_targets(likelihood, "tasks", tasks, state.phi)
  if accuracy is not None:
    sound = np.isfinite(val_nll)
    counts = np.isnan(accuracy[sound]).any()  # or other integers that are no class
    accuracy = None if counts else np.where(sound, accuracy, np.nan)
  made = learner.spec.inner.steps if steps is None else steps
  return Evaluation(val_nll, accuracy, converged if made else None)


def paired(a: Evaluation, b: Evaluation) -> Difference:
  """Compare two evaluations on the same tasks by their differences, task by task.

  If the same tasks are hard for both, the interval of the differences is narrower than the
  intervals of a and b.

  Args:
    a: an Evaluation of T tasks.
    b: another, of the same T tasks in the same order.

  Returns:
    The mean of a minus b, with its 95 % interval.

  Raises:
    TypeError: an argument is not an Evaluation.
    ValueError: a and b differ in the number of tasks.

  Example:
    >>> yes = np.ones(3, bool)
    >>> a = Evaluation(np.array([1.0, 2.0, 3.0]), None, yes)
    >>> b = Evaluation(np.array([1.5, 2.4, 3.6]), None, yes)
    >>> print(paired(a, b))
    3 tasks, a - b: loss -0.5 [-0.7484, -0.2516] nats per example
  """
  for name, value in (("a", a), ("b", b)):
    validate.instance(name, value, Evaluation, "an Evaluation, as shrinkmeta.evaluate returns it")
  if len(a.val_nll) != len(b.val_nll):
    raise ValueError(
      f"a has {len(a.val_nll)} tasks and b has {len(b.val_nll)}: evaluate both on the same tasks."
    )
  loss = a.val_nll - b.val_nll
  sound = int(np.isfinite(loss).sum())
  if a.accuracy is None or b.accuracy is None:
    return Difference(_interval(loss), None, sound)
  return Difference(_interval(loss), _interval(a.accuracy - b.accuracy, -1.0, 1.0), sound)


def _interval(values: np.ndarray, least: float = -np.inf, most: float = np.inf) -> Interval:
  """Return the mean of the finite values among `values` [T], and its 95 % interval.

  The ends of the interval are cut at `least` and `most`, between which the mean is known to lie.
  """
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  if values.size == 0:
    return Interval(np.nan, np.nan, np.nan)
  mean, half = float(values.mean()), np.nan
  if values.size > 1:
    spread = values.std(ddof=1) / values.size**0.5
    half = float(scipy.special.stdtrit(values.size - 1, 0.975) * spread)
  low, high = np.clip([mean - half, mean + half], least, most)
  return Interval(mean, float(low), float(high))


def _program(learner: MetaLearner) -> Callable[..., Any]:
  """Build (state, tasks, key, steps) -> (val_nll [T], accuracy [T] or None, converged [T])."""
  spec = learner.spec

  def one(shared: tuple[PyTree, PyTree], item: tuple[PyTree, Batch]) -> tuple[tuple[()], Any]:
    (phi, constants), (part, batch) = shared, item
    predict = with_constants(spec.likelihood, constants).predict
    outputs = predict(merge(part, phi), batch.inputs)
    log_prob = masked_log_prob(spec.likelihood, outputs, batch)
    nll = -log_prob / divisor(num_examples(batch, log_prob.dtype))
    # The outputs of a normal density with a scale are [N, ..., 2], but no logits.
    scaled = spec.likelihood.log_prob is log_prob_with_scale
    return (), (nll, None if scaled else _accuracy(outputs, batch))

  def program(state: MetaState, tasks: Task, key: Any, steps: int | None) -> Any:
    thetas, info = learner.adapt_tasks(state, tasks.train, steps, key)
    items = (thetas, tasks.val)
    shared = (state.phi, state.constants)
    nll, accuracy = map_tasks(one, shared, items, spec.batching, spec.mesh, None)[1]
    return nll, accuracy, info.converged

  return program


def _accuracy(outputs: Any, batch: Batch) -> jax.Array | None:
  """Return the share [] of examples whose largest logit is that of the target.

  Return None if the outputs are not logits, and NaN if a target is no class: see
  `Evaluation.accuracy`.
  """
  targets = batch.targets
  arrays = isinstance(targets, jax.Array) and isinstance(outputs, jax.Array)
  if not arrays or not jnp.issubdtype(targets.dtype, jnp.integer):
    return None
  if outputs.shape[:-1] != targets.shape:
    return None
  labels = labels_of(targets)
  by_example = lambda x: x.reshape(x.shape[0], -1)
  hits = jnp.mean(by_example(jnp.argmax(outputs, -1) == labels), -1)
  classes = jnp.all(by_example((labels >= 0) & (labels < outputs.shape[-1])), -1)
  weight = weights(batch, hits.dtype)
  share = jnp.sum(weight * hits) / divisor(jnp.sum(weight))
  return jnp.where(jnp.all(classes | (weight == 0)), share, jnp.nan)
