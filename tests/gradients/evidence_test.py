"""The evidence: closed forms for linear-Gaussian models, central differences on a network."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from shrinkmeta.base import InnerInfo
from shrinkmeta.gradients.evidence import evidence_at
from shrinkmeta.mode.optimise import Mode
from shrinkmeta.mode.task_model import task_model

pytestmark = pytest.mark.usefixtures("x64")

# D = 45 parameters that could move, "e" frozen, and a learnt noise scale; N = 70.
SIZES = {"a": (4, 3), "b": (10,), "c": (9,), "d": (8,), "e": (6,)}
LOG_SIGMA2 = {
  "a": np.log(1e-6), "b": np.log(1e-2), "c": 0.3, "d": np.log(1e2), "e": -np.inf, "s": -np.inf
}  # fmt: skip
D, N = 45, 70
MODE = sm.Inner(optax.sgd(0.37, momentum=0.86), steps=4000, tol=1e-13)
NEWTON = sm.Implicit(curvature="hessian", max_steps=400, tol=1e-13)


def vector(theta):
  return ravel_pytree({m: theta[m] for m in SIZES})[0]


LINEAR = sm.gaussian_with_scale(lambda theta, x: (x @ vector(theta), theta["s"]))


def linear_problem(seed=0, num_tasks=None, n=N):
  rng = np.random.default_rng(seed)
  phi = {m: jnp.asarray(rng.normal(size=shape)) for m, shape in SIZES.items()}
  phi["s"] = jnp.asarray(np.log(0.7))
  lead = () if num_tasks is None else (num_tasks,)
  x = jnp.asarray(rng.normal(size=(*lead, n, D)) / np.sqrt(D))
  y = x @ vector(phi) + jnp.asarray(rng.normal(size=(*lead, n)))
  mask = np.ones((*lead, n))
  mask[..., -5:] = 0.0
  return {m: m for m in (*SIZES, "s")}, phi, sm.Batch(x, y, jnp.asarray(mask))


def marginal(phi, log_sigma2, batch):
  """log N(y; X phi, X S X^T + s^2 I) of the unmasked examples, dense."""
  x, y = batch.inputs[:-5], batch.targets[:-5]
  var = jnp.concatenate(
    [jnp.full(int(np.prod(SIZES[m])), jnp.exp(log_sigma2[m])) for m in sorted(SIZES)]
  )
  cov = (x * var) @ x.T + jnp.exp(2 * phi["s"]) * jnp.eye(len(y))
  return jax.scipy.stats.multivariate_normal.logpdf(y, x @ vector(phi), cov)


def arrays(log_sigma2):
  return {m: jnp.asarray(v) for m, v in log_sigma2.items()}


@pytest.mark.parametrize("n", (25, N))  # N smaller and larger than what moves
def test_linear_gaussian_value_and_every_gradient(n):
  labels, phi, batch = linear_problem(n=n)

  # The fewer examples, the larger the curvature of J / N along the widest modules.
  mode = MODE if n == N else sm.Inner(optax.sgd(0.13, momentum=0.92), steps=8000, tol=1e-13)

  def library(phi, log_sigma2):
    return sm.log_evidence(LINEAR, labels, phi, log_sigma2, batch, mode, frozen=("e", "s"))

  run = jax.jit(jax.value_and_grad(library, argnums=(0, 1), has_aux=True))
  (value, info), (d_phi, d_sigma) = run(phi, arrays(LOG_SIGMA2))
  assert bool(info.inner.converged)
  want, (want_phi, want_sigma) = jax.jit(
    jax.value_and_grad(lambda phi, s2: marginal(phi, s2, batch), argnums=(0, 1))
  )(phi, arrays(LOG_SIGMA2))
  np.testing.assert_allclose(value, want, rtol=1e-10)
  chex.assert_trees_all_close(d_phi, want_phi, rtol=1e-7, atol=1e-9)
  moving = {m: d_sigma[m] for m in "abcd"}
  chex.assert_trees_all_close(moving, {m: want_sigma[m] for m in "abcd"}, rtol=1e-7, atol=1e-9)
  assert all(abs(float(d_sigma[m])) > 1e-7 for m in "abcd")
  primal = jax.jit(lambda phi, s2: library(phi, s2)[0])(phi, arrays(LOG_SIGMA2))
  np.testing.assert_allclose(primal, want, rtol=1e-10)


def test_an_inexact_mode_costs_the_gradient_what_z_is_off_not_its_curvature():
  """At any z: s * grad log p is z at the mode, and each has its share; "e" has grad log p alone."""
  labels, phi, batch = linear_problem()
  rng = np.random.default_rng(3)
  log_sigma2 = {m: jnp.asarray(v) for m, v in LOG_SIGMA2.items()}
  frozen = frozenset({"e", "s"})
  z = {m: None if m in frozen else jnp.asarray(rng.normal(size=x.shape)) for m, x in phi.items()}
  s = {m: jnp.exp(0.5 * v) for m, v in log_sigma2.items()}
  theta = {m: x if m in frozen else x + s[m] * z[m] for m, x in phi.items()}
  info = InnerInfo(*(jnp.zeros([]) for _ in InnerInfo._fields))
  _, grad, *_ = evidence_at(
    task_model(LINEAR, labels, sm.MetaParams(phi, log_sigma2), batch, frozen),
    Mode(theta, z, info),
    implicit=sm.Implicit(max_steps=400, tol=1e-13),
    how=sm.LogDet(),
  )

  g = jax.grad(lambda theta: sm.log_likelihood(LINEAR, theta, batch))(theta)
  kept = batch.inputs[:-5] / jnp.exp(phi["s"])

  def log_det(log_sigma2):
    var = [jnp.full(int(np.prod(SIZES[m])), jnp.exp(log_sigma2[m])) for m in SIZES]
    gram = (kept * jnp.concatenate(var)) @ kept.T
    return jnp.linalg.slogdet(jnp.eye(len(kept)) + gram)[1]

  of_log_det = jax.grad(log_det)(log_sigma2)
  n = N - 5
  for m in SIZES:
    if m == "e":
      np.testing.assert_allclose(grad.phi[m], g[m], rtol=1e-10)
      continue
    want = (g[m] + n * s[m] * z[m]) / (1 + n * s[m] ** 2)
    np.testing.assert_allclose(grad.phi[m], want, rtol=1e-9, err_msg=m)
    sigma = 0.5 * jnp.sum(s[m] * want * z[m]) - 0.5 * of_log_det[m]
    np.testing.assert_allclose(grad.log_sigma2[m], sigma, rtol=1e-9, err_msg=m)


def test_sigma_zero_known_outside_jit_is_cut_off():
  labels, phi, batch = linear_problem()
  value = jax.jit(lambda phi: sm.log_evidence(LINEAR, labels, phi, LOG_SIGMA2, batch, MODE)[0])(phi)
  np.testing.assert_allclose(value, marginal(phi, arrays(LOG_SIGMA2), batch), rtol=1e-10)


def network(theta, x):
  return jnp.tanh(x @ theta["body"]["kernel"] + theta["body"]["bias"]) @ theta["head"]


def network_problem():
  rng = np.random.default_rng(2)
  array = lambda *shape: jnp.asarray(0.7 * rng.normal(size=shape))
  phi = {"body": {"kernel": array(3, 5), "bias": array(5)}, "head": array(5, 3)}
  batch = sm.Batch(array(14, 3), jnp.asarray(rng.integers(0, 3, 14)))
  return sm.categorical(network), sm.by_layer(phi), phi, {"body": -0.5, "head": 0.2}, batch


def test_laplace_gradient_against_central_differences():
  likelihood, labels, phi, log_sigma2, batch = network_problem()
  mode = sm.Inner(optax.sgd(0.1, momentum=0.9), steps=40_000, tol=1e-13)

  def value(phi, log_sigma2):
    return sm.log_evidence(likelihood, labels, phi, log_sigma2, batch, mode, NEWTON)[0]

  run, grads = jax.jit(value), jax.jit(jax.grad(value, argnums=(0, 1)))(phi, arrays(log_sigma2))
  flat, unravel = ravel_pytree((phi, arrays(log_sigma2)))
  h = 1e-4

  def difference(i):
    at = lambda k: float(run(*unravel(flat.at[i].add(k * h))))
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)

  got = ravel_pytree(grads)[0]
  picked = [0, 7, 16, 21, 30, flat.size - 2, flat.size - 1]
  np.testing.assert_allclose(got[jnp.asarray(picked)], [difference(i) for i in picked], rtol=1e-6)


def test_laplace_is_close_to_the_integral_where_the_posterior_is_narrow():
  """One logistic parameter, against quadrature; Laplace's error falls with N."""
  rng = np.random.default_rng(3)
  errors = []
  for n in (10, 400):
    x = jnp.asarray(rng.normal(size=n))
    y = jnp.asarray(rng.uniform(size=n) < 1 / (1 + np.exp(-0.8 * x)), float)
    likelihood = sm.bernoulli(lambda theta, x: x * theta["w"])
    inner = sm.Inner(optax.lbfgs(), steps=100, tol=1e-10)
    phi, batch = {"w": jnp.asarray(0.2)}, sm.Batch(x, y)
    value, _ = sm.log_evidence(likelihood, {"w": "w"}, phi, {"w": 0.0}, batch, inner)
    grid = jnp.linspace(-8, 8, 20_001)
    log_p = -jnp.sum(jax.nn.softplus(-jnp.where(y > 0, 1.0, -1.0) * x * grid[:, None]), 1)
    log_p = log_p + jax.scipy.stats.norm.logpdf(grid, 0.2, 1.0)
    errors.append(
      abs(float(value - jax.scipy.special.logsumexp(log_p) - jnp.log(grid[1] - grid[0])))
    )
  assert errors[1] < 2e-3 and errors[1] < 0.2 * errors[0], errors


