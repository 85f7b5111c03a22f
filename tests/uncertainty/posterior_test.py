"""Laplace's posterior against closed forms, and its draws against their own covariance."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

# D = 20 parameters that move, 4 frozen; "s" holds log sd of the noise.
SIZES = {"a": (3, 4), "b": (8,), "e": (4,)}
LOG_SIGMA2 = {"a": np.log(0.04), "b": 0.5, "e": -np.inf, "s": -np.inf}
MODE = sm.Inner(optax.sgd(0.3, momentum=0.8), steps=4000, tol=1e-13)
LABELS = {m: m for m in (*SIZES, "s")}


def vector(theta):
  return ravel_pytree({m: theta[m] for m in SIZES})[0]


LINEAR = sm.gaussian_with_scale(lambda theta, x: (x @ vector(theta), theta["s"]))


@functools.cache
def problem(n):
  """(phi, batch, test inputs, mode, covariance of theta [24, 24])."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(n)
    phi = {m: jnp.asarray(rng.normal(size=shape)) for m, shape in SIZES.items()}
    phi["s"] = jnp.asarray(np.log(0.6))
    x = jnp.asarray(rng.normal(size=(n, 24)) / 5)
    batch = sm.Batch(x, x @ vector(phi) + jnp.asarray(rng.normal(size=n)), jnp.ones(n).at[0].set(0))
    theta, info = jax.jit(
      lambda phi: sm.map_estimate(LINEAR, LABELS, phi, LOG_SIGMA2, batch, MODE)
    )(phi)
    assert bool(info.converged)
    var = jnp.concatenate(
      [jnp.full(int(np.prod(SIZES[m])), jnp.exp(LOG_SIGMA2[m])) for m in sorted(SIZES)]
    )
    used = x[1:]
    v = (used * var) @ used.T + 0.36 * jnp.eye(n - 1)
    cov = jnp.diag(var) - (var[:, None] * used.T) @ jnp.linalg.solve(v, used * var)
    return phi, batch, jnp.asarray(rng.normal(size=(5, 24))), theta, cov


def found(n, **keywords):
  phi, batch, _, theta, _ = problem(n)
  return sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, theta, batch, **keywords)


@pytest.mark.parametrize("n", (6, 40))  # rows fewer and more than the 20 that move
@pytest.mark.parametrize("keywords", ({}, {"rank": 20}), ids=("exact", "lanczos"))
def test_predictive_is_the_closed_form(n, keywords):
  _, _, inputs, theta, cov = problem(n)
  predictive = found(n, **keywords).predictive(inputs)
  precision = 1 / 0.36
  np.testing.assert_allclose(predictive.mean[:, 0], inputs @ vector(theta) * precision, rtol=1e-10)
  want = jnp.diagonal(inputs @ cov @ inputs.T) * precision**2
  np.testing.assert_allclose(predictive.variance[:, 0], want, rtol=1e-8)
  np.testing.assert_array_equal(predictive.variance[:, 1], 0.0)  # the noise is shared, not drawn


def test_draws_have_that_covariance_and_leave_frozen_modules():
  _, _, inputs, theta, cov = problem(40)
  posterior, n = found(40), 20_000
  draws = posterior.sample(jax.random.key(0), n)
  chex.assert_trees_all_equal(draws["e"], jnp.broadcast_to(theta["e"], (n, 4)))
  flat = jax.vmap(vector)(draws)
  np.testing.assert_allclose(flat.mean(0), vector(theta), atol=5 * float(jnp.sqrt(cov.max() / n)))
  moves = np.asarray(jnp.diagonal(cov)) > 1e-12
  assert moves.sum() == 20
  sd = jnp.sqrt(jnp.diagonal(cov))
  got = jnp.cov(flat.T)[moves][:, moves] / jnp.outer(sd, sd)[moves][:, moves]
  want = (cov / jnp.outer(sd, sd))[moves][:, moves]
  np.testing.assert_allclose(got, want, atol=5 * np.sqrt(2 / n))
  outputs = posterior.outputs(jax.random.key(1), inputs, n)[..., 0]
  exact = posterior.predictive(inputs)
  np.testing.assert_allclose(outputs.var(0), exact.variance[:, 0], rtol=5 * np.sqrt(2 / n))
  network = posterior.outputs(jax.random.key(1), inputs, n, linearised=False)[..., 0]
  np.testing.assert_allclose(network, outputs, rtol=1e-9)  # linear it is


def test_low_rank_errs_on_the_safe_side_and_converges():
  inputs = problem(40)[2]
  exact = found(40).predictive(inputs).variance[:, 0]
  errors = []
  for rank in (2, 6, 12, 20):
    low = found(40, rank=rank).predictive(inputs).variance[:, 0]
    assert np.all(low >= exact * (1 - 1e-9))
    errors.append(float(jnp.max(low / exact - 1)))
  assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-8


