"""Laplace's posterior agrees with closed forms, and its draws with its covariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

import shrinkmeta as sm

pytestmark = pytest.mark.usefixtures("x64")

# D = 20 parameters that move, 4 frozen; "s" holds log sd of the noise.
SIZES = {"a": (3, 4), "b": (8,), "e": (4,)}
LOG_SIGMA2 = {"a": np.log(0.04), "b": 0.5, "e": -np.inf, "s": -np.inf}
LABELS = {m: m for m in (*SIZES, "s")}


def vector(theta):
  return ravel_pytree({m: theta[m] for m in SIZES})[0]


LINEAR = sm.gaussian_with_scale(lambda theta, x: (x @ vector(theta), theta["s"]))


@functools.cache
def problem(n):
  """(phi, batch, test inputs, mode, covariance of theta [24, 24])."""
  rng = np.random.default_rng(n)
  phi = {m: rng.normal(size=shape) for m, shape in SIZES.items()} | {"s": np.array(np.log(0.6))}
  x, start = rng.normal(size=(n, 24)) / 5, np.concatenate([phi[m].ravel() for m in SIZES])
  mask = (np.arange(n) > 0).astype(float)
  batch = sm.Batch(x, x @ start + rng.normal(size=n), mask)
  var = np.concatenate([np.full(np.prod(SIZES[m]), np.exp(LOG_SIGMA2[m])) for m in SIZES])
  used, r = x[1:], (batch.targets - x @ start)[1:]
  gain = (var[:, None] * used.T) @ np.linalg.inv((used * var) @ used.T + 0.36 * np.eye(n - 1))
  theta, ends = start + gain @ r, np.cumsum([np.prod(shape) for shape in SIZES.values()])
  parts = zip(SIZES.items(), np.split(theta, ends[:-1]), strict=True)
  mode = {m: part.reshape(shape) for (m, shape), part in parts} | {"s": phi["s"]}
  return phi, batch, rng.normal(size=(5, 24)), mode, np.diag(var) - gain @ (used * var)


@functools.cache
def found(n, rank=None):
  """(the posterior, its predictive of the test inputs)."""
  phi, batch, inputs, theta, _ = problem(n)

  @jax.jit
  def run(phi, theta, batch, inputs):
    posterior = sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, theta, batch, rank=rank)
    return posterior, posterior.predictive(inputs)

  with jax.enable_x64(True):
    return run(*jax.tree.map(jnp.asarray, (phi, theta, batch, inputs)))


def test_frozen_modules_that_are_named_under_jit_do_not_count():
  """Else A would have columns for them, more than `limit`, and the posterior a rank of 64."""
  phi, batch, inputs, theta, _ = problem(40)

  @functools.partial(jax.jit, static_argnames="frozen")
  def run(log_sigma2, frozen):
    size = 40 * 2 * 20  # of A with the modules that move
    found = sm.posterior(
      LINEAR, LABELS, phi, log_sigma2, theta, batch, limit=size, rank=None, frozen=frozen
    )
    return found, found.predictive(inputs).variance

  named, variance = run(dict(LOG_SIGMA2), frozen=("e", "s"))
  assert named.exact and named.basis.shape[1] == 20
  np.testing.assert_allclose(variance, found(40)[1].variance, rtol=1e-10)
  assert not run(dict(LOG_SIGMA2), frozen=())[0].exact
  other = run(LOG_SIGMA2 | {"e": 0.0}, frozen=("e", "s"))[1]
  assert np.isnan(other).all()  # "e" is named as frozen, and is not


@pytest.mark.parametrize("n", (6, 40))  # rows fewer and more than the 20 that move
@pytest.mark.parametrize("rank", (None, 20), ids=("exact", "lanczos"))
def test_predictive_is_the_closed_form(n, rank):
  _, _, inputs, theta, cov = problem(n)
  predictive = found(n, rank)[1]
  precision = 1 / 0.36
  np.testing.assert_allclose(predictive.mean[:, 0], inputs @ vector(theta) * precision, rtol=1e-10)
  want = np.diagonal(inputs @ cov @ inputs.T) * precision**2
  np.testing.assert_allclose(predictive.variance[:, 0], want, rtol=1e-8)
  np.testing.assert_array_equal(predictive.variance[:, 1], 0.0)  # the noise is shared, not drawn


def test_draws_have_that_covariance_and_leave_frozen_modules():
  _, _, inputs, theta, cov = problem(40)
  (posterior, exact), n = found(40), 20_000

  @jax.jit
  def run(posterior, inputs):
    outputs = lambda **keywords: posterior.outputs(jax.random.key(1), inputs, n, **keywords)
    return posterior.sample(jax.random.key(0), n), outputs(), outputs(linearised=False)

  draws, outputs, network = jax.tree.map(np.asarray, run(posterior, inputs))
  np.testing.assert_array_equal(draws["e"], np.broadcast_to(theta["e"], (n, 4)))
  flat = np.concatenate([draws[m].reshape(n, -1) for m in SIZES], 1)
  at = np.concatenate([theta[m].ravel() for m in SIZES])
  np.testing.assert_allclose(flat.mean(0), at, atol=5 * np.sqrt(cov.max() / n))
  moves = np.diagonal(cov) > 1e-12
  assert moves.sum() == 20
  sd = np.sqrt(np.diagonal(cov)[moves])
  got = np.cov(flat.T)[moves][:, moves] / np.outer(sd, sd)
  want = cov[moves][:, moves] / np.outer(sd, sd)
  np.testing.assert_allclose(got, want, atol=5 * np.sqrt(2 / n))
  variance = outputs[..., 0].var(0)
  np.testing.assert_allclose(variance, exact.variance[:, 0], rtol=5 * np.sqrt(2 / n))
  np.testing.assert_allclose(network[..., 0], outputs[..., 0], rtol=1e-9)  # linear it is


def test_low_rank_errs_on_the_safe_side_and_converges():
  exact = found(40)[1].variance[:, 0]
  errors = []
  for rank in (2, 8, 20):
    low = found(40, rank)[1].variance[:, 0]
    assert np.all(low >= exact * (1 - 1e-9))
    errors.append(float(jnp.max(low / exact - 1)))
  assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 and errors[-1] < 1e-8


def test_log_predictive_of_a_linear_model():
  """Against the normal density with both variances."""
  _, _, inputs, theta, cov = problem(40)
  inputs = inputs / 5
  targets = np.random.default_rng(9).normal(size=5)
  run = jax.jit(lambda p, batch: p.log_predictive(jax.random.key(0), batch, 50_000))
  got = run(found(40)[0], sm.Batch(inputs, targets))
  sd = np.sqrt(np.diagonal(inputs @ cov @ inputs.T) + 0.36)
  want = stats.norm.logpdf(targets, inputs @ vector(theta), sd)
  np.testing.assert_allclose(got, want, atol=0.02)
  plug_in = stats.norm.logpdf(targets, inputs @ vector(theta), 0.6)
  assert np.max(np.abs(want - plug_in)) > 0.1


def test_many_classes_against_a_dense_covariance():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(0.6 * rng.normal(size=shape))
  network = lambda theta, x: jnp.tanh(x @ theta["a"]) @ theta["b"]
  likelihood, theta = sm.categorical(network), {"a": array(4, 5), "b": array(5, 3)}
  log_sigma2 = {"a": -1.0, "b": 0.4}
  batch = sm.Batch(array(15, 4), jnp.asarray(rng.integers(0, 3, 15)))
  flat, unravel = ravel_pytree(theta)
  s, new = np.concatenate([np.full(20, np.exp(-0.5)), np.full(15, np.exp(0.2))]), array(6, 4)

  @jax.jit
  def run(theta):
    posterior = sm.posterior(likelihood, {"a": "a", "b": "b"}, theta, log_sigma2, theta, batch)
    rows_of = lambda x: jax.jacobian(lambda v: network(unravel(v), x))(flat)  # [N, 3, 35]
    outputs = network(theta, batch.inputs)
    return posterior.predictive(new).covariance, outputs, rows_of(batch.inputs), rows_of(new)

  got, outputs, jacobian, rows = map(np.asarray, run(theta))
  p, jacobian, rows = special.softmax(outputs, -1), jacobian * s, rows * s
  lam = np.eye(3) * p[:, None] - p[:, :, None] * p[:, None]
  precision = np.eye(35) + np.einsum("nci,ncd,ndj->ij", jacobian, lam, jacobian)
  want = np.einsum("nci,ij,ndj->ncd", rows, np.linalg.inv(precision), rows)
  np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12)


def test_a_predictive_holds_nothing_of_the_size_of_all_outputs_squared(optimising_jit):
  likelihood, one = sm.gaussian(lambda theta, x: x * theta), jnp.ones([])
  batch, n = sm.Batch(jnp.ones(2), jnp.ones(2)), 1_000
  posterior = jax.jit(lambda one: sm.posterior(likelihood, "w", one, {"w": 0.0}, one, batch))(one)
  of = lambda posterior, x: posterior.predictive(x).covariance
  compiled = optimising_jit(of).lower(posterior, jnp.ones(n))
  needed = sm.program_cost(compiled.compile())
  assert needed.bytes < 50 * 8 * n  # n^2 would be 1,000


def test_many_tasks_by_vmap_and_under_jit():
  phi, batch, inputs, theta, _ = problem(40)
  stack = lambda tree: jax.tree.map(lambda x: np.stack([x, x]), tree)

  def one(theta, batch):
    posterior = sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, theta, batch)
    return posterior, posterior.predictive(inputs).variance

  posteriors, variance = jax.jit(jax.vmap(one))(stack(theta), stack(batch))
  np.testing.assert_allclose(variance[1], found(40)[1].variance, rtol=1e-8)
  again = jax.jit(jax.vmap(lambda p: p.predictive(inputs).variance))(posteriors)
  np.testing.assert_allclose(again, variance, rtol=1e-8)


def test_eight_schools_posterior_means_as_a_function_of_sigma():
  """theta_j of known standard errors: sigma^2 / (sigma^2 + s_j^2) of the way from mu to y_j."""
  y = jnp.asarray([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
  se = jnp.asarray([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
  likelihood = sm.gaussian_with_scale(lambda theta, se: (theta + 0.0 * se, jnp.log(se)))
  inner = sm.Inner(optax.sgd(0.15), steps=400, tol=1e-12)  # a curvature of 1 to 12

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
  with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
    sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, theta, batch, rank=0)
  with pytest.raises(ValueError, match="theta"):
    sm.posterior(LINEAR, LABELS, phi, LOG_SIGMA2, {"a": theta["a"]}, batch)


@functools.cache
def narrow(rank):
  """jit of (log_sigma2, x, at) -> the variance, in float32."""
  linear, labels = sm.gaussian(lambda theta, x: x @ theta["w"], 0.1), {"w": "w"}

  def run(log_sigma2, x, at):
    theta, batch = {"w": jnp.zeros(2, jnp.float32)}, sm.Batch(x, jnp.zeros(1000, jnp.float32))
    found = sm.posterior(linear, labels, theta, {"w": log_sigma2}, theta, batch, rank=rank)
    return found.predictive(at).variance

  return jax.jit(run)


@pytest.mark.parametrize("rank", (None, 2), ids=("exact", "lanczos"))
@pytest.mark.parametrize("sigma", (1.0, 10.0, 1000.0))
def test_the_variance_survives_float32_where_the_prior_is_wide(sigma, rank):
  """Of 1000 examples with noise 0.1 it is about 1e-5: next to nothing of the prior's sigma^2."""
  rng = np.random.default_rng(0)
  x, at = rng.normal(size=(1000, 2)), np.array([[1.0, 0.0], [0.0, 1.4], [2.0, 0.1]])
  exact = at @ np.linalg.inv(x.T @ x / 0.01 + np.eye(2) / sigma**2) @ at.T
  got = narrow(rank)(*map(np.float32, (2 * np.log(sigma), x, at)))
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, np.diag(exact), rtol=2e-3)


