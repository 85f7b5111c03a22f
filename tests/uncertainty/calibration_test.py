"""Calibration figures agree with scikit-learn and with counts by hand."""

from typing import Any

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


def test_a_label_of_padding_may_be_anything_under_jit():
  log_p = jnp.log(jnp.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]))
  targets, mask = jnp.array([0, 1, -1]), jnp.array([1.0, 1.0, 0.0])
  found = jax.jit(lambda log_p, mask: sm.calibration(log_p, targets, mask))(log_p, mask)
  assert found.accuracy == 1.0


def test_a_level_of_nearly_1():
  zero, targets = jnp.zeros(2), jnp.array([0.0, 9.0])
  assert sm.coverage(zero, jnp.array([0.0, 1.0]), targets, 1 - 1e-9) == 0.5
  assert sm.coverage(zero, jnp.ones(2), targets, jnp.float32(0.5)) == 0.5
  with pytest.raises(TypeError, match="level must be a number"):
    sm.coverage(zero, zero, targets, jnp.array([0.5, 0.9]))


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


LOGITS, TARGETS = jnp.array([[0.0, 1.0], [2.0, 0.0], [0.5, 0.0]]), jnp.array([0, 0, 1])


@pytest.mark.parametrize("jit", (False, True))
@pytest.mark.parametrize("shape", ((3, 1), (1, 3), (1,), (), (2,), (3, 3)))
def test_a_mask_of_another_shape(jit, shape):
  """Broadcast, [3, 1] counts every example three times: an accuracy of 2."""
  wrap = jax.jit if jit else lambda f: f
  with pytest.raises(ValueError, match=r"mask must have shape \(3,\), one weight.*got \("):
    wrap(sm.calibration)(LOGITS, TARGETS, jnp.ones(shape))
  covered = lambda mask: sm.coverage(jnp.zeros(3), jnp.ones(3), jnp.zeros(3), mask=mask)
  with pytest.raises(ValueError, match=r"mask must have shape \(3,\), one weight.*got \("):
    wrap(covered)(jnp.ones(shape))


def test_a_mask_of_examples_with_several_outputs():
  mean, targets = jnp.zeros([2, 2]), jnp.array([[0.0, 5.0], [5.0, 5.0]])
  covered = lambda mask: float(sm.coverage(mean, jnp.ones([2, 2]), targets, mask=mask))
  assert covered(jnp.array([[1.0], [0.0]])) == 0.5
  assert covered(jnp.array([[1.0, 0.0], [0.0, 0.0]])) == 1.0
  with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\).*got \(2,\)"):
    covered(jnp.array([1.0, 0.0]))  # of examples or of outputs?


@pytest.mark.parametrize("jit", (False, True))
@pytest.mark.parametrize("which", (0, 1, 2))
def test_what_is_no_number_stays_none(jit, which):
  wrap = jax.jit if jit else lambda f: f
  arguments = [jnp.zeros(2), jnp.ones(2), jnp.zeros(2)]
  arguments[which] = arguments[which].at[1].set(jnp.nan)
  assert np.isnan(wrap(sm.coverage)(*arguments))
  dropped = wrap(lambda *a: sm.coverage(*a, mask=jnp.array([1.0, 0.0])))(*arguments)
  assert float(dropped) == 1.0
  logits = LOGITS.at[1, 0].set(jnp.nan)
  assert np.isnan(wrap(sm.calibration)(logits, TARGETS)).all()
  mask = jnp.array([True, False, True])
  np.testing.assert_allclose(
    wrap(sm.calibration)(logits, TARGETS, mask), sm.calibration(LOGITS, TARGETS, mask), rtol=1e-6
  )


def test_a_weight_or_a_deviation_that_is_none_under_jit():
  assert np.isnan(jax.jit(sm.calibration)(LOGITS, TARGETS, jnp.array([1.0, jnp.nan, 1.0]))).all()
  assert np.isnan(sm.coverage(jnp.zeros(2), jnp.array([1.0, -1.0]), jnp.zeros(2)))
  for mask in ([1.0, jnp.nan, 1.0], [1, -1, 1]):
    with pytest.raises(ValueError, match="mask must be 0, 1 or a positive weight"):
      sm.calibration(LOGITS, TARGETS, jnp.array(mask))


def test_weights_count():
  found = sm.calibration(LOGITS, targets=TARGETS, mask=jnp.array([2, 1, 0]))
  rows = jnp.array([0, 0, 1])
  np.testing.assert_allclose(found, sm.calibration(LOGITS[rows], TARGETS[rows]), rtol=1e-6)


ANY: Any = sm  # for arguments of wrong types


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: ANY.calibration([[0.0, 1.0]], TARGETS),
      r"log_probabilities must be .* \[N, C\]; got a l",
    ),
    (
      lambda: ANY.calibration(LOGITS, [0, 0, 1]),
      r"targets must be an array \[N\] of .*; got a list",
    ),
    (lambda: ANY.calibration(LOGITS, TARGETS, [1, 1, 1]), r"mask must be an array of shape \(3,\)"),
    (lambda: ANY.calibration(LOGITS, TARGETS, "all"), r"mask must be .*; got 'all'"),
    (lambda: ANY.calibration(LOGITS, TARGETS, 1j * TARGETS), r"mask must be bool.*; got complex64"),
    (
      lambda: ANY.calibration(LOGITS, TARGETS, bins=1.5),
      r"bins must be an integer of at least 1; got 1.5",
    ),
    (lambda: ANY.coverage(None, TARGETS, TARGETS), r"mean must be an array \[N, ...\]; got None"),
    (lambda: ANY.coverage(TARGETS, TARGETS, [0, 0, 1]), r"targets must be an array .*; got a list"),
    (
      lambda: ANY.coverage(TARGETS, TARGETS, TARGETS, "95%"),
      r"level must be a number; got '95%'",
    ),
  ],
)
def test_arguments_of_wrong_types(call, message):
  with pytest.raises(TypeError, match=message):
    call()


def test_targets_that_are_no_classes():
  with pytest.raises(ValueError, match=r"targets must be integers, the classes; got dtype float32"):
    sm.calibration(LOGITS, jnp.zeros(3))
  with pytest.raises(ValueError, match=r"bins must be at least 1; got 0"):
    sm.calibration(LOGITS, TARGETS, bins=0)
  with pytest.raises(ValueError, match=r"targets must lie in 0..1; got 0..2"):
    sm.calibration(LOGITS, TARGETS.at[0].set(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("jit", [False, True])
def test_many_predictions_in_sixteen_bits(dtype, jit):
  """A sum of 70,000 numbers stops growing in bfloat16, and is infinite in float16."""
  n = 70_000
  logits, targets = np.tile([[2.0, 0.0]], (n, 1)), (np.arange(n) % 4 == 0).astype(np.int32)
  call = jax.jit(sm.calibration) if jit else sm.calibration
  found = call(jnp.asarray(logits, dtype), jnp.asarray(targets))
  p = 1 / (1 + np.exp(-2.0))  # of class 0, which is right three times in four
  nll = -(0.75 * np.log(p) + 0.25 * np.log(1 - p))
  brier = 0.75 * 2 * (1 - p) ** 2 + 0.25 * 2 * p**2
  np.testing.assert_allclose(found, [0.75, nll, brier, p - 0.75], rtol=1e-4)
  zeros, ones = jnp.zeros(n, dtype), jnp.ones(n, dtype)
  half = jnp.where(jnp.arange(n) % 2 == 0, 1.0, 3.0).astype(dtype)
  np.testing.assert_allclose(sm.coverage(zeros, ones, half), 0.5)
