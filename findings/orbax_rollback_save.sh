#!/usr/bin/env bash
# A reasonable guess: after CheckpointManager.restore(30) of a run with checkpoints up to 50, training
# goes on from 30, and save(40, ...) writes step 40, in place of the old one or with an error.
#
# What happens: save returns False and writes nothing, for step 40, for 50 and for all others up to the
# latest step in the folder; the state of the first run stays there. latest_step() is 50 and
# restore() loads the run that was abandoned. A job that is stopped before step 60 has saved
# nothing. There is no warning: the return value is the only sign. force=True does write a step that
# is not there, such as 35, and raises an error for one that is.
#
# Versions: orbax-checkpoint 0.12.8 with jax and jaxlib 0.10.2, CPU backend. A public issue of 2023
# asks about missing checkpoints, and was closed with this explanation.
#
# Why it matters in meta-learning with JAX: meta-training diverges, and one goes back to the last good
# step with a smaller learning rate. The restarted job, and the evaluation after it, load the
# diverged parameters.
#
# What to do: delete the later steps first, `for step in manager.all_steps(): if step > 30:
# manager.delete(step)`, or go on in another folder. Check the return value of save.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import os

import jax
import numpy as np
import orbax.checkpoint as ocp

print("orbax-checkpoint", ocp.__version__, "jax", jax.__version__)
folder = os.path.join(os.getcwd(), "run")
options = ocp.CheckpointManagerOptions(save_interval_steps=10)


def save(manager, step, run, **more):
  args = ocp.args.StandardSave({"run": np.full(2, run, np.float32)})
  return manager.save(step, args=args, **more)


def run_of(manager, step):
  return float(manager.restore(step, args=ocp.args.StandardRestore())["run"][0])


with ocp.CheckpointManager(folder, options=options) as manager:
  first = [save(manager, step, run=1) for step in range(10, 60, 10)]
with ocp.CheckpointManager(folder, options=options) as manager:
  start = run_of(manager, 30)
  saved = {step: save(manager, step, run=2) for step in range(31, 56)}
  manager.wait_until_finished()
  print("first run, saved:", first, "second run, from step 30:", set(saved.values()))
  latest, loaded = manager.latest_step(), run_of(manager, manager.latest_step())
  print(f"steps {manager.all_steps()}, latest {latest}, which is of run {loaded:.0f}")
  forced = save(manager, 35, run=2, force=True)
  manager.wait_until_finished()
  try:
    save(manager, 40, run=2, force=True)
    error = "none"
  except Exception as raised:
    error = type(raised).__name__
  print(f"force=True: step 35 {forced}; step 40: {error}; latest {manager.latest_step()}")
  for step in list(manager.all_steps()):
    if step > 30:
      manager.delete(step)
  later = save(manager, 40, run=2)
  manager.wait_until_finished()
  print("after deleting the later steps, step 40:", later, "of run", run_of(manager, 40))
  remedy = run_of(manager, manager.latest_step())

assert all(first) and start == 1.0
assert not any(saved.values()), "changed: save"
assert latest == 50 and loaded == 1.0, "changed: the latest step"
assert forced and error != "none", "changed: force"
assert later and remedy == 2.0, "changed: the remedy"
END