LABELLED = sm.categorical(lambda theta, x: x @ theta["w"])


@functools.cache
def labelled_posterior():
  batch = sm.Batch(jnp.ones((3, 2), jnp.float32), jnp.array([0, 1, 2]))
  of = lambda w: sm.posterior(LABELLED, {"w": "w"}, w, {"w": 0.0}, w, batch)
  return jax.jit(of)({"w": jnp.eye(2, 3, dtype=jnp.float32)})


def of_labels(mask=None):
  """targets [N] -> log_predictive [N], 20 draws, in float32."""
  inputs = lambda n: jnp.ones((n, 2), jnp.float32)
  posterior = labelled_posterior()

  def log_predictive(targets):
    batch = sm.Batch(inputs(len(targets)), targets, mask)
    return posterior.log_predictive(jax.random.key(0), batch, 20)

  return log_predictive


def test_log_predictive_of_padding_is_0_whatever_its_target():
  padded = of_labels(jnp.array([1.0, 1.0, 1.0, 0.0]))
  got, whole = jax.jit(padded)(jnp.array([0, 1, 2, -1])), jax.jit(of_labels())(jnp.arange(4) % 3)
  np.testing.assert_allclose(got, [*whole[:3], 0.0], rtol=1e-5)
  assert got[3] == 0.0


