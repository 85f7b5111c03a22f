import dataclasses
import os

import numpy as np
import pytest

import shrinkmeta as sm
from experiments.runs import pipeline, problems, store
from experiments.settings import algorithms, tables

DATA = os.environ.get("SHRINKMETA_DATA")


def test_a_damaged_checkpoint_costs_the_steps_after_the_one_before(tmp_path):
  config = tables.load("sinusoid", "smoke", ["meta_steps=52"])
  problem = problems.make_problem(config.problem)
  prepared = pipeline.prepare("reptile", config, problem)
  run = store.begin(tmp_path / "a", "reptile", 0, config, problem)
  whole = pipeline.train(prepared, "reptile", 0, config, run.checkpoints)
  (run.folder / "states" / "52" / "about" / "metadata").write_text("{}")
  again = pipeline.train(prepared, "reptile", 0, config, run.checkpoints)
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
  (tmp_path / "b" / "states").mkdir(parents=True)
  with pytest.raises(ValueError, match="states of a run but no run.json"):
    store.begin(tmp_path / "b", "reptile", 0, config, problem)


def test_a_run_is_not_judged_on_other_data_than_it_was_trained_on(tmp_path):
  config = tables.load("sinusoid", "smoke")
  problem = problems.make_problem(config.problem)
  run = store.begin(tmp_path / "a", "reptile", 0, config, problem)
  prepared = pipeline.prepare("reptile", config, problem)
  trained = pipeline.train(prepared, "reptile", 0, config, run.checkpoints)
  other = problem._replace(protocol=problem.protocol._replace(split="9 alphabets"))
  about = store.read(tmp_path / "a")[1]
  with pytest.raises(ValueError, match="by another protocol: split: .*'9 alphabets' now.*data_dir"):
    store.record(run, about, prepared._replace(problem=other), trained, "test", "test")
  assert not (tmp_path / "a" / "test.json").exists()
  with pytest.raises(ValueError, match="other data: protocol.split: .* 9 alphabets here"):
    store.begin(tmp_path / "a", "reptile", 0, config, other)
  # The same words and counts, other arrays.
  other = problem._replace(train=dataclasses.replace(problem.train, data=np.arange(3.0)))
  with pytest.raises(ValueError, match="by another protocol: checksums.train"):
    store.record(run, about, prepared._replace(problem=other), trained, "test", "test")
  with pytest.raises(ValueError, match="other data: checksums.train"):
    store.begin(tmp_path / "a", "reptile", 0, config, other)
  older = {name: value for name, value in about.items() if name != "checksums"}
  store.record(run, older, prepared._replace(problem=other), trained, "test", "test")


@pytest.mark.skipif(not DATA, reason="needs SHRINKMETA_DATA")
def test_no_alphabet_is_judged_twice(tmp_path):
  begin = lambda table, alphabets: store.begin(
    tmp_path / f"{table}-{alphabets}",
    "maml",
    0,
    config := tables.load(table, "cpu", [f"problem.train_alphabets={alphabets}"], use_tuned=False),
    problems.make_problem(config.problem),
  )
  for table in ("alphabets", "small_data"):
    for alphabets in (25, 10):
      begin(table, alphabets)
    with pytest.raises(ValueError, match="3 validation tasks.*validation_episodes is 8"):
      begin(table, 33)


def test_errors_say_what_was_wanted(tmp_path):
  with pytest.raises(ValueError, match="no run in"):
    store.find([str(tmp_path)])
  (tmp_path / "run.json").write_text('{"format": "other"}')
  with pytest.raises(ValueError, match="'other'.*wanted 'shrinkmeta"):
    store.read(tmp_path)
  (tmp_path / "run.json").write_text("[]")
  with pytest.raises(ValueError, match=f"{tmp_path}/run.json: format is None; wanted 'shrinkmeta"):
    store.read(tmp_path)
  with pytest.raises(ValueError, match="alphabets.*got 'imagenet'"):
    tables.load("imagenet", "cpu")
  config = tables.load("sinusoid", "smoke")
  with pytest.raises(
    ValueError, match="'cosinusoid' is no problem; choose of writing_systems, omniglot"
  ):
    problems.make_problem({"name": "cosinusoid"})
  problem = problems.make_problem(config.problem)
  run = store.begin(tmp_path / "a", "reptile", 0, config, problem)
  with pytest.raises(ValueError, match="trained for 0 of 3 meta-steps: start experiments.train"):
    store.restore(run, pipeline.prepare("reptile", config, problem))
  about = (tmp_path / "a" / "run.json").read_text()
  for text, message in (("{", "cannot be read"), (about.replace(store.FORMAT, "x"), "is 'x'")):
    (tmp_path / "a" / "run.json").write_text(text)
    with pytest.raises(ValueError, match=f"a/run.json.*{message}.*Train again in another folder"):
      store.begin(tmp_path / "a", "reptile", 0, config, problem)
  (tmp_path / "a" / "run.json").write_text(about)
  prepared = pipeline.prepare("reptile", config, problem)
  pipeline.train(prepared, "reptile", 0, config, run.checkpoints)
  log = tmp_path / "a" / "states" / "log.jsonl"
  log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
  with pytest.raises(
    ValueError, match="log.jsonl has 2 records and wants one for each of 3 meta-st"
  ):
    store.restore(run, prepared)
  with pytest.raises(ValueError, match="protonet: no algorithm; choose of sigma_imaml"):
    algorithms.chosen(["reptile", "protonet"])
  with pytest.raises(ValueError, match="\"tanh_mlp\" and width; got .*'conv'"):
    tables.load("sinusoid", "smoke", ["network.kind=conv"])
  wrong = tables.load("sinusoid", "smoke", ["arms.reptile.inner=adamw"])
  with pytest.raises(ValueError, match="arms.reptile.inner is one of sgd, adam.*got 'adamw'"):
    pipeline.prepare("reptile", wrong, problem)
