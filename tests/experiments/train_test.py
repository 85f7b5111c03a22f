import json
import logging
import shutil

import numpy as np
import pytest

from experiments.report import evaluated, over_data, page
from experiments.runs import problems, results, store
from experiments.settings import tables


def test_a_run_is_trained_evaluated_and_not_mixed_with_another(tmp_path, command):
  flags = ["--table=sinusoid", "--size=smoke", "--seeds=0", f"--out={tmp_path}"]
  done = command("train", *flags, "--algorithms=reptile,sigma_imaml")
  assert done.returncode == 0, done.stderr
  assert [folder.name for folder in store.find([str(tmp_path)])] == ["reptile-0", "sigma_imaml-0"]

  # One that is not trained yet does not keep the others waiting.
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  store.begin(tmp_path / "fomaml-0", "fomaml", 0, config, problem)
  done = command("evaluate", tmp_path)
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert "fomaml-0 was trained for 0 of 3 meta-steps" in done.stderr
  assert "1 of 3 runs are left" in done.stderr
  shutil.rmtree(tmp_path / "fomaml-0")
  for arm in ("reptile", "sigma_imaml"):
    settings, (curve,) = results.read_json(tmp_path / f"{arm}-0" / "test.json")
    assert settings["protocol"]["batch norm"] == "none" and settings["split"] == "test"
    assert (curve.algorithm, curve.seed, curve.nll.shape) == (arm, 0, (3, 4))
    assert np.isnan(curve.accuracy).all() and np.isfinite(curve.nll).all()
    assert len(curve.history["loss"]) == 3 and curve.nll[0].std() > 0
    assert np.abs(curve.nll[0] - curve.nll[-1]).max() > 1e-3  # it adapts

  file = tmp_path / "sigma_imaml-0" / "test.json"
  text = file.read_text()
  file.write_text(text[:1000])
  done = command("evaluate", tmp_path)
  assert done.returncode == 0, done.stderr
  assert f"{file} is not JSON" in done.stderr  # and it is made again
  np.testing.assert_array_equal(results.read_json(file)[1][0].nll, curve.nll)
  assert "reptile-0: there already" in done.stderr and "no sigma" not in done.stderr

  other = shutil.copytree(tmp_path / "reptile-0", tmp_path / "copy" / "reptile-0")
  done = command("report", tmp_path, f"--out={tmp_path / 'none'}")
  assert done.returncode != 0
  told = f"{other} and {tmp_path / 'reptile-0'} are both runs of reptile from seed 0"
  assert told in " ".join(done.stderr.split())
  shutil.rmtree(tmp_path / "copy")

  other = shutil.copytree(tmp_path / "reptile-0", tmp_path / "longer" / "reptile-0")
  text = (other / "test.json").read_text()
  (other / "test.json").write_text(text.replace('"meta_steps": 3', '"meta_steps": 4'))
  page = tmp_path / "report"
  done = command("report", tmp_path, f"--out={page}")
  assert done.returncode == 0, done.stderr
  text = (page / "index.html").read_text()
  assert "sigma_imaml minus rival after" in text and 'src="data:image/png;base64' in text
  assert "<th>trials</th>" in text and "| reptile " in (page / "tables_1.md").read_text()
  assert "http" not in text and "Accuracy" not in text  # self-contained; regression has none
  assert len(list(page.glob("*.png"))) == 4
  assert text.count("</h2><dl>") == 2  # of unlike training, so not in one table
  shutil.rmtree(other)

  done = command("evaluate", tmp_path, "--freeze=1e6,1000000.1")
  assert done.returncode == 0, done.stderr
  (tmp_path / "sigma_imaml-0" / "test-freeze1000000.1.json").unlink()  # alike in six digits
  _, (held,) = results.read_json(tmp_path / "sigma_imaml-0" / "test-freeze1e+06.json")
  assert set(held.sigma.values()) == {0.0}
  np.testing.assert_array_equal(held.nll[0], held.nll[-1])  # nothing is left to adapt
  assert not list((tmp_path / "reptile-0").glob("*freeze*"))
  shots = tmp_path / "shots" / "sigma_imaml-0"
  shutil.copytree(tmp_path / "sigma_imaml-0", shots)
  text = (shots / "test.json").read_text()
  (shots / "test.json").write_text(text.replace('"shots": 10', '"shots": 20'))
  done = command("report", tmp_path, f"--out={page}")
  assert done.returncode == 0, done.stderr
  text = (page / "index.html").read_text()
  assert "1e+06" in text and "<td>none</td><td>0.0</td>" in text  # frozen: nothing task-specific
  assert (page / "data_0.png").exists() and "Modules found" in text
  shutil.rmtree(tmp_path / "shots")

  (tmp_path / "sigma_imaml-0" / "test.json").rename(tmp_path / "whole.json")
  (tmp_path / "sigma_imaml-0" / "test-freeze1e+06.json").rename(tmp_path / "f.json")
  (tmp_path / "f.json").rename(tmp_path / "sigma_imaml-0" / "validation-freeze0.1.json")
  (tmp_path / "whole.json").rename(tmp_path / "sigma_imaml-0" / "test.json")
  done = command("report", tmp_path, f"--out={page}")
  assert done.returncode != 0 and "Run experiments.evaluate --split=validation" in done.stderr
  (tmp_path / "sigma_imaml-0" / "validation-freeze0.1.json").unlink()

  again = shutil.copytree(tmp_path / "reptile-0", tmp_path / "reptile-1")
  text = (again / "test.json").read_text().replace('"trials": 0', '"trials": 8')
  (again / "test.json").write_text(text.replace('"seed": 0', '"seed": 1'))
  done = command("report", tmp_path, f"--out={page}")
  assert done.returncode == 0, done.stderr  # how settings were searched for is no setting
  assert "each the mean of 2 seeds (sigma_imaml: 1)" in (page / "index.html").read_text()
  assert not (page / "tables_2.md").exists()  # of the earlier report
  text = (again / "test.json").read_text().replace('"inner_rate": 0.002', '"inner_rate": 0.003')
  (again / "test.json").write_text(text.replace('"seed": 0', '"seed": 1'))
  done = command("report", tmp_path, f"--out={page}")
  assert done.returncode != 0 and "runs of one arm with unlike settings" in done.stderr

  (again / "test.json").write_text(text[:100])
  (page / "index.html").unlink()
  done = command("report", tmp_path, f"--out={page}")
  assert done.returncode == 1 and f"Left out, damaged: {again}" in done.stderr
  assert "sigma_imaml" in (page / "index.html").read_text()  # the report of the others
  shutil.rmtree(again)

  done = command("train", *flags, "--algorithms=reptile", "--set=problem.shots=3")
  assert done.returncode != 0 and "other data: problem.shots: " in done.stderr


