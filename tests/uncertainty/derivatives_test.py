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


def draws(v, of):
  """A number from draws of the posterior of a small network; v: log sigma^2, two scales [4]."""
  rng = np.random.default_rng(0)
  theta = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 3)))}
  theta = jax.tree.map(lambda w: w * v[2], theta)
  x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.array([0, 1, 2, 0, 1])
  mask = jnp.array([1.0, 2.0, 0.5, 0.0, 0.0])  # padding: eigenvalues of 0
  log_sigma2 = {"a": v[0], "b": v[1]}
  network = sm.categorical(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
  batch = sm.Batch(x * v[3], y, mask)
  found = sm.posterior(network, {"a": "a", "b": "b"}, theta, log_sigma2, theta, batch)
  key = jax.random.key(0)
  if of == "eigenvalues":
    return jnp.sum(jnp.log1p(found.eigenvalues))
  if of == "sample":
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in found.sample(key, 3).values())
  if of == "outputs":
    return jnp.sum(jnp.sin(found.outputs(key, x, 3)))
  return jnp.sum(found.log_predictive(key, sm.Batch(x, y), 3))


@pytest.mark.parametrize("of", ("sample", "outputs", "log_predictive", "eigenvalues"))
def test_draws_have_a_derivative_where_singular_vectors_have_none(of):
  v, step = jnp.array([0.3, -0.2, 1.1, 0.9]), 1e-5
  found = jax.jit(jax.value_and_grad(lambda v: draws(v, of)))
  moved = [[float(found(v.at[i].add(s))[0]) for s in (step, -step)] for i in range(4)]
  want = [(up - down) / (2 * step) for up, down in moved]
  np.testing.assert_allclose(found(v)[1], want, rtol=1e-6, atol=1e-7)


def test_draws_of_a_compiled_function_with_a_traced_scale():
  x, theta = jnp.eye(3), {"w": jnp.ones(3)}  # three equal eigenvalues

  def total(scale):
    linear = sm.gaussian(lambda t, x: x @ t["w"], scale)
    batch = sm.Batch(x, jnp.ones(3))
    found = sm.posterior(linear, {"w": "w"}, theta, {"w": 0.4}, theta, batch)
    return jnp.sum(found.sample(jax.random.key(0), 4)["w"])

  # theta + s (1 + s^2 / scale^2)^(-1/2) e: the closed form of its derivative in the scale
  s2, scale = np.exp(0.4), 0.7
  sum_e = (total(scale) - 12.0) / np.sqrt(s2 / (1 + s2 / scale**2))
  want = np.sqrt(s2) * sum_e * (1 + s2 / scale**2) ** -1.5 * s2 / scale**3
  np.testing.assert_allclose(jax.grad(jax.jit(total))(scale), want, rtol=1e-9)
  np.testing.assert_allclose(jax.jvp(total, (scale,), (1.0,))[1], want, rtol=1e-9)
  with pytest.raises(NotImplementedError, match="Draws of a posterior can be differentiated once"):
    jax.grad(jax.grad(total))(scale)


def test_the_derivative_of_a_draw_with_precise_data_in_float32():
  """Two examples and four parameters; against differences of the closed form in float64."""
  rng = np.random.default_rng(0)
  x, scale, key, to = rng.normal(size=(2, 4)), 1e-3, jax.random.key(0), np.arange(1.0, 5)
  noise = np.asarray(jax.random.normal(key, (4,), jnp.float32), float)

  def closed_form(x):
    values, vectors = np.linalg.eigh(np.eye(4) + x.T @ x / scale**2)
    return noise @ (vectors / np.sqrt(values)) @ vectors.T @ to

  def total(x):
    theta = {"w": jnp.ones(4, jnp.float32)}
    linear = sm.gaussian(lambda t, x: x @ t["w"], scale)
    batch = sm.Batch(x, jnp.ones(2, jnp.float32))
    found = sm.posterior(linear, {"w": "w"}, theta, {"w": jnp.float32(0.0)}, theta, batch)
    return found.sample(key, 1)["w"][0] @ jnp.asarray(to, jnp.float32)

  found, step = jax.grad(total)(jnp.asarray(x, jnp.float32)), 1e-6
  moves = step * np.eye(8).reshape(8, 2, 4)
  want = [(closed_form(x + move) - closed_form(x - move)) / (2 * step) for move in moves]
  # Processors round differently: 3.6e-4 was seen.
  np.testing.assert_allclose(found.ravel(), want, atol=1e-3 * np.abs(want).max())


def test_draws_by_lanczos_and_of_a_network_with_its_own_backward_pass():
  rng = np.random.default_rng(0)
  x, theta = jnp.asarray(rng.normal(size=(12, 10))), {"w": jnp.asarray(rng.normal(size=10))}

  @jax.custom_vjp
  def own(x):
    return jnp.tanh(x)

  own.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, u: (u * (1 - y**2),))

  def total(scale, act, rank):
    network = sm.gaussian(lambda t, x: act(x) @ t["w"], scale)
    batch = sm.Batch(x.at[:, 0].multiply(scale), jnp.ones(12))  # turns the eigenvectors
    found = sm.posterior(network, {"w": "w"}, theta, {"w": 0.0}, theta, batch, rank=rank)
    return jnp.sum(found.sample(jax.random.key(0), 4)["w"])

  for act, rank in ((jnp.tanh, 4), (own, None)):
    with jax.numpy_rank_promotion("raise"):
      slope = jax.grad(total)(0.5, act, rank)
    rise = (total(0.5 + 1e-6, act, rank) - total(0.5 - 1e-6, act, rank)) / 2e-6
    np.testing.assert_allclose(slope, rise, rtol=1e-5)
