import math
import types

import numpy as np
import pytest

from experiments.runs import search
from experiments.settings import tables

MODULES = ("conv_0", "conv_1", "head")


def test_a_trial_that_diverges_on_one_seed_is_the_worst(tmp_path, monkeypatch):
  """Three seeds, of which the second diverges; nothing is trained."""
  trained = []

  def train(prepared, arm, seed, config, checkpoints):
    trained.append(seed)
    if seed == 1:
      raise FloatingPointError("seed 1 diverges")

  def record(run, about, prepared, state, name, split):
    (run.folder / f"{name}.json").touch()

  def begin(folder, *settings):
    folder.mkdir(exist_ok=True)
    return types.SimpleNamespace(folder=folder, checkpoints=None)

  ones = np.ones([1, 2])
  curve = types.SimpleNamespace(accuracy=ones, nll=ones, seconds={"train": 2.0})
  monkeypatch.setattr(search.pipeline, "train", train)
  monkeypatch.setattr(search.pipeline, "prepare", lambda *settings: None)
  monkeypatch.setattr(search.store, "record", record)
  monkeypatch.setattr(search.store, "begin", begin)
  monkeypatch.setattr(search.store, "read", lambda folder: (None, {}))
  monkeypatch.setattr(search.results, "read_json", lambda file: ({}, (curve,)))
  config = tables.load("sinusoid", "smoke", use_tuned=False)
  problem = None
  one, three = (search.run_trial(tmp_path / "maml-0", "maml", config, problem, n) for n in (1, 3))
  assert one == {"accuracy": 1.0, "nll": 1.0, "seconds": 2.0}
  assert three == {"accuracy": None, "nll": None, "seconds": None}
  assert trained == [0, 1]  # seed 0 once, and no seed after the one that diverged
  assert "diverges" in (tmp_path / "maml-0-1" / "diverged.txt").read_text()


@pytest.mark.parametrize(
  "better, worse",
  [
    ((0.6, 2.0), (0.5, 1.0)),  # accuracy first
    ((None, 1.0), (None, 2.0)),  # in regression the likelihood
    ((0.1, 3.0), (0.9, None)),  # one that diverged is below any
  ],
)
def test_score(better, worse):
  make = lambda pair: dict(zip(("accuracy", "nll"), pair, strict=True))
  assert search.score(make(better)) > search.score(make(worse))


def test_score_is_the_accuracy_alone():
  assert search.score({"accuracy": 0.5, "nll": 1.0}) == search.score({"accuracy": 0.5, "nll": 2.0})


def test_what_the_protocol_fixes_is_not_searched():
  long = tables.load("alphabets", "cpu", use_tuned=False)
  for i in range(3):
    trial = search.draw(long.arms.maml, i, MODULES, long.fixed)
    assert trial.keys() == {"inner_rate", "outer_rate", "inner_steps", "inner_decay"}


def test_trials_are_the_same_points_for_every_arm():
  start = tables.load("small_data", "cpu", use_tuned=False).arms
  drawn = {arm: [search.draw(start[arm], i, MODULES) for i in range(40)] for arm in start}
  factors = {}
  for arm, trials in drawn.items():
    assert all(trials[0][name] == start[arm][name] for name in trials[0])
    assert {"inner_rate", "outer_rate", "inner_steps", "batch_size"} <= set(trials[0])
    assert ("sigma_rate" in trials[0]) == ("sigma_rate" in start[arm])
    for name in ("inner_rate", "outer_rate", "init_sigma", "sigma_rate"):
      if name not in trials[0]:
        continue
      found = [math.log(trial[name] / start[arm][name], 4) for trial in trials[1:]]
      assert -1.01 < min(found) < -0.8 and 0.8 < max(found) < 1.01  # three digits are kept
      # Equal but for three digits, half a percent of each of two numbers.
      np.testing.assert_allclose(
        found, factors.setdefault(name, found), atol=2 * math.log(1.005, 4)
      )
    assert {trial["batch_size"] for trial in trials} == {0, 20}
    assert {trial["inner_decay"] for trial in trials} == {0, 10}
    steps = start[arm].inner_steps
    assert {trial["inner_steps"] for trial in trials} == {math.ceil(steps / 2), steps, 2 * steps}
  assert {trial["task_specific"] for trial in drawn["hand_picked"]} >= set(MODULES)
