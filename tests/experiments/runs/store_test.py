import dataclasses
import os
from typing import Any

import jax
import numpy as np
import pytest

import shrinkmeta as sm
from experiments.runs import problems, store, training
from experiments.settings import tables

DATA = os.environ.get("SHRINKMETA_DATA")


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(tmp_path):
  config = tables.load("sinusoid", "smoke", ["meta_steps=52"])
  problem = problems.make_problem(config.problem)
  prepared = store.prepare("reptile", config, problem)
  run = store.begin(tmp_path / "a", "reptile", 0, config, problem)
  whole = store.train(prepared, "reptile", 0, config, run.checkpoints)
  (run.folder / "states" / "52" / "about" / "metadata").write_text("{}")
  again = store.train(prepared, "reptile", 0, config, run.checkpoints)
  assert again.history["loss"] == whole.history["loss"] and "started" not in again.history

  # Both starts waited for compilation, before step 0 and before step 50.
  rows = sm.read_json_lines(run.folder / "states" / "log.jsonl")
  assert [row["step"] for row in rows if row.get("started")] == [0, 50]
  seconds = np.array([row["seconds"] for row in rows])
  np.testing.assert_allclose(again.seconds["compile"], seconds[0] + seconds[50])
  np.testing.assert_allclose(again.seconds["train"], seconds[1:50].sum() + seconds[51])


def test_a_folder_knows_its_run_by_its_settings_not_by_how_they_were_searched(tmp_path):
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  store.begin(tmp_path / "a", "reptile", 0, config, problem)
  arm = config.arms.reptile
  arm.trials, arm.searched_with = arm.trials + 1, "shots=7"
  store.begin(tmp_path / "a", "reptile", 0, config, problem)
  arm.inner_steps += 1
  with pytest.raises(ValueError, match="other data: arms.reptile.inner_steps: 2 in it, 3 here"):
    store.begin(tmp_path / "a", "reptile", 0, config, problem)


def test_a_run_is_not_judged_on_other_data_than_it_was_trained_on(tmp_path):
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  run = store.begin(tmp_path / "a", "reptile", 0, config, problem)
  prepared = store.prepare("reptile", config, problem)
  trained = store.train(prepared, "reptile", 0, config, run.checkpoints)
  other = problem._replace(protocol=problem.protocol._replace(split="9 alphabets"))
  about = store.read(tmp_path / "a")[1]
  with pytest.raises(ValueError, match="by another protocol: split: .*'9 alphabets' now.*data_dir"):
    store.record(run, about, prepared._replace(problem=other), trained, "test", "test")
  assert not (tmp_path / "a" / "test.json").exists()
  with pytest.raises(ValueError, match="other data: protocol.split: .* 9 alphabets here"):
    store.begin(tmp_path / "a", "reptile", 0, config, other)


def test_rows_that_waited_for_compilation_are_told_apart():
  state: Any = None  # handed on as it is
  rows = [
    {"step": 0, "seconds": 9.0, "started": 1.0},
    {"step": 1, "seconds": 1.0},
    {"step": 2, "seconds": 2.0},
  ]
  found = training.trained(state, rows)
  assert found.seconds == {"compile": 9.0, "train": 3.0}
  assert found.history == {"step": [0.0, 1.0, 2.0], "seconds": [9.0, 1.0, 2.0]}
  goes_on = training.trained(state, [*rows, {"step": 3, "seconds": 7.0, "started": 1.0}])
  assert goes_on.seconds == {"compile": 16.0, "train": 3.0}
  assert training.trained(state, []).seconds == {"compile": 0.0, "train": 0.0}


def test_tasks_of_a_finite_list_are_judged_once(tmp_path):
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  short = dataclasses.replace(problem.test, tasks=3)
  problem = problem._replace(validation=short, test=short)
  with pytest.raises(ValueError, match="There are 3 test tasks.*test_episodes is 4.*episodes=3"):
    store.begin(tmp_path / "a", "maml", 0, config, problem)
  assert not (tmp_path / "a").exists()
  prepared = store.prepare("maml", config, problem)
  state = prepared.learner.init(prepared.model.init(jax.random.key(0)))
  with pytest.raises(ValueError, match="There are 3 test tasks"):
    store.evaluate(prepared, state, config, "test", "a")
  assert store.evaluate(prepared, state, config, "validation", "a").nll.shape == (3, 2)


@pytest.mark.skipif(not DATA, reason="needs SHRINKMETA_DATA")
def test_no_alphabet_is_judged_twice(tmp_path):
  begin = lambda table, alphabets: store.begin(
    tmp_path / f"{table}-{alphabets}",
    "maml",
    0,
    config := tables.load(table, "cpu", [f"problem.train_alphabets={alphabets}"], tuned=False),
    problems.make_problem(config.problem),
  )
  for table in ("alphabets", "small_data"):
    for alphabets in (25, 10):
      begin(table, alphabets)
    with pytest.raises(ValueError, match="3 validation tasks.*validation_episodes is 8"):
      begin(table, 33)
