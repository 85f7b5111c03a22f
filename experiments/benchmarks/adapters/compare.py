"""Time every call of both sides in turn, and compare what they return."""

import contextlib
import json
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import measure, report
from experiments.benchmarks.adapters import ours
from experiments.benchmarks.adapters.problem import Problem, Sizes

_CLOSE = 1e-3  # largest difference of logits, whose size is some units, and of losses
_REST = 0.3  # seconds in which the threads of the other side come to rest


class Peft:
  """The process that runs PEFT."""

  def __init__(self, python: str, folder: pathlib.Path):
    """Start it, and wait until it has loaded the model and all adapters."""
    script = pathlib.Path(__file__).with_name("with_peft.py")
    pipe = subprocess.PIPE
    command = [python, str(script), str(folder)]
    self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    self.folder, self.versions = folder, self._read()

  def _read(self) -> dict[str, Any]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise RuntimeError(f"PEFT's process ended with code {self.process.wait()}; see above.")
    return json.loads(line)

  def seconds(self, name: str) -> float:
    """Run a call, several times in a row if it is short, and return the seconds of one run."""
    assert self.process.stdin is not None
    print(json.dumps([name, in_a_row(name)]), file=self.process.stdin, flush=True)
    return self._read()["seconds"]

  def result(self, name: str) -> np.ndarray:
    """Return what the first run of a call returned."""
    return np.load(self.folder / f"{name}.npy")

  def close(self) -> None:
    """End the process."""
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()


def in_a_row(name: str) -> int:
  """Return how often a call runs in one timing: decoding takes one token after another."""
  return 20 if "one token" in name else 1


def seconds_of(call: Callable[[], Any], times: int) -> float:
  """Run a call so many times in a row, and return the seconds of one run."""
  began = time.perf_counter()
  for _ in range(times):
    call()
  return (time.perf_counter() - began) / times


def compare(sizes: Sizes, rounds: int, python: str | None) -> list[report.Record]:
  """Time every call on both sides in turn.

  Args:
    sizes: the sizes of the model and of the data.
    rounds: how often each call is timed.
    python: a Python with peft. None times this library alone.

  Returns:
    A record for each call.

  Raises:
    RuntimeError: PEFT's process failed, or the two sides return different numbers.
  """
  problem = Problem(sizes)
  calls = ours.calls(problem)
  with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as ends:
    other = None
    if python is not None:
      problem.write(folder := pathlib.Path(temporary) / "problem")
      other = Peft(python, folder)
      ends.callback(other.close)
    timed = {name: ([], []) for name in calls}
    for name, call in calls.items():
      found = call()
      if other is not None:
        other.seconds(name)
        apart = float(np.abs(found - other.result(name)).max())
        if not apart < _CLOSE:
          raise RuntimeError(f"{name}: the results differ by {apart:.2g}, more than {_CLOSE:g}.")
    for _ in range(rounds):
      for name, call in calls.items():
        time.sleep(_REST)
        timed[name][0].append(seconds_of(call, in_a_row(name)))
        if other is not None:
          time.sleep(_REST)
          timed[name][1].append(other.seconds(name))
    versions = {} if other is None else other.versions
  return [_record(name, timed, versions) for name in calls]


def _record(name: str, timed: dict[str, Any], versions: dict[str, str]) -> report.Record:
  """The seconds of one call on both sides, their ratio, and the ratio to the base alone."""
  own, others = timed[name]
  row: report.Record = {"call": name, "ours": measure.spread(own)._asdict()}
  if others:
    row["peft"] = measure.spread(others)._asdict()
    row["peft / ours"] = measure.ratios(others, own)._asdict()
  if name.startswith("mixed"):
    base = timed[name.replace("mixed", "base")][0]
    row["ours / our base"] = measure.ratios(own, base)._asdict()
  return row | {"versions": versions}
