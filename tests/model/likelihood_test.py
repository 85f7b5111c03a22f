from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import shrinkmeta as sm
from shrinkmeta.model.outputs import check_targets

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
F = RNG.normal(size=(4, 3))
identity = lambda theta, inputs: inputs


def check(likelihood, outputs, targets, want):
  got = likelihood.log_prob(jnp.asarray(outputs), jnp.asarray(targets))
  assert got.shape == (4,)
  np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_gaussian():
  y = RNG.normal(size=(4, 3))
  check(sm.gaussian(identity, 0.3), F, y, scipy.stats.norm.logpdf(y, F, 0.3).sum(-1))
  scale = np.array([0.3, 1.0, 2.0])  # one for each output
  check(sm.gaussian(identity, scale), F, y, scipy.stats.norm.logpdf(y, F, scale).sum(-1))
  check(sm.gaussian(identity), F[:, 0], y[:, 0], scipy.stats.norm.logpdf(y[:, 0], F[:, 0]))


def test_bernoulli():
  y = RNG.integers(2, size=(4, 3))
  p = 1 / (1 + np.exp(-F))
  check(sm.bernoulli(identity), F, y, scipy.stats.bernoulli.logpmf(y, p).sum(-1))
  extreme = sm.bernoulli(identity).log_prob(jnp.array([[-800.0], [800.0]]), jnp.array([[1], [1]]))
  np.testing.assert_allclose(extreme, [-800.0, 0.0])


def test_poisson():
  y = RNG.integers(6, size=(4, 3))
  check(sm.poisson(identity), F, y, scipy.stats.poisson.logpmf(y, np.exp(F)).sum(-1))


@pytest.mark.parametrize("jit", [False, True])
def test_large_and_small_counts_keep_their_digits_in_float32(jit):
  """y f, exp f and log y! of a count of 1e6 are about 1e7, and their sum is -8."""
  y = np.array([0, 1, 2, 19, 20, 21, 300, 100_000, 1_000_000, 10_000_000])
  log_rate = np.log(y + 0.5).astype(np.float32)
  call = sm.poisson(identity).log_prob
  call = jax.jit(call) if jit else call
  found = call(jnp.asarray(log_rate), jnp.asarray(y))
  want = scipy.stats.poisson.logpmf(y, np.exp(log_rate.astype(np.float64)))
  np.testing.assert_allclose(found, want, rtol=2e-6, atol=2e-5)
  # Far from its mode, and the slope y - rate there.
  far = log_rate + np.float32(0.5)
  found = call(jnp.asarray(far), jnp.asarray(y))
  want = scipy.stats.poisson.logpmf(y, np.exp(far.astype(np.float64)))
  np.testing.assert_allclose(found, want, rtol=5e-6)
  slope = jax.vmap(jax.grad(lambda f, y: call(f[None], y[None])[0]))(far, jnp.asarray(y))
  np.testing.assert_allclose(slope, y - np.exp(far.astype(np.float64)), rtol=1e-5)


def test_the_derivatives_of_poisson_are_those_of_its_formula():
  with jax.enable_x64(True):
    y = jnp.array([0.0, 0.5, 3.0, 19.9, 20.1, 400.0])
    f = jnp.log(y + 0.7)
    plain = lambda f, y: y * f - jnp.exp(f) - jax.scipy.special.gammaln(y + 1)
    ours = lambda f, y: sm.poisson(identity).log_prob(f[None], y[None])[0]
    for of in (lambda g: g, lambda g: jax.grad(g), lambda g: jax.grad(jax.grad(g)),
               lambda g: jax.grad(g, 1)):  # fmt: skip
      np.testing.assert_allclose(
        jax.vmap(of(ours))(f, y), jax.vmap(of(plain))(f, y), rtol=1e-9, atol=1e-9
      )


