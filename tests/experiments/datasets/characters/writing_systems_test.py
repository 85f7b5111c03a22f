import pytest

from experiments.datasets.characters import writing_systems


def test_train_and_test_systems_are_disjoint():
  splits = writing_systems.load("glyphs", 20)
  for split in ("test", "validation"):
    assert not set(splits["train"].systems) & set(splits[split].systems)
    assert len(splits["train"].systems) >= 15 and len(splits[split].systems) >= 4


def test_test_systems_come_in_turn():
  problem = writing_systems.problem(ways=5, shots=1, queries=2, size=8)
  assert (problem.train.tasks, problem.validation.tasks, problem.test.tasks) == (None, 4, 8)
  assert problem.protocol.split == "21 systems to train, 4 validation, 8 test"


def test_what_it_refuses(tmp_path):
  with pytest.raises(ValueError, match="dataset is one of glyphs, omniglot; got 'runes'"):
    writing_systems.problem("runes")
  with pytest.raises(ValueError, match="Glyphs are drawn, not read: leave --data_dir out"):
    writing_systems.problem(data_dir=tmp_path)
