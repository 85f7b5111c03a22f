"""Algorithms that take theta_hat after L inner steps from phi: MAML and its relatives."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from shrinkmeta.algorithms.table import FAMILY
from shrinkmeta.base import MetaLearner
from shrinkmeta.config import Implicit, Inner
from shrinkmeta.devices.batching import Batching
from shrinkmeta.learner.build import make_learner
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.modules import Labels
from shrinkmeta.model.priors import SigmaPrior

PyTree = Any

# Step sizes refer to the objective per example. Steps are in theta if sigma = inf, in z otherwise.
STEPS = Inner(optax.sgd(0.1), steps=5)
UNIT_STEPS = Inner(optax.sgd(1.0), steps=5)  # a step size of 1 in z is one of sigma^2 in theta
LONG = Inner(optax.sgd(0.1), steps=50)
PHI_OPTIMIZER = optax.adam(1e-3)
SIGMA_OPTIMIZER = optax.adam(3e-2)


def maml(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build MAML, which differentiates the validation loss through the inner steps.

      theta_hat = L steps from phi,   phi follows l_PLL = log p(D^val | theta_hat),   sigma = inf

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
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
    ValueError: two settings contradict each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.maml(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.23, 0.45]

  References: Finn, Abbeel, Levine, Model-agnostic meta-learning, arXiv 1703.03400.
  """
  return make_learner(
    FAMILY["maml"],
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


def fomaml(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build first-order MAML, which uses the gradient at theta_hat as the gradient of phi.

      theta_hat = L steps from phi,   d theta_hat / d phi = I by assumption,   sigma = inf

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
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
    ValueError: two settings contradict each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.fomaml(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.23, 0.45]

  References: Finn, Abbeel, Levine, Model-agnostic meta-learning, arXiv 1703.03400, section 5.2.
  """
  return make_learner(
    FAMILY["fomaml"],
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


def reptile(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = LONG,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build Reptile, which moves phi towards the mean of theta_hat over tasks.

      gradient for phi_optimizer = mean_t (phi - theta_hat_t),   sigma = inf

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser of the inner steps, and their number L. Its step size refers to the
      negative log-likelihood per example, -log p(D^train | theta) / N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not need the value of
      the loss.
    log_p_phi: the log density of a prior on phi, phi -> []: see `sm.priors`. Its gradient, divided
      by the number of tasks, is subtracted from the mean of phi - theta_hat: scale it to fit.
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
  >>> learner = sm.reptile(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.92, 1.85]

  References: Nichol, Achiam, Schulman, On first-order meta-learning algorithms, arXiv 1803.02999.
  """
  return make_learner(
    FAMILY["reptile"],
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


def sigma_maml(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  sigma_optimizer: optax.GradientTransformation = SIGMA_OPTIMIZER,
  init_sigma: float | Mapping[str, float] = 0.3,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build MAML with a learned sigma.

      z_hat = L steps in z from 0,   theta_hat = phi + sigma z_hat
      phi and sigma follow l_PLL = log p(D^val | theta_hat)

  The inner steps minimise the negative log joint of theta and D^train. The gradients of phi and
  sigma go through the steps.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser of the inner steps in z, and their number L. Its step size refers to J / N,
      the negative log joint per example. A step of SGD also shrinks z by (step size) / N, so choose
      a step size far below the number of examples N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    sigma_optimizer: the optax optimiser of log sigma^2, Adam(3e-2) by default. It must not use a
      line search.
    init_sigma: the first value of sigma_m: a number for all modules, or {module: number}. A module
      that starts at 0 is frozen and stays frozen.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    log_p_sigma: the log density of a prior on sigma, in nats: see `sm.priors`.
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
  >>> learner = sm.sigma_maml(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.02, 0.04]

  References: Chen et al., Modular Meta-Learning with Shrinkage, arXiv 1909.05557.
  """
  return make_learner(
    FAMILY["sigma_maml"],
    likelihood,
    labels,
    inner=inner,
    implicit=Implicit(),
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    init_sigma=init_sigma,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    batching=batching,
    mesh=mesh,
  )


def meta_sgd(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = UNIT_STEPS,
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  sigma_optimizer: optax.GradientTransformation = SIGMA_OPTIMIZER,
  init_sigma: float | Mapping[str, float] = 0.3,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build MAML with a learned step size for each module.

  Meta-SGD is sigma_maml without the prior. Nothing pulls theta back to phi, and only the small
  number of steps limits overfitting. Let alpha be the step size of `inner`. Plain gradient descent
  in z moves theta by alpha sigma_m^2 times the gradient in theta. So the step size of module m is
  alpha sigma_m^2. Other optimisers scale differently: Adam moves theta by about alpha sigma_m, and
  this step does not depend on the size of the gradient.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser of the inner steps in z, and their number L. The default is plain gradient
      descent. Its step size refers to -log p(D^train | theta) / N.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    sigma_optimizer: the optax optimiser of log sigma^2, Adam(3e-2) by default. It must not use a
      line search.
    init_sigma: the first value of sigma_m: a number for all modules, or {module: number}. A module
      that starts at 0 is frozen and stays frozen.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    log_p_sigma: the log density of a prior on sigma, in nats: see `sm.priors`.
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
  >>> learner = sm.meta_sgd(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.21, 0.41]

  References: Li, Zhou, Chen, Li, Meta-SGD, arXiv 1707.09835 (a step size for each parameter);
    Antoniou, Edwards, Storkey, How to train your MAML, arXiv 1810.09502 (a step size for each
    layer and step).
  """
  return make_learner(
    FAMILY["meta_sgd"],
    likelihood,
    labels,
    inner=inner,
    implicit=Implicit(),
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    init_sigma=init_sigma,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    batching=batching,
    mesh=mesh,
  )