def test_a_run_that_diverges_leaves_the_others_be(tmp_path, command):
  flags = ["--table=sinusoid", "--size=smoke", "--seeds=0", f"--out={tmp_path}"]
  done = command(
    "train", *flags, "--algorithms=maml,fine_tuning", "--set=arms.maml.inner_rate=1e30"
  )
  assert done.returncode == 1 and "maml, seed 0 diverged: No task of step 0" in done.stderr
  done = command("evaluate", tmp_path)
  assert done.returncode == 1 and f"see {tmp_path / 'maml-0' / 'diverged.txt'}" in done.stderr
  assert (tmp_path / "fine_tuning-0" / "test.json").exists()
  done = command("report", tmp_path, f"--out={tmp_path / 'report'}")
  assert done.returncode == 0, done.stderr
  told = (tmp_path / "report" / "tables_1.md").read_text()
  assert (
    "Diverged in training, in no mean: maml, seed 0" in told and "Judged on: test tasks" in told
  )
  page = (tmp_path / "report" / "index.html").read_text()
  assert "<dd>maml, seed 0</dd>" in page and "<dd>test tasks</dd>" in page
  assert command("evaluate", tmp_path / "fine_tuning-0", "--split=validation").returncode == 0
  flag = f"--out={tmp_path / 'validation'}"
  assert command("report", tmp_path, flag, "--evaluation=validation").returncode == 0
  told = (tmp_path / "validation" / "tables_1.md").read_text()
  assert "Judged on: validation tasks\n" in told  # no search chose these settings
  text = (tmp_path / "fine_tuning-0" / "validation.json").read_text()
  (tmp_path / "fine_tuning-0" / "validation.json").write_text(
    text.replace('"trials": 0', '"trials": 8')
  )
  assert command("report", tmp_path, flag, "--evaluation=validation").returncode == 0
  told = (tmp_path / "validation" / "tables_1.md").read_text()
  assert "Judged on: validation tasks, on which settings were chosen" in told
  done = command("report", tmp_path / "maml-0", f"--out={tmp_path / 'none'}")
  assert done.returncode != 0 and "1 of 1 diverged in training" in " ".join(done.stderr.split())
  of_earlier = tmp_path / "fine_tuning-0" / "diverged.txt"
  of_earlier.touch()
  assert (
    command("train", *flags, "--algorithms=fine_tuning").returncode == 0 and not of_earlier.exists()
  )


