"""log det(I + s C s) agrees with dense matrices; the estimate, within its standard error."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import shrinkmeta as sm
from shrinkmeta.gradients.log_det import log_det
from tests.task_models import model_of

pytestmark = pytest.mark.usefixtures("x64")


def mlp(theta, x):
  return jnp.tanh(x @ theta["a"]) @ theta["b"] + theta["c"]


def problem(seed, n, likelihood="categorical"):
  """D = 4 * 6 + 6 * 3 + 3 = 45, C = 3."""
  rng = np.random.default_rng(seed)
  array = lambda *shape: jnp.asarray(0.7 * rng.normal(size=shape))
  theta = {"a": array(4, 6), "b": array(6, 3), "c": array(3)}
  scale = {m: jnp.asarray(s) for m, s in zip("abc", rng.uniform(0.05, 1.5, 3), strict=True)}
  mask = jnp.asarray(np.arange(n) < n - 2, float)
  x = array(n, 4)
  if likelihood == "categorical":
    return sm.categorical(mlp), theta, scale, sm.Batch(x, jnp.asarray(rng.integers(0, 3, n)), mask)
  return sm.gaussian(mlp, 0.3), theta, scale, sm.Batch(x, array(n, 3), mask)


def dense(likelihood, theta, scale, batch):
  """By the full Jacobian and the likelihood's own Hessian, example by example."""
  flat, unravel = ravel_pytree(theta)
  s = ravel_pytree(jax.tree.map(lambda x, v: jnp.full(jnp.shape(x), v), theta, scale))[0]

  def of_example(x, target, weight):
    outputs_of = lambda t: likelihood.predict(unravel(t), x[None])
    loss = lambda f: -likelihood.log_prob(f, target[None])[0]
    j = jax.jacobian(outputs_of)(flat).reshape(-1, flat.size) * s
    f = outputs_of(flat)
    lam = jax.hessian(loss)(f).reshape(f.size, f.size)
    return weight * (j.T @ lam @ j)

  return jnp.linalg.slogdet(jnp.eye(flat.size) + jax.vmap(of_example)(*batch).sum(0))[1]


CASES = [(n, kind) for n in (6, 20) for kind in ("categorical", "gaussian")]


@functools.cache
def exact_of(kind):
  """jit of (theta, scale, batch) -> (value, gradients): the library's, and the dense ones."""
  likelihood = sm.categorical(mlp) if kind == "categorical" else sm.gaussian(mlp, 0.3)

  def library(theta, scale, batch):
    return log_det(sm.LogDet("exact"), model_of(likelihood, theta, batch, scale))[0]

  both = library, functools.partial(dense, likelihood)
  return jax.jit(lambda *args: [jax.value_and_grad(f, argnums=(0, 1))(*args) for f in both])


@pytest.mark.parametrize("n, kind", CASES)  # N C = 18 and 60, D = 45: both forms
def test_exact_value_and_gradient(n, kind):
  _, theta, scale, batch = problem(0, n, kind)
  (value, grads), (want, want_grads) = exact_of(kind)(theta, scale, batch)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  chex.assert_trees_all_close(grads, want_grads, rtol=1e-9, atol=1e-11)


@functools.cache
def stochastic(probes, steps=45):
  how = sm.LogDet("lanczos", probes=probes, steps=steps)

  def run(key, seed_theta, scale, batch):
    likelihood = sm.categorical(mlp)
    f = lambda theta, scale: log_det(how, model_of(likelihood, theta, batch, scale), key)
    return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(seed_theta, scale)

  return jax.jit(run)


def test_stochastic_values_lie_within_their_standard_errors():
  scores = []
  for seed in range(20):
    _, theta, scale, batch = problem(seed, 20)
    (value, error), _ = stochastic(64)(jax.random.key(seed), theta, scale, batch)
    exact = exact_of("categorical")(theta, scale, batch)[0][0]
    scores.append(float((value - exact) / error))
  assert np.max(np.abs(scores)) < 3.0, scores
  assert np.sum(np.abs(scores) < 2.0) >= 18, scores  # 19 of 20 are expected
  assert 0.5 < np.sqrt(np.mean(np.square(scores))) < 1.4, scores  # and the error is no excuse


