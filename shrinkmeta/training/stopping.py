"""Early stops: SIGTERM stops a run after the current step, and a watchdog ends one that stalls."""

import contextlib
import faulthandler
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Watchdog:
  """End the process, with exit code 1 and all tracebacks, if a step takes too long.

  Call `start` before a step and `stop` after it.

  Args:
    seconds: the longest time between `start` and `stop`. None never ends the process.
  """

  def __init__(self, seconds: float | None):
    self.seconds, self._watching = None if seconds is None else float(seconds), False

  def start(self) -> None:
    """Start to count the seconds of a step."""
    if self.seconds is not None:
      self._watching = True
      stderr = 2  # the file descriptor: a program may have replaced sys.stderr
      faulthandler.dump_traceback_later(self.seconds, exit=True, file=stderr)

  def stop(self) -> bool:
    """Stop to count, and return whether the watchdog was counting."""
    watched, self._watching = self._watching, False
    if watched:
      faulthandler.cancel_dump_traceback_later()
    return watched


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
  """Catch SIGTERM, and yield a function that says whether to stop after a given step.

  The function gives the same answer in every process. If SIGTERM comes and nobody asks the function
  afterwards, the signal is raised again on leaving.
  """
  if jax.process_count() > 1:  # JAX's own service makes all processes stop at the same step
    yield multihost_utils.reached_preemption_sync_point
    return
  received: list[int] = []
  acted_on = False
  try:
    old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  except ValueError:  # Python allows signal handlers in the main thread only
    yield lambda step: False
    return

  def stopped(step: int) -> bool:
    nonlocal acted_on
    acted_on = bool(received)
    return acted_on

  try:
    yield stopped
  finally:
    signal.signal(signal.SIGTERM, old)
    if received and not acted_on:  # it came after the last step
      signal.raise_signal(signal.SIGTERM)
