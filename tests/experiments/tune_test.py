import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.runs import results
from experiments.settings import tables

ROOT = pathlib.Path(__file__).parents[2]
MODULES = ("conv_0", "conv_1", "head")

# Flags of binaries live in one registry, so that no two binaries can be imported together.
DRAW = (
  f"modules = {MODULES}"
  + """
import json, sys
from experiments import tune
from experiments.settings import tables
start = tables.load("small_data", "cpu", tuned=False).arms
drawn = {arm: [tune.draw(start[arm], i, modules) for i in range(40)] for arm in start}
make = lambda accuracy, nll: {"accuracy": accuracy, "nll": nll}
better = [
  tune.score(make(0.6, 2.0)) > tune.score(make(0.5, 1.0)),  # accuracy first
  tune.score(make(None, 1.0)) > tune.score(make(None, 2.0)),  # in regression the likelihood
  tune.score(make(0.1, 3.0)) > tune.score(make(0.9, None)),  # one that diverged is below any
  tune.score(make(0.5, 1.0)) == tune.score(make(0.5, 2.0)),
]
long = tables.load("alphabets", "cpu", tuned=False)
fixed = [tune.draw(long.arms.maml, i, modules, long.fixed) for i in range(3)]
print(json.dumps([drawn, better, fixed]))
"""
)


# Three seeds, of which the second diverges; nothing is trained.
DIVERGES = """
import json, pathlib, sys, types
import numpy as np
from experiments import tune
from experiments.settings import tables

def train(prepared, arm, seed, config, checkpoints):
  trained.append(seed)
  if seed == 1:
    raise FloatingPointError("seed 1 diverges")

def record(run, about, prepared, state, name, split):
  (run.folder / f"{name}.json").touch()

def begin(folder, *settings):
  folder.mkdir(exist_ok=True)
  return types.SimpleNamespace(folder=folder, checkpoints=None)

curve = types.SimpleNamespace(accuracy=np.ones([1, 2]), nll=np.ones([1, 2]), seconds={"train": 2.0})
trained = []
tune.store.train, tune.store.record, tune.store.begin = train, record, begin
tune.store.prepare, tune.store.read = lambda *settings: None, lambda folder: (None, {})
tune.results.read_json = lambda file: ({}, (curve,))
config, folder = tables.load("sinusoid", "smoke", tuned=False), pathlib.Path(sys.argv[1])
one, three = (tune.run_trial(folder / "maml-0", "maml", config, None, n) for n in (1, 3))
print(json.dumps([one, three, trained]))
"""


