"""Commands refuse wrong flags before any work."""

import json

import pytest

from experiments.runs import problems, store
from experiments.settings import tables

# Flags of binaries live in one registry, so that no two of them can be imported together.
REFUSED = """
import importlib, json, os, sys
from absl import app, flags
from absl.testing import flagsaver
from experiments.settings import machine
binary = importlib.import_module(f"experiments.{sys.argv[1]}")
machine.start_jax = lambda **_: None
os.environ.pop("SHRINKMETA_DATA", None)
told = []
for arguments in json.loads(sys.argv[2]):
  with flagsaver.flagsaver():
    try:
      binary.main(flags.FLAGS(["binary", *arguments]))
    except app.UsageError as error:
      told.append(str(error))
    else:
      told.append("nothing was refused")
print(json.dumps(told))
"""


def check_refused(python, module, cases):
  done = python(module, json.dumps([flags for flags, _ in cases]), program=REFUSED)
  assert done.returncode == 0, done.stderr
  for (flags, wanted), told in zip(cases, json.loads(done.stdout), strict=True):
    assert wanted in told, (flags, told)


@pytest.mark.parametrize("module", ("train", "tune"))
def test_flags_that_cannot_be_run_are_told_before_training(tmp_path, python, module):
  config = tables.load("sinusoid", "smoke", ["problem.shots=3"])
  problem = problems.make_problem(config.problem)
  for name in ("maml-0", "maml-0-0"):  # a run, a trial
    store.begin(tmp_path / "other" / name, "maml", 0, config, problem)
    (tmp_path / "damaged" / name).mkdir(parents=True)
    (tmp_path / "damaged" / name / "run.json").write_text('{"format"')
  smoke = ["--table=sinusoid", "--size=smoke", "--algorithms=maml"]
  smoke += ["--seeds=0"] if module == "train" else []
  cases = [
    ([*smoke, "--set=problem.shots=99"], "want 1 to 20 shots"),
    ([*smoke, "--set=report_step=7"], "report_step is one of adapt_steps, 0, 1, 5; got 7"),
    ([*smoke, "--set=validation_episodes=0"], "validation_episodes is at least 1; got 0"),
    ([*smoke, "--data_dir=x"], "Sinusoids are made, not read"),
    ([*smoke, "--algorithms=maml,maml"], "each of them once; got 'maml,maml'"),
    ([*smoke, f"--out={tmp_path / 'other'}"], "holds a run with another"),
    ([*smoke, f"--out={tmp_path / 'damaged'}"], "run.json cannot be read: "),
    (
      [*smoke, "--algorithms=maml,boil", "--set=arms.boil.inner=adamw"],
      "arms.boil.inner is one of sgd",
    ),
    ([*smoke, "--set=arms.maml.modules=net"], "modules is one of layer, block; got 'net'"),
    (
      [*smoke, "--algorithms=maml,hand_picked", "--set=arms.hand_picked.task_specific=conv_9"],
      "conv_9",
    ),
    ([*smoke, "--set=compute=bfloat15"], "compute is float32 or bfloat16; got 'bfloat15'"),
    ([*smoke, "--set=arms.maml.batch_size=1000"], "a train task has 10 examples"),
    (["--table=cifar_fs"], "Give data_dir, its folder, or set SHRINKMETA_DATA"),
    (["--table=cifar_fs", "--data_dir=/none"], "CIFAR-FS wants in /none: CIFAR_FS_train.pickle"),
  ]
  if module == "tune":
    cases.append(([*smoke, "--seeds=3"], "write --seeds=0,1,2 for three runs a trial; got '3'"))
  if module == "train":
    cases.append(([*smoke, "--seeds=x"], "--seeds wants whole numbers"))
    cases.append(([*smoke, "--seeds=1,1"], "each of them once, as in --seeds=0,1; got '1,1'"))
  check_refused(
    python, module, [([f"--out={tmp_path / 'new'}", *flags], wanted) for flags, wanted in cases]
  )
  assert not (tmp_path / "new").exists()


def test_thresholds_to_freeze_by_are_numbers(tmp_path, python):
  cases = [([f"--freeze={text}", str(tmp_path)], f"got '{text}'") for text in ("abc", "nan", "0")]
  check_refused(python, "evaluate", cases)


def test_a_wrong_flag_is_told_without_a_traceback(command):
  done = command("train", "--table=sinusoid", "--size=smoke", "--set=problem.shots=99")
  assert done.returncode == 1 and "want 1 to 20 shots" in done.stderr + done.stdout
  assert "Traceback" not in done.stderr
