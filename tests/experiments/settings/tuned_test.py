import json

import pytest

from experiments.settings import tables, tuned


def test_settings_are_not_used_where_they_may_have_seen_the_test_alphabets(tmp_path, monkeypatch):
  """Alphabets behind the T that train are for the test: with a larger T, those that validated."""
  monkeypatch.setattr(tuned, "file_of", lambda table, size, arm: tmp_path / f"{arm}.json")
  config = tables.load("small_data", "cpu").to_dict()
  found = {"format": tuned.FORMAT, "config": config, "trials": [{}]}
  start = config["arms"]["reptile"] | {"inner_decay": 7}
  found |= {"start": start, "chosen": {"inner_rate": 0.7}}
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  arm = tables.load("small_data", "cpu", ["problem.train_alphabets=10"]).arms.reptile
  assert (arm.inner_rate, arm.trials, arm.searched_with) == (0.7, 1, "train_alphabets=25")
  assert arm.inner_decay == 7  # what was not searched is as in the search too
  found["config"] = tables.load("few_shot", "cpu", use_tuned=False).to_dict()
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  arm = tables.load("few_shot", "cpu", ["problem.shape.shots=5"]).arms.reptile
  assert (arm.trials, arm.searched_with) == (1, "shape.shots=1")

  found["config"] = config
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  for change in ("train_alphabets=30", "augment=True"):
    with pytest.raises(ValueError, match="may be among those"):
      tables.load("small_data", "cpu", [f"problem.{change}"])
    # One changed setting of the arm leaves others that the search chose.
    with pytest.raises(ValueError, match="may be among those"):
      tables.load("small_data", "cpu", [f"problem.{change}", "arms.reptile.outer_rate=0.3"])
    own = [f"problem.{change}", "arms.reptile.inner_rate=0.3"]  # nothing chosen is left
    assert tables.load("small_data", "cpu", own).arms.reptile.trials == 0
    other = tables.load("small_data", "cpu", [f"problem.{change}"], names=["maml"])
    assert other.arms.reptile.inner_rate == start["inner_rate"]


@pytest.mark.parametrize(
  "table, changed", (("glyphs", "dataset='omniglot'"), ("sinusoid", "noise=0.1"))
)
def test_settings_are_used_for_tasks_that_no_search_saw(tmp_path, monkeypatch, table, changed):
  monkeypatch.setattr(tuned, "file_of", lambda table, size, arm: tmp_path / f"{arm}.json")
  config = tables.load(table, "cpu", use_tuned=False).to_dict()
  found = {"format": tuned.FORMAT, "config": config, "trials": [{}]}
  found |= {"start": config["arms"]["reptile"], "chosen": {"inner_rate": 0.7}}
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  arm = tables.load(table, "cpu", [f"problem.{changed}"]).arms.reptile
  assert (arm.inner_rate, arm.trials) == (0.7, 1)
