"""Calibration figures against scikit-learn and against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

import shrinkmeta as sm


def test_against_scikit_learn_and_a_loop():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(400, 4)) * 2, rng.integers(0, 4, 400)
  mask = (rng.uniform(size=400) < 0.8).astype(float)
  found = sm.calibration(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask), bins=10)
  p = np.asarray(jax.nn.softmax(logits))[mask > 0]
  y = labels[mask > 0]
  assert float(found.accuracy) == pytest.approx(metrics.accuracy_score(y, p.argmax(1)), abs=1e-6)
  assert float(found.nll) == pytest.approx(metrics.log_loss(y, p), rel=1e-5)
  assert float(found.brier) == pytest.approx(np.mean(np.sum((p - np.eye(4)[y]) ** 2, 1)), rel=1e-5)
  ece = 0.0
  for low in np.arange(10) / 10:
    inside = (p.max(1) > low) & (p.max(1) <= low + 0.1)
    if inside.any():
      gap = np.mean(p.argmax(1)[inside] == y[inside]) - np.mean(p.max(1)[inside])
      ece += abs(gap) * inside.mean()
  assert float(found.ece) == pytest.approx(ece, rel=1e-4)


def test_a_calibrated_forecast_has_no_error():
  logits = jnp.log(jnp.full((1000, 2), 0.5).at[:, 0].set(0.8).at[:, 1].set(0.2))
  labels = jnp.asarray(np.arange(1000) % 5 == 0, jnp.int32)
  found = sm.calibration(logits, labels)
  assert float(found.ece) == pytest.approx(0.0, abs=1e-5)
  assert float(found.brier) == pytest.approx(2 * 0.8 * 0.2, rel=1e-5)


def test_coverage_counts():
  mean, sd = jnp.zeros(4), jnp.ones(4)
  targets = jnp.asarray([0.0, 1.9, 2.0, -5.0])
  assert float(sm.coverage(mean, sd, targets)) == 0.5
  assert float(sm.coverage(mean, sd, targets, mask=jnp.asarray([1, 1, 0, 0]))) == 1.0
  assert float(sm.coverage(mean, sd, targets, level=0.5)) == 0.25


def test_errors_that_help():
  with pytest.raises(ValueError, match=r"\[N, C\]"):
    sm.calibration(jnp.zeros(3), jnp.zeros(3, int))
  with pytest.raises(ValueError, match="Shapes must agree"):
    sm.coverage(jnp.zeros(3), jnp.zeros(3), jnp.zeros((3, 1)))
  with pytest.raises(ValueError, match="level"):
    sm.coverage(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), level=95)


@pytest.mark.parametrize("label", (-1, 2))
def test_a_label_out_of_range_is_no_number_under_jit(label):
  log_p, labels = jnp.log(jnp.array([[0.3, 0.7], [0.8, 0.2]])), jnp.array([label, 0])
  assert np.isnan(jax.jit(sm.calibration)(log_p, labels)).all()
  masked = jax.jit(sm.calibration)(log_p, labels, jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(masked, sm.calibration(log_p[1:], labels[1:]), rtol=1e-6)
