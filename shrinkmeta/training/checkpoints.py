"""Checkpoints: states on disk, written by orbax while training continues.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it at
the end, so a killed process leaves no half-written checkpoint. `checkpoint_format.py` adds a
description, which reveals damaged checkpoints and checkpoints of another model.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from shrinkmeta.base import MetaLearner, MetaState, check_learner, check_state
from shrinkmeta.checks import scalars, validate
from shrinkmeta.checks.paths import Path, expanded, local_path
from shrinkmeta.training.checkpoint_format import (
  check_description,
  describing,
  digest,
  fingerprints,
  plain_data,
  read_description,
  stored,
  unnamed,
  versions,
  with_entries,
)
from shrinkmeta.training.states.damage import (
  attempt,
  check_writable,
  explained,
  finished_steps,
  put_aside,
)
from shrinkmeta.training.states.manager import open_manager, orbax, quiet, value_of
from shrinkmeta.training.states.resume import announce, num_devices, run_settings

_STATE, ABOUT = "state", "about"
_FINGERPRINTS = jax.jit(fingerprints)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
  """The folder in which `fit` saves states, how often it saves, and how many it keeps.

  Attributes:
    folder: a folder for this run alone, made if it is missing. A leading ~ is expanded. A bucket
      must be mounted: `fit` and `restore` refuse URLs such as gs://... before any work.
    every: steps between two checkpoints. The last step is saved too, and so is the step at which
      SIGTERM stops a run.
    keep: the number of latest checkpoints that stay. The one with the best evaluation stays too.
    asynchronous: whether training continues while files are written.
    constants: whether the constants of the state are stored too. If not, a checkpoint holds their
      fingerprints, and the state to continue from must have the same constants.
    settings: plain data that must be the same when a run continues, such as learning rates and
      seeds. The state does not hold them.

  Raises:
    TypeError: a value has the wrong type.
    ValueError: a number is below 1.

  Example:
    >>> Checkpoints("runs/a", every=10).keep
    3
  """

  folder: Path
  every: int = 100
  keep: int = 3
  asynchronous: bool = True
  constants: bool = False
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    assign = functools.partial(object.__setattr__, self)  # the class is frozen
    assign("folder", expanded("Checkpoints.folder", self.folder))
    for name in ("every", "keep"):
      assign(name, validate.integer(f"Checkpoints.{name}", getattr(self, name), 1))
    for name in ("asynchronous", "constants"):
      assign(name, scalars.flag(f"Checkpoints.{name}", getattr(self, name)))
    validate.instance("Checkpoints.settings", self.settings, Mapping, "a dict of plain data")
    try:
      plain_data(self.settings)
    except (TypeError, ValueError) as error:
      raise TypeError(
        "Checkpoints.settings must be plain data, which JSON can write (numbers, strings, lists, "
        f"dicts); got {self.settings!r}: {error}."
      ) from error


class Store(NamedTuple):
  """An open folder of checkpoints.

  Attributes:
    save: save(state, value=None) starts to write the state. `value` is its evaluation; smaller is
      better. A value that is NaN or infinite is not passed to orbax
      (docs/hazards.md#orbax-nan-metrics).
    restore: restore(state, steps=None) returns the newest readable state, or None if there is no
      checkpoint. It renames damaged checkpoints, and logs the step from which the run continues.
      The message also has `steps`, the number of updates of all runs together.
    best: best() returns (step, value) of the best evaluated state, or None.
    finish: finish() waits until everything is on disk.
  """

  save: Callable[..., None]
  restore: Callable[..., MetaState | None]
  best: Callable[[], tuple[int, float] | None]
  finish: Callable[[], None]


def restore(
  checkpoints: Checkpoints,
  learner: MetaLearner,
  state: MetaState,
  step: int | Literal["best"] | None = None,
) -> MetaState | None:
  """Read a state that `fit` or `save_state` saved.

  Args:
    checkpoints: the Checkpoints that `fit` or `save_state` got, with the same `settings`.
    learner: the learner of the run.
    state: a state of `learner.init(params)`. The result has the structure of `state` and lies on
      the same devices.
    step: the step after which the state was saved. "best" reads the state that `fit(best=...)`
      kept. None reads the newest readable state.

  Returns:
    The saved state, or None if the folder has no checkpoint.

  Raises:
    TypeError: an argument has the wrong type.
    ValueError: the checkpoint is of another model or other settings, or no such step was saved.
    OSError: the checkpoint is damaged or cannot be read now.

  Example:
    >>> import tempfile, optax, jax.numpy as jnp, shrinkmeta as sm
    >>> learner = sm.reptile(sm.gaussian(lambda theta, x: x * theta["w"]), {"w": "w"})
    >>> batch = lambda count: sm.Batch(jnp.ones((count, 4)), jnp.ones((count, 4)))
    >>> tasks = lambda first, count: sm.Task(batch(count), None)
    >>> start = learner.init({"w": 0.0})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   kept = sm.Checkpoints(folder)
    ...   end = sm.fit(learner, start, tasks, 2, meta_batch=1, checkpoints=kept)
    ...   restored = sm.restore(kept, learner, start)
    >>> int(restored.step), bool(restored.phi["w"] == end.phi["w"])
    (2, True)
  """
  validate.instance("checkpoints", checkpoints, Checkpoints, "a shrinkmeta.Checkpoints(folder)")
  check_learner("learner", learner)
  check_state("state", state)
  state = jax.tree.map(jnp.asarray, state)
  if isinstance(step, str) and step != "best":
    raise ValueError(f'step must be an integer, "best" or None; got {step!r}.')
  step = step if step is None or isinstance(step, str) else validate.integer("step", step, 0)
  folder = _absolute(checkpoints)
  wanted = describing(learner, checkpoints.settings, checkpoints.constants)(state)
  steps = finished_steps(folder)
  with quiet():
    if step == "best":
      options = orbax().CheckpointManagerOptions(best_fn=value_of, read_only=True)
      with orbax().CheckpointManager(folder, options=options) as manager:
        step = manager.best_step() if steps else None
      if step is None:
        raise ValueError(f"{folder} has no state that was evaluated; its steps are {steps}.")
    if step is not None and step not in steps:
      raise ValueError(f"{folder} has no state of step {step}; its steps are {steps}.")
    steps = steps if step is None else [step]
    found = _newest_readable(folder, steps, state, wanted, checkpoints.constants)
    for step, error in found.damaged.items():
      logging.error(
        "The checkpoint of step %d is damaged, and an older one is used: %s", step, error
      )
    return found.state


@contextlib.contextmanager
def opened(
  checkpoints: Checkpoints, learner: MetaLearner, meta_batch: int | None = None
) -> Iterator[Store]:
  """Open the folder in every process of a run, and wait at the end until all is on disk.

  Args:
    checkpoints: the folder, and how often and how many states to save.
    learner: the learner of the run.
    meta_batch: as in `describe`.
  """
  orbax()  # if orbax is not installed, raise the error before any work
  folder = _absolute(checkpoints)
  check_writable(folder)
  # `restore` renames damaged checkpoints before the first use makes the manager. A refused run has
  # no manager, because the manager would delete files that another run is writing here.
  options = (checkpoints.keep, checkpoints.asynchronous, (_STATE, ABOUT))
  manager = functools.cache(lambda: open_manager(folder, *options))
  values: dict[int, float] = {}  # {step: value given to `save`}, equal in all processes
  started: list[int] = []  # the steps whose save has started
  described = describing(learner, checkpoints.settings, checkpoints.constants, meta_batch)

  def save(whole: MetaState, value: float | None = None) -> None:
    state, about = stored(whole, checkpoints.constants), described(whole)
    step = int(state.step)
    if step in manager().all_steps():
      return  # SIGTERM stopped the run right after this step was saved
    about |= {"fingerprints": _numbers(_FINGERPRINTS(state)), "versions": versions()}
    about |= {"devices": num_devices(learner), "run": run_settings(learner)}
    about["digest"] = digest(about)
    args = orbax().args
    what = args.Composite(
      **{_STATE: args.StandardSave(with_entries(state)), ABOUT: args.JsonSave(about)}
    )
    metrics = {"value": float(value)} if value is not None and np.isfinite(value) else None
    finish()  # orbax waits too, but would report an error of the previous step as this one's
    started.append(step)
    with explained(folder, step):
      if not manager().save(step, args=what, metrics=metrics):
        raise RuntimeError("orbax skipped this step")
    if metrics is not None:
      values[step] = metrics["value"]

  def restore(state: MetaState, steps: int | None = None) -> MetaState | None:
    there, by_value = finished_steps(folder), checkpoints.constants
    new, about, damaged = _newest_readable(folder, there, state, described(state), by_value)
    put_aside(folder, damaged)
    if new is not None:
      announce(folder, about, learner, int(new.step), steps)
    return new

  def best() -> tuple[int, float] | None:
    step = manager().best_step()
    if step in values:  # orbax has it only after the save: docs/hazards.md#orbax-late-metrics
      return step, values[step]
    if step is None or (metrics := manager().metrics(step)) is None:
      return None
    return step, float(metrics["value"])

  def finish() -> None:
    with explained(folder, started[-1] if started else None):
      manager().wait_until_finished()

  with quiet():
    try:
      yield Store(save, restore, best, finish)
    finally:
      if manager.cache_info().currsize:  # a run that was refused leaves the folder as it is
        try:
          finish()
        finally:
          manager().close()


def _absolute(checkpoints: Checkpoints) -> pathlib.Path:
  return local_path("Checkpoints.folder", checkpoints.folder).absolute()


def _numbers(fingerprints: Mapping[str, Any]) -> dict[str, int]:
  return {name: int(number) for name, number in fingerprints.items()}


class _Found(NamedTuple):
  """The newest readable state or None, its description, and {later step: the error of its file}."""

  state: MetaState | None
  about: Mapping[str, Any]
  damaged: dict[int, str]


def _newest_readable(
  folder: pathlib.Path,
  steps: Sequence[int],
  whole: MetaState,
  wanted: Mapping[str, Any],
  by_value: bool,
) -> _Found:
  """Find the newest readable state.

  Args:
    folder: of the checkpoints.
    steps: to be tried, the last one first.
    whole: a state of this structure, with the constants.
    wanted: the description that the checkpoint must have.
    by_value: whether the checkpoint holds the constants.

  Raises:
    OSError: there are checkpoints, but none can be read.
  """
  damaged, state = {}, stored(whole, by_value)
  for step in reversed(steps):
    about, error = attempt(lambda step=step: read_description(folder / str(step) / ABOUT))
    if about is not None:
      check_description(about, wanted, folder / str(step))
      new, error = attempt(lambda step=step, about=about: _read(folder / str(step), state, about))
      if new is not None:
        new = new if by_value else new._replace(constants=whole.constants)
        return _Found(new, about, damaged)
    damaged[step] = error
  if damaged:
    reasons = "; ".join(f"step {step}: {error}" for step, error in damaged.items())
    raise OSError(
      f"No checkpoint in {folder} can be read: {reasons}. Nothing was deleted. Copy a readable "
      "one back, or name another folder to start again."
    )
  return _Found(None, {}, damaged)


def _read(path: pathlib.Path, state: MetaState, about: Mapping[str, Any]) -> MetaState:
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in with_entries(state).items()
  }
  with orbax().StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(path / _STATE, like)
  new = unnamed(state, restored)
  prints = _numbers(_FINGERPRINTS(new))
  if wrong := sorted(n for n, number in prints.items() if number != about["fingerprints"][n]):
    raise ValueError(f"the fingerprint of {wrong[0]} has changed, so a file was changed")
  return new