def test_a_probability_of_1_has_the_log_probability_0():
  for make, f, y in (
    (sm.bernoulli, [-jnp.inf, jnp.inf, 60.0], [0.0, 1.0, 1.0]),
    (sm.poisson, [-jnp.inf, -jnp.inf, -60.0], [0.0, 0.0, 0.0]),
  ):
    one = lambda f, make=make, y=y: jnp.sum(make(identity).log_prob(f, jnp.array(y)))
    for value in (one(jnp.array(f)), *jax.grad(one)(jnp.array(f))):
      np.testing.assert_allclose(value, 0.0, atol=1e-25)
  curve = jax.grad(jax.grad(lambda f, y: sm.bernoulli(identity).log_prob(f[None], y[None])[0]))
  for y in (0.0, 0.3, 1.0):  # -p (1 - p), also far from 0 in float32
    found = curve(jnp.float32(-20.0), jnp.float32(y)), curve(jnp.float32(20.0), jnp.float32(y))
    np.testing.assert_allclose(found, -np.exp(-20.0), rtol=1e-5)
  endless = sm.poisson(identity).log_prob(jnp.full(2, jnp.inf), jnp.array([0.0, 3.0]))
  assert (endless == -jnp.inf).all()
  wrong = sm.bernoulli(identity).log_prob(jnp.array([-jnp.inf]), jnp.array([1.0]))
  assert wrong[0] == -jnp.inf


def test_a_scale_may_be_tiny_and_a_wrong_pair_is_refused():
  scaled = sm.gaussian_with_scale(lambda theta, x: (x, theta))
  outputs = scaled.predict(jnp.float32(-45.0), jnp.zeros(2, jnp.float32))
  log_p = scaled.log_prob(outputs, jnp.zeros(2, jnp.float32))
  assert jnp.isfinite(outputs).all() and jnp.isfinite(log_p).all()
  for f, log_s in ((jnp.ones(3), jnp.ones((3, 1))), (jnp.arange(3), jnp.ones(3))):
    with pytest.raises(ValueError, match=r"predict must return \(f, log s\), floats f \[N"):
      scaled.predict(log_s, f)


def test_categorical():
  y = np.array([0, 2, 1, 2])
  p = np.exp(F) / np.exp(F).sum(-1, keepdims=True)
  want = [scipy.stats.multinomial.logpmf(np.eye(3)[k], 1, q) for k, q in zip(y, p, strict=True)]
  check(sm.categorical(identity), F, y, want)


def test_categorical_with_positions():
  logits = RNG.normal(size=(4, 5, 3))
  y = RNG.integers(3, size=(4, 5))
  likelihood = sm.categorical(identity)
  each = [likelihood.log_prob(jnp.array(logits[:, p]), jnp.array(y[:, p])) for p in range(5)]
  check(likelihood, logits, y, sum(each))


def test_a_likelihood_of_ones_own():
  laplace = sm.Likelihood(
    lambda theta, x: x * theta["w"], lambda f, y: -jnp.abs(y - f) - jnp.log(2.0)
  )
  x, y = jnp.arange(4.0), jnp.ones([4])
  want = scipy.stats.laplace.logpdf(y, 2.0 * x).sum()
  got = sm.log_likelihood(laplace, {"w": jnp.asarray(2.0)}, sm.Batch(x, y))
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_log_prob_of_the_wrong_shape():
  batch = sm.Batch(jnp.ones([4, 3]), jnp.ones([4, 3]))
  square = lambda f, y: -((y - f) ** 2)
  for log_prob, shape, hint in (
    (square, r"\(4, 3\)", "Sum over the trailing axes"),
    (lambda f, y: square(f, y).sum(), r"\(\)", "Do not sum over the examples"),
    (lambda f, y: square(f, y).sum(0), r"\(3,\)", "Do not sum over the examples"),
    (lambda f, y: 0.0, r"\(\)", "Do not sum over the examples"),
  ):
    with pytest.raises(
      ValueError, match=rf"one number an example, shape \(4,\).*shape {shape}. {hint}.$"
    ):
      sm.log_likelihood(sm.Likelihood(identity, log_prob), {}, batch)


@pytest.mark.parametrize(
  ("make", "targets", "message"),
  [
    (sm.gaussian, jnp.ones([5, 4, 1]), r"outputs of shape \(4,\), .* have shape \(4, 1\)"),
    (sm.categorical, jnp.ones([5, 4, 1], int), r"logits .* \(4,\), so .* \(\); got \(4, 1\)"),
  ],
)
def test_an_error_about_shapes_names_those_of_one_task(make, targets, message):
  """The targets of all 5 tasks are checked in one call, on 20 examples."""
  batch = sm.Batch(jnp.ones([5, 4]), targets)
  with pytest.raises(ValueError, match=rf"^tasks.train: predict returned {message}"):
    check_targets(make(lambda theta, x: theta["w"] * x), "tasks", sm.Task(batch, None), {"w": 1.0})


