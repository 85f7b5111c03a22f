"""The main job in miniature: it runs to the end, repeats exactly, and reports errors."""

import csv
import dataclasses
import functools
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

import shrinkmeta as sm
from experiments import glyphs
from experiments.runs import results
from experiments.settings import tables

ALGORITHMS = ("sigma_imaml", "fomaml")

SYSTEMS = 8  # to test on; the preset asks for four episodes, fewer than one each


def run(
  out: pathlib.Path, algorithms=ALGORITHMS, seeds=(0,), dataset="glyphs", settings=(), **keywords
) -> str:
  config = tables.load("glyphs", "smoke", [f"problem.dataset={dataset}", *settings])
  lost = keywords.pop("diverged", [])
  data_dir = keywords.pop("data_dir", None)
  found, diverged = glyphs.run(algorithms, seeds, config, data_dir, "test", out, **keywords)
  assert diverged == lost
  return found


def test_end_to_end_and_again(tmp_path):
  found = run(tmp_path / "a", seeds=(0, 1))
  for text in ("5-way 1-shot", "batch (transductive)", "sigma_imaml", "fomaml", "conv_3", "head"):
    assert text in found
  for name in ("results.csv", "adaptation.png", "sigma.png", "sigma_history.png"):
    assert (tmp_path / "a" / name).stat().st_size > 0
  assert list((tmp_path / "a" / "tensorboard").glob("*/events*"))
  config, curves = results.read_json(tmp_path / "a" / "results.json")
  assert config["problem"]["dataset"] == config["table"] == "glyphs" and config["meta_steps"] == 3
  assert [(c.algorithm, c.seed) for c in curves] == [(a, s) for s in (0, 1) for a in ALGORITHMS]
  sigma = [c.history["sigma/head"] for c in curves if c.algorithm == "sigma_imaml"]
  assert all(len(s) == 3 and np.isfinite(s).all() for s in sigma) and sigma[0] != sigma[1]
  page = (tmp_path / "a" / "index.html").read_text()
  assert "<pre>python -m experiments.glyphs</pre>" in page
  assert page.count('src="data:image/png;base64') == 3 and "http" not in page  # of one file
  for text in (
    "batch (transductive)",
    "tasks a second",
    "<td>conv_3</td>",
    "inner_rate",
    "<dt>seeds</dt><dd>0, 1</dd>",
  ):
    assert text in page
  with (tmp_path / "a" / "results.csv").open() as file:
    assert len(list(csv.reader(file))) == 1 + 4 * SYSTEMS * 3  # curves, systems, steps
  assert f"{SYSTEMS} systems, the mean of 1 episodes each" in found

  assert curves[0].seconds["compile"] > curves[0].seconds["train"]  # of two updates

  run(tmp_path / "b", algorithms=("fomaml",))
  (again,) = results.read_json(tmp_path / "b" / "results.json")[1]
  np.testing.assert_array_equal(again.nll, curves[1].nll)
  assert again.history["loss"] == curves[1].history["loss"]

  run(tmp_path / "c", algorithms=("fomaml",), settings=["arms.fomaml.batch_size=2"])
  _, (mini,) = results.read_json(tmp_path / "c" / "results.json")
  assert np.isfinite(mini.nll).all() and (mini.nll != curves[1].nll).any()


def start(out: pathlib.Path, *arguments: object) -> subprocess.Popen[str]:
  command = [sys.executable, "-m", "experiments.glyphs", "--preset=smoke", f"--out={out}"]
  command += ["--algorithms=reptile", "--set=meta_batch=3", *map(str, arguments)]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def test_two_processes_find_what_one_finds_and_the_first_alone_writes(tmp_path):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"--coordinator_address=localhost:{s.getsockname()[1]}"
  outs = [tmp_path / name for name in ("one", "two", "second")]
  several = [address, "--num_processes=2"]
  # By SGD throughout: Adam makes a whole step of the rounding of a gradient that is 0, as that of a
  # bias before a batch norm is, and other numbers of devices round otherwise.
  runs = [start(outs[1 + i], *several, f"--process_id={i}") for i in range(2)]
  run(outs[0], algorithms=("reptile",), settings=["meta_batch=3"])
  for process in runs:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
  one, two = (results.read_json(out / "results.json")[1][0] for out in outs[:2])
  np.testing.assert_allclose(one.nll, two.nll, rtol=1e-4)
  np.testing.assert_allclose(one.history["loss"], two.history["loss"], rtol=1e-5)
  assert not [path for path in outs[2].rglob("*") if path.is_file()]


