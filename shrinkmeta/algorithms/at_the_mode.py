"""Algorithms whose theta_hat is the posterior mode, differentiated implicitly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from shrinkmeta.algorithms.table import FAMILY
from shrinkmeta.base import MetaLearner
from shrinkmeta.config import Implicit, Inner, LogDet, SigmaGradient
from shrinkmeta.devices.batching import Batching
from shrinkmeta.learner.build import make_learner
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.modules import Labels
from shrinkmeta.model.priors import SigmaPrior

PyTree = Any

MODE = Inner(optax.lbfgs(), steps=50, tol=1e-4)
PHI_OPTIMIZER = optax.adam(1e-3)
SIGMA_OPTIMIZER = optax.adam(3e-2)


def imaml(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = MODE,
  implicit: Implicit = Implicit(),
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  init_sigma: float | Mapping[str, float] = 0.3,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build implicit MAML: sigma is fixed, and phi follows the validation likelihood.

      theta_hat = argmax log p(D | theta) - sum_m |theta_m - phi_m|^2 / (2 sigma_m^2)

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how the mode is found: an optimiser, the largest number of steps, and a tolerance.
    implicit: how the gradient of theta_hat is found.
    phi_optimizer: any optax optimiser, for phi.
    init_sigma: sigma_m, which stays fixed: a number for all modules, or {module: number}. 0 freezes
      a module.
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
  >>> learner = sm.imaml(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.08, 0.17]

  References: Rajeswaran, Finn, Kakade, Levine, Meta-learning with implicit gradients, arXiv
    1909.04630.
  """
  return make_learner(
    FAMILY["imaml"],
    likelihood,
    labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=optax.set_to_zero(),
    init_sigma=init_sigma,
    log_p_phi=log_p_phi,
    batching=batching,
    mesh=mesh,
  )


