import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.runs import learners
from experiments.settings import algorithms, tables


@pytest.mark.parametrize("name", algorithms.ALL)
def test_every_arm_builds_its_algorithm(name):
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  config = tables.load("glyphs", "smoke", ["arms.hand_picked.task_specific=w"])
  learner = learners.make_learner(name, config, likelihood, {"w": "w"}, None)
  assert learner.algorithm == sm.FAMILY[name]


def test_settings_reach_the_learner():
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  changes = ["cg_batch=7", "arms.reptile.inner_decay=4", "arms.reptile.inner_rate=0.5"]
  config = tables.load("glyphs", "smoke", changes)
  solve = learners.make_learner("sigma_imaml", config, likelihood, {"w": "w"}, None).spec.implicit
  assert (solve.batch_size, solve.max_steps) == (7, config.cg_steps)
  descent = learners.make_learner(
    "reptile", config, likelihood, {"w": "w"}, None
  ).spec.inner.optimizer
  one = jnp.ones([])
  state, rates = descent.init(one), []
  for _ in range(13):
    step, state = descent.update(one, state)
    rates.append(-float(step))
  np.testing.assert_allclose(rates, 0.5 / (1 + np.arange(13) / 4), rtol=1e-6)


def test_an_unknown_algorithm():
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  with pytest.raises(ValueError, match="protonet.*sigma_imaml"):
    learners.make_learner("protonet", tables.load("glyphs", "smoke"), likelihood, {"w": "w"}, None)
