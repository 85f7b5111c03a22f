from typing import Any

import numpy as np

import shrinkmeta as sm
from experiments import problems, runs, tables, training


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(tmp_path):
  config = tables.load("sinusoid", "smoke", ["meta_steps=52"])
  problem = problems.make_problem(config.problem)
  prepared = runs.prepare("reptile", config, problem)
  run = runs.begin(tmp_path / "a", "reptile", 0, config, problem)
  whole = runs.train(prepared, "reptile", 0, config, run.checkpoints)
  (run.folder / "states" / "52" / "about" / "metadata").write_text("{}")
  again = runs.train(prepared, "reptile", 0, config, run.checkpoints)
  assert again.history["loss"] == whole.history["loss"] and "started" not in again.history

  # Both starts waited for compilation, before step 0 and before step 50.
  rows = sm.read_json_lines(run.folder / "states" / "log.jsonl")
  assert [row["step"] for row in rows if row.get("started")] == [0, 50]
  seconds = np.array([row["seconds"] for row in rows])
  np.testing.assert_allclose(again.seconds["compile"], seconds[0] + seconds[50])
  np.testing.assert_allclose(again.seconds["train"], seconds[1:50].sum() + seconds[51])


def test_the_first_row_of_an_older_log_waited_for_compilation():
  state: Any = None  # handed on as it is
  rows = [{"step": 0, "seconds": 9.0}, {"step": 1, "seconds": 1.0}, {"step": 2, "seconds": 2.0}]
  found = training.trained(state, rows)
  assert found.seconds == {"compile": 9.0, "train": 3.0}
  assert found.history == {"step": [0.0, 1.0, 2.0], "seconds": [9.0, 1.0, 2.0]}
  goes_on = training.trained(state, [*rows, {"step": 3, "seconds": 7.0, "started": 1.0}])
  assert goes_on.seconds == {"compile": 16.0, "train": 3.0}
  assert training.trained(state, []).seconds == {"compile": 0.0, "train": 0.0}
