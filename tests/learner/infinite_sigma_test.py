"""Modules whose log sigma^2 is infinite leave the others alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import shrinkmeta as sm

RNG = np.random.default_rng(0)
PARAMS = {
  "body": jnp.array(RNG.normal(size=(2, 3)), jnp.float32),
  "head": jnp.array([1.0, -2.0, 1.5]),
}
NETWORK = sm.gaussian(lambda theta, x: jnp.tanh(x @ theta["body"]) @ theta["head"])
DRAW = lambda *shape: jnp.array(RNG.normal(size=shape), jnp.float32)
TASKS = sm.Task(sm.Batch(DRAW(4, 6, 2), DRAW(4, 6)), sm.Batch(DRAW(4, 6, 2), DRAW(4, 6)))
INNER = sm.Inner(optax.sgd(0.1), 5)

COUPLED = {
  "lbfgs": optax.lbfgs(1e-2, linesearch=None),
  "prodigy": contrib.prodigy(0.1),
  "dowg": contrib.dowg(),
  "mechanize": contrib.mechanize(optax.sgd(0.1)),
  "clipped": optax.chain(
    optax.add_decayed_weights(1e-3), optax.clip_by_global_norm(0.1), optax.sgd(0.1)
  ),
}


def learner_of(**settings):
  learner = sm.sigma_imaml(NETWORK, sm.by_leaf(PARAMS), inner=INNER, **settings)
  return learner, learner.init(PARAMS), jax.jit(learner.update)


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("start", [0.0, "kept"])
def test_sigma_of_the_others_is_learned_by_an_optimiser_that_joins_modules(name, start):
  init_sigma = {"body": 0.3 if start == "kept" else start, "head": 0.3}
  learner, state, update = learner_of(init_sigma=init_sigma, sigma_optimizer=COUPLED[name])
  if start == "kept":
    for _ in range(2):
      state, _ = update(state, TASKS)
    learner, state = learner.keep(state, ["head"])
    update = jax.jit(learner.update)
  before = state.log_sigma2["head"]
  for _ in range(4):
    state, metrics = update(state, TASKS)
    assert metrics.num_failed == 0
  assert state.log_sigma2["body"] == -jnp.inf
  moved = abs(state.log_sigma2["head"] - before)
  assert jnp.isfinite(moved)
  if name in ("lbfgs", "clipped"):  # the first steps of the others are smaller than rounding
    assert moved > 1e-6


def test_a_prior_of_the_users_own_may_ignore_infinite_values():
  """Without a mask of its own it is -inf there, and its gradient NaN or infinite."""
  own = lambda log_s2: -0.5 * sum(jnp.square(v + 2.0) for v in log_s2.values())
  masked = lambda log_s2: -0.5 * jnp.square(log_s2["head"] + 2.0)
  ends = []
  for prior in (own, masked):
    _, state, update = learner_of(init_sigma={"body": 0.0, "head": 0.3}, log_p_sigma=prior)
    for _ in range(3):
      state, _ = update(state, TASKS)
    ends.append(state)
  chex.assert_trees_all_close(*ends, rtol=1e-6)
  assert abs(ends[0].phi["head"] - PARAMS["head"]).max() > 0
