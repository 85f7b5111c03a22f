"""What does the library cost? Figures beside other libraries, and studies of its own parts.

    python -m experiments.benchmarks --workload=w1 --algorithm=maml
    python -m experiments.benchmarks --workload=w1 --algorithm=maml --rival=higher \
        --peers=FOLDER --rival_python=PYTHON --rounds=3
    python -m experiments.benchmarks --workload=w4 --algorithm=sigma_imaml --against=moving=all
    python -m experiments.benchmarks --study=tolerance

Workloads: w1 few-shot images, w2 many inner steps on mini-batches, w3 sinusoids, w4 a Transformer
with few task-specific modules, w5 adaptation alone. The command prints a table, and appends one
JSON line for each measurement to --out. With --rival or --against, a second side (another library,
or this one with other settings) is measured alternately with the first: A B A B ...

The default algorithm is the first one of the workload. The default number of tasks is the
workload's own. The default of --out is runs/benchmarks.jsonl.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from experiments.benchmarks import report, worker, workloads
from experiments.benchmarks.comparison import pairs, rivals
from experiments.benchmarks.studies import index
from experiments.benchmarks.worker import Config
from experiments.settings import flags as shared
from experiments.settings import machine, paths

_WORKLOAD = flags.DEFINE_enum("workload", "w1", list(workloads.WORKLOADS), "The workload to time.")
_ALGORITHM = shared.algorithm()
_STUDY = flags.DEFINE_enum(
  "study", None, list(index.STUDIES), "A study to run, instead of timing --workload."
)
_RIVAL = flags.DEFINE_string(
  "rival", None, f"A library to measure too: {', '.join(rivals.RIVALS)}."
)
_PEERS = paths.define("peers", "Folder of the scripts that --rival runs.")
_RIVAL_PYTHON = paths.define("rival_python", "Python that has the rival installed.")
_AGAINST = flags.DEFINE_multi_string(
  "against", [], "A changed setting of this library to measure too, such as curvature=gauss_newton."
)
_ROUNDS = flags.DEFINE_integer("rounds", 1, "How often each side is measured.", 1)
_OUT = shared.out()
_WORKER = flags.DEFINE_string("worker", None, "For use by the program itself.")

_SEED = shared.seed()
_TASKS = shared.tasks()
_SHOTS = flags.DEFINE_integer(
  "shots", None, "Training examples of a class; default: the workload's.", 1
)
_STEPS = flags.DEFINE_integer("steps", None, "Inner steps; default: the workload's.", 1)
_BATCHING = flags.DEFINE_string("batching", "auto", "auto, vmap, sequential, or a number of tasks.")
_DEVICES = flags.DEFINE_integer("devices", 0, "Host devices; 0: one for each core.", 0)
_CURVATURE = flags.DEFINE_enum(
  "curvature", "hessian", ["hessian", "gauss_newton"], "Curvature in imaml's solve."
)
_MOVING = flags.DEFINE_enum("moving", "few", ["few", "all"], "Task-specific modules of w4.")
_TINY = flags.DEFINE_bool("tiny", False, "Miniature sizes, for tests.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 10, "Timed repetitions of a run.", 1)
_MAX_SECONDS = flags.DEFINE_float("max_seconds", 60.0, "No repetition begins later.", 0.0)


def read_flags() -> Config:
  """Return the configuration that the flags describe."""
  batching: Any = _BATCHING.value
  curvature: Any = _CURVATURE.value
  moving: Any = _MOVING.value
  first = workloads.WORKLOADS[_WORKLOAD.value].algorithms[0]
  return Config(
    workload=_WORKLOAD.value,
    algorithm=_ALGORITHM.value or first,
    seed=_SEED.value,
    tasks=_TASKS.value,
    shots=_SHOTS.value,
    steps=_STEPS.value,
    batching=int(batching) if batching.isdigit() else batching,
    devices=_DEVICES.value,
    curvature=curvature,
    moving=moving,
    tiny=_TINY.value,
    repetitions=_REPETITIONS.value,
    max_seconds=_MAX_SECONDS.value,
  )


def opponent(config: Config) -> Callable[[], report.Record] | None:
  """Return a function that measures the second side, or None; raise ValueError for bad flags."""
  if _RIVAL.value and _AGAINST.value:
    raise ValueError("--rival and --against exclude each other.")
  if _RIVAL.value:
    line = rivals.command(_RIVAL.value, config, _PEERS.value or "", _RIVAL_PYTHON.value or "")
    return lambda: rivals.run(line)
  if _AGAINST.value:
    other = pairs.changed(config, _AGAINST.value)
    return lambda: worker.spawn(other)
  return None


def main(argv: Sequence[str]) -> None:
  """Read the flags, measure and print."""
  shared.no_arguments(argv)
  if _WORKER.value:
    worker.main(_WORKER.value)
    return
  try:
    config = read_flags()
    other = opponent(config)
    if _STUDY.value and (other is not None or _ROUNDS.value > 1):
      raise ValueError("A study is run once, by itself: leave --rival, --against and --rounds out.")
    out = pathlib.Path(shared.or_default(_OUT, "runs/benchmarks.jsonl"))
    report.append(out)  # before anything is measured
  except (ValueError, OSError) as error:
    raise app.UsageError(str(error)) from error
  if _STUDY.value:
    machine.start_jax(config.devices, "")
    # All flags are recorded. A study ignores those of settings that it varies or fixes.
    head = {"study": _STUDY.value, "flags": dataclasses.asdict(config), "seed": config.seed}
    head |= report.environment()
    print(index.run(_STUDY.value, config, lambda row: report.append(out, head | row)))
  else:
    print(pairs.run(config, _ROUNDS.value, other, lambda record: report.append(out, record)))


if __name__ == "__main__":
  app.run(main)
