"""log det(I + s C s) against dense matrices; the stochastic one against its own standard error."""

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
  total = jnp.eye(flat.size)
  for n in range(len(batch.inputs)):
    outputs_of = lambda t, n=n: likelihood.predict(unravel(t), batch.inputs[n : n + 1])
    loss = lambda f, n=n: -likelihood.log_prob(f, batch.targets[n : n + 1])[0]
    j = jax.jacobian(outputs_of)(flat).reshape(-1, flat.size) * s
    f = outputs_of(flat)
    lam = jax.hessian(loss)(f).reshape(f.size, f.size)
    total = total + batch.mask[n] * (j.T @ lam @ j)
  return jnp.linalg.slogdet(total)[1]


CASES = [(n, kind) for n in (6, 30) for kind in ("categorical", "gaussian")]


@pytest.mark.parametrize("n, kind", CASES)  # N C = 18 and 90, D = 45: both forms
def test_exact_value_and_gradient(n, kind):
  likelihood, theta, scale, batch = problem(0, n, kind)

  def library(theta, scale):
    return log_det(sm.LogDet("exact"), model_of(likelihood, theta, batch, scale))[0]

  value, grads = jax.jit(jax.value_and_grad(library, argnums=(0, 1)))(theta, scale)
  want, want_grads = jax.jit(
    jax.value_and_grad(lambda theta, scale: dense(likelihood, theta, scale, batch), argnums=(0, 1))
  )(theta, scale)
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
  exactly = jax.jit(
    lambda theta, scale, batch: log_det(
      sm.LogDet("exact"), model_of(sm.categorical(mlp), theta, batch, scale)
    )[0]
  )
  scores = []
  for seed in range(20):
    _, theta, scale, batch = problem(seed, 20)
    (value, error), _ = stochastic(64)(jax.random.key(seed), theta, scale, batch)
    scores.append(float((value - exactly(theta, scale, batch)) / error))
  assert np.max(np.abs(scores)) < 3.0, scores
  assert np.sum(np.abs(scores) < 2.0) >= 18, scores  # 19 of 20 are expected
  assert 0.5 < np.sqrt(np.mean(np.square(scores))) < 1.4, scores  # and the error is no excuse


def test_stochastic_gradient_is_unbiased():
  likelihood, theta, scale, batch = problem(3, 20)
  want = jax.grad(
    lambda theta, scale: log_det(sm.LogDet("exact"), model_of(likelihood, theta, batch, scale))[0],
    (0, 1),
  )(theta, scale)
  keys = jax.random.split(jax.random.key(0), 400)
  grads = jax.lax.map(lambda key: stochastic(8)(key, theta, scale, batch)[1], keys)
  flat, flat_want = jax.vmap(lambda g: ravel_pytree(g)[0])(grads), ravel_pytree(want)[0]
  error = jnp.std(flat, 0, ddof=1) / np.sqrt(len(keys))
  scores = np.asarray((jnp.mean(flat, 0) - flat_want) / error)
  assert np.max(np.abs(scores)) < 4.0, scores  # of 48 numbers
  assert np.sqrt(np.mean(np.square(scores))) < 1.5, scores
  # and precise enough to see an error of some percent
  assert float(jnp.linalg.norm(error) / jnp.linalg.norm(flat_want)) < 0.05


def test_few_steps_bias_little_on_a_decaying_spectrum():
  likelihood, theta, scale, batch = problem(5, 20)
  (value, error), _ = stochastic(64, steps=12)(jax.random.key(0), theta, scale, batch)
  assert abs(float(value - dense(likelihood, theta, scale, batch))) < 3 * float(error)


def test_auto_asks_for_a_key_where_the_matrix_is_too_large():
  likelihood, theta, scale, batch = problem(0, 6)
  how = sm.LogDet(limit=18 * 45)
  assert float(log_det(how, model_of(likelihood, theta, batch, scale))[1]) == 0.0
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

  value, slope = jax.value_and_grad(library)(scale)
  np.testing.assert_allclose(value, want, rtol=1e-3)
  np.testing.assert_allclose(slope, 12.0, rtol=1e-3)  # twice the rank, s^2 being large


def test_a_curvature_that_is_none_is_no_number():
  likelihood = sm.Likelihood(lambda theta, x: x * theta["w"], lambda f, y: jnp.square(f - y))
  batch = sm.Batch(jnp.ones(2), jnp.ones(2))
  how = sm.LogDet("exact")
  assert np.isnan(log_det(how, model_of(likelihood, {"w": jnp.zeros([])}, batch))[0])


def test_an_estimate_is_no_number_where_the_density_is_not_concave():
  rising = sm.Likelihood(lambda theta, x: x @ theta["w"], lambda f, y: jnp.square(f - y))
  theta, scale = {"w": jnp.zeros(3)}, {"w": jnp.ones([])}
  batch = sm.Batch(jnp.eye(3), jnp.ones(3))
  value, _ = log_det(sm.LogDet("lanczos"), model_of(rising, theta, batch, scale), jax.random.key(0))
  assert jnp.isnan(value)
