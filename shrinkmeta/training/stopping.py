"""SIGTERM or Ctrl-C ends a run after the current update; a watchdog ends a stalled run."""

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class Watchdog:
  """End the process if a step takes too long, with exit code 1 and the tracebacks of all threads.

  Call `start` before a step and `stop` after it.

  Args:
    seconds: the longest time between `start` and `stop`, in seconds. None sets no limit.
  """

  def __init__(self, seconds: float | None):
    self.seconds, self._watching = None if seconds is None else float(seconds), False

  def start(self) -> None:
    """Start to count the time of a step."""
    if self.seconds is not None:
      self._watching = True
      stderr = 2  # the file descriptor, because a program may have replaced sys.stderr
      faulthandler.dump_traceback_later(self.seconds, exit=True, file=stderr)

  def stop(self) -> bool:
    """Stop counting, and return whether the watchdog was counting."""
    watched, self._watching = self._watching, False
    if watched:
      faulthandler.cancel_dump_traceback_later()
    return watched


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], int | None]]:
  """Catch SIGTERM and Ctrl-C, and yield a function that tells the loop whether to stop.

  The function, stopped(step), returns the number of the signal that ends the run after `step`, or
  None. The answer is the same in every process. If SIGTERM arrives after the last call of
  `stopped`, the context raises it again at its end, even if Ctrl-C ended the run. A second Ctrl-C
  raises KeyboardInterrupt at once.

  If the program has its own handler of Ctrl-C, that handler stays. With several processes this
  function sets no handler: JAX catches SIGTERM, and only SIGTERM ends a run. With one process, it
  sets handlers only in the main thread, because Python allows no others. In another thread
  `stopped` always returns None.
  """
  if jax.process_count() > 1:  # JAX's service lets all processes stop at the same step
    reached = multihost_utils.reached_preemption_sync_point
    yield lambda step: signal.SIGTERM if reached(step) else None
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: None  # Python allows signal handlers in the main thread only
    return
  received: set[int] = set()
  acted_on: int | None = None

  def stopped(step: int) -> int | None:
    nonlocal acted_on
    acted_on = max(received, default=None)  # SIGTERM (15) takes precedence over SIGINT (2)
    return acted_on

  def interrupted(number: int, frame: FrameType | None) -> None:
    if number in received:
      signal.default_int_handler(number, frame)
    received.add(number)
    with contextlib.suppress(RuntimeError):  # the signal interrupted another log message
      logging.warning("Ctrl-C: fit stops after this step. Press Ctrl-C again to interrupt at once.")

  handlers: dict[int, Any] = {signal.SIGTERM: lambda number, frame: received.add(number)}
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    handlers[signal.SIGINT] = interrupted
  old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
  try:
    yield stopped
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
    # True if SIGTERM came after the last call of `stopped`, also if Ctrl-C came before it.
    if signal.SIGTERM in received and acted_on != signal.SIGTERM:
      signal.raise_signal(signal.SIGTERM)
