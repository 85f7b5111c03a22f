"""States on disk, written by orbax while training goes on: whole, checked, and told apart.

A checkpoint is a folder named after its step. Orbax writes it under another name and renames it
when all is there, so that a process killed at any moment leaves whole checkpoints only. What orbax
does not see is checked here: beside the arrays lies a description of them (`description.py`), so
that a damaged file is noticed whatever it decodes to, and a state of another model is refused with
the difference named.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from absl import logging

from shrinkmeta.base import MetaLearner, MetaState
from shrinkmeta.training.damage import attempt, put_aside
from shrinkmeta.training.description import (
  FORMAT,
  describe,
  differences,
  digest,
  fingerprints,
  named,
  unnamed,
)

_PACKAGES = ("shrinkmeta", "jax", "jaxlib", "optax", "orbax-checkpoint")
_STATE, _ABOUT = "state", "about"
_FINGERPRINTS = jax.jit(fingerprints)


@dataclasses.dataclass(frozen=True)
class Checkpoints:
  """Where `fit` keeps states, and how many.

  Attributes:
    folder: made when missing; one run has it for itself.
    every: steps between two checkpoints; the last step and a SIGTERM are saved too.
    keep: how many of the latest stay; the best of the evaluations stays beside them.
    asynchronous: whether training goes on while files are written.
    settings: plain data that must be the same where the run goes on, such as learning rates and
      seeds, which the state does not show.
  """

  folder: str | os.PathLike[str]
  every: int = 100
  keep: int = 3
  asynchronous: bool = True
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for name in ("every", "keep"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Checkpoints.{name} must be an int of at least 1; got {value!r}.")


class Store(NamedTuple):
  """An open folder of checkpoints.

  save(state, value=None): begins to write the state; `value`, small for good, is its evaluation.
  restore(state): as the function of that name does it, damaged checkpoints being put aside.
  best() -> (step, value), None where no evaluated state is kept.
  finish(): waits until all is on disk.
  """

  save: Callable[..., None]
  restore: Callable[[MetaState], MetaState | None]
  best: Callable[[], tuple[int, float] | None]
  finish: Callable[[], None]


def restore(
  checkpoints: Checkpoints,
  learner: MetaLearner,
  state: MetaState,
  step: int | Literal["best"] | None = None,
) -> MetaState | None:
  """A state that `fit` saved, placed as `state` is; None where the folder has none.

  Args:
    checkpoints: as `fit` got them, `settings` included.
    state: as `learner.init(params)` returns it; its arrays give way to the saved ones.
    step: after which the state was saved; "best" is the one that `fit(best=...)` kept, None the
      newest that is whole.

  Raises:
    ValueError: it is of another model or other settings, or there is no such step.
    OSError: it is damaged.
  """
  folder = pathlib.Path(checkpoints.folder).absolute()
  wanted = describe(learner, state, checkpoints.settings)
  steps = _steps(folder)
  if step == "best":
    options = _orbax().CheckpointManagerOptions(best_fn=_value_of, read_only=True)
    with _quiet(), _orbax().CheckpointManager(folder, options=options) as manager:
      step = manager.best_step() if steps else None
    if step is None:
      raise ValueError(f"{folder} has no state that was evaluated; its steps are {steps}.")
  if step is not None and step not in steps:
    raise ValueError(f"{folder} has no state of step {step}; its steps are {steps}.")
  return _newest_whole(folder, steps if step is None else [step], state, wanted)[0]


@contextlib.contextmanager
def opened(
  checkpoints: Checkpoints, learner: MetaLearner, meta_batch: int | None = None
) -> Iterator[Store]:
  """Opens the folder; on leaving, all is on disk. Every process of a run opens it.

  Args:
    meta_batch: see `describe`.
  """
  ocp = _orbax()
  folder = pathlib.Path(checkpoints.folder).absolute()
  _writable(folder)
  policies = ocp.checkpoint_managers
  options = ocp.CheckpointManagerOptions(
    best_fn=_value_of,
    preservation_policy=policies.AnyPreservationPolicy(
      [
        policies.LatestN(checkpoints.keep),
        policies.BestN(get_metric_fn=_value_of, n=1, keep_checkpoints_without_metrics=False),
      ]
    ),
    cleanup_tmp_directories=True,
    enable_async_checkpointing=checkpoints.asynchronous,
  )

  values: dict[int, float] = {}  # what was handed to `save`, alike in all processes

  @functools.cache  # opened late: damaged checkpoints are put aside first
  def manager() -> Any:
    return ocp.CheckpointManager(folder, options=options, item_names=(_STATE, _ABOUT))

  def explained(step: int | None, action: Callable[[], Any]) -> Any:
    try:
      return action()
    except (OSError, ValueError, RuntimeError) as error:
      whole = _steps(folder)
      raise OSError(
        f"The checkpoint {'' if step is None else f'of step {step} '}could not be written to "
        f"{folder}: {error} Free space or choose another folder, and start again: "
        + (f"training goes on from step {whole[-1]}." if whole else "there is no checkpoint yet.")
      ) from error

  def save(state: MetaState, value: float | None = None) -> None:
    step = int(state.step)
    if step in manager().all_steps():
      return  # a run that was told to stop right after this step was saved
    prints = {name: int(number) for name, number in _FINGERPRINTS(state).items()}
    about = describe(learner, state, checkpoints.settings, meta_batch) | {
      "fingerprints": prints,
      "versions": _versions(),
    }
    about["digest"] = digest(about)
    what = ocp.args.Composite(
      **{_STATE: ocp.args.StandardSave(named(state)), _ABOUT: ocp.args.JsonSave(about)}
    )
    metrics = {"value": float(value)} if value is not None and np.isfinite(value) else None
    explained(step, lambda: manager().save(step, args=what, metrics=metrics))
    if metrics is not None:
      values[step] = metrics["value"]

  def restore(state: MetaState) -> MetaState | None:
    wanted = describe(learner, state, checkpoints.settings, meta_batch)
    new, damaged = _newest_whole(folder, _steps(folder), state, wanted)
    put_aside(folder, damaged)
    if new is not None:
      logging.info("Training goes on from step %d of %s.", int(new.step), folder)
    return new

  def best() -> tuple[int, float] | None:
    step = manager().best_step()
    if step in values:  # on disk only once it is written to its end, which no step waits for
      return step, values[step]
    if step is None or (metrics := manager().metrics(step)) is None:
      return None
    return step, float(metrics["value"])

  def finish() -> None:
    explained(None, lambda: manager().wait_until_finished())

  with _quiet():
    try:
      yield Store(save, restore, best, finish)
    finally:
      if manager.cache_info().currsize:  # a run that was refused leaves the folder as it is
        try:
          finish()
        finally:
          manager().close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps what orbax logs of each step of each save, but for errors, out of the program's log."""
  logger = logging.get_absl_logger()
  loud = ("ERROR", "CRITICAL")
  wanted = lambda record: record.levelname in loud or "orbax" not in record.pathname
  logger.addFilter(wanted)
  try:
    yield
  finally:
    logger.removeFilter(wanted)