def test_an_error_about_values_stays_that_of_all_tasks():
  batch = sm.Batch(jnp.ones([5, 4]), jnp.arange(20.0).reshape(5, 4) - 2)
  with pytest.raises(ValueError, match=r"^batches: .*not negative; got -2.0 to 17.0"):
    check_targets(sm.poisson(lambda theta, x: theta["w"] * x), "batches", batch, {"w": 1.0})


@pytest.mark.parametrize("make", [sm.gaussian, sm.bernoulli, sm.poisson])
def test_the_broadcast_trap(make):
  """[4, 1] outputs against [4] targets would pair every output with every target."""
  with pytest.raises(ValueError, match=r"outputs of shape \(4, 1\).*shape \(4,\).*reshape"):
    make(identity).log_prob(jnp.ones([4, 1]), jnp.ones([4]))


def test_bad_labels():
  log_prob = sm.categorical(identity).log_prob
  with pytest.raises(ValueError, match=r"integer labels; got dtype float64"):
    log_prob(jnp.ones([4, 3]), jnp.ones([4]))
  with pytest.raises(ValueError, match=r"logits of shape \(4, 3\).*\(4,\); got \(4, 3\)"):
    log_prob(jnp.ones([4, 3]), jnp.ones([4, 3], int))
  for label in (3, -1):
    with pytest.raises(ValueError, match=rf"0\.\.2 .*3 logits.*got .*{label}"):
      log_prob(jnp.ones([2, 3]), jnp.array([label, label]))
    got = jax.jit(log_prob)(jnp.ones([2, 3]), jnp.array([0, label]))
    assert np.isfinite(got[0]) and np.isnan(got[1])


def test_a_scale_that_overflows_is_none_of_padding():
  likelihood = sm.gaussian_with_scale(lambda theta, x: (0.0 * x, theta))
  score = lambda log_s: likelihood.log_prob(likelihood.predict(log_s, jnp.zeros(1)), jnp.ones(1))[0]
  with jax.enable_x64(False):
    got = [float(score(jnp.float32(v))) for v in (30.0, 42.0, 55.0, 200.0)]
  assert got[0] > got[1] > got[2] == got[3] > -45.0 and got[2] < -42.0  # not that of N(0, 1), -1.4


def test_scale_must_be_positive():
  for scale in (0.0, -1.0, jnp.array([1.0, 0.0]), np.nan):
    with pytest.raises(ValueError, match="standard deviation"):
      sm.gaussian(identity, scale)


@pytest.mark.parametrize("make", [sm.gaussian, sm.bernoulli, sm.poisson, sm.categorical])
def test_float32_stays_float32(make):
  targets = jnp.zeros([4], int) if make is sm.categorical else jnp.zeros([4, 3], jnp.float32)
  assert make(identity).log_prob(jnp.asarray(F, jnp.float32), targets).dtype == jnp.float32


def test_in_precision_computes_the_network_alone_in_bfloat16():
  """Outputs have bfloat16's error and not more; gradients come back in float32; so do integers."""
  seen = {}

  def predict(theta, inputs):
    seen["dtypes"] = theta["w"].dtype, inputs["x"].dtype, inputs["i"].dtype
    return inputs["x"] @ theta["w"] + theta["b"][inputs["i"]]

  exact = sm.gaussian(predict, 0.5)
  draw = lambda *shape: jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  theta = {"w": draw(50), "b": draw(3)}
  inputs = {"x": draw(20, 50), "i": jnp.arange(20) % 3}
  batch = sm.Batch(inputs, draw(20))
  half = sm.in_precision(exact, jnp.bfloat16)
  outputs = half.predict(theta, inputs)
  assert seen["dtypes"] == (jnp.bfloat16, jnp.bfloat16, jnp.int64)
  assert outputs.dtype == jnp.float32
  error = jnp.abs(outputs - exact.predict(theta, inputs)).max()
  assert 1e-4 < error < 0.2
  grad = lambda likelihood: jax.jit(jax.grad(lambda t: sm.log_likelihood(likelihood, t, batch)))(
    theta
  )
  one, other = grad(exact), grad(half)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(other))
  for name in one:
    assert jnp.linalg.norm(one[name] - other[name]) < 0.03 * jnp.linalg.norm(one[name])