def sigma_imaml(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = MODE,
  implicit: Implicit = Implicit(),
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  sigma_optimizer: optax.GradientTransformation = SIGMA_OPTIMIZER,
  init_sigma: float | Mapping[str, float] = 0.3,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build implicit MAML with sigma learned: phi and sigma follow the validation likelihood.

  Both gradients go implicitly through the posterior mode. With K w = s g at the mode,

      d/d phi = g - C (s w),   d/d log sigma_m^2 = <w, z> over module m.

  Here theta_hat = phi + s z, and s is sigma, spread over the parameters. g is the gradient of the
  validation loss and C the curvature of -log p(D | theta), both at theta_hat. K = I + s C s.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how the mode is found: an optimiser, the largest number of steps, and a tolerance.
    implicit: how the gradient of theta_hat is found.
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
  >>> learner = sm.sigma_imaml(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.08, 0.17]

  References: Chen et al., Modular Meta-Learning with Shrinkage, arXiv 1909.05557.
  """
  return make_learner(
    FAMILY["sigma_imaml"],
    likelihood,
    labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    init_sigma=init_sigma,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    batching=batching,
    mesh=mesh,
  )


def sigma_reptile(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = MODE,
  implicit: Implicit = Implicit(),
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  sigma_optimizer: optax.GradientTransformation = SIGMA_OPTIMIZER,
  init_sigma: float | Mapping[str, float] = 0.3,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  sigma_gradient: SigmaGradient = "per_task",
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build Reptile with sigma learned: phi follows the training joint, sigma the validation loss.

      phi follows l_MAP = log p(theta_hat, D^train | phi, sigma),
      sigma follows l_PLL = log p(D^val | theta_hat)

  `sigma_gradient` chooses what sigma's gradient goes through. "joint": theta_hat and phi_hat, by
  one linear solve over all tasks. "per_task", the default: theta_hat, at fixed phi. "diagonal":
  theta_hat at fixed phi, without the curvature of the likelihood. Measured on 25 sinusoid tasks
  with a network, phi at its optimum (experiments/benchmarks, --study=sigma_gradient); the seconds
  are those of one meta-gradient:

  |          | cosine to joint | norm / joint | signs right | seconds |
  |----------|-----------------|--------------|-------------|---------|
  | joint    | 1               | 1            | 3 of 3      | 0.43    |
  | per_task | 0.86            | 1.8          | 2 of 3      | 0.030   |
  | diagonal | 0.94            | 2.9          | 1 of 3      | 0.025   |

  "joint" is exact only where phi has reached its optimum for the present sigma.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how the mode is found: an optimiser, the largest number of steps, and a tolerance.
    implicit: how the gradient of theta_hat is found.
    phi_optimizer: any optax optimiser, for phi.
    sigma_optimizer: any optax optimiser, for log sigma^2.
    init_sigma: sigma_m at the start: a number for all modules, or {module: number}. Modules that
      start at 0 are frozen for good.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    log_p_sigma: a prior on sigma: see `sm.priors`.
    sigma_gradient: "joint", "per_task" or "diagonal": see above.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.sigma_reptile(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.08, 0.17]

  References: Chen et al., Modular Meta-Learning with Shrinkage, arXiv 1909.05557.
  """
  return make_learner(
    FAMILY["sigma_reptile"],
    likelihood,
    labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    init_sigma=init_sigma,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    sigma_gradient=sigma_gradient,
    batching=batching,
    mesh=mesh,
  )


def empirical_bayes(
  likelihood: Likelihood,
  labels: Labels,
  *,
  inner: Inner = MODE,
  implicit: Implicit = Implicit(),
  phi_optimizer: optax.GradientTransformation = PHI_OPTIMIZER,
  sigma_optimizer: optax.GradientTransformation = SIGMA_OPTIMIZER,
  init_sigma: float | Mapping[str, float] = 0.3,
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  log_det: LogDet = LogDet(),
  restricted: Sequence[str] = (),
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build empirical Bayes: phi and sigma follow the log evidence of the training data.

      log p(D | theta_hat) - |z_hat|^2 / 2 - log det(I + s C s) / 2

  Here theta_hat = phi + s z_hat is the mode, s is sigma, spread over the parameters, and C is the
  Gauss-Newton curvature of -log p(D | theta). The formula is exact for linear-Gaussian models, and
  Laplace's approximation otherwise. Task.val may be None. Give parameters of the likelihood, such
  as the scale of `sm.gaussian_with_scale`, a module with init_sigma 0.

  Args:
    likelihood: predict and log_prob.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: how the mode is found: an optimiser, the largest number of steps, and a tolerance.
    implicit: how the gradient of theta_hat is found.
    phi_optimizer: any optax optimiser, for phi.
    sigma_optimizer: any optax optimiser, for log sigma^2.
    init_sigma: sigma_m at the start: a number for all modules, or {module: number}. Modules that
      start at 0 are frozen for good.
    log_p_phi: a log density phi -> [], a prior on phi: see `sm.priors`.
    log_p_sigma: a prior on sigma: see `sm.priors`.
    log_det: how the determinant is found; a stochastic one needs the key of `update`.
    restricted: modules of phi to integrate out too (REML): see `sm.restriction`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`.
    mesh: the devices that the tasks are split over: see `sm.task_mesh`.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: arguments of another type, or settings that do not fit each other.

  >>> import jax.numpy as jnp
  >>> import shrinkmeta as sm
  >>> likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  >>> learner = sm.empirical_bayes(likelihood, {"w": "w"})
  >>> theta, info = learner.adapt(
  ...   learner.init({"w": jnp.zeros(2)}), sm.Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
  ... )
  >>> [round(float(v), 2) for v in theta["w"]]
  [0.08, 0.17]

  References: MacKay, A practical Bayesian framework for backpropagation networks, 1992; Lindley,
    Smith, Bayes estimates for the linear model, 1972.
  """
  return make_learner(
    FAMILY["empirical_bayes"],
    likelihood,
    labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    init_sigma=init_sigma,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    log_det=log_det,
    restricted=restricted,
    batching=batching,
    mesh=mesh,
  )
