import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
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
