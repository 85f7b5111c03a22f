"""What cannot be read: damaged, and then put aside, or only out of reach for now, and then left."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

# What says nothing of the file: no permission, too many open files, a server away.
_PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
            errno.ETIMEDOUT)  # fmt: skip
_STATUS = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # in errors of tensorstore


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
  """(result, "") where no process failed, else (None, what went wrong here).

  Raises:
    OSError: what went wrong is none of the file's doing.
  """
  result, error, passing = None, "", False
  try:
    result = action()
  except Exception as caught:  # a damaged file may make any reader raise anything
    error = f"{type(caught).__name__}: {str(caught).splitlines()[0] if str(caught) else ''}"
    passing = isinstance(caught, jax.errors.JaxRuntimeError) or (
      isinstance(caught, OSError) and caught.errno in _PASSING
    )
    passing = passing or any(status in str(caught) for status in _STATUS)
  if jax.process_count() > 1:
    failed, passing = multihost_utils.process_allgather(np.array([bool(error), passing])).any(0)
    if failed and not error:
      error = "another process could not read it"
  if passing:
    raise OSError(
      f"A checkpoint cannot be read now: {error}. That says nothing of the file: nothing was put "
      "aside. Mend it and start again."
    )
  return (None, error) if error else (result, "")


def put_aside(folder: pathlib.Path, damaged: Mapping[int, str]) -> None:
  """Renames checkpoints that cannot be read, so that their steps can be written again."""
  for step, error in damaged.items():
    logging.error("The checkpoint of step %d is damaged, kept as %d.damaged: %s", step, step, error)
    if jax.process_index() == 0:
      target = folder / f"{step}.damaged"
      with contextlib.suppress(FileNotFoundError):
        os.replace(folder / str(step), _unused(target))
  if damaged and jax.process_count() > 1:
    multihost_utils.sync_global_devices("shrinkmeta: damaged checkpoints are put aside")


def _unused(path: pathlib.Path) -> pathlib.Path:
  """The path, or the first of path.1, path.2, ... that does not exist."""
  candidates = (path if i == 0 else path.with_name(f"{path.name}.{i}") for i in range(1_000_000))
  return next(candidate for candidate in candidates if not candidate.exists())