def test_log_predictive_of_a_label_out_of_range_is_nan_under_jit(optimising_jit):
  """Of a sum of exponentials alone XLA on CPUs makes a number of the NaN."""
  run = optimising_jit(of_labels())
  for n in (2, 4):
    for label in (-1, 3):
      found = run(jnp.ones(n, jnp.int32).at[1].set(label))
      np.testing.assert_array_equal(np.isnan(found), np.arange(n) == 1)


def test_a_traced_sigma_of_infinity_has_no_posterior_and_no_evidence():
  linear, theta = sm.gaussian(lambda theta, x: x * theta["w"]), {"w": jnp.zeros([])}
  batch = sm.Batch(jnp.ones(3), jnp.arange(3.0))
  inner = sm.Inner(optax.sgd(0.2), tol=1e-4)

  @jax.jit
  def run(s):
    posterior = sm.posterior(linear, {"w": "w"}, theta, {"w": s}, theta, batch)
    batches = jax.tree.map(lambda x: x[None], batch)
    return (
      posterior.predictive(jnp.ones(1)).variance,
      sm.log_evidence(linear, {"w": "w"}, theta, {"w": s}, batch, inner)[0],
      sm.restriction(linear, {"w": "w"}, theta, {"w": s}, batches, ["w"]),
    )

  assert all(np.isfinite(x).all() for x in run(0.0))
  assert all(np.isnan(x).all() for x in run(jnp.inf))


