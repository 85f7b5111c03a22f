"""How times are measured: repeatedly, with their spread, on a machine that others may use.

Each function runs once before it is timed. The clock stops when the results are there. Two
functions are timed alternately, A B A B ..., so that other load on the machine affects both.
Report ratios, because seconds hold for one machine and one hour only.
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
  """The median of repetitions, with the smallest and the largest."""

  median: float
  low: float  # the smallest
  high: float  # the largest
  repeats: int


class Timing(NamedTuple):
  """Seconds of one step in each repetition; functions timed alternately have paired repetitions."""

  seconds: tuple[float, ...]
  own_cores: float  # processor seconds of this process a second, median
  other_cores: float | None  # of all others; None where the system does not tell
  contended: bool  # others were busy, and fewer than three rounds were calm


def spread(values: Sequence[float]) -> Spread:
  """Return the median, the smallest, the largest and the number of values.

  >>> spread([3.0, 1.0, 2.0])
  Spread(median=2.0, low=1.0, high=3.0, repeats=3)
  """
  if not values:
    raise ValueError("A spread needs one value at least; got none.")
  return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(a: Sequence[float], b: Sequence[float]) -> Spread:
  """Return the spread of a / b over pairs."""
  return spread([x / y for x, y in zip(a, b, strict=True)])


def loglog_slope(x: Sequence[float], y: Sequence[float]) -> float:
  """Return k of y ~ x^k, by least squares in logarithms over the upper half of the range of log x.

  The lower half is left out, because a fixed cost dominates y there.
  """
  log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
  upper = log_x >= (log_x.min() + log_x.max()) / 2 - 1e-9
  if len(np.unique(log_x[upper])) < 2:
    raise ValueError(f"A slope needs two points in the upper half of the range; got x = {x}.")
  return float(np.polyfit(log_x[upper], log_y[upper], 1)[0])


def machine_busy() -> float | None:
  """Return the processor seconds spent by the whole machine; None without /proc/stat."""
  try:
    with open("/proc/stat", encoding="ascii") as file:
      ticks = [int(word) for word in file.readline().split()[1:9]]
  except OSError:
    return None
  idle, waiting = ticks[3], ticks[4]
  return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def peak_memory() -> int:
  """Return the largest resident size of this process so far, in bytes."""
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
  """Run a step `group` times, and wait for each result.

  The load of other processes is the machine's processor time minus that of this process.
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
  """Time the functions of `steps` alternately, A B A B ...

  A round is calm if no other process used the cores. If there are three calm rounds or more, the
  others are dropped.

  Args:
    steps: {name: function}; each runs once before it is timed.
    repetitions: the number of calm rounds to reach.
    max_seconds: no round begins after this time, except the first.
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
  """Return a timing as fields of a record."""
  return {
    "seconds": spread(timing.seconds)._asdict(),
    "own_cores": timing.own_cores,
    "other_cores": timing.other_cores,
    "contended": timing.contended,
  }


class Compiled(NamedTuple):
  """A compiled step, the seconds to trace and compile it, and XLA's analysis of it."""

  call: Callable[..., Any]
  trace_seconds: float
  compile_seconds: float
  temp_bytes: int | None  # of the program of one device
  xla_flops: (
    float | None
  )  # of one device; the body of a loop is counted once, however often it runs


def compile_step(f: Callable[..., Any], *arguments: Any) -> Compiled:
  """Trace and compile f for these arguments, ahead of time, and time the two apart."""
  begin = time.perf_counter()
  lowered = jax.jit(f).lower(*arguments)
  traced = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - traced
  memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
  flops = costs.get("flops") if isinstance(costs, dict) else None
  temp = None if memory is None else int(memory.temp_size_in_bytes)
  return Compiled(compiled, traced - begin, seconds, temp, flops)


class Phases(NamedTuple):
  """A compiled program, and the seconds of each phase on the way to it."""

  compiled: Any
  operations: int  # of the program that XLA gets
  trace_seconds: float  # to a jaxpr
  lower_seconds: float  # to StableHLO
  compile_seconds: float  # by XLA, with LLVM


def phases(f: Callable[..., Any], *arguments: Any) -> Phases:
  """Trace, lower and compile f with empty caches, and time the three apart."""
  jax.clear_caches()
  begin = time.perf_counter()
  traced = jax.jit(f).trace(*arguments)
  at_trace = time.perf_counter()
  lowered = traced.lower()
  at_lower = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  operations = lowered.as_text().count(" = ")
  return Phases(compiled, operations, at_trace - begin, at_lower - at_trace, end - at_lower)


def matmul_rate(size: int = 2048, repetitions: int = 5) -> float:
  """Return GFLOP/s of a float32 matrix product on all cores: the machine's speed at this hour."""
  a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
  product = jax.jit(jnp.matmul)
  timing = time_in_turn({"matmul": lambda: product(a, a)}, repetitions, 10.0)["matmul"]
  return 2 * size**3 / min(timing.seconds) / 1e9