@pytest.mark.parametrize(
  ("make", "bad", "message"),
  [
    (sm.bernoulli, [-1, 1], "between 0 and 1; got -1 to 1"),
    (sm.bernoulli, [0.0, 7.0], "between 0 and 1; got 0.0 to 7.0"),
    (sm.poisson, [-1.5, 2.0], "counts, not negative; got -1.5 to 2.0"),
  ],
)
def test_targets_out_of_range(make, bad, message):
  log_prob = make(identity).log_prob
  with pytest.raises(ValueError, match=message):
    log_prob(jnp.zeros([2, 1]), jnp.array(bad)[:, None])
  wrong = np.array([not 0 <= y <= (1 if make is sm.bernoulli else np.inf) for y in bad])
  got = jax.jit(log_prob)(jnp.zeros([2, 1]), jnp.array(bad)[:, None])
  np.testing.assert_array_equal(np.isnan(got), wrong)


def test_a_target_of_padding_may_be_anything():
  likelihood = sm.categorical(identity)
  batch = sm.Batch(jnp.zeros([3, 4]), jnp.array([0, 3, -1]), mask=jnp.array([1.0, 1.0, 0.0]))
  for call in (sm.log_likelihood, jax.jit(sm.log_likelihood, static_argnums=0)):
    np.testing.assert_allclose(call(likelihood, {}, batch), -2 * np.log(4.0), rtol=1e-12)


def test_padding_without_a_density_adds_0():
  """log y is -inf at the 0 that takes the place of padding."""
  likelihood = sm.Likelihood(identity, lambda f, y: f * jnp.log(y))
  batch = sm.Batch(jnp.ones(2), jnp.array([np.e, 5.0]), mask=jnp.array([1.0, 0.0]))
  np.testing.assert_allclose(sm.log_likelihood(likelihood, {}, batch), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("scale", "outputs"), [((4,), (4,)), ((4, 1), (4,)), ((4, 1), (4, 3)), ((2,), (4, 3))]
)
def test_a_scale_of_each_example_is_refused(scale, outputs):
  log_prob = sm.gaussian(identity, np.ones(scale)).log_prob
  with pytest.raises(ValueError, match="outputs of one example.*belong in the targets"):
    log_prob(jnp.zeros(outputs), jnp.zeros(outputs))


def test_what_belongs_to_an_example_must_be_in_its_targets():
  """Curvature is taken example by example: a scale closed over would be that of the first."""
  scales = jnp.array([0.1, 1.0, 10.0])

  def log_prob(f, y):
    return -0.5 * jnp.square((y - f) / scales) - jnp.log(scales)

  likelihood = sm.Likelihood(lambda theta, x: x * theta["w"], log_prob)
  batch, theta = sm.Batch(jnp.ones(3), jnp.arange(3.0)), {"w": jnp.zeros([])}
  inner = sm.Inner(optax.sgd(0.02), 1000)
  with pytest.raises(ValueError, match="depend on that example alone.*noise scale"):
    sm.log_evidence(likelihood, {"w": "w"}, theta, {"w": 0.0}, batch, inner)

  def with_scale(f, targets):
    y, s = targets
    return -0.5 * jnp.square((y - f) / s) - jnp.log(s) - 0.5 * np.log(2 * np.pi)

  likelihood = likelihood._replace(log_prob=with_scale)
  batch = batch._replace(targets=(batch.targets, scales))
  evidence = lambda theta: sm.log_evidence(likelihood, {"w": "w"}, theta, {"w": 0.0}, batch, inner)
  value, _ = jax.jit(evidence)(theta)
  cov = np.ones((3, 3)) + np.diag(np.square(scales))
  exact = scipy.stats.multivariate_normal.logpdf(np.arange(3.0), cov=cov)
  np.testing.assert_allclose(value, exact, rtol=1e-6)


def test_classes_masked_by_logits_of_minus_infinity():
  logits = jnp.array([[0.0, 1.0, -jnp.inf], [2.0, -jnp.inf, 0.0]])
  labels = jnp.array([1, 0])
  want = [1.0 - np.logaddexp(0.0, 1.0), 2.0 - np.logaddexp(2.0, 0.0)]
  log_prob = sm.categorical(identity).log_prob
  for f in (log_prob, jax.jit(log_prob)):
    np.testing.assert_allclose(f(logits, labels), want, rtol=1e-12)


