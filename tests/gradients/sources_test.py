"""Derivatives of the mode and the evidence in data and closed-over numbers, once and twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.mode.optimise import draw
from shrinkmeta.mode.task_model import MetaParams, task_model

pytestmark = pytest.mark.usefixtures("x64")

INNER = sm.Inner(optax.sgd(0.1, momentum=0.7), tol=1e-12, steps=2000)
IMPLICIT = sm.Implicit(max_steps=50, tol=1e-13)
LABELS, LOG_S2 = {"w": "w"}, {"w": -0.4}
RNG = np.random.default_rng(0)
X, Y, G = (RNG.normal(size=shape) for shape in ((8, 3), (8,), (3,)))  # float64 under x64


def quotients(f, v, h=1e-4):
  """Central differences of f, a function of two numbers."""
  at = lambda i, k: f(v + k * h * np.eye(2)[i])
  return [(8 * (at(i, 1) - at(i, -1)) - (at(i, 2) - at(i, -2))) / (12 * h) for i in range(2)]


def linear(scale):
  return sm.gaussian(lambda t, x: x @ t["w"], scale)


def mode(v):
  """g . theta_hat in the noise and in the inputs: the library's, and the closed form."""
  batch = sm.Batch(v[1] * X, jnp.asarray(Y))
  theta, _ = sm.map_estimate(linear(v[0]), LABELS, {"w": G}, LOG_S2, batch, INNER, IMPLICIT)
  return G @ theta["w"]


def exact_mode(v):
  x = v[1] * X
  gram = np.eye(3) * np.exp(0.4) + x.T @ x / v[0] ** 2
  return G @ (G + np.linalg.solve(gram, x.T @ (Y - x @ G) / v[0] ** 2))


def evidence(v):
  batch = sm.Batch(v[1] * X, jnp.asarray(Y))
  return sm.log_evidence(linear(v[0]), LABELS, {"w": G}, LOG_S2, batch, INNER, IMPLICIT)[0]


def exact_evidence(v):
  x = v[1] * X
  covariance = v[0] ** 2 * np.eye(8) + np.exp(-0.4) * x @ x.T
  r = Y - x @ G
  log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
  return -0.5 * (r @ np.linalg.solve(covariance, r) + log_det)


V = np.array([0.7, 1.2])


@pytest.mark.parametrize("jitted", ("outside", "inside"))
@pytest.mark.parametrize("library,exact", ((mode, exact_mode), (evidence, exact_evidence)))
def test_the_gradient_in_a_closed_over_scale_and_in_the_data(library, exact, jitted):
  gradient = jax.jit(jax.grad(library)) if jitted == "outside" else jax.grad(jax.jit(library))
  np.testing.assert_allclose(gradient(V), quotients(exact, V), rtol=1e-9)


@pytest.mark.parametrize("library", (mode, evidence))
def test_a_second_derivative_is_refused(library):
  for twice in (jax.hessian(library), jax.jacrev(jax.jacrev(library))):
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
      jax.eval_shape(twice, V)


def test_integer_labels_have_no_gradient_and_stop_none():
  likelihood = sm.categorical(lambda t, x: x[:, None] * t["w"])
  batch = sm.Batch(jnp.asarray(Y), jnp.arange(8) % 3)

  def f(phi):
    theta, _ = sm.map_estimate(likelihood, LABELS, {"w": phi}, LOG_S2, batch, INNER, IMPLICIT)
    return G @ theta["w"] + sm.log_evidence(likelihood, LABELS, {"w": phi}, LOG_S2, batch)[0]

  assert np.isfinite(jax.jit(jax.grad(f))(G)).all()


@pytest.mark.parametrize("batching", ("vmap", 2))
def test_adapt_tasks_has_the_gradient_of_adapt(batching):
  likelihood = sm.bernoulli(lambda t, x: x @ t["w"])
  batches = sm.Batch(jnp.stack([X, 2 * X, -X]), jnp.stack([Y > 0, Y > 1, Y < 0]).astype(float))
  inner = sm.Inner(optax.sgd(0.3), steps=5, tol=1e-9)
  learner = sm.sigma_imaml(likelihood, LABELS, inner=inner, batching=batching)
  state = learner.init({"w": G})
  at = lambda phi: state._replace(phi={"w": phi})
  many = lambda phi: jnp.sum(learner.adapt_tasks(at(phi), batches)[0]["w"] ** 2)
  one = lambda batch: lambda phi: jnp.sum(learner.adapt(at(phi), batch)[0]["w"] ** 2)

  @jax.jit
  def run(phi):
    each = jax.lax.map(lambda batch: jax.grad(one(batch))(phi), batches)
    return jax.grad(many)(phi), jnp.sum(each, 0)

  np.testing.assert_allclose(*run(G), rtol=1e-9)


ONES, YS, WEIGHTS = np.array([1.0, 1, 1, 3]), np.array([0.0, 1, 2, 10]), [1.0, 2.0, 0.0, 0.05]


@pytest.mark.parametrize("size", (1, 2))
def test_a_draw_of_weighted_examples_is_unbiased(size):
  """The mean over all draws that there are: of the objective, its gradient and the curvature."""
  likelihood = sm.gaussian(lambda t, x: t["m"] * x)
  phi = {"m": jnp.asarray(0.3)}
  batch = sm.Batch(jnp.asarray(ONES), jnp.asarray(YS), jnp.asarray(WEIGHTS))
  model = task_model(likelihood, {"m": "m"}, MetaParams(phi, {"m": jnp.zeros([])}), batch)
  z, keys = {"m": jnp.asarray(0.5)}, jax.random.split(jax.random.key(0), 60)
  implicit = sm.Implicit(batch_size=size)

  def of(key):
    mini = draw(key, batch, size)
    value, grad = model.value_and_grad(z, mini)
    step = lambda p: sm.map_estimate(
      likelihood, {"m": "m"}, {"m": p}, {"m": 0.0}, batch, sm.Inner(steps=1), implicit, key=key
    )[0]["m"]
    c = 1 / jax.grad(step)(phi["m"]) - 1  # d theta / d phi = 1 / (1 + c)
    return value, model.objective(z, mini), grad["m"], c

  found = np.asarray(jax.jit(jax.vmap(of))(keys)).T
  alike = lambda column: np.unique(np.round(found[:, column], 9), axis=0)
  value, objective, gradient = alike([0, 1, 2]).mean(0)
  want = jax.jit(model.value_and_grad)(z, batch)
  np.testing.assert_allclose([value, objective, gradient], [want[0], want[0], want[1]["m"]], 1e-7)
  curvature = batch.mask @ ONES**2
  np.testing.assert_allclose(alike([3]).mean(), curvature, rtol=1e-7)
