#!/usr/bin/env bash
# A reasonable guess: with best_fn and max_to_keep a checkpoint whose metric is NaN is never the
# best; the best real one is kept.
#
# What happens: NaN compares as neither smaller nor larger, so that the sort behind the choice is
# undone. With accuracies 0.5, 0.9, NaN, 0.6 and max_to_keep=1 the checkpoint of 0.9 is deleted
# when NaN arrives, and 0.6 is kept as the best. Without the NaN 0.9 is kept.
#
# Versions: orbax-checkpoint 0.12.8 with jax 0.10.2.
#
# Why it matters in meta-learning with JAX: one evaluation that diverges on one test task gives a
# mean of NaN. The best phi of the whole run is then gone from disk.
#
# What to do: save without metrics where the metric is not finite. shrinkmeta's Checkpoints does
# so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 orbax-checkpoint==0.12.8
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import logging
import os
import tempfile

import jax.numpy as jnp
import orbax.checkpoint as ocp

logging.disable(logging.ERROR)


def kept(accuracies):
  options = ocp.CheckpointManagerOptions(
    max_to_keep=1,
    best_fn=lambda m: m["accuracy"],
    best_mode="max",
    enable_async_checkpointing=False,
  )
  with ocp.CheckpointManager(tempfile.mkdtemp(dir=os.getcwd()), options=options) as manager:
    for step, accuracy in enumerate(accuracies):
      state = ocp.args.StandardSave({"phi": jnp.full(2, step)})
      manager.save(step, args=state, metrics={"accuracy": accuracy})
      manager.wait_until_finished()
    steps, best = manager.all_steps(), manager.best_step()
  print(f"accuracies {accuracies}: on disk {steps}, best_step {best} ({accuracies[best]})")
  return steps, best


nan = float("nan")
assert kept([0.5, 0.9, 0.7, 0.6]) == ([1], 1), "changed: without NaN"
assert kept([0.5, 0.9, nan]) == ([2], 2), "changed: NaN last"
assert kept([0.5, 0.9, nan, 0.6]) == ([3], 3), "changed: NaN before the last"
END
