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
