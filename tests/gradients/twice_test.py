"""Second derivatives of the mode and the evidence: closed forms, and differences of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.base import MetaParams
from shrinkmeta.gradients.log_det import log_det_twice
from shrinkmeta.mode.task_model import task_model
from tests.compiled import factorisations

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
N = 6
X, Y, G = RNG.normal(size=(2, N, 3)), RNG.normal(size=(2, N)), RNG.normal(size=3)
KEEP = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0.0]])  # the second task has padding
SHORT = sm.Inner(optax.sgd(0.1), steps=3)  # Newton's steps do the rest
LABELS = {"w": "w", "u": "u", "level": "level"}


def line(theta, x):
  return x[:, :2] @ theta["w"] + x[:, 2] * theta["u"] + theta["level"]


def library(name, v, x, y, mask):
  """g . theta_hat or log evidence, in log sigma^2, phi, a scale of x, the noise, a frozen level."""
  phi = {"w": G[:2] + v[2], "u": jnp.asarray(G[2]), "level": v[5]}
  log_s2 = {"w": v[0], "u": v[1], "level": -np.inf}
  problem = (sm.gaussian(line, v[4]), LABELS, phi, log_s2, sm.Batch(v[3] * x, y, mask))
  if name == "evidence":
    value, info = sm.log_evidence(*problem, SHORT, twice=True)
    return value, info.inner.converged
  theta, info = sm.map_estimate(*problem, SHORT, twice=True)
  return G[:2] @ theta["w"] + theta["u"], info.converged


def closed_form(name, v, x, y):
  s = jnp.exp(jnp.stack([v[0], v[0], v[1]]))
  phi = jnp.stack([G[0] + v[2], G[1] + v[2], jnp.asarray(G[2])])
  x, r = v[3] * x, y - v[3] * x @ phi - v[5]
  covariance = v[4] ** 2 * jnp.eye(len(y)) + (x * s) @ x.T
  solved = jnp.linalg.solve(covariance, r)
  log_normal = -0.5 * (r @ solved + jnp.linalg.slogdet(2 * jnp.pi * covariance)[1])
  theta = phi + s * (x.T @ solved)
  return log_normal if name == "evidence" else jnp.append(G[:2], 1.0) @ theta


V = np.array([-0.4, 0.3, 0.2, 1.2, 0.7, -0.5])


@pytest.mark.parametrize("name,way", (("mode", jax.jacrev), ("evidence", jax.jacfwd)))
def test_linear_gaussian_tasks_under_vmap(name, way):
  """Two tasks with padding, a frozen module and a traced noise; forwards alone, backwards alone."""

  def tasks(v):
    value, converged = jax.vmap(lambda *task: library(name, v, *task))(X, Y, KEEP)
    return value, (value, converged)

  def first(v):
    slope, aux = way(tasks, has_aux=True)(v)
    return slope, (slope, *aux)

  program = jax.jit(way(first, has_aux=True)).lower(V).compile()
  second, (slope, value, converged) = program(V)
  assert np.all(converged)
  of = lambda v, t, n: closed_form(name, v, X[t, :n], Y[t, :n])
  exact = lambda v: jnp.stack([of(v, 0, N), of(v, 1, 4)])
  want = jax.jit(lambda v: (exact(v), jax.jacrev(exact)(v), jax.hessian(exact)(v)))(V)
  for found, expected in zip((value, slope, second), want, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)
  # A batch of factorisations can hang: docs/hazards.md#lapack-threads.
  assert jax.default_backend() != "cpu" or set(factorisations(program)) == {1}


LONG = sm.Inner(optax.sgd(0.15, momentum=0.8), steps=3000, tol=1e-13)
EXACT = sm.Implicit(curvature="hessian", max_steps=50, tol=1e-14)


def network(v, twice):
  """A loss of theta_hat, and the evidence, in log sigma^2, phi, a scale of x and the noise."""
  phi = {"in": jnp.array([0.8, -1.1]), "out": jnp.array([0.9, 0.7]) + v[1]}
  predict = lambda t, x: jnp.tanh(x[:, None] * t["in"]) @ t["out"]
  batch = sm.Batch(v[2] * X[0, :, 0], jnp.asarray(Y[0]))
  log_s2 = {"in": v[0], "out": 0.3}
  problem = (sm.gaussian(predict, v[3]), {"in": "in", "out": "out"}, phi, log_s2, batch)
  theta, _ = sm.map_estimate(*problem, LONG, EXACT, twice=twice)
  evidence, _ = sm.log_evidence(*problem, LONG, EXACT, twice=twice)
  return jnp.stack([jnp.sum(jnp.sin(theta["in"])) * theta["out"][0], evidence])


def test_a_network_against_differences_of_gradients():
  v, h = np.array([-0.4, 0.1, 1.2, 0.6]), 1e-4
  moved = v + h * np.concatenate([0 * v[None], np.eye(4), -np.eye(4)])
  both = lambda twice: jax.jacrev(lambda v: (network(v, twice),) * 2, has_aux=True)
  slopes, values = jax.jit(jax.vmap(both(False)))(moved)

  @jax.jit
  def twice(v):
    def first(v):
      slope, value = both(True)(v)
      return slope, (value, slope)

    return jax.jacfwd(first, has_aux=True)(v)

  second, (value, slope) = twice(v)
  np.testing.assert_allclose(value, values[0], rtol=1e-10)
  np.testing.assert_allclose(slope, slopes[0], rtol=1e-6)
  differences = np.moveaxis(slopes[1:5] - slopes[5:], 0, -1) / (2 * h)
  np.testing.assert_allclose(second, differences, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(second, np.swapaxes(second, 1, 2), rtol=1e-9)


def test_a_module_without_a_prior():
  """The mode is exact where the data determine the module, and NaN where they do not."""

  def mode(v, x):
    phi = {"w": G[:2] * v[1], "u": jnp.asarray(G[2]), "level": jnp.zeros([])}
    log_s2 = {"w": v[0], "u": jnp.inf, "level": -jnp.inf}
    batch = sm.Batch(x, jnp.asarray(Y[0]))
    likelihood = sm.gaussian(line, v[2])
    theta, _ = sm.map_estimate(likelihood, LABELS, phi, log_s2, batch, SHORT, twice=True)
    return theta["u"] + theta["w"][0] ** 2

  def exact(v, x):
    precision = jnp.diag(jnp.exp(-v[0]) * jnp.array([1.0, 1.0, 0.0]))
    phi = jnp.append(G[:2] * v[1], 0.0)
    side = x.T @ Y[0] / v[2] ** 2 + precision @ phi
    theta = jnp.linalg.solve(precision + x.T @ x / v[2] ** 2, side)
    return theta[2] + theta[0] ** 2

  v = np.array([-0.4, 1.1, 0.7])
  second = jax.jit(jax.hessian(mode))
  want = jax.jit(jax.hessian(exact))(v, X[0])
  np.testing.assert_allclose(second(v, X[0]), want, rtol=1e-8, atol=1e-10)
  assert np.isnan(second(v, X[0] * [1, 1, 0])).all()


def test_modules_that_rounding_alone_tells_apart():
  """Two modules without a prior, whose columns differ by 1e-8: K is singular up to rounding."""
  log_s2 = {"w": 0.0, "u": np.inf, "level": np.inf}

  def mode(change):
    x = jnp.concatenate([X[0, :, :2], 1.0 + change * X[0, :, 2:]], axis=1)
    batch = sm.Batch(x, jnp.asarray(Y[0]))
    arguments = problem(log_sigma2=log_s2, batch=batch, inner=SHORT, twice=True)
    return sm.map_estimate(**arguments)[0]["u"]

  found = jax.jit(jax.vmap(mode))(np.array([1.0, 1e-3, 1e-8, 2e-8, 3e-8, 0.0]))
  assert np.isnan(found).tolist() == [False, False, True, True, True, True]


def test_the_determinant_of_a_sharp_likelihood_in_float32():
  """K^-1 (K - K_0) would cancel: its entries are the noise to the power of -2 beside 1."""
  x = RNG.normal(size=(10, 20)).astype(np.float32)
  batch = sm.Batch(x, jnp.zeros(10, jnp.float32))
  likelihood = sm.gaussian(lambda t, x: x @ t["w"], 1e-3)

  def determinant(log_s2):
    params = MetaParams({"w": jnp.zeros(20, jnp.float32)}, {"w": log_s2})
    return log_det_twice(
      sm.LogDet(), task_model(likelihood, {"w": "w"}, params, batch, frozenset())
    )

  at = jnp.float32(0.3)
  found = jax.jit(
    lambda v: (determinant(v), jax.grad(determinant)(v), jax.hessian(determinant)(v))
  )(at)
  assert all(v.dtype == np.float32 for v in found)
  square = np.exp(0.3) * np.linalg.svd(x.astype(np.float64), compute_uv=False) ** 2 / 1e-6
  share = square / (1 + square)
  want = (np.log1p(square).sum(), share.sum(), (share / (1 + square)).sum())
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def problem(**changes) -> dict[str, Any]:
  """The arguments of `map_estimate` for one linear task."""
  phi = {"w": G[:2], "u": jnp.asarray(G[2]), "level": jnp.zeros([])}
  log_s2 = {"w": 0.0, "u": 0.1, "level": 0.2}
  arguments = {"likelihood": sm.gaussian(line), "labels": LABELS, "phi": phi, "log_sigma2": log_s2}
  return arguments | {"batch": sm.Batch(X[0], jnp.asarray(Y[0]))} | changes


def test_a_saddle_point_is_no_mode():
  """At theta = 0 the gradient is 0, but the Hessian has a negative eigenvalue."""
  predict = lambda t, x: x[:, 0] * t["a"] * t["b"]
  zero, labels = {"a": jnp.zeros([]), "b": jnp.zeros([])}, {"a": "a", "b": "b"}
  batch = sm.Batch(X[0], 5.0 * X[0, :, 0])

  def at(log_s2):
    arguments = (sm.gaussian(predict), labels, zero, {"a": log_s2, "b": 0.0}, batch, SHORT)
    theta, info = sm.map_estimate(*arguments, twice=True)
    return theta["a"], info.converged, sm.log_evidence(*arguments, twice=True)[0]

  theta, converged, evidence = jax.jit(at)(0.0)
  assert np.isnan(theta) and not converged and np.isnan(evidence)


REFUSED = {
  "Inner.batch_size": {"inner": sm.Inner(steps=1, batch_size=2)},
  "Implicit.batch_size": {"implicit": sm.Implicit(batch_size=2)},
  "Implicit.damping": {"implicit": sm.Implicit(damping=0.1)},
  "Implicit.solver": {"implicit": sm.Implicit(solver="identity")},
  "key": {"key": jax.random.key(0)},
}


@pytest.mark.parametrize("function", (sm.map_estimate, sm.log_evidence))
def test_settings_of_one_derivative_are_refused(function):
  for name, change in REFUSED.items():
    told = f"twice=True takes all examples.*So {name} must be"
    if function is sm.log_evidence and name == "Implicit.batch_size":
      told = "Implicit.batch_size"  # the evidence never takes mini-batches
    with pytest.raises(ValueError, match=told):
      function(**problem(twice=True, **change))
  many = {"w": jnp.zeros(1001)}
  likelihood = sm.gaussian(lambda t, x: x[:, 0] * jnp.sum(t["w"]))
  wide = {"likelihood": likelihood, "labels": {"w": "w"}, "phi": many, "log_sigma2": {"w": 0.0}}
  with pytest.raises(ValueError, match="at most 1000 task-specific parameters.*there are 1001"):
    function(**problem(twice=True, **wide))
  with pytest.raises(TypeError, match="twice must be True or False; got 2"):
    function(**problem(twice=2))


@pytest.mark.parametrize("how", (sm.LogDet("lanczos"), sm.LogDet(limit=17)))
def test_an_estimated_determinant_is_refused(how):
  with pytest.raises(ValueError, match=r"would estimate this one \(24 entries.*LogDet\(.exact.\)"):
    jax.eval_shape(lambda: sm.log_evidence(**problem(twice=True, log_det=how, inner=SHORT)))


def test_derivatives_that_do_not_exist_raise_an_error():
  def level(s, twice):
    likelihood = sm.gaussian(line, s)
    return sm.map_estimate(**problem(likelihood=likelihood, inner=SHORT, twice=twice))[0]["u"]

  one = jnp.ones([])
  with pytest.raises(NotImplementedError, match="differentiated once.*pass twice=True"):
    jax.eval_shape(jax.hessian(lambda s: level(s, False)), one)
  for way in (jax.jacfwd, jax.grad):
    with pytest.raises(NotImplementedError, match="no third derivative"):
      jax.eval_shape(way(way(way(lambda s: level(s, True)))), one)
