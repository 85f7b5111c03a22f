"""A network with a backward pass of its own gives the figures of the same network without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.curvature.products import linearise

LABELS, LOG_SIGMA2 = {"a": "a", "b": "b"}, {"a": -1.0, "b": 0.0}
FEW = sm.Inner(optax.sgd(0.01), steps=3)


@jax.custom_vjp
def sine(x):
  return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, u: (u * jnp.cos(x),))


def inside_a_scan(x):
  return jax.lax.scan(lambda c, _: (jax.jit(sine)(c), None), x, length=1)[0]


def problem(operation, examples):
  """(likelihood, phi with 9 parameters, a batch)."""
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape))
  likelihood = sm.gaussian(lambda t, x: operation(x @ t["a"]) @ t["b"], 0.5)
  return (
    likelihood,
    {"a": array(2, 3), "b": array(3)},
    sm.Batch(array(examples, 2), array(examples)),
  )


def gradient_at_the_mode(solver):
  def found(likelihood, phi, batch):
    implicit = sm.Implicit(curvature="gauss_newton", solver=solver)
    mode = lambda phi, v: sm.map_estimate(likelihood, LABELS, phi, v, batch, FEW, implicit)[0]
    return jax.grad(lambda phi, v: jnp.sum(mode(phi, v)["a"]), (0, 1))(phi, LOG_SIGMA2)

  return found


def gradient_of_the_evidence(likelihood, phi, batch):
  evidence = lambda phi, v: sm.log_evidence(likelihood, LABELS, phi, v, batch, inner=FEW)[0]
  return jax.grad(evidence, (0, 1))(phi, LOG_SIGMA2)


def posterior(likelihood, phi, batch):
  known = sm.posterior(likelihood, LABELS, phi, LOG_SIGMA2, phi, batch)
  return known.predictive(batch.inputs), known.outputs(jax.random.key(0), batch.inputs, 2)


ANSWERS = {
  "cg": gradient_at_the_mode("cg"),
  "dual": gradient_at_the_mode("dual"),
  "evidence": gradient_of_the_evidence,
  "posterior": posterior,
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "answer, examples",  # J's rows are taken in forward mode where there are more than parameters
  [("cg", 4), ("dual", 12), ("evidence", 4), ("posterior", 12), ("posterior", 4)],
)
def test_a_custom_vjp_changes_nothing(answer, examples):
  def compiled(operation):
    likelihood, phi, batch = problem(operation, examples)
    return jax.jit(lambda phi, batch: ANSWERS[answer](likelihood, phi, batch))(phi, batch)

  found, wanted = compiled(inside_a_scan), compiled(jnp.sin)
  jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-9, atol=1e-12), found, wanted)


@jax.custom_vjp
def squared(f, y):
  return -((f - y) ** 2)


def outside(e):
  """Twice e, computed outside of JAX: it has no derivative."""
  return jax.pure_callback(lambda e: 2.0 * np.asarray(e), e, e, vmap_method="broadcast_all")


squared.defvjp(lambda f, y: (squared(f, y), f - y), lambda e, u: (-u * outside(e), u * outside(e)))


@pytest.mark.usefixtures("x64")
def test_the_solver_identity_needs_no_second_derivative_of_log_prob():
  _, phi, batch = problem(jnp.sin, 4)
  tasks = jax.tree.map(lambda x: x[None], sm.Task(batch, batch))

  def gradient(log_prob):
    learner = sm.sigma_reptile(
      sm.Likelihood(lambda t, x: jnp.sin(x @ t["a"]) @ t["b"], log_prob),
      LABELS,
      inner=FEW,
      implicit=sm.Implicit(solver="identity"),
    )
    return learner.meta_gradient(learner.init(phi), tasks)[0]

  with_own, plain = gradient(squared), gradient(lambda f, y: -((f - y) ** 2))
  jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-12), with_own, plain)
  assert optax.tree.norm(plain.phi) > 0.1


@pytest.mark.usefixtures("x64")
def test_both_products_are_those_of_the_jacobian():
  likelihood, phi, batch = problem(sine, 5)
  network = lambda t: likelihood.predict(t, batch.inputs)
  outputs, jvp, vjp = linearise(network, phi)
  rows = jax.jacrev(network)(phi)
  np.testing.assert_allclose(outputs, network(phi))
  along = sum(np.tensordot(rows[k], phi[k], phi[k].ndim) for k in phi)
  np.testing.assert_allclose(jvp(phi), along, rtol=1e-12)
  back = {k: np.tensordot(outputs, rows[k], 1) for k in phi}
  jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, rtol=1e-12), vjp(outputs), back)