def test_log_predictive_of_a_linear_model():
  """Against the normal density with both variances."""
  _, _, inputs, theta, cov = problem(40)
  inputs = inputs / 5
  targets = jnp.asarray(np.random.default_rng(9).normal(size=5))
  got = found(40).log_predictive(jax.random.key(0), sm.Batch(inputs, targets), 50_000)
  sd = jnp.sqrt(jnp.diagonal(inputs @ cov @ inputs.T) + 0.36)
  want = jax.scipy.stats.norm.logpdf(targets, inputs @ vector(theta), sd)
  np.testing.assert_allclose(got, want, atol=0.02)
  plug_in = jax.scipy.stats.norm.logpdf(targets, inputs @ vector(theta), 0.6)
  assert float(jnp.max(jnp.abs(want - plug_in))) > 0.1


def test_many_classes_against_a_dense_covariance():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(0.6 * rng.normal(size=shape))
  network = lambda theta, x: jnp.tanh(x @ theta["a"]) @ theta["b"]
  likelihood, theta = sm.categorical(network), {"a": array(4, 5), "b": array(5, 3)}
  log_sigma2 = {"a": -1.0, "b": 0.4}
  batch = sm.Batch(array(15, 4), jnp.asarray(rng.integers(0, 3, 15)))
  posterior = sm.posterior(likelihood, {"a": "a", "b": "b"}, theta, log_sigma2, theta, batch)
  flat, unravel = ravel_pytree(theta)
  s = jnp.concatenate([jnp.full(20, np.exp(-0.5)), jnp.full(15, np.exp(0.2))])
  jacobian = jax.jacobian(lambda v: network(unravel(v), batch.inputs))(flat) * s  # [15, 3, 35]
  p = jax.nn.softmax(network(theta, batch.inputs))
  lam = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p)
  precision = jnp.eye(35) + jnp.einsum("nci,ncd,ndj->ij", jacobian, lam, jacobian)
  new = array(6, 4)
  rows = jax.jacobian(lambda v: network(unravel(v), new))(flat) * s
  want = jnp.einsum("nci,ij,ndj->ncd", rows, jnp.linalg.inv(precision), rows)
  np.testing.assert_allclose(posterior.predictive(new).covariance, want, rtol=1e-8, atol=1e-12)


def test_a_predictive_holds_nothing_of_the_size_of_all_outputs_squared(optimising_jit):
  posterior = sm.posterior(
    sm.gaussian(lambda theta, x: x * theta), "w", jnp.ones([]), {"w": 0.0}, jnp.ones([]),
    sm.Batch(jnp.ones(2), jnp.ones(2)),
  )  # fmt: skip
  n = 1_000
  compiled = optimising_jit(lambda x: posterior.predictive(x).covariance).lower(jnp.ones(n))
  needed = sm.program_cost(compiled.compile())
  assert needed.bytes < 50 * 8 * n  # n^2 would be 1,000


def test_many_tasks_by_vmap_and_under_jit():
  phi, batch, inputs, theta, _ = problem(40)
  stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)

  def one(theta, batch):
    posterior = sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, theta, batch)
    return posterior, posterior.predictive(inputs).variance

  posteriors, variance = jax.jit(jax.vmap(one))(stack(theta), stack(batch))
  want = found(40)
  np.testing.assert_allclose(variance[1], want.predictive(inputs).variance, rtol=1e-8)
  again = jax.vmap(lambda p: p.predictive(inputs).variance)(posteriors)
  np.testing.assert_allclose(again, variance, rtol=1e-8)