def write_run(folder, arm, data, problem, config, seed=0, diverged=False):
  """Write a run on data with the checksum `data`, and its evaluation."""
  run = store.begin(folder, arm, seed, config, problem)
  about = json.loads((folder / "run.json").read_text())
  about["checksums"] = {"train": data}
  (folder / "run.json").write_text(json.dumps(about))
  if diverged:
    store.record_divergence(folder, FloatingPointError("too fast"))
    return
  settings = {**about["config"], "protocol": about["protocol"], "split": "test", "freeze": 0.0}
  ones = np.ones((3, 4))
  parts = [{"out": 0.5}, {"out": 0.1}, {"out": 41}, {"train": 1.0}, {"step": [0], "loss": [1.0]}]
  curve = results.Curve(arm, seed, np.array([0, 1, 5]), ones, ones, *parts)
  results.write_json(run.folder / "test.json", settings, [curve], {})


@pytest.fixture
def several(tmp_path):
  """Runs with the same settings, on data A and on data B."""
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  for arm, data in (("reptile", "A"), ("maml", "A"), ("fomaml", "B"), ("boil", "B")):
    write_run(tmp_path / f"{arm}-0", arm, data, problem, config, diverged=arm == "boil")
  return tmp_path


def test_runs_on_different_data_are_not_compared(several):
  folders = store.find([several])
  groups, damaged = evaluated.groups_of(folders, "test")
  assert not damaged
  names = [[one.curve.algorithm for one in members] for members in groups]
  assert sorted(names) == [["fomaml"], ["reptile", "maml"]]
  lost = {len(members): evaluated.diverged_among(folders, members) for members in groups}
  assert lost == {1: {several / "boil-0": "boil, seed 0"}, 2: {}}
  assert over_data._series(groups, "shots") == []


def test_a_damaged_run_is_named_and_the_others_are_reported(several, caplog):
  (several / "reptile-0" / "run.json").write_text('{"format"')
  (several / "maml-0" / "test.json").write_text('{"format"')
  with caplog.at_level(logging.ERROR, logger="absl"):
    written, damaged = page.write([several], several / "report", "test")
  assert damaged == [several / "reptile-0", several / "maml-0"]
  for name in ("reptile-0/run.json", "maml-0/test.json"):
    assert str(several / name) in caplog.text
  assert "fomaml" in written.read_text() and "reptile" not in written.read_text()
  with pytest.raises(ValueError, match="reptile-0/run.json cannot be read"):
    page.write([several / "reptile-0"], several / "report", "test")