def test_stochastic_gradient_is_unbiased():
  _, theta, scale, batch = problem(3, 20)
  want = exact_of("categorical")(theta, scale, batch)[0][1]
  keys = jax.random.split(jax.random.key(0), 400)

  @jax.jit
  def run(keys):
    of_key = lambda key: ravel_pytree(stochastic(8)(key, theta, scale, batch)[1])[0]
    return jax.lax.map(of_key, keys)

  flat, flat_want = run(keys), ravel_pytree(want)[0]
  error = jnp.std(flat, 0, ddof=1) / np.sqrt(len(keys))
  scores = np.asarray((jnp.mean(flat, 0) - flat_want) / error)
  assert np.max(np.abs(scores)) < 4.0, scores  # of 48 numbers
  assert np.sqrt(np.mean(np.square(scores))) < 1.5, scores
  # and precise enough to see an error of some percent
  assert float(jnp.linalg.norm(error) / jnp.linalg.norm(flat_want)) < 0.05


def test_few_steps_bias_little_on_a_decaying_spectrum():
  _, theta, scale, batch = problem(5, 20)
  (value, error), _ = stochastic(64, steps=12)(jax.random.key(0), theta, scale, batch)
  want = exact_of("categorical")(theta, scale, batch)[1][0]
  assert abs(float(value - want)) < 3 * float(error)


def test_auto_asks_for_a_key_where_the_matrix_is_too_large():
  likelihood, theta, scale, batch = problem(0, 6)
  how = sm.LogDet(limit=18 * 45)
  exact = jax.jit(lambda theta: log_det(how, model_of(likelihood, theta, batch, scale))[1])
  assert float(exact(theta)) == 0.0
  with pytest.raises(ValueError, match="pass key"):
    log_det(sm.LogDet(limit=18 * 45 - 1), model_of(likelihood, theta, batch, scale))


@pytest.mark.parametrize("bad", ({"method": "dense"}, {"probes": 1}, {"steps": 0}, {"limit": 0}))
def test_bad_settings(bad):
  with pytest.raises(ValueError, match="must be"):
    sm.LogDet(**bad)


def test_float32_keeps_what_is_small_beside_the_largest_eigenvalue():
  """24 rows of rank 6 at a noise of 1e-3: A^T A would have lost the ones in I + A^T A."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(24, 6)) @ rng.normal(size=(6, 20))
  want = np.sum(np.log1p(np.linalg.svd(x / 1e-3, compute_uv=False) ** 2))
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"], 1e-3)
  batch = sm.Batch(jnp.asarray(x, jnp.float32), jnp.zeros(24, jnp.float32))
  theta, scale = {"w": jnp.zeros(20, jnp.float32)}, jnp.ones([], jnp.float32)

  def library(scale):
    return log_det(sm.LogDet("exact"), model_of(likelihood, theta, batch, scale))[0]

  value, slope = jax.jit(jax.value_and_grad(library))(scale)
  np.testing.assert_allclose(value, want, rtol=1e-3)
  np.testing.assert_allclose(slope, 12.0, rtol=1e-3)  # twice the rank, s^2 being large


def test_a_curvature_that_is_none_is_no_number():
  likelihood = sm.Likelihood(lambda theta, x: x * theta["w"], lambda f, y: jnp.square(f - y))
  batch = sm.Batch(jnp.ones(2), jnp.ones(2))
  how = sm.LogDet("exact")
  value = jax.jit(lambda w: log_det(how, model_of(likelihood, {"w": w}, batch))[0])
  assert np.isnan(value(jnp.zeros([])))


def test_an_estimate_is_no_number_where_the_density_is_not_concave():
  rising = sm.Likelihood(lambda theta, x: x @ theta["w"], lambda f, y: jnp.square(f - y))
  theta, scale = {"w": jnp.zeros(3)}, {"w": jnp.ones([])}
  batch = sm.Batch(jnp.eye(3), jnp.ones(3))
  how, key = sm.LogDet("lanczos"), jax.random.key(0)
  value = jax.jit(lambda theta: log_det(how, model_of(rising, theta, batch, scale), key)[0])
  assert jnp.isnan(value(theta))
