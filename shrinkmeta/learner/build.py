"""Build the learner of an algorithm from its settings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from shrinkmeta.arguments import check_types
from shrinkmeta.base import MetaLearner
from shrinkmeta.config import Algorithm, Implicit, Inner, LogDet, SigmaGradient, Spec, derive
from shrinkmeta.devices.batching import Batching
from shrinkmeta.learner.learner import learner_of
from shrinkmeta.learner.sigma import sigma_by_module
from shrinkmeta.model import modules
from shrinkmeta.model.likelihood import Likelihood
from shrinkmeta.model.priors import SigmaPrior

PyTree = Any


def make_learner(
  algorithm: Algorithm,
  likelihood: Likelihood,
  labels: modules.Labels,
  *,
  inner: Inner,
  implicit: Implicit,
  phi_optimizer: optax.GradientTransformation,
  sigma_optimizer: optax.GradientTransformation,
  init_sigma: float | Mapping[str, float],
  log_p_phi: Callable[[PyTree], jax.Array] | None = None,
  log_p_sigma: SigmaPrior | None = None,
  log_det: LogDet = LogDet(),  # noqa: B008 (frozen)
  restricted: Sequence[str] = (),
  sigma_gradient: SigmaGradient = "per_task",
  batching: Batching = "auto",
  mesh: Mesh | None = None,
) -> MetaLearner:
  """Build the learner of an algorithm.

  `sm.maml`, `sm.sigma_imaml`, ... call this function with the defaults of their algorithm.

  Args:
    algorithm: a line of `sm.FAMILY`, or one of your own.
    likelihood: predict and log_prob.
    labels: the module of every parameter.
    inner: how theta_hat is found.
    implicit: how the implicit gradient is computed, if the algorithm has one.
    phi_optimizer: any optax optimiser, for phi. `sm.maml`, ... take optax.adam(1e-3) by default.
    sigma_optimizer: the same for a learned log sigma^2. The default there is optax.adam(3e-2).
    init_sigma: sigma_m at the start: a number for all modules, or {module: number}. A fixed sigma
      stays at this value. A module that starts at 0 is frozen for good: it stays at phi, and the
      inner loop leaves it out. If log_sigma2 becomes -inf later, the module stays at phi too, but
      under jit the inner loop still contains it.
    log_p_phi: a log density phi -> [], nats. The meta-loss subtracts log_p_phi / n once per update.
      If phi follows l_MAP or the evidence, n is the number of tasks. If phi follows the pooled
      data, n is the number of all examples. Otherwise n is the number of validation examples.
    log_p_sigma: a log density {module: log sigma_m^2} -> [], nats. The meta-loss of a learned sigma
      subtracts log_p_sigma / n. n counts tasks for the evidence, and otherwise validation examples.
    log_det: how the determinant of the evidence is computed.
    restricted: modules of phi to integrate out together with theta (REML): see `sm.restriction`.
    sigma_gradient: "joint", "per_task" or "diagonal", for algorithms in which phi follows l_MAP:
      see `sm.sigma_reptile`.
    batching: how many tasks run at once on a device: see `sm.over_tasks`. With Inner.tol and an
      integer `batching`, a converged task gives its place in the block to the next task.
    mesh: the devices that the tasks are split over, or None.

  Returns:
    the MetaLearner.

  Raises:
    TypeError, ValueError: an argument has the wrong type, or two settings contradict each other.

  >>> import shrinkmeta as sm
  >>> learner = sm.make_learner(
  ...   sm.FAMILY["sigma_imaml"],
  ...   sm.gaussian(lambda theta, x: x @ theta["w"]),
  ...   {"w": "body"},
  ...   inner=sm.Inner(optax.sgd(0.1), steps=5),
  ...   implicit=sm.Implicit(),
  ...   phi_optimizer=optax.adam(1e-3),
  ...   sigma_optimizer=optax.adam(3e-2),
  ...   init_sigma={"body": 0.3},
  ... )
  >>> learner.algorithm.gradient, learner.spec.sigma
  ('implicit', {'body': 0.3})
  """
  check_types(algorithm=algorithm, likelihood=likelihood, labels=labels, inner=inner, mesh=mesh)
  check_types(implicit=implicit, log_det=log_det, log_p_phi=log_p_phi, log_p_sigma=log_p_sigma)
  check_types(phi_optimizer=phi_optimizer, sigma_optimizer=sigma_optimizer)
  if isinstance(sigma_gradient, str) and sigma_gradient == "diagonal":
    implicit = dataclasses.replace(implicit, solver="identity", batch_size=None, num_batches=1)
  settings = Spec(
    algorithm=algorithm,
    likelihood=likelihood,
    labels=labels,
    inner=inner,
    implicit=implicit,
    phi_optimizer=phi_optimizer,
    sigma_optimizer=sigma_optimizer,
    sigma=sigma_by_module(init_sigma, labels),
    log_det=log_det,
    restricted=modules.module_names("restricted", restricted, labels),
    sigma_gradient=sigma_gradient,
    log_p_phi=log_p_phi,
    log_p_sigma=log_p_sigma,
    batching=batching,
    mesh=mesh,
  )
  return learner_of(derive(settings))
