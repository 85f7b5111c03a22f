"""Algorithms whose theta_hat is L steps from phi: MAML and its relatives."""

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

# Step sizes are for the objective per example, in theta where sigma = inf, else in z.
STEPS = Inner(optax.sgd(0.1), steps=5)
UNIT_STEPS = Inner(optax.sgd(1.0), steps=5)  # of sigma^2 each, in theta
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
  """Build MAML: phi follows the validation loss after L steps, differentiated through the steps.

      theta_hat = L steps from phi,   phi follows l_PLL = log p(D^val | theta_hat),   sigma = inf

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how theta_hat is found: L steps, whose rate is for the objective per example.
    phi_optimizer: any optax optimiser, for phi.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

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
  """Build first-order MAML: phi follows the gradient of the validation loss at theta_hat.

      theta_hat = L steps from phi,   d theta_hat / d phi = I,   sigma = inf

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how theta_hat is found: L steps, whose rate is for the objective per example.
    phi_optimizer: any optax optimiser, for phi.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

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
  """Build Reptile: the mean over tasks of phi - theta_hat takes the place of phi's gradient.

      gradient handed to phi_optimizer = mean_t (phi - theta_hat_t),   sigma = inf

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how theta_hat is found: L steps, whose rate is for the objective per example.
    phi_optimizer: any optax optimiser, for phi.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

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
  """Build MAML with sigma learned: L steps in z on the log joint, differentiated through the steps.

      theta_hat = phi + sigma z_hat,   phi and sigma follow l_PLL = log p(D^val | theta_hat)

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how z_hat is found: L steps in z on J / N, the objective per example.
    phi_optimizer: any optax optimiser, for phi.
    sigma_optimizer: any optax optimiser, for log sigma^2.
    init_sigma: sigma_m at the start: a number for all modules, or {module: number}. Modules that
      start at 0 are frozen for good.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    log_p_sigma: a prior on sigma: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

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
  """Build MAML with a learned step size for every module: sigma_m^2 times the rate of `inner`.

  It is sigma_maml without the prior: nothing pulls theta back to phi, and only the small number of
  steps limits overfitting. With plain gradient descent of rate a in z, theta moves by a sigma_m^2
  times its gradient. This holds for no other optimiser: with Adam the step in theta is about
  a sigma_m, whatever the gradient's size.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how z_hat is found: L steps of gradient descent in z.
    phi_optimizer: any optax optimiser, for phi.
    sigma_optimizer: any optax optimiser, for log sigma^2.
    init_sigma: sigma_m at the start: a number for all modules, or {module: number}. Modules that
      start at 0 are frozen for good.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    log_p_sigma: a prior on sigma: see `sm.priors`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

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
    Antoniou, Edwards, Storkey, How to train your MAML, arXiv 1810.09502 (for each layer and step).
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
