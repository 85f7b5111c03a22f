"""Derivatives of a predictive covariance agree with dense ones where eigenvectors have none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")


def design(name):
  """(x [N, D], mask [N])."""
  rng = np.random.default_rng(0)
  if name == "generic":
    return jnp.asarray(rng.normal(size=(8, 3))), jnp.ones(8)
  if name == "padded":
    return jnp.asarray(rng.normal(size=(5, 8))), jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
  return jnp.repeat(jnp.eye(4), 3, 0), jnp.ones(12)  # balanced: one eigenvalue, four times


def covariance(x, mask, log_sigma2, scale, at):
  """The closed form, the weights of N examples and two outputs of noise `scale` each."""
  gram = x.T @ (mask[:, None] * x) / scale**2
  return at @ jnp.linalg.inv(jnp.eye(x.shape[1]) * jnp.exp(-log_sigma2) + gram) @ at.T


@jax.jit
def exact(v, x, mask, at):
  """(the trace of the covariance, its gradient, its Hessian)."""
  of = lambda v: jnp.trace(covariance(x * v[2], mask, v[0], jnp.exp(v[1]), at * v[2]))
  return of(v), jax.grad(of)(v), jax.hessian(of)(v)


@pytest.mark.parametrize("rank", (None, 8), ids=("exact", "lanczos"))
@pytest.mark.parametrize("name", ("generic", "padded", "balanced"))
def test_the_variance_has_both_derivatives_in_sigma_noise_and_data(name, rank):
  x, mask = design(name)
  d = x.shape[1]
  at = jnp.asarray(np.random.default_rng(1).normal(size=(4, d)))
  theta, targets = {"w": jnp.zeros(d)}, jnp.zeros(len(x))

  def library(v):
    likelihood = sm.gaussian(lambda t, x: x @ t["w"], jnp.exp(v[1]))
    batch = sm.Batch(x * v[2], targets, mask)
    found = sm.posterior(likelihood, {"w": "w"}, theta, {"w": v[0]}, theta, batch, rank=rank)
    return found.predictive(at * v[2]).variance.sum()

  @jax.jit
  def run(v):
    fast = jax.value_and_grad(library)(v), jax.jacfwd(library)(v), jax.hessian(library)(v)
    return *fast, jax.jacrev(jax.jit(jax.jacrev(library)))(v) if name == "balanced" else None

  v = jnp.array([0.2, -0.3, 1.1])
  (value, slope), forward, hessian, twice = run(v)
  want, want_slope, want_hessian = exact(v, x, mask, at)
  np.testing.assert_allclose(value, want, rtol=1e-10)
  np.testing.assert_allclose(slope, want_slope, rtol=1e-9)
  np.testing.assert_allclose(forward, want_slope, rtol=1e-9)
  np.testing.assert_allclose(hessian, want_hessian, rtol=1e-8, atol=1e-9)
  if name == "balanced":
    np.testing.assert_allclose(twice, want_hessian, rtol=1e-8, atol=1e-9)
