"""Check, before any work, that the processes of one run were started alike and share a folder.

Every process must call these functions in the same order. If a run has one process, they exchange
nothing.
"""

import hashlib
import json
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from shrinkmeta.checks import validate
from shrinkmeta.checks.paths import Path, local_path

T = TypeVar("T")

_SECONDS = 10.0  # how long a file system on a network may take to show a new file
_MOST = 5  # differences that an error names


def check_alike(settings: Mapping[str, Any]) -> None:
  """Raise ValueError in every process unless all processes were started with the same settings.

  Processes that differ would silently combine results of different settings, or hang. The
  processes compare a hash of the settings. Only if it differs do they exchange the settings.

  Args:
    settings: everything that the results depend on: nested dicts of values that JSON can hold.

  Raises:
    TypeError: `settings` is not a dict.
    ValueError: a setting differs; the message names it, with the values and the processes. Or the
      processes have different numbers of devices.

  >>> check_alike({"rate": 0.1, "seed": 3})
  """
  validate.instance("settings", settings, Mapping, "a dict of plain data")
  if jax.process_count() == 1:
    return
  per_process = np.bincount([device.process_index for device in jax.devices()])
  if len(set(per_process)) > 1:
    raise ValueError(
      f"The processes of this run have {per_process.tolist()} devices, from process 0 on; wanted "
      "the same number in each."
    )
  text = json.dumps(_flat(settings), sort_keys=True).encode()
  digest = _digest(text)
  if (_gathered(digest) == digest).all():
    return
  texts = _texts(text)
  if differences := _differences([json.loads(one) for one in texts]):
    raise ValueError(
      f"The processes of this run were started with other settings: {'; '.join(differences)}. "
      "Start all of them by the same command, with the same code and data."
    )


def check_program(lowered: jax.stages.Lowered) -> None:
  """Raise ValueError in every process unless all processes are about to compile one program.

  The text of a program holds what no setting shows, such as the learning rate of an optimiser.

  Args:
    lowered: the program, the result of `jax.jit(f).lower(...)`.

  Raises:
    ValueError: the program of a process differs from that of process 0.

  >>> check_program(jax.jit(lambda x: 2 * x).lower(1.0))
  """
  if jax.process_count() == 1:
    return
  digests = _gathered(_digest(lowered.as_text().encode()))
  if others := [str(i) for i, own in enumerate(digests) if (own != digests[0]).any()]:
    raise ValueError(
      f"The program of process {', '.join(others)} is not that of process 0: learning rates, the "
      "network, the loss or the shapes of tasks differ. Start all of them by the same command, "
      "with the same code and data."
    )


def check_shared(what: str, folder: Path) -> None:
  """Raise ValueError in every process unless all of them see the folder of process 0.

  Process 0 makes a file with a random name, the others look for it, and process 0 removes it.

  Args:
    what: the flag or setting that names the folder, for the message.
    folder: the folder. Process 0 makes it if it is missing.

  Raises:
    TypeError: an argument is of another type.
    ValueError: process 0 cannot write to the folder, or a process does not see the file.

  >>> check_shared("--out", "runs/a")
  """
  validate.instance("what", what, str, "the name of the setting")
  folder = local_path("folder", folder)
  if jax.process_count() == 1:
    return
  token = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
  file = folder / f".shared-{int(token):08x}"
  error, written = "", False
  if jax.process_index() == 0:
    try:
      folder.mkdir(parents=True, exist_ok=True)
      file.write_text("All processes of a run must see this file.\n", encoding="utf-8")
      written = True
    except OSError as problem:
      error = str(problem)
  try:
    if text := _texts(error.encode())[0]:  # this also waits until process 0 has made the file
      raise ValueError(f"{what}: process 0 cannot write to {folder}: {text.decode()}.")
    seen = _gathered(np.array([_appears(file)], np.uint8))[:, 0]
  finally:
    if written:
      file.unlink()
  if missing := [str(process) for process in np.flatnonzero(seen == 0)]:
    raise ValueError(
      f"{what} is a folder that all processes share; what process 0 writes to {folder} is not "
      f"there for process {', '.join(missing)}. Name a folder of a file system that all of them "
      "mount at the same place."
    )


def together(action: Callable[[], T]) -> T:
  """Return action(), and raise an error in every process if `action` raises in one of them.

  Otherwise the other processes would wait for the one that failed.

  Args:
    action: a function that does not itself wait for other processes.

  Raises:
    Exception: what `action` raised in this process.
    RuntimeError: `action` raised in another process only; the message has its error.

  >>> together(lambda: 3)
  3
  """
  if jax.process_count() == 1:
    return action()
  result, error = None, None
  try:
    result = action()
  except Exception as caught:
    error = caught
  texts = _texts(b"" if error is None else f"{type(error).__name__}: {error}".encode())
  if error is not None:
    raise error
  for process, text in enumerate(texts):
    if text:
      raise RuntimeError(f"Process {process} failed, so all stop: {text.decode()}")
  return cast(T, result)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return {dotted path: value} of nested dicts, as JSON reads them back."""
  settings = json.loads(json.dumps(settings, default=str))
  items = jax.tree_util.tree_leaves_with_path(settings, lambda x: not isinstance(x, dict))
  return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in items}


def _appears(file: pathlib.Path) -> bool:
  limit = time.monotonic() + _SECONDS
  while not file.exists():
    if time.monotonic() > limit:
      return False
    time.sleep(0.1)
  return True


def _digest(text: bytes) -> np.ndarray:
  """Return the SHA-256 of a text, [32]."""
  return np.frombuffer(hashlib.sha256(text).digest(), np.uint8)


def _gathered(array: np.ndarray) -> np.ndarray:
  """Return the arrays of all processes, [P, ...]."""
  return np.asarray(multihost_utils.process_allgather(array))


def _texts(own: bytes) -> list[bytes]:
  """Return the texts of all processes."""
  lengths = _gathered(np.array([len(own)], np.int32))[:, 0]
  padded = np.zeros(max(1, int(lengths.max())), np.uint8)
  padded[: len(own)] = np.frombuffer(own, np.uint8)
  return [row[:n].tobytes() for row, n in zip(_gathered(padded), lengths, strict=True)]


def _differences(settings: list[dict[str, Any]]) -> list[str]:
  """Return "name: 1 in process 0, 2 in process 3" for the settings that differ from process 0's."""
  found = []
  for name in sorted(set().union(*settings)):
    values = [one.get(name, "absent") for one in settings]
    for process, value in enumerate(values):
      if value != values[0]:
        found.append(f"{name}: {values[0]!r} in process 0, {value!r} in process {process}")
        break
  return [*found[:_MOST], f"and {len(found) - _MOST} more"] if len(found) > _MOST else found
