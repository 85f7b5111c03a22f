"""How times are measured: in repetitions, with their spread, on a machine that others may use.

Everything that is timed runs once beforehand, and the clock waits until its results are there. Two
things are timed in turn, A B A B ..., so that other load on the machine affects both. Report
ratios: seconds hold for one machine and one hour only.
"""

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.settings import machine

_SPARE = 0.2  # cores that others may use before a round counts as contended
_GROUP = 0.1  # seconds a repetition should last at least: short steps are timed in groups
_ENOUGH = 3  # calm rounds needed to leave the others out


class Spread(NamedTuple):
  """A median and how far single repetitions were from it."""

  median: float
  low: float  # the smallest
  high: float  # the largest
  repeats: int


class Timing(NamedTuple):
  """Seconds of one step, per repetition. Repetitions of what was timed in turn are paired."""

  seconds: tuple[float, ...]
  own_cores: float  # processor seconds of this process a second, median
  other_cores: float | None  # of all others; None where the system does not tell
  contended: bool  # others were busy, and fewer than three rounds were calm


def spread(values: Sequence[float]) -> Spread:
  """Median, smallest, largest, and of how many.

  >>> spread([3.0, 1.0, 2.0])
  Spread(median=2.0, low=1.0, high=3.0, repeats=3)
  """
  if not values:
    raise ValueError("A spread needs one value at least; got none.")
  return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(a: Sequence[float], b: Sequence[float]) -> Spread:
  """Spread of a / b over pairs."""
  return spread([x / y for x, y in zip(a, b, strict=True)])


def loglog_slope(x: Sequence[float], y: Sequence[float]) -> float:
  """k of y ~ x^k, least squares in logarithms over the upper half of the range of log x.

  The lower half is left out: there a fixed cost hides how the rest grows.
  """
  log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
  upper = log_x >= (log_x.min() + log_x.max()) / 2 - 1e-9
  if len(np.unique(log_x[upper])) < 2:
    raise ValueError(f"A slope needs two points in the upper half of the range; got x = {x}.")
  return float(np.polyfit(log_x[upper], log_y[upper], 1)[0])


def machine_busy() -> float | None:
  """Processor seconds that the whole machine has spent; None where /proc/stat does not exist."""
  try:
    with open("/proc/stat", encoding="ascii") as file:
      ticks = [int(word) for word in file.readline().split()[1:9]]
  except OSError:
    return None
  idle, waiting = ticks[3], ticks[4]
  return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
  """Largest resident size of this process so far, bytes."""
  try:  # getrusage of a child on Linux begins with what its parent had
    with open("/proc/self/status", encoding="ascii") as file:
      return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
  except (OSError, StopIteration):
    pass
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak


class _Repetition(NamedTuple):
  wall: float  # seconds of one step
  own: float  # cores
  others: float | None  # cores


def _repeat(step: Callable[[], Any], group: int) -> _Repetition:
  """`group` steps, each blocked on.

  What the whole machine spent less what this process spent is what the others took.
  """
  busy, own, begin = machine_busy(), time.process_time(), time.perf_counter()
  for _ in range(group):
    jax.block_until_ready(step())
  wall = time.perf_counter() - begin
  own, now = time.process_time() - own, machine_busy()
  others = None if busy is None or now is None else max(0.0, now - busy - own) / wall
  return _Repetition(wall / group, own / wall, others)


def time_in_turn(
  steps: Mapping[str, Callable[[], Any]], repetitions: int, max_seconds: float
) -> dict[str, Timing]:
  """Times every step of `steps` in rounds A B A B ...

  Rounds in which others used the cores do not count, if three calm ones were seen.

  Args:
    steps: name -> one step; each runs once beforehand.
    repetitions: calm rounds wanted.
    max_seconds: no new round begins after this; one always runs.
  """
  begin, groups = time.perf_counter(), {}
  for name, step in steps.items():
    jax.block_until_ready(step())
    groups[name] = max(1, round(_GROUP / max(_repeat(step, 1).wall, 1e-9)))
  spare = (os.cpu_count() or 1) - machine.cores() + _SPARE  # cores not ours are theirs to use
  calm, rounds = [], []
  while len(calm) < repetitions and len(rounds) < 4 * repetitions:
    if rounds and time.perf_counter() - begin > max_seconds:
      break
    rounds.append({name: _repeat(step, groups[name]) for name, step in steps.items()})
    calm = [r for r in rounds if all((rep.others or 0.0) < spare for rep in r.values())]
  kept = calm if len(calm) >= min(_ENOUGH, repetitions) else rounds
  timings = {}
  for name in steps:
    seen = [r[name] for r in kept]
    others = [rep.others for rep in seen if rep.others is not None]
    timings[name] = Timing(
      tuple(rep.wall for rep in seen),
      statistics.median(rep.own for rep in seen),
      statistics.median(others) if others else None,
      len(kept) > len(calm),
    )
  return timings


def timing_fields(timing: Timing) -> dict[str, Any]:
  """A timing as fields of a record."""
  return {
    "seconds": spread(timing.seconds)._asdict(),
    "own_cores": timing.own_cores,
    "other_cores": timing.other_cores,
    "contended": timing.contended,
  }


class Compiled(NamedTuple):
  """A compiled step with what it took to get there and what XLA says of it."""

  call: Callable[..., Any]
  trace_seconds: float
  compile_seconds: float
  temp_bytes: int | None  # of the program of one device
  xla_flops: (
    float | None
  )  # of one device; the body of a loop is counted once, however often it runs


def compile_step(f: Callable[..., Any], *arguments: Any) -> Compiled:
  """Traces and compiles f for these arguments, ahead of time and timed apart."""
  begin = time.perf_counter()
  lowered = jax.jit(f).lower(*arguments)
  traced = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - traced
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  flops = costs.get("flops") if isinstance(costs, dict) else None
  temp = None if memory is None else int(memory.temp_size_in_bytes)
  return Compiled(compiled, traced - begin, seconds, temp, flops)


def matmul_rate(size: int = 2048, repetitions: int = 5) -> float:
  """GFLOP/s of a float32 matrix product on all cores: what this machine can give in this hour."""
  a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
  product = jax.jit(jnp.matmul)
  timing = time_in_turn({"matmul": lambda: product(a, a)}, repetitions, 10.0)["matmul"]
  return 2 * size**3 / min(timing.seconds) / 1e9
