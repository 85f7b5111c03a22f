"""The evidence agrees with closed forms for linear models, and with differences for networks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

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


def by_module(flat):
  ends = np.cumsum([np.prod(shape) for shape in SIZES.values()])
  return dict(zip(SIZES, np.split(np.asarray(flat), ends[:-1], axis=-1), strict=True))


def dense(phi, log_sigma2, batches, integrated=()):
  """(value, its gradient in phi, in log_sigma2) of tasks [T, ...], without their padding.

  The sum over tasks of log N(y; X phi, V), V = X S X^T + s^2 I; restricted it is less by
  log det(sum_t A^T V^-1 A) / 2 - P log(2 pi) / 2, A the P columns of X of what is integrated.
  """
  noise = np.exp(2 * float(phi["s"]))
  var = {m: np.exp(log_sigma2[m]) for m in SIZES}
  each = np.concatenate([np.full(np.prod(SIZES[m]), var[m]) for m in SIZES])
  center, total, slopes = np.concatenate([np.ravel(phi[m]) for m in SIZES]), 0.0, []
  value, d_phi, d_sigma = 0.0, dict.fromkeys((*SIZES, "s"), 0.0), dict.fromkeys(SIZES, 0.0)
  for x, y in zip(*(np.asarray(v)[:, :-5] for v in batches[:2]), strict=True):
    inverse, r = np.linalg.inv((x * each) @ x.T + noise * np.eye(len(y))), y - x @ center
    a, columns = inverse @ r, by_module(x)
    value -= 0.5 * (r @ a - np.linalg.slogdet(inverse)[1] + len(y) * np.log(2 * np.pi))
    d_phi["s"] += noise * (a @ a - np.trace(inverse))
    for m, c in columns.items():
      d_phi[m] += np.reshape(c.T @ a, SIZES[m])
      d_sigma[m] += 0.5 * var[m] * (np.sum((c.T @ a) ** 2) - np.sum(c * (inverse @ c)))
    if integrated:
      solved = inverse @ np.concatenate([columns[m] for m in integrated], 1)
      total += solved.T @ np.linalg.solve(inverse, solved)
      slopes.append((solved, columns))
  if integrated:
    value -= 0.5 * (np.linalg.slogdet(total)[1] - len(total) * np.log(2 * np.pi))
    for solved, columns in slopes:  # d total = -A^T V^-1 dV V^-1 A
      d_phi["s"] += noise * np.sum(solved * np.linalg.solve(total, solved.T).T)
      for m, c in columns.items():
        p = solved.T @ c
        d_sigma[m] += 0.5 * var[m] * np.sum(p * np.linalg.solve(total, p))
  return value, d_phi, d_sigma


def one_task(batch):
  return jax.tree.map(lambda x: x[None], batch)


def arrays(log_sigma2):
  return {m: jnp.asarray(v) for m, v in log_sigma2.items()}


@pytest.mark.parametrize("n", (25, N))  # N smaller and larger than what moves
def test_linear_gaussian_value_and_every_gradient(n):
  labels, phi, batch = linear_problem(n=n)

  # The fewer examples, the larger the curvature of J / N along the widest modules.
  mode = MODE if n == N else sm.Inner(optax.sgd(0.13, momentum=0.92), steps=8000, tol=1e-13)

  def library(phi, log_sigma2):
    return sm.log_evidence(LINEAR, labels, phi, log_sigma2, batch, mode, frozen=("e", "s"))

  @jax.jit
  def run(*params):
    primal = library(*params)[0]
    return primal, jax.value_and_grad(library, argnums=(0, 1), has_aux=True)(*params)

  primal, ((value, info), (d_phi, d_sigma)) = run(phi, arrays(LOG_SIGMA2))
  assert bool(info.inner.converged)
  want, want_phi, want_sigma = dense(phi, LOG_SIGMA2, one_task(batch))
  np.testing.assert_allclose([value, primal], want, rtol=1e-10)
  chex.assert_trees_all_close(d_phi, want_phi, rtol=1e-7, atol=1e-9)
  moving = {m: d_sigma[m] for m in "abcd"}
  chex.assert_trees_all_close(moving, {m: want_sigma[m] for m in "abcd"}, rtol=1e-7, atol=1e-9)
  assert all(abs(float(d_sigma[m])) > 1e-7 for m in "abcd")


def test_an_inexact_mode_costs_the_gradient_what_z_is_off_not_its_curvature():
  """At any z: s * grad log p is z at the mode, and each has its share; "e" has grad log p alone."""
  labels, phi, batch = linear_problem()
  rng = np.random.default_rng(3)
  frozen = frozenset({"e", "s"})
  z = {m: None if m in frozen else rng.normal(size=x.shape) for m, x in phi.items()}
  s = {m: np.exp(0.5 * v) for m, v in LOG_SIGMA2.items()}
  theta = {m: x if m in frozen else x + s[m] * z[m] for m, x in phi.items()}
  info = InnerInfo(*(jnp.zeros([]) for _ in InnerInfo._fields))

  @jax.jit
  def run(phi, log_sigma2, theta, z):
    model = task_model(LINEAR, labels, sm.MetaParams(phi, log_sigma2), batch, frozen)
    mode, implicit = Mode(theta, z, info), sm.Implicit(max_steps=400, tol=1e-13)
    return evidence_at(model, mode, implicit=implicit, how=sm.LogDet())[1]

  grad = run(phi, arrays(LOG_SIGMA2), theta, z)
  noise, x = np.exp(2 * float(phi["s"])), np.asarray(batch.inputs[:-5])
  columns = by_module(x)
  kept = {m: c / np.sqrt(noise) for m, c in columns.items()}
  r = np.asarray(batch.targets[:-5]) - x @ np.concatenate([np.ravel(theta[m]) for m in SIZES])
  gram = sum(s[m] ** 2 * k @ k.T for m, k in kept.items())
  for m, k in kept.items():
    g = np.reshape(columns[m].T @ r / noise, SIZES[m])
    if m == "e":
      np.testing.assert_allclose(grad.phi[m], g, rtol=1e-10)
      continue
    want = (g + len(x) * s[m] * z[m]) / (1 + len(x) * s[m] ** 2)
    np.testing.assert_allclose(grad.phi[m], want, rtol=1e-9, err_msg=m)
    of_log_det = s[m] ** 2 * np.sum(k * np.linalg.solve(np.eye(len(x)) + gram, k))
    sigma = 0.5 * np.sum(s[m] * want * z[m]) - 0.5 * of_log_det
    np.testing.assert_allclose(grad.log_sigma2[m], sigma, rtol=1e-9, err_msg=m)


def test_sigma_zero_known_outside_jit_is_cut_off():
  labels, phi, batch = linear_problem()
  value = jax.jit(lambda phi: sm.log_evidence(LINEAR, labels, phi, LOG_SIGMA2, batch, MODE)[0])(phi)
  np.testing.assert_allclose(value, dense(phi, LOG_SIGMA2, one_task(batch))[0], rtol=1e-10)


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

  flat, unravel = ravel_pytree((phi, arrays(log_sigma2)))
  h, picked = 1e-4, np.array([0, 7, 16, 21, 30, flat.size - 2, flat.size - 1])
  moved = np.eye(flat.size)[picked] * h

  @jax.jit
  def run(flat):
    of_flat = lambda v: value(*unravel(v))
    near = flat + jnp.concatenate([k * moved for k in (1, -1, 2, -2)])
    return jax.grad(of_flat)(flat), jax.vmap(of_flat)(near).reshape(4, -1)

  got, (right, left, far_right, far_left) = run(flat)
  want = (8 * (right - left) - (far_right - far_left)) / (12 * h)
  np.testing.assert_allclose(got[picked], want, rtol=1e-6)


def test_laplace_is_close_to_the_integral_where_the_posterior_is_narrow():
  """One logistic parameter, against quadrature; Laplace's error falls with N."""
  rng = np.random.default_rng(3)
  likelihood = sm.bernoulli(lambda theta, x: x * theta["w"])
  inner = sm.Inner(optax.sgd(2.0), steps=400, tol=1e-10)

  @jax.jit
  def run(x, y, mask):
    batch, phi = sm.Batch(x, y, mask), {"w": jnp.asarray(0.2)}
    return sm.log_evidence(likelihood, {"w": "w"}, phi, {"w": 0.0}, batch, inner)

  grid = np.linspace(-8, 8, 4_001)
  x = rng.normal(size=400)
  y = rng.uniform(size=400) < 1 / (1 + np.exp(-0.8 * x))
  errors = []
  for n in (10, 400):
    value, info = run(x, y.astype(float), (np.arange(400) < n).astype(float))
    assert bool(info.inner.converged)
    log_p = -np.logaddexp(0, -np.where(y, 1.0, -1.0) * x * grid[:, None])[:, :n].sum(1)
    log_p += stats.norm.logpdf(grid, 0.2, 1.0)
    integral = special.logsumexp(log_p) + np.log(grid[1] - grid[0])
    errors.append(abs(float(value) - integral))
  assert errors[1] < 2e-3 and errors[1] < 0.2 * errors[0], errors