def dense_restricted(phi, log_sigma2, batches, integrated):
  """Sum of marginals - log det(sum_t X^T V^-1 X) / 2 + P log(2 pi) / 2, on all examples."""
  names = sorted(SIZES)
  columns = np.concatenate([np.full(int(np.prod(SIZES[m])), m in integrated) for m in names])
  total, log_p = jnp.zeros((columns.sum(), columns.sum())), 0.0
  var = jnp.concatenate([jnp.full(int(np.prod(SIZES[m])), jnp.exp(log_sigma2[m])) for m in names])
  for t in range(len(batches.inputs)):
    one = jax.tree.map(lambda x, t=t: x[t], batches)
    log_p += marginal(phi, log_sigma2, one)
    x = one.inputs[:-5]
    v = (x * var) @ x.T + jnp.exp(2 * phi["s"]) * jnp.eye(len(x))
    total += x[:, columns].T @ jnp.linalg.solve(v, x[:, columns])
  half = 0.5 * jnp.linalg.slogdet(total)[1]
  return log_p - half + 0.5 * columns.sum() * jnp.log(2 * jnp.pi)


MAKE = functools.partial(
  sm.empirical_bayes, inner=MODE, phi_optimizer=optax.sgd(1e-2), sigma_optimizer=optax.sgd(1e-2)
)
INIT = {m: float(np.exp(0.5 * v)) for m, v in LOG_SIGMA2.items()}


