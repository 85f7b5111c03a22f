import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm
from shrinkmeta.mode.task_model import task_model
from shrinkmeta.mode.whitening import Whitening, whitening

pytestmark = pytest.mark.usefixtures("x64")

LABELS = {"a": "finite", "b": "frozen", "c": "free"}
LOG_SIGMA2 = {"finite": 2 * np.log(0.3), "frozen": -jnp.inf, "free": jnp.inf}


def test_scale_and_precision():
  white = whitening(LOG_SIGMA2, LABELS, jnp.float64)
  np.testing.assert_allclose([white.scale[k] for k in "abc"], [0.3, 0.0, 1.0], rtol=1e-12)
  np.testing.assert_array_equal([white.precision[k] for k in "abc"], [1.0, 1.0, 0.0])
  assert whitening(LOG_SIGMA2, LABELS, jnp.float32).scale["a"].dtype == jnp.float32


def test_theta():
  phi = {k: jnp.array([1.0, 2.0]) for k in "abc"}
  z = {k: jnp.array([-1.0, 0.5]) for k in "abc"}
  params = sm.MetaParams(phi, {m: jnp.asarray(v) for m, v in LOG_SIGMA2.items()})
  batch = sm.Batch(jnp.ones(1), jnp.ones(1))
  theta = task_model(sm.gaussian(lambda theta, x: x), LABELS, params, batch).theta(z)
  np.testing.assert_allclose(theta["a"], [0.7, 2.15])
  np.testing.assert_array_equal(theta["b"], phi["b"])
  np.testing.assert_array_equal(theta["c"], [0.0, 2.5])


def test_gradients_at_the_limits():
  scales = lambda s: sum(jax.tree.leaves(whitening(s, LABELS, jnp.float64).scale))
  grad = jax.grad(scales)(LOG_SIGMA2)
  np.testing.assert_allclose(grad["finite"], 0.15)  # d sigma / d log sigma^2 = sigma / 2
  assert grad["frozen"] == 0.0 and grad["free"] == 0.0


@pytest.mark.parametrize(
  ("count", "curvature", "c"), ((0.0, 0.0, 0.0), (7.0, 2.0, 7.0), (1.0, 7.0, 7.0))
)
def test_balance_weighs_by_sigma(count, curvature, c):
  """Forms that contradict each other: what comes out tells how much it took of each."""
  scale = {"tight": jnp.asarray(0.0), "wide": jnp.asarray(3.0), "free": 1.0, "held": None}
  direct = {m: jnp.array([2.0, -1.0]) for m in scale}
  scaled = {m: jnp.array([5.0, 4.0]) for m in scale} | {"free": 0.0, "held": None}
  params = sm.MetaParams(direct, dict.fromkeys(scale, jnp.zeros([])))
  batch = sm.Batch(jnp.ones(1), jnp.ones(1))
  model = task_model(sm.gaussian(lambda theta, x: x), {m: m for m in scale}, params, batch)
  model = dataclasses.replace(model, white=Whitening(scale, scale), count=jnp.asarray(count))
  u = {m: jnp.array([1.0, 2.0]) for m in scale} | {"held": None}
  curved = jax.tree.map(lambda x: curvature * x, u)
  got = model.balance(direct, scaled, model.curvature_along(u, curved))
  for name in ("tight", "held"):
    np.testing.assert_array_equal(got[name], direct[name])
  np.testing.assert_allclose(got["free"], direct["free"] / (1.0 + c), rtol=1e-14)
  want = (direct["wide"] + c * 3.0 * scaled["wide"]) / (1.0 + c * 9.0)
  np.testing.assert_allclose(got["wide"], want, rtol=1e-14)


def model_with(free, frozen=frozenset(), dtype=jnp.float64):
  phi = {k: jnp.array([1.0, 2.0], dtype) for k in "ab"}
  log_sigma2 = {m: jnp.asarray(jnp.inf if m in free else 0.0, dtype) for m in "ab"}
  batch = sm.Batch(jnp.array([[1.0, -1.0], [0.5, 2.0]], dtype), jnp.array([0.3, -1.0], dtype))
  network = sm.gaussian(lambda theta, x: jnp.tanh(x * theta["a"]) @ theta["b"])
  params = sm.MetaParams(phi, log_sigma2)
  return task_model(network, {m: m for m in "ab"}, params, batch, frozen, free)


@pytest.mark.parametrize("frozen", (frozenset(), frozenset("b")))
def test_without_a_prior_z_can_be_theta(frozen):
  model = model_with(frozenset("ab") - frozen, frozen)
  zero, start = model.from_zero()
  step = jax.tree.map(lambda x: 0.1 * jnp.arange(1.0, 3.0), start)
  z = jax.tree.map(jnp.add, start, step)
  jax.tree.map(np.testing.assert_array_equal, zero.theta(start), model.params.phi)
  jax.tree.map(np.testing.assert_allclose, zero.theta(z), model.theta(step))
  got, want = (m.value_and_grad(at, m.batch) for m, at in ((zero, z), (model, step)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), got, want)


def test_a_prior_or_a_narrow_float_keeps_z():
  for model in (model_with(frozenset("a")), model_with(frozenset("ab"), dtype=jnp.bfloat16)):
    assert model.from_zero() == (model, None)


def test_maml_in_bfloat16_keeps_steps_smaller_than_the_spacing_of_theta():
  """Each of 8 steps moves theta = 256 by 0.25; bfloat16 has 256 and 258, nothing between."""
  likelihood = sm.Likelihood(lambda theta, x: theta["a"] * x, lambda outputs, y: outputs * y)
  phi, one = {"a": jnp.array(256.0, jnp.bfloat16)}, jnp.ones(1, jnp.bfloat16)
  learner = sm.maml(likelihood, {"a": "a"}, inner=sm.Inner(optax.sgd(0.25), 8))
  task = sm.Task(sm.Batch(one, one), sm.Batch(one, one))
  tasks = jax.tree.map(lambda x: x[None], task)
  assert learner.meta_gradient(learner.init(phi), tasks)[1].loss == -258
