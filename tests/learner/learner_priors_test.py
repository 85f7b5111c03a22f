"""Priors on phi and sigma add the right terms to the meta-gradient, with the right weights."""

import jax
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

PHI = {"w": np.array([0.7, -1.2]), "b": np.array(0.4)}
T, M, N = 3, 4, 5  # tasks, examples of each to adapt on, and to be judged by


def meta_gradients(algorithm, **priors):
  """Without the priors, and with them."""
  random = np.random.default_rng(0)
  batch = lambda n: sm.Batch(random.normal(size=(T, n, 2)), random.normal(size=(T, n)))
  tasks = sm.Task(batch(M), batch(N))
  likelihood = sm.gaussian(lambda p, x: x @ p["w"] + p["b"], 1.0)
  inner = sm.Inner(optax.sgd(0.1), steps=2)
  learners = [
    getattr(sm, algorithm)(likelihood, sm.by_leaf(PHI), inner=inner, **keywords)
    for keywords in ({}, priors)
  ]
  run = lambda state: [learner.meta_gradient(state, tasks) for learner in learners]
  return jax.jit(run)(learners[0].init(PHI))


@pytest.mark.parametrize(
  ("algorithm", "phi_weight", "sigma_weight"),
  [
    ("maml", 1 / (T * N), None),
    ("fine_tuning", 1 / (T * (M + N)), None),  # whose loss is of all examples
    ("imaml", 1 / (T * N), None),
    ("sigma_imaml", 1 / (T * N), 1 / (T * N)),
    ("sigma_reptile", 1 / T, 1 / (T * N)),
    ("empirical_bayes", 1 / T, 1 / T),
  ],
)
def test_each_prior_is_added_once_in_the_units_of_the_loss(algorithm, phi_weight, sigma_weight):
  """log N(phi; 0, 2^2 I) has the gradient -phi / 4; log(exp(-sigma / 0.5) / 0.5), -sigma there."""
  priors = {"log_p_phi": sm.priors.normal(2.0)}
  if sigma_weight is not None:
    priors["log_p_sigma"] = sm.priors.exponential(0.5)
  (without, metrics_without), (grad, metrics) = meta_gradients(algorithm, **priors)
  for name, value in PHI.items():
    added = grad.phi[name] - without.phi[name]
    np.testing.assert_allclose(added, phi_weight * value / 4, rtol=1e-9, err_msg=name)
    added = grad.log_sigma2[name] - without.log_sigma2[name]
    # d/d log sigma^2 = (sigma / 2) d/d sigma, at the learners' sigma = 0.3.
    want = 0.0 if sigma_weight is None else sigma_weight * 0.3 / 2 / 0.5
    np.testing.assert_allclose(added, want, rtol=1e-9, atol=1e-15, err_msg=name)
  square = sum(float(np.sum(value**2)) for value in PHI.values())
  log_p = -square / 8 - 3 * np.log(2.0 * np.sqrt(2 * np.pi))
  added = metrics.phi_loss - metrics_without.phi_loss
  np.testing.assert_allclose(added, -phi_weight * log_p, rtol=1e-9)
