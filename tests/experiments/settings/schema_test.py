import jax.numpy as jnp
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.runs import learners
from experiments.settings import schema


def test_presets_have_an_arm_for_every_algorithm():
  for preset in schema.PRESETS:
    assert set(schema.load(preset).arms) == set(learners.ALL)


def test_overrides():
  config = schema.load("smoke", ["meta_steps=7", "norm=group", "arms.reptile.inner_rate=0.25"])
  assert (config.meta_steps, config.norm, config.arms.reptile.inner_rate) == (7, "group", 0.25)


@pytest.mark.parametrize(
  "override", ["meta_step=7", "meta_steps", "arms.maml.lr=1", "meta_steps=x"]
)
def test_an_override_that_does_not_fit_is_named(override):
  with pytest.raises(ValueError, match=override.partition("=")[0]):
    schema.load("smoke", [override])


@pytest.mark.parametrize(
  "change",
  ["meta_steps=0", "meta_batch=0", "test_episodes=0", "adapt_steps=(3,1)", "adapt_steps=(-1,3)"],
)
def test_what_would_fail_after_training_is_refused(change):
  with pytest.raises(ValueError, match=f"--set={change.partition('=')[0]}"):
    schema.load("smoke", [change])


def test_unknown_preset_and_algorithm():
  with pytest.raises(ValueError, match="huge.*default, full, smoke"):
    schema.load("huge")
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  with pytest.raises(ValueError, match="protonet.*sigma_imaml"):
    learners.make_learner("protonet", schema.load("smoke"), likelihood, {"w": "w"}, None)


@pytest.mark.parametrize("name", learners.ALL)
def test_every_arm_builds_its_row(name):
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  config = schema.load("smoke", ["arms.hand_picked.task_specific=w"])
  learner = learners.make_learner(name, config, likelihood, {"w": "w"}, None)
  assert learner.algorithm == sm.FAMILY[name]


def test_settings_reach_the_learner():
  likelihood = sm.gaussian(lambda theta, x: x @ theta["w"])
  changes = ["cg_batch=7", "arms.reptile.inner_decay=4", "arms.reptile.inner_rate=0.5"]
  config = schema.load("smoke", changes)
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