MAKE = functools.partial(
  sm.empirical_bayes, inner=MODE, phi_optimizer=optax.sgd(1e-2), sigma_optimizer=optax.sgd(1e-2)
)
INIT = {m: float(np.exp(0.5 * v)) for m, v in LOG_SIGMA2.items()}


@pytest.mark.parametrize(
  "restricted, batching", (((), "vmap"), (("b", "e"), "sequential"), ((), 2))
)
def test_the_learner_follows_the_mean_negative_log_evidence(restricted, batching):
  labels, phi, batches = linear_problem(num_tasks=4)
  learner = MAKE(LINEAR, labels, init_sigma=INIT, restricted=restricted, batching=batching)
  state, tasks = learner.init(phi), sm.Task(batches, None)
  if batching == "sequential":  # the gradient as its steps, which are 0.01 of it, show it
    new, metrics = jax.jit(learner.update)(state, tasks)
    back = lambda old, new: (np.asarray(old) - np.asarray(new)) / 1e-2
    grad = sm.MetaParams(
      jax.tree.map(back, phi, new.phi),
      {m: back(state.log_sigma2[m], new.log_sigma2[m]) for m in "abcd"},
    )
    assert float(new.log_sigma2["e"]) == -np.inf and float(new.phi["s"]) != float(phi["s"])
  elif batching == 2:
    run, start = jax.jit(learner.meta_gradient), learner.no_start(state, 4)
    grad, metrics = run(state, tasks, None, start)
    again, warm = run(state, tasks, None, metrics.warm)
    assert int(np.max(warm.inner.steps)) < int(np.min(metrics.inner.steps))
    chex.assert_trees_all_close(again, grad, rtol=1e-6, atol=1e-9)
  else:
    grad, metrics = jax.jit(learner.meta_gradient)(state, tasks)
  total, d_phi, d_sigma = dense(phi, LOG_SIGMA2, batches, restricted)
  np.testing.assert_allclose(metrics.phi_loss, -total / 4, rtol=1e-9)
  want = jax.tree.map(lambda x: -x / 4, d_phi)
  chex.assert_trees_all_close(grad.phi, want, rtol=1e-6, atol=1e-9)
  for m in "abcd":
    np.testing.assert_allclose(grad.log_sigma2[m], -d_sigma[m] / 4, rtol=1e-6, atol=1e-9)
  assert int(metrics.num_failed) == 0 and np.isnan(float(metrics.loss))


