"""What a run says when it continues from a checkpoint."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from shrinkmeta.base import MetaLearner
from shrinkmeta.training.checkpoint_format import equal, plain_data


def run_settings(learner: MetaLearner) -> dict[str, Any]:
  """Return the settings that a run may change when it continues, in types of JSON.

  Functions cannot be compared. So this leaves out optimisers, and holds only whether there is a
  log_p_phi and a log_p_sigma.
  """
  spec = learner.spec
  given = lambda function: "absent" if function is None else "given"
  return plain_data(
    {
      "Inner": {name: getattr(spec.inner, name) for name in ("steps", "tol", "batch_size")},
      "Implicit": dataclasses.asdict(spec.implicit),
      "LogDet": dataclasses.asdict(spec.log_det),
      "learner": {
        "sigma_gradient": spec.sigma_gradient,
        "clip_tasks": spec.clip,
        "log_p_phi": given(spec.log_p_phi),
        "log_p_sigma": given(spec.log_p_sigma),
      },
    }
  )


def num_devices(learner: MetaLearner) -> int:
  """Return the number of devices of the learner's mesh, or 1 without a mesh."""
  mesh = learner.spec.mesh
  return 1 if mesh is None else mesh.size


def announce(
  folder: pathlib.Path, about: Mapping[str, Any], learner: MetaLearner, step: int, steps: int | None
) -> None:
  """Log where a run continues, in process 0, as a warning, because absl hides other messages."""
  past = steps is not None and step > steps  # `fit` raises an error
  if jax.process_index() == 0 and not past:
    logging.warning("%s", resume_line(folder, about, learner, step, steps))
    if changed := changed_settings(about, learner):
      logging.warning("Settings differ from those of the saved run: %s.", "; ".join(changed))


def resume_line(
  folder: pathlib.Path, about: Mapping[str, Any], learner: MetaLearner, step: int, steps: int | None
) -> str:
  """Say from which step a run continues, and on how many devices.

  Args:
    folder: the folder of the checkpoints.
    about: the description of the checkpoint. Older ones do not have the number of devices.
    learner: the learner of this run.
    step: the number of updates that are done.
    steps: the number of updates of all runs together, or None.
  """
  if step == steps:
    return f"Nothing is left to do: all {steps} updates are done. The state comes from {folder}."
  total = "" if steps is None else f" of {steps}"
  line = f"Training continues from step {step}{total}, with the state in {folder}"
  if (then := about.get("devices")) is None:
    return f"{line}."
  now, word = num_devices(learner), "device" if then == 1 else "devices"
  if then == now:
    return f"{line}; on {now} {word}, as before."
  return f"{line}; saved on {then} {word}, now on {now}."


def changed_settings(about: Mapping[str, Any], learner: MetaLearner) -> list[str]:
  """List the settings of `run_settings` that differ from those of the checkpoint."""
  now = run_settings(learner)
  return [
    f"{kind}.{name} was {old!r} and is now {now[kind][name]!r}"
    for kind, settings in about.get("run", {}).items()
    for name, old in settings.items()
    if name in now.get(kind, {}) and not equal(now[kind][name], old)
  ]