@pytest.mark.parametrize(
  "restricted, batching", (((), "vmap"), (("b", "e"), "vmap"), (("b", "e"), "sequential"), ((), 2))
)
def test_the_learner_follows_the_mean_negative_log_evidence(restricted, batching):
  labels, phi, batches = linear_problem(num_tasks=3)
  learner = MAKE(LINEAR, labels, init_sigma=INIT, restricted=restricted, batching=batching)
  state, tasks = learner.init(phi), sm.Task(batches, None)
  grad, metrics = jax.jit(learner.meta_gradient)(state, tasks)

  def objective(phi, log_sigma2):
    if restricted:
      return -dense_restricted(phi, log_sigma2, batches, restricted) / 3
    one = lambda t: marginal(phi, log_sigma2, jax.tree.map(lambda x: x[t], batches))
    return -sum(one(t) for t in range(3)) / 3

  both = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))
  value, (d_phi, d_sigma) = both(phi, state.log_sigma2)
  np.testing.assert_allclose(metrics.phi_loss, value, rtol=1e-9)
  chex.assert_trees_all_close(grad.phi, d_phi, rtol=1e-6, atol=1e-9)
  for m in "abcd":
    np.testing.assert_allclose(grad.log_sigma2[m], d_sigma[m], rtol=1e-6, atol=1e-9)
  assert int(metrics.num_failed) == 0 and np.isnan(float(metrics.loss))
  if batching == "sequential":
    new, _ = jax.jit(learner.update)(state, tasks)
    assert float(new.log_sigma2["e"]) == -np.inf and float(new.phi["s"]) != float(phi["s"])
  if batching == 2:
    start = learner.no_start(state, 3)
    run = jax.jit(learner.meta_gradient)
    again = run(state, tasks, None, run(state, tasks, None, start)[1].warm)
    assert int(np.max(again[1].inner.steps)) < int(np.min(metrics.inner.steps))
    chex.assert_trees_all_close(again[0], grad, rtol=1e-6, atol=1e-9)


