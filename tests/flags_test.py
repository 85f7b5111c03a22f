"""JAX's own flags: every algorithm runs under jax_debug_nans and without promotion of ranks."""

import jax
import jax.numpy as jnp
import optax
import pytest

import shrinkmeta as sm

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
LABELS = sm.by_leaf(PARAMS)
INPUTS = jax.random.normal(jax.random.key(0), (3, 5, 2))
CLASSES = jax.random.randint(jax.random.key(1), (3, 5), 0, 3)
NUMBERS = jax.random.normal(jax.random.key(2), (3, 5, 3))
KEYWORDS = {"anil": {"head": "b"}, "boil": {"head": "b"}, "hand_picked": {"task_specific": ("b",)}}
LOG_SIGMA2 = {"w": 0.0, "b": 0.0}


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
    learner, state = small(likelihood, name)
    state, metrics = jax.jit(learner.update)(state, sm.Task(batch, batch))
    jax.jit(learner.adapt_tasks)(state, batch)
    theta, _ = jax.jit(learner.adapt)(state, jax.tree.map(lambda x: x[0], batch))
  assert int(metrics.num_failed) == 0
  assert not any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves((state, theta)))


@pytest.mark.parametrize("solver", ["identity", "dual", "neumann"])
def test_a_solver_runs_under_both_flags(solver):
  likelihood, batch = model("gaussian")
  with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
    learner, state = small(likelihood, "sigma_imaml", implicit=sm.Implicit(solver=solver))
    metrics = jax.jit(learner.update)(state, sm.Task(batch, batch))[1]
  assert int(metrics.num_failed) == 0


def test_absent_values_are_inf_under_debug_nans_alone():
  likelihood, batch = model("categorical")
  losses = []
  for flag in (False, True):
    with jax.debug_nans(flag):
      learner, state = small(likelihood, "reptile", inner=sm.Inner(optax.sgd(0.1), steps=2))
      losses.append(jax.jit(learner.update)(state, sm.Task(batch, batch))[1].phi_loss)
  assert bool(jnp.isnan(losses[0])) and bool(jnp.isinf(losses[1]))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_estimates_hold_without_promotion_of_ranks(kind):
  likelihood, batches = model(kind)
  batch, key = jax.tree.map(lambda x: x[0], batches), jax.random.key(0)
  with jax.numpy_rank_promotion("raise"):
    theta, _ = sm.map_estimate(likelihood, LABELS, PARAMS, LOG_SIGMA2, batch)
    for rank in (None, 3):
      found = sm.posterior(likelihood, LABELS, PARAMS, LOG_SIGMA2, theta, batch, rank=rank)
      found.predictive(batch.inputs)
      found.sample(key, 2)
      found.outputs(key, batch.inputs, 2)
      found.log_predictive(key, batch, 2)
    for how in (sm.LogDet(), sm.LogDet("lanczos", probes=2, steps=3)):
      value = lambda phi, how=how: sm.log_evidence(
        likelihood, LABELS, phi, LOG_SIGMA2, batch, log_det=how, key=key
      )[0]
      assert jnp.isfinite(optax.tree.norm(jax.grad(value)(PARAMS)))
    sm.restriction(likelihood, LABELS, PARAMS, LOG_SIGMA2, batches, ("b",))
    thetas = jax.tree.map(lambda x: jnp.stack([x] * 3), theta)
    sm.module_summary(LABELS, PARAMS, LOG_SIGMA2, thetas)
    outputs = predict(theta, batch.inputs)
    sm.calibration(outputs, CLASSES[0], jnp.ones(5))
    sm.coverage(outputs, jnp.ones_like(outputs), NUMBERS[0], mask=jnp.ones((5, 1)))
    learner, state = small(likelihood, "sigma_maml", inner=sm.Inner(optax.sgd(0.1), steps=2))
    sm.check_meta_gradient(learner, state, sm.Task(batches, batches))