def test_an_arm_that_was_stopped_goes_on(tmp_path, monkeypatch):
  """Killed processes are in tests/training/kill_test.py; here Ctrl-C comes after one update."""
  fit = sm.fit
  again = functools.partial(
    run, tmp_path / "b", algorithms=("fomaml",), checkpoints=tmp_path / "keep"
  )
  with monkeypatch.context() as patch:
    patch.setattr(sm, "fit", lambda *given, **more: fit(*given[:3], 1, **more))
    with pytest.raises(KeyboardInterrupt, match="after 1 of 3 updates, and no result was written"):
      again()
  assert not (tmp_path / "b" / "results.json").exists()
  again()
  run(tmp_path / "a", algorithms=("fomaml",))
  one, other = (results.read_json(tmp_path / o / "results.json")[1][0] for o in ("a", "b"))
  assert one.history["step"] == other.history["step"] == [0, 1, 2]
  assert one.history["loss"] == other.history["loss"]
  np.testing.assert_array_equal(one.nll, other.nll)
  events = lambda out: list((out / "tensorboard" / "fomaml-0").glob("events*"))
  assert len(events(tmp_path / "b")) == 2  # of both starts
  run(tmp_path / "b", algorithms=("fomaml",))
  assert len(events(tmp_path / "b")) == 1  # of a new run

  make = glyphs.problems.make_problem

  def inverted(*given):
    problem = make(*given)
    other = jax.tree.map(lambda x: 1 - x, problem.train.data)
    return problem._replace(train=dataclasses.replace(problem.train, data=other))

  monkeypatch.setattr(glyphs.problems, "make_problem", inverted)
  with pytest.raises(app.UsageError, match="setting checksums"):
    again()
  assert (tmp_path / "b" / "results.json").exists()  # nothing was removed for a refused run


@pytest.mark.parametrize(
  "arguments", [["--num_processes=2"], ["--distributed", "--process_id=0", "--num_processes=1"]]
)
def test_processes_are_named_wholly(tmp_path, command, arguments):
  done = command("glyphs", "--preset=smoke", f"--out={tmp_path / 'out'}", *arguments)
  assert done.returncode == 1 and "--process_id go together" in done.stdout + done.stderr


def test_what_cannot_be_run_is_refused_before_anything_is_read(tmp_path):
  with pytest.raises(app.UsageError, match="protonet"):
    run(tmp_path / "x", algorithms=("protonet",))


def test_one_arm_that_diverges_costs_no_other(tmp_path):
  wild = ["arms.fomaml.inner_rate=1e38", "arms.fomaml.outer_rate=1e38"]
  names = ("fomaml", "reptile")
  found = run(tmp_path, algorithms=names, settings=wild, diverged=["fomaml-0"])
  assert "| reptile" in found and "| fomaml" not in found
  assert "<dd>fomaml, seed 0</dd>" in (tmp_path / "index.html").read_text()
  _, curves = results.read_json(tmp_path / "results.json")
  assert [curve.algorithm for curve in curves] == ["reptile"]


def test_outputs_of_an_earlier_run_are_removed_and_no_other_files(tmp_path, monkeypatch):
  own = ("results.json", "results.csv", "index.html", "adaptation.png", "sigma.png")
  own += ("sigma_history.png", "tensorboard/maml-3/events.out.tfevents.1.x")
  others = ("notes.txt", "tensorboard/maml/events.out.tfevents.1.x", "tensorboard/maml-4/mine.txt")
  for name in (*own, *others, "tensorboard/maml-4/events.out.tfevents.1.x"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()

  def diverge(*_):
    raise FloatingPointError("too fast")

  monkeypatch.setattr(glyphs.pipeline, "train", diverge)
  assert run(tmp_path, algorithms=("reptile",), diverged=["reptile-0"]) == ""
  left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
  assert left == set(others) and not (tmp_path / "tensorboard" / "maml-3").exists()


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--set=problem.ways=200", "Tasks of 200 ways want a writing system of as many"),
    ("--set=problem.size=40", "Episodes want 40 x 40 pixels"),
    ("--set=test_episodes=0", "test_episodes is at least 1; got 0"),
    ("--set=arms.fomaml.inner=adamw", "arms.fomaml.inner is one of sgd, adam.*got 'adamw'"),
    ("--set=problem.dataset=omniglot", "--dataset chooses the data: leave"),
    ("--seeds=x", "--seeds wants whole numbers.*got 'x'"),
    ("--seeds=0,0", "--seeds wants whole numbers, each of them once.*got '0,0'"),
    ("--algorithms=maml,maml", "algorithms, each of them once; got 'maml,maml'"),
  ],
)
def test_flags_that_cannot_be_run_are_told_before_training(
  tmp_path, monkeypatch, argument, message
):
  monkeypatch.setattr(glyphs.machine, "start_jax", lambda **_: None)  # it has started
  monkeypatch.setattr(glyphs.pipeline, "train", lambda *_: pytest.fail("it trains"))
  with flagsaver.flagsaver():
    rest = flags.FLAGS(["glyphs", f"--out={tmp_path / 'out'}", argument])
    with pytest.raises(app.UsageError, match=message):
      glyphs.main(rest)
  assert not (tmp_path / "out").exists()


def test_checkpoints_are_at_least_a_step_apart():
  with flagsaver.flagsaver(), pytest.raises(flags.IllegalFlagValueError, match="checkpoint_every"):
    flags.FLAGS(["glyphs", "--checkpoint_every=0"])


def test_omniglot_without_a_folder(tmp_path, monkeypatch):
  monkeypatch.delenv("SHRINKMETA_DATA", raising=False)
  with pytest.raises(app.UsageError, match="Where is omniglot.*data_dir.*SHRINKMETA_DATA"):
    run(tmp_path, dataset="omniglot")
  with pytest.raises(app.UsageError, match="images_background.zip"):
    run(tmp_path, dataset="omniglot", data_dir=str(tmp_path))