def _orbax() -> Any:
  try:
    import orbax.checkpoint
  except ImportError as error:
    raise ImportError("Checkpoints need orbax: pip install orbax-checkpoint.") from error
  return orbax.checkpoint


def _value_of(metrics: Mapping[str, float]) -> float:
  return -metrics["value"]


def _newest_whole(
  folder: pathlib.Path, steps: Sequence[int], state: MetaState, wanted: Mapping[str, Any]
) -> tuple[MetaState | None, dict[int, str]]:
  """The last of the steps that can be read, and what is wrong with those after it.

  Raises:
    OSError: there are some, and none can be read.
  """
  damaged = {}
  for step in reversed(steps):
    about, error = attempt(lambda step=step: _read_about(folder / str(step)))
    if about is not None:
      _check_about(about, wanted, folder / str(step))
      new, error = attempt(lambda step=step, about=about: _read(folder / str(step), state, about))
      if new is not None:
        return new, damaged
    damaged[step] = error
  if damaged:
    reasons = "; ".join(f"step {step}: {error}" for step, error in damaged.items())
    raise OSError(
      f"No checkpoint in {folder} can be read: {reasons}. Nothing was deleted. Bring a whole one "
      "back, or name another folder to begin anew."
    )
  return None, damaged


def _read(path: pathlib.Path, state: MetaState, about: Mapping[str, Any]) -> MetaState:
  like = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in named(state).items()
  }
  with _orbax().StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(path / _STATE, like)
  new = unnamed(state, restored)
  prints = {name: int(number) for name, number in _FINGERPRINTS(new).items()}
  if wrong := sorted(n for n, number in prints.items() if number != about["fingerprints"][n]):
    raise ValueError(f"the fingerprint of {wrong[0]} is another one: a file was changed")
  return new


def _steps(folder: pathlib.Path) -> list[int]:
  """Steps of the checkpoints that were written to their end, ascending."""
  return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def _read_about(path: pathlib.Path) -> dict[str, Any]:
  about = json.loads((path / _ABOUT / "metadata").read_text(encoding="utf-8"))
  if about.pop("digest") != digest(about):
    raise ValueError("its description was changed")
  return about


def _check_about(about: Mapping[str, Any], wanted: Mapping[str, Any], path: pathlib.Path) -> None:
  """Raises ValueError where the checkpoint is whole but not for this learner."""
  if about["format"] > FORMAT:
    raise ValueError(
      f"{path} has format {about['format']}, written by shrinkmeta "
      f"{about.get('versions', {}).get('shrinkmeta')}; this one reads up to {FORMAT}. Install that."
    )
  if found := differences(about, wanted):
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    raise ValueError(
      f"{path} is a checkpoint of another run: {'; '.join(found[:3])}{more}. Go on with "
      "what it was written by, or name another folder."
    )


def _writable(folder: pathlib.Path) -> None:
  """Raises OSError, before any work, where nothing can be written."""
  if jax.process_index() != 0:
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"Checkpoints are to be written to {folder}, which cannot be written to: {error}. Name "
      "another folder."
    ) from error


def _versions() -> dict[str, str]:
  found = {}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found
