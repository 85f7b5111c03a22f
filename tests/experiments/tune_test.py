import json
import math

import numpy as np
import pytest

from experiments.runs import results
from experiments.settings import tables, tuned


def test_what_was_chosen_is_the_best_and_trains(tmp_path, command, monkeypatch):
  common = ["--table=sinusoid", "--size=smoke", "--trials=3", f"--out={tmp_path}"]
  common.append(f"--chosen={tmp_path / 'chosen'}")

  def call(*flags):
    done = command("tune", *common, *flags)
    return done.returncode, done.stderr

  def read(arm):
    return json.loads((tmp_path / "chosen" / f"{arm}.json").read_text())

  code, told = call("--algorithms=sigma_imaml,reptile")
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
  assert (
    call("--algorithms=reptile")[0] == 0 and read("reptile") == first
  )  # nothing is trained twice
  assert (tmp_path / "reptile-1-0" / "validation.json").stat().st_mtime_ns == written

  # With several seeds a trial is their mean.
  assert call("--algorithms=reptile", "--seeds=0,1")[0] == 0
  several, one = read("reptile"), first["trials"]
  assert (first["seeds"], several["seeds"]) == (1, 2)
  for i, trial in enumerate(several["trials"]):
    curves = [results.read_json(tmp_path / f"reptile-{i}-{s}" / "validation.json") for s in (0, 1)]
    nll = [curve.nll[-1].mean() for _, (curve,) in curves]
    assert nll[0] == one[i]["nll"] != nll[1]
    np.testing.assert_allclose(trial["nll"], np.mean(nll), rtol=1e-6)

  # One that diverges is a trial like others; where all do, nothing is chosen.
  code, told = call("--algorithms=maml,fomaml", "--set=arms.maml.inner_rate=1e30")
  assert code == 1 and "All 3 trials of maml diverged" in told
  assert not (tmp_path / "chosen" / "maml.json").exists()
  assert (tmp_path / "chosen" / "fomaml.json").exists()  # the search went on

  monkeypatch.setattr(tuned, "file_of", lambda table, size, arm: tmp_path / f"{arm}.json")
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
  plain = tables.load("sinusoid", "smoke", use_tuned=False).arms
  assert (plain.reptile.trials, tables.load("sinusoid", "smoke").arms.maml) == (0, plain.maml)
  with pytest.raises(ValueError, match="test tasks may be among those .* --tuned=false"):
    tables.load("sinusoid", "smoke", ["problem.scale=0.1"])
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