def test_a_task_draws_the_same_however_tasks_are_batched():
  labels, phi, batches = linear_problem(num_tasks=3)
  inner = sm.Inner(optax.sgd(0.02), steps=5, tol=1e-12, batch_size=4)
  make = functools.partial(MAKE, LINEAR, labels, init_sigma=INIT, inner=inner)
  state, tasks, key = make().init(phi), sm.Task(batches, None), jax.random.key(1)
  found = [make(batching=b).meta_gradient(state, tasks, key)[0] for b in ("vmap", 2)]
  chex.assert_trees_all_close(*found, rtol=1e-9, atol=1e-12)


def test_check_meta_gradient_knows_the_evidence():
  rng = np.random.default_rng(5)
  likelihood = sm.gaussian_with_scale(lambda th, x: (x * th["slope"] + th["level"], th["s"]))
  phi = {"slope": jnp.asarray(0.3), "level": jnp.asarray(-0.2), "s": jnp.asarray(-0.4)}
  batches = sm.Batch(*jnp.asarray(rng.normal(size=(2, 3, 7))))
  sigma = {"slope": 0.5, "level": 1.2, "s": 0.0}
  inner = sm.Inner(optax.sgd(0.1, momentum=0.8), steps=2000, tol=1e-13)
  learner = sm.empirical_bayes(likelihood, sm.by_leaf(phi), inner=inner, init_sigma=sigma)
  state, tasks = learner.init(phi), sm.Task(batches, batches)
  rows = sm.check_meta_gradient(learner, state, tasks).rows
  assert {r.module for r in rows if r.parameter == "log_sigma2"} == {"slope", "level"}
  assert {r.module for r in rows if r.parameter == "phi"} == {"slope", "level", "s"}
  assert max(r.error for r in rows) < 1e-6 and max(r.unrolled_error for r in rows) < 1e-6
  assert np.isfinite(float(jax.jit(learner.meta_gradient)(state, tasks)[1].loss))


def test_errors_that_help():
  labels, phi, batch = linear_problem()
  with pytest.raises(ValueError, match="no evidence"):
    sm.log_evidence(LINEAR, labels, phi, LOG_SIGMA2 | {"a": np.inf}, batch)
  with pytest.raises(ValueError, match="must be finite"):
    MAKE(LINEAR, labels, init_sigma=np.inf)
  with pytest.raises(TypeError, match="restricted"):
    sm.sigma_imaml(LINEAR, labels, restricted=("a",))
  with pytest.raises(ValueError, match="is no module"):
    sm.restriction(LINEAR, labels, phi, arrays(LOG_SIGMA2), batch, ("nobody",))


@pytest.mark.usefixtures("x64")
def test_restriction_keeps_float32():
  linear = sm.gaussian(lambda theta, x: x @ theta["a"] + x @ theta["b"])
  phi = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros(2, jnp.float32)}
  batch = sm.Batch(jnp.ones((3, 4, 2), jnp.float32), jnp.ones((3, 4), jnp.float32))
  log_sigma2 = {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}
  labels = {"a": "a", "b": "b"}
  assert sm.restriction(linear, labels, phi, log_sigma2, batch, ("a",)).dtype == jnp.float32


def test_restriction_in_float32_where_sigma_is_large():
  """A random intercept, N = 1000, sigma^2 = 1e4: its information is 1 / (sigma^2 + 1 / N)."""
  linear = sm.gaussian(lambda theta, x: theta["level"] + 0.0 * x)
  batch = sm.Batch(jnp.zeros((1, 1000)), jnp.zeros((1, 1000)))
  found = sm.restriction(
    linear, {"level": "level"}, {"level": 0.0}, {"level": np.log(1e4)}, batch, ("level",)
  )
  exact = 0.5 * np.log(2 * np.pi) - 0.5 * np.log(1 / (1e4 + 1e-3))
  np.testing.assert_allclose(found, exact, atol=1e-4)
