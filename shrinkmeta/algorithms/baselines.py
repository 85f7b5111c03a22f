"""Baselines: task-specific modules that the user names, and training without adaptation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from shrinkmeta.algorithms.table import FAMILY
from shrinkmeta.base import MetaLearner
from shrinkmeta.checks import validate
from shrinkmeta.config import Implicit, Inner
from shrinkmeta.devices.batching import Batching
from shrinkmeta.learner.build import make_learner
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.modules import Labels

PyTree = Any

STEPS = Inner(optax.sgd(0.1), steps=5)
LONG = Inner(optax.sgd(0.1), steps=50)
PHI_OPTIMIZER = optax.adam(1e-3)


def hand_picked(
  likelihood: Likelihood,
  labels: Labels,
  *,
  task_specific: Sequence[str],
  inner: Inner = STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build MAML that adapts only the modules in `task_specific`.

      sigma_m = inf for the modules in `task_specific`, 0 for the others

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    task_specific: the modules to adapt. The other modules are frozen: they stay at phi.
    inner: the optimiser of the inner steps, and their number L. Its step size refers to the
      negative log-likelihood per example, -log p(D^train | theta) / N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices over which the tasks are split, or None: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: `task_specific` has an unknown name, or two settings contradict each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.hand_picked(likelihood, {"w": "w"}, task_specific=("w",))
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.23, 0.45]
  """
  return make_learner(
    FAMILY["hand_picked"],
    likelihood,
    labels,
    inner=inner,
    implicit=Implicit(),
    phi_optimizer=phi_optimizer,
    sigma_optimizer=optax.set_to_zero(),
    init_sigma=_mask(labels, task_specific),
    log_p_phi=log_p_phi,
    batching=batching,
    mesh=mesh,
  )


def anil(
  likelihood: Likelihood,
  labels: Labels,
  *,
  head: str | None = None,
  inner: Inner = STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build ANIL (almost no inner loop), which is MAML that adapts only the head.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    head: the module of the output layer. None takes the module called "head". If no module has this
      name, None takes the last module by path and logs a warning.
    inner: the optimiser of the inner steps, and their number L. Its step size refers to the
      negative log-likelihood per example, -log p(D^train | theta) / N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices over which the tasks are split, or None: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: no module is called `head`, or two settings contradict each other.

  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["body"] * theta["head"])
  >>> learner = sm.anil(likelihood, {"body": "body", "head": "head"})
  >>> learner.spec.sigma
  {'body': 0.0, 'head': inf}

  References: Raghu, Raghu, Bengio, Vinyals, Rapid learning or feature reuse?, arXiv 1909.09157.
  """
  head = _head("anil", labels, head)
  return hand_picked(
    likelihood,
    labels,
    task_specific=(head,),
    inner=inner,
    phi_optimizer=phi_optimizer,
    log_p_phi=log_p_phi,
    batching=batching,
    mesh=mesh,
  )


def boil(
  likelihood: Likelihood,
  labels: Labels,
  *,
  head: str | None = None,
  inner: Inner = STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build BOIL (body only update in inner loop), which is MAML that adapts all but the head.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    head: the module of the output layer. None takes the module called "head". If no module has this
      name, None takes the last module by path and logs a warning.
    inner: the optimiser of the inner steps, and their number L. Its step size refers to the
      negative log-likelihood per example, -log p(D^train | theta) / N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices over which the tasks are split, or None: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: no module is called `head`, or two settings contradict each other.

  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["body"] * theta["head"])
  >>> learner = sm.boil(likelihood, {"body": "body", "head": "head"})
  >>> learner.spec.sigma
  {'body': inf, 'head': 0.0}

  References: Oh, Yoo, Kim, Yun, BOIL, arXiv 2008.08882.
  """
  head = _head("boil", labels, head)
  return hand_picked(
    likelihood,
    labels,
    task_specific=[name for name in modules.names(labels) if name != head],
    inner=inner,
    phi_optimizer=phi_optimizer,
    log_p_phi=log_p_phi,
    batching=batching,
    mesh=mesh,
  )


def fine_tuning(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = LONG,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build fine-tuning, which trains phi without adaptation and adapts all modules of a new task.

      in training: phi follows mean_t log p(D_t | phi) / N_t
      on a new task: theta_hat = L steps from phi, in all modules

  D_t are the N_t examples of task t, training and validation examples together.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser of the inner steps on a new task, and their number L. Its step size refers
      to the negative log-likelihood per example, -log p(D^train | theta) / N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices over which the tasks are split, or None: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: two settings contradict each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.fine_tuning(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.92, 1.85]
  """
  return make_learner(
    FAMILY["fine_tuning"],
    likelihood,
    labels,
    inner=inner,
    implicit=Implicit(),
    phi_optimizer=phi_optimizer,
    sigma_optimizer=optax.set_to_zero(),
    init_sigma=math.inf,
    log_p_phi=log_p_phi,
    batching=batching,
    mesh=mesh,
  )


def no_adaptation(
  likelihood: Likelihood,
  labels: Labels,
  *,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build the baseline that fits phi to the data of all tasks and never adapts it.

      phi follows mean_t log p(D_t | phi) / N_t,   theta_hat = phi

  D_t are the N_t examples of task t, training and validation examples together.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices over which the tasks are split, or None: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: two settings contradict each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.no_adaptation(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.0, 0.0]
  """
  return make_learner(
    FAMILY["no_adaptation"],
    likelihood,
    labels,
    inner=Inner(optax.sgd(0.1), steps=5),  # without effect: every module is frozen
    implicit=Implicit(),
    phi_optimizer=phi_optimizer,
    sigma_optimizer=optax.set_to_zero(),
    init_sigma=_mask(labels, ()),
    log_p_phi=log_p_phi,
    batching=batching,
    mesh=mesh,
  )


def _mask(labels: Labels, task_specific: Sequence[str]) -> dict[str, float]:
  """Return {module: sigma}, with inf for the modules in `task_specific` and 0 for the others."""
  moving = modules.module_names("task_specific", task_specific, labels)
  return {name: math.inf if name in moving else 0.0 for name in modules.names(labels)}


def _head(algorithm: str, labels: Labels, head: str | None) -> str:
  """Return the module of the output layer: `head`, the module "head", or the last one by path.

  The last module by path is the output layer in some networks only, so a warning names it.
  """
  known = modules.names(labels)
  if head is not None:
    validate.instance("head", head, str, "a module, or None")
    if head not in known:
      raise ValueError(f"head is {head!r}, which is no module; the modules are {known}.")
    return head
  if "head" in known:
    return "head"
  logging.warning(
    "%s takes %r for the head, the last module by path: if it is another, say head=...",
    algorithm,
    known[-1],
  )
  return known[-1]