def test_a_trial_that_diverges_on_one_seed_is_the_worst(tmp_path):
  command = [sys.executable, "-c", DIVERGES, str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  one, three, trained = json.loads(done.stdout)
  assert one == {"accuracy": 1.0, "nll": 1.0, "seconds": 2.0}
  assert three == {"accuracy": None, "nll": None, "seconds": None}
  assert trained == [0, 1]  # seed 0 once, and no seed after the one that diverged
  assert "diverges" in (tmp_path / "maml-0-1" / "diverged.txt").read_text()


def test_trials_are_the_same_points_for_every_arm():
  done = subprocess.run([sys.executable, "-c", DRAW], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  drawn, better, fixed = json.loads(done.stdout)
  assert all(
    trial.keys() == {"inner_rate", "outer_rate", "inner_steps", "inner_decay"} for trial in fixed
  )
  assert better == [True] * 4
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
      # Equal but for three digits, half a percent of each of two numbers.
      np.testing.assert_allclose(
        found, factors.setdefault(name, found), atol=2 * math.log(1.005, 4)
      )
    assert {trial["batch_size"] for trial in trials} == {0, 20}
    assert {trial["inner_decay"] for trial in trials} == {0, 10}
    steps = start[arm].inner_steps
    assert {trial["inner_steps"] for trial in trials} == {math.ceil(steps / 2), steps, 2 * steps}
  assert {trial["task_specific"] for trial in drawn["hand_picked"]} >= set(MODULES)


def test_what_was_chosen_is_the_best_and_trains(tmp_path, monkeypatch):
  command = [sys.executable, "-m", "experiments.tune", "--table=sinusoid", "--size=smoke"]
  command += ["--trials=3", f"--out={tmp_path}", f"--chosen={tmp_path / 'chosen'}"]

  def call(*flags):
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr

  def read(arm):
    return json.loads((tmp_path / "chosen" / f"{arm}.json").read_text())

  code, told = call("--arms=sigma_imaml,reptile")
  assert code == 0, told
  for arm in ("sigma_imaml", "reptile"):
    trials = read(arm)["trials"]
    best = min(trials, key=lambda trial: math.inf if trial["nll"] is None else trial["nll"])
    assert len(trials) == 3 and read(arm)["chosen"] == best["settings"]
    assert len({trial["nll"] for trial in trials}) == 3
  first, written = (
    read("reptile"),
    (tmp_path / "reptile-1-0" / "validation.json").stat().st_mtime_ns,
  )
  assert call("--arms=reptile")[0] == 0 and read("reptile") == first  # nothing is trained twice
  assert (tmp_path / "reptile-1-0" / "validation.json").stat().st_mtime_ns == written

  # With several seeds a trial is their mean.
  assert call("--arms=reptile", "--seeds=2")[0] == 0
  several, one = read("reptile"), first["trials"]
  assert (first["seeds"], several["seeds"]) == (1, 2)
  for i, trial in enumerate(several["trials"]):
    curves = [results.read_json(tmp_path / f"reptile-{i}-{s}" / "validation.json") for s in (0, 1)]
    nll = [curve.nll[-1].mean() for _, (curve,) in curves]
    assert nll[0] == one[i]["nll"] != nll[1]
    np.testing.assert_allclose(trial["nll"], np.mean(nll), rtol=1e-6)

  # One that diverges is a trial like others; where all do, nothing is chosen.
  code, told = call("--arms=maml,fomaml", "--set=arms.maml.inner_rate=1e30")
  assert code == 1 and "All 3 trials of maml diverged" in told
  assert not (tmp_path / "chosen" / "maml.json").exists()
  assert (tmp_path / "chosen" / "fomaml.json").exists()  # the search went on

  monkeypatch.setattr(tables, "chosen_file", lambda table, size, arm: tmp_path / f"{arm}.json")
  path = tmp_path / "reptile.json"
  path.write_text(json.dumps(first))
  arm = tables.load("sinusoid", "smoke").arms.reptile
  assert {name: arm[name] for name in first["chosen"]} == first["chosen"]
  assert (arm.trials, arm.searched_with) == (3, "")
  arm = tables.load("sinusoid", "smoke", ["problem.shots=5"]).arms.reptile
  assert (arm.trials, arm.searched_with) == (3, "shots=10")
  arm = tables.load("sinusoid", "smoke", ["meta_steps=5", "problem.shots=5"]).arms.reptile
  assert (arm.trials, arm.searched_with) == (3, "meta_steps=3, shots=10")
  arm = tables.load("sinusoid", "smoke", ["arms.reptile.outer_rate=9.0"]).arms.reptile
  assert (arm.outer_rate, arm.trials) == (9.0, 0)  # no search chose these
  plain = tables.load("sinusoid", "smoke", tuned=False).arms
  assert (plain.reptile.trials, tables.load("sinusoid", "smoke").arms.maml) == (0, plain.maml)
  with pytest.raises(ValueError, match="test tasks may be among those .* --tuned=false"):
    tables.load("sinusoid", "smoke", ["problem.noise=0.1"])
  path.write_text(json.dumps(first | {"chosen": {"outer_rat": 1.0}}))
  with pytest.raises(ValueError, match="settings of reptile are .* outer_rat is in one .*anew"):
    tables.load("sinusoid", "smoke")
  older = {k: v for k, v in first["start"].items() if k != "modules"}
  path.write_text(json.dumps(first | {"start": older}))
  with pytest.raises(ValueError, match="; modules is in one of the two alone. Search anew"):
    tables.load("sinusoid", "smoke")
  path.write_text('{"format"')
  with pytest.raises(ValueError, match="reptile.json cannot be read: .*Search anew"):
    tables.load("sinusoid", "smoke")
  path.write_text('{"format": "other"}')
  with pytest.raises(ValueError, match="'other'; wanted 'shrinkmeta.experiments.tuned/1'"):
    tables.load("sinusoid", "smoke")


def test_settings_are_not_used_where_they_may_have_seen_the_test_alphabets(tmp_path, monkeypatch):
  """Alphabets behind the T that train are for the test: with a larger T, those that validated."""
  monkeypatch.setattr(tables, "chosen_file", lambda table, size, arm: tmp_path / f"{arm}.json")
  config = tables.load("small_data", "cpu").to_dict()
  found = {"format": tables.TUNED, "config": config, "trials": [{}]}
  start = config["arms"]["reptile"] | {"inner_decay": 7}
  found |= {"start": start, "chosen": {"inner_rate": 0.7}}
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  arm = tables.load("small_data", "cpu", ["problem.train_alphabets=10"]).arms.reptile
  assert (arm.inner_rate, arm.trials, arm.searched_with) == (0.7, 1, "train_alphabets=25")
  assert arm.inner_decay == 7  # what was not searched is as in the search too
  found["config"] = tables.load("few_shot", "cpu", tuned=False).to_dict()
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  arm = tables.load("few_shot", "cpu", ["problem.shape.shots=5"]).arms.reptile
  assert (arm.trials, arm.searched_with) == (1, "shape.shots=1")

  found["config"] = config
  (tmp_path / "reptile.json").write_text(json.dumps(found))
  for change in ("train_alphabets=30", "augment=True"):
    with pytest.raises(ValueError, match="may be among those"):
      tables.load("small_data", "cpu", [f"problem.{change}"])
