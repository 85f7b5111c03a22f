"""phi's gradient for frozen modules is exact with Gauss-Newton if the solve is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

# A nonlinear body and a linear head. The head alone moves, so that Gauss-Newton is the exact
# Hessian of what moves, and both the mode and the evidence have a closed form in the body.
N, IN, HIDDEN, SCALE, SIGMA = 6, 3, 4, 0.3, 1.3
LABELS = {"body": "body", "head": "head"}
LOG_SIGMA2 = {"body": -np.inf, "head": 2 * np.log(SIGMA)}
INNER = sm.Inner(optax.sgd(0.1, momentum=0.75), tol=1e-12, steps=2000)


def features(body, x):
  return jnp.tanh(x @ body)


LIKELIHOOD = sm.gaussian(lambda p, x: features(p["body"], x) @ p["head"], SCALE)


def problem():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  phi = {"body": 0.5 * array(IN, HIDDEN), "head": array(HIDDEN)}
  return phi, sm.Batch(array(N, IN), 2.0 * array(N)), array(HIDDEN)


def head(phi, batch):
  """The closed form of the head's mode."""
  f, r = features(phi["body"], batch.inputs), batch.targets
  gram = jnp.eye(HIDDEN) / SIGMA**2 + f.T @ f / SCALE**2
  return phi["head"] + jnp.linalg.solve(gram, f.T @ (r - f @ phi["head"]) / SCALE**2)


def implicit(curvature, **keywords):
  return sm.Implicit(curvature=curvature, max_steps=100, tol=1e-13, **keywords)


@pytest.mark.parametrize(
  "settings",
  (
    implicit("gauss_newton"),
    implicit("hessian"),
    sm.Implicit(solver="dual"),
    implicit("gauss_newton", batch_size=2, num_batches=None),
  ),
  ids=("cg", "hessian", "dual", "batches"),
)
def test_the_gradient_of_a_mode_is_the_closed_forms(settings):
  phi, batch, g = problem()

  def library(phi):
    theta, info = sm.map_estimate(
      LIKELIHOOD, LABELS, phi, LOG_SIGMA2, batch, INNER, settings, key=jax.random.key(0)
    )
    return g @ theta["head"], info.converged

  @jax.jit
  def run(phi):
    right = jax.grad(lambda phi: g @ head(phi, batch))(phi)
    return *jax.grad(library, has_aux=True)(phi), right

  got, converged, want = run(phi)
  assert bool(converged)
  for name in ("body", "head"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-8, atol=1e-9)


def test_the_gradient_of_the_evidence_is_the_closed_forms():
  phi, batch, _ = problem()

  def exact(phi):
    f = features(phi["body"], batch.inputs)
    covariance = SCALE**2 * jnp.eye(N) + SIGMA**2 * f @ f.T
    r = batch.targets - f @ phi["head"]
    log_det = jnp.linalg.slogdet(2 * jnp.pi * covariance)[1]
    return -0.5 * (r @ jnp.linalg.solve(covariance, r) + log_det)

  def library(phi):
    settings = implicit("gauss_newton")
    return sm.log_evidence(LIKELIHOOD, LABELS, phi, LOG_SIGMA2, batch, INNER, settings)[0]

  got, want = jax.jit(lambda phi: (jax.grad(library)(phi), jax.grad(exact)(phi)))(phi)
  for name in ("body", "head"):
    np.testing.assert_allclose(got[name], want[name], rtol=1e-8, atol=1e-9)
