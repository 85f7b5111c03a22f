"""What ends a run before its last step: SIGTERM after the step under way, or a step that stalls."""

import contextlib
import faulthandler
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Watchdog:
  """Ends the process where `start` is not followed by `stop` within `seconds`; None: never."""

  def __init__(self, seconds: float | None):
    self.seconds, self.watches = seconds, False

  def start(self) -> None:
    if self.seconds is not None:
      self.watches = True
      stderr = 2  # also where sys.stderr was replaced
      faulthandler.dump_traceback_later(self.seconds, exit=True, file=stderr)

  def stop(self) -> bool:
    """Whether it was watching."""
    watched, self.watches = self.watches, False
    if watched:
      faulthandler.cancel_dump_traceback_later()
    return watched


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[int], bool]]:
  """Yields a function of the step that tells, in all processes alike, whether to stop after it."""
  if jax.process_count() > 1:  # the processes agree on the step by JAX's own service
    yield multihost_utils.reached_preemption_sync_point
    return
  received: list[int] = []
  told = False
  try:
    old = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
  except ValueError:  # not in the main thread, where signals are not ours to handle
    yield lambda step: False
    return

  def stopped(step: int) -> bool:
    nonlocal told
    told = bool(received)
    return told

  try:
    yield stopped
  finally:
    signal.signal(signal.SIGTERM, old)
    if received and not told:  # after the last step: nobody has acted on it
      signal.raise_signal(signal.SIGTERM)
