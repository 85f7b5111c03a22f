"""Derivatives of a predictive covariance against dense ones, where eigenvectors have none."""

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

  def exact(v):
    return jnp.trace(covariance(x * v[2], mask, v[0], jnp.exp(v[1]), at * v[2]))

  v = jnp.array([0.2, -0.3, 1.1])
  np.testing.assert_allclose(library(v), exact(v), rtol=1e-10)
  np.testing.assert_allclose(jax.grad(library)(v), jax.grad(exact)(v), rtol=1e-9)
  np.testing.assert_allclose(jax.jit(jax.jacfwd(library))(v), jax.grad(exact)(v), rtol=1e-9)
  want = jax.hessian(exact)(v)
  np.testing.assert_allclose(jax.jit(jax.hessian(library))(v), want, rtol=1e-8, atol=1e-9)
  if name == "balanced":
    twice = jax.jacrev(jax.jit(jax.jacrev(library)))(v)
    np.testing.assert_allclose(twice, want, rtol=1e-8, atol=1e-9)