def test_a_task_draws_the_same_however_tasks_are_batched():
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(4, 9, 3))), jnp.asarray(rng.normal(size=(4, 9)))
  batch = sm.Batch(x, y)
  inner = sm.Inner(optax.sgd(0.02), steps=5, tol=1e-12, batch_size=4)
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  make = functools.partial(sm.empirical_bayes, likelihood, {"w": "w"}, inner=inner)
  state, tasks, key = make().init({"w": x[0, 0]}), sm.Task(batch, batch), jax.random.key(1)

  @jax.jit
  def run(key):
    return [make(batching=b).meta_gradient(state, tasks, key) for b in ("vmap", 2)]

  (at_once, metrics), (in_blocks, _) = run(key)
  chex.assert_trees_all_close(at_once, in_blocks, rtol=1e-9, atol=1e-12)
  assert np.isfinite(float(metrics.loss))
  apart = optax.tree.sub(run(jax.random.key(2))[0][0], at_once)
  assert float(optax.tree.norm(apart)) > 1e-3


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


def test_restriction_keeps_float32():
  linear = sm.gaussian(lambda theta, x: x @ theta["a"] + x @ theta["b"])
  phi = {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros(2, jnp.float32)}
  batch = sm.Batch(jnp.ones((3, 4, 2), jnp.float32), jnp.ones((3, 4), jnp.float32))
  log_sigma2 = {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}
  labels = {"a": "a", "b": "b"}
  found = jax.eval_shape(lambda: sm.restriction(linear, labels, phi, log_sigma2, batch, ("a",)))
  assert found.dtype == jnp.float32


def test_restriction_in_float32_where_sigma_is_large():
  """A random intercept, N = 1000, sigma^2 = 1e4: its information is 1 / (sigma^2 + 1 / N)."""
  linear = sm.gaussian(lambda theta, x: theta["level"] + 0.0 * x)
  zeros = jnp.zeros((1, 1000), jnp.float32)
  phi, log_sigma2 = {"level": jnp.float32(0.0)}, {"level": np.log(1e4)}
  found = jax.jit(
    lambda x: sm.restriction(
      linear, {"level": "level"}, phi, log_sigma2, sm.Batch(x, x), ("level",)
    )
  )(zeros)
  assert found.dtype == jnp.float32
  exact = 0.5 * np.log(2 * np.pi) - 0.5 * np.log(1 / (1e4 + 1e-3))
  np.testing.assert_allclose(found, exact, atol=1e-4)


@pytest.mark.parametrize("twice", [False, True])
def test_the_info_has_derivative_zero(twice):
  likelihood = sm.gaussian(lambda theta, x: x * theta["w"])
  batch = sm.Batch(jnp.arange(4.0), jnp.arange(4.0))

  def evidence(log_sigma2):
    return sm.log_evidence(
      likelihood, {"w": "w"}, {"w": jnp.array(0.3)}, {"w": log_sigma2}, batch, twice=twice
    )

  at = jnp.array(0.5)
  assert jax.grad(lambda v: evidence(v)[1].log_det)(at) == 0
  slope = jax.grad(lambda v: evidence(v)[0])(at)
  both = jax.grad(lambda v: evidence(v)[0] + 3.0 * evidence(v)[1].log_det)(at)
  assert slope != 0 and both == pytest.approx(slope)