def test_a_label_out_of_range_has_a_gradient_that_is_no_number():
  """So that a task in one of whose batches it was fails, whatever the last batch was."""
  likelihood = sm.categorical(lambda theta, x: x @ theta)
  loss = jax.jit(jax.grad(lambda f, y: -likelihood.log_prob(f, y).sum()))
  found = loss(jnp.zeros((2, 3)), jnp.array([1, 7]))
  assert jnp.isfinite(found[0]).all() and jnp.isnan(found[1]).any()


@pytest.mark.parametrize("dtype, classes", (("uint8", 256), ("uint8", 1000), ("int8", 128)))
def test_labels_of_eight_bits_are_labels(dtype, classes):
  """As an int8, 128 is -128: all labels would be out of range, or one of several columns."""
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, classes)))
  labels = np.array([0, 3, 127], dtype)
  log_prob = sm.categorical(identity).log_prob
  value = jax.jit(jax.value_and_grad(lambda f, y: log_prob(f, y).sum()))
  for got, want in zip(value(logits, labels), value(logits, labels.astype(int)), strict=True):
    np.testing.assert_array_equal(got, want)
  found = jax.jit(sm.calibration)(logits, labels)
  want = sm.calibration(logits, jnp.asarray(labels.astype(int)))
  np.testing.assert_allclose(found, want, rtol=1e-12)


ANY: Any = sm  # for arguments of wrong types
LIKELIHOOD = sm.gaussian(identity)
BATCH = sm.Batch(jnp.ones([4, 3]), jnp.ones([4, 3]))


@pytest.mark.parametrize(
  ("outputs", "error", "message"),
  [
    (lambda x: (x, {"batch_stats": x[0]}), TypeError, r"returned a tuple of 2 .*mutable=False"),
    (
      lambda x: (x, x),
      TypeError,
      r"predict returned a tuple of 2 items: return the outputs \[N, .*",
    ),
    (
      lambda x: {"mean": x},
      TypeError,
      r"one array, .*; it returned a dict with the keys \['mean'\]",
    ),
    (lambda x: None, TypeError, r"predict must return one array, .*; it returned None"),
    (lambda x: "x", TypeError, r"predict must return one array, .*; it returned 'x'"),
    (
      lambda x: x[:1],
      ValueError,
      r"return outputs \[4, ...\], one entry .* an array float32\[1, 3\]",
    ),
    (lambda x: x[None], ValueError, r"return outputs \[4, ...\], one entry .* float32\[1, 4, 3\]"),
    (lambda x: 0.0, ValueError, r"return outputs \[4, ...\], .*; it returned 0.0"),
    (lambda x: {"mean": x[0]}, ValueError, r"return outputs \[4, .* float32\[3\] at 'mean'"),
  ],
)
@pytest.mark.parametrize("mask", (None, jnp.ones([4])))
def test_what_predict_returns(outputs, error, message, mask):
  with jax.enable_x64(False):
    likelihood = sm.gaussian(lambda theta, x: outputs(jnp.asarray(x, jnp.float32)))
    for call in (sm.log_likelihood, jax.jit(sm.log_likelihood, static_argnums=0)):
      with pytest.raises(error, match=message):
        call(likelihood, {}, BATCH._replace(mask=mask))


@pytest.mark.parametrize("kind", ("dict", "tuple"))
def test_outputs_of_several_arrays_that_log_prob_reads(kind):
  key = "mean" if kind == "dict" else 0
  predict = lambda theta, x: {"mean": x} if kind == "dict" else (x, x)
  likelihood = ANY.Likelihood(predict, lambda f, y: -jnp.sum(jnp.square(y - f[key] - 1.0), -1))
  batch = BATCH._replace(mask=jnp.array([1.0, 1.0, 0.0, 0.0]))
  assert float(sm.log_likelihood(likelihood, {}, batch)) == -6.0


@pytest.mark.parametrize("make", [sm.gaussian, sm.categorical, sm.bernoulli, sm.poisson])
def test_what_is_no_network(make):
  with pytest.raises(
    TypeError, match=r"predict must be a function, \(theta, inputs\) .*; got Likeli"
  ):
    make(sm.gaussian(identity))
  with pytest.raises(
    TypeError, match=r"predict must be a function, .*; got a flax.linen module, De"
  ):
    make(nn.Dense(3))
  with pytest.raises(TypeError, match=r"targets must be one array \[N, ...\]; got a dict with the"):
    make(identity).log_prob(jnp.ones([4, 3]), {"y": jnp.ones([4, 3])})