@pytest.mark.parametrize("rank", (None, 2))
def test_a_density_that_is_not_concave_has_no_posterior(rank):
  rising = sm.Likelihood(lambda theta, x: x @ theta["w"], lambda f, y: jnp.square(f - y))
  phi, batch = {"w": jnp.zeros(3)}, sm.Batch(jnp.eye(3), jnp.ones(3))

  @jax.jit
  def variance(phi):
    found = sm.posterior(rising, {"w": "w"}, phi, {"w": 0.0}, phi, batch, rank=rank)
    return found.predictive(batch.inputs).variance

  assert np.isnan(variance(phi)).all()


def test_a_flat_example_that_is_not_concave_beside_a_sharp_one():
  density = lambda f, y: jnp.where(y > 0, -1e4, 0.25) * jnp.square(f)
  mixed = sm.Likelihood(lambda theta, x: x @ theta["w"], density)
  phi, batch = {"w": jnp.ones(2)}, sm.Batch(jnp.eye(2), jnp.array([1.0, 0.0]))
  found = sm.posterior(mixed, {"w": "w"}, phi, {"w": 0.0}, phi, batch)
  assert np.isnan(found.predictive(batch.inputs).variance).all()
  evidence = sm.log_evidence(mixed, {"w": "w"}, phi, {"w": 0.0}, batch)[0]
  assert np.isnan(evidence)


def test_outputs_of_several_arrays_are_refused_by_name():
  likelihood = sm.Likelihood(lambda t, x: {"f": x * t["w"]}, lambda f, y: -((y - f["f"]) ** 2))
  batch = sm.Batch(jnp.ones(3), jnp.ones(3))
  with pytest.raises(ValueError, match="predict returned dict: a dual solve"):
    sm.posterior(likelihood, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, {"w": 0.5}, batch)


def test_no_examples_to_predict():
  linear, batch = sm.gaussian(lambda t, x: x * t["w"]), sm.Batch(jnp.ones(3), jnp.ones(3))
  found = sm.posterior(linear, {"w": "w"}, {"w": 0.0}, {"w": 0.0}, {"w": 0.5}, batch)
  assert found.predictive(jnp.ones(0)).variance.shape == (0,)
