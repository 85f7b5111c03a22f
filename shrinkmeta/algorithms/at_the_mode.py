"""Algorithms that take theta_hat at the posterior mode and differentiate it implicitly."""

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
from shrinkmeta.quasi_newton import lbfgs

PyTree = Any

MODE = Inner(lbfgs(), steps=50, tol=1e-4)
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
  """Build implicit MAML, which learns phi at a fixed sigma.

      theta_hat = argmax log p(D^train | theta) - sum_m |theta_m - phi_m|^2 / (2 sigma_m^2)
      phi follows l_PLL = log p(D^val | theta_hat)

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser that finds the mode, its largest number of steps, and the gradient norm at
      which it stops, in nats per example: see `sm.Inner`.
    implicit: how the linear system of the implicit gradient is solved: see `sm.Implicit`.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    init_sigma: the fixed value of sigma_m: a number for all modules, or {module: number}. The
      value 0 freezes a module.
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
  """Build implicit MAML with a learned sigma.

  phi and sigma follow the validation log-likelihood at theta_hat. The implicit function theorem
  gives both gradients from the solution w of one linear system:

      K w = s g,   K = I + s C s
      d/d phi = g - C (s w),   d/d log sigma_m^2 = <w, z>, summed over the entries of module m

  Here theta_hat = phi + s z, and s has the value sigma_m at every parameter of module m. g is the
  gradient of the validation loss at theta_hat. C is the curvature of -log p(D^train | theta) at
  theta_hat. In a module with sigma_m = inf, s is 1 and the identity I is replaced by 0.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser that finds the mode, its largest number of steps, and the gradient norm at
      which it stops, in nats per example: see `sm.Inner`.
    implicit: how the linear system of the implicit gradient is solved: see `sm.Implicit`.
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
  """Build Reptile with a learned sigma.

      phi follows l_MAP = log p(theta_hat, D^train | phi, sigma),
      sigma follows l_PLL = log p(D^val | theta_hat)

  theta_hat and the optimum phi_hat both depend on sigma. `sigma_gradient` chooses the dependences
  that sigma's gradient includes. "joint" includes theta_hat and phi_hat, by one linear solve over
  all tasks. "per_task", the default, includes theta_hat and holds phi fixed. "diagonal" does the
  same and leaves out the curvature of the likelihood. The table compares the three gradients on 25
  sinusoid tasks, with phi at its optimum. "Signs right" counts the modules in which a gradient has
  the sign of "joint". The last column is the time of one meta-gradient. The table comes from
  experiments/benchmarks, --study=sigma_gradient.

  ========  ===============  ============  ===========  =======
  gradient  cosine to joint  norm / joint  signs right  seconds
  ========  ===============  ============  ===========  =======
  joint     1                1             3 of 3       0.43
  per_task  0.86             1.8           2 of 3       0.030
  diagonal  0.94             2.9           1 of 3       0.025
  ========  ===============  ============  ===========  =======

  "joint" is exact only if phi is at its optimum for the current sigma.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser that finds the mode, its largest number of steps, and the gradient norm at
      which it stops, in nats per example: see `sm.Inner`.
    implicit: how the linear system of sigma's gradient is solved: see `sm.Implicit`. "joint" needs
      solver="cg" and batch_size=None. "diagonal" solves no system.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    sigma_optimizer: the optax optimiser of log sigma^2, Adam(3e-2) by default. It must not use a
      line search.
    init_sigma: the first value of sigma_m: a number for all modules, or {module: number}. A module
      that starts at 0 is frozen and stays frozen.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    log_p_sigma: the log density of a prior on sigma, in nats: see `sm.priors`.
    sigma_gradient: "joint", "per_task" or "diagonal", as described above.
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
  """Build empirical Bayes, which fits phi and sigma to the log evidence of the training data.

      log evidence = log p(D | theta_hat) - |z_hat|^2 / 2 - log det(I + s C s) / 2

  Here theta_hat = phi + s z_hat is the mode, and s has the value sigma_m at every parameter of
  module m. C is the Gauss-Newton curvature of -log p(D | theta) at theta_hat. The formula is exact
  for linear-Gaussian models. For other models it is Laplace's approximation. Task.val may be None.
  Put parameters of the likelihood, such as the scale of `sm.gaussian_with_scale`, into a module
  with init_sigma 0.

  Args:
    likelihood: the model of the data of one task, for example `sm.gaussian(predict)`.
    labels: the module of every parameter, for example `sm.by_layer(params)`.
    inner: the optimiser that finds the mode, its largest number of steps, and the gradient norm at
      which it stops, in nats per example: see `sm.Inner`.
    implicit: how the linear system of the implicit gradient is solved: see `sm.Implicit`. Its
      batch_size must be None.
    phi_optimizer: the optax optimiser of phi, Adam(1e-3) by default. It must not use a line search.
    sigma_optimizer: the optax optimiser of log sigma^2, Adam(3e-2) by default. It must not use a
      line search.
    init_sigma: the first value of sigma_m: a number for all modules, or {module: number}. A module
      that starts at 0 is frozen and stays frozen.
    log_p_phi: the log density of a prior on phi, phi -> [] in nats: see `sm.priors`.
    log_p_sigma: the log density of a prior on sigma, in nats: see `sm.priors`.
    log_det: how log det(I + s C s) is computed: see `sm.LogDet`. The method "lanczos" draws random
      vectors, so `update` then needs a key.
    restricted: the modules of phi that are integrated out together with theta (REML): see
      `sm.restriction`.
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
