import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.runs import pipeline, problems, store
from experiments.settings import algorithms, tables

DATA = os.environ.get("SHRINKMETA_DATA")


def test_tasks_of_a_finite_list_are_judged_once(tmp_path):
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  short = dataclasses.replace(problem.test, tasks=3)
  problem = problem._replace(validation=short, test=short)
  with pytest.raises(ValueError, match="There are 3 test tasks.*test_episodes is 4.*episodes=3"):
    store.begin(tmp_path / "a", "maml", 0, config, problem)
  assert not (tmp_path / "a").exists()
  prepared = pipeline.prepare("maml", config, problem)
  state = prepared.learner.init(prepared.model.init(jax.random.key(0)))
  with pytest.raises(ValueError, match="There are 3 test tasks"):
    pipeline.evaluate(prepared, state, config, "test", "a")
  assert pipeline.evaluate(prepared, state, config, "validation", "a").nll.shape == (3, 2)


@pytest.mark.parametrize(
  "name, setting", (("maml", "arms.maml.batch_size"), ("sigma_imaml", "cg_batch"))
)
def test_a_mini_batch_is_no_larger_than_a_task(name, setting):
  """An error of training would end a command before other arms are trained."""
  config = tables.load("sinusoid", "smoke", [f"{setting}=11"])
  problem = problems.make_problem(config.problem)
  message = f"{setting} is 11, and a train task has 10 examples .*--set={setting}"
  with pytest.raises(ValueError, match=message):
    pipeline.prepare(name, config, problem)
  pipeline.prepare("reptile", config, problem)  # the setting is of another arm
  pipeline.prepare(name, tables.load("sinusoid", "smoke", [f"{setting}=10"]), problem)


def test_reptile_adapts_to_both_parts_in_training_only_if_told():
  for pooled, sizes in (("false", (10, 10)), ("true", (60, 10))):
    config = tables.load("sinusoid", "smoke", [f"arms.reptile.pooled={pooled}"])
    problem = pipeline.prepare("reptile", config, problems.make_problem(config.problem)).problem
    tasks = (one.sample(jax.random.key(0), 0, 1) for one in (problem.train, problem.test))
    assert tuple(task.train.targets.shape[1] for task in tasks) == sizes


def test_a_mini_batch_of_adaptation_is_no_larger_than_a_test_task():
  config = tables.load("sinusoid", "smoke", ["arms.maml.batch_size=8"])
  problem = problems.make_problem(config.problem)
  fewer = problems.make_problem({**config.problem, "shots": 5})
  with pytest.raises(ValueError, match="batch_size is 8, and a test task has 5 examples"):
    pipeline.prepare("maml", config, problem._replace(test=fewer.test))


@pytest.mark.skipif(not DATA, reason="needs SHRINKMETA_DATA")
@pytest.mark.parametrize(
  "table", ("alphabets", "small_data", "few_shot", "grocery", "spoken_digits")
)
def test_tables_of_pictures_train_and_adapt(table):
  config = tables.load(table, "smoke")
  problem = problems.make_problem(config.problem)
  name = "sigma_imaml" if table == "alphabets" else "reptile"  # one compiles masks and cg_batch
  prepared = pipeline.prepare(name, config, problem)
  trained = pipeline.train(prepared, name, 0, config)
  found = pipeline.evaluate(prepared, trained.state, config, "validation", table)
  again = pipeline.evaluate(prepared, trained.state, config, "validation", table)
  assert found.nll.shape == (3, 2) and np.isfinite(found.nll).all()
  np.testing.assert_array_equal(found.nll, again.nll)  # mini-batches of the test are fixed too
  test = pipeline.evaluate(prepared, trained.state, config, "test", table)
  assert test.nll.shape == (3, 4) and not np.isin(test.nll, found.nll).any()


@pytest.mark.parametrize("name", algorithms.ALL)
def test_every_arm_trains_on_sinusoids(name):
  config = tables.load("sinusoid", "smoke")
  prepared = pipeline.prepare(name, config, problems.make_problem(config.problem))
  if name not in ("sigma_imaml", "sigma_maml", "reptile", "fine_tuning"):  # one a kind of gradient
    tasks = prepared.problem.train.sample(jax.random.key(0), 0, config.meta_batch)
    state = prepared.learner.init(prepared.model.init(jax.random.key(0)))
    after, _ = jax.eval_shape(prepared.learner.update, state, tasks, jax.random.key(1))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return
  trained = pipeline.train(prepared, name, 0, config)
  found = pipeline.evaluate(prepared, trained.state, config, "validation", name)
  assert np.isfinite(trained.history["loss"]).all() and np.isfinite(found.nll).all()


def test_rounds_through_a_list_are_averaged_by_task():
  config = tables.load(
    "glyphs", "smoke", ["test_episodes=12", "adapt_steps=(0,1)", "report_step=1"]
  )
  prepared = pipeline.prepare("reptile", config, problems.make_problem(config.problem))
  on = pipeline.evaluation(config, prepared.problem, "test")
  assert (on.source.tasks, on.rounds, on.number) == (8, 2, 16)
  state = prepared.learner.init(prepared.model.init(jax.random.key(0)))
  twice = pipeline.evaluate(prepared, state, config, "test", "twice")
  assert twice.nll.shape == (2, 8)
  config.test_episodes = 8
  once = pipeline.evaluate(prepared, state, config, "test", "once")
  assert once.nll.shape == (2, 8) and (once.nll != twice.nll).all()
