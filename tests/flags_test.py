"""Every algorithm runs under JAX's flags jax_debug_nans and jax_numpy_rank_promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shrinkmeta as sm

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
LABELS = sm.by_leaf(PARAMS)
RNG = np.random.default_rng(0)
INPUTS, NUMBERS = (jnp.asarray(RNG.normal(size=(3, 5, n)), jnp.float32) for n in (2, 3))
CLASSES = jnp.asarray(RNG.integers(0, 3, (3, 5)))
KEYWORDS = {"anil": {"head": "b"}, "boil": {"head": "b"}, "hand_picked": {"task_specific": ("b",)}}
LOG_SIGMA2 = {"w": 0.0, "b": 0.0}
SHORT = sm.Inner(optax.sgd(0.1), steps=2)
# L-BFGS, the default of those that find a mode, compiles for long: sigma_imaml alone keeps it.
INNER = dict.fromkeys(("imaml", "sigma_reptile", "empirical_bayes"), {"inner": SHORT})


def predict(theta, x):
  return jnp.tanh(x @ theta["w"]) + theta["b"][None]


def model(kind):
  if kind == "categorical":
    return sm.categorical(predict), sm.Batch(INPUTS, CLASSES)
  return sm.gaussian(predict, jnp.array([0.5, 1.0, 2.0])), sm.Batch(INPUTS, NUMBERS)


def small(likelihood, name, **keywords):
  learner = getattr(sm, name)(likelihood, LABELS, **KEYWORDS.get(name, {}), **keywords)
  return learner, learner.init(PARAMS)


@pytest.mark.parametrize("name", sorted(sm.FAMILY))
def test_an_algorithm_runs_under_both_flags(name):
  likelihood, batch = model("categorical")
  with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
    learner, state = small(likelihood, name, **INNER.get(name, {}))

    @jax.jit
    def run(state, batch):
      state, metrics = learner.update(state, sm.Task(batch, batch))
      one = learner.adapt(state, jax.tree.map(lambda x: x[0], batch))
      return state, metrics, one[0], learner.adapt_tasks(state, batch)

    state, metrics, *theta = run(state, batch)
  assert int(metrics.num_failed) == 0
  assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves((state, theta)))


@pytest.mark.parametrize("solver", ["identity", "dual", "neumann"])
def test_a_solver_runs_under_both_flags(solver):
  likelihood, batch = model("gaussian")
  with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
    learner, state = small(
      likelihood, "sigma_imaml", implicit=sm.Implicit(solver=solver), inner=SHORT
    )
    metrics = jax.jit(learner.update)(state, sm.Task(batch, batch))[1]
  assert int(metrics.num_failed) == 0


def test_absent_values_are_inf_under_debug_nans_alone():
  likelihood, batch = model("categorical")
  losses = []
  for flag in (False, True):
    with jax.debug_nans(flag):
      learner, state = small(likelihood, "reptile", inner=SHORT)
      losses.append(jax.jit(learner.update)(state, sm.Task(batch, batch))[1].phi_loss)
  assert bool(jnp.isnan(losses[0])) and bool(jnp.isinf(losses[1]))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_estimates_hold_without_promotion_of_ranks(kind):
  likelihood, batches = model(kind)
  batch, key = jax.tree.map(lambda x: x[0], batches), jax.random.key(0)

  def estimates(phi):  # the promotion of ranks shows while it is traced
    theta, _ = sm.map_estimate(likelihood, LABELS, phi, LOG_SIGMA2, batch, SHORT)
    for rank in (None, 3):
      found = sm.posterior(likelihood, LABELS, phi, LOG_SIGMA2, theta, batch, rank=rank)
      yield found.predictive(batch.inputs)
      yield found.sample(key, 2)
      yield found.outputs(key, batch.inputs, 2)
      yield found.log_predictive(key, batch, 2)
    for how in (sm.LogDet(), sm.LogDet("lanczos", probes=2, steps=3)):
      value = lambda phi, how=how: sm.log_evidence(
        likelihood, LABELS, phi, LOG_SIGMA2, batch, SHORT, log_det=how, key=key
      )[0]
      yield jax.grad(value)(phi)
    yield sm.restriction(likelihood, LABELS, phi, LOG_SIGMA2, batches, ("b",))

  with jax.numpy_rank_promotion("raise"):
    assert len(jax.eval_shape(lambda phi: list(estimates(phi)), PARAMS)) == 11
    thetas = jax.tree.map(lambda x: jnp.stack([x] * 3), PARAMS)
    sm.module_summary(LABELS, PARAMS, LOG_SIGMA2, thetas)
    outputs = predict(PARAMS, batch.inputs)
    sm.calibration(outputs, CLASSES[0], jnp.ones(5))
    sm.coverage(outputs, jnp.ones_like(outputs), NUMBERS[0], mask=jnp.ones((5, 1)))
    if kind == "gaussian":
      learner, state = small(likelihood, "sigma_maml", inner=SHORT)
      sm.check_meta_gradient(learner, state, sm.Task(batches, batches))
