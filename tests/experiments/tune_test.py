import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import tables

ROOT = pathlib.Path(__file__).parents[2]
MODULES = ("conv_0", "conv_1", "head")

# Flags of binaries live in one registry, so that no two binaries can be imported together.
DRAW = (
  f"modules = {MODULES}"
  + """
import json, sys
from experiments import tables, tune
start = tables.load("small_data", "cpu", tuned=False).arms
drawn = {arm: [tune.draw(start[arm], i, modules) for i in range(40)] for arm in start}
make = lambda accuracy, nll: {"accuracy": accuracy, "nll": nll}
better = [
  tune.better(make(0.6, 2.0), make(0.5, 1.0)),  # accuracy first
  tune.better(make(None, 1.0), make(None, 2.0)),  # in regression the likelihood
  tune.better(make(0.1, 3.0), make(0.9, None)),  # one that diverged is worse than any
  not tune.better(make(0.9, None), make(0.1, 3.0)),
  not tune.better(make(0.5, 1.0), make(0.5, 2.0)),  # a tie keeps the first
]
print(json.dumps([drawn, better]))
"""
)


def test_trials_are_the_same_points_for_every_arm():
  done = subprocess.run([sys.executable, "-c", DRAW], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  drawn, better = json.loads(done.stdout)
  assert better == [True] * 5
  start = tables.load("small_data", "cpu", tuned=False).arms
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
      np.testing.assert_allclose(found, factors.setdefault(name, found), atol=1e-2)
    assert {trial["batch_size"] for trial in trials} == {0, 20}
    steps = start[arm].inner_steps
    assert {trial["inner_steps"] for trial in trials} == {math.ceil(steps / 2), steps, 2 * steps}
  assert {trial["task_specific"] for trial in drawn["hand_picked"]} >= set(MODULES)


def test_what_was_chosen_is_the_best_and_trains(tmp_path, monkeypatch):
  file = tmp_path / "chosen.json"
  command = [sys.executable, "-m", "experiments.tune", "--table=sinusoid", "--size=smoke"]
  command += ["--trials=3", f"--out={tmp_path}", f"--chosen={file}"]

  def call(arm):
    done = subprocess.run([*command, f"--arms={arm}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())

  call("sigma_imaml")
  document = call("reptile")
  assert list(document["arms"]) == ["sigma_imaml", "reptile"]  # one by one, in the order of arms
  for found in document["arms"].values():
    trials = found["trials"]
    best = min(trials, key=lambda trial: math.inf if trial["nll"] is None else trial["nll"])
    assert len(trials) == 3 and found["chosen"] == best["settings"]
    assert len({trial["nll"] for trial in trials}) == 3
  written = (tmp_path / "reptile-1" / "validation.json").stat().st_mtime_ns
  assert call("reptile")["arms"] == document["arms"]  # nothing is trained twice
  assert (tmp_path / "reptile-1" / "validation.json").stat().st_mtime_ns == written

  monkeypatch.setattr(tables, "tuned_file", lambda table, size: file)
  config = tables.load("sinusoid", "smoke")
  assert config.arms.reptile.inner_rate == document["arms"]["reptile"]["chosen"]["inner_rate"]
  assert (config.arms.reptile.trials, config.arms.maml.trials) == (3, 0)
  assert config.arms.maml == tables.load("sinusoid", "smoke", tuned=False).arms.maml
  file.write_text('{"format": "other"}')
  with pytest.raises(ValueError, match="'other'; wanted 'shrinkmeta.experiments.tuned/1'"):
    tables.load("sinusoid", "smoke")