def test_eight_schools_posterior_means_as_a_function_of_sigma():
  """theta_j of known standard errors: sigma^2 / (sigma^2 + s_j^2) of the way from mu to y_j."""
  y = jnp.asarray([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
  se = jnp.asarray([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
  likelihood = sm.gaussian_with_scale(lambda theta, se: (theta + 0.0 * se, jnp.log(se)))
  inner = sm.Inner(optax.lbfgs(), steps=100, tol=1e-12)

  def estimate(log_sigma2, y, se):
    batch = sm.Batch(se[None], y[None])
    theta, _ = sm.map_estimate(likelihood, "mu", jnp.asarray(7.7), {"mu": log_sigma2}, batch, inner)
    found = sm.posterior(likelihood, "mu", jnp.asarray(7.7), {"mu": log_sigma2}, theta, batch)
    value, _ = sm.log_evidence(likelihood, "mu", jnp.asarray(7.7), {"mu": log_sigma2}, batch, inner)
    return theta, jnp.exp(log_sigma2) / (1 + found.eigenvalues[0]), value

  run = jax.jit(jax.vmap(estimate, (None, 0, 0)))
  for sigma in (0.1, 1.0, 6.6, 30.0):
    mean, variance, value = run(2 * jnp.log(sigma), y, se)
    share = sigma**2 / (sigma**2 + se**2)
    np.testing.assert_allclose(mean, 7.7 + share * (y - 7.7), rtol=1e-8)
    np.testing.assert_allclose(variance, share * se**2, rtol=1e-8)
    want = jax.scipy.stats.norm.logpdf(y, 7.7, jnp.sqrt(sigma**2 + se**2))
    np.testing.assert_allclose(value, want, rtol=1e-8)


def test_errors_that_help():
  phi, batch, _, theta, _ = problem(6)
  with pytest.raises(ValueError, match="rank must be positive"):
    sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, theta, batch, rank=0)
  with pytest.raises(ValueError, match="theta"):
    sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, {"a": theta["a"]}, batch)


@pytest.mark.parametrize("rank", (None, 2), ids=("exact", "lanczos"))
@pytest.mark.parametrize("sigma", (1.0, 10.0, 1000.0))
def test_the_variance_survives_float32_where_the_prior_is_wide(sigma, rank):
  """Of 1000 examples with noise 0.1 it is about 1e-5: next to nothing of the prior's sigma^2."""
  rng = np.random.default_rng(0)
  x, at = rng.normal(size=(1000, 2)), np.array([[1.0, 0.0], [0.0, 1.4], [2.0, 0.1]])
  exact = at @ np.linalg.inv(x.T @ x / 0.01 + np.eye(2) / sigma**2) @ at.T
  narrow = lambda a: jnp.asarray(a, jnp.float32)
  linear, labels = sm.gaussian(lambda theta, x: x @ theta["w"], 0.1), {"w": "w"}
  theta, log_sigma2 = {"w": jnp.zeros(2, jnp.float32)}, {"w": 2 * np.log(sigma)}
  batch = sm.Batch(narrow(x), narrow(np.zeros(1000)))
  got = sm.posterior(linear, labels, theta, log_sigma2, theta, batch, rank=rank)
  np.testing.assert_allclose(got.predictive(narrow(at)).variance, np.diag(exact), rtol=2e-3)


LABELLED = sm.categorical(lambda theta, x: x @ theta["w"])


def of_labels(mask=None):
  """targets [N] -> log_predictive [N], 20 draws, in float32."""
  w = {"w": jnp.eye(2, 3, dtype=jnp.float32)}
  inputs = lambda n: jnp.ones((n, 2), jnp.float32)
  batch = sm.Batch(inputs(3), jnp.array([0, 1, 2]))
  posterior = sm.posterior(LABELLED, {"w": "w"}, w, {"w": 0.0}, w, batch)

  def log_predictive(targets):
    batch = sm.Batch(inputs(len(targets)), targets, mask)
    return posterior.log_predictive(jax.random.key(0), batch, 20)

  return log_predictive


def test_log_predictive_of_padding_is_0_whatever_its_target():
  padded = of_labels(jnp.array([1.0, 1.0, 1.0, 0.0]))
  got, whole = padded(jnp.array([0, 1, 2, -1])), of_labels()(jnp.array([0, 1, 2, 0]))
  np.testing.assert_array_equal(got, [*whole[:3], 0.0])
  np.testing.assert_allclose(jax.jit(padded)(jnp.array([0, 1, 2, -1])), got, rtol=1e-5)


@pytest.mark.parametrize("label", (-1, 3))
def test_log_predictive_of_a_label_out_of_range_is_nan_under_jit(optimising_jit, label):
  """Of a sum of exponentials alone XLA on CPUs makes a number of the NaN."""
  for n in (2, 4):
    targets = jnp.ones(n, jnp.int32).at[1].set(label)
    np.testing.assert_array_equal(np.isnan(optimising_jit(of_labels())(targets)), np.arange(n) == 1)


def test_a_traced_sigma_of_infinity_has_no_posterior_and_no_evidence():
  linear, theta = sm.gaussian(lambda theta, x: x * theta["w"]), {"w": jnp.zeros([])}
  batch = sm.Batch(jnp.ones(3), jnp.arange(3.0))
  variance = jax.jit(
    lambda s: (
      sm.posterior(linear, {"w": "w"}, theta, {"w": s}, theta, batch)
      .predictive(jnp.ones(1))
      .variance
    )
  )
  evidence = jax.jit(lambda s: sm.log_evidence(linear, {"w": "w"}, theta, {"w": s}, batch)[0])
  added = jax.jit(
    lambda s: sm.restriction(
      linear, {"w": "w"}, theta, {"w": s}, jax.tree.map(lambda x: x[None], batch), ["w"]
    )
  )
  for f in (variance, evidence, added):
    assert np.isfinite(f(0.0)).all() and np.isnan(f(jnp.inf)).all()


@pytest.mark.parametrize("rank", (None, 2))
def test_a_density_that_is_not_concave_has_no_posterior(rank):
  rising = sm.Likelihood(lambda theta, x: x @ theta["w"], lambda f, y: jnp.square(f - y))
  phi, batch = {"w": jnp.zeros(3)}, sm.Batch(jnp.eye(3), jnp.ones(3))
  found = sm.posterior(rising, {"w": "w"}, phi, {"w": 0.0}, phi, batch, rank=rank)
  assert jnp.isnan(found.predictive(batch.inputs).variance).all()


def test_outputs_of_several_arrays_are_refused_by_name():
  likelihood = sm.Likelihood(lambda t, x: {"f": x * t["w"]}, lambda f, y: -((y - f["f"]) ** 2))
  batch = sm.Batch(jnp.ones(3), jnp.ones(3))
  with pytest.raises(ValueError, match="predict returned dict: a dual solve"):
    sm.posterior(likelihood, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, {"w": 0.5}, batch)