def test_a_pair_is_wanted_of_a_network_with_scales():
  for returned in (lambda x: x, lambda x: (x, x, x), lambda x: (x, None)):
    likelihood = ANY.gaussian_with_scale(lambda theta, x, returned=returned: returned(x))
    with pytest.raises(TypeError, match=r"must return a pair of arrays \(f \[N, ...\], log s\)"):
      likelihood.predict({}, jnp.ones(3))
  with pytest.raises(ValueError, match=r"outputs must have the shape \[N, ..., 2\]; got \(3,\)"):
    sm.mean_and_scale(jnp.ones(3))
  with pytest.raises(TypeError, match=r"predict returned a tuple of 2 items"):
    ANY.mean_and_scale((jnp.ones(3), jnp.ones(3)))


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda: ANY.in_precision(identity, jnp.bfloat16),
      TypeError,
      r"likelihood must be a .*; got the",
    ),
    (
      lambda: ANY.in_precision(LIKELIHOOD, jnp.int8),
      ValueError,
      r"dtype must be floating.*got int8",
    ),
    (
      lambda: ANY.in_precision(LIKELIHOOD, "half-ish"),
      TypeError,
      r"dtype must be a dtype, .*; got 'half",
    ),
    (
      lambda: ANY.gaussian(identity, "wide"),
      TypeError,
      r"scale must be a positive number .*'wide'",
    ),
    (
      lambda: ANY.gaussian(identity, None),
      TypeError,
      r"scale must be a positive number .*; got None",
    ),
    (
      lambda: ANY.log_likelihood(identity, {}, BATCH),
      TypeError,
      r"likelihood must be a shrinkmeta.Likelihood.*; got the function.*sm.gaussian\(predict\)",
    ),
    (
      lambda: ANY.log_likelihood(ANY.Likelihood(identity, None), {}, BATCH),
      TypeError,
      r"likelihood.log_prob must be a function, \(outputs \[N, ...\], targets\) .*; got None",
    ),
  ],
)
def test_arguments_of_wrong_types(call, error, message):
  with pytest.raises(error, match=message):
    call()


@pytest.mark.parametrize("logits", [[20.0, 0.0, -1.0], [0.0, 12.0, 11.0], [3.0, 3.0, 3.0]])
def test_the_curvature_of_a_confident_categorical_is_not_rounding(logits):
  density = sm.categorical(lambda theta, x: x).log_prob
  f = jnp.array(logits)
  found = jax.jit(jax.hessian(lambda f: -density(f[None], jnp.array([1]))[0]))(f)
  p = np.exp(np.float64(logits) - np.max(logits))
  p /= p.sum()
  np.testing.assert_allclose(found, np.diag(p) - np.outer(p, p), rtol=2e-5, atol=1e-12)


def test_logits_that_overflow_are_no_probability():
  density = sm.categorical(lambda theta, x: x).log_prob
  assert jnp.isnan(density(jnp.array([[jnp.inf, 0.0]]), jnp.array([0])))[0]


def test_scales_of_a_network_with_constants_or_a_key():
  def predict(theta, x, constants, key=None):
    noise = 0.0 if key is None else jax.random.uniform(key)
    return x * theta["w"] * constants["unit"] + noise, 0.0

  params, constants = {"w": 3.0}, {"unit": jnp.array(2.0)}
  likelihood = sm.with_randomness(sm.gaussian_with_scale(predict))
  bound = sm.with_constants(likelihood, constants)
  np.testing.assert_allclose(bound.predict(params, jnp.ones(1)), [[6.0, -0.5]])
  key = jax.random.key(0)
  drawn = bound.predict(params, jnp.ones(1), key=key)
  np.testing.assert_allclose(drawn, [[6.0 + jax.random.uniform(key), -0.5]], rtol=1e-6)


def test_a_log_prob_sees_jax_arrays_outside_jit_too():
  def log_prob(outputs, targets):
    return -jnp.square(targets.at[..., 0].set(0.0) - outputs).sum(-1)

  learner = sm.maml(sm.Likelihood(lambda t, x: x * t["w"], log_prob), {"w": "w"})
  state, batch = learner.init({"w": 1.0}), sm.Batch(np.ones((2, 3, 2)), np.ones((2, 3, 2)))
  tasks = sm.Task(batch, batch)
  eager, compiled = learner.update(state, tasks)[1], jax.jit(learner.update)(state, tasks)[1]
  np.testing.assert_allclose(eager.loss, compiled.loss, rtol=1e-6)
