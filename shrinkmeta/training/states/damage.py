"""Checkpoints that cannot be read or written, and what happens to them.

A damaged checkpoint is renamed. One that is temporarily unreadable raises an error and is left as
it is.
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

# Error numbers of temporary causes, such as no permission or too many open files. The file may be
# intact.
_TEMPORARY = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
              errno.ETIMEDOUT)  # fmt: skip
_STATUS = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # tensorstore's words for them


def finished_steps(folder: pathlib.Path) -> list[int]:
  """List the steps of the finished checkpoints in a folder, in ascending order."""
  return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
  """Try to read a part of a checkpoint, in every process, and agree on whether it is damaged.

  Returns:
    (the result, "") if no process failed. Otherwise (None, a message about this process).

  Raises:
    OSError: reading failed in some process for a temporary cause. The part may be intact.
  """
  result, error, temporary = None, "", False
  try:
    result = action()
  except Exception as caught:  # a damaged file can raise anything: docs/hazards.md#orbax-errors
    error = f"{type(caught).__name__}: {in_short(caught)}"
    temporary = isinstance(caught, jax.errors.JaxRuntimeError) or (
      isinstance(caught, OSError) and caught.errno in _TEMPORARY
    )
    temporary = temporary or any(status in str(caught) for status in _STATUS)
  if jax.process_count() > 1:
    failed, temporary = multihost_utils.process_allgather(np.array([bool(error), temporary])).any(0)
    if failed and not error:
      error = "another process could not read it"
  if temporary:
    raise OSError(
      f"A checkpoint cannot be read now: {error}. This does not mean that it is damaged: it was "
      "left as it is. Remove the cause and start again."
    )
  return (None, error) if error else (result, "")


def in_short(error: BaseException) -> str:
  """Return the first line of an error, without the pages of JSON that tensorstore appends."""
  line = next(iter(str(error).splitlines()), "")
  line = line.partition(" [tensorstore_spec")[0].partition(" [source locations=")[0]
  return line if len(line) <= 300 else f"{line[:300]} ..."


def check_writable(folder: pathlib.Path) -> None:
  """Raise OSError, before any work, if nothing can be written to the folder."""
  if jax.process_index() != 0:
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise OSError(
      f"The folder of checkpoints {folder} cannot be written to: {error}. Name another folder."
    ) from error


@contextlib.contextmanager
def explained(folder: pathlib.Path, step: int | None) -> Iterator[None]:
  """Add advice to an error of writing, and name the step from which a new run will continue."""
  try:
    yield
  except (OSError, ValueError, RuntimeError) as error:
    whole = finished_steps(folder)
    raise OSError(
      f"The checkpoint {'' if step is None else f'of step {step} '}could not be written to "
      f"{folder}: {in_short(error)} Free space or choose another folder, and start again: "
      + (f"training continues from step {whole[-1]}." if whole else "there is no checkpoint yet.")
    ) from error


def put_aside(folder: pathlib.Path, damaged: Mapping[int, str]) -> None:
  """Rename damaged checkpoints, so that their steps can be written again.

  Args:
    folder: the folder of the checkpoints.
    damaged: {step: what is wrong with its checkpoint}.
  """
  for step, error in damaged.items():
    logging.error("The checkpoint of step %d is damaged, kept as %d.damaged: %s", step, step, error)
    if jax.process_index() == 0:
      target = folder / f"{step}.damaged"
      with contextlib.suppress(FileNotFoundError):
        os.replace(folder / str(step), _unused(target))
  if damaged and jax.process_count() > 1:
    multihost_utils.sync_global_devices("shrinkmeta: damaged checkpoints are put aside")


def _unused(path: pathlib.Path) -> pathlib.Path:
  """Return `path`, or path.1, path.2, ...: the first of them that does not exist."""
  candidates = (path if i == 0 else path.with_name(f"{path.name}.{i}") for i in range(1_000_000))
  return next(candidate for candidate in candidates if not candidate.exists())
